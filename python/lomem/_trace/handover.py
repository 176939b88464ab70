"""Hands what a producer saves to the linear layers after it, so that they need not save their input.

A linear layer saves its input to compute its weight gradient. If that input is a cheap function of tensors that its
producer saves anyway (a norm's copy in another dtype or its normalized input, an activation's input, gate and up of a
gated unit), the layer saves those tensors instead and recomputes its input from them. The producer *offers* them, the
linear layer *takes* them.

An offer belongs to the producer's result tensor, and is looked up in a weak table: a tensor and its Python object have
the same lifetime, whoever else holds the tensor, and a tensor without extra attributes is pickled like any other. The
alternatives fail: an autograd node outlives every checkpointed region, and a compiler cannot see it; a single op for
producer and layer would have to know the layer when the producer runs, and there may be several or none; a tensor
subclass is visible to all code.

Three rules make it correct:

- **Boundaries.** Saved-tensor hooks decide where saved tensors go: to the CPU or, under checkpointing, nowhere. What
  was offered under one pair of hooks is not taken under another. Each checkpointed region sets its own hooks, in the
  first pass and when it is recomputed, so both passes take and save the same tensors.
- **Lifetimes.** Without hooks, autograd saves the producer's tensors themselves, and an offer holds weak references to
  them. With hooks, autograd may save something else, or nothing. An offer then holds strong references until the last
  of the linear layers seen in the example run takes them (if cheap ops take the result too, for as long as that
  exists), or until a converted module runs under other hooks, which means that the region is over. Offers of copies of
  tensors that nobody offered hold weak references even then: a cast would otherwise keep its operand alive as long as
  its result.
- **Versions.** An offer is void once the result, or a tensor that it is recomputed from, has been changed in place.

A producer may keep what it offers in 8 or 4 bits (:mod:`lomem._trace.groups`); the codes are then what is offered.

Offers are passed on: a cheap op on an offered tensor (a product, a sum, a cast) offers its own result, to be recomputed
from the same tensors and its other operands (:mod:`lomem.conversion.pairs`).

Under a compiler, an offer is an attribute of the result, which the compiler follows while it traces, and nothing of it
is left in the compiled code. Norms are handed over so, and what is kept in groups, which cheap ops pass on. Activations
and products of what is kept exactly are not: they are marked to be recomputed (:func:`recomputed`), which leaves the
compiler more freedom. Nothing is handed over from one graph to another, or in a checkpointed region, which saves
nothing in the first place.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .._sharding import wrapped_by
from .once import differentiable_once

__all__ = [
    "Offer",
    "Rebuild",
    "TracedOffer",
    "attributed",
    "current_hooks",
    "hold",
    "in_a_region",
    "is_offered",
    "is_whole",
    "itself",
    "linear_of_offered",
    "offer",
    "offer_itself",
    "offered",
    "peek",
    "recomputed",
    "take",
]

#: Function that recomputes a linear layer's input from the tensors saved in its place.
Rebuild: TypeAlias = Callable[..., Tensor]


class Offer:
    """The tensors that a producer saves, and how to recompute its result from them.

    Attributes:
        rebuild: Function that recomputes the result from the saved tensors.
        version: Version of the result when the offer was made.
        hooks: Innermost saved-tensor hooks at that time; None for none.
        takers: Number of linear layers still expected to take it; only used under hooks.
        differentiable: Whether gradients flow through the saved tensors to whatever the result depends on. Otherwise
            they are constants of the graph, and second derivatives would be wrong.
        activation: Name of the activation, if the result is that of the only saved tensor.
        weak: Whether it never holds strong references.
        grouped: Whether tensors come back from groups (:mod:`lomem._trace.groups`), not exactly.
        held: Tensors kept alive with the offer, see :func:`hold`.
    """

    def __init__(
        self,
        kept: Sequence[Tensor | None],
        rebuild: Rebuild,
        version: int,
        hooks: Any,
        takers: int,
        *,
        differentiable: bool = False,
        activation: str | None = None,
        weak: bool = False,
        grouped: bool = False,
    ) -> None:
        self.rebuild, self.version, self.hooks, self.takers = rebuild, version, hooks, takers
        self.differentiable, self.activation, self.grouped = differentiable, activation, grouped
        self.held: tuple[Tensor, ...] = ()
        self.weak = weak
        self._weak = hooks is None or weak
        self._versions = tuple(None if t is None else t._version for t in kept)
        self._kept: tuple[Any, ...] | None
        self._kept = tuple(None if t is None else TensorWeakRef(t) for t in kept) if self._weak else tuple(kept)

    def tensors(self) -> tuple[Tensor | None, ...] | None:
        """The offered tensors; None if they no longer exist, or have been changed in place."""
        if self._kept is None:
            return None
        tensors = tuple(None if ref is None else ref() for ref in self._kept) if self._weak else self._kept
        for ref, t, version in zip(self._kept, tensors, self._versions, strict=True):
            if ref is not None and (t is None or t._version != version):
                return None
        return tensors

    def end(self) -> None:
        """Withdraws the offer."""
        self._kept, self.held = None, ()


def itself(kept: Tensor) -> Tensor:
    """The ``rebuild`` function for a saved copy of the input in another dtype."""
    return kept


class _Open(threading.local):
    def __init__(self) -> None:
        #: Offers that hold strong references.
        self.offers: list[weakref.ref[Offer]] = []


_open = _Open()
#: Offers by result. Not thread-local: a region may be recomputed in another thread.
_offers: Any = WeakTensorKeyDictionary()


def current_hooks() -> Any:
    """The innermost saved-tensor hooks of this thread, represented by the pack hook; None for none."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if top is None else top[0]


