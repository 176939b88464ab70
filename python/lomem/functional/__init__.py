"""The ops as functions, with the argument order of :mod:`torch.nn.functional`.

Every function raises a RuntimeError or ValueError that names op, argument, the value it got and the
value it wants; of arguments that are not of the type asked for, torch's own error. They work under
autocast, ``torch.compile``, ``torch.export``, ``torch.jit.trace``, checkpointing and saved-tensor hooks, on ``meta``
tensors and on subclasses that wrap tensors. Of nested tensors of layout ``torch.jagged``, activations and norms are
torch's own, with the exact gradient and all that torch keeps for it; other nested, sparse and quantized tensors raise.
Forward-mode differentiation and ``torch.func`` gradients raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_unary

from .. import _C
from . import activations
from .activations import *  # noqa: F403
from .activations import is_jagged

__all__ = [
    *activations.__all__,
    "layer_norm",
    "ms_layer_norm",
    "ms_rms_norm",
    "pack_bits",
    "pack_bool_to_uint8",
    "randomized_linear",
    "regelu2",
    "resilu2",
    "rms_norm",
    "unpack_bits",
    "unpack_uint8_to_bool",
]

# The overloads, not the packets: without the look-up by argument types a call costs less. (For the activations, _C has
# a shorter way still; compilers want the op.)
_regelu2 = torch.ops.lomem.regelu2.default
_resilu2 = torch.ops.lomem.resilu2.default
_ms_layer_norm = torch.ops.lomem.ms_layer_norm.default
_ms_rms_norm = torch.ops.lomem.ms_rms_norm.default
_randomized_linear = torch.ops.lomem.randomized_linear.default
_pack_bits = torch.ops.lomem.pack_bits.default
_unpack_bits = torch.ops.lomem.unpack_bits.default


def regelu2(input: Tensor, approximate: str = "none", *, fast: bool = False) -> Tensor:
    """GELU whose backward pass keeps 2 bits an element.

    The result is bit for bit ``F.gelu(input, approximate=approximate)``. The gradient is that of a
    sum of three ReLUs, a step function with four levels, fitted to GELU (Yang et al., ICML 2024,
    arXiv:2406.16282, ReGELU2). A NaN input gives a NaN result and, as it is above no boundary, the
    gradient of the lowest level, 0.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        approximate: ``"none"`` or ``"tanh"``, as in ``F.gelu``. The step function is the same.
        fast: Allows a faster forward on CPUs with AVX2 or AVX-512: minimax polynomials of the same
            function, evaluated in float32, in place of torch's. Results are then not bit for bit
            torch's. float32: within 2.2 units in the last place of the exact value for x > -3.375, and
            within 2e-10 below. 16 bits: rounded correctly for x > -5.5, but for near-ties. Below -7.63
            they are 0. float64, other devices and inputs with gaps in memory are computed as without.

    Returns:
        A tensor of the shape, dtype and strides that ``F.gelu`` returns. Saved for backward:
        ``ceil(numel / 4)`` bytes.
    """
    if is_jagged(input):
        return F.gelu(input, approximate=approximate)
    if not (has_torch_function_unary(input) or is_compiling()):
        result = _C.regelu2(input, approximate, fast)
        if result is not NotImplemented:
            return result
    return _regelu2(input, approximate=approximate, fast=fast)


def resilu2(input: Tensor, *, fast: bool = False) -> Tensor:
    """SiLU whose backward pass keeps 2 bits an element.

    The result is bit for bit ``F.silu(input)``. The gradient is that of a sum of three ReLUs, a step
    function with four levels, fitted to SiLU (Yang et al., ICML 2024, arXiv:2406.16282, ReSiLU2).

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        fast: As of :func:`regelu2`. float32: within 4 units in the last place of the exact value for
            x > -22, and within 6e-9 below. 16 bits: rounded correctly for x > -22, but for near-ties.
            Below -22.2 they are 0.

    Returns:
        A tensor of the shape, dtype and strides that ``F.silu`` returns. Saved for backward:
        ``ceil(numel / 4)`` bytes.
    """
    if is_jagged(input):
        return F.silu(input)
    if not (has_torch_function_unary(input) or is_compiling()):
        result = _C.resilu2(input, fast)
        if result is not NotImplemented:
            return result
    return _resilu2(input, fast=fast)


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


def randomized_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    matmul: str = "gaussian",
    proj_dim: int | None = None,
    proj_dim_ratio: float | None = None,
    proj_dim_min: int | None = None,
    proj_dim_max: int | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Linear layer that keeps a few random combinations of the rows of its input for the backward pass.

    The result is bit for bit ``F.linear(input, weight, bias)``, and the gradients of ``input`` and ``bias`` are exact.
    The gradient of ``weight`` is an unbiased estimate: with ``X`` the input and ``dY`` the gradient of the output, as
    matrices of ``rows`` rows, it is ``(S dY)^T (S X)``, where ``S`` is random, has ``proj_dim`` rows and
    ``E[S^T S] = 1`` (Bershatsky et al., arXiv:2201.13195). ``S X`` and a seed are kept; ``S`` itself is drawn again,
    piece by piece, in the backward pass. docs/linear.md has formulas, variances and when not to use it.

    The seed is drawn from a stream of lomem's own, see :mod:`lomem.random`: no generator of torch is advanced, and the
    numbers that others draw are the same as with ``F.linear``. It is drawn by the op that makes ``S X``, beside which
    it stays: whatever a checkpoint computes again, the gradient is estimated from what belongs together. Where
    ``weight`` requires no gradient, grad mode is off or all rows are kept, nothing is drawn: this is ``F.linear``, and
    so are its gradients.

    Args:
        input: Shape ``(*, in_features)``, any strides; float64, float32, bfloat16 or float16. Under autocast it is cast
            as by ``F.linear``, and compressed and kept in that dtype.
        weight: Shape ``(out_features, in_features)``, the dtype of ``input``.
        bias: Shape ``(out_features,)``, the dtype of ``input``.
        matmul: What ``S`` is: ``"gaussian"`` or ``"rademacher"``, independent elements; ``"dct"`` or ``"dft"``, rows
            of an orthonormal transform behind random signs; ``"crs"``, rows of the input drawn in proportion to their
            norms; ``"wta-crs"``, the rows of the largest norms, and others drawn (Liu et al., arXiv:2305.15265).
        proj_dim: Number of rows that are kept, at least 1. Either this or ``proj_dim_ratio`` must be given.
        proj_dim_ratio: Share of the rows that is kept, in (0, 1]; rounded to a whole number of rows, halves up.
        proj_dim_min: Then at least so many, but never more than there are.
        proj_dim_max: Then at most so many.
        seed: A seed of the caller's: 0-d int64, on the device of ``input``. The host never reads it, so that a captured
            graph may change it between replays.

    Returns:
        A tensor of shape ``(*, out_features)``. Saved for backward: ``proj_dim * in_features`` elements of the dtype of
        ``input``; 8 bytes, the seed; for ``"crs"`` and ``"wta-crs"`` ``8 * proj_dim`` bytes of indices; and ``weight``,
        if ``input`` requires a gradient. Second derivatives of ``weight``'s gradient raise; those of ``input``'s are
        exact.
    """
    return _randomized_linear(
        input,
        weight,
        bias,
        matmul=matmul,
        proj_dim=proj_dim,
        proj_dim_ratio=proj_dim_ratio,
        proj_dim_min=proj_dim_min,
        proj_dim_max=proj_dim_max,
        seed=seed,
    )


