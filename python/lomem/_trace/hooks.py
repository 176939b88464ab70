"""Module hooks and saved-tensor hooks that do not hide events from one another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["ModulePath", "SavedTensorsBlock", "hook_after", "hook_before"]


# A ScriptModule disables these methods, since hooks are not compiled. Hooks around a call of the whole module run in
# Python, and do work.
def hook_before(module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """``module.register_forward_pre_hook``, for ScriptModules too."""
    return nn.Module.register_forward_pre_hook(module, hook, **options)


def hook_after(module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """``module.register_forward_hook``, for ScriptModules too."""
    return nn.Module.register_forward_hook(module, hook, **options)


class ModulePath:
    """Context manager that tracks which submodule of a model is running: the innermost one, by its first name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stack: list[str] = []

    @property
    def path(self) -> str | None:
        """Qualified name of the innermost running module: ``""`` for the model itself, None outside of it."""
        return self._stack[-1] if self._stack else None

    def __enter__(self) -> ModulePath:
        self._handles = []
        for name, module in self._model.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self._stack.append(name)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                self._stack.pop()

            self._handles.append(hook_before(module, enter, prepend=True))
            # Also if the module raises: checkpointing ends a recomputed forward with an exception.
            self._handles.append(hook_after(module, leave, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()


class _Recorders(threading.local):
    def __init__(self) -> None:
        self.active: list[Callable[[Tensor], None]] = []


_recorders = _Recorders()


def _pack(tensor: Tensor) -> Tensor:
    # torch calls only the innermost hooks, so they notify all enclosing blocks.
    for record in _recorders.active:
        record(tensor)
    # Not the tensor itself: an op that saves its own result would then reference itself, and a graph that no backward
    # pass frees would leak. torch reattaches the unpacked tensor to the graph.
    return tensor.detach()


class SavedTensorsBlock:
    """Context manager that calls a function with every tensor that autograd saves inside it.

    Blocks may be nested, and each one's function is called. Other saved-tensor hooks around the innermost block are not
    called, since torch calls only the innermost hooks. Hooks inside it (checkpointing) hide what they replace.
    """

    def __init__(self, record: Callable[[Tensor], None]) -> None:
        self._record = record

    def __enter__(self) -> SavedTensorsBlock:
        _recorders.active.append(self._record)
        # The hooks must not refer to a recorder: a cycle through the graph would keep its storages alive.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(_pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)
        _recorders.active.remove(self._record)