def _end_others(hooks: Any) -> None:
    """Withdraws the offers that were made under other hooks and hold strong references."""
    if not _open.offers:
        return
    still = []
    for ref in _open.offers:
        held = ref()
        if held is None or held.tensors() is None:
            continue
        if held.hooks is hooks:
            still.append(ref)
        else:
            held.end()
    _open.offers = still


def offer(
    result: Tensor,
    kept: Sequence[Tensor | None],
    rebuild: Rebuild,
    takers: int,
    *,
    differentiable: bool = False,
    activation: str | None = None,
    weak: bool = False,
    grouped: bool = False,
) -> None:
    """Offers what a producer saves to the linear layers that are called with its result.

    Args:
        result: The very tensor that the producer returns.
        kept: Tensors that it saves for backward, or parameters.
        rebuild: Function that recomputes the result from ``kept``, without a graph.
        takers: Number of linear layers expected to take it.
        differentiable: Whether gradients flow through ``kept``, see :class:`Offer`.
        activation: Name of the activation, see :class:`Offer`.
        weak: Whether ``kept`` is not kept alive, see :class:`Offer`.
        grouped: Whether ``rebuild`` brings tensors back from groups, see :class:`Offer`.
    """
    if is_compiling():
        if takers and not _is_tracing_a_region():
            kept = tuple(kept)
            version = _traced_version("result")
            traced = TracedOffer(kept, rebuild, version, takers, differentiable, activation, grouped)
            result._lomem_offer = traced  # type: ignore[attr-defined]
        return
    hooks = current_hooks()
    _end_others(hooks)
    if takers == 0:
        return
    options: Any = {"differentiable": differentiable, "activation": activation, "weak": weak, "grouped": grouped}
    made = Offer(kept, rebuild, result._version, hooks, takers, **options)
    _offers[result] = made
    if hooks is not None and not weak:
        _open.offers.append(weakref.ref(made))


def attributed(result: Tensor) -> Tensor:
    """The result of a custom function, as a tensor that may be offered: a compiler gives attributes to no other."""
    return result.view_as(result) if is_compiling() else result


def offer_itself(result: Tensor) -> None:
    """Notes that a producer saves its result. Linear layers gain nothing by that, but cheap ops may pass it on."""
    if not is_compiling():
        _offers[result] = _of_itself(result, current_hooks())


def _of_itself(result: Tensor, hooks: Any, *, weak: bool = False) -> Offer:
    # Without a reference to the result, which the table must not keep alive.
    return Offer((), itself, result._version, hooks, 0, differentiable=True, weak=weak)


def hold(result: Tensor, tensors: Sequence[Tensor]) -> None:
    """Keeps tensors of an offer alive with the result, if nobody else is sure to."""
    made: Offer | None = None if is_compiling() else _offers.get(result)
    if made is not None:
        made.held = tuple(tensors)


#: Whether pack hooks share what is saved, by hook.
_sharing: Any = weakref.WeakKeyDictionary()


def _share(hooks: Any) -> bool:
    """Whether what is saved twice under saved-tensor hooks is stored once.

    Hooks that offload or compress make a copy each time, so that sharing a tensor gains nothing. Those of checkpointing
    store nothing. Others are tried with an empty tensor.
    """
    if hooks is None or getattr(hooks, "__module__", "") == "torch.utils.checkpoint":
        return True
    name = getattr(hooks, "__qualname__", "").lower()
    if "save_on_cpu" in name or "offload" in name:
        return False
    try:
        known: bool | None = _sharing.get(hooks)
    except TypeError:  # an object without weak references
        return _shares(hooks)
    if known is None:
        known = _sharing[hooks] = _shares(hooks)
    return known


