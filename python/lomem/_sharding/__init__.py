"""What the ops do with DTensors: each rank runs them on its own shards.

Registered when DTensor exists: torch.distributed.tensor takes long to import, and a torch without distributed lacks it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["is_distributed", "register", "wrapped_by"]

_DTENSOR = "torch.distributed.tensor"


#: The class of DTensors, as soon as it exists.
_classes: tuple[type, ...] = ()


def is_distributed(*tensors: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return any(isinstance(t, _classes) for t in tensors)


def wrapped_by(tensor: Any) -> Any:
    """The local tensor that a DTensor was made of by ``DTensor.from_local``; None for others."""
    if not is_distributed(tensor):
        return None
    local = tensor._local_tensor
    base = local._base  # DTensor.from_local makes a view
    same = base is not None and (local.shape, local.stride()) == (base.shape, base.stride())
    return base if same and local.storage_offset() == base.storage_offset() else None


def _register_rules() -> None:
    global _classes
    importlib.import_module(".rules", __name__).register()
    _classes = (sys.modules[_DTENSOR].DTensor,)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the rules right after the module of DTensor has run, whoever imports it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _DTENSOR:
            return None
        sys.meta_path.remove(self)  # it finds nothing else
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # type: ignore[method-assign]
                run(module)
                _register_rules()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers the rules of all ops, now or as soon as DTensor is imported."""
    if hasattr(sys.modules.get(_DTENSOR), "DTensor"):
        _register_rules()
    else:
        sys.meta_path.insert(0, _WhenImported())
