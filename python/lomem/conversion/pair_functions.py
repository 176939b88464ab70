"""What pairs compute: functions that rebuild a tensor, and those of autograd that save what it is rebuilt from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import functional as LF
from .._trace.autocast import autocast_dtype, autocast_to
from .._trace.groups import KERNELS, FromGroups
from .._trace.once import differentiable_once
from .cheap_ops import are_same
from .kinds import Function

__all__ = [
    "Activated",
    "Again",
    "GatedAgain",
    "Replayed",
    "dropped",
    "dropped_again",
    "gated",
    "gated_from_groups",
    "name_of",
    "of_groups",
    "of_input",
    "product",
    "product_from_groups",
]

_aten = torch.ops.aten


def _looks_up(x: Tensor) -> bool:
    """Whether lomem's activations may have torch's values by a table, in less time, if no gradient is needed."""
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not (torch.is_grad_enabled() or is_compiling())


def _value(activation: str, gate: Tensor) -> Tensor:
    approximate: Any = "tanh" if activation == "gelu_tanh" else "none"
    if _looks_up(gate):
        return LF.silu(gate, bits=2) if activation == "silu" else LF.gelu(gate, approximate, bits=2)
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=approximate)


def _derivative(activation: str, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of an activation, differentiable itself."""
    if activation == "silu":
        if torch.is_grad_enabled():  # silu_backward has no derivative
            s = torch.sigmoid(x)
            return grad * s * (1 + x * (1 - s))
        return _aten.silu_backward(grad, x)  # type: ignore[no-any-return]
    return _aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")  # type: ignore[no-any-return]


def name_of(function: Function, approximate: str) -> str:
    """Name of an activation, as gated units have it."""
    return "gelu_tanh" if function is Function.GELU and approximate == "tanh" else function.value


class Activated:
    """Recomputes an activation that is a torch op."""

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of x."""
        return _value(self.activation, x)


class GatedAgain:
    """Recomputes a gated product."""

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """The product."""
        if torch.is_grad_enabled() or gate.device.type not in KERNELS:
            return _value(self.activation, gate) * up
        return torch.ops.lomem.gated(gate, up, self.activation)  # type: ignore[no-any-return]


class Again:
    """Recomputes an activation of several ops, under the autocast setting of the forward pass."""

    def __init__(self, function: Callable[[Tensor], Tensor], device: str) -> None:
        self.function, self.device, self.autocast = function, device, autocast_dtype(device)

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of x."""
        with autocast_to(self.device, self.autocast):
            return self.function(x)


class Replayed:
    """Recomputes the result of a cheap op.

    Args:
        rebuild: Recomputes one operand.
        number: From how many tensors.
        function: The op, as a function of that operand and the others.
    """

    def __init__(self, rebuild: Callable[..., Tensor], number: int, function: Callable[..., Tensor]) -> None:
        self.rebuild, self.number, self.function = rebuild, number, function

    def __call__(self, *kept: Tensor | None) -> Tensor:
        """The result of the op."""
        return self.function(self.rebuild(*kept[: self.number]), *kept[self.number :])


