"""How near the gradients of step functions are to the exact ones."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._trace.batch import as_batch
from .._trace.state import module_state, preserved, restore_module
from ..memory._report import Report, Section
from ..steps import StepFunction
from ._fit import CRITERIA, fit, measured
from ._functions import Function
from ._layers import Loss, activation_layers, derivative, scalar, watch

__all__ = ["Fidelity", "FidelityReport", "report"]


@dataclass(frozen=True)
class Fidelity:
    """An approximate gradient a against the exact one e, element by element.

    Attributes:
        cosine: Cosine of the angle between them.
        error: Norm of a - e relative to that of e. Its square is the sum of those of the two below.
        bias: Mean of a - e, relative to the root mean square of e: what remains in the mean over many elements.
        deviation: Standard deviation of a - e, relative to the same: what averages out.
    """

    cosine: float
    error: float
    bias: float
    deviation: float


class _Sums:
    """Sums over elements, from which a Fidelity follows; any number of elements in bounded memory."""

    def __init__(self) -> None:
        self.weight = self.exact = self.approximate = self.product = self.difference = 0.0

    def add(self, approximate: Tensor, exact: Tensor, weights: Tensor | None = None) -> None:
        a, e = approximate.detach().double().reshape(-1), exact.detach().double().reshape(-1)
        w = torch.ones_like(a) if weights is None else weights
        self.weight += float(w.sum())
        self.exact += float((w * e * e).sum())
        self.approximate += float((w * a * a).sum())
        self.product += float((w * a * e).sum())
        self.difference += float((w * (a - e)).sum())

    def fidelity(self) -> Fidelity:
        if self.exact == 0:
            nan = float("nan")
            return Fidelity(nan, nan, nan, nan)
        squared = max(0.0, self.approximate - 2 * self.product + self.exact) / self.exact
        bias = self.difference / self.weight / (self.exact / self.weight) ** 0.5
        return Fidelity(
            self.product / (self.exact * self.approximate) ** 0.5 if self.approximate else 0.0,
            squared**0.5,
            bias,
            max(0.0, squared - bias**2) ** 0.5,
        )


@dataclass(frozen=True)
class FidelityReport(Report):
    """Gradients of step functions against the exact ones.

    Attributes:
        subject: The function or the model.
        under: What the means are over.
        rows: By what is compared: step functions of a function, layers of a model. In that of a model the last one is
            ``"all parameters"``, the gradient that an optimizer gets.
    """

    subject: str
    under: str
    rows: dict[str, Fidelity]
    _curves: dict[str, StepFunction] = field(default_factory=dict, repr=False, compare=False)
    _function: Function | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as what JSON holds."""
        result = super().to_dict()
        return {name: value for name, value in result.items() if not name.startswith("_")}

    def sections(self) -> list[Section]:
        """One table."""
        rows = [
            (name, f"{row.cosine:.5f}", f"{row.error:.4f}", f"{row.bias:+.5f}", f"{row.deviation:.4f}")
            for name, row in self.rows.items()
        ]
        title = f"gradient of {self.subject} against the exact one, {self.under}"
        return [Section(title, ("", "cosine", "relative error", "bias", "deviation"), rows)]

    def categories(self) -> dict[str, int]:
        """None: there are no bytes to draw."""
        return {}

    def plot(self, path: str | Path) -> None:
        """Draws a function with its approximations: itself, its derivative with the steps, and the errors.

        Of a model: the relative error of each layer, bias and deviation apart.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"plot() needs the package {error.name}: pip install 'lomem[fit]'") from error
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        if self._function is None:
            _draw_layers(figure, self.rows)
        else:
            _draw_function(figure, self.subject, self._function, self._curves)
        figure.savefig(path, dpi=150)


def _draw_layers(figure: Any, rows: dict[str, Fidelity]) -> None:
    axes = figure.subplots()
    places = np.arange(len(rows))
    axes.bar(places - 0.2, [abs(row.bias) for row in rows.values()], 0.4, label="|bias|", color="#D55E00")
    axes.bar(places + 0.2, [row.deviation for row in rows.values()], 0.4, label="deviation", color="#0072B2")
    axes.set_xticks(places, list(rows), rotation=45, ha="right", fontsize=7)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel("relative to the root mean square")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


#: Okabe and Ito's colours, which colour-blind readers tell apart.
_COLORS = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")


def _draw_function(figure: Any, name: str, function: Function, curves: dict[str, StepFunction]) -> None:
    ends = max(4.0, *(1.15 * abs(c) for steps in curves.values() for c in steps.boundaries))
    x = np.linspace(-ends, ends, 4001)
    h, slope = function.asymptote(x) + function.rest(x), function.slope(x)
    left, middle, right = figure.subplots(1, 3)
    left.plot(x, h, color="black", linewidth=1.2, label="exact")
    left.set_title(name, fontsize=11)
    middle.plot(x, slope, color="black", linewidth=1.2)
    middle.set_title(f"derivative of {name}, and steps", fontsize=11)
    right.axhline(0, color="black", linewidth=1.2)
    right.set_title(f"{name} less the steps' primitive", fontsize=11)
    for (label, steps), color in zip(curves.items(), itertools.cycle(_COLORS)):
        middle.plot(x, steps.derivative(x), color=color, linewidth=1.2, label=label)
        # From the same value at the left end.
        primitive = steps.primitive(x)
        right.plot(x, h - primitive - (h[0] - primitive[0]), color=color, linewidth=1.2)
    for axes in (left, middle, right):
        axes.set_xlim(-ends, ends)
        axes.set_xlabel("x")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(5, 1 + len(curves)), frameon=False)


def report(
    target: str | Callable[[Tensor], Tensor] | nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    steps: Mapping[str, StepFunction] | None = None,
    density: Any = "gaussian",
    loss: Loss | None = None,
) -> FidelityReport:
    """How near approximate gradients are to the exact ones: cosine, relative error, bias and deviation.

    Example:
        >>> print(lomem.fit.report("gelu"))
        >>> print(lomem.fit.report(model, batches, loss=lambda output: output.loss))

    Args:
        target: The name of a function or a callable, as of :func:`fit`, of which the best step functions on the line
            are taken, of both criteria and 1 to 4, 6 and 8 bits; or a model with activations of :mod:`lomem.nn`, which
            is run.
        batches: Of a model, an iterable; see :func:`calibrate`.
        steps: Of a function: others to compare in place of those, by names.
        density: Of a function: what the means are over, as of :func:`fit`; by default the standard normal one.
        loss: Of a model: makes a scalar of its output. Required.

    Returns:
        Of a function: a row for each step function; the gradient that multiplies the derivative is 1. Of a model: a row
        for each layer, of ``grad_output * level`` against ``grad_output * derivative``, with the gradient that comes to
        the layer; and ``"all parameters"``, the gradient of all parameters against that of the exact activations, with
        the same random numbers.

    Raises:
        TypeError, ValueError: If an argument is not as described.
    """
    if isinstance(target, nn.Module):
        if steps is not None:
            raise ValueError("lomem.fit.report: steps are given with a model, expected None: its layers have their own")
        return _of_model(target, batches, loss)
    if batches is not None:
        raise ValueError("lomem.fit.report: batches are given with a function, expected none, or a model")
    return _of_function(target, _best(target) if steps is None else steps, density)


def _best(target: Any) -> dict[str, StepFunction]:
    found = {}
    for criterion in CRITERIA:
        for bits in (1, 2, 3, 4, 6, 8):
            try:
                step = fit(target, bits, criterion=criterion).step  # type: ignore[arg-type]
            except ValueError:
                if bits != 1:
                    raise
                continue  # parallel asymptotes, which one bit cannot match
            found[f"{criterion}, {bits} bit{'s' * (bits > 1)}"] = step
    return found


def _of_function(target: Any, steps: Mapping[str, StepFunction], density: Any) -> FidelityReport:
    function, x, weights = measured(target, density)
    exact = torch.from_numpy(function.slope(x))
    rows = {}
    for label, step in steps.items():
        sums = _Sums()
        sums.add(torch.from_numpy(step.derivative(x)), exact, torch.from_numpy(weights))
        rows[label] = sums.fidelity()
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    return FidelityReport(name, f"mean over {density!r:.40}", rows, dict(steps), function)


def _of_model(model: nn.Module, batches: Any, loss: Loss | None) -> FidelityReport:
    name = "lomem.fit.report"
    if loss is None:
        raise ValueError(f"{name}: loss is None, expected a function that makes a scalar of the model's output")
    if batches is None:
        raise ValueError(f"{name}: batches is None, expected an iterable of batches")
    layers = activation_layers(name, model)
    batches = list(batches)
    sums = {layer: _Sums() for layer in layers}

    def seen(layer: str, x: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        steps, x64, g = layers[layer].step_function(), x.double(), grad.double()
        # In the arithmetic of the layer: float32 roundings of boundaries are below what is told here.
        sums[layer].add(g * steps.derivative(x64), g * derivative(layers[layer], x64))

    count = watch(name, model, layers, batches, loss, seen)
    rows = {layer: total.fidelity() for layer, total in sums.items()}
    rows["all parameters"] = _of_parameters(name, model, layers, batches, loss)
    return FidelityReport(f"a {type(model).__name__}", f"{count} batches", rows)


def _of_parameters(name: str, model: nn.Module, layers: Any, batches: list[Any], loss: Loss) -> Fidelity:
    def gradients() -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for batch in batches:
            _add_gradients(name, model, batch, loss, total)
        return total

    approximate = gradients()
    with contextlib.ExitStack() as exact_layers:
        for layer in layers.values():
            exact_layers.callback(restore_module, layer, *module_state(layer))
            layer.forward = layer.exact
        exact = gradients()
    sums = _Sums()
    for parameter, e in exact.items():
        sums.add(approximate.get(parameter, torch.zeros_like(e)), e)
    return sums.fidelity()


def _add_gradients(name: str, model: nn.Module, batch: Any, loss: Loss, total: dict[str, Tensor]) -> None:
    """Adds the parameters' gradients on a batch, in float64, and leaves the model as it was."""
    given = as_batch(name, "batch", batch).map(Tensor.detach)
    with preserved(model), torch.enable_grad():
        torch.manual_seed(0)  # the same dropout for both
        scalar(name, loss(given.call(model))).backward()
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                so_far = total.get(parameter)
                grad = value.grad.double()
                total[parameter] = grad if so_far is None else so_far + grad
