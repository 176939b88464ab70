"""What of a module may change after its conversion."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

import torch
from torch import nn

__all__ = ["Fixed", "fixed", "holds"]

#: Attributes by name, with what they were.
Fixed: TypeAlias = tuple[tuple[str, Any], ...]

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None), tuple, list, dict, set)


class _Present:
    """Of a parameter or buffer: it is there, whatever it holds."""


def fixed(module: nn.Module, live: Collection[str | None] = ()) -> Fixed:
    """What a module was recognized with, which must not change if it is to be what it was recognized as.

    Args:
        module: That is to be converted.
        live: Attributes that are read whenever it runs.
    """
    attributes = [
        (name, value.copy() if isinstance(value, list | dict | set) else value)
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES and name not in live
    ]
    tensors = {**module._parameters, **module._buffers}
    return (*attributes, *((name, None if tensor is None else _Present) for name, tensor in tensors.items()))


def holds(module: nn.Module, expected: Fixed) -> bool:
    """Whether nothing of that has changed."""
    if "parametrizations" in module._modules:
        return False  # a weight is computed whenever it is asked for, and may be another each time
    for name, before in expected:
        if before is _Present:
            # Not by getattr: whoever took a parameter away may have put a property in its place.
            if module._parameters.get(name, before) is None or module._buffers.get(name, before) is None:
                return False
            continue
        now = getattr(module, name, None)
        if now is not before and not (isinstance(before, _PLAIN) and type(now) is type(before) and now == before):
            return False
    return True
