"""What the ops do on devices that lomem has no kernels for: they run :mod:`lomem.reference`.

Registered for the dispatch key of each such device, and for nothing else: on the CPU, on CUDA and for shapes, the
dispatcher finds the same kernels as without this file.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import reference
from ._trace.autocast import autocast_to

__all__ = ["DISPATCH_KEYS", "register"]

#: Dense tensors on these devices have no kernels in C++. (Other layouts, which no device has kernels for, are refused.)
DISPATCH_KEYS = tuple(
    "HPU IPU Lazy MAIA MPS MTIA PrivateUse1 PrivateUse2 PrivateUse3 VE XLA XPU".split()  # noqa: SIM905 (one line)
)

_library = torch.library.Library("lomem", "IMPL")
_warned = threading.Event()


def _warn(device: torch.device) -> None:
    if not _warned.is_set():
        _warned.set()
        warnings.warn(
            f"lomem has no kernels for {device.type}: its ops run their reference implementation (lomem.reference) "
            "there, which is slower and takes more memory while it runs",
            UserWarning,
            stacklevel=3,
        )


def _device_of(name: str, arguments: Iterable[tuple[str, Any]]) -> torch.device:
    """The device that all tensors are on."""
    first, device = "", torch.device("cpu")
    for argument, value in arguments:
        if isinstance(value, Tensor):
            if not first:
                first, device = argument, value.device
            elif value.device != device:
                raise RuntimeError(f"{name}: {argument} is on {value.device}, expected {device}, the device of {first}")
    return device


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _like(result: Tensor | None, promised: Tensor | None) -> Tensor | None:
    """A result with the strides that a compiler expects: the reference's may be those of an operand."""
    if result is None or promised is None:
        return None
    if result.stride() == promised.stride():
        return result
    return torch.empty_strided(promised.shape, promised.stride(), dtype=result.dtype, device=result.device).copy_(
        result
    )


def _kernel(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(op._schema.name, [*zip(names, args, strict=False), *kwargs.items()])
        # The kernels for shapes check all arguments.
        promised = op(*tree_map_only(Tensor, _without_data, args), **tree_map_only(Tensor, _without_data, kwargs))
        _warn(device)
        # Gradients are made above, by the library; a cast to the autocast dtype would change results.
        with torch.no_grad(), autocast_to(device.type, None):
            results = function(*args, **kwargs)
            if isinstance(promised, tuple):
                return tuple(map(_like, results, promised))
            return _like(results, promised)

    return kernel


def register() -> None:
    """Registers the reference implementation of every op that needs kernels, for every device that has none."""
    for name, function in reference.OPS.items():
        kernel = _kernel(getattr(torch.ops.lomem, name).default, function)
        for key in DISPATCH_KEYS:
            # (The package may be imported again, and a device's own kernels have precedence.)
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lomem::{name}", key):
                _library.impl(name, kernel, key)
