"""Measures the peak of the CUDA allocator."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .._trace.batch import as_batch
from ._run import Loss, Run

__all__ = ["measured_peak"]


def measured_peak(
    build_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    *,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
) -> int:
    """Trains on a GPU in a separate process, and returns the allocator's peak in bytes.

    This is ``torch.cuda.max_memory_allocated()`` for the second step. It includes workspaces and rounding, which
    :func:`step_peak` and :func:`estimate` do not see. Functions are sent by name, so they must be importable: no
    lambdas or nested functions.

    Args:
        build_fn: Function that builds the model; runs with CUDA as default device.
        batch_fn: Function that makes the batch, as for :func:`step_peak`; runs with CUDA as default device.
        optimizer: Function of the list of trainable parameters, such as a class from torch.optim.
        loss: Loss function, as for :func:`lomem.memory.profile`.
        autocast: Autocast dtype of the forward pass.
    """
    function = "lomem.memory.measured_peak"
    if not torch.cuda.is_available():
        raise RuntimeError(f"{function}: no CUDA device is available, expected one (lomem.memory.estimate needs none)")
    for name, value in (("build_fn", build_fn), ("batch_fn", batch_fn), ("optimizer", optimizer), ("loss", loss)):
        if value is not None and not callable(value):
            raise TypeError(f"{function}: {name} is of type {type(value).__name__}, expected a function")
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"{function}: {name} is {value!r}, expected an importable function") from error
    # Spawned, since a forked process cannot use CUDA; separate, since this process may hold memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train_and_read, build_fn, batch_fn, optimizer, loss, autocast, "cuda").result()


def train_and_read(
    build_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
    loss: Loss | None,
    autocast: torch.dtype | None,
    device: str,
) -> int:
    """Runs in the separate process."""
    function = "lomem.memory.measured_peak"
    memory = torch.get_device_module(device)
    with torch.device(device):
        model = build_fn().to(device)
        batch = as_batch(function, "batch", batch_fn())
    made = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer is not None else None
    run = Run(function, model, batch, loss, autocast)
    for _ in range(2):  # the first step creates the optimizer's state
        model.zero_grad(set_to_none=True)
        memory.reset_peak_memory_stats()
        run.backward(run.forward())
        if made is not None:
            made.step()
    memory.synchronize()
    return int(memory.max_memory_allocated())
