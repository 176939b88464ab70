"""Step functions fitted to the inputs that the layers of a model receive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..memory._report import Report, Section
from ..nn.activations import WithSteps
from ..steps import StepFunction
from ._fit import fit
from ._layers import Loss, activation_layers, derivative, draws_codes, watch

__all__ = ["Calibration", "Histogram", "LayerCalibration", "calibrate"]


class Histogram:
    """Histogram of the inputs of a layer: a count or sum of weights for each of the 65,536 bfloat16 values.

    Inputs are rounded to bfloat16, which limits the precision of the boundaries found to 8 bits, but not that of
    the results. In return, memory is bounded at 512 KiB, and the range of the inputs need not be known in advance.
    """

    def __init__(self) -> None:
        self.weights = torch.zeros(65536, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds elements, each with its weight. Non-finite elements are ignored by :meth:`points`."""
        bins = x.detach().reshape(-1).to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
        weights = None if weight is None else weight.detach().reshape(-1).to(torch.float64)
        self.weights += torch.bincount(bins, weights, minlength=65536).to("cpu", torch.float64)
        self.count += x.numel()

    def points(self) -> tuple[Tensor, Tensor]:
        """The values seen, ascending, and their weights, which sum to 1; both float64."""
        patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        values = patterns.to(torch.float64)
        weights = torch.where(values.isfinite(), self.weights, 0.0)
        seen = weights > 0
        values, order = values[seen].sort(stable=True)
        weights = weights[seen][order]
        return values, weights / weights.sum()


@dataclass(frozen=True)
class LayerCalibration:
    """Calibration result of a layer.

    Attributes:
        function: Name of the layer's class.
        bits: Number of bits saved per element.
        elements: Number of input elements seen during calibration.
        error_before: Root-mean-square error of the derivative over the inputs seen, relative to the root mean square of
            the exact derivative, with the previous step function.
        error_after: The same with the new step function.
        steps: The new step function.
    """

    function: str
    bits: int
    elements: int
    error_before: float
    error_after: float
    steps: StepFunction


@dataclass(frozen=True)
class Calibration(Report):
    """Result of :func:`calibrate`.

    Attributes:
        layers: Calibrated layers, by their names in the model.
        skipped: Layers whose step functions were left unchanged, with the reason, by their names in the model.
        batches: Number of batches run.
    """

    layers: dict[str, LayerCalibration]
    skipped: dict[str, str]
    batches: int

    def sections(self) -> list[Section]:
        """A table with a row per layer, and a table of the skipped layers."""
        rows = [
            (name, layer.function, str(layer.bits), f"{layer.error_before:.4f}", f"{layer.error_after:.4f}")
            for name, layer in self.layers.items()
        ]
        title = f"relative error of the derivative, {self.batches} batches"
        tables = [Section(title, ("layer", "activation", "bits", "before", "after"), rows)]
        if self.skipped:
            tables.append(Section("not calibrated", ("layer", "reason"), list(self.skipped.items())))
        return tables

    def categories(self) -> dict[str, int]:
        """Empty: the report has no bytes to plot."""
        return {}

    def apply(self, model: nn.Module) -> None:
        """Sets the same step functions in another model with the same layer names, such as one that was reloaded.

        Args:
            model: Model whose layers are modified in place.

        Raises:
            ValueError: If a layer is missing, has a different class or draws its codes at random; no layer is modified
                then.
        """
        layers = activation_layers("lomem.fit.Calibration.apply", model)
        missing = [name for name in self.layers if name not in layers]
        if missing:
            raise ValueError(
                f"lomem.fit.Calibration.apply: model has no activation of lomem.nn called {missing[0]!r}, expected "
                "the layers of the calibrated model"
            )
        for name, calibrated in self.layers.items():
            if (kind := type(layers[name]).__name__) != calibrated.function:
                raise ValueError(
                    f"lomem.fit.Calibration.apply: {name!r} of model is a {kind}, expected a {calibrated.function}"
                )
            if draws_codes(layers[name]):
                raise ValueError(
                    f"lomem.fit.Calibration.apply: {name!r} of model draws its codes at random, expected it to have a "
                    "step function"
                )
        for name, calibrated in self.layers.items():
            layers[name].steps = calibrated.steps


