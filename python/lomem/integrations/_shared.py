"""What the callbacks share."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .._trace.state import preserved
from ..conversion import convert

__all__ = ["check_not_sharded", "check_options", "first_rows"]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises a TypeError unless :func:`lomem.convert` has these options."""
    known = {option for option in inspect.signature(convert).parameters if option not in ("model", "example_inputs")}
    if unknown := options.keys() - known:
        raise TypeError(f"{name}: got {min(unknown)}, expected options of lomem.convert: {', '.join(sorted(known))}")


def check_not_sharded(name: str, model: nn.Module) -> None:
    """Raises a ValueError if FSDP, of either kind, has a part of a model."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{name}: the model is sharded by FSDP already when training begins, expected one that is not: call "
            "lomem.convert before the trainer gets it"
        )


def first_rows(name: str, loader: Any, model: nn.Module) -> Any:
    """The first two rows of a dataloader's data, collated: of one row alone, some norms have no statistics.

    The dataloader is not iterated over, and random numbers are restored.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"{name}: the training data are in a {type(loader).__name__}, expected a DataLoader, or example_inputs"
        )
    dataset: Any = loader.dataset
    with preserved(model):
        if hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
            rows = [dataset[i] for i in range(min(2, len(dataset)))]
        elif iter(dataset) is iter(dataset):
            raise ValueError(f"{name}: the data can be iterated over only once, expected example_inputs with it")
        else:
            rows = list(itertools.islice(dataset, 2))
        # A collator may have a generator of random numbers; others have the model itself, which is not to be copied.
        collate = copy.deepcopy(loader.collate_fn, {id(module): module for module in model.modules()})
        batch = collate(rows)
    return dict(batch) if isinstance(batch, Mapping) else batch
