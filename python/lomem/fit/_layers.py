"""The activation layers of a model, and what flows through them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._trace.batch import as_batch
from .._trace.state import preserved
from ..memory._run import check_model, tensors_in
from ..nn import FewBitActivation, StepActivation

Layer: TypeAlias = FewBitActivation | StepActivation
Loss: TypeAlias = Callable[[Any], Tensor]
#: Called with the input of a call of a layer and, where there is a loss, with the gradient of its output.
Seen: TypeAlias = Callable[[str, Tensor, Tensor | None], None]


def activation_layers(function: str, model: Any) -> dict[str, Layer]:
    """Those with step functions, by their names in the model."""
    check_model(function, model)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (FewBitActivation, StepActivation))
    }
    if not layers:
        raise ValueError(
            f"{function}: model, a {type(model).__name__}, has no activation of lomem.nn with a step function, "
            "expected at least one (lomem.map_module puts them into a model)"
        )
    return layers


def watch(
    function: str, model: nn.Module, layers: dict[str, Layer], batches: Iterable[Any], loss: Loss | None, seen: Seen
) -> int:
    """Runs the model on each batch and tells `seen` of each call of a layer. Returns the number of batches.

    The model is left as it was: buffers, gradients, random numbers, mode.
    """
    if isinstance(batches, (Tensor, dict, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"{function}: batches is of type {type(batches).__name__}, expected an iterable of batches")
    count = 0
    with preserved(model), _hooked(layers, loss is not None, seen):
        for batch in batches:
            given = as_batch(function, "batch", batch).map(Tensor.detach)
            count += 1
            with torch.set_grad_enabled(loss is not None):
                output = given.call(model)
                if loss is not None:
                    scalar(function, loss(output)).backward()
                    model.zero_grad(set_to_none=True)
    if count == 0:
        raise ValueError(f"{function}: batches is empty, expected at least one batch")
    return count


def scalar(function: str, value: Any) -> Tensor:
    """What a loss returned, checked."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{function}: loss returned {got}, expected a tensor of one element that requires gradients")
    return value


@contextlib.contextmanager
def _hooked(layers: dict[str, Layer], with_gradient: bool, seen: Seen) -> Iterator[None]:
    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = tensors_in((args, kwargs))[0].detach()
            # The model may overwrite it before it is looked at: lomem's layers do not keep it.
            inputs.append(x.clone())

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = inputs.pop()
            if not with_gradient:
                seen(name, x, None)
            elif output.requires_grad:
                output.register_hook(lambda grad: seen(name, x, grad.detach()))

        return before, after

    handles = []
    try:
        for name, layer in layers.items():
            before, after = hooks(name)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            # (Before hooks of others, which may return something else.)
            handles.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def derivative(layer: Layer, x: Tensor) -> Tensor:
    """h'(x) of what the layer computes, in float64."""
    leaf = x.detach().to(torch.float64).requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(layer.exact(leaf).sum(), leaf)
    return result
