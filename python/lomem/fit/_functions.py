"""Activation functions for a fit: h, h' and h'' in float64, and the asymptotes of h."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["FUNCTIONS", "Function", "Line"]

Array = NDArray[np.float64]
Real = Callable[[Array], Array]


@dataclass(frozen=True)
class Line:
    """offset + slope x."""

    slope: float
    offset: float

    def __call__(self, x: Array) -> Array:
        return self.offset + self.slope * x


ZERO, IDENTITY = Line(0.0, 0.0), Line(1.0, 0.0)


@dataclass(frozen=True)
class Function:
    """An activation h.

    Attributes:
        left: Asymptote at -infinity.
        right: Asymptote at +infinity.
        rest: h minus its asymptote, the left one for x < 0 and the right one from 0 on. Stored instead of h because the
            difference cancels where h is close to its asymptote.
        slope: h'.
        bend: h'' without delta functions.
        kinks: Where h' jumps, and other known points where it is not smooth.
        last: Fixed position of the last boundary, above which h equals `right`; None if it is free.
        asymptotic: Whether h has asymptotes. If not, `left` and `right` are 0.
    """

    left: Line
    right: Line
    rest: Real
    slope: Real
    bend: Real
    kinks: tuple[float, ...] = ()
    last: float | None = None
    asymptotic: bool = True

    def asymptote(self, x: Array) -> Array:
        """The left one for x < 0, the right one from 0 on."""
        return np.where(x < 0, self.left(x), self.right(x))


def _gated(inner: Callable[[Array], tuple[Array, Array, Array]]) -> Function:
    """X sigmoid(z(x)) for an odd z; `inner` returns z, z' and z''."""

    def parts(x: Array) -> tuple[Array, Array, Array, Array, Array]:
        z, dz, ddz = inner(x)
        s = special.expit(z)
        return s, s * special.expit(-z), special.expit(-z) - s, dz, ddz

    def slope(x: Array) -> Array:
        s, p, _, dz, _ = parts(x)
        return s + x * p * dz

    def bend(x: Array) -> Array:
        _, p, q, dz, ddz = parts(x)
        return p * (2 * dz + x * (q * dz**2 + ddz))

    return Function(ZERO, IDENTITY, lambda x: -np.abs(x) * special.expit(-np.abs(inner(x)[0])), slope, bend)


def _linear(factor: float) -> Function:
    return _gated(lambda x: (factor * x, np.full_like(x, factor), np.zeros_like(x)))


def _gelu_tanh() -> Function:
    scale, cubic = math.sqrt(8 / math.pi), 0.044715
    return _gated(lambda x: (scale * (x + cubic * x**3), scale * (1 + 3 * cubic * x**2), scale * 6 * cubic * x))


def _gelu() -> Function:
    def phi(x: Array) -> Array:
        return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    return Function(
        ZERO,
        IDENTITY,
        lambda x: -np.abs(x) * special.ndtr(-np.abs(x)),
        lambda x: special.ndtr(x) + x * phi(x),
        lambda x: phi(x) * (2 - x**2),
    )


def _mish() -> Function:
    """X t(x) with t = tanh(softplus(x)) = ((1 + e^x)^2 - 1) / ((1 + e^x)^2 + 1)."""

    def gate(x: Array) -> tuple[Array, Array]:
        e = np.exp(-np.abs(x))  # t and 1 - t from e^-|x|, which does not overflow
        divisor = np.where(x < 0, 2 + 2 * e + e**2, 1 + 2 * e + 2 * e**2)
        return np.where(x < 0, 2 * e + e**2, 1 + 2 * e) / divisor, np.where(x < 0, 2.0, 2 * e**2) / divisor

    def slopes(x: Array) -> tuple[Array, Array, Array]:
        t, rest = gate(x)
        s, d = special.expit(x), rest * (1 + t)
        return t, d * s, d * s * (special.expit(-x) - 2 * t * s)

    def rest(x: Array) -> Array:
        t, other = gate(x)
        return np.where(x < 0, x * t, -x * other)

    def slope(x: Array) -> Array:
        t, dt, _ = slopes(x)
        return t + x * dt

    def bend(x: Array) -> Array:
        _, dt, ddt = slopes(x)
        return 2 * dt + x * ddt

    return Function(ZERO, IDENTITY, rest, slope, bend)


