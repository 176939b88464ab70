"""Optimal step functions: a global search on a grid, then Newton's method with exact second derivatives.

`derivative` is the least-squares fit of h' by a constant on each segment. `primitive` is the least-squares fit of h by
a line on each segment, where adjacent lines meet at the boundary between them. In both cases the effect of a boundary
is known in closed form, and the Hessian is tridiagonal:

- `derivative`: in the boundaries c, where each level is the mean of h' over its segment.
- `primitive`: in the values of the lines at the ends of their segments. A boundary is where two lines cross. Changing
  the values there by p on the left line and q on the right line moves the boundary by (p - q) / a, where a is the
  difference of the slopes. So half the Hessian of the integral of e^2 (e is the error h - h~, w the density) is the
  Gram matrix of the lines minus w(c) e(c) / a (p - q)^2 for every boundary, and half the gradient is minus the integral
  of w e times a line.

Where h is convex or concave, the best-fitting lines of adjacent segments meet without a constraint (their errors at the
boundary are equal in size and sign). Hence the grid search ignores the constraint.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, eigvalsh_tridiagonal, solveh_banded

from ._functions import Function
from ._measure import Measure, spaced, totals

__all__ = ["Problem", "Solution", "certify", "error_over", "solve", "step_of"]

Array = NDArray[np.float64]
Index = NDArray[np.intp]

GRID = 1024  # Candidate boundaries: four for each of 255.


@dataclass(frozen=True)
class Problem:
    """A minimisation problem.

    Attributes:
        function: h.
        degree: 0 to fit h' by constants (`derivative`), 1 to fit h by lines (`primitive`).
        measure: The density.
        matched: Whether the outermost constants or lines match the asymptotes; otherwise they are free.
        jumps: Where h' jumps.
        last: Fixed position of the last boundary; None if it is free.
    """

    function: Function
    degree: int
    measure: Measure
    matched: bool
    jumps: tuple[float, ...] = ()
    last: float | None = None


@dataclass(frozen=True)
class State:
    """A step function: boundaries, and levels (degree 0) or heights of h~ above the asymptote at the knots (degree 1).

    The knots are the boundaries and, if the outer lines are free, both ends of the density.
    """

    boundaries: Array
    values: Array


@dataclass(frozen=True)
class Solution:
    """A state with its error and derivatives.

    Attributes:
        state: The step function.
        error: The integral of e^2.
        force: Minus half the gradient of the error, in the variables of `degree`.
        scale: The diagonal of half the Hessian for fixed boundaries, which normalizes `force` and `hessian`.
        hessian: Half the Hessian: diagonal and off-diagonal.
    """

    state: State
    error: float
    force: Array
    scale: Array
    hessian: tuple[Array, Array]

    @property
    def residual(self) -> float:
        """Relative size of the force: the cosine between the error and the directions that can change."""
        return float(np.linalg.norm(self.force / (np.sqrt(self.scale) * np.sqrt(max(self.error, 1e-300)))))

    @property
    def curvature(self) -> float:
        """Smallest eigenvalue of the scaled Hessian; 1 if nothing can vary."""
        if len(self.scale) == 0:
            return 1.0
        root = np.sqrt(self.scale)
        diagonal, beside = self.hessian
        scaled = diagonal / self.scale, beside / (root[:-1] * root[1:])
        return float(eigvalsh_tridiagonal(*scaled, select="i", select_range=(0, 0))[0])


def _ratio(above: Array, below: Array) -> Array:
    """Quotient, 0 where the divisor is 0."""
    return np.where(below == 0, 0.0, above / np.where(below == 0, 1.0, below))


# --- Lines: `primitive` -----------------------------------------------------------------------------------------------


def _knots(problem: Problem, boundaries: Array) -> Array:
    ends = problem.measure
    return boundaries if problem.matched else np.concatenate([[ends.low], boundaries, [ends.high]])


def _lines(problem: Problem, state: State) -> tuple[Array, Array]:
    """Knots, and slopes of the lines between them; if the asymptotes are matched, including their slopes."""
    f, knots = problem.function, _knots(problem, state.boundaries)
    one_side = (knots[:-1] < 0) == (knots[1:] < 0)
    side = np.where(knots[:-1] < 0, f.left.slope, f.right.slope)
    across = np.diff(f.asymptote(knots)) / np.diff(knots)
    slopes = np.where(one_side, side, across) + np.diff(state.values) / np.diff(knots)
    return knots, np.concatenate([[f.left.slope], slopes, [f.right.slope]]) if problem.matched else slopes


def _line_errors(problem: Problem, state: State, x: Array) -> tuple[Array, Index, Array]:
    """The error e at x, the index of the line at x, and the position of x between its ends, from 0 to 1.

    Lines are numbered from 0; the asymptotes have index -1 and the number of lines.
    """
    f, knots = problem.function, _knots(problem, state.boundaries)
    line = np.searchsorted(knots, x) - 1
    inside = (line >= 0) & (line < len(knots) - 1)
    left = np.clip(line, 0, max(len(knots) - 2, 0))
    a, b = knots[left], knots[left + (len(knots) > 1)]
    t = np.where(inside, (x - a) / np.where(b > a, b - a, 1.0), 0.0)
    # h~ minus the asymptote on the side of x. On one side of 0 this needs only the heights, so small values do not
    # cancel.
    height = (1 - t) * state.values[left] + t * state.values[left + (len(knots) > 1)]
    across = (1 - t) * f.asymptote(a) + t * f.asymptote(b) - f.asymptote(x)
    height = height + np.where((a < 0) == (b < 0), 0.0, across)
    outer = np.where(line < 0, f.left(x), f.right(x)) - f.asymptote(x)
    return f.rest(x) - np.where(inside, height, outer), line, t


def _evaluate_lines(problem: Problem, state: State) -> Solution:
    knots, slopes = _lines(problem, state)
    x, w = problem.measure.nodes(knots)
    e, line, t = _line_errors(problem, state, x)
    count = len(knots) - 1

    def sums(values: Array) -> Array:
        return totals(line + 1, w * values, count + 2)[1:-1]

    diagonal = np.column_stack([sums((1 - t) ** 2), sums(t**2)]).ravel()
    force = np.column_stack([sums(e * (1 - t)), sums(e * t)]).ravel()
    beside = np.zeros(max(2 * count - 1, 0))
    beside[::2] = sums(t * (1 - t))
    # A line over an empty segment has no weight and does not move.
    scale = np.maximum(diagonal, 1e-14 * np.max(diagonal, initial=1e-186))
    diagonal = scale.copy()
    c = state.boundaries
    # Between two lines with the same slope the position of the boundary is undetermined.
    bend = problem.measure.density(c) * _ratio(_line_errors(problem, state, c)[0], np.diff(slopes))
    if problem.matched:  # the asymptotes are fixed, the ends of their neighbours move
        diagonal[1:-1:2] -= bend[1:-1]
        diagonal[::2] -= bend[:-1]
        diagonal[-1:] -= bend[-1:] if count else 0.0
        beside[1::2] += bend[1:-1]
    else:
        diagonal[1:-1:2] -= bend
        diagonal[2::2] -= bend
        beside[1::2] += bend
    if problem.matched and count:
        rise = np.diff(slopes)
        at_low = c[0] <= problem.measure.low and force[0] * rise[0] >= 0  # it would move further out
        at_high = c[-1] >= problem.measure.high and force[-1] * rise[-1] >= 0
        for i, near, held in ((0, 0, at_low), (-1, -1, at_high or problem.last is not None)):
            if held:
                diagonal[i], beside[near], force[i], scale[i] = 1.0, 0.0, 0.0, 1.0
    return Solution(state, float(w @ e**2), force, scale, (diagonal, beside))


def _move_lines(problem: Problem, state: State, step: Array) -> State | None:
    f, (knots, slopes) = problem.function, _lines(problem, state)
    left, right = step[::2], step[1::2]
    tilt = slopes.copy()
    inner = slice(1, -1) if problem.matched else slice(None)
    tilt[inner] += (right - left) / np.diff(knots)
    # Rise of the left and the right line at every boundary.
    before, after = (np.append(0.0, right), np.append(left, 0.0)) if problem.matched else (right[:-1], left[1:])
    shift = _ratio(before - after, np.diff(tilt))
    if problem.last is not None and problem.matched:
        shift[-1] = 0.0
    if problem.matched:  # the outermost boundaries stay inside the density
        shift[0] = max(shift[0], problem.measure.low - state.boundaries[0])
        shift[-1] = min(shift[-1], problem.measure.high - state.boundaries[-1])
    c = state.boundaries + shift
    if not (np.all(np.isfinite(c)) and np.all(np.diff(_knots(problem, c)) > 0)):
        return None
    rise = before + tilt[:-1] * shift
    if problem.matched:
        rise[-1] = tilt[-1] * shift[-1]  # on the asymptote, even if the crossing was clipped
    same = (c < 0) == (state.boundaries < 0)
    side = np.where(c < 0, f.left.slope, f.right.slope)
    rise -= np.where(same, side * shift, f.asymptote(c) - f.asymptote(state.boundaries))
    values = state.values.copy()
    values[slice(None) if problem.matched else slice(1, -1)] += rise
    if not problem.matched:
        values[0] += left[0]
        values[-1] += right[-1]
    return State(c, values)


def _connect(problem: Problem, boundaries: Array) -> State:
    """The best heights for given boundaries."""
    f, knots = problem.function, _knots(problem, boundaries)
    values = f.rest(knots)
    if problem.matched:
        values[0] = f.left(knots[:1])[0] - f.asymptote(knots[:1])[0]
        values[-1] = f.right(knots[-1:])[0] - f.asymptote(knots[-1:])[0]
    state = State(boundaries, values)
    if len(knots) < 2:
        return state
    x, w = problem.measure.nodes(knots)
    e, line, t = _line_errors(problem, state, x)

    def sums(values: Array) -> Array:
        return totals(line + 1, w * values, len(knots) + 1)

    left, right = sums((1 - t) ** 2)[1:], sums(t**2)[:-1]
    diagonal, force = left + right, sums(e * (1 - t))[1:] + sums(e * t)[:-1]
    beside = sums(t * (1 - t))[1:-1]
    free = slice(1, -1) if problem.matched else slice(None)
    diagonal, force, beside = diagonal[free], force[free], beside[free]
    if len(force):
        diagonal = diagonal + 1e-12 * np.max(diagonal)
        values = values.copy()
        values[free] += _solve_tridiagonal(diagonal, beside, force)
    return State(boundaries, values)


# --- Constants: `derivative` ------------------------------------------------------------------------------------------


def _levels(problem: Problem, boundaries: Array) -> tuple[Array, Array, float]:
    """Best levels for given boundaries, the mass of each, and the error."""
    f = problem.function
    x, w = problem.measure.nodes(boundaries)
    code, target = np.searchsorted(boundaries, x), f.slope(x)
    count = len(boundaries) + 1
    mass = totals(code, w, count)
    middle = np.concatenate([boundaries[:1], (boundaries[1:] + boundaries[:-1]) / 2, boundaries[-1:]])
    levels = np.where(mass > 0, _ratio(totals(code, w * target, count), mass), f.slope(middle))
    if problem.matched:
        levels[0], levels[-1] = f.left.slope, f.right.slope
    return levels, mass, float(w @ (target - levels[code]) ** 2)


def _evaluate_constants(problem: Problem, state: State) -> Solution:
    f, c = problem.function, state.boundaries
    levels, mass, error = _levels(problem, c)
    if problem.matched:
        mass[[0, -1]] = np.inf  # fixed levels do not move
    w, g, gap = problem.measure.density(c), f.slope(c), np.diff(levels)
    before, after = g - levels[:-1], g - levels[1:]
    force = -w * (before**2 - after**2) / 2
    scale = np.abs(w * f.bend(c) * gap)
    scale = np.maximum(scale, 1e-14 * np.max(scale, initial=1e-186))
    own = _ratio(np.ones_like(mass), mass)
    diagonal = w * f.bend(c) * gap - w**2 * (before**2 * own[:-1] + after**2 * own[1:])
    beside = (w * before)[1:] * (w * after)[:-1] * own[1:-1]
    for i in np.flatnonzero(_pinned(problem, state, levels)):
        force[i], diagonal[i], scale[i] = 0.0, 1.0, 1.0
        beside[max(i - 1, 0) : i + 1] = 0.0
    return Solution(State(c, levels), error, force, scale, (diagonal, beside))


def _pinned(problem: Problem, state: State, levels: Array) -> NDArray[np.bool_]:
    """Which boundaries cannot move: those held by a jump of h', and a fixed last one."""
    f, c = problem.function, state.boundaries
    # Between the points of a sample the exact position of a boundary does not matter.
    pinned = np.full(len(c), not problem.measure.continuous)
    for jump in problem.jumps:
        near = np.flatnonzero(c == jump)
        for i in near:
            sides = np.array([np.nextafter(jump, -np.inf), np.nextafter(jump, np.inf)])
            low, high = (f.slope(sides) - levels[i]) ** 2 - (f.slope(sides) - levels[i + 1]) ** 2
            pinned[i] = low <= 0 <= high
    if problem.last is not None:
        pinned[-1] = True
    return pinned


