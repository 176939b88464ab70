"""The function fit, its arguments and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ..functional import gelu
from ..nn.activations import WithSteps
from ..steps import StepFunction
from ._callables import from_callable
from ._densities import array, below, fail, measure_of
from ._functions import FUNCTIONS, Array, Function
from ._measure import Points
from ._solve import Problem, certify, error_over, solve, step_of

__all__ = ["CRITERIA", "Certificate", "Fit", "fit", "measured"]

Criterion = Literal["primitive", "derivative"]
CRITERIA = ("primitive", "derivative")


@dataclass(frozen=True)
class Certificate:
    """Evidence that a step function is a minimum of the error. All values are dimensionless.

    The error of ``"primitive"`` over a sample has kinks where a boundary passes a value of the sample. At a minimum in
    such a kink the gradient is not 0; use :meth:`Fit.check` instead.

    Attributes:
        gradient: Size of the gradient of the error: the cosine of the angle between the error and the directions in
            which a small change of the step function can change it; 0 at a minimum.
        curvature: Smallest eigenvalue of the Hessian, relative to the value for fixed boundaries; positive at a
            minimum. With many bits it is small, about 3 / levels^2, since neighbouring boundaries can move together.
        mismatch: Size of the constraint violation.
    """

    gradient: float
    curvature: float
    mismatch: float

    @property
    def optimal(self) -> bool:
        """Whether this is a minimum, to six or more digits of the boundaries."""
        return self.gradient < 1e-7 and self.mismatch < 1e-7 and self.curvature > -1e-9


@dataclass(frozen=True)
class Fit:
    """An optimal step function.

    Attributes:
        step: The step function.
        error: L2 norm of the error: the square root of the integral of (h - h~)^2 or (h' - step)^2. A Gaussian and a
            sample have mass 1; the real line and a domain have density 1.
        criterion: Criterion that was minimised.
        certificate: Evidence that the step function is a minimum.
    """

    step: StepFunction
    error: float
    criterion: str
    certificate: Certificate
    _problem: Problem = field(repr=False, compare=False)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Boundaries of the step function."""
        return self.step.boundaries

    @property
    def levels(self) -> tuple[float, ...]:
        """Levels of the step function."""
        return self.step.levels

    @property
    def bits(self) -> int:
        """Number of bits per code."""
        return self.step.bits

    def certify(self, step: StepFunction) -> Certificate:
        """The certificate of another step function for the same function, criterion and density."""
        return Certificate(*certify(self._problem, np.array(step.boundaries), np.array(step.levels)))

    def check(self, trials: int = 100, seed: int = 0) -> bool:
        """Whether no random change of the boundaries lowers the error.

        The changes are 1e-4 to 0.3 times the distances between boundaries. The levels are optimized for the changed
        boundaries each time.

        Args:
            trials: Number of random changes.
            seed: Seed of the random changes.
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
            if problem.degree and problem.matched:
                moved = np.clip(moved, problem.measure.low, problem.measure.high)
            if error_over(problem, moved) < self.error**2 * (1 - 1e-9):
                return False
        return True


def _function(fn: Any, domain: tuple[float, float] | None) -> Function:
    if isinstance(fn, WithSteps):
        fn = fn.exact  # autograd would return the step function as the derivative of fn itself
    elif getattr(fn, "__module__", None) == gelu.__module__ and fn.__name__ in FUNCTIONS:
        fn = fn.__name__
    if isinstance(fn, str) and fn in FUNCTIONS:
        return FUNCTIONS[fn]()
    if callable(fn):
        return from_callable(fn, *(domain or (-64.0, 64.0)))
    raise fail(f"fn is {fn!r}, expected a callable or one of {', '.join(FUNCTIONS)}")


def measured(fn: str | Callable[[Tensor], Tensor], density: Any) -> tuple[Function, Array, Array]:
    """Returns an activation, and the nodes and weights for means over a density."""
    f = _function(fn, None)
    measure = measure_of(f, density, None, isinstance(fn, str))
    return f, *measure.nodes(measure.mesh)


def fit(
    fn: str | Callable[[Tensor], Tensor],
    bits: int,
    *,
    criterion: Criterion = "derivative",
    density: Any = "uniform",
    domain: tuple[float, float] | None = None,
) -> Fit:
    r"""Finds the optimal step function for the derivative of an activation.

    h is the activation, and h~ a continuous, piecewise linear function with 2^bits - 1 boundaries, whose derivative is
    the step function. The criterion and the density define the error to minimise:

    - ``"primitive"`` (Yang et al., ICML 2024, arXiv:2406.16282) minimises the integral of (h - h~)^2, where h~ equals
      the left asymptote of h below the first boundary and the right one above the last.
    - ``"derivative"`` (FewBit, Novikov et al., arXiv:2202.00441) minimises the integral of (h' - step)^2. On the real
      line, the outermost levels are the slopes of the asymptotes.

    The outermost pieces are free on a finite domain, and for ``"derivative"`` also under a Gaussian or a sample. For
    ``"primitive"`` under a Gaussian or a sample they match the asymptotes, and the outermost boundaries stay where the
    density counts (8 standard deviations, or the sample) or h differs visibly from its asymptotes. Otherwise, with few
    bits, the pieces next to the asymptotes would become parallel to them and meet them only at infinity. For a callable
    without asymptotes the outermost pieces are free.

    With one bit, the asymptotes fully determine ``"primitive"``: the boundary is their intersection. If they are
    parallel (as of a sigmoid), the outer pieces are free under a Gaussian or a sample; on the real line, no
    such one-bit step function exists for either criterion, and the library's tables contain the optimal one under the
    standard normal density instead.

    The result is deterministic: dynamic programming over about a thousand candidate boundaries, followed by Newton's
    method to the last digits. For ``"primitive"``, boundaries are also moved between the convex and concave parts of h
    as long as this lowers the error. A fit takes about a second, with 8 bits several.

    Args:
        fn: Name of a function of :mod:`lomem.functional` with argument ``bits``, such as ``"gelu"``, with torch's
            default arguments; also ``"gelu_tanh"``, and ``"exp"`` (e^x - 1 below 0, x above, with a boundary at 0: its
            levels below 0, scaled by alpha, suit an ELU). Or an elementwise function of a float64 tensor that autograd
            can differentiate; on the real line it must follow its asymptotes for abs(x) from 512 on.
        bits: Number of bits per code, 1 to 8.
        criterion: ``"primitive"`` or ``"derivative"``.
        density: Weight of the errors: ``"uniform"``; ``"gaussian"``, the standard normal density; a tuple (mean,
            standard deviation) of a Gaussian; a sample, as a tensor, array or list (more than 4096 distinct values are
            grouped with their neighbours); or a tuple of points and weights, or of bin edges and weights.
        domain: Interval (low, high) outside which errors do not count; None for the real line.

    Returns:
        The step function, its error and a certificate of optimality.

    Raises:
        ValueError: If an argument is not as described, or no such step function exists.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 8:
        raise fail(f"bits is {bits!r}, expected 1 to 8")
    if criterion not in CRITERIA:
        raise fail(f"criterion is {criterion!r}, expected 'primitive' or 'derivative'")
    if domain is not None:
        ends = array("domain", domain)
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise fail(f"domain is {domain!r}, expected (low, high) with low below high")
        domain = float(ends[0]), float(ends[1])
    f = _function(fn, domain)
    line = isinstance(density, str) and density == "uniform" and domain is None
    if line and not f.asymptotic:
        raise fail("fn does not follow asymptotes from |x| = 512 on, expected a domain or another density")
    with np.errstate(all="ignore"):  # non-finite values raise below
        measure = measure_of(f, density, domain, isinstance(fn, str))
    degree = 1 if criterion == "primitive" else 0
    last = f.last if f.last is not None and measure.low < f.last < measure.high else None
    if last is not None:
        measure = below(measure, last)  # h is linear above
    matched = line or (degree == 1 and f.asymptotic and (domain is None or last is not None))
    if bits == 1 and matched and f.left.slope == f.right.slope:
        if line:
            raise fail(
                f"bits is 1, expected at least 2 on the real line: both levels would be {f.left.slope:g}, the slope of "
                "both asymptotes"
            )
        matched = False
    if isinstance(measure, Points) and len(measure.x) < 2**bits:
        where = "" if last is None else f" below {last:g}"
        raise fail(f"density has {len(measure.x)} distinct values{where}, expected at least {2**bits} for {bits} bits")
    x = measure.nodes(measure.mesh)[0]
    with np.errstate(all="ignore"):
        finite = np.isfinite(f.rest(x) ** 2 + f.slope(x) ** 2 + f.bend(x) ** 2)
    if not np.all(finite):
        raise fail(f"fn or a derivative of it is not finite, or its square overflows, at {x[np.argmin(finite)]:g}")
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
