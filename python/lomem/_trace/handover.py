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
  of the linear layers seen in the example run takes them, or until a converted module runs under other hooks, which
  means that the region is over.
- **Versions.** An offer is void once the result has been changed in place.

Under a compiler nothing is offered yet. Compilers follow attributes of tensors within a graph, and the rebuilding stays
in the backward graph if the producer is a custom op (tests/python/test_handover.py does both). But they cannot read a
tensor's version, so in-place changes would go unnoticed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

__all__ = ["Rebuild", "current_hooks", "itself", "linear_of_offered", "offer", "offered", "take"]

#: Function that recomputes a linear layer's input from the tensors saved in its place.
Rebuild: TypeAlias = Callable[..., Tensor]


class Offer:
    """The tensors that a producer saves, and how to recompute its result from them.

    Attributes:
        rebuild: Function that recomputes the result from the saved tensors.
        version: Version of the result when the offer was made.
        hooks: Innermost saved-tensor hooks at that time; None for none.
        takers: Number of linear layers still expected to take it; only used under hooks.
    """

    def __init__(self, kept: Sequence[Tensor | None], rebuild: Rebuild, version: int, hooks: Any, takers: int) -> None:
        self.rebuild, self.version, self.hooks, self.takers = rebuild, version, hooks, takers
        self._weak = hooks is None
        self._kept: tuple[Any, ...] | None
        self._kept = tuple(None if t is None else TensorWeakRef(t) for t in kept) if self._weak else tuple(kept)

    def tensors(self) -> tuple[Tensor | None, ...] | None:
        """The offered tensors; None if they no longer exist."""
        if self._kept is None or not self._weak:
            return self._kept
        tensors = tuple(None if ref is None else ref() for ref in self._kept)
        gone = any(ref is not None and t is None for ref, t in zip(self._kept, tensors, strict=True))
        return None if gone else tensors

    def end(self) -> None:
        """Withdraws the offer."""
        self._kept = None


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


def offer(result: Tensor, kept: Sequence[Tensor | None], rebuild: Rebuild, takers: int) -> None:
    """Offers what a producer saves to the linear layers that are called with its result.

    Args:
        result: The very tensor that the producer returns.
        kept: Tensors that it saves for backward, or parameters.
        rebuild: Function that recomputes the result from ``kept``, without a graph.
        takers: Number of linear layers expected to take it.
    """
    if is_compiling():
        return
    hooks = current_hooks()
    _end_others(hooks)
    if takers == 0:
        return
    made = Offer(kept, rebuild, result._version, hooks, takers)
    _offers[result] = made
    if hooks is not None:
        _open.offers.append(weakref.ref(made))


def offered(result: Any) -> tuple[Tensor, ...]:
    """The tensors that a result's producer offers, for reports."""
    made: Offer | None = _offers.get(result) if isinstance(result, Tensor) else None
    tensors = None if made is None else made.tensors()
    return () if tensors is None else tuple(t for t in tensors if t is not None)


def take(input: Tensor) -> tuple[tuple[Tensor | None, ...], Rebuild] | None:
    """The tensors that a linear layer may save instead of its input, and how to recompute the input; None for none.

    Each linear layer must call this exactly once, even if it does not use the result.
    """
    if is_compiling():
        return None
    hooks = current_hooks()
    _end_others(hooks)
    made: Offer | None = _offers.get(input)
    if made is None or made.hooks is not hooks or made.version != input._version:
        return None
    tensors = made.tensors()
    made.takers -= 1
    if made.takers == 0 and hooks is not None:
        made.end()
    return None if tensors is None else (tensors, made.rebuild)


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
        ctx.save_for_backward(weight, *kept)
        ctx.rebuild, ctx.input_dtype, ctx.dtype = rebuild, input.dtype, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # If the producer saved a copy in the layer's dtype, the input need not be cast again.
        copy = kept[0] if rebuild is itself else None
        cast = copy if copy is not None and copy.dtype == dtype else input.to(dtype)
        result = F.linear(cast, weight.to(dtype), None if bias is None else bias.to(dtype))
        # F.linear returns a view of a 2D product, and views made in a custom function cannot be changed in place
        # later. `.data` is not a view, and becomes the only tensor on the storage.
        return result.data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad @ weight.to(ctx.dtype)).to(ctx.input_dtype)
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ ctx.rebuild(*kept).to(ctx.dtype).flatten(0, -2)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, *(None for _ in kept)


def linear_of_offered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kept: Sequence[Tensor | None],
    rebuild: Rebuild,
) -> Tensor:
    """A linear layer that saves what its producer saves, instead of its input.

    The result equals the layer's, bit for bit; the weight gradient is computed from the recomputed input.

    Args:
        input: Input of at least two dimensions.
        weight: Weight of shape (out, in).
        bias: Bias of shape (out,), or None.
        dtype: Dtype in which the layer computes.
        kept: Tensors returned by :func:`take`.
        rebuild: Function returned by :func:`take`.
    """
    return _LinearOfOffered.apply(input, weight, bias, dtype, rebuild, *kept)  # type: ignore[no-any-return]
