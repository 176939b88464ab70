"""What autograd keeps for the backward pass, counted once a storage."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from .._record import SavedTensorsBlock, storages_of

__all__ = ["SavedForBackward", "saved_for_backward"]


class SavedForBackward:
    """Context manager that records the storages that autograd saves inside it.

    Two tensors that share a storage count once: that is what the memory-sharing norms are about.
    While it lives it keeps the storages alive. Blocks may be nested; each counts what is saved inside
    it. Other saved-tensor hooks around the block are not called inside it (torch calls the innermost
    alone). Tensors of opaque layouts (mkldnn) are not counted.

    Args:
        exclude: Tensors that are there anyway (parameters, buffers, inputs); storages of theirs are
            not counted.

    Attributes:
        tensors: Number of saved tensors, those of excluded storages left out.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        # The address of the storage object, not of its data: that is 0 for fake and meta tensors.
        self._excluded = {s._cdata: s for t in exclude for s in storages_of(t)}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.tensors = 0

    def _record(self, tensor: Tensor) -> None:
        counted = [s for s in storages_of(tensor) if s._cdata not in self._excluded]
        self._storages.update((s._cdata, s) for s in counted)
        self.tensors += bool(counted)

    @property
    def storages(self) -> list[torch.UntypedStorage]:
        """The distinct storages, in the order in which they were first saved."""
        return list(self._storages.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages."""
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