def _sigmoid(factor: float, height: float, offset: float) -> Function:
    """Offset + height sigmoid(factor x)."""

    def slope(x: Array) -> Array:
        return height * factor * special.expit(factor * x) * special.expit(-factor * x)

    return Function(
        Line(0.0, offset),
        Line(0.0, offset + height),
        lambda x: np.where(x < 0, height, -height) * special.expit(-factor * np.abs(x)),
        slope,
        lambda x: slope(x) * -factor * np.tanh(factor * x / 2),
    )


def _softplus() -> Function:
    return Function(
        ZERO,
        IDENTITY,
        lambda x: np.log1p(np.exp(-np.abs(x))),
        special.expit,
        lambda x: special.expit(x) * special.expit(-x),
    )


def _softsign() -> Function:
    return Function(
        Line(0.0, -1.0),
        Line(0.0, 1.0),
        lambda x: np.where(x < 0, 1.0, -1.0) / (1 + np.abs(x)),
        lambda x: (1 + np.abs(x)) ** -2.0,
        lambda x: np.where(x < 0, 2.0, -2.0) * (1 + np.abs(x)) ** -3.0,
        kinks=(0.0,),
    )


def _exponential(below: float, above: float, last: float | None) -> Function:
    """Below (e^x - 1) for x < 0, above x from 0 on."""

    def branch(x: Array, value: float) -> Array:
        return np.where(x < 0, below * np.exp(np.minimum(x, 0)), value)

    return Function(
        Line(0.0, -below),
        Line(above, 0.0),
        lambda x: branch(x, 0.0),
        lambda x: branch(x, above),
        lambda x: branch(x, 0.0),
        kinks=(0.0,),
        last=last,
    )


def _hardswish() -> Function:
    """X clamp(x + 3, 0, 6) / 6."""

    def inside(x: Array) -> NDArray[np.bool_]:
        return np.abs(x) < 3

    return Function(
        ZERO,
        IDENTITY,
        lambda x: np.where(inside(x), np.abs(x) * (np.abs(x) - 3) / 6, 0.0),
        lambda x: np.where(inside(x), (2 * x + 3) / 6, np.where(x < 0, 0.0, 1.0)),
        lambda x: np.where(inside(x), 1 / 3, 0.0),
        kinks=(-3.0, 3.0),
    )


def _affine(f: Function, slope: float, factor: float) -> Function:
    """Slope x + factor f(x)."""

    def line(of: Line) -> Line:
        return Line(slope + factor * of.slope, factor * of.offset)

    return Function(
        line(f.left),
        line(f.right),
        lambda x: factor * f.rest(x),
        lambda x: slope + factor * f.slope(x),
        lambda x: factor * f.bend(x),
        f.kinks,
    )


SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

#: Functions by name, with torch's default arguments. `exp` is e^x - 1 below 0 and the identity above, and its last
#: boundary is 0: with the levels below 0 scaled by alpha, it suits ELU with any alpha.
FUNCTIONS: dict[str, Callable[[], Function]] = {
    "celu": lambda: _exponential(1.0, 1.0, None),
    "elu": lambda: _exponential(1.0, 1.0, None),
    "exp": lambda: _exponential(1.0, 1.0, 0.0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardswish": _hardswish,
    "logsigmoid": lambda: _affine(_softplus(), 1.0, -1.0),  # -softplus(-x) = x - softplus(x)
    "mish": _mish,
    "quick_gelu": lambda: _linear(1.702),
    "selu": lambda: _exponential(SELU_SCALE * SELU_ALPHA, SELU_SCALE, None),
    "sigmoid": lambda: _sigmoid(1.0, 1.0, 0.0),
    "silu": lambda: _linear(1.0),
    "softplus": _softplus,
    "softsign": _softsign,
    "tanh": lambda: _sigmoid(2.0, 2.0, -1.0),
    "tanhshrink": lambda: _affine(_sigmoid(2.0, 2.0, -1.0), 1.0, -1.0),
}

#: Those that are others, stretched or subtracted from a line, and so are their step functions.
DERIVED = frozenset({"celu", "logsigmoid", "quick_gelu", "tanh", "tanhshrink"})