def _refuse_jagged(op: str, argument: str, tensor: Tensor) -> None:
    # (The op does so itself, but in inference mode.)
    if is_jagged(tensor):
        raise ValueError(f"lomem::{op}: {argument} is a nested tensor, expected a dense one")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of ``bits`` bits into bytes.

    Element ``i`` of the flattened codes occupies bits ``[bits*i, bits*i + bits)`` of a little-endian
    bit stream; padding bits are 0.

    Args:
        codes: Any shape, uint8, values below ``2**bits``.
        bits: 1 to 8.

    Returns:
        A 1-D uint8 tensor of ``ceil(bits * numel / 8)`` bytes.
    """
    _refuse_jagged("pack_bits", "codes", codes)
    return _pack_bits(codes, bits)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Unpacks codes of ``bits`` bits, the inverse of :func:`pack_bits`.

    Args:
        packed: uint8, ``ceil(bits * numel / 8)`` bytes.
        bits: 1 to 8.
        numel: Number of codes.

    Returns:
        A 1-D uint8 tensor of ``numel`` codes.
    """
    _refuse_jagged("unpack_bits", "packed", packed)
    if isinstance(numel, int) and not is_compiling() and numel.bit_length() > 63:  # which the op cannot be called with
        raise ValueError(f"lomem::unpack_bits: numel is {numel}, expected 0 to {2**59 - 1}")
    return _unpack_bits(packed, bits, numel)


# Names of LowMemoryBP, so that its users change nothing.


def layer_norm(input: Tensor, normalized_shape: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LowMemoryBP's name for :func:`ms_layer_norm` without weight and bias. The third argument is eps."""
    return ms_layer_norm(input, normalized_shape, eps=eps)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], eps: float = 1e-5) -> Tensor:
    """LowMemoryBP's name for :func:`ms_rms_norm` without weight. The third argument is eps."""
    return ms_rms_norm(input, normalized_shape, eps=eps)


def pack_bool_to_uint8(x: Tensor) -> Tensor:
    """LowMemoryBP's name for :func:`pack_bits` of a bool tensor, one bit an element.

    Args:
        x: Any shape, bool.

    Returns:
        A 1-D uint8 tensor of ``ceil(numel / 8)`` bytes.
    """
    name = "lomem.functional.pack_bool_to_uint8"
    if x.dtype != torch.bool:
        raise ValueError(f"{name}: x has dtype {x.dtype}, expected torch.bool")
    if x.is_nested:
        raise ValueError(f"{name}: x is a nested tensor, expected a dense one")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: x has layout {x.layout}, expected a dense (torch.strided) tensor")
    return pack_bits(x.view(torch.uint8), 1)


def unpack_uint8_to_bool(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_bool_to_uint8`.

    Args:
        x: uint8, ``ceil(numel / 8)`` bytes.
        shape: Of the result.

    Returns:
        A bool tensor of shape ``shape``.
    """
    shape = torch.Size(shape)
    if not is_compiling() and any(size < 0 for size in shape):
        raise ValueError(f"lomem.functional.unpack_uint8_to_bool: shape is {tuple(shape)}, expected no negative size")
    # Not shape.numel(), which overflows. Not view(torch.bool): Inductor's C++ backend cannot use such a view as a mask.
    return (unpack_bits(x, 1, math.prod(shape)) != 0).reshape(shape)
