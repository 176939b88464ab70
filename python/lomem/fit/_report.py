"""Compares the gradients of step functions with the exact ones."""

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
    """Comparison of an approximate gradient a with the exact gradient e, element by element.

    Attributes:
        cosine: Cosine of the angle between a and e.
        error: Norm of a - e relative to the norm of e. ``error**2`` equals ``bias**2 + deviation**2``.
        bias: Mean of a - e relative to the root mean square of e; the part that does not average out.
        deviation: Standard deviation of a - e relative to the root mean square of e; the part that averages out.
    """

    cosine: float
    error: float
    bias: float
    deviation: float


class _Sums:
    """Accumulates the sums for a Fidelity, over any number of elements in constant memory."""

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
    """Comparison of the gradients of step functions with the exact ones.

    Attributes:
        subject: The function or the model.
        under: What the means are taken over.
        rows: Results by step function for a function, by layer for a model. For a model, the last row is
            ``"all parameters"``, the gradient that an optimizer receives.
    """

    subject: str
    under: str
    rows: dict[str, Fidelity]
    _curves: dict[str, StepFunction] = field(default_factory=dict, repr=False, compare=False)
    _function: Function | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON-compatible values."""
        result = super().to_dict()
        return {name: value for name, value in result.items() if not name.startswith("_")}

    def sections(self) -> list[Section]:
        """One table."""
        rows = [
            (name, f"{row.cosine:.5f}", f"{row.error:.4f}", f"{row.bias:+.5f}", f"{row.deviation:.4f}")
            for name, row in self.rows.items()
        ]
        title = f"gradient of {self.subject} compared with the exact gradient, {self.under}"
        return [Section(title, ("", "cosine", "relative error", "bias", "deviation"), rows)]

    def categories(self) -> dict[str, int]:
        """Empty: the report has no bytes to plot."""
        return {}

    def plot(self, path: str | Path) -> None:
        """Plots the comparison.

        For a function, the plot shows the function, its derivative with the step functions, and the errors of their
        integrals. For a model, it shows bias and deviation of each layer.

        Args:
            path: Path of the image file; the suffix determines the format.

        Raises:
            ImportError: If matplotlib is not installed.
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


#: The Okabe-Ito palette, which is safe for colour-blind readers.
_COLORS = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")


def _draw_function(figure: Any, name: str, function: Function, curves: dict[str, StepFunction]) -> None:
    ends = max(4.0, *(1.15 * abs(c) for steps in curves.values() for c in steps.boundaries))
    x = np.linspace(-ends, ends, 4001)
    h, slope = function.asymptote(x) + function.rest(x), function.slope(x)
    left, middle, right = figure.subplots(1, 3)
    left.plot(x, h, color="black", linewidth=1.2, label="exact")
    left.set_title(name, fontsize=11)
    middle.plot(x, slope, color="black", linewidth=1.2)
    middle.set_title(f"derivative of {name} and its steps", fontsize=11)
    right.axhline(0, color="black", linewidth=1.2)
    right.set_title(f"{name} minus integral of the steps", fontsize=11)
    for (label, steps), color in zip(curves.items(), itertools.cycle(_COLORS)):
        middle.plot(x, steps.derivative(x), color=color, linewidth=1.2, label=label)
        # Both start from the same value at the left end.
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
    """Compares approximate gradients with the exact ones: cosine, relative error, bias and deviation.

    Example:
        >>> print(lomem.fit.report("gelu"))
        >>> print(lomem.fit.report(model, batches, loss=lambda output: output.loss))

    Args:
        target: Either an activation, as a name or a callable as in :func:`fit`, or a model with activations of
            :mod:`lomem.nn`, which is run. For an activation, the default is to compare the optimal step functions on
            the real line for both criteria with 1 to 4, 6 and 8 bits.
        batches: Iterable of batches for a model; see :func:`calibrate`.
        steps: Step functions of an activation, by name, to compare instead of the default ones.
        density: Density that the means are taken over for an activation, as in :func:`fit`. The default is the standard
            normal density.
        loss: Function that maps a model's output to a scalar. Required for a model.

    Returns:
        For an activation, a row per step function, with ``grad_output`` 1. For a model, a row per layer that compares
        ``grad_output * level`` with ``grad_output * derivative``, and a row ``"all parameters"`` that compares the
        gradient of all parameters with the one that the exact activations give for the same random numbers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is not as described.
    """
    if isinstance(target, nn.Module):
        if steps is not None:
            raise ValueError("lomem.fit.report: steps are given with a model, expected None: layers have their own")
        return _of_model(target, batches, loss)
    if batches is not None:
        raise ValueError("lomem.fit.report: batches are given with a function, expected None or a model")
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
                continue  # one bit cannot match parallel asymptotes
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
        raise ValueError(f"{name}: loss is None, expected a function that maps the model's output to a scalar")
    if batches is None:
        raise ValueError(f"{name}: batches is None, expected an iterable of batches")
    layers = activation_layers(name, model)
    batches = list(batches)
    sums = {layer: _Sums() for layer in layers}

    def seen(layer: str, x: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        steps, x64, g = layers[layer].step_function(), x.double(), grad.double()
        # The layer rounds boundaries to float32; the effect is below the digits shown here.
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
    """Adds the parameters' gradients for a batch, in float64, and restores the model's state."""
    given = as_batch(name, "batch", batch).map(Tensor.detach)
    with preserved(model), torch.enable_grad():
        torch.manual_seed(0)  # same dropout for both
        scalar(name, loss(given.call(model))).backward()
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                so_far = total.get(parameter)
                grad = value.grad.double()
                total[parameter] = grad if so_far is None else so_far + grad
