"""The mixins that converted modules run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.overrides import TorchFunctionMode

from .. import functional as LF
from .._sharding import is_distributed
from .._trace.autocast import autocast_dtype, autocast_to
from .._trace.groups import FLOATS, FromGroups, Load, can_store, store
from .._trace.handover import (
    Offer,
    TracedOffer,
    attributed,
    current_hooks,
    hold,
    in_a_region,
    itself,
    linear_of_offered,
    offer,
    offer_itself,
    take,
)
from .._trace.once import differentiable_once
from ..functional.activations import drawn_of
from ..functional.norms import LAYER_NORM, RMS_NORM, NormOps
from ..steps import StepFunction
from .exchange import Converted
from .kinds import Criterion, Function, ResultDtype
from .live import Fixed, fixed, holds
from .recognize import ActivationForm, LinearForm, NormForm

__all__ = [
    "Activation",
    "ConvertedActivation",
    "FewBit",
    "MSNorm",
    "NormPlan",
    "OfActivation",
    "Redirect",
    "SharedInput",
    "StepCalls",
    "as_activation",
    "fixed_of_activation",
    "hands_nothing_over",
    "is_recorded",
    "is_transformed",
    "may_redirect",
    "needs_gradient",
]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on some tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_transformed() -> bool:
    """Whether a function transform or forward-mode AD is running, which define their own derivatives."""
    return not is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def is_recorded() -> bool:
    """Whether a program is made of what runs, by torch.export or torch.jit.trace.

    It gets the original ops, so that it needs no lomem where it is loaded, and draws nothing. (torch.jit.trace also
    traces again without gradients, and compares the graphs.)
    """
    return torch.jit.is_tracing() or is_exporting()


def hands_nothing_over() -> bool:
    """Whether a tracer or transform is running, or a compiler in a region of its own: nothing is handed over there."""
    return is_recorded() or is_transformed() or in_a_region()


def _few_bit(function: Function, x: Tensor, approximate: str, bits: int, criterion: Criterion) -> Tensor:
    """GELU or SiLU with the step function for a number of bits and a criterion, or with codes drawn at random."""
    if criterion is Criterion.DRAWN:
        drawn: dict[str, Any] = {"bits": bits, "rounding": "stochastic"}
        return LF.gelu(x, approximate, **drawn) if function is Function.GELU else LF.silu(x, **drawn)
    if function is Function.GELU:
        return LF.gelu(x, approximate, bits=bits, criterion=criterion.value)
    return LF.silu(x, bits=bits, criterion=criterion.value)


def _name(form: ActivationForm) -> str:
    """The name under which the library knows a form, apart from its scale."""
    tanh = form.kind is Function.GELU and form.approximate == "tanh"
    return "gelu_tanh" if tanh else form.kind.value


class Steps(NamedTuple):
    """The step function of a module that is not a single torch op, resolved for one scale.

    Attributes:
        function: Step function of the module's function at scale 1.
        scale: Scale of the boundaries.
        boundaries: Boundaries at that scale, ascending.
        levels: Levels in the same order.
    """

    function: StepFunction
    scale: float
    boundaries: tuple[float, ...]
    levels: tuple[float, ...]

    @classmethod
    def of(cls, form: ActivationForm, bits: int, criterion: Criterion, scale: float) -> Steps:
        """Looks up the step function of a form."""
        return cls.scaled(LF.step_function(_name(form), bits, criterion=criterion.value), scale)

    @classmethod
    def scaled(cls, function: StepFunction, scale: float) -> Steps:
        """Rescales a step function: the derivative of ``h(s x) / s`` is ``h'(s x)``."""
        order = 1 if scale > 0 else -1
        boundaries = tuple(c / scale for c in function.boundaries)[::order]
        return cls(function, scale, boundaries, function.levels[::order])


def _is_scale(value: Any) -> bool:
    """Whether a value is a valid scale of a SiLU."""
    return isinstance(value, int | float) and math.isfinite(value) and value != 0


