"""Pairs: linear layers that rebuild their input from what is saved anyway.

An activation saves its input, a product its operands, and an inverted norm its output. Whatever follows from these by
cheap ops need not be saved too. While the forward pass of a module runs, :class:`_Pairs` sees its cheap ops and passes
offers on (:mod:`lomem._trace.handover`): from gate to silu(gate), from there to silu(gate) * up, and to the linear
layers behind. The forward pass computes what it computed before, by the same ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._trace.groups import FromGroups, can_store, store
from .._trace.handover import (
    Offer,
    TracedOffer,
    attributed,
    can_recompute_python,
    hold,
    is_offered,
    offer,
    peek,
    recomputed,
)
from .cheap_ops import Step, StepKind, are_same, as_step, is_small
from .exchange import Converted
from .kinds import Criterion
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
from .pair_functions import (
    Activated,
    Again,
    GatedAgain,
    Replayed,
    dropped,
    dropped_again,
    gated,
    gated_from_groups,
    name_of,
    of_groups,
    of_input,
    product,
    product_from_groups,
)
from .recognize import ActivationForm

__all__ = [
    "ConvertedDropout",
    "PairCalls",
    "PairedActivation",
]


def _drop(x: Tensor, p: float, takers: int) -> Tensor:
    """Dropout whose result is offered to linear layers, to be rebuilt from the mask and from what x is."""
    result, mask = dropped(x, p)
    found = peek(x, copies=True) if takers else None
    if found is not None:
        kept, made = found
        assert isinstance(made, Offer)
        rebuild = Replayed(made.rebuild, len(kept), lambda x, mask: dropped_again(x, mask, p))
        options: Any = {"differentiable": made.differentiable, "weak": made.weak, "grouped": made.grouped}
        offer(result, (*kept, mask), rebuild, takers, **options)
        # If x needs no gradient, nobody saves the mask. And a producer of x may save the storage, not the tensor.
        hold(result, (mask, *made.held, *(t for t in kept if t is x)))
    return result


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
            result = of_input(x, name, scale, function)
            offer(result, (x,), again, takers, differentiable=True, **options)
        else:
            kept, load = store(_bounded(x, name, scale), storage)
            result = attributed(of_groups(x, name, scale, function, load, *kept))
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
                    if operand is result and are_same(other.shape, operand.shape):
                        with torch._C.DisableTorchFunction():
                            return recomputed(GatedAgain(name), x, other)
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
                multiply = product_from_groups if made.grouped else product
                result = attributed(multiply(operand, other, made.rebuild, *kept))
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
        rebuild = Replayed(made.rebuild, len(kept), function)
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
        again = GatedAgain(name)
        if not made.grouped:
            (gate,) = kept
            result = gated(activated, up, gate, name)
            offer(result, (gate, up), again, self.takers, differentiable=True)
            return result  # type: ignore[no-any-return]
        assert isinstance(made.rebuild, FromGroups)
        (load,) = made.rebuild.loads
        more, load_up = store(up, load.bits)
        from_groups = FromGroups(again, load, load_up)
        result = attributed(gated_from_groups(activated, up, from_groups, name, *kept, *more))
        offer(result, (*kept, *more), from_groups, self.takers, grouped=True)
        return result  # type: ignore[no-any-return]


def _is_gated(operand: Tensor, other: Tensor, made: Offer | TracedOffer) -> bool:
    alike = are_same(other.shape, operand.shape) and other.dtype == operand.dtype
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
        if exact and not (form.torch_op or can_recompute_python()):
            return original(x)  # saved as without conversion
        if exact:
            # Modes of modules around this one would give it few bits.
            with torch._C.DisableTorchFunction():
                return recomputed(original, x)
        name = name_of(form.kind, self.current("approximate"))
        again = Activated(name) if form.torch_op else Again(original, x.device.type)
        options = {"torch_op": form.torch_op}
        function = again if form.torch_op else original
        return _of_input(x, name, form.scale, function, again, self.lomem_takers, storage, **options)


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