def _move_constants(problem: Problem, state: State, step: Array) -> State | None:
    old, c = state.boundaries, state.boundaries + step
    for jump in problem.jumps:
        c = np.where((old - jump) * (c - jump) < 0, jump, c)
    if not (np.all(np.isfinite(c)) and np.all(np.diff(c) > 0)):
        return None
    return State(c, state.values)


# --- Newton's method --------------------------------------------------------------------------------------------------


def _solve_tridiagonal(diagonal: Array, beside: Array, right: Array) -> Array:
    """Solves a symmetric tridiagonal system; raises LinAlgError if the matrix is not positive definite."""
    matrix = np.stack([np.append(0.0, beside), diagonal])
    return solveh_banded(matrix[-min(len(right), 2) :], right)


def evaluate(problem: Problem, state: State) -> Solution:
    """Error and derivatives of a state; degree 0 uses the best levels."""
    return (_evaluate_lines if problem.degree else _evaluate_constants)(problem, state)


def _descend(problem: Problem, state: State, steps: int = 200) -> Solution:
    """Runs a damped Newton's method to the last digits."""
    move = _move_lines if problem.degree else _move_constants
    best, damping = evaluate(problem, state), 1e-2
    for _ in range(steps):
        if len(best.scale) == 0 or best.residual < 1e-15:
            break
        diagonal, beside = best.hessian
        while damping < 1e12:
            trial = None
            with contextlib.suppress(LinAlgError):  # not positive definite yet
                step = _solve_tridiagonal(diagonal + damping * best.scale, beside, best.force)
                trial = move(problem, best.state, step)
            new = None if trial is None else evaluate(problem, trial)
            # Near the minimum the error no longer discriminates, but the force does.
            if new is not None and (
                new.error < best.error * (1 - 1e-13)
                or (new.error < best.error * (1 + 1e-12) and new.residual < 0.9 * best.residual)
            ):
                best, damping = new, damping / 10 if damping > 1e-12 else 0.0
                break
            damping = max(10 * damping, 1e-6)
        else:
            break
    return best


