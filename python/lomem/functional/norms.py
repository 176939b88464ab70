"""Memory-sharing norms, which save their output for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import is_jagged

__all__ = ["layer_norm", "ms_layer_norm", "ms_rms_norm", "rms_norm"]

# Overloads instead of packets: this skips overload resolution on every call.
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
    """Layer normalization that saves its output for the backward pass, not its input.

    A linear layer that follows saves the same tensor, so the norm costs only one float per row (Yang et al., ICML 2024,
    arXiv:2406.16282, MS-LayerNorm). With ``weight`` and ``bias`` the backward pass recovers the normalized input as
    ``(output - bias) / weight``. This loses digits in channels where ``abs(bias)`` is much greater than
    ``abs(weight)``, and where ``weight`` is so small that the output is subnormal in its dtype (float16: below 6e-5).

    Args:
        input: Shape ``(*, *normalized_shape)``; float64, float32, bfloat16 or float16.
        normalized_shape: Sizes of the last dimensions of ``input``, which are normalized over.
        weight: Shape ``normalized_shape``, any floating-point dtype. If a gradient is needed, no element may be smaller
            in magnitude than the smallest normal number of the output's dtype. On the CPU that raises; on CUDA, where
            the check would synchronize, one such element makes NaN of the whole gradient of ``input`` and of its own
            element of the gradient of ``weight``, and of nothing else.
        bias: Shape ``normalized_shape``, any floating-point dtype.
        eps: Value added to the variance; finite and not negative.
        dtype: Dtype of the output. The default is the autocast dtype if autocast is on (so that linear layers share the
            output), otherwise the dtype of ``input``. Pass ``torch.float32`` if the output also feeds a float32
            residual stream.

    Returns:
        A contiguous tensor of the shape of ``input``. Saved for backward: the output, and 4 bytes per row (8 for a
        float64 input). Second derivatives raise.
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
    """RMS normalization that saves its output for the backward pass, not its input.

    Like :func:`ms_layer_norm`, but without centring and bias (Yang et al., ICML 2024, arXiv:2406.16282, MS-RMSNorm).
    Recovering the normalized input as ``output / weight`` loses digits only where the output is subnormal in its dtype.

    Args:
        input: Shape ``(*, *normalized_shape)``; float64, float32, bfloat16 or float16.
        normalized_shape: Sizes of the last dimensions of ``input``, which are normalized over.
        weight: Shape ``normalized_shape``, any floating-point dtype. If a gradient is needed, no element may be smaller
            in magnitude than the smallest normal number of the output's dtype; see :func:`ms_layer_norm`.
        eps: Value added to the mean square; finite and not negative. The default, as in ``F.rms_norm``, is the machine
            epsilon of float32 (of float64 for a float64 input).
        dtype: Dtype of the output; see :func:`ms_layer_norm`.

    Returns:
        A contiguous tensor of the shape of ``input``. Saved for backward: the output, and 4 bytes per row (8 for a
        float64 input). Second derivatives raise.
    """
    if is_jagged(input):
        return F.rms_norm(input, list(normalized_shape), weight, eps).to(dtype or input.dtype)
    return _ms_rms_norm(input, normalized_shape, weight, eps, dtype=dtype)


# LowMemoryBP's names, so that code written for it runs unchanged.


def layer_norm(input: Tensor, normalized_shape: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LowMemoryBP's name for :func:`ms_layer_norm` without weight and bias. The third argument is eps."""
    return ms_layer_norm(input, normalized_shape, eps=eps)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LowMemoryBP's name for :func:`ms_rms_norm` without weight. The third argument is eps."""
    return ms_rms_norm(input, normalized_shape, eps=eps)