class FewBit(Converted):
    """A converted module that saves a few bits per element.

    Attributes:
        lomem_bits: Number of bits per element; None for exact gradients.
        lomem_criterion: What the step function is fitted to.
    """

    lomem_bits: int = 2
    lomem_criterion: Criterion = Criterion.DERIVATIVE

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if "lomem_bits" in vars(self) and "lomem_criterion" not in vars(self):
            # Pickled by a version without criteria, which used the paper's step functions for 2 bits.
            two = self.lomem_bits == 2
            self.__dict__["lomem_criterion"] = Criterion.PAPER if two else Criterion.DERIVATIVE


class OfActivation(Converted):
    """A converted activation."""

    lomem_activation: ActivationForm | None = None
    lomem_fixed: Fixed = ()

    def argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The argument of a call that differs from the original's; None for calls that the original handles."""
        values = (*args, *kwargs.values())
        if (
            self.lomem_activation is None
            or len(values) != 1
            or not isinstance(values[0], Tensor)
            or not needs_gradient(values[0])
            or values[0].is_nested
            or is_recorded()
            or not holds(self, self.lomem_fixed)
        ):
            return None
        return values[0]

    def current(self, option: str) -> Any:
        """The form's scale, approximate or inplace, which the module may read from an attribute at each call."""
        form = self.lomem_activation
        assert form is not None
        return _current(self, form, option)


def _current(module: nn.Module, form: ActivationForm, option: str) -> Any:
    name = getattr(form, f"{option}_name")
    return getattr(form, option) if name is None else getattr(module, name)


def fixed_of_activation(module: nn.Module, form: ActivationForm) -> Fixed:
    """The state with which an activation was recognized."""
    return fixed(module, (form.scale_name, form.approximate_name, form.inplace_name))


class ConvertedActivation(OfActivation, FewBit):
    """An activation that saves a few bits per element for backward; its result is the original one, bit for bit."""

    lomem_prefix = "Step"
    lomem_attributes = ("lomem_activation", "lomem_bits", "lomem_criterion", "lomem_steps", "lomem_fixed")
    lomem_steps: Steps | None = None

    @staticmethod
    def attributes(module: nn.Module, form: ActivationForm, bits: int, criterion: Criterion) -> dict[str, Any]:
        """The mixin's attributes for a module to be converted."""
        scale = _current(module, form, "scale")
        resolved = not form.torch_op and _is_scale(scale) and criterion is not Criterion.DRAWN
        return {
            "lomem_activation": form,
            "lomem_bits": bits,
            "lomem_criterion": criterion,
            "lomem_steps": Steps.of(form, bits, criterion, scale) if resolved else None,
            "lomem_fixed": fixed_of_activation(module, form),
        }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Same result as the original."""
        form, x = self.lomem_activation, self.argument(args, kwargs)
        if form is None or x is None:
            return super().forward(*args, **kwargs)
        if not form.torch_op:
            scale = self.current("scale")
            if not _is_scale(scale):
                return super().forward(*args, **kwargs)  # not a scaled SiLU any more
            if self.lomem_criterion is Criterion.DRAWN:
                return drawn_of(x, super().forward, _name(form), self.lomem_bits, scale)
            steps = self._steps(form, scale)
            return LF.step_activation(x, super().forward, steps.boundaries, steps.levels)
        result = _few_bit(form.kind, x, self.current("approximate"), self.lomem_bits, self.lomem_criterion)
        return x.copy_(result) if self.current("inplace") else result

    def _steps(self, form: ActivationForm, scale: float) -> Steps:
        # The scale may change between calls.
        steps = self.lomem_steps
        if steps is None:
            steps = self.lomem_steps = Steps.of(form, self.lomem_bits, self.lomem_criterion, scale)
        elif steps.scale != scale:
            steps = self.lomem_steps = Steps.scaled(steps.function, scale)
        return steps


#: Its name in pickles of earlier versions.
StepActivation = ConvertedActivation


_aten = torch.ops.aten
_nn = torch._C._nn
#: All the callables under which torch shows these functions to modes.
_GELU = (F.gelu, _aten.gelu, _aten.gelu.default)
_GELU_IN_PLACE = (_nn.gelu_, _aten.gelu_, _aten.gelu_.default)  # type: ignore[attr-defined]
_SILU = (F.silu, _nn.silu, _aten.silu, _aten.silu.default)
_SILU_IN_PLACE = (_nn.silu_, _aten.silu_, _aten.silu_.default)


class Activation(NamedTuple):
    """A call of torch's GELU or SiLU."""

    function: Function
    input: Tensor
    approximate: str
    inplace: bool
    replaced: bool  # by a converted module