def _shares(pack: Any) -> bool:
    with torch.no_grad():
        probe = torch.empty(0)
        try:
            leaves = tree_leaves(pack(probe))
        except Exception:  # it expects something else
            return False
    storages = [t.untyped_storage()._cdata for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided]
    return probe.untyped_storage()._cdata in storages


def in_a_region() -> bool:
    """Whether a compiler is tracing a checkpointed region, or another part of the program with a graph of its own.

    No mode can be entered there. In a checkpointed region there is also no need: nothing in it is saved.
    """
    return is_compiling() and _is_tracing_a_region()


def _is_tracing_a_region() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except AttributeError:  # in another version of torch
        return False


# As torch.compiler.assume_constant_result does, which imports the compiler: the function runs while one traces.
_is_tracing_a_region._dynamo_marked_constant = True  # type: ignore[attr-defined]


def peek(result: Tensor, *, copies: bool = False) -> tuple[tuple[Tensor | None, ...], Offer | TracedOffer] | None:
    """The tensors that an op on an offered result may save in place of the result, and the offer; None for none.

    A norm's copies and normalized inputs, which a linear layer takes, are only passed on to copies for linear layers:
    other ops would be computed with another rounding, and would have no second derivative. Nor are copies of tensors
    that nobody offered: an op that saves its own copy must not save the original, which may be changed in place. What
    comes back from groups is rounded anyway, and is passed on to all. Under a compiler, nothing else is passed on.

    Args:
        result: The result.
        copies: Whether the op is a cast or dropout, whose results linear layers make again. Then a result that nobody
            offers is offered itself.
    """
    if is_compiling():
        return _peek_traced(result)
    hooks = current_hooks()
    made: Offer | None = _offers.get(result)
    if made is not None and (made.version != result._version or made.hooks is not hooks):
        made = None
    if made is not None and not (copies or made.grouped or (made.differentiable and not made.weak)):
        made = None
    tensors = None if made is None else made.tensors()
    if copies and tensors is None and is_whole(result):
        made, tensors = _of_itself(result, hooks, weak=True), ()
    # Several copies of what is in groups are still smaller than the result.
    if made is None or tensors is None or not (made.grouped or _share(hooks)):
        return None
    return tensors or (result,), made


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that its storage holds. Saving a part of a larger one would keep all of it alive."""
    return tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()


def is_offered(result: Tensor) -> bool:
    """Whether the producer of a tensor has offered it."""
    return not is_compiling() and result in _offers


def offered(result: Any) -> tuple[Tensor, ...]:
    """The tensors that a result's producer offers, for reports."""
    made: Offer | None = _offers.get(result) if isinstance(result, Tensor) else None
    tensors = None if made is None else made.tensors()
    return () if tensors is None else tuple(t for t in tensors if t is not None)


class TracedOffer:
    """An offer under a compiler, whose code is traced: without weak references and versions of real tensors."""

    weak = False

    def __init__(
        self,
        kept: tuple[Tensor | None, ...],
        rebuild: Rebuild,
        version: int,
        takers: int,
        differentiable: bool,
        activation: str | None,
        grouped: bool,
    ) -> None:
        self.kept, self.rebuild, self.version, self.takers = kept, rebuild, version, takers
        self.differentiable, self.activation, self.grouped = differentiable, activation, grouped


