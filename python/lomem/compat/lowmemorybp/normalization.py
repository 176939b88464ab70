"""LowMemoryBP's ``lomem.normalization``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...functional import layer_norm, rms_norm

__all__ = ["LayerNormFunction", "RMSNormFunction", "layer_norm", "rms_norm"]


class LayerNormFunction(torch.autograd.Function):
    """Holds :func:`lomem.functional.layer_norm` as ``apply``; the function of autograd itself is in C++."""

    @classmethod
    def apply(cls, x: Tensor, normalized_shape: Sequence[int], eps: float) -> Tensor:
        """Normalizes, and saves the output."""
        return layer_norm(x, normalized_shape, eps)


class RMSNormFunction(torch.autograd.Function):
    """Holds :func:`lomem.functional.rms_norm` as ``apply``; the function of autograd itself is in C++."""

    @classmethod
    def apply(cls, x: Tensor, normalized_shape: Sequence[int], eps: float) -> Tensor:
        """Normalizes, and saves the output."""
        return rms_norm(x, normalized_shape, eps)
