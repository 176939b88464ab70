"""Detects changes to a module after its conversion."""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Fixed", "fixed", "holds"]

#: Attributes with the values they had. Each is a path of names from the module, directly or through an object it holds.
Fixed: TypeAlias = tuple[tuple[tuple[str, ...], Any], ...]

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_SCALARS = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_CONTAINERS = (tuple, list, dict, set)


class _Present:
    """Stands for a parameter or buffer that exists, whatever its value."""


def _is_plain(value: Any) -> bool:
    """Whether comparing for equality is enough, rather than for identity."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    return isinstance(value, _SCALARS) or (isinstance(value, _CONTAINERS) and all(map(_is_plain, value)))


def _attributes(name: str, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield (name,), copy.deepcopy(value) if _is_plain(value) else value
    # For example a configuration that the module reads.
    if not callable(value) and not isinstance(value, Tensor | types.ModuleType):
        for inner, held in getattr(value, "__dict__", {}).items():
            if _is_plain(held):
                yield (name, inner), copy.deepcopy(held)


def fixed(module: nn.Module, live: Collection[str | None] = ()) -> Fixed:
    """The state that a module was recognized with. If it changes, the module may compute something else.

    Args:
        module: The module to convert.
        live: Attributes that are read at each call, and so may change.
    """
    own = {name: v for name, v in vars(module).items() if name not in _MODULE_ATTRIBUTES and name not in live}
    tensors = {**module._parameters, **module._buffers}
    return (
        *(entry for name, value in own.items() for entry in _attributes(name, value)),
        *(((name,), None if tensor is None else _Present) for name, tensor in tensors.items()),
    )


def holds(module: nn.Module, expected: Fixed) -> bool:
    """Whether none of that has changed."""
    if "parametrizations" in module._modules:
        return False  # a parametrized weight is recomputed at each access, and may differ each time
    for path, before in expected:
        if before is _Present:
            (name,) = path
            # Not by getattr: the parameter may have been replaced by a property.
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
