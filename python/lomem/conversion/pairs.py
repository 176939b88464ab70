"""Pairs: linear layers that rebuild their input from what is saved anyway.

An activation saves its input, a product its operands, and an inverted norm its output. Whatever follows from these by
cheap ops need not be saved too. While the forward pass of a module runs, :class:`_Pairs` sees its cheap ops and passes
offers on (:mod:`lomem._trace.handover`): from gate to silu(gate), from there to silu(gate) * up, and to the linear
layers behind. The forward pass computes what it computed before, by the same ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from .._sharding import is_distributed
from .._trace.autocast import autocast_dtype, autocast_to
from .._trace.groups import FLOATS, KERNELS, FromGroups, can_store, store
from .._trace.handover import Offer, TracedOffer, attributed, hold, is_offered, offer, peek, recomputed
from .._trace.once import differentiable_once
from .exchange import Converted
from .kinds import Criterion, Function, Text
from .modules import (
    Activation,
    FewBit,
    OfActivation,
    Redirect,
    StepCalls,
    as_activation,
    fixed_of_activation,
    is_recorded,
    is_transformed,
    may_redirect,
)
from .recognize import ActivationForm

__all__ = [
    "UNARY",
    "ConvertedDropout",
    "PairCalls",
    "PairedActivation",
    "Step",
    "StepKind",
    "as_step",
    "is_small",
]


class StepKind(Text):
    """The cheap ops that offers are passed through."""

    PRODUCT = "product"
    SUM = "sum"
    CAST = "cast"
    DROPOUT = "dropout"


_aten = torch.ops.aten


#: Tensors whose storages are followed.
_ORDINARY = (Tensor, nn.Parameter, FakeTensor)
#: All the callables under which torch shows these functions to modes, out of place.
_STEPS: dict[Any, StepKind] = {
    **dict.fromkeys(
        [
            torch.mul,
            torch.multiply,
            Tensor.mul,
            Tensor.multiply,
            Tensor.__mul__,
            Tensor.__rmul__,
            _aten.mul,
            _aten.mul.Tensor,
        ],
        StepKind.PRODUCT,
    ),
    **dict.fromkeys(
        [
            torch.add,
            torch.sub,
            torch.subtract,
            Tensor.add,
            Tensor.sub,
            Tensor.subtract,
            Tensor.__add__,
            Tensor.__radd__,
            Tensor.__sub__,
            _aten.add,
            _aten.add.Tensor,
            _aten.sub,
            _aten.sub.Tensor,
        ],
        StepKind.SUM,
    ),
    **dict.fromkeys(
        [Tensor.to, Tensor.type, Tensor.type_as, Tensor.double, Tensor.float, Tensor.bfloat16, Tensor.half],
        StepKind.CAST,
    ),
    **dict.fromkeys([F.dropout, torch.dropout, _aten.dropout, _aten.dropout.default], StepKind.DROPOUT),
}
#: Those of one operand.
UNARY = (StepKind.CAST, StepKind.DROPOUT)


class Step(NamedTuple):
    """A call of a cheap op.

    Attributes:
        kind: Which one.
        positions: Positions among the arguments of the operands that are tensors.
        operands: These tensors.
        p: Of a dropout, the probability that an element is dropped.
    """

    kind: StepKind
    positions: tuple[int, ...]
    operands: tuple[Tensor, ...]
    p: float = 0.0

    def makes(self, result: Any) -> bool:
        """Whether the result is what can be rebuilt: a cast may also go to integers, or to another device."""
        if self.kind is not StepKind.CAST:
            return isinstance(result, Tensor)
        (x,) = self.operands
        return isinstance(result, Tensor) and {x.dtype, result.dtype} <= {*FLOATS} and result.device == x.device

    def passes_on(self, operand: int) -> bool:
        """Whether the result is as cheap to rebuild as one operand."""
        first = self.operands[operand]
        others = [t for i, t in enumerate(self.operands) if i != operand]
        if self.kind in UNARY:
            return True
        broadcast = torch.broadcast_shapes(*(t.shape for t in self.operands))
        if any(t.device != first.device for t in others) or not _are_same(first.shape, broadcast):
            return False
        # A product saves its factors. A summand as large as the sum would only be saved in its place.
        return all(
            is_small(t, first) or (self.kind is StepKind.PRODUCT and _are_same(t.shape, first.shape)) for t in others
        )


def _are_same(shape: Sequence[int], other: Sequence[int]) -> bool:
    if not is_compiling():
        return shape == other
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # of what depends on data, it knows only so much

    return len(shape) == len(other) and all(guard_or_false(m == n) for m, n in zip(shape, other, strict=True))


def is_small(tensor: Tensor, than: Tensor) -> bool:
    """Whether a tensor is so much smaller than another that saving it does not count."""
    m, n = tensor.numel(), than.numel()
    if not is_compiling():
        return 4 * m <= n
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    # Where the batch depends on data, what does not, such as a parameter, is small.
    return guard_or_true(4 * m <= n) and not guard_or_false(m == n)


def as_step(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Step | None:
    """Parses a call seen by a mode; None if it is no cheap op, or has unusual arguments."""
    kind = _STEPS.get(func)
    if func is Tensor.type and len(args) + len(kwargs) == 1:
        return None  # asks for the type
    if kind is None or not args or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    if kind is StepKind.DROPOUT and is_distributed(*args):
        return None  # of shards, lomem drops other elements than torch
    p = _probability(args, kwargs) if kind is StepKind.DROPOUT else 0.0
    found = range(1) if kind in UNARY else range(len(args))
    positions = tuple(i for i in found if isinstance(args[i], Tensor))
    operands = tuple(args[i] for i in positions)
    ordinary = is_compiling() or all(_is_ordinary(t) and not t.is_inference() for t in operands)
    if not operands or p is None or not ordinary:
        return None
    return Step(kind, positions, operands, p)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in _ORDINARY or is_distributed(tensor)


def _probability(args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """The probability of a dropout; None if it is off, in place, or drops everything."""
    names = ("p", "training", "inplace")
    options: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    options |= {"training" if n == "train" else n: value for n, value in kwargs.items()}
    options |= dict(zip(names, args[1:], strict=False))
    p = options["p"]
    x = args[0]
    drops = options["training"] and not options["inplace"] and isinstance(p, int | float) and 0 < p < 1
    usual = isinstance(x, Tensor) and x.dtype in FLOATS and x.layout == torch.strided and not x.is_nested
    return p if drops and usual and options.keys() == {*names} else None


def _value(activation: str, gate: Tensor) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


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
        return _value(self.activation, x)


class _GatedAgain:
    """Recomputes a gated product."""

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if torch.is_grad_enabled() or gate.device.type not in KERNELS:
            return _value(self.activation, gate) * up
        return torch.ops.lomem.gated(gate, up, self.activation)  # type: ignore[no-any-return]


class _Again:
    """Recomputes an activation of several ops, under the autocast setting of the forward pass."""

    def __init__(self, function: Callable[[Tensor], Tensor], device: str) -> None:
        self.function, self.device, self.autocast = function, device, autocast_dtype(device)

    def __call__(self, x: Tensor) -> Tensor:
        with autocast_to(self.device, self.autocast):
            return self.function(x)


class _Replayed:
    """Recomputes the result of a cheap op.

    Args:
        rebuild: Recomputes one operand.
        number: From how many tensors.
        function: The op, as a function of that operand and the others.
    """

    def __init__(self, rebuild: Callable[..., Tensor], number: int, function: Callable[..., Tensor]) -> None:
        self.rebuild, self.number, self.function = rebuild, number, function

    def __call__(self, *kept: Tensor | None) -> Tensor:
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
    dims = [*range(added), *(added + i for i, n in enumerate(operand.shape) if _are_same((n,), (1,)))]
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
        return torch.ops.lomem.dropout_apply(grad, mask, ctx.p), None


def _drop(x: Tensor, p: float, takers: int) -> Tensor:
    """Dropout whose result is offered to linear layers, to be rebuilt from the mask and from what x is."""
    result, mask = _Dropout.apply(x, p)
    found = peek(x, copies=True) if takers else None
    if found is not None:
        kept, made = found
        rebuild = _Replayed(made.rebuild, len(kept), lambda x, mask: torch.ops.lomem.dropout_apply(x, mask, p))
        options: Any = {"differentiable": made.differentiable, "weak": made.weak, "grouped": made.grouped}
        offer(result, (*kept, mask), rebuild, takers, **options)
        # If x needs no gradient, nobody saves the mask. And a producer of x may save the storage, not the tensor.
        hold(result, (mask, *made.held, *(t for t in kept if t is x)))
    return result  # type: ignore[no-any-return]


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


#: Below these, activations and their derivatives are under 1e-7: smaller than the noise of what is kept in groups.
_FLOORS = {"gelu": -6.0, "gelu_tanh": -6.0, "silu": -20.0}


def _bounded(x: Tensor, activation: str, scale: float) -> Tensor:
    """The input of ``h(scale * x) / scale`` without what is so negative that it makes no difference.

    A mask's fill value would otherwise set the scale of its group, and all else in the group would be lost.
    """
    bound = _FLOORS[activation] / scale
    return x.detach().clamp(min=bound) if scale > 0 else x.detach().clamp(max=bound)


def _of_input(
    x: Tensor,
    name: str,
    scale: float,
    function: Callable[..., Tensor],
    again: Callable[..., Tensor],
    takers: int,
    storage: int | None,
    *,
    torch_op: bool,
) -> Tensor:
    """An activation whose result is offered, to be rebuilt from its input or from what is kept of that.

    Args:
        x: The input.
        name: Name of the activation.
        scale: It is ``h(scale * x) / scale``.
        function: Computes it.
        again: Computes it once more, in a backward pass.
        takers: Number of linear layers expected to take the result.
        storage: Bits per element in which the input is kept; None to keep it as it is.
        torch_op: Whether it is a single torch op.
    """
    options: dict[str, Any] = {"activation": name if torch_op else None}
    with torch._C.DisableTorchFunction():  # modes of modules around this one would give it few bits
        if storage is None or not can_store(x):
            result = _OfInput.apply(x, name, scale, function)
            offer(result, (x,), again, takers, differentiable=True, **options)
        else:
            kept, load = store(_bounded(x, name, scale), storage)
            result = attributed(_OfGroups.apply(x, name, scale, function, load, *kept))
            offer(result, kept, FromGroups(again, load), takers, grouped=True, **options)
    return result  # type: ignore[no-any-return]


class _Pairs(Redirect):
    """Passes offers on while the forward pass of a module runs.

    Args:
        bits: Number of bits that calls of GELU and SiLU save per element; None to have them offer their input.
        criterion: What their step functions are fitted to.
        takers: Number of linear layers expected to take a result.
        activations: Whether calls of GELU and SiLU are replaced.
        dropouts: Whether dropouts save a bit per element.
        storage: Number of bits per element in which inputs of GELU and SiLU are kept; None to keep them as they are.
    """

    def __init__(
        self,
        bits: int | None,
        criterion: Criterion,
        takers: int,
        *,
        activations: bool,
        dropouts: bool,
        storage: int | None,
    ) -> None:
        super().__init__(bits or 2, criterion)
        self.exact, self.takers, self.activations, self.dropouts = bits is None, takers, activations, dropouts
        self.storage = storage
        #: Under a compiler: the results of activations, with their inputs and names.
        self.activated: list[tuple[Tensor, Tensor, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = as_activation(func, args, kwargs)
        if call is not None:
            # A compiler recomputes those of modules too: the product of one is recomputed as a whole (_compiled).
            if not (self.activations or (is_compiling() and self.exact)):
                return func(*args, **kwargs)
            if not self.exact:
                return super().__torch_function__(func, types, args, kwargs)
            return self._activation(call, func, args, kwargs)
        step = as_step(func, args, kwargs)
        if step is None or not torch.is_grad_enabled() or is_transformed():
            return func(*args, **kwargs)
        if is_compiling():
            return self._compiled(step, func, args, kwargs)
        if step.kind is StepKind.DROPOUT:
            replaced = self.dropouts and self.lasts()
            return _drop(step.operands[0], step.p, self.takers) if replaced else func(*args, **kwargs)
        return self._step(step, func, args, kwargs)

    def _activation(self, call: Activation, func: Any, args: Any, kwargs: Any) -> Tensor:
        if not call.replaced or call.inplace or not self.lasts():
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        x, name = call.input, name_of(call.function, call.approximate)
        function = Activated(name)
        if not is_compiling() or (self.storage is not None and can_store(x)):
            return _of_input(x, name, 1, function, function, self.takers, self.storage, torch_op=True)
        # Modes of modules around this one would give it few bits.
        with torch._C.DisableTorchFunction():
            result = recomputed(function, x)
        self.activated.append((result, x, name))
        return result

    def _compiled(self, step: Step, func: Any, args: Any, kwargs: Any) -> Tensor:
        # All in one region: what one region hands to another is saved.
        if step.kind is StepKind.PRODUCT and len(step.operands) == 2 and not kwargs:
            for operand, other in (step.operands, step.operands[::-1]):
                for result, x, name in self.activated:
                    if operand is result and _are_same(other.shape, operand.shape):
                        with torch._C.DisableTorchFunction():
                            return recomputed(_GatedAgain(name), x, other)
        if step.kind is StepKind.CAST and not kwargs and not any(value is True for value in args):
            (x,) = step.operands
            result = func(*args)
            if (result.dtype, result.device) == (x.dtype, x.device):
                return x  # as eagerly: to a compiler, the result would be another tensor, which nobody offers
        return self._step(step, func, args, kwargs)

    def _step(self, step: Step, func: Any, args: Any, kwargs: Any) -> Tensor:
        for i, operand in enumerate(step.operands):
            found = peek(operand, copies=step.kind is StepKind.CAST)
            if found is not None and self.lasts() and step.passes_on(i):
                return self._passed_on(step, i, *found, func, args, kwargs)
        return func(*args, **kwargs)  # type: ignore[no-any-return]

    def _passed_on(
        self,
        step: Step,
        position: int,
        kept: tuple[Tensor | None, ...],
        made: Offer | TracedOffer,
        func: Any,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        operand = step.operands[position]
        others = tuple(t for i, t in enumerate(step.operands) if i != position)
        if step.kind is StepKind.PRODUCT and len(others) == 1:
            (other,) = others
            if _is_gated(operand, other, made):
                return self._gated(operand, other, kept, made)
            # Otherwise torch's own product saves nothing that is not saved anyway.
            if other.requires_grad and kept[0] is not operand:
                product = _ProductFromGroups if made.grouped else _Product
                result = attributed(product.apply(operand, other, made.rebuild, *kept))
            else:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if result is operand or not step.makes(result):
            return result  # type: ignore[no-any-return]  # a cast to its own dtype, for example
        if step.kind is StepKind.SUM:
            # A sum does not save its operands, so they may be changed afterwards.
            others = tuple(t.clone() for t in others)
        function = _replay(step, position, func, args, kwargs, result.dtype)
        rebuild = _Replayed(made.rebuild, len(kept), function)
        options: Any = {"differentiable": made.differentiable, "weak": made.weak, "grouped": made.grouped}
        offer(result, (*kept, *others), rebuild, self.takers, **options)
        if is_compiling():
            return result  # type: ignore[no-any-return]
        assert isinstance(made, Offer)
        # A producer that saves its result saves the storage, not the tensor. And nobody may save small operands.
        itself = kept if is_offered(operand) else ()
        held = (*made.held, *(t for t in itself if t is operand))
        hold(result, (*held, *(t for t in others if is_small(t, operand))))
        return result  # type: ignore[no-any-return]

    def _gated(
        self, activated: Tensor, up: Tensor, kept: tuple[Tensor | None, ...], made: Offer | TracedOffer
    ) -> Tensor:
        name = made.activation
        assert name is not None
        again = _GatedAgain(name)
        if not made.grouped:
            (gate,) = kept
            result = _Gated.apply(activated, up, gate, name)
            offer(result, (gate, up), again, self.takers, differentiable=True)
            return result  # type: ignore[no-any-return]
        assert isinstance(made.rebuild, FromGroups)
        (load,) = made.rebuild.loads
        more, load_up = store(up, load.bits)
        from_groups = FromGroups(again, load, load_up)
        result = attributed(_GatedFromGroups.apply(activated, up, from_groups, name, *kept, *more))
        offer(result, (*kept, *more), from_groups, self.takers, grouped=True)
        return result  # type: ignore[no-any-return]


def _is_gated(operand: Tensor, other: Tensor, made: Offer | TracedOffer) -> bool:
    alike = _are_same(other.shape, operand.shape) and other.dtype == operand.dtype
    alike &= not made.grouped or can_store(other)
    return made.activation is not None and alike


def _replay(
    step: Step, position: int, func: Any, args: Any, kwargs: dict[str, Any], dtype: torch.dtype
) -> Callable[..., Tensor]:
    """The op as a function of one operand and the others."""
    if step.kind is StepKind.CAST:
        return lambda operand: operand.to(dtype)
    places = [step.positions[position], *(p for i, p in enumerate(step.positions) if i != position)]
    template = tuple(None if i in places else value for i, value in enumerate(args))

    def function(*operands: Tensor) -> Tensor:
        given = list(template)
        for place, operand in zip(places, operands, strict=True):
            given[place] = operand
        return func(*given, **kwargs)  # type: ignore[no-any-return]

    return function


class PairCalls(StepCalls):
    """A module in whose forward pass offers are passed on.

    Attributes:
        lomem_bits: Number of bits per element that its calls of GELU and SiLU save; None has them offer their input.
        lomem_takers: Maximum number of linear layers called with one result.
        lomem_activations: Whether its calls of GELU and SiLU are replaced.
        lomem_dropouts: Whether its calls of dropout save a bit per element.
        lomem_storage: Number of bits per element in which the inputs of its calls of GELU and SiLU are kept; None to
            keep them as they are.
    """

    lomem_prefix = "Pair"
    lomem_attributes = (
        "lomem_bits",
        "lomem_criterion",
        "lomem_takers",
        "lomem_activations",
        "lomem_dropouts",
        "lomem_storage",
    )
    lomem_takers: int = 1
    lomem_activations: bool = True
    lomem_dropouts: bool = False
    lomem_storage: int | None = None

    @staticmethod
    def attributes(
        bits: int | None = None,
        criterion: Criterion | None = None,
        takers: int = 1,
        *,
        activations: bool = False,
        dropouts: bool = False,
        storage: int | None = None,
    ) -> dict[str, Any]:
        """The mixin's attributes for a module to be converted."""
        return {
            "lomem_bits": bits,
            "lomem_criterion": criterion or FewBit.lomem_criterion,
            "lomem_takers": takers,
            "lomem_activations": activations,
            "lomem_dropouts": dropouts,
            "lomem_storage": storage,
        }

    @classmethod
    def combined(
        cls, attributes: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[type[Converted], Mapping[str, Any]]:
        """Calls save few bits if either says so."""
        few = attributes if attributes["lomem_bits"] is not None else others
        takers = max(attributes.get("lomem_takers", 1), others.get("lomem_takers", 1))
        # Those of StepCalls, which have no such attribute, replace calls of activations.
        options = {
            "activations": attributes.get("lomem_activations", True) or others.get("lomem_activations", True),
            "dropouts": attributes.get("lomem_dropouts", False) or others.get("lomem_dropouts", False),
            "storage": attributes.get("lomem_storage") or others.get("lomem_storage"),
        }
        return cls, cls.attributes(few["lomem_bits"], few["lomem_criterion"], takers, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same result as the original."""
        mode = _Pairs(
            self.lomem_bits,
            self.lomem_criterion,
            self.lomem_takers,
            activations=self.lomem_activations,
            dropouts=self.lomem_dropouts,
            storage=self.lomem_storage,
        )
        with mode if may_redirect() else contextlib.nullcontext():
            return super(StepCalls, self).forward(*args, **kwargs)


class PairedActivation(OfActivation):
    """An activation that saves its input, as ever, and offers it."""

    lomem_prefix = "Pair"
    lomem_attributes = ("lomem_activation", "lomem_takers", "lomem_gated", "lomem_storage", "lomem_fixed")
    lomem_takers: int = 1
    lomem_gated: bool = False
    lomem_storage: int | None = None

    @staticmethod
    def attributes(
        module: nn.Module, form: ActivationForm, takers: int, gated: bool, storage: int | None
    ) -> dict[str, Any]:
        """The mixin's attributes for a module to be converted.

        Args:
            module: The module.
            form: What it computes.
            takers: Maximum number of linear layers called with one result, or one product of it.
            gated: Whether a product takes its result.
            storage: Number of bits per element in which its input is kept; None to keep it as it is.
        """
        return {
            "lomem_activation": form,
            "lomem_takers": takers,
            "lomem_gated": gated,
            "lomem_storage": storage,
            "lomem_fixed": fixed_of_activation(module, form),
        }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Same result as the original."""
        form, original, x = self.lomem_activation, super().forward, self.argument(args, kwargs)
        if form is None or x is None or is_transformed() or self.current("inplace"):
            return original(*args, **kwargs)
        storage = self.lomem_storage
        exact = is_compiling() and (storage is None or not can_store(x))
        if exact and self.lomem_gated:
            return original(x)  # a product is recomputed as a whole, see _Pairs
        if exact:
            # Modes of modules around this one would give it few bits.
            with torch._C.DisableTorchFunction():
                return recomputed(original, x)
        name = name_of(form.kind, self.current("approximate"))
        again = Activated(name) if form.torch_op else _Again(original, x.device.type)
        options = {"torch_op": form.torch_op}
        return _of_input(x, name, form.scale, original, again, self.lomem_takers, storage, **options)


class ConvertedDropout(Converted):
    """A dropout that saves a bit per element; its result is the original one, bit for bit.

    Attributes:
        lomem_takers: Maximum number of linear layers called with one result, which rebuild it; 0 for none.
    """

    lomem_prefix = "Bit"
    lomem_attributes = ("lomem_takers",)
    lomem_takers: int = 0

    @classmethod
    def combined(
        cls, attributes: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[type[Converted], Mapping[str, Any]]:
        """Offers its result if either says so."""
        return cls, {"lomem_takers": max(attributes["lomem_takers"], others["lomem_takers"])}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same result as the original."""
        step = None
        if len(args) == 1 and not kwargs and torch.is_grad_enabled() and not (is_compiling() or is_recorded()):
            options = {"p": self.p, "training": self.training, "inplace": self.inplace}
            step = None if is_transformed() else as_step(F.dropout, args, options)
        return super().forward(*args, **kwargs) if step is None else _drop(args[0], step.p, self.lomem_takers)