class _Gated(torch.autograd.Function):
    """The product of an activation and another tensor, which saves the activation's input instead of its result.

    The gradient goes through the activation's own node, since somebody may ask for it there.
    """

    @staticmethod
    def forward(ctx: Any, activated: Tensor, up: Tensor, gate: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        needs_activated, needs_up, *_ = ctx.needs_input_grad
        grad_activated = grad * up if needs_activated else None
        grad_up = None
        if needs_up and (torch.is_grad_enabled() or gate.device.type not in KERNELS):
            grad_up = grad * _value(ctx.activation, gate)
        elif needs_up:
            mask = [False, True, False]
            _, grad_up, _ = torch.ops.lomem.gated_backward(grad, gate, up, ctx.activation, output_mask=mask)
        return grad_activated, grad_up, None, None


class _GatedFromGroups(torch.autograd.Function):
    """The same where both factors are kept in groups: it saves ``kept``, from which ``again.loads`` bring them back."""

    @staticmethod
    def forward(ctx: Any, activated: Tensor, up: Tensor, again: FromGroups, activation: str, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.again, ctx.activation = again, activation
        return activated * up

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept = ctx.saved_tensors
        needs_activated, needs_up, *_ = ctx.needs_input_grad
        gate, up = ctx.again.bring(kept)
        grad_activated = grad * up if needs_activated else None
        grad_up = None
        if needs_up:
            mask = [False, True, False]
            _, grad_up, _ = torch.ops.lomem.gated_backward(grad, gate, up, ctx.activation, output_mask=mask)
        return grad_activated, grad_up, None, None, *(None for _ in kept)


def _summed(grad: Tensor, operand: Tensor) -> Tensor:
    """The gradient of an operand that was broadcast, of sizes that a compiler need not know, as for sum_to_size."""
    added = grad.dim() - operand.dim()
    dims = [*range(added), *(added + i for i, n in enumerate(operand.shape) if are_same((n,), (1,)))]
    return grad.sum(dims, keepdim=True).reshape(operand.shape) if dims else grad


def _product_backward(ctx: Any, grad: Tensor) -> Any:
    other, *kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_factor = (grad * other).to(ctx.dtype) if needs[0] else None
    grad_other = _summed(grad * ctx.rebuild(*kept), other).to(other.dtype) if needs[1] else None
    return grad_factor, grad_other, None, *(None for _ in kept)


class _Product(torch.autograd.Function):
    """A product that saves what its first factor is rebuilt from instead of that factor."""

    @staticmethod
    def forward(
        ctx: Any, factor: Tensor, other: Tensor, rebuild: Callable[..., Tensor], *kept: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(other, *kept)
        ctx.rebuild, ctx.dtype = rebuild, factor.dtype
        return factor * other

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _product_backward(ctx, grad)


class _ProductFromGroups(_Product):
    """The same where that is brought back from groups, which second derivatives would not go through."""

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _product_backward(ctx, grad)


class _Dropout(torch.autograd.Function):
    """torch's dropout, which saves a bit per element; also returns these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        result, mask = torch.ops.lomem.dropout_forward(x, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        ctx.mark_non_differentiable(mask)
        return result, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return dropped_again(grad, mask, ctx.p), None


def dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Dropout as torch has it, which saves a bit per element, and these bits."""
    return _Dropout.apply(x, p)  # type: ignore[no-any-return]


def dropped_again(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """The same of another tensor, or of a gradient."""
    return torch.ops.lomem.dropout_apply(x, mask, p)  # type: ignore[no-any-return]


def _of_input_backward(ctx: Any, grad: Tensor) -> Any:
    kept, activation = ctx.saved_tensors, ctx.activation
    x = kept[0] if ctx.load is None else ctx.load(*kept)
    if ctx.scale == 1 and not torch.is_grad_enabled() and x.device.type in KERNELS and x.is_contiguous():
        # The gradient of the gate of a unit whose other factor is 1: torch's own kernels take longer.
        ones = x.new_ones(x.shape[-1:]).expand(x.shape)
        mask = [True, False, False]
        grad_x, *_ = torch.ops.lomem.gated_backward(grad, x, ones, activation, output_mask=mask)
    else:
        # The derivative of h(s x) / s is h'(s x). Neither s x nor what is computed from it is rounded to 16 bits.
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype) * ctx.scale if ctx.scale != 1 else x.to(dtype)
        grad_x = _derivative(activation, grad.to(dtype), wide).to(x.dtype)
    return grad_x, None, None, None, *(() if ctx.load is None else (None, *(None for _ in kept)))


class _OfInput(torch.autograd.Function):
    """An activation that saves its input alone: ``h(scale * x) / scale``, by any function that computes it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: str, scale: float, function: Callable[..., Tensor], *groups: Any
    ) -> Tensor:
        # With groups, it saves these tensors, from which the first of groups brings x back.
        ctx.save_for_backward(*(groups[1:] or (x,)))
        ctx.activation, ctx.scale, ctx.load = activation, scale, groups[0] if groups else None
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _of_input_backward(ctx, grad)


class _OfGroups(_OfInput):
    """The same where the input is kept in groups, which second derivatives would not go through."""

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _of_input_backward(ctx, grad)


gated = _Gated.apply
gated_from_groups = _GatedFromGroups.apply
product = _Product.apply
product_from_groups = _ProductFromGroups.apply
of_input = _OfInput.apply
of_groups = _OfGroups.apply
