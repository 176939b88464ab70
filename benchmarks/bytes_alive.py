"""Counts the bytes that a forward pass leaves alive, whatever holds them.

Independent of lomem and of autograd's hooks: every storage that an op makes is followed by a weak reference. So it also
counts what is not saved by autograd, but by a module, by a cache, or by the context of a custom function.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Made(TorchDispatchMode):
    """Follows the storages that ops make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._seen.setdefault(storage._cdata, StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A weak reference keeps the address of its object from being used again.
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = reference = StorageWeakRef(storage)
                self.made[storage._cdata] = reference, storage.nbytes()
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_alive(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> tuple[int, Any]:
    """Runs a forward pass and counts what it leaves behind.

    Parameters, buffers and the batch were there before, so they do not count; neither does what the forward pass
    returns. Storages count once.

    Args:
        forward: The forward pass, with its autocast block if there is one. Compiled functions are not supported: torch
            does not compile under a mode.
        exclude: More tensors not to count.

    Returns:
        The number of bytes, and the result.
    """
    made = _Made()
    torch.clear_autocast_cache()
    with made:
        result = forward()
    gc.collect()
    # The size of an op's result that is resized later is not known; none of torch's layers does that.
    others = {storage._cdata for storage in _storages([result, *exclude])}
    alive = [n for key, (reference, n) in made.made.items() if key not in others and not reference.expired()]
    return sum(alive), result
