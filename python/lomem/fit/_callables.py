"""Activations given as Python callables on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._functions import Array, Function, Line, Real
from ._measure import spaced

__all__ = ["from_callable"]

#: h has an asymptote if it follows it from |x| = 512 on to within this tolerance, relative to the size of h there.
FLAT = 1e-11


def _values(fn: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    try:
        y = fn(x)
    except Exception as error:
        raise ValueError(f"lomem.fit.fit: fn raised {type(error).__name__} for a float64 tensor: {error}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != torch.float64:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"lomem.fit.fit: fn returned {got}, expected torch.float64 of shape {tuple(x.shape)} like its argument"
        )
    return y


def _derivatives(fn: Callable[[Tensor], Any], x: Array) -> tuple[Array, Array, Array]:
    """The values h, h', h'' at x, by autograd."""
    with torch.enable_grad():
        t = torch.from_numpy(np.ascontiguousarray(x)).requires_grad_()
        values = [_values(fn, t)]
        for _ in range(2):
            last = values[-1]
            grad = torch.autograd.grad(last.sum(), t, create_graph=True)[0] if last.requires_grad else None
            values.append(torch.zeros_like(t) if grad is None else grad)
    h, slope, bend = (v.detach().numpy() for v in values)
    return h, slope, bend


def _asymptote(fn: Callable[[Tensor], Any], side: float) -> Line | None:
    x = side * np.array([512.0, 1024.0])
    with np.errstate(all="ignore"):
        h, slopes, _ = _derivatives(fn, x)
        slope = float(slopes[1])
        offset = h - slope * x
    steady = abs(slopes[0] - slope) < FLAT and abs(offset[1] - offset[0]) < FLAT * float(np.max(1 + np.abs(h)))
    return Line(slope, float(offset[0])) if np.all(np.isfinite(h)) and np.isfinite(slope) and steady else None


def _jumps(slope: Real, low: float, high: float) -> tuple[float, ...]:
    """Where h' jumps: the last number before each jump, or exactly 0.

    Bisects short intervals over which h' changes, each time continuing with the half where it changes more.
    """
    edges = np.union1d(np.linspace(low, high, 4097), spaced(low, high, 4097))
    g = slope(edges)
    least = 1e-6 * float(np.max(np.abs(g)))
    changes = np.flatnonzero(np.abs(np.diff(g)) > least)
    a, b, left, right = edges[changes], edges[changes + 1], g[changes], g[changes + 1]
    for _ in range(200):
        middle = (a + b) / 2
        value = slope(middle)
        first = np.abs(value - left) > np.abs(right - value)
        a, left = np.where(first, a, middle), np.where(first, left, value)
        b, right = np.where(first, middle, b), np.where(first, value, right)
        going = (np.abs(right - left) > least) & (np.nextafter(a, b) < b)
        if not np.any(going):
            break
    jumps = np.abs(right - left) > least
    return tuple(
        sorted({0.0 if low <= 0 <= high else float(low) for low, high in zip(a[jumps], b[jumps], strict=True)})
    )


def from_callable(fn: Callable[[Tensor], Any], low: float, high: float) -> Function:
    """Describes fn for a fit; jumps of h' are searched between `low` and `high`."""

    def rest(x: Array) -> Array:
        return _derivatives(fn, x)[0] - np.where(x < 0, left(x), right(x))

    def slope(x: Array) -> Array:
        return _derivatives(fn, x)[1]

    def bend(x: Array) -> Array:
        return _derivatives(fn, x)[2]

    sides = _asymptote(fn, -1.0), _asymptote(fn, 1.0)
    left, right = (side or Line(0.0, 0.0) for side in (sides if None not in sides else (None, None)))
    return Function(left, right, rest, slope, bend, _jumps(slope, low, high), asymptotic=None not in sides)