# --- The search -------------------------------------------------------------------------------------------------------


def _spread(problem: Problem, evenly: float) -> tuple[Array, Array]:
    """Mesh, and the cumulative density of boundaries over it that is asymptotically optimal for many boundaries.

    The error of a segment of length s is h''^2 s^3 / 12 (constants) or h''^2 s^5 / 720 (lines) times the density; it is
    made equal for all segments. A share `evenly` of the boundaries is spread evenly instead.
    """
    f, measure = problem.function, problem.measure
    mesh = measure.mesh if measure.continuous else spaced(measure.low, measure.high, 512)
    middle, width = (mesh[1:] + mesh[:-1]) / 2, np.diff(mesh)
    if measure.continuous:
        density = measure.density(middle)
    else:
        x, w = measure.nodes(mesh)
        window = np.ones(9)
        density = np.convolve(np.histogram(x, mesh, weights=w)[0], window, "same") / np.convolve(width, window, "same")
    mass = (f.bend(middle) ** 2 * density) ** (1 / (5 if problem.degree else 3)) * width
    even = np.diff(np.arcsinh(mesh))
    if not np.sum(mass) > 0:
        mass = even
    mass = (1 - evenly) * mass / np.sum(mass) + evenly * even / np.sum(even)
    return mesh, np.concatenate([[0.0], np.cumsum(mass)])


