"""Slow, readable implementations in plain torch, for every device that torch supports.

They are the reference of the tests, and a fallback for devices without kernels. Arguments and results are those of
:mod:`lomem.functional`, and the codes are identical byte for byte. Formulas: Yang et al., ICML 2024, arXiv:2406.16282.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._trace.seeds import draw_seed
from .steps import StepFunction

__all__ = [
    "REGELU2",
    "RESILU2",
    "StepFunction",
    "dequantize_groups",
    "drawn_activation_backward",
    "dropout_apply",
    "gated",
    "lora",
    "ms_layer_norm",
    "ms_rms_norm",
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


def step_codes(input: Tensor, step: StepFunction) -> Tensor:
    """Number of boundaries below each element, as uint8 in the shape of the input. NaN has code 0."""
    x = input.to(_compute_dtype(input.dtype))
    codes = torch.zeros(input.shape, dtype=torch.uint8, device=input.device)
    for boundary in step.boundaries:
        codes += x > torch.tensor(boundary, dtype=x.dtype, device=x.device)
    return codes


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


def gated(gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, layout: str = "gate_up") -> Tensor:
    """See :func:`lomem.functional.gated`."""
    if up is None:
        if layout == "interleaved":
            gate, up = gate[..., ::2], gate[..., 1::2]
        else:
            first, second = gate.chunk(2, -1)
            gate, up = (first, second) if layout == "gate_up" else (second, first)
    return _GATES[activation](gate) * up


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


class _MSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, normalized_shape, weight, bias, eps, dtype, centred):
        dims = tuple(range(-len(normalized_shape), 0))
        x = input.double()
        centre = x.mean(dims, keepdim=True) if centred else torch.zeros((), dtype=x.dtype, device=x.device)
        rstd = ((x - centre).square().mean(dims, keepdim=True) + eps).rsqrt()
        z = (x - centre) * rstd
        if weight is not None:
            z = z * weight.double()
        if bias is not None:
            z = z + bias.double()
        output = z.to(dtype or input.dtype)
        ctx.dims, ctx.centred, ctx.input_dtype = dims, centred, input.dtype
        ctx.save_for_backward(output, rstd.to(_compute_dtype(input.dtype)), weight, bias)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        output, rstd, weight, bias = ctx.saved_tensors
        y, g = output.double(), grad_output.double()
        grad_weight = grad_bias = None
        leading = tuple(range(y.dim() - len(ctx.dims)))
        if bias is not None:
            grad_bias = g.sum(leading).to(bias.dtype) if leading else g.to(bias.dtype)
            y = y - bias.double()
        if weight is not None:
            y = y / weight.double()
            grad_weight = ((g * y).sum(leading) if leading else g * y).to(weight.dtype)
            g = g * weight.double()
        mean_g = g.mean(ctx.dims, keepdim=True) if ctx.centred else 0
        mean_gy = (g * y).mean(ctx.dims, keepdim=True)
        grad_input = rstd.double() * (g - mean_g - y * mean_gy)
        return grad_input.to(ctx.input_dtype), None, grad_weight, grad_bias, None, None, None


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
