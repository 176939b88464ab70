"""What autograd keeps for the backward pass, counted once a storage."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["SavedForBackward", "saved_for_backward"]


class SavedForBackward:
    """Context manager that records the storages that autograd saves inside it.

    Two tensors that share a storage count once: that is what the memory-sharing norms are about.
    While it lives it keeps the storages alive.

    Args:
        exclude: Tensors that are there anyway (parameters, buffers, inputs); storages of theirs are
            not counted.

    Attributes:
        tensors: Number of saved tensors, those of excluded storages left out.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        # The address of the storage object, not of its data: that is 0 for fake and meta tensors.
        self._excluded = {t.untyped_storage()._cdata: t.untyped_storage() for t in exclude}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.tensors = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._record, lambda t: t)

    def _record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = storage
            self.tensors += 1
        return tensor

    @property
    def storages(self) -> list[torch.UntypedStorage]:
        """The distinct storages, in the order in which they were first saved."""
        return list(self._storages.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> SavedForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)


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
