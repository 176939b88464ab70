"""Compares the gradients of step functions and of converted models with the exact ones."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C
from .._trace.batch import as_batch
from .._trace.state import module_state, preserved, restore_module, seed
from ..conversion.exchange import given_back, is_converted, wrapped_since
from ..conversion.fidelity import Sums, layers_of, undisturbed
from ..functional import drawn_levels
from ..memory._report import Report, Section
from ..steps import DrawnLevels, StepFunction
from ._fit import CRITERIA, fit, measured
from ._functions import Function
from ._layers import (
    Loss,
    activation_layers,
    as_list,
    derivative,
    drawn_gradient,
    draws_codes,
    own,
    scalar,
    step_layers,
    watch,
)

__all__ = ["Fidelity", "FidelityReport", "report"]


@dataclass(frozen=True)
class Fidelity:
    """Comparison of an approximate gradient a with the exact gradient e, element by element.

    Attributes:
        cosine: Cosine of the angle between a and e.
        error: Norm of a - e relative to the norm of e. ``error**2`` equals ``bias**2 + deviation**2``.
        bias: Mean of a - e relative to the root mean square of e; the part that does not average out. If a was drawn
            several times, the norm of the error of its mean over the draws, relative to the norm of e.
        deviation: Standard deviation of a - e relative to the root mean square of e; the part that averages out. If a
            was drawn several times, that around its mean over the draws.
        ratio: Norm of a relative to the norm of e.
    """

    cosine: float
    error: float
    bias: float
    deviation: float
    ratio: float = float("nan")


def _fidelity(sums: Sums, bias: float | None = None) -> Fidelity:
    """The comparison that sums amount to, with another bias if one is given."""
    if sums.exact == 0:
        nan = float("nan")
        return Fidelity(nan, nan, nan, nan, nan)
    of = sums.fidelity()
    if bias is None:
        bias = sums.difference / sums.weight / (sums.exact / sums.weight) ** 0.5
    return Fidelity(of.cosine, of.error, bias, max(0.0, of.error**2 - bias**2) ** 0.5, of.ratio)


@dataclass(frozen=True)
class FidelityReport(Report):
    """Comparison of approximate gradients with the exact ones.

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
    draws: int = 1,
) -> FidelityReport:
    """Compares approximate gradients with the exact ones: cosine, relative error, bias and deviation.

    Example:
        >>> print(lomem.fit.report("gelu"))
        >>> print(lomem.fit.report(model, batches, loss=lambda output: output.loss))

    Args:
        target: Either an activation, as a name or a callable as in :func:`fit`, or a model that is run: one with
            activations of :mod:`lomem.nn`, or one that :func:`lomem.convert` converted. For an activation, the default
            is to compare the optimal step functions on the real line for both criteria with 1 to 4, 6 and 8 bits, and
            for an activation of the library what is expected of ``rounding="stochastic"``.
        batches: Iterable of batches for a model; see :func:`calibrate`.
        steps: Step functions of an activation, by name, to compare instead of the default ones.
        density: Density that the means are taken over for an activation, as in :func:`fit`. The default is the standard
            normal density.
        loss: Function that maps a model's output to a scalar. Required for a model.
        draws: How often the approximate gradient of a model's parameters is drawn, with other numbers of
            :mod:`lomem.random` each time and the same of torch. What a converted model keeps in groups is rounded at
            random. With several draws, bias and deviation are of the mean over the draws and around it.

    Returns:
        For an activation, a row per step function, with ``grad_output`` 1. For a model, a row per activation of
        :mod:`lomem.nn` that compares ``grad_output * level`` with ``grad_output * derivative``; if it is converted, a
        row per module that holds parameters, which compares their gradients; and a row ``"all parameters"`` that
        compares the gradient of all parameters with the one that the model gives for the same random numbers with
        exact activations and without its conversion.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is not as described.
    """
    if isinstance(target, nn.Module):
        if steps is not None:
            raise ValueError("lomem.fit.report: steps are given with a model, expected None: layers have their own")
        return _of_model(target, batches, loss, draws)
    if batches is not None:
        raise ValueError("lomem.fit.report: batches are given with a function, expected None or a model")
    if draws != 1:
        raise ValueError(f"lomem.fit.report: draws is {draws!r} with a function, expected 1 or a model")
    return _of_function(target, _best(target) if steps is None else steps, density, default=steps is None)


_BITS = (1, 2, 3, 4, 6, 8)


def _best(target: Any) -> dict[str, StepFunction]:
    found = {}
    for criterion in CRITERIA:
        for bits in _BITS:
            try:
                step = fit(target, bits, criterion=criterion).step  # type: ignore[arg-type]
            except ValueError:
                if bits != 1:
                    raise
                continue  # one bit cannot match parallel asymptotes
            found[f"{criterion}, {bits} bit{'s' * (bits > 1)}"] = step
    return found


def _of_function(target: Any, steps: Mapping[str, StepFunction], density: Any, *, default: bool) -> FidelityReport:
    function, x, weights = measured(target, density)
    exact = torch.from_numpy(function.slope(x))
    rows = {}
    for label, step in steps.items():
        sums = Sums()
        sums.add(torch.from_numpy(step.derivative(x)), exact, torch.from_numpy(weights))
        rows[label] = _fidelity(sums)
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    if isinstance(target, str) and default:
        for bits in _BITS:
            label = f"drawn, {bits} bit{'s' * (bits > 1)}"
            rows[label] = _of_levels(drawn_levels(target, bits, parameters=_defaults(target)), exact, weights)
    return FidelityReport(name, f"mean over {density!r:.40}", rows, dict(steps), function)


