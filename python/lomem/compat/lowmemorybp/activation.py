"""LowMemoryBP's ``lomem.activation``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import regelu2, resilu2

__all__ = ["ReGELU2Function", "ReSiLU2Function", "regelu2", "resilu2"]


class ReGELU2Function(torch.autograd.Function):
    """Holds :func:`lomem.functional.regelu2` as ``apply``; the function of autograd itself is in C++."""

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        """Applies GELU, and saves 2 bits per element."""
        return regelu2(x)


class ReSiLU2Function(torch.autograd.Function):
    """Holds :func:`lomem.functional.resilu2` as ``apply``; the function of autograd itself is in C++."""

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        """Applies SiLU, and saves 2 bits per element."""
        return resilu2(x)
