"""Slow, readable implementations in plain torch, for every device that torch supports.

They are the reference of the tests, and what the ops run on devices without kernels. Arguments and results are those of
:mod:`lomem.functional`, and the codes are identical byte for byte. Formulas: Yang et al., ICML 2024, arXiv:2406.16282.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._trace.float64 import has_float64
from ._trace.seeds import draw_seed
from .steps import StepFunction

__all__ = [
    "REGELU2",
    "RESILU2",
    "StepFunction",
    "band_codes",
    "dequantize_groups",
    "drawn_activation_backward",
    "drawn_codes",
    "dropout_apply",
    "fused_activation_forward",
    "gated",
    "gated_backward",
    "lora",
    "ms_layer_norm",
    "ms_layer_norm_backward",
    "ms_layer_norm_forward",
    "ms_rms_norm",
    "ms_rms_norm_backward",
    "ms_rms_norm_forward",
    "pack_bits",
    "philox_words",
    "quantize_groups",
    "regelu2",
    "resilu2",
    "seeded_dropout_apply",
    "step_activation",
    "step_activation_backward",
    "step_codes",
    "unpack_bits",
]


def _of_slopes(boundaries: tuple[float, ...], slopes: tuple[float, ...]) -> StepFunction:
    """The derivative of ``sum_i slopes[i] * relu(x - boundaries[i])``."""
    return StepFunction(boundaries, tuple(itertools.accumulate(slopes, initial=0.0)))


REGELU2 = _of_slopes(
    boundaries=(-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
    slopes=(-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
)
RESILU2 = _of_slopes(
    boundaries=(-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
    slopes=(-0.04060357190528599, 1.080925428529668, 1 - (-0.04060357190528599 + 1.080925428529668)),
)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float64, or in float32 on a device without float64."""
    return tensor.to(torch.float64 if has_float64(tensor.device) else torch.float32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See :func:`lomem.functional.pack_bits`."""
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes.reshape(-1, 1).to(torch.int64) >> shifts & 1).flatten()
    stream = F.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """See :func:`lomem.functional.unpack_bits`."""
    stream = (packed.reshape(-1, 1).to(torch.int64) >> torch.arange(8, device=packed.device) & 1).flatten()
    groups = stream[: numel * bits].reshape(numel, bits)
    return (groups << torch.arange(bits, device=packed.device)).sum(1).to(torch.uint8)


def _boundaries_below(input: Tensor, boundaries: Sequence[float]) -> Tensor:
    x = input.to(_compute_dtype(input.dtype))
    codes = torch.zeros(input.shape, dtype=torch.uint8, device=input.device)
    for boundary in boundaries:
        codes += x > torch.tensor(boundary, dtype=x.dtype, device=x.device)
    return codes


def step_codes(input: Tensor, step: StepFunction) -> Tensor:
    """Number of boundaries below each element, as uint8 in the shape of the input. NaN has code 0."""
    return _boundaries_below(input, step.boundaries)


def band_codes(input: Tensor, low: float, high: float) -> Tensor:
    """Whether ``low <= x <= high`` for each element ``x``, 0 for NaN: packed codes of 1 bit, in row-major order.

    Args:
        input: float64, float32, bfloat16 or float16 tensor of any shape.
        low: Lower limit, rounded to float32 unless the input is float64.
        high: Upper limit, likewise.

    Returns:
        A 1-D uint8 tensor of ``ceil(numel / 8)`` bytes.
    """
    x = input.to(_compute_dtype(input.dtype))
    least, most = (torch.tensor(limit, dtype=x.dtype, device=x.device) for limit in (low, high))
    return pack_bits(((x >= least) & (x <= most)).to(torch.uint8), 1)


def step_activation_backward(grad_output: Tensor, codes: Tensor, levels: Sequence[float], bits: int) -> Tensor:
    """``grad_output * levels[codes]``, with packed codes in row-major order of ``grad_output``."""
    dtype = _compute_dtype(grad_output.dtype)
    table = torch.tensor(levels, dtype=torch.float64).to(dtype).to(grad_output.device)
    level = table[unpack_bits(codes, bits, grad_output.numel()).long()].reshape(grad_output.shape)
    product = grad_output.to(dtype) * level
    if bits == 1:
        # As in the backward passes of torch's relu and similar activations: 0 times an infinite gradient is 0.
        product = torch.where(level == 0, torch.zeros_like(product), product)
    return product.to(grad_output.dtype)


class _WithSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, output, step):
        ctx.step = step
        ctx.save_for_backward(pack_bits(step_codes(input, step), step.bits))
        return output.clone()

    @staticmethod
    def backward(ctx, grad_output):
        (codes,) = ctx.saved_tensors
        return step_activation_backward(grad_output, codes, ctx.step.levels, ctx.step.bits), None, None


def step_activation(input: Tensor, fn: Callable[[Tensor], Tensor], step: StepFunction) -> Tensor:
    """``fn(input)`` with the derivative of ``step``."""
    return _WithSteps.apply(input, fn(input.detach()), step)


def regelu2(input: Tensor, approximate: str = "none") -> Tensor:
    """See :func:`lomem.functional.regelu2`."""
    return _WithSteps.apply(input, F.gelu(input.detach(), approximate=approximate), REGELU2)


def resilu2(input: Tensor) -> Tensor:
    """See :func:`lomem.functional.resilu2`."""
    return _WithSteps.apply(input, F.silu(input.detach()), RESILU2)


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def _halves(both: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Views of gate and up where the last dimension holds both."""
    if layout == "interleaved":
        return both[..., ::2], both[..., 1::2]
    first, second = both.chunk(2, -1) if both.shape[-1] > 0 else (both, both)
    return (first, second) if layout == "gate_up" else (second, first)


def gated(gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, layout: str = "gate_up") -> Tensor:
    """See :func:`lomem.functional.gated`."""
    if up is None:
        gate, up = _halves(gate, layout)
    return _GATES[activation](gate) * up


def _value_and_slope(activation: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A gate's activation and its derivative."""
    if activation == "relu":
        return torch.where(x <= 0, 0, x), torch.where(x <= 0, torch.zeros_like(x), 1)
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "sigmoid":
        value = torch.sigmoid(x)
        return value, value * torch.sigmoid(-x)
    # SiLU and GELU's approximation by tanh are x * sigmoid(z), with z a polynomial of x. (Beyond 20 its derivative does
    # not count, but could overflow.)
    linear, cubic = (1.0, 0.0) if activation == "silu" else (math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715)
    z = x * (linear + cubic * x * x) if cubic else x
    factor = torch.sigmoid(z)
    value = x * factor
    return value, factor + value * torch.sigmoid(-z) * (linear + 3 * cubic * x.clamp(-20, 20).square())


def gated_backward(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    *,
    layout: str = "gate_up",
    output_mask: Sequence[bool] = (True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a gated unit, and its result again. Computes in float32, or float64 for float64 operands.

    Args:
        grad_output: Gradient of the result, in its shape and dtype.
        gate: Gate, or gate and up in the last dimension.
        up: In the shape and dtype of ``gate``, or None.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"sigmoid"``.
        layout: Where gate and up are without ``up``, as in :func:`lomem.functional.gated`.
        output_mask: Which of the three results are wanted.

    Returns:
        The gradients of ``gate`` and ``up`` and the result of the unit; None for what is not wanted, and for the
        gradient of a missing ``up``, which is then in that of ``gate``.
    """
    wants_gate, wants_up, wants_output = output_mask
    dtype = _compute_dtype(gate.dtype)
    x, factor = (t.to(dtype) for t in (_halves(gate, layout) if up is None else (gate, up)))
    value, slope = _value_and_slope(activation, x)
    grad = grad_output.to(dtype)
    of_gate = grad * factor * slope
    if activation == "relu":  # 0 times an infinite gradient is 0
        of_gate = torch.where(slope == 0, 0, of_gate)
    of_up = grad * value
    grad_gate = of_gate.to(gate.dtype) if wants_gate else None
    if up is None and wants_gate:
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for half, gradient in zip(_halves(grad_gate, layout), (of_gate, of_up), strict=True):
            half.copy_(gradient)
    grad_up = of_up.to(gate.dtype) if wants_up and up is not None else None
    return grad_gate, grad_up, gated(gate, up, activation, layout=layout) if wants_output else None


def lora(
    input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """See :func:`lomem.functional.lora`."""
    dropped = F.dropout(input.to(lora_a.dtype), p, training)
    return F.linear(F.linear(dropped, lora_a), lora_b, bias) * scaling


def dropout_apply(input: Tensor, mask: Tensor, p: float) -> Tensor:
    """Dropout with a given mask: 1 bit per element in row-major order of ``input``, 1 for elements that are kept.

    As torch on the CPU, where the factors are rounded to the dtype; on CUDA torch multiplies in float32.
    """
    kept = unpack_bits(mask, 1, input.numel()).reshape(input.shape)
    return input * kept.to(input.dtype).div_(1 - p)


def philox_words(seed: int, count: int, offset: int = 0, *, rounds: int = 10) -> Tensor:
    """The first words of a seed's stream, as int64: Philox4x32 (Salmon et al., SC 2011), whose key is the seed.

    Block ``i``, of words ``4 * i`` to ``4 * i + 3``, is that of counter ``i + 2**64 * offset``.
    """
    low = 0xFFFFFFFF
    index = torch.arange((count + 3) // 4)
    a, b, c, d = index & low, index >> 32, torch.full_like(index, offset & low), torch.full_like(index, offset >> 32)
    first, second = seed & low, seed >> 32 & low
    for _ in range(rounds):
        # (Products of two numbers of 32 bits wrap around to negative ones, whose bits are right.)
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32 & low) ^ b ^ first, y & low, (x >> 32 & low) ^ d ^ second, x & low
        first, second = (first + 0x9E3779B9) & low, (second + 0xBB67AE85) & low
    return torch.stack([a, b, c, d], 1).flatten()[:count]


def seeded_dropout_apply(input: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout with a given seed: an element is kept if its word of the stream is at least ``p * 2**32``, rounded."""
    dtype = _compute_dtype(input.dtype)
    words = philox_words(int(seed), input.numel()).to(input.device).reshape(input.shape)
    kept = words >= min(int(p * 2**32 + 0.5), 2**32 - 1)
    scale = torch.ones((), dtype=dtype).div_(1 - p).to(input.device)
    return (input.to(dtype) * (kept * scale)).to(input.dtype)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, each at one place."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _uniform(seed: Tensor, n: int, offset: int) -> Tensor:
    """Numbers in (0, 1), of 16 random bits each."""
    words = philox_words(int(seed), (n + 1) // 2, offset, rounds=7)
    halves = torch.stack([words & 0xFFFF, words >> 16], 1).flatten()[:n]
    return (halves.to(torch.float32) + 0.5) / 65536


def quantize_groups(
    input: Tensor,
    bits: int = 8,
    *,
    rounding: str = "stochastic",
    seed: Tensor | None = None,
    offset: int = 0,
    group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """See :func:`lomem.functional.quantize_groups`."""
    n, largest = input.numel(), 2 ** (bits - 1) - 1
    flat = input.as_strided((n,), (1,)) if n > 0 and _is_dense(input) else input.reshape(-1)
    x = F.pad(flat.detach().to(torch.float32), (0, -n % group_size)).reshape(-1, group_size)
    # Magnitudes as integers: NaN is above infinity, which is above all numbers.
    m = (x.view(torch.int32) & 0x7FFFFFFF).amax(1) if n > 0 else torch.zeros(0, dtype=torch.int32, device=x.device)
    special, zero = m >= 0x7F800000, m == 0
    magnitude = m.masked_fill(special, 0x3F800000).view(torch.float32)
    q = torch.full_like(magnitude, largest)
    up = ((magnitude / q).view(torch.int32) + 0xFFFF) >> 16
    up += ((up << 16).view(torch.float32) * q < magnitude).int()
    up = up.clamp(min=0x0080).masked_fill(zero, 0).masked_fill(special, 0x7FC0)
    scales = up.to(torch.int16).view(torch.bfloat16)
    t = x * (torch.ones_like(q) / scales.float()).reshape(-1, 1)
    t = t.masked_fill((zero | special).reshape(-1, 1), 0).clamp(-largest, largest).flatten()[:n]
    if rounding == "nearest":
        code = t.round()
    else:
        seed = draw_seed(input) if seed is None else seed
        below = t.floor()
        code = below + (t - below > _uniform(seed, n, offset).to(input.device))
    return pack_bits(code.to(torch.int32) & (2**bits - 1), bits), scales


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
    """See :func:`lomem.functional.dequantize_groups`."""
    n, half = torch.Size(size).numel(), 2 ** (bits - 1)
    code = (unpack_bits(codes, bits, n).to(torch.int32) ^ half) - half
    scale = scales.reshape(-1).float().repeat_interleave(group_size)[:n]
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    value = code.to(torch.float32)
    if seed is not None:
        value += _uniform(seed, n, offset).to(value.device) - 0.5
    value *= scale
    value = torch.where(scale.isfinite(), value.clamp(-largest, largest), value)
    target = torch.empty(size, dtype=dtype, device=codes.device)
    if stride is not None:
        target = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    target.as_strided((n,), (1,)).copy_(value)
    return target


def drawn_activation_backward(
    grad_output: Tensor, codes: Tensor, seed: Tensor, low: float, step: float, bits: int, *, offset: int = 0
) -> Tensor:
    """The gradient of an activation whose codes were drawn at random.

    Args:
        grad_output: Gradient of the result.
        codes: Packed codes of ``bits`` bits, in the row-major order of ``grad_output``.
        seed: Seed that they were drawn with, 0-d int64.
        low: The lowest level.
        step: Distance of neighbouring levels.
        bits: 1 to 8.
        offset: Number of the stream of random bits.
    """
    dtype, n = _compute_dtype(grad_output.dtype), grad_output.numel()
    u = _uniform(seed, n, offset).to(grad_output.device)
    place = (unpack_bits(codes, bits, n).float() + (u - 0.5)).to(dtype)
    level = torch.tensor(low, dtype=dtype) + torch.tensor(step, dtype=dtype) * place
    return (grad_output.reshape(-1).to(dtype) * level).to(grad_output.dtype).reshape(grad_output.shape)


def _norm_forward(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    dims = tuple(range(-len(normalized_shape), 0))
    x = _wide(input)
    centre = x.mean(dims, keepdim=True) if centred else torch.zeros((), dtype=x.dtype, device=x.device)
    rstd = ((x - centre).square().mean(dims, keepdim=True) + eps).rsqrt()
    z = (x - centre) * rstd
    if weight is not None:
        z = z * _wide(weight)
    if bias is not None:
        z = z + _wide(bias)
    return z.to(dtype or input.dtype), rstd.to(_compute_dtype(input.dtype))


def _norm_backward(
    grad_output: Tensor,
    output: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    input_dtype: torch.dtype,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dims = tuple(range(-len(normalized_shape), 0))
    y, g = _wide(output), _wide(grad_output)
    grad_weight = grad_bias = None
    leading = tuple(range(y.dim() - len(dims)))
    if bias is not None:
        grad_bias = g.sum(leading).to(bias.dtype) if leading else g.to(bias.dtype)
        y = y - _wide(bias)
    if weight is not None:
        y = y / _wide(weight)
        grad_weight = ((g * y).sum(leading) if leading else g * y).to(weight.dtype)
        g = g * _wide(weight)
    mean_g = g.mean(dims, keepdim=True) if centred else 0
    mean_gy = (g * y).mean(dims, keepdim=True)
    grad_input = _wide(rstd).reshape(mean_gy.shape) * (g - mean_g - y * mean_gy)
    return grad_input.to(input_dtype), grad_weight, grad_bias


class _MSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, normalized_shape, weight, bias, eps, dtype, centred):
        output, rstd = _norm_forward(input, normalized_shape, weight, bias, eps, dtype, centred)
        ctx.normalized_shape, ctx.centred, ctx.input_dtype = normalized_shape, centred, input.dtype
        ctx.save_for_backward(output, rstd, weight, bias)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        output, rstd, weight, bias = ctx.saved_tensors
        grad_input, grad_weight, grad_bias = _norm_backward(
            grad_output, output, rstd, ctx.normalized_shape, weight, bias, ctx.input_dtype, ctx.centred
        )
        return grad_input, None, grad_weight, grad_bias, None, None, None


def _check_recoverable(op: str, weight: Tensor | None, dtype: torch.dtype) -> None:
    """Raises if the backward pass cannot divide by weight."""
    if weight is None or weight.numel() == 0:
        return
    smallest = torch.finfo(dtype).smallest_normal
    values = weight.detach().flatten().to("cpu", torch.float64)
    small = values.abs() < smallest
    if bool(small.any()):
        index = int(small.to(torch.uint8).argmax())
        raise ValueError(
            f"{op}: weight is {float(values[index]):g} at element {index}, expected magnitudes of at least "
            f"{smallest:g}, the smallest normal number of the output's dtype: the backward pass divides by weight (use "
            "torch's norm for this layer; in a model converted by lomem.convert, call lomem.restore and lomem.convert "
            "again, which then saves this norm's normalized input)"
        )


def ms_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`lomem.functional.ms_layer_norm`. Ignores autocast."""
    return _MSNorm.apply(input, normalized_shape, weight, bias, eps, dtype, True)


def ms_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`lomem.functional.ms_rms_norm`. Ignores autocast."""
    if eps is None:
        eps = torch.finfo(_compute_dtype(input.dtype)).eps
    return _MSNorm.apply(input, normalized_shape, weight, None, eps, dtype, False)


def ms_layer_norm_forward(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The result of :func:`ms_layer_norm`, and what its backward pass needs besides.

    Returns:
        The output, and the reciprocal standard deviation of each row: float32 (float64 for a float64 input), in the
        shape of the input with 1 in place of each size of ``normalized_shape``.

    Raises:
        ValueError: If a weight is 0, or below the smallest normal number of the output's dtype.
    """
    _check_recoverable("lomem::ms_layer_norm", weight, dtype or input.dtype)
    return _norm_forward(input, normalized_shape, weight, bias, eps, dtype, True)


def ms_layer_norm_backward(
    grad_output: Tensor,
    output: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    input_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`ms_layer_norm` from the results of :func:`ms_layer_norm_forward`.

    Args:
        grad_output: Gradient of the output, in its shape.
        output: First result.
        rstd: Second result.
        normalized_shape: That of the forward pass.
        weight: That of the forward pass, of shape ``normalized_shape``, or None.
        bias: Likewise.
        input_dtype: The dtype of the input.
        output_mask: Which of the gradients of input, weight and bias are wanted.

    Returns:
        The three gradients, each None if not wanted or if there is no such parameter.
    """
    found = _norm_backward(grad_output, output, rstd, normalized_shape, weight, bias, input_dtype, True)
    grad_input, grad_weight, grad_bias = (t if wanted else None for t, wanted in zip(found, output_mask, strict=True))
    return grad_input, grad_weight, grad_bias


def ms_rms_norm_forward(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`ms_layer_norm_forward`, for :func:`ms_rms_norm`."""
    _check_recoverable("lomem::ms_rms_norm", weight, dtype or input.dtype)
    eps = torch.finfo(_compute_dtype(input.dtype)).eps if eps is None else eps
    return _norm_forward(input, normalized_shape, weight, None, eps, dtype, False)


def ms_rms_norm_backward(
    grad_output: Tensor,
    output: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    input_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`ms_layer_norm_backward`, for :func:`ms_rms_norm`, which has no bias."""
    grad_input, grad_weight, _ = _norm_backward(
        grad_output, output, rstd, normalized_shape, weight, None, input_dtype, False
    )
    return grad_input if output_mask[0] else None, grad_weight if output_mask[1] else None


def drawn_codes(
    input: Tensor, function: str, parameters: Sequence[float], bits: int, seed: Tensor, *, offset: int = 0
) -> Tensor:
    """Codes of an activation's derivative, drawn at random.

    Drawn by the CPU's kernel from a copy of the input: the polynomials that stand for the derivatives are in the C++
    library alone, and every device must draw the same codes.

    Args:
        input: float64, float32, bfloat16 or float16 tensor of any shape.
        function: Name of the activation.
        parameters: Its parameters.
        bits: 1 to 8.
        seed: 0-d int64.
        offset: Number of the stream of random bits.

    Returns:
        Packed codes, 1-D uint8, in the row-major order of ``input``, on its device.

    Raises:
        ValueError: For an unknown function, or ``bits`` that are out of range.
    """
    drawn = torch.ops.lomem.drawn_codes(input.detach().cpu(), function, parameters, bits, seed.cpu(), offset=offset)
    return drawn.to(input.device)  # type: ignore[no-any-return]


def _step_codes(input: Tensor, boundaries: Sequence[float], bits: int) -> Tensor:
    return pack_bits(_boundaries_below(input, boundaries), bits)


def fused_activation_forward(
    input: Tensor, function: str, boundaries: Sequence[float], bits: int, *, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """The result of an activation and its codes.

    Args:
        input: float64, float32, bfloat16 or float16 tensor of any shape.
        function: ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        boundaries: At most ``2**bits - 1`` ascending numbers.
        bits: 1 to 8.
        fast: Has no effect: the result is torch's.

    Returns:
        The result of torch's op, and the number of boundaries below each element: packed codes, 1-D uint8, in the
        memory order of the result.
    """
    # torch's results have the strides of empty_like. A device's may not, but codes depend on them.
    output = torch.empty_like(input).copy_(_GATES[function](input))
    dense = torch.empty_like(output).copy_(input)
    return output, _step_codes(dense.as_strided((dense.numel(),), (1,)), boundaries, bits)


def _quantize_groups(
    input: Tensor, bits: int = 8, seed: Tensor | None = None, *, offset: int = 0, group_size: int = 128
) -> tuple[Tensor, Tensor]:
    rounding = "nearest" if seed is None else "stochastic"
    return quantize_groups(input, bits, rounding=rounding, seed=seed, offset=offset, group_size=group_size)


def _dequantize_groups(
    codes: Tensor,
    scales: Tensor,
    size: Sequence[int],
    stride: Sequence[int] | None,
    dtype: torch.dtype,
    bits: int = 8,
    seed: Tensor | None = None,
    *,
    offset: int = 0,
    group_size: int = 128,
) -> Tensor:
    return dequantize_groups(
        codes, scales, size, dtype, bits, stride=stride, seed=seed, offset=offset, group_size=group_size
    )


#: The ops that need kernels of their own, with the arguments of ``torch.ops.lomem``: what devices without kernels run.
OPS: dict[str, Callable[..., Any]] = {
    **{
        function.__name__: function
        for function in (
            band_codes,
            drawn_activation_backward,
            drawn_codes,
            dropout_apply,
            fused_activation_forward,
            gated,
            gated_backward,
            ms_layer_norm,
            ms_layer_norm_backward,
            ms_layer_norm_forward,
            ms_rms_norm,
            ms_rms_norm_backward,
            ms_rms_norm_forward,
            pack_bits,
            seeded_dropout_apply,
            step_activation_backward,
            unpack_bits,
        )
    },
    **{function.__name__[1:]: function for function in (_dequantize_groups, _quantize_groups, _step_codes)},
}