def as_activation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    """Parses a call seen by a mode; None if it calls another function, or has invalid arguments."""
    gelu, silu = func in _GELU or func in _GELU_IN_PLACE, func in _SILU or func in _SILU_IN_PLACE
    if not (gelu or silu):
        return None
    options = dict(kwargs)
    # The argument is named input in torch's functions and self in its ops.
    x = args[0] if args else options.pop("input", options.pop("self", None))
    approximate = options.pop("approximate", "none")
    inplace = options.pop("inplace", False) or func in _GELU_IN_PLACE or func in _SILU_IN_PLACE
    if len(args) > 1 and func is F.silu:
        inplace = args[1]
    # Anything left is `out`, which has no gradient, or an error, which torch raises.
    wrong = options or len(args) > 1 + (func is F.silu) or approximate not in ("none", "tanh")
    if wrong or not isinstance(x, Tensor):
        return None
    return Activation(Function.GELU if gelu else Function.SILU, x, approximate, bool(inplace), _can_be_replaced(x))


def _can_be_replaced(x: Tensor) -> bool:
    if not needs_gradient(x) or x.dtype not in FLOATS or x.layout != torch.strided or x.is_nested:
        return False
    return not is_transformed()


class Redirect(TorchFunctionMode):
    """Replaces calls of torch's GELU and SiLU by lomem's."""

    def __init__(self, bits: int, criterion: Criterion) -> None:
        super().__init__()
        self.bits, self.criterion = bits, criterion
        self.hooks = None if is_compiling() else current_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = as_activation(func, args, kwargs)
        if call is None or not call.replaced or not self.lasts():
            return func(*args, **kwargs)
        x = call.input
        result = _few_bit(call.function, x, call.approximate, self.bits, self.criterion)
        return x.copy_(result) if call.inplace else result

    def lasts(self) -> bool:
        """Whether this mode will be active again if the current region is recomputed.

        A checkpointed region that begins inside the forward is recomputed outside of it. Such regions set their own
        saved-tensor hooks.
        """
        return is_compiling() or current_hooks() is self.hooks


def may_redirect() -> bool:
    """Whether a converted module enters its mode."""
    # Any mode, even one that does nothing, disables torch's fast paths in evaluation.
    return torch.is_grad_enabled() and not is_recorded() and not in_a_region()


