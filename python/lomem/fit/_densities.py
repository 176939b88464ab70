"""Parses the density argument of a fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._functions import Array, Function, Real
from ._measure import Density, Measure, Points, panels, spaced, totals

__all__ = ["Domain", "array", "below", "fail", "measure_of"]

Domain = tuple[float, float]

#: Larger samples are grouped into about this many points.
GROUPS = 4096


def fail(sentence: str) -> ValueError:
    return ValueError(f"lomem.fit.fit: {sentence}")


def _reach(f: Function, least: float, margin: float) -> Domain:
    """Interval outside which h differs from its asymptotes by at most `least`, with some margin."""
    powers: Array = 2.0 ** np.arange(-2.0, 100 if least < 1e-16 else 10)
    ends = []
    for side in (-1.0, 1.0):
        away = np.flatnonzero(np.abs(f.rest(side * powers)) > least)
        ends.append(side * margin * max(4.0, 2 * float(powers[away[-1]]) if len(away) else 0.0))
    return ends[0], ends[1]


def _mesh(f: Function, low: float, high: float) -> Array:
    """Edges of panels on each of which h' is close enough to a polynomial."""
    wide = spaced(low, high, int(np.ceil((np.arcsinh(high) - np.arcsinh(low)) / 0.1)) + 1)
    even = np.linspace(low, high, 65) if high - low < 100 else np.empty(0)
    kinks = [k for k in f.kinks if low < k < high]
    mesh = np.unique(np.concatenate([[low, high], wide, even, kinks]))
    for _ in range(40):  # until halving a panel does not change its integral
        middle = (mesh[1:] + mesh[:-1]) / 2

        def integrals(edges: Array) -> Array:
            x, w = panels(edges)
            return np.sum(w * f.slope(x.ravel()).reshape(x.shape) ** 2, axis=1)

        whole, halves = integrals(mesh), integrals(np.sort(np.concatenate([mesh, middle])))
        off = np.abs(halves[::2] + halves[1::2] - whole)
        split = (off > 1e-13 * (np.max(whole) + whole)) & (np.diff(mesh) > 1e-12 * (1 + np.abs(middle)))
        if not np.any(split):
            break
        mesh = np.sort(np.concatenate([mesh, middle[split]]))
    return mesh


