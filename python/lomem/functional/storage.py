"""Tensors as codes of 8 or 4 bits in groups with a scale each, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._trace.seeds import draw_seed
from .packing import _refuse_jagged

__all__ = ["dequantize_groups", "quantize_groups"]

_quantize_groups = torch.ops.lomem.quantize_groups.default
_dequantize_groups = torch.ops.lomem.dequantize_groups.default


def quantize_groups(
    input: Tensor,
    bits: int = 8,
    *,
    rounding: str = "stochastic",
    seed: Tensor | None = None,
    offset: int = 0,
    group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Codes of 8 or 4 bits for the elements of a tensor, and a bfloat16 scale for each ``group_size`` elements.

    The scale of a group is its largest magnitude over 127 (4 bits: 7), rounded up, so that nothing is clipped. The code
    of an element is a multiple of the scale next to it: off by less than one scale, or by half a scale if it is rounded
    to nearest. A group with an infinity or NaN, or a float64 beyond the range of float32, becomes NaN as a whole.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16. Elements are taken in memory order if the
            tensor is dense and does not overlap itself, otherwise in row-major order.
        bits: Bits per code, 8 or 4.
        rounding: ``"stochastic"``: up or down at random, so that the mean over seeds is the element itself, to 2^-17 of
            the scale. ``"nearest"``: to nearest, ties to even.
        seed: 0-d int64 tensor on the device of ``input``, which determines the random bits; never read on the host but
            for the CPU. By default it is drawn from lomem's own stream (:mod:`lomem.random`), which a compiler cannot
            trace. Not with ``rounding="nearest"``.
        offset: Number of the stream of random bits, at least 0: tensors with one seed and different offsets are rounded
            independently of each other.
        group_size: Elements per scale, a power of two from 16 to 1024.

    Returns:
        ``codes``: 1-D uint8 tensor of ``ceil(numel * bits / 8)`` bytes, in two's complement, in the layout of
        :mod:`lomem.functional.packing`; and ``scales``: 1-D bfloat16 tensor of ``ceil(numel / group_size)`` elements.
        Not differentiable. The bytes are the same on every device and with any number of threads.

    Raises:
        RuntimeError: If ``input`` has another dtype or layout, or ``seed`` another dtype, shape or device.
        ValueError: If ``bits``, ``rounding``, ``offset`` or ``group_size`` is none of the above, or if there is a seed
            with ``rounding="nearest"``.
    """
    _refuse_jagged("quantize_groups", "input", input)
    if rounding == "stochastic":
        seed = draw_seed(input) if seed is None else seed
    elif rounding != "nearest":
        raise ValueError(f"lomem::quantize_groups: rounding is {rounding!r}, expected 'stochastic' or 'nearest'")
    elif seed is not None:
        raise ValueError("lomem::quantize_groups: seed is given, expected none with rounding 'nearest'")
    return _quantize_groups(input, bits, seed, offset=offset, group_size=group_size)


def dequantize_groups(
    codes: Tensor,
    scales: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    bits: int = 8,
    *,
    stride: Sequence[int] | None = None,
    seed: Tensor | None = None,
    offset: int = 0,
    group_size: int = 128,
) -> Tensor:
    """The tensor of codes and scales that :func:`quantize_groups` returned: each code times the scale of its group.

    With the seed of codes that were rounded at random, the dither is subtracted that this rounding amounts to: the
    error is then at most half a scale, independent of the element and uniform, and has half the variance on average
    (Schuchman, "Dither signals and their effect on quantization noise", 1964).

    Products are rounded to ``dtype``, but no further than to its largest finite number, so that no finite element
    becomes infinite.

    Args:
        codes: uint8 tensor of ``ceil(numel * bits / 8)`` bytes.
        scales: bfloat16 tensor of ``ceil(numel / group_size)`` elements, on the same device.
        size: Shape of the result.
        dtype: float64, float32, bfloat16 or float16; it need not be that of the tensor that was quantized.
        bits: Bits per code, 8 or 4.
        stride: Strides of the result, which must be those of a dense tensor. For a dense tensor that was quantized, its
            strides; by default, the result is contiguous.
        seed: The seed of the codes, to subtract their dither; None for none. Only for codes that were rounded at
            random with this seed.
        offset: The offset of the codes.
        group_size: Elements per scale, a power of two from 16 to 1024.

    Returns:
        A tensor of the given shape, dtype and strides. Not differentiable.

    Raises:
        RuntimeError: If ``codes``, ``scales`` or ``seed`` has another dtype, layout, device or number of elements, or
            ``dtype`` is none of the above.
        ValueError: If ``size``, ``bits``, ``stride``, ``offset`` or ``group_size`` is none of the above.
    """
    _refuse_jagged("dequantize_groups", "codes", codes)
    _refuse_jagged("dequantize_groups", "scales", scales)
    return _dequantize_groups(codes, scales, size, stride, dtype, bits, seed, offset=offset, group_size=group_size)