class StepCalls(FewBit):
    """A module whose forward calls torch's GELU or SiLU."""

    lomem_prefix = "StepCalls"
    lomem_attributes: ClassVar[tuple[str, ...]] = ("lomem_bits", "lomem_criterion")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same result as the original."""
        with Redirect(self.lomem_bits, self.lomem_criterion) if may_redirect() else contextlib.nullcontext():
            return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class NormPlan:
    """How a converted norm computes.

    Attributes:
        form: What the original computes.
        inverted: Whether the normalized input is recovered from the output, as ``(output - beta) / gamma``. Otherwise
            the normalized input is saved, and the linear layers that follow compute their weight gradients from it.
        low_precision: Whether all consumers compute in the autocast dtype, so that the result can be emitted in it.
        shared: Whether linear layers save a tensor other than the result, offered by the norm: if the norm is not
            inverted, or under autocast if some consumers need full precision.
        takers: Maximum number of linear layers called with one result.
        chained: Whether cheap ops between the norm and linear layers pass its output on.
        storage: Number of bits per element in which the normalized input is saved, from which linear layers rebuild
            their input; None for none of the kind.
    """

    form: NormForm
    inverted: bool
    low_precision: bool
    shared: bool
    takers: int = 0
    chained: bool = False
    storage: int | None = None

    def dtype(self, input: Tensor, weight: Tensor | None) -> torch.dtype | None:
        """Dtype of the result; None for the op's own choice, which is the autocast dtype under autocast."""
        autocast = autocast_dtype(input.device.type) is not None
        if autocast and self.low_precision and input.dtype != torch.float64:
            return None
        rule = self.form.autocast_dtype if autocast else self.form.dtype
        if rule is ResultDtype.AUTOCAST:
            return None
        if rule is ResultDtype.FLOAT32:
            return torch.float32
        if rule is ResultDtype.INPUT or weight is None:
            return input.dtype
        return weight.dtype if rule is ResultDtype.WEIGHT else torch.promote_types(input.dtype, weight.dtype)

    def kept_dtype(self, device: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the tensor saved in place of a result of the given dtype."""
        low = autocast_dtype(device)
        return dtype if low is None or low.itemsize >= dtype.itemsize or dtype == torch.float64 else low

    def public(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype | None
    ) -> Tensor:
        """The norm, by lomem's public function."""
        return self._ops.function(x, self.form.shape, *self._parameters(weight, bias, eps), dtype=dtype)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """The norm and its rstd, without a graph. The weights must be invertible."""
        return self._ops.forward(x, self.form.shape, *self._parameters(weight, bias, eps), dtype=dtype)

    def backward(
        self,
        grad: Tensor,
        output: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        backward, shape = self._ops.backward, self.form.shape
        if self.form.centred:
            return backward(grad, output, rstd, shape, weight, bias, dtype, needs)
        return (*backward(grad, output, rstd, shape, weight, dtype, needs[:2]), None)

    @property
    def _ops(self) -> NormOps:
        return LAYER_NORM if self.form.centred else RMS_NORM

    def _parameters(
        self, weight: Tensor | None, bias: Tensor | None, eps: float | None
    ) -> tuple[Tensor | float | None, ...]:
        return (weight, bias, eps or 0.0) if self.form.centred else (weight, eps)


def _sum(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tensor.sum(dims) if dims else tensor


def _affine(kept: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A norm's output, from the normalized input."""
    output = kept if weight is None else kept * weight
    return output if bias is None else output + bias


def _own(parameter: Tensor | None) -> Tensor | None:
    """A copy of a norm's parameter, for linear layers to save.

    What shards parameters by module (FSDP) frees them after the norm's forward pass, and gathers them again for the
    norm's backward pass, which comes after that of the linear layers.
    """
    return parameter.detach().clone() if isinstance(parameter, nn.Parameter) else parameter


def _affine_in(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The same in the dtype of the norm's result, whatever that of the weights."""
    return lambda kept, weight, bias: _affine(kept, weight, bias).to(dtype)


class _NormOfTwoOutputs(torch.autograd.Function):
    """A norm that returns its result, which it does not save, and the tensor that it saves instead.

    That tensor is the result in another dtype, or the normalized input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        plan: NormPlan,
        eps: float | None,
        dtype: torch.dtype,
        kept_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        if plan.inverted:
            result, rstd = plan.forward(x, weight, bias, eps, dtype)
            kept = result.to(kept_dtype)
        else:
            # Both are computed from the input, so that each is rounded only once.
            result = plan.public(x, weight, bias, eps, dtype)
            kept, rstd = plan.forward(x, None, None, eps, kept_dtype)
        ctx.save_for_backward(kept, rstd, weight, bias)
        ctx.plan, ctx.dtype = plan, x.dtype
        ctx.mark_non_differentiable(kept)
        return result, kept

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        kept, rstd, weight, bias = ctx.saved_tensors
        plan, needs = ctx.plan, list(ctx.needs_input_grad[:3])
        if plan.inverted:
            grads = plan.backward(grad, kept, rstd, weight, bias, ctx.dtype, needs)
        else:
            grads = _gradients(plan, grad, kept, rstd, weight, bias, ctx.dtype, needs)
        return (*grads, None, None, None, None)


def _gradients(
    plan: NormPlan,
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, from the normalized input."""
    # gamma is handled outside the op, since it may be 0.
    outer = tuple(range(grad.dim() - len(plan.form.shape)))
    wide = grad if grad.dtype == torch.float64 else grad.float()
    grad_weight = grad_bias = None
    # _sum, since sum(()) would sum over everything.
    if weight is not None and needs[1]:
        grad_weight = _sum(wide * normalized, outer).to(weight.dtype)
    if bias is not None and needs[2]:
        grad_bias = _sum(wide, outer).to(bias.dtype)
    if weight is not None:
        wide = wide * weight
    grad_input, *_ = plan.backward(wide, normalized, rstd, None, None, dtype, [needs[0], False, False])
    return grad_input, grad_weight, grad_bias


class _NormInGroups(torch.autograd.Function):
    """A norm that saves its normalized input in groups, and returns these after its result.

    Not its output: the normalized input could not be recovered from that where a weight is smaller than others by more
    than the step of the codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        plan: NormPlan,
        eps: float | None,
        dtype: torch.dtype,
        loads: list[Load],
    ) -> tuple[Tensor, ...]:
        assert plan.storage is not None
        normalized, rstd = plan.forward(x, None, None, eps, dtype)
        plain = weight is None and bias is None
        result = normalized if plain else plan.public(x, weight, bias, eps, dtype)
        kept, load = store(normalized, plan.storage)
        if not is_compiling():
            loads.append(load)
        ctx.save_for_backward(*kept, rstd, weight, bias)
        ctx.plan, ctx.dtype, ctx.load = plan, x.dtype, load
        ctx.mark_non_differentiable(*kept)
        return result, *kept

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        *kept, rstd, weight, bias = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        normalized = ctx.load(*kept)
        return *_gradients(ctx.plan, grad, normalized, rstd, weight, bias, ctx.dtype, needs), None, None, None, None


class MSNorm(Converted):
    """A norm that saves its output for backward, which its consumers save anyway."""

    lomem_prefix = "MS"
    lomem_attributes = ("lomem_norm", "lomem_fixed")
    lomem_norm: NormPlan | None = None
    lomem_fixed: Fixed = ()

    @staticmethod
    def attributes(module: nn.Module, plan: NormPlan) -> dict[str, Any]:
        """The mixin's attributes for a module to be converted."""
        return {"lomem_norm": plan, "lomem_fixed": fixed(module, (plan.form.eps_name,))}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Same result as the original, up to rounding."""
        values = (*args, *kwargs.values())
        plan = self.lomem_norm
        if plan is None or len(values) != 1 or not isinstance(values[0], Tensor) or not holds(self, self.lomem_fixed):
            return super().forward(*args, **kwargs)
        x, form = values[0], plan.form
        eps = form.eps if form.eps_name is None else getattr(self, form.eps_name)
        if (
            x.is_nested
            or not x.is_floating_point()
            or x.dim() not in form.ranks
            or not (eps is None or 0 <= eps < math.inf)
        ):
            return super().forward(*args, **kwargs)  # not verified for such inputs
        # What is evaluated without gradients saves nothing, so it may as well be the original, bit for bit. Not in
        # training: a reentrant checkpoint runs the same ops without gradients first.
        if not (self.training or torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if is_recorded() or (in_a_region() and not plan.inverted):
            return super().forward(*args, **kwargs)
        weight = getattr(self, form.gamma) if form.gamma is not None else None
        bias = getattr(self, form.beta) if form.beta is not None else None
        dtype = plan.dtype(x, weight)
        if weight is not None and form.one_plus:
            # In the precision of the kernel's arithmetic: 1 + weight is not rounded to 16 bits.
            weight = 1 + (weight if weight.dtype == torch.float64 else weight.float())
        if form.axis == 1:
            x = x.movedim(1, -1)
        result = self._normalize(plan, x, weight, bias, eps, dtype)
        return result if form.axis == -1 else result.movedim(-1, 1)

    def _normalize(
        self,
        plan: NormPlan,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        device = x.device.type
        if plan.storage is not None and needs_gradient(x, weight, bias) and can_store(x) and not is_transformed():
            with autocast_to(device, None):
                loads: list[Load] = []
                full = dtype or autocast_dtype(device) or x.dtype
                result, *kept = _NormInGroups.apply(x, weight, bias, plan, eps, full, loads)
            result = attributed(result)
            if is_compiling():  # where nothing that a custom function appends is seen outside
                loads = [Load(result, plan.storage)]
            given = _own(weight), _own(bias)
            offer(result, (*kept, *given), FromGroups(_affine_in(full), *loads), plan.takers, grouped=True)
            hold(result, [t for t in given if t is not None])
            return result  # type: ignore[no-any-return]
        if plan.shared and needs_gradient(x, weight, bias) and not in_a_region():
            full = dtype or autocast_dtype(device) or x.dtype
            kept_dtype = plan.kept_dtype(device, full)
            if not plan.inverted or kept_dtype != full:
                with autocast_to(device, None):
                    result, kept = _NormOfTwoOutputs.apply(x, weight, bias, plan, eps, full, kept_dtype)
                result = attributed(result)
                if plan.inverted:
                    offer(result, (kept,), itself, plan.takers)
                else:
                    offer(result, (kept, weight, bias), _affine, plan.takers)
                return result  # type: ignore[no-any-return]
        result = plan.public(x, weight, bias, eps, dtype)
        if plan.chained and plan.inverted and result.requires_grad and not is_transformed():
            offer_itself(result)
        return result


class SharedInput(Converted):
    """A linear layer that saves what its producer offers instead of its input.

    Attributes:
        lomem_linear: What it computes.
        lomem_fixed: The state with which it was recognized.
        lomem_copies: Whether it makes copies again of tensors that nobody offered.
    """

    lomem_prefix = "SharedInput"
    lomem_attributes = ("lomem_linear", "lomem_fixed", "lomem_copies")
    lomem_linear: LinearForm | None = None
    lomem_fixed: Fixed = ()
    lomem_copies: bool = False

    @staticmethod
    def attributes(module: nn.Module, form: LinearForm | None) -> dict[str, Any]:
        """The mixin's attributes for a module to be converted; without a form, it may change at any time."""
        return {"lomem_linear": form, "lomem_fixed": () if form is None else fixed(module), "lomem_copies": False}

    @classmethod
    def combined(
        cls, attributes: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[type[Converted], Mapping[str, Any]]:
        """Makes copies again if either says so."""
        return cls, {**attributes, "lomem_copies": attributes["lomem_copies"] or others["lomem_copies"]}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same result as the original."""
        form, values = self.lomem_linear, (*args, *kwargs.values())
        if form is None or len(values) != 1 or not isinstance(values[0], Tensor) or hands_nothing_over():
            return super().forward(*args, **kwargs)
        x = values[0]
        taken = take(x)  # even if it goes unused: the producer counts its takers
        if taken is None or x.dim() < 2 or not holds(self, self.lomem_fixed):
            return super().forward(*args, **kwargs)
        weight = getattr(self, form.weight)
        bias = getattr(self, form.bias) if form.bias is not None else None
        kept, made = taken
        device = x.device.type
        low = None if x.dtype == torch.float64 else autocast_dtype(device)
        dtype = low or x.dtype
        if not self.may_take(kept, made, x, dtype, weight) or (low is None and weight.dtype != x.dtype):
            return super().forward(*args, **kwargs)
        if not form.transposed:
            weight = weight.T
        with autocast_to(device, None):
            if not is_distributed(x, weight):
                options = {"differentiable": made.differentiable}
                return linear_of_offered(x, weight, bias, dtype, kept, made.rebuild, **options)
            result = _distributed_linear(x, weight, bias, dtype, kept, made)
        return super().forward(*args, **kwargs) if result is None else result

    def may_take(
        self, kept: Sequence[Tensor | None], made: Offer | TracedOffer, x: Tensor, dtype: torch.dtype, weight: Tensor
    ) -> bool:
        """Whether the layer may save what is offered.

        Args:
            kept: Tensors returned by :func:`take`.
            made: The offer.
            x: The input.
            dtype: Dtype in which the layer computes.
            weight: Its weight.
        """
        if made.weak and not self.lomem_copies:
            return False  # it may be changed in place, or nobody else may save it
        # Do not use a copy that is less precise than both this layer and its input.
        copy = x if made.differentiable or made.grouped else kept[0]
        assert copy is not None
        eps = max(torch.finfo(d).eps for d in (dtype, x.dtype))
        return torch.finfo(copy.dtype).eps <= eps and needs_gradient(weight)


def _distributed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kept: Sequence[Tensor | None],
    made: Offer | TracedOffer,
) -> Tensor | None:
    """The same with DTensors, on the local tensors of each rank; None if they would have to be redistributed."""
    from .._sharding import products

    def function(x: Tensor, weight: Tensor, bias: Tensor | None, local: Callable[[Tensor], Tensor]) -> Tensor:
        def rebuild(*kept: Tensor | None) -> Tensor:
            return local(made.rebuild(*kept))

        return linear_of_offered(x, weight, bias, dtype, kept, rebuild, differentiable=made.differentiable)

    return products.linear(x, weight, bias, function)