def array(name: str, values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        result = np.asarray(values, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise fail(f"{name} is {values!r}, expected numbers") from error
    if len(result) == 0:
        raise fail(f"{name} is empty, expected numbers")
    if not np.all(np.isfinite(result)):
        raise fail(f"{name} contains {result[~np.isfinite(result)][0]}, expected finite numbers")
    return result


def _is_number(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _density(
    f: Function, places: Array, height: Real, domain: Domain | None, reach: Domain, total: float = 1.0
) -> Measure:
    """A density of mass `total`, proportional to `height`: smooth between `places`, 0 outside them."""
    low, high = domain or (float(places[0]), float(places[-1]))
    wide = (low, high) if domain and f.last is None else (min(low, reach[0]), max(high, reach[1]))
    inside = np.clip([*places, low, high], *wide)
    mesh = np.union1d(_mesh(f, *wide), inside)

    def within(x: Array) -> Array:
        return np.where((low < x) & (x < high), height(x), 0.0)

    mass = float(np.sum(Density(mesh, within).nodes(mesh)[1]))
    if not mass > 1e-12 * float(np.sum(Density(places, height).nodes(places)[1])):
        raise fail(f"domain is {domain}, expected one in which density has mass")
    return Density(mesh, lambda x: within(x) * (total / mass))


def _gaussian(f: Function, mean: float, std: float, domain: Domain | None, reach: Domain) -> Measure:
    if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
        raise fail(f"density is ({mean}, {std}), expected a finite mean and a positive standard deviation")
    places = mean + std * np.linspace(-8, 8, 129)
    return _density(f, places, lambda x: np.exp(-(((x - mean) / std) ** 2) / 2), domain, reach)


def _histogram(f: Function, density: tuple[Any, Any], domain: Domain | None, reach: Domain) -> Measure:
    places, weights = array("density[0]", density[0]), array("density[1]", density[1])
    if np.any(weights < 0) or not np.sum(weights) > 0:
        raise fail("density[1] has negative entries or no mass, expected weights")
    if len(places) == len(weights):
        return _points(places, weights, domain, reach)
    if len(places) != len(weights) + 1:
        raise fail(
            f"density has {len(places)} places and {len(weights)} weights, expected equal numbers (points) or one more "
            "place than weights (bin edges)"
        )
    if np.any(np.diff(places) <= 0):
        raise fail("density[0] has bin edges that do not ascend, expected ascending edges")
    heights = np.array([0.0, *(weights / np.sum(weights) / np.diff(places)), 0.0])
    return _density(f, places, lambda x: heights[np.searchsorted(places, x)], domain, reach)


def _points(x: Array, weights: Array, domain: Domain | None, reach: Domain) -> Measure:
    inside = weights > 0
    if domain is not None:
        inside &= (x >= domain[0]) & (x <= domain[1])
    if not np.any(inside):
        raise fail(f"domain is {domain}, expected one that contains some of the sample")
    x, weights = x[inside], weights[inside] / np.sum(weights[inside])
    if len(np.unique(x)) > GROUPS:
        # Both quantiles and even spacing: neither dense regions nor outliers end up in a single group.
        edges = np.union1d(np.quantile(x, np.linspace(0, 1, GROUPS // 2)), np.linspace(x.min(), x.max(), GROUPS // 2))
        group = np.searchsorted(edges, x)
        mass = totals(group, weights, len(edges) + 1)
        x, weights = totals(group, weights * x, len(edges) + 1)[mass > 0] / mass[mass > 0], mass[mass > 0]
    return Points(x, weights, min(reach[0], np.min(x) - 1.0), max(reach[1], np.max(x) + 1.0))


def measure_of(f: Function, density: Any, domain: Domain | None, exact: bool) -> Measure:
    if isinstance(density, str) and density == "uniform":
        # `rest` of a named function stays accurate where h itself cancels; beyond, no error is left that matters.
        # Boundaries can be where h equals its asymptote: one that is 0 below -3 can have its first one at -4.5.
        line = _reach(f, 1e-20 if exact else 1e-12, 4.0) if f.asymptotic else (-4.0, 4.0)
        if domain is None or f.last is None:
            return Density(_mesh(f, *(domain or line)), np.ones_like)
        return _density(f, np.array(domain), np.ones_like, domain, line, domain[1] - domain[0])
    # Boundaries may be where the density is 0, but not arbitrarily far out, where the outer pieces would become free.
    low, high = _reach(f, 1e-3, 1.0) if f.asymptotic else (-4.0, 4.0)
    reach = max(low, -32.0), min(high, 32.0)
    if isinstance(density, str) and density == "gaussian":
        return _gaussian(f, 0.0, 1.0, domain, reach)
    if isinstance(density, str) or density is None:
        raise fail(
            f"density is {density!r}, expected 'uniform', 'gaussian', (mean, std), a sample or (places, weights)"
        )
    if isinstance(density, tuple) and len(density) == 2:
        if all(_is_number(value) for value in density):
            return _gaussian(f, float(density[0]), float(density[1]), domain, reach)
        return _histogram(f, density, domain, reach)
    sample = array("density", density)
    return _points(sample, np.ones(len(sample)), domain, reach)


def below(measure: Measure, last: float) -> Measure:
    """Restricts the measure to values below `last`."""
    if isinstance(measure, Points):
        inside = measure.x < last
        return Points(measure.x[inside], measure.weights[inside], measure.low, last)
    return Density(np.append(measure.mesh[measure.mesh < last], last), measure.density)
