"""Step functions for the inputs that the layers of a model see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..memory._report import Report, Section
from ..steps import StepFunction
from ._fit import fit
from ._layers import Layer, Loss, activation_layers, derivative, watch

__all__ = ["Calibration", "Histogram", "LayerCalibration", "calibrate"]


class Histogram:
    """How often a layer sees which input: counts, or sums of weights, of the 65,536 bfloat16 values.

    Inputs are rounded to bfloat16, 8 bits of precision: of a boundary that is found, not of what is computed. So the
    memory is bounded whatever is seen, 512 KiB, and no range has to be known before.
    """

    def __init__(self) -> None:
        self.weights = torch.zeros(65536, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds elements, each with its weight. What is not finite is left out."""
        bins = x.detach().reshape(-1).to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
        weights = None if weight is None else weight.detach().reshape(-1).to(torch.float64)
        self.weights += torch.bincount(bins, weights, minlength=65536).to("cpu", torch.float64)
        self.count += x.numel()

    def points(self) -> tuple[Tensor, Tensor]:
        """The values seen, ascending, and their weights, of sum 1: both float64."""
        patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
        values = patterns.to(torch.float64)
        weights = torch.where(values.isfinite(), self.weights, 0.0)
        seen = weights > 0
        values, order = values[seen].sort(stable=True)
        weights = weights[seen][order]
        return values, weights / weights.sum()


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration did to a layer.

    Attributes:
        function: The layer's class.
        bits: Kept for an element.
        elements: Seen in calibration.
        error_before: Root of the expected squared error of the derivative under what was seen, relative to the
            derivative's own root mean square, with the steps that the layer had.
        error_after: With those that it has.
        steps: Those.
    """

    function: str
    bits: int
    elements: int
    error_before: float
    error_after: float
    steps: StepFunction


@dataclass(frozen=True)
class Calibration(Report):
    """What :func:`calibrate` did.

    Attributes:
        layers: By their names in the model.
        skipped: Layers that kept the steps that they had, and why.
        batches: How many were seen.
    """

    layers: dict[str, LayerCalibration]
    skipped: dict[str, str]
    batches: int

    def sections(self) -> list[Section]:
        """A table with a row a layer, and one of those that were left."""
        rows = [
            (name, layer.function, str(layer.bits), f"{layer.error_before:.4f}", f"{layer.error_after:.4f}")
            for name, layer in self.layers.items()
        ]
        title = f"relative error of the derivative, {self.batches} batches"
        tables = [Section(title, ("layer", "activation", "bits", "before", "after"), rows)]
        if self.skipped:
            tables.append(Section("not calibrated", ("layer", "which"), list(self.skipped.items())))
        return tables

    def categories(self) -> dict[str, int]:
        """None: there are no bytes to draw."""
        return {}

    def apply(self, model: nn.Module) -> None:
        """Sets the same steps in another model with layers of these names, such as one that was loaded.

        Raises:
            ValueError: A layer is missing or another activation; then nothing is set.
        """
        layers = activation_layers("lomem.fit.Calibration.apply", model)
        missing = [name for name in self.layers if name not in layers]
        if missing:
            raise ValueError(
                f"lomem.fit.Calibration.apply: model has no activation of lomem.nn called {missing[0]!r}, expected "
                "those of the model that was calibrated"
            )
        for name, calibrated in self.layers.items():
            if (kind := type(layers[name]).__name__) != calibrated.function:
                raise ValueError(
                    f"lomem.fit.Calibration.apply: {name!r} of model is a {kind}, expected a {calibrated.function}"
                )
        for name, calibrated in self.layers.items():
            _set(layers[name], calibrated.steps)


def _set(layer: Layer, steps: StepFunction) -> None:
    layer.steps = steps
    if hasattr(layer, "bits"):
        layer.bits = steps.bits


def _relative_error(layer: Layer, steps: StepFunction, values: Tensor, weights: Tensor) -> float:
    exact = derivative(layer, values)
    wrong = ((steps.derivative(values) - exact).square() * weights).sum()
    energy = (exact.square() * weights).sum()
    return float((wrong / energy).sqrt()) if energy > 0 else float("inf") if wrong > 0 else 0.0


def calibrate(
    model: nn.Module, batches: Iterable[Any], bits: int | None = None, *, loss: Loss | None = None
) -> Calibration:
    """Gives each activation layer the step function that is best for the inputs that it sees.

    Runs the model, collects a histogram of what each layer of :mod:`lomem.nn` with a step function is given, and sets
    its ``steps`` to those that minimise the expected squared error of its gradient under that histogram (the criterion
    of Novikov et al., arXiv:2202.00441, with the layer's own density). The forward pass does not change.

    Example:
        >>> model.act = lomem.nn.GELU(bits=3)
        >>> print(lomem.fit.calibrate(model, [images for images, _ in loader], loss=...))

    Args:
        model: With activations of :mod:`lomem.nn`. What training changes is left as it was; the mode that the model is
            in, training or evaluation, is the one it runs in.
        batches: An iterable; each a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        bits: 1 to 8, of all layers; by default each keeps its own.
        loss: Makes a scalar of the model's output. With it, an input counts by the square of the gradient that comes
            back to it, which is what the error of the gradient is multiplied with; without, all inputs count alike.

    Returns:
        The errors before and after, layer by layer, and the steps; and layers that are left, because they were not
        called or saw too few different inputs, with the reason. The layers' steps are no part of the ``state_dict``;
        :meth:`Calibration.apply` sets them again.

    Raises:
        ValueError: No such layer, no batch, or none of the layers saw as many different inputs as it has levels. Then
            none is changed.
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
        _set(layers[name], result.steps)
    return Calibration(results, skipped, count)


def _why(histogram: Histogram, distinct: int, bits: int, with_loss: bool) -> str:
    """Why a layer is left."""
    if histogram.count == 0:
        return "was not called" + (", or got no gradient" if with_loss else "")
    if distinct == 0:
        return "got no gradient but 0" if with_loss else "saw no finite input"
    return f"saw inputs of {distinct} different bfloat16 values, expected at least {2**bits} for {bits} bits"
