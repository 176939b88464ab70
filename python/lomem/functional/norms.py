"""The norms whose backward pass saves their output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import is_jagged

__all__ = ["layer_norm", "ms_layer_norm", "ms_rms_norm", "rms_norm"]

# The overloads, not the packets: without the look-up by argument types a call costs less.
_ms_layer_norm = torch.ops.lomem.ms_layer_norm.default
_ms_rms_norm = torch.ops.lomem.ms_rms_norm.default


def ms_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalization that keeps its output for the backward pass, not its input.

    A linear layer that follows keeps the same tensor, so the norm costs one float a row (Yang et al.,
    ICML 2024, arXiv:2406.16282, MS-LayerNorm). With ``weight`` and ``bias`` the backward pass
    recovers the normalized input as ``(output - bias) / weight``; it loses digits in channels where
    ``abs(bias)`` is much greater than ``abs(weight)``, and where ``weight`` is so small that the
    output is subnormal in its dtype (float16: below 6e-5).

    Args:
        input: Shape ``(*, *normalized_shape)``; float64, float32, bfloat16 or float16.
        normalized_shape: The last dimensions of ``input``, over which is normalized.
        weight: Shape ``normalized_shape``, any floating-point dtype. Where a gradient is needed, no
            element may be smaller in magnitude than the smallest normal number of the output's dtype.
        bias: Shape ``normalized_shape``, any floating-point dtype.
        eps: Added to the variance; finite and not negative.
        dtype: Of the output. By default the autocast dtype where autocast is on (so that linear
            layers share it), else that of ``input``. Pass ``torch.float32`` where the output also
            feeds a residual stream in float32.

    Returns:
        A contiguous tensor of the shape of ``input``. Saved for backward: itself, and 4 bytes a row
        (8 for a float64 input). Second derivatives raise.
    """
    if is_jagged(input):
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps).to(dtype or input.dtype)
    return _ms_layer_norm(input, normalized_shape, weight, bias, eps, dtype=dtype)


def ms_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMS normalization that keeps its output for the backward pass, not its input.

    As :func:`ms_layer_norm`, without centring and without bias (Yang et al., ICML 2024,
    arXiv:2406.16282, MS-RMSNorm). Recovering the normalized input as ``output / weight`` loses
    digits only where the output is subnormal in its dtype.

    Args:
        input: Shape ``(*, *normalized_shape)``; float64, float32, bfloat16 or float16.
        normalized_shape: The last dimensions of ``input``, over which is normalized.
        weight: Shape ``normalized_shape``, any floating-point dtype. Where a gradient is needed, no
            element may be smaller in magnitude than the smallest normal number of the output's dtype.
        eps: Added to the mean square; finite and not negative. By default, as in ``F.rms_norm``, the
            machine epsilon of float32 (of float64 for a float64 input).
        dtype: Of the output; see :func:`ms_layer_norm`.

    Returns:
        A contiguous tensor of the shape of ``input``. Saved for backward: itself, and 4 bytes a row
        (8 for a float64 input). Second derivatives raise.
    """
    if is_jagged(input):
        return F.rms_norm(input, list(normalized_shape), weight, eps).to(dtype or input.dtype)
    return _ms_rms_norm(input, normalized_shape, weight, eps, dtype=dtype)


# Names of LowMemoryBP, so that its users change nothing.


def layer_norm(input: Tensor, normalized_shape: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LowMemoryBP's name for :func:`ms_layer_norm` without weight and bias. The third argument is eps."""
    return ms_layer_norm(input, normalized_shape, eps=eps)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LowMemoryBP's name for :func:`ms_rms_norm` without weight. The third argument is eps."""
    return ms_rms_norm(input, normalized_shape, eps=eps)