def _defaults(name: str) -> tuple[float, ...]:
    """The parameters with which :func:`fit` knows an activation by name."""
    (parameters,) = (given for known, given, *_ in _C.activations() if known == name)
    return tuple(value for _, value in parameters if value is not None)


def _of_levels(levels: DrawnLevels, exact: Tensor, weights: Any) -> Fidelity:
    """What is expected of a derivative that is drawn at random: its noise is that of a uniform number."""
    weighed = torch.from_numpy(weights)
    error = levels.deviation / float((exact.square() @ weighed / weighed.sum()).sqrt())
    length = math.hypot(1, error)
    return Fidelity(1 / length, error, 0.0, error, length)


def _of_model(model: nn.Module, batches: Any, loss: Loss | None, draws: Any) -> FidelityReport:
    name = "lomem.fit.report"
    if loss is None:
        raise ValueError(f"{name}: loss is None, expected a function that maps the model's output to a scalar")
    if batches is None:
        raise ValueError(f"{name}: batches is None, expected an iterable of batches")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"{name}: draws is {draws!r}, expected a whole number of at least 1")
    converted = [module for module in model.modules() if is_converted(module)]
    # Of a model without either, activation_layers says that it has none.
    layers = step_layers(name, model) if converted else activation_layers(name, model)
    wrapped = [module for module in converted if wrapped_since(module)]
    if wrapped:
        raise ValueError(
            f"{name}: a converted module has become a {type(wrapped[0]).__name__}, expected the class that "
            "lomem.convert gave it: call it before fully_shard, parametrizations and the like"
        )
    batches = as_list(name, batches)
    sums = {layer: Sums() for layer in layers}

    def seen(layer: str, x: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        module, x64, g = layers[layer], x.double(), grad.double()
        # The layer rounds boundaries to float32; the effect is below the digits shown here.
        a = drawn_gradient(module, x, g) if draws_codes(module) else g * module.step_function().derivative(x64)
        sums[layer].add(a, g * derivative(module, x64))

    if layers:
        watch(name, model, layers, batches, loss, seen)
    rows = {layer: _fidelity(total) for layer, total in sums.items()}
    of_parameters = _of_parameters(name, model, layers, batches, loss, draws)
    if not converted:
        of_parameters = {_ALL: of_parameters[_ALL]}
    under = f"{len(batches)} batches" if draws == 1 else f"{len(batches)} batches, {draws} draws"
    return FidelityReport(f"a {type(model).__name__}", under, rows | of_parameters)


#: The row of the gradient that an optimizer receives.
_ALL = "all parameters"


def _of_parameters(
    name: str, model: nn.Module, layers: Any, batches: list[Any], loss: Loss, draws: int
) -> dict[str, Fidelity]:
    """The comparison of the parameters' gradients, by the module that holds them, and of all."""
    holders = layers_of(model)
    holder_of = {parameter: holders.get(value) for parameter, value in model.named_parameters()}

    def gradients() -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for batch in batches:
            _add_gradients(name, model, batch, loss, total)
        return total

    state = _C.random_state()
    try:
        with contextlib.ExitStack() as exact_layers:
            exact_layers.enter_context(given_back(model))
            for layer in layers.values():
                exact_layers.callback(restore_module, layer, *module_state(layer))
                layer.forward = layer.exact
            exact = gradients()
        # Both start with the same numbers, which other layers may draw too; only later draws start with others.
        _C.set_random_state(state)
        by_layer: dict[str, Sums] = {}
        means: dict[str, Tensor] = {}
        for _ in range(draws):
            approximate = gradients()
            for parameter, e in exact.items():
                a = approximate.pop(parameter, None)
                a = torch.zeros_like(e) if a is None else a
                by_layer.setdefault(holder_of[parameter] or "", Sums()).add(a, e)
                if draws > 1:
                    means[parameter] = a / draws + means.get(parameter, 0.0)
    finally:
        _C.set_random_state(state)
    biases: dict[str, Sums] = {layer: Sums() for layer in by_layer}
    for parameter, mean in means.items():
        biases[holder_of[parameter] or ""].add(mean, exact[parameter])
    rows = {}
    for layer, sums in [*by_layer.items(), (_ALL, _merged(by_layer.values()))]:
        of_mean = biases[layer] if layer != _ALL else _merged(biases.values())
        rows[layer or "(the model)"] = _fidelity(sums, of_mean.fidelity().error if draws > 1 else None)
    return rows


def _merged(parts: Iterable[Sums]) -> Sums:
    result = Sums()
    for part in parts:
        result.merge(part)
    return result


def _add_gradients(name: str, model: nn.Module, batch: Any, loss: Loss, total: dict[str, Tensor]) -> None:
    """Adds the parameters' gradients for a batch, in float64, and restores all but lomem's own random numbers."""
    given = as_batch(name, "batch", batch).map(own)
    with preserved(model), undisturbed(model, loss), torch.enable_grad():
        seed(model, given.tensors())  # same dropout for both
        scalar(name, loss(given.call(model))).backward()
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                so_far = total.get(parameter)
                grad = value.grad.to_dense() if value.grad.layout != torch.strided else value.grad
                grad = (torch.view_as_real(grad) if grad.is_complex() else grad).double()
                total[parameter] = grad if so_far is None else so_far + grad
        drawn = _C.random_state()
    _C.set_random_state(drawn)