def _relative_error(layer: WithSteps, steps: StepFunction, values: Tensor, weights: Tensor) -> float:
    exact = derivative(layer, values)
    wrong = ((steps.derivative(values) - exact).square() * weights).sum()
    energy = (exact.square() * weights).sum()
    return float((wrong / energy).sqrt()) if energy > 0 else float("inf") if wrong > 0 else 0.0


def calibrate(
    model: nn.Module, batches: Iterable[Any], bits: int | None = None, *, loss: Loss | None = None
) -> Calibration:
    """Fits the step function of each activation layer to the inputs that the layer receives.

    Runs the model, collects a histogram of the inputs of each layer of :mod:`lomem.nn` with a step function, and sets
    the layer's ``steps`` to the step function that minimises the expected squared error of the gradient under that
    histogram (the criterion of Novikov et al., arXiv:2202.00441, with the layer's own density). The forward pass does
    not change.

    Example:
        >>> model.act = lomem.nn.GELU(bits=3)
        >>> print(lomem.fit.calibrate(model, [images for images, _ in loader], loss=...))

    Args:
        model: Model with activations of :mod:`lomem.nn`. It runs in its current mode, training or evaluation; buffers,
            gradients and random number generators are restored afterwards.
        batches: Iterable of batches, each a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments.
        bits: Number of bits per element for all layers, 1 to 8. By default each layer keeps its own.
        loss: Function that maps the model's output to a scalar. If given, each input is weighted with the square of the
            gradient that the layer receives for it, since that gradient multiplies the error of the derivative;
            otherwise all inputs have the same weight.

    Returns:
        The errors before and after and the step function of each layer, and the skipped layers with the reason (a layer
        was not called, saw too few distinct inputs, or draws its codes at random). The step functions are not part of
        the ``state_dict``; :meth:`Calibration.apply` sets them again.

    Raises:
        TypeError: If ``model`` or ``batches`` has the wrong type.
        ValueError: If ``bits`` is out of range, the model has no such layer, there is no batch, or no layer saw as many
            distinct inputs as it has levels. No layer is modified then.
    """
    function = "lomem.fit.calibrate"
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8):
        raise ValueError(f"{function}: bits is {bits!r}, expected 1 to 8")
    layers = activation_layers(function, model)
    histograms = {name: Histogram() for name in layers}

    def seen(name: str, x: Tensor, grad: Tensor | None) -> None:
        histograms[name].add(x, None if grad is None else grad.to(torch.float64).square())

    count = watch(function, model, layers, batches, loss, seen)
    results, skipped = {}, {}
    for name, layer in layers.items():
        if draws_codes(layer):
            skipped[name] = "draws its codes at random: there is nothing to fit, its error is the same for all inputs"
            continue
        width = layer.step_function().bits if bits is None else bits
        values, weights = histograms[name].points()
        if len(values) < 2**width:
            skipped[name] = _why(histograms[name], len(values), width, loss is not None)
            continue
        found = fit(layer.exact, width, criterion="derivative", density=(values, weights)).step
        results[name] = LayerCalibration(
            type(layer).__name__,
            width,
            histograms[name].count,
            _relative_error(layer, layer.step_function(), values, weights),
            _relative_error(layer, found, values, weights),
            found,
        )
    if not results:
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{function}: no layer can be calibrated; {name!r} {reason}")
    for name, result in results.items():
        layers[name].steps = result.steps
    return Calibration(results, skipped, count)


def _why(histogram: Histogram, distinct: int, bits: int, with_loss: bool) -> str:
    """The reason why a layer is skipped."""
    if histogram.count == 0:
        return "was not called" + (", or got no gradient" if with_loss else "")
    if distinct == 0:
        return "got only zero gradients" if with_loss else "saw no finite input"
    return f"saw {distinct} distinct bfloat16 values, expected at least {2**bits} for {bits} bits"
