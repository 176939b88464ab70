"""Densities, which weight the error of a step function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Density", "Measure", "Points", "panels", "spaced", "totals"]

Array = NDArray[np.float64]

# Exact for polynomials up to degree 31. Panels are short enough for the fitted functions to be close to that.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)


def spaced(low: float, high: float, count: int) -> Array:
    """Points from low to high, evenly spaced near 0 and in geometric progression far away."""
    places: Array = np.sinh(np.linspace(float(np.arcsinh(low)), float(np.arcsinh(high)), count))
    places[0], places[-1] = low, high
    return places


def panels(edges: Array) -> tuple[Array, Array]:
    """Nodes and weights of the integral over each panel, one row per panel."""
    half = np.diff(edges)[:, None] / 2
    return edges[:-1, None] + half * (1 + NODES), half * WEIGHTS


def totals(index: NDArray[np.intp], values: Array, count: int) -> Array:
    """The sum of the values of each index, 0 to count - 1."""
    return np.bincount(index, values, count).astype(np.float64)


class Measure(ABC):
    """Nodes and weights of integrals whose integrand is smooth except at given breaks.

    Attributes:
        low: Lower end of the measure.
        high: Upper end of the measure.
        mesh: Edges of panels, from `low` to `high`.
        continuous: Whether the measure has a density.
    """

    continuous: bool

    def __init__(self, mesh: Array) -> None:
        self.mesh = mesh
        self.low, self.high = float(mesh[0]), float(mesh[-1])

    @abstractmethod
    def nodes(self, breaks: Array) -> tuple[Array, Array]:
        """Ascending nodes and their weights."""

    @abstractmethod
    def density(self, x: Array) -> Array:
        """The density at x; 0 if the measure has none."""


class Density(Measure):
    """A density that is smooth on each panel of a mesh, integrated by Gauss-Legendre quadrature."""

    continuous = True

    def __init__(self, mesh: Array, density: Callable[[Array], Array]) -> None:
        super().__init__(mesh)
        self._density = density

    def nodes(self, breaks: Array) -> tuple[Array, Array]:
        inside = breaks[(breaks > self.low) & (breaks < self.high)]
        x, w = panels(np.union1d(self.mesh, inside))
        return x.ravel(), w.ravel() * self._density(x.ravel())

    def density(self, x: Array) -> Array:
        return self._density(x)


class Points(Measure):
    """Weighted points."""

    continuous = False

    def __init__(self, x: Array, weights: Array, low: float, high: float) -> None:
        self.x, inverse = np.unique(x, return_inverse=True)
        self.weights = totals(inverse, weights, len(self.x))
        middle = (self.x[:-1] + self.x[1:]) / 2
        super().__init__(np.array([low, *middle, high]))

    def nodes(self, breaks: Array) -> tuple[Array, Array]:
        return self.x, self.weights

    def density(self, x: Array) -> Array:
        return np.zeros_like(x)
