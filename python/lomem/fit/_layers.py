"""The activation layers of a model, and their inputs and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._trace.batch import as_batch
from .._trace.state import preserved
from ..conversion.fidelity import EXPECTED, undisturbed, wrong_scalar
from ..memory._run import check_model, tensors_in
from ..nn.activations import WithSteps

Loss: TypeAlias = Callable[[Any], Tensor]
#: Called for each call of a layer with its name, its input and, if there is a loss, the gradient of its output.
Seen: TypeAlias = Callable[[str, Tensor, Tensor | None], None]


def activation_layers(function: str, model: Any) -> dict[str, WithSteps]:
    """The activation layers with step functions, by their names in the model."""
    layers = step_layers(function, model)
    if not layers:
        raise ValueError(
            f"{function}: model, a {type(model).__name__}, has no activation of lomem.nn with a step function, "
            "expected at least one (lomem.map_module can insert them)"
        )
    return layers


def step_layers(function: str, model: Any) -> dict[str, WithSteps]:
    """The same of a model that may have none."""
    check_model(function, model)
    return {name: module for name, module in model.named_modules() if isinstance(module, WithSteps)}


def as_list(function: str, batches: Any) -> list[Any]:
    """The batches, to be run several times."""
    _check_iterable(function, batches)
    batches = list(batches)
    if not batches:
        raise ValueError(f"{function}: {_EMPTY}")
    return batches


_EMPTY = "batches is empty, expected at least one batch"


def _check_iterable(function: str, batches: Any) -> None:
    if isinstance(batches, (Tensor, dict, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"{function}: batches is of type {type(batches).__name__}, expected an iterable of batches")


def watch(
    function: str, model: nn.Module, layers: dict[str, WithSteps], batches: Iterable[Any], loss: Loss | None, seen: Seen
) -> int:
    """Runs the model on each batch and calls `seen` for each call of a layer. Returns the number of batches.

    Buffers, gradients, random number generators and mode of the model are restored afterwards.
    """
    _check_iterable(function, batches)
    count = 0
    with preserved(model), undisturbed(model, loss), _hooked(layers, loss is not None, seen):
        for batch in batches:
            given = as_batch(function, "batch", batch).map(own)
            count += 1
            with torch.set_grad_enabled(loss is not None):
                output = given.call(model)
                if loss is not None:
                    scalar(function, loss(output)).backward()
                    model.zero_grad(set_to_none=True)
    if count == 0:
        raise ValueError(f"{function}: {_EMPTY}")
    return count


def own(tensor: Tensor) -> Tensor:
    """A copy without a graph. The model may write to it, and the next run must not see that."""
    return tensor.detach().clone()


def scalar(function: str, value: Any) -> Tensor:
    """Checks the value that a loss returned."""
    wrong = wrong_scalar(value)
    if wrong is not None:
        raise ValueError(f"{function}: loss returned {wrong}, {EXPECTED}")
    return value  # type: ignore[no-any-return]


@contextlib.contextmanager
def _hooked(layers: dict[str, WithSteps], with_gradient: bool, seen: Seen) -> Iterator[None]:
    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        inputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = tensors_in((args, kwargs))[0].detach()
            # The model may overwrite the input before the hook runs, since lomem's layers do not save it.
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
            # Before other forward hooks, which may replace the output.
            handles.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def derivative(layer: WithSteps, x: Tensor) -> Tensor:
    """Exact derivative h'(x) of the layer's activation, in float64."""
    leaf = x.detach().to(torch.float64).requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(layer.exact(leaf).sum(), leaf)
    return result


def draws_codes(layer: WithSteps) -> bool:
    """Whether a layer draws its codes at random, and has no step function."""
    return getattr(layer, "rounding", "nearest") == "stochastic"


def drawn_gradient(layer: WithSteps, x: Tensor, grad: Tensor) -> Tensor:
    """A gradient of such a layer for a gradient of its output, both float64."""
    leaf = x.detach().to(torch.float64).requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(layer.forward(leaf.clone()), leaf, grad)
    return result