def _segment_costs(problem: Problem, grid: Array) -> tuple[Array, Array, Array]:
    """Errors of the best fits: [j, i] between grid points i < j; for the outer segments, up to and from each point."""
    f, cells = problem.function, len(grid) - 1
    x, w = problem.measure.nodes(grid)
    g = f.asymptote(x) + f.rest(x) if problem.degree else f.slope(x)
    cell = np.clip(np.searchsorted(grid, x) - 1, 0, cells - 1)

    def sums(values: Array) -> Array:
        return totals(cell, w * values, cells)

    mass = totals(cell, w, cells)
    mean_x, mean_g = _ratio(sums(x), mass), _ratio(sums(g), mass)
    dx, dg = x - mean_x[cell], g - mean_g[cell]
    parts = [mass, mean_x, mean_g, sums(dx**2), sums(dx * dg), sums(dg**2)]
    # Moments of cells i..j-1 for all i at once, about their means, since prefix sums would cancel.
    total = [np.zeros(cells) for _ in parts]
    costs = np.full((cells + 1, cells + 1), np.inf)
    for j in range(cells):
        m, mx, mg, xx, xg, gg = (t[: j + 1] for t in total)
        m1, x1, g1, xx1, xg1, gg1 = (p[j] for p in parts)
        ax, ag, share = x1 - mx, g1 - mg, _ratio(np.full_like(m, m1), m + m1)
        xx += xx1 + ax**2 * m * share
        xg += xg1 + ax * ag * m * share
        gg += gg1 + ag**2 * m * share
        mx += ax * share
        mg += ag * share
        m += m1
        fitted = _ratio(xg**2, xx) if problem.degree else 0.0
        costs[j + 1, : j + 1] = np.maximum(gg - fitted, 0.0)
    if not problem.matched:
        return costs, costs[:, 0], np.append(costs[-1, :-1], 0.0)
    sides = (f.left(x), f.right(x)) if problem.degree else (f.left.slope, f.right.slope)
    below, above = (sums((g - side) ** 2) for side in sides)
    return costs, np.append(0.0, np.cumsum(below)), np.append(np.cumsum(above[::-1])[::-1], 0.0)


