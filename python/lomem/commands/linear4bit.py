"""Linear layers with frozen 4-bit weights, for memory estimates."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear4bit", "quantize_linears"]

# NormalFloat4: Dettmers et al., QLoRA, NeurIPS 2023, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: Elements that share a scale.
BLOCK = 64


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    # Element 2*i is in the upper four bits of byte i, element 2*i + 1 in the lower four. Blocks are consecutive
    # elements of the flattened weight; the last one is padded with zeros.
    count = weight.numel()
    blocks = F.pad(weight.detach().float().flatten(), (0, -count % BLOCK)).unflatten(0, (-1, BLOCK))
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4, device=weight.device)
    # A block of zeros has scale 0; any other divisor gives the code of 0.
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
    packed = codes[0::2] << 4 | codes[1::2]
    return packed[: (count + 1) // 2].clone(), absmax


# A single op, as in bitsandbytes, so that its temporaries do not count as memory of the model.
@torch.library.custom_op("lomem_presets::dequantize_4bit", mutates_args=())
def _dequantize(packed: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    count = rows * columns
    table = torch.tensor(NF4, device=packed.device)
    values = table[torch.stack([packed >> 4, packed & 15], dim=1).int()].flatten()[:count]
    scales = absmax.repeat_interleave(BLOCK)[:count]
    return (values * scales).to(dtype).view(rows, columns)


@_dequantize.register_fake
def _(packed: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


class _Linear4bitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        # The weight is frozen, so its gradient is not needed and the input is not saved.
        ctx.save_for_backward(packed, absmax)
        ctx.columns = input.shape[-1]
        weight = _dequantize(packed, absmax, rows, input.shape[-1], input.dtype)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, absmax = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ _dequantize(packed, absmax, grad.shape[-1], ctx.columns, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, None, None, grad_bias, None


class Linear4bit(nn.Linear):
    """A linear layer with a frozen 4-bit weight: a stand-in for bitsandbytes' ``Linear4bit`` in memory estimates only.

    It needs the same memory: 4 bits per element and a float32 scale per 64 elements; it does not save its input. Both
    passes dequantize the weight to ``compute_dtype``. The weight has NF4 codes, rounded to nearest. There is no double
    quantization (which would take 0.516 instead of 0.5625 bytes per element) and there are no fast kernels: for
    training, use bitsandbytes.

    Args:
        in_features: As in :class:`torch.nn.Linear`.
        out_features: As in :class:`torch.nn.Linear`.
        bias: As in :class:`torch.nn.Linear`.
        compute_dtype: Dtype of the multiplication.
        device: As in :class:`torch.nn.Linear`.

    Attributes:
        weight: Packed codes: uint8, ``(out_features * in_features + 1) // 2`` bytes.
        absmax: Scales: float32, one per 64 elements.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        # Subclasses Linear because peft accepts that as a LoRA target; only the shape of the weight differs.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        count = in_features * out_features
        packed = torch.zeros((count + 1) // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax: Tensor
        self.register_buffer("absmax", torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device))
        start = torch.zeros(out_features, dtype=compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(start) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> Linear4bit:
        """Quantizes the weight of a layer and freezes weight and bias.

        Args:
            linear: The layer to quantize; not modified.
            compute_dtype: Dtype of the multiplication. By default the dtype of the weight.
        """
        dtype = compute_dtype or linear.weight.dtype
        bias = linear.bias is not None
        device = linear.weight.device
        self = cls(linear.in_features, linear.out_features, bias, compute_dtype=dtype, device=device)
        packed, self.absmax = _quantize(linear.weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantized weight, of shape ``(out_features, in_features)``."""
        dtype = dtype or self.compute_dtype
        return _dequantize(self.weight, self.absmax, self.out_features, self.in_features, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies in ``compute_dtype``; the result has the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        result = _Linear4bitFunction.apply(
            input.to(self.compute_dtype), self.weight, self.absmax, bias, self.out_features
        )
        return cast(Tensor, result).to(input.dtype)


def quantize_linears(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Replaces the linear layers whose qualified names end with one of ``names`` with :class:`Linear4bit`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{suffix}" for suffix in names)):
            model.set_submodule(name, Linear4bit.from_linear(module))
    return model
