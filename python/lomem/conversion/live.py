"""What of a module may change after its conversion."""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Fixed", "fixed", "holds"]

#: Attributes, with what they were: names that lead to one, from the module or through an object that it has.
Fixed: TypeAlias = tuple[tuple[tuple[str, ...], Any], ...]

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_SCALARS = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_CONTAINERS = (tuple, list, dict, set)


class _Present:
    """Stands for a parameter or buffer that is there, whatever it holds."""


def _is_plain(value: Any) -> bool:
    """Whether equal is as good as the same."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    return isinstance(value, _SCALARS) or (isinstance(value, _CONTAINERS) and all(map(_is_plain, value)))


def _attributes(name: str, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield (name,), copy.deepcopy(value) if _is_plain(value) else value
    # A configuration, or the like, that the module reads from.
    if not callable(value) and not isinstance(value, Tensor | types.ModuleType):
        for inner, held in getattr(value, "__dict__", {}).items():
            if _is_plain(held):
                yield (name, inner), copy.deepcopy(held)


def fixed(module: nn.Module, live: Collection[str | None] = ()) -> Fixed:
    """What a module was recognized with, which must not change if it is to be what it was recognized as.

    Args:
        module: That is to be converted.
        live: Attributes that are read whenever it runs.
    """
    own = {name: v for name, v in vars(module).items() if name not in _MODULE_ATTRIBUTES and name not in live}
    tensors = {**module._parameters, **module._buffers}
    return (
        *(entry for name, value in own.items() for entry in _attributes(name, value)),
        *(((name,), None if tensor is None else _Present) for name, tensor in tensors.items()),
    )


def holds(module: nn.Module, expected: Fixed) -> bool:
    """Whether nothing of that has changed."""
    if "parametrizations" in module._modules:
        return False  # a weight is computed whenever it is asked for, and may be another each time
    for path, before in expected:
        if before is _Present:
            (name,) = path
            # Not by getattr: whoever took a parameter away may have put a property in its place.
            if module._parameters.get(name, before) is None or module._buffers.get(name, before) is None:
                return False
            continue
        now: Any = module
        for name in path:
            now = getattr(now, name, None)
        if now is not before and not (
            isinstance(before, (*_SCALARS, *_CONTAINERS)) and type(now) is type(before) and now == before
        ):
            return False
    return True