def _grid_search(problem: Problem, count: int) -> Array:
    """Best boundaries on a grid, by dynamic programming."""
    grid = problem.measure.mesh
    if problem.measure.continuous or problem.degree or len(grid) > 2 * GRID:
        mesh, cumulative = _spread(problem, 0.1)
        candidates = np.interp(np.linspace(0, 1, GRID), cumulative, mesh)
        grid = np.unique(np.concatenate([candidates, problem.function.kinks]))
        grid = grid[(grid >= problem.measure.low) & (grid <= problem.measure.high)]
    costs, first, last = _segment_costs(problem, grid)
    value = first.copy()
    value[0] = np.inf
    back = np.zeros((count, len(grid)), int)
    for layer in range(1, count):
        total = costs + value
        back[layer] = np.argmin(total, axis=1)
        value = total[np.arange(len(grid)), back[layer]]
    last = last.copy()
    last[-1] = 0.0 if problem.last is not None else np.inf
    index = len(grid) - 1 if problem.last is not None else int(np.argmin(value + last))
    path = [index]
    for layer in range(count - 1, 0, -1):
        path.append(int(back[layer, path[-1]]))
    return grid[path[::-1]]


def _even(problem: Problem, count: int, offset: float = 0.5) -> Array:
    """Asymptotically optimal boundaries; the first is at the quantile `offset / count` of their density."""
    mesh, cumulative = _spread(problem, 0.0)
    c = np.interp((np.arange(count) + offset) / count, cumulative, mesh)
    if problem.last is not None:
        c[-1] = problem.last
    return c


