"""What a producer hands to the linear layers behind it, so that they need not keep their input.

A linear layer keeps its input for its weight's gradient. Where that input is a cheap function of what its producer
keeps anyway (a norm's copy in another dtype or its normalized input, an activation's input, gate and up of a gated
unit), the layer keeps those instead and makes its input of them again. The producer *offers* them, the linear layer
*takes* them.

An offer belongs to the producer's result, the tensor, and is found in a weak table: a tensor and its Python object live
and end together, whoever else holds the tensor, and a tensor without attributes is pickled as any other. Other carriers
fail: an autograd node outlives every checkpointed region, and a compiler cannot look at it; one op for producer and
layer together would have to know the layer when the producer runs, and there may be several, or none; a tensor subclass
is seen by everybody.

Three rules keep it right:

- **Boundaries.** Saved-tensor hooks decide where saved tensors go: to the CPU, or, under checkpointing, nowhere. What
  was offered under one pair of hooks is not taken under another. Each checkpointed region has hooks of its own, in the
  first pass as when it is computed again, so both passes take, and save, the same.
- **Lifetimes.** Without hooks autograd keeps the producer's tensors themselves, and an offer refers to them weakly.
  With hooks it may keep something else, or nothing; then an offer holds them itself, until the last of the linear
  layers that the example run has seen took them, or until something converted runs under other hooks: the region is
  over.
- **Versions.** A result that was changed in place since is not what was offered.

Under a compiler nothing is offered yet. It follows attributes of tensors within a graph, and the rebuilding stays in
the backward graph if the producer is an op of its own (tests/python/test_handover.py does both); but it cannot read a
tensor's version, so that a change in place would go unseen.
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

#: Makes a linear layer's input of what is kept for it.
Rebuild: TypeAlias = Callable[..., Tensor]


class Offer:
    """What a producer keeps, and how its result is made of it.

    Attributes:
        rebuild: Makes the result again of what is kept.
        version: Of the result when it was offered.
        hooks: The innermost saved-tensor hooks then; None for none.
        takers: Linear layers still to come; only counted under hooks.
    """

    def __init__(self, kept: Sequence[Tensor | None], rebuild: Rebuild, version: int, hooks: Any, takers: int) -> None:
        self.rebuild, self.version, self.hooks, self.takers = rebuild, version, hooks, takers
        self._weak = hooks is None
        self._kept: tuple[Any, ...] | None
        self._kept = tuple(None if t is None else TensorWeakRef(t) for t in kept) if self._weak else tuple(kept)

    def tensors(self) -> tuple[Tensor | None, ...] | None:
        """What is kept; None where it is no more."""
        if self._kept is None or not self._weak:
            return self._kept
        tensors = tuple(None if ref is None else ref() for ref in self._kept)
        gone = any(ref is not None and t is None for ref, t in zip(self._kept, tensors, strict=True))
        return None if gone else tensors

    def end(self) -> None:
        """Nobody takes it any more."""
        self._kept = None


def itself(kept: Tensor) -> Tensor:
    """What a layer's input is made of where a copy of it in another dtype is kept."""
    return kept


class _Open(threading.local):
    def __init__(self) -> None:
        #: Offers that hold what they offer.
        self.offers: list[weakref.ref[Offer]] = []


_open = _Open()
#: By result. Not of a thread: a region may be computed again in another one.
_offers: Any = WeakTensorKeyDictionary()


def current_hooks() -> Any:
    """The innermost saved-tensor hooks of this thread, the packing one for both; None for none."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if top is None else top[0]


def _end_others(hooks: Any) -> None:
    """Ends the offers that were made under other hooks and hold what they offer."""
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
    """Offers what a producer keeps to the linear layers that are called with its result.

    Args:
        result: The very tensor that the producer returns.
        kept: Tensors that it keeps for its backward pass, or parameters.
        rebuild: Makes the result, without a graph, of ``kept``.
        takers: Number of linear layers that are expected to take it.
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
    """What a linear layer may keep in place of its input, and what makes the input of that; None for nothing.

    To be called once by each linear layer, whatever it does with the answer.
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
    # Result and gradients are those of the layer; kept is what the producer keeps, in place of the input.

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
        # What the producer keeps in the layer's own dtype may be what the input would be cast to.
        copy = kept[0] if rebuild is itself else None
        cast = copy if copy is not None and copy.dtype == dtype else input.to(dtype)
        result = F.linear(cast, weight.to(dtype), None if bias is None else bias.to(dtype))
        # F.linear returns a view of a matrix product of rows, and views that are made here cannot be changed in place
        # later. This tensor is no view, and the only one left of the storage.
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
    """A linear layer that keeps what its producer keeps, in place of its input.

    Its result is the layer's, bit for bit; the weight's gradient is computed of the input, made again.

    Args:
        input: Of at least two dimensions.
        weight: Of shape (out, in).
        bias: Of shape (out,), or None.
        dtype: In which the layer computes.
        kept: What :func:`take` gave.
        rebuild: The same.
    """
    return _LinearOfOffered.apply(input, weight, bias, dtype, rebuild, *kept)  # type: ignore[no-any-return]
