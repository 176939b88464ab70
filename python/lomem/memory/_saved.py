"""Records what autograd saves for backward, counting each storage once."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._trace.hooks import SavedTensorsBlock
from .._trace.recorder import storages_of
from ._run import no_hooks, refuses_hooks

__all__ = ["SavedForBackward", "saved_for_backward"]


class SavedForBackward:
    """Context manager that records the storages that autograd saves inside it.

    Tensors that share a storage count once; memory-sharing norms rely on this. The object keeps the storages alive.
    Blocks may be nested; each counts what is saved inside it. Other saved-tensor hooks around the block are not called
    inside it, since torch calls only the innermost hooks. For tensor subclasses that wrap tensors, the wrapped tensors
    are counted. Tensors of opaque layouts (mkldnn) are not counted.

    Args:
        exclude: Tensors that are in memory anyway (parameters, buffers, inputs). Their storages are not counted.

    Attributes:
        tensors: Number of saved tensors, without those of excluded storages.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        # By the address of the storage object, since that of its data is 0 for fake and meta tensors.
        self._excluded: dict[int, torch.UntypedStorage] = {}
        self._lazy = self._checked(exclude)
        self._exclude()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.tensors = 0

    @staticmethod
    def _checked(exclude: Any) -> list[Tensor]:
        tensors = [exclude] if isinstance(exclude, Tensor) or not isinstance(exclude, Iterable) else list(exclude)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"lomem.memory.saved_for_backward: exclude has a {type(tensor).__name__}, expected only tensors"
                )
        return tensors

    def _exclude(self) -> None:
        # Lazy parameters get their storage when the model first runs.
        self._excluded |= {s._cdata: s for t in self._lazy for s in storages_of(t)}
        self._lazy = [t for t in self._lazy if is_lazy(t)]

    def _record(self, tensor: Tensor) -> None:
        if self._lazy:
            self._exclude()
        counted = [s for s in storages_of(tensor) if s._cdata not in self._excluded]
        self._storages.update((s._cdata, s) for s in counted)
        self.tensors += bool(counted)

    @property
    def storages(self) -> list[torch.UntypedStorage]:
        """Distinct storages, in the order in which they were first saved."""
        return list(self._storages.values())

    @property
    def nbytes(self) -> int:
        """Total bytes of the distinct storages."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> SavedForBackward:
        self._block = SavedTensorsBlock(self._record)
        self._block.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.__exit__(kind, error, traceback)
        del self._block  # it refers to this object: a cycle would keep the storages alive
        if refuses_hooks(error):
            raise RuntimeError(no_hooks("lomem.memory.saved_for_backward")) from error


def saved_for_backward(exclude: Iterable[Tensor] = ()) -> SavedForBackward:
    """Records what autograd saves for backward.

    Example:
        >>> with lomem.memory.saved_for_backward(model.parameters()) as saved:
        ...     loss = model(x).sum()
        >>> saved.nbytes

    Args:
        exclude: Tensors whose storages are not counted.

    Returns:
        A context manager with ``nbytes``, ``storages`` and ``tensors``.
    """
    return SavedForBackward(exclude)