def _exchanges(problem: Problem, solution: Solution) -> list[Array]:
    """Boundaries of a solution after moving one of them from one part of the real line to another.

    A part is an interval in which the levels rise or fall. Within each part the boundaries keep their relative density,
    which is close to the next minimum.
    """
    c, levels = step_of(problem, solution)
    parts = np.split(np.arange(len(c)), np.flatnonzero(np.diff(np.sign(np.diff(levels)))) + 1)
    beyond = c[[0, -1]] + (c[[0, -1]] - c[[1, -2]] if len(c) > 1 else np.array([-1.0, 1.0]))
    index = np.arange(-1.0, len(c) + 1)
    places = np.array([beyond[0], *c, beyond[1]])
    found = []
    for giver, taker in itertools.permutations(range(len(parts)), 2):
        new = []
        for i, part in enumerate(parts):
            count = len(part) + (i == taker) - (i == giver)
            share = np.arange(1, count + 1) / (count + 1)
            new.append(np.interp(part[0] - 1 + share * (len(part) + 1), index, places))
        start = np.concatenate(new)
        if problem.last is not None:
            start[-1] = problem.last
        found.append(start)
    return found


def _settle(problem: Problem, boundaries: Array) -> Solution | None:
    """The minimum near given boundaries."""
    if np.any(np.diff(_knots(problem, boundaries) if problem.degree else boundaries) <= 0):
        return None
    if not problem.degree:
        return _descend(problem, State(boundaries, np.zeros(len(boundaries) + 1)))
    return _descend(problem, _connect(problem, boundaries))


def _mirrored(problem: Problem, best: Solution) -> Solution:
    """Chooses one of two equally good mirror images, and symmetrizes solutions that differ from theirs by rounding."""
    c = best.state.boundaries
    if -c[0] > problem.measure.high or -c[-1] < problem.measure.low:
        return best  # fn need not be defined there
    other = _settle(problem, -c[::-1])
    if other is None or other.error > best.error * (1 + 1e-9):
        return best
    distance = np.abs(other.state.boundaries - c)
    if np.all(distance < 1e-9 * (1 + np.abs(c))):
        f = problem.function
        sign = 1.0 if f.rest(np.array([-1.0])) == f.rest(np.array([1.0])) or not problem.degree else -1.0
        values = (best.state.values + sign * best.state.values[::-1]) / 2
        even = evaluate(problem, State((c - c[::-1]) / 2, values))
        kept = even.error <= best.error * (1 + 1e-12) and even.residual <= max(2 * best.residual, 1e-12)
        return even if kept else best
    first = np.flatnonzero(distance >= 1e-9 * (1 + np.abs(c)))[0]
    return other if other.state.boundaries[first] < c[first] else best


def _polished(problem: Problem, boundaries: Array) -> Array:
    """Moves each boundary to the best place between its neighbours until none moves, for a sample."""
    candidates = problem.measure.mesh
    x, w = problem.measure.nodes(candidates)
    g = problem.function.slope(x)
    sums = [np.append(0.0, np.cumsum(w * v)) for v in (np.ones_like(g), g - np.mean(g))]
    # Number of points below each candidate, and the candidate index of each boundary.
    below = np.searchsorted(x, candidates, "right")
    place = np.searchsorted(candidates, boundaries)

    def gain(first: Index, last: Index) -> Array:
        mass, total = (of[last] - of[first] for of in sums)
        return _ratio(total**2, mass)

    for _ in range(100):
        old = place.copy()
        for i in range(len(place) - (problem.last is not None)):
            low = place[i - 1] if i else 0
            high = place[i + 1] if i + 1 < len(place) else len(candidates) - 1
            between = np.arange(low + 1, high)
            gains = gain(below[low], below[between]) + gain(below[between], below[high])
            here = gain(below[low], below[place[i]]) + gain(below[place[i]], below[high])
            if np.max(gains) > here * (1 + 1e-12):
                place[i] = between[np.argmax(gains)]
        if np.array_equal(old, place):
            break
    return candidates[place]