def _traced_version(local: str) -> int:
    """Version of a local variable of the function that calls this, while a compiler traces that; -1 if unknown.

    Unknown is that of a graph's input: how often it has been changed since another graph returned it.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.current_tx
        variable: Any = frame.symbolic_locals[local].realize()
        node = variable.proxy.node
        return -1 if node.op == "placeholder" else int(node.meta["example_value"]._version)
    except (AttributeError, KeyError, RuntimeError):  # in another version of torch
        return -1


_traced_version._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _peek_traced(result: Tensor) -> tuple[tuple[Tensor | None, ...], TracedOffer] | None:
    version = _traced_version("result")
    made: TracedOffer | None = getattr(result, "_lomem_offer", None) if version >= 0 else None
    if made is None or not made.grouped or made.version != version:
        return None
    return (made.kept, made) if made.kept else None


def _take_traced(input: Tensor) -> tuple[tuple[Tensor | None, ...], TracedOffer] | None:
    version = _traced_version("input")
    made: TracedOffer | None = getattr(input, "_lomem_offer", None) if version >= 0 else None
    if made is None or made.version != version:
        return None
    kept = made.kept
    made.takers -= 1
    if made.takers == 0:
        made.kept = ()  # so that a result that leaves the graph takes nothing along
    return (kept, made) if kept else None


def take(input: Tensor) -> tuple[tuple[Tensor | None, ...], Offer | TracedOffer] | None:
    """The tensors that a linear layer may save instead of its input, and the offer; None for none.

    Each linear layer must call this exactly once, even if it does not use the result.
    """
    if is_compiling():
        return None if _is_tracing_a_region() else _take_traced(input)
    hooks = current_hooks()
    _end_others(hooks)
    made: Offer | None = _offers.get(input)
    if made is None:
        # Tensor parallelism wraps what a layer is called with.
        wrapped = wrapped_by(input)
        made = None if wrapped is None else _offers.get(wrapped)
        input = input if wrapped is None else wrapped  # noqa: A001
    if made is None or made.hooks is not hooks or made.version != input._version:
        return None
    tensors = made.tensors()
    made.takers -= 1
    if made.takers == 0 and hooks is not None:
        made.end()
    return (tensors, made) if tensors else None


def recomputed(function: Rebuild, *tensors: Tensor) -> Tensor:
    """Calls a function and has a compiler recompute its result in the backward pass, from the same tensors.

    A compiler recomputes cheap ops by itself, but not those whose result a product needs in the backward pass. Nothing
    has to be handed over then: the linear layer saves its input, and the compiler replaces it.
    """
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


#: Whether the compiler fails if two regions read the same number from one place, and sizes are dynamic. Mended in 2.15.
_NUMBERS_BELONG_TO_REGIONS = torch.__version__ < "2.15"


def can_recompute_python() -> bool:
    """Whether a compiler recomputes a function of Python code too, which may read numbers, rather than ops alone."""
    config = torch._dynamo.config
    return not _NUMBERS_BELONG_TO_REGIONS or config.assume_static_by_default or config.specialize_float


def _rows(tensor: Tensor) -> Tensor:
    # Not flatten, which cannot be batched.
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _in_the_backward_pass(kept: Tensor, grad: Tensor) -> Tensor:
    """The same tensor, as a function of the gradient too.

    What depends on saved tensors alone, a compiler may compute in the forward pass, and save that.
    """
    zero = (grad.flatten()[:1] > math.inf).any()  # of NaN and of no elements too
    return kept + zero.to(kept.dtype)


def _linear_backward(ctx: Any, grad: Tensor) -> Any:
    weight, *kept = ctx.saved_tensors
    grad_input = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = (grad @ weight.to(ctx.dtype)).to(ctx.input_dtype)
    rows = _rows(grad)
    if ctx.needs_input_grad[1]:
        # (Codes are smaller than what is rebuilt from them, which is therefore not saved.)
        if is_compiling() and ctx.rebuild is not itself and kept[0].is_floating_point():
            kept[0] = _in_the_backward_pass(kept[0], rows)
        grad_weight = (rows.T @ _rows(ctx.rebuild(*kept).to(ctx.dtype))).to(ctx.weight_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_input, grad_weight, grad_bias, None, None, *(None for _ in kept)


class _LinearOfOffered(torch.autograd.Function):
    # Result and gradients are those of the layer. It saves kept, the producer's tensors, instead of the input.

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rebuild: Rebuild,
        *kept: Tensor | None,
    ) -> Tensor:
        # As torch does: a weight that is not needed may be changed in place before the backward pass.
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.rebuild, ctx.input_dtype, ctx.dtype, ctx.weight_dtype = rebuild, input.dtype, dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # If the producer saved a copy in the layer's dtype, the input need not be cast again.
        copy = kept[0] if rebuild is itself else None
        cast = copy if copy is not None and copy.dtype == dtype else input.to(dtype)
        result = F.linear(cast, weight.to(dtype), None if bias is None else bias.to(dtype))
        # F.linear returns a view of a 2D product, and views made in a custom function cannot be changed in place
        # later. `.data` is not a view, and becomes the only tensor on the storage.
        return result.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _linear_backward(ctx, grad)


class _LinearOfConstants(_LinearOfOffered):
    # For what is no function of its graph.

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _linear_backward(ctx, grad)


def linear_of_offered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kept: Sequence[Tensor | None],
    rebuild: Rebuild,
    *,
    differentiable: bool = False,
) -> Tensor:
    """A linear layer that saves what its producer saves, instead of its input.

    The result equals the layer's, bit for bit; the weight gradient is computed from the recomputed input.

    Args:
        input: Input of at least two dimensions.
        weight: Weight of shape (out, in).
        bias: Bias of shape (out,), or None.
        dtype: Dtype in which the layer computes.
        kept: Tensors returned by :func:`take`.
        rebuild: Function of the offer returned by :func:`take`.
        differentiable: Whether gradients flow through ``kept``. Otherwise a second derivative raises.
    """
    function = _LinearOfOffered if differentiable else _LinearOfConstants
    return function.apply(input, weight, bias, dtype, rebuild, *kept)  # type: ignore[no-any-return]
