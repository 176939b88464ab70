"""float64 on devices that may have none: MPS, and some that XPU stands for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["has_float64", "in_float64"]


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    if device.type in ("cpu", "cuda", "meta", "mps"):
        return device.type != "mps"
    try:
        torch.ones((), dtype=torch.float64, device=device).sqrt()
    except (RuntimeError, TypeError):
        return False
    return True


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its device if that has float64, otherwise on the CPU."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()