def _shaken(problem: Problem, best: Solution) -> Solution:
    """The best of the nearby minima: for a sample, the error has one wherever a boundary passes points."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        c = best.state.boundaries
        gap = np.min(np.diff(c)) if len(c) > 1 else 1.0
        start = np.sort(c + gap * 10 ** rng.uniform(-3, 0) * rng.uniform(-0.5, 0.5, len(c)))
        if problem.last is not None:
            start[-1] = problem.last
        other = _settle(problem, start)
        if other is not None and other.error < best.error:
            best = other
    return best


def solve(problem: Problem, bits: int) -> Solution:
    """The optimal step function with the given number of bits."""
    count, f = 2**bits - 1, problem.function
    if count == 1 and problem.degree and problem.matched:
        # The boundary is the intersection of the asymptotes.
        c = (
            problem.last
            if problem.last is not None
            else (f.left.offset - f.right.offset) / (f.right.slope - f.left.slope)
        )
        return evaluate(problem, _connect(problem, np.array([c])))
    starts = [_grid_search(problem, count)]
    if not problem.degree and not problem.measure.continuous:
        starts = [_polished(problem, starts[0])]
    if problem.degree:
        # The grid search may return a boundary at an inflection point of h where h~ has no kink; it would never move.
        starts += [_even(problem, count, offset) for offset in ((0.5, 0.25, 0.75) if count < 64 else (0.5,))]
    best = min((s for s in (_settle(problem, start) for start in starts) if s is not None), key=lambda s: s.error)
    improved = problem.measure.continuous or bool(problem.degree)
    while improved:
        others = (_settle(problem, start) for start in _exchanges(problem, best))
        better = next((s for s in others if s is not None and s.error < best.error * (1 - 1e-9)), None)
        best, improved = better or best, better is not None
    if problem.degree and not problem.measure.continuous:
        best = _shaken(problem, best)
    return best if problem.last is not None or not problem.measure.continuous else _mirrored(problem, best)


def step_of(problem: Problem, solution: Solution) -> tuple[Array, Array]:
    """Boundaries and levels of a solution."""
    state = solution.state
    return state.boundaries, _lines(problem, state)[1] if problem.degree else state.values


def error_over(problem: Problem, boundaries: Array) -> float:
    """The smallest error for given boundaries."""
    if not problem.degree:
        return _levels(problem, boundaries)[2]
    return evaluate(problem, _connect(problem, boundaries)).error


def certify(problem: Problem, boundaries: Array, levels: Array) -> tuple[float, float, float]:
    """Relative gradient and relative curvature at a step function, and the size of its constraint violation."""
    f, mismatch = problem.function, 0.0
    if problem.matched:
        mismatch = max(abs(levels[0] - f.left.slope), abs(levels[-1] - f.right.slope))
    if problem.last is not None:
        mismatch = max(mismatch, abs(boundaries[-1] - problem.last))
    if not problem.degree:
        solution = evaluate(problem, State(boundaries, levels))
        off = levels - solution.state.values
        _, mass, _ = _levels(problem, boundaries)
        gradient = float(np.hypot(solution.residual, np.sqrt(mass @ off**2 / max(solution.error, 1e-300))))
        return gradient, solution.curvature, float(mismatch)
    knots = _knots(problem, boundaries)
    inner = levels[1:-1] if problem.matched else levels
    start = f.left(knots[:1]) if problem.matched else np.zeros(1)
    heights = np.concatenate([start, start + np.cumsum(inner * np.diff(knots))])
    if problem.matched:
        if problem.last is None or len(knots) > 1:  # a single fixed boundary determines everything
            mismatch = max(mismatch, abs(float(heights[-1] - f.right(knots[-1:])[0])))
    else:  # the integration constant is free, so use the best one
        x, w = problem.measure.nodes(knots)
        heights += np.average(f.asymptote(x) + f.rest(x) - np.interp(x, knots, heights), weights=w)
    solution = evaluate(problem, State(boundaries, heights - f.asymptote(knots)))
    return solution.residual, solution.curvature, float(mismatch)
