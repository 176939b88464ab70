"""fit, its arguments and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..steps import StepFunction
from ._callables import from_callable
from ._functions import FUNCTIONS, Array, Function
from ._measure import Density, Measure, Points, spaced
from ._solve import Problem, certify, error_over, solve, step_of

__all__ = ["CRITERIA", "Certificate", "Fit", "fit", "measured"]

Criterion = Literal["primitive", "derivative"]
CRITERIA = ("primitive", "derivative")
Domain = tuple[float, float]

#: On the line, the integral ends where h is this close to its asymptote, and beyond it does not count.
NEGLIGIBLE = 1e-20


@dataclass(frozen=True)
class Certificate:
    """Evidence that a step function is a minimum: all figures have no unit.

    Attributes:
        gradient: Size of the gradient of the error: the cosine of the angle between the error and what a small change
            of the step function can change, 0 at a minimum.
        curvature: Smallest eigenvalue of the Hessian, relative to what it were if boundaries could not move; positive
            at a minimum. With many bits it is small, about 3 / levels^2: neighbours can move together.
        mismatch: By how much constraints are missed.
    """

    gradient: float
    curvature: float
    mismatch: float

    @property
    def optimal(self) -> bool:
        """Whether this is a minimum: to six digits of the boundaries or better."""
        return self.gradient < 1e-7 and self.mismatch < 1e-7 and self.curvature > 0


@dataclass(frozen=True)
class Fit:
    """A best step function.

    Attributes:
        step: The step function.
        error: L2 norm of the error: the root of the integral of (h - h~)^2 or (h' - step)^2. A Gaussian and a sample
            have mass 1, the line and a domain have density 1.
        criterion: What was minimised.
        certificate: Evidence that it is a minimum.
    """

    step: StepFunction
    error: float
    criterion: str
    certificate: Certificate
    _problem: Problem = field(repr=False, compare=False)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Of the step function."""
        return self.step.boundaries

    @property
    def levels(self) -> tuple[float, ...]:
        """Of the step function."""
        return self.step.levels

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.step.bits

    def certify(self, step: StepFunction) -> Certificate:
        """The certificate of another step function for the same function, criterion and density."""
        return Certificate(*certify(self._problem, np.array(step.boundaries), np.array(step.levels)))

    def check(self, trials: int = 100, seed: int = 0) -> bool:
        """Whether no random change of the boundaries, of 1e-4 to 0.3 of their distances, lowers the error.

        Everything else is as good as it can be with the boundaries so changed.
        """
        rng = np.random.default_rng(seed)
        c = np.array(self.boundaries)
        gaps = np.diff(c)
        reach = np.minimum(np.append(gaps[:1], gaps), np.append(gaps, gaps[-1:])) if len(c) > 1 else np.ones(1)
        problem = self._problem
        fixed = np.zeros(len(c), bool)
        if problem.last is not None:
            fixed[-1] = True
        if problem.degree and problem.matched and len(c) == 1:
            fixed[:] = True  # where the asymptotes meet
        for _ in range(trials):
            moved = c + rng.uniform(-0.5, 0.5, len(c)) * reach * 10 ** rng.uniform(-4, -0.3)
            moved[fixed] = c[fixed]
            if error_over(problem, moved) < self.error**2 * (1 - 1e-9):
                return False
        return True


def _fail(sentence: str) -> ValueError:
    return ValueError(f"lomem.fit.fit: {sentence}")


# --- Densities --------------------------------------------------------------------------------------------------------


def _reach(f: Function, *, exact: bool) -> Domain:
    """From where to where h differs from its asymptotes; `exact`: rest has digits of its own where it is small."""
    powers: Array = 2.0 ** np.arange(-2.0, 100 if exact else 10)
    ends = []
    for side in (-1.0, 1.0):
        away = np.flatnonzero(np.abs(f.rest(side * powers)) > (NEGLIGIBLE if exact else 1e-12))
        ends.append(side * max(4.0, 2 * float(powers[away[-1]]) if len(away) else 0.0))
    return ends[0], ends[1]


def _mesh(f: Function, low: float, high: float) -> Array:
    """Edges of panels on each of which h' is, nearly enough, a polynomial."""
    wide = spaced(low, high, int(np.ceil((np.arcsinh(high) - np.arcsinh(low)) / 0.1)) + 1)
    even = np.linspace(low, high, 65) if high - low < 100 else np.empty(0)
    kinks = [k for k in f.kinks if low < k < high]
    mesh = np.unique(np.concatenate([[low, high], wide, even, kinks]))
    for _ in range(40):  # until halving a panel does not change its integral
        middle = (mesh[1:] + mesh[:-1]) / 2

        def integrals(edges: Array) -> Array:
            x, w = Density(edges, np.ones_like).nodes(edges)
            return (w * f.slope(x) ** 2).reshape(len(edges) - 1, -1).sum(axis=1)

        whole, halves = integrals(mesh), integrals(np.sort(np.concatenate([mesh, middle])))
        off = np.abs(halves[::2] + halves[1::2] - whole)
        split = (off > 1e-13 * (np.max(whole) + whole)) & (np.diff(mesh) > 1e-12 * (1 + np.abs(middle)))
        if not np.any(split):
            break
        mesh = np.sort(np.concatenate([mesh, middle[split]]))
    return mesh


def _array(name: str, values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        result = np.asarray(values, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise _fail(f"{name} is {values!r}, expected numbers") from error
    if len(result) == 0:
        raise _fail(f"{name} is empty, expected numbers")
    if not np.all(np.isfinite(result)):
        raise _fail(f"{name} contains {result[~np.isfinite(result)][0]}, expected finite numbers")
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _gaussian(f: Function, mean: float, std: float, domain: Domain | None, reach: Domain) -> Measure:
    if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
        raise _fail(f"density is ({mean}, {std}), expected a finite mean and a positive standard deviation")
    low, high = domain or (min(mean - 10 * std, reach[0]), max(mean + 10 * std, reach[1]))

    def bell(x: Array) -> Array:
        return np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))

    fine = mean + std * np.linspace(-10, 10, 129)
    mesh = np.union1d(_mesh(f, low, high), fine[(fine > low) & (fine < high)])
    mass = float(np.sum(Density(mesh, bell).nodes(mesh)[1])) if domain else 1.0
    if not mass > 1e-12:
        raise _fail(f"domain is {domain}, expected one in which density ({mean}, {std}) has mass")
    return Density(mesh, lambda x: bell(x) / mass)


def _histogram(f: Function, density: tuple[Any, Any], domain: Domain | None, reach: Domain) -> Measure:
    places, weights = _array("density[0]", density[0]), _array("density[1]", density[1])
    if np.any(weights < 0) or not np.sum(weights) > 0:
        raise _fail("density[1] has negative entries or no mass, expected weights")
    if len(places) == len(weights):
        return _points(places, weights, domain, reach)
    if len(places) != len(weights) + 1:
        raise _fail(
            f"density has {len(places)} places and {len(weights)} weights, expected as many (points) or one place more "
            "(edges of bins)"
        )
    if np.any(np.diff(places) <= 0):
        raise _fail("density[0] has edges of bins that do not ascend, expected ascending ones")
    low, high = domain or (min(places[0], reach[0]), max(places[-1], reach[1]))
    heights = np.concatenate([[0.0], weights / np.sum(weights) / np.diff(places), [0.0]])

    def bars(x: Array) -> Array:
        return heights[np.searchsorted(places, x)]

    mesh = np.union1d(_mesh(f, low, high), places[(places > low) & (places < high)])
    mass = float(np.sum(Density(mesh, bars).nodes(mesh)[1]))
    if not mass > 0:
        raise _fail(f"domain is {domain}, expected one in which density has mass")
    return Density(mesh, lambda x: bars(x) / mass)


def _points(x: Array, weights: Array, domain: Domain | None, reach: Domain) -> Measure:
    inside = weights > 0
    if domain is not None:
        inside &= (x >= domain[0]) & (x <= domain[1])
    if not np.any(inside):
        raise _fail(f"domain is {domain}, expected one that contains some of the sample")
    return Points(x[inside], weights[inside] / np.sum(weights[inside]), reach)


def _measure(f: Function, density: Any, domain: Domain | None, exact: bool) -> Measure:
    reach = _reach(f, exact=exact) if f.asymptotic else (-4.0, 4.0)
    if isinstance(density, str) and density == "uniform":
        low, high = domain or reach
        return Density(_mesh(f, low, high), np.ones_like)
    # Boundaries may be where nothing counts, if not arbitrarily far away.
    reach = max(reach[0], -32.0), min(reach[1], 32.0)
    if isinstance(density, str) and density == "gaussian":
        return _gaussian(f, 0.0, 1.0, domain, reach)
    if isinstance(density, str) or density is None:
        raise _fail(
            f"density is {density!r}, expected 'uniform', 'gaussian', (mean, std), a sample or (places, weights)"
        )
    if isinstance(density, tuple) and len(density) == 2:
        if all(_is_number(value) for value in density):
            return _gaussian(f, float(density[0]), float(density[1]), domain, reach)
        return _histogram(f, density, domain, reach)
    sample = _array("density", density)
    return _points(sample, np.ones(len(sample)), domain, reach)


def _function(fn: Any, domain: Domain | None) -> Function:
    if isinstance(fn, str) and fn in FUNCTIONS:
        return FUNCTIONS[fn]()
    if callable(fn):
        return from_callable(fn, *(domain or (-64.0, 64.0)))
    raise _fail(f"fn is {fn!r}, expected a callable or one of {', '.join(FUNCTIONS)}")


def measured(fn: str | Callable[[Tensor], Tensor], density: Any) -> tuple[Function, Array, Array]:
    """An activation, and the places and weights of means over a density."""
    f = _function(fn, None)
    measure = _measure(f, density, None, isinstance(fn, str))
    return f, *measure.nodes(measure.mesh)


def _below(measure: Measure, last: float) -> Measure:
    """The measure up to `last`, above which nothing is left to fit."""
    mesh = np.append(measure.mesh[measure.mesh < last], last)
    if isinstance(measure, Points):
        inside = measure.x < last
        return Points(measure.x[inside], measure.weights[inside], (measure.low, last)) if np.any(inside) else measure
    return Density(mesh, measure.density)


# --- fit --------------------------------------------------------------------------------------------------------------


def fit(
    fn: str | Callable[[Tensor], Tensor],
    bits: int,
    *,
    criterion: Criterion = "primitive",
    density: Any = "uniform",
    domain: tuple[float, float] | None = None,
) -> Fit:
    r"""The best step function for the derivative of an activation.

    h is the activation, h~ a continuous, piecewise linear function with 2^bits - 1 boundaries, whose derivative is the
    step function. A criterion and a density say what is best:

    - ``"primitive"`` (Yang et al., ICML 2024, arXiv:2406.16282) minimises the integral of (h - h~)^2, h~ being the left
      asymptote of h below the first boundary and the right one above the last.
    - ``"derivative"`` (FewBit, Novikov et al., arXiv:2202.00441) minimises the integral of (h' - step)^2. On the line,
      the outermost levels are the slopes of the asymptotes.

    On a finite domain the outermost pieces are free for both criteria, and so they are for ``"derivative"`` under a
    Gaussian or a sample. With one bit the asymptotes leave ``"primitive"`` no choice: the boundary is where they meet.
    If they are parallel (sigmoid, tanh, softsign), they are not matched but free under a Gaussian or a sample, and on
    the line there is no such step function of one bit. The tables that the library ships have in its place the best one
    under the standard normal density.

    The result is the same each time: a search by dynamic programming among a thousand places for boundaries, then
    Newton's method to the last digits; for ``"primitive"``, boundaries are also moved between the convex and concave
    parts of h as long as that helps. A fit takes a second or so, with 8 bits several.

    Args:
        fn: Name of an activation, with torch's default arguments: ``"celu"``, ``"elu"``, ``"exp"`` (e^x - 1 below 0, x
            above, with a boundary at 0: its levels below 0, scaled by alpha, are those of an ELU), ``"gelu"``,
            ``"gelu_tanh"``, ``"hardswish"``, ``"logsigmoid"``, ``"mish"``, ``"quick_gelu"`` (x sigmoid(1.702 x)),
            ``"selu"`` (also with a boundary at 0), ``"sigmoid"``, ``"silu"``, ``"softplus"``, ``"softsign"``,
            ``"tanh"``, ``"tanhshrink"``. Or an elementwise function of a float64 tensor that autograd can
            differentiate; on the line it has to keep to its asymptotes from 512 and -512 on.
        bits: Of a code, 1 to 8.
        criterion: ``"primitive"`` or ``"derivative"``.
        density: Where errors count: ``"uniform"``; ``"gaussian"``, the standard normal one; a tuple (mean, standard
            deviation) of a Gaussian; a sample, as a tensor, an array or a list; or a tuple of points and weights, or of
            edges of bins and weights.
        domain: From where to where errors count; None for the line.

    Raises:
        ValueError: If an argument is not as described, or no such step function exists.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 8:
        raise _fail(f"bits is {bits!r}, expected 1 to 8")
    if criterion not in CRITERIA:
        raise _fail(f"criterion is {criterion!r}, expected 'primitive' or 'derivative'")
    if domain is not None:
        ends = _array("domain", domain)
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise _fail(f"domain is {domain!r}, expected (low, high) with low below high")
        domain = float(ends[0]), float(ends[1])
    f = _function(fn, domain)
    line = isinstance(density, str) and density == "uniform" and domain is None
    if line and not f.asymptotic:
        raise _fail("fn has no asymptotes that it keeps to from |x| = 512 on, expected a domain or another density")
    measure = _measure(f, density, domain, isinstance(fn, str))
    degree = 1 if criterion == "primitive" else 0
    last = f.last if f.last is not None and measure.low < f.last < measure.high else None
    if last is not None:
        measure = _below(measure, last)
    matched = line or (degree == 1 and f.asymptotic and (domain is None or last is not None))
    if bits == 1 and matched and f.left.slope == f.right.slope:
        if line:
            raise _fail(
                f"bits is 1, expected at least 2 on the line: both levels would be {f.left.slope:g}, the slope of both "
                "asymptotes"
            )
        matched = False
    if isinstance(measure, Points) and len(measure.x) < 2**bits:
        raise _fail(f"density has {len(measure.x)} distinct values, expected at least {2**bits} for {bits} bits")
    sides = [(k, f.slope(np.nextafter(k, [-np.inf, np.inf]))) for k in f.kinks]
    jumps = tuple(k for k, (left, right) in sides if abs(left - right) > 1e-9)

    problem = Problem(f, degree, measure, matched, jumps, last)
    solution = solve(problem, int(bits))
    boundaries, levels = step_of(problem, solution)
    return Fit(
        StepFunction(tuple(boundaries), tuple(levels)),
        float(np.sqrt(solution.error)),
        criterion,
        Certificate(*certify(problem, boundaries, levels)),
        problem,
    )
