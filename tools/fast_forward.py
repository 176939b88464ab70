"""Writes fast_forward_tables.h: polynomials of the fast float32 forward pass of GELU and SiLU.

Each function is max(x, 0) - W(|x|), with W(a) = a Phi(-a) for GELU and a / (1 + exp(w(a))) for tanh-GELU and SiLU. W is
evaluated from a table of polynomials around evenly spaced a. Every fit is minimax in relative error (Remez exchange
with 40 digits). Its coefficients are rounded to float32 from the highest down, and the lower ones are refitted each
time; the lowest three of a row are then moved by an ulp or two if that lowers the error of the float32 evaluation
itself. The output is identical on every machine.

Requires mpmath and numpy; takes less than a minute.

    python tools/fast_forward.py             # write the header
    python tools/fast_forward.py --check     # exit 1 if the header is out of date
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath as mp
import numpy as np

HEADER = Path(__file__).resolve().parents[1] / "cpp/include/lomem/core/fast_forward_tables.h"
F = np.float32
Real = Callable[[mp.mpf], mp.mpf]

mp.mp.dps = 40

DEGREE = 5
ROWS = 32
# Fewer rows per unit reach further (W is 5e-9 where the last row begins); more rows per unit are closer to W.
SILU_ROWS_A_UNIT = F(11 / 8)
TAIL_MAGIC = F(1.5 * 2**23)  # the low bits of x + magic hold x rounded to an integer, ties to even

GOLDEN = (math.sqrt(5) - 1) / 2

TANH_SCALE = mp.sqrt(8 / mp.pi)  # tanh-GELU is x sigmoid(TANH_SCALE (x + TANH_CUBIC x^3))
TANH_CUBIC = mp.mpf("0.044715")


def gelu_tail(a: mp.mpf) -> mp.mpf:
    """Returns a Phi(-a)."""
    return a * mp.erfc(a / mp.sqrt(2)) / 2


def gelu_tanh_tail(a: mp.mpf) -> mp.mpf:
    """Returns gelu_tail of the tanh approximation."""
    return a / (1 + mp.exp(TANH_SCALE * (a + TANH_CUBIC * a**3)))


def silu_tail(a: mp.mpf) -> mp.mpf:
    """Returns a sigmoid(-a)."""
    return a / (1 + mp.exp(a))


def horner(coefficients: list, t):
    """Evaluates sum_k coefficients[k] t^k, each operation rounded in t's type."""
    value = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        value = value * t + c
    return value


def remez(target: Real, weight: Real, terms: int, low: mp.mpf, high: mp.mpf) -> tuple[list[mp.mpf], mp.mpf]:
    """Minimises the maximum of |weight(t) (p(t) - target(t))| over polynomials p with the given number of terms.

    Returns p's coefficients from the constant up, and that maximum to a tenth of a percent.
    """

    def error(t, f, w):
        return w * (horner(p, t) - f)

    def peak(sample, errors, i):
        """Returns the vertex of the parabola through three errors if it is larger than the middle error."""
        if 0 < i < len(sample) - 1:
            left, right = sample[i] - sample[i - 1], sample[i] - sample[i + 1]
            rise, fall = errors[i] - errors[i - 1], errors[i] - errors[i + 1]
            divisor = left * fall - right * rise
            if divisor != 0:
                t = sample[i] - (left**2 * fall - right**2 * rise) / divisor / 2
                if sample[i - 1] < t < sample[i + 1]:
                    return max((abs(errors[i]), sample[i]), (abs(error(t, target(t), weight(t))), t))
        return abs(errors[i]), sample[i]

    last = 16 * (terms + 1)
    sample = [low + (high - low) * (1 - mp.cos(mp.pi * j / last)) / 2 for j in range(last + 1)]
    values = [(target(t), weight(t)) for t in sample]
    # Off by one, since the weight may be zero in the middle.
    points = [sample[min(j * last // terms + 1, last)] for j in range(terms + 1)]
    for _ in range(50):
        system, right_side = mp.matrix(terms + 1, terms + 1), mp.matrix(terms + 1, 1)
        for row, t in enumerate(points):
            f, w = target(t), weight(t)
            for k in range(terms):
                system[row, k] = w * t**k
            system[row, terms] = (-1) ** row
            right_side[row] = w * f
        *p, level = mp.lu_solve(system, right_side)

        errors = [error(t, f, w) for t, (f, w) in zip(sample, values, strict=True)]
        runs = [list(run) for _, run in itertools.groupby(range(len(sample)), key=lambda i: errors[i] > 0)]
        peaks = [peak(sample, errors, max(run, key=lambda i: abs(errors[i]))) for run in runs]
        maximum = max(peaks)[0]
        if maximum <= abs(level) * mp.mpf("1.001"):
            return p, maximum
        if len(peaks) <= terms:
            break
        while len(peaks) > terms + 1:  # signs must keep alternating
            if len(peaks) == terms + 2:
                del peaks[0 if peaks[0] < peaks[-1] else -1]
                break
            i = peaks.index(min(peaks))
            if 0 < i < len(peaks) - 1:
                i -= peaks[i - 1] < peaks[i + 1]
                del peaks[i : i + 2]
            else:
                del peaks[i]
        points = [t for _, t in peaks]
    raise ArithmeticError(f"no equal ripple on [{mp.nstr(low, 5)}, {mp.nstr(high, 5)}]")


def rounded_remez(target: Real, weight: Real, terms: int, low, high) -> tuple[list[np.float32], mp.mpf]:
    """Fits like remez but with float32 coefficients; returns them and the error before rounding."""
    _, best = remez(target, weight, terms, low, high)
    rounded: list[np.float32] = []  # in ascending order; lower ones are still missing
    for missing in range(terms, 0, -1):
        known = [mp.mpf(0)] * missing + [mp.mpf(float(c)) for c in rounded]
        p, _ = remez(lambda t, known=known: target(t) - horner(known, t), weight, missing, low, high)
        rounded.insert(0, F(p[-1]))
    return rounded, best


# The float32 evaluation.


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a b + c: the product is exact, the sum is rounded to float64 and then to float32."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F)


@dataclass(frozen=True)
class Tail:
    """W on ROWS intervals around the multiples of 1 / rows_a_unit; the last row is zero."""

    exact: Real
    rows_a_unit: np.float32

    @property
    def clamp(self) -> np.float32:
        """Centre of the row that is zero."""
        return F((ROWS - 1) / float(self.rows_a_unit))

    @property
    def edge(self) -> float:
        """Start of the row that is zero."""
        return (ROWS - 1.5) / float(self.rows_a_unit)

    def fit(self) -> tuple[np.ndarray, list[float]]:
        """Returns the coefficients, [DEGREE + 1][ROWS], and the relative error of each row before rounding."""
        rows, errors = zip(*(self._fit_row(row) for row in range(ROWS - 1)), strict=True)
        return np.array([*rows, [F(0)] * (DEGREE + 1)]).T, list(errors)

    def evaluate(self, table: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Returns W(a) by table, for 0 <= a <= clamp."""
        shifted = fma(a, self.rows_a_unit, TAIL_MAGIC)
        t = fma(a, self.rows_a_unit, TAIL_MAGIC - shifted)
        row = shifted.view(np.int32) & (ROWS - 1)
        w = table[DEGREE][row]
        for c in table[DEGREE - 1 :: -1]:
            w = fma(w, t, c[row])
        return w

    def _fit_row(self, row: int) -> tuple[list[np.float32], float]:
        half = mp.mpf(1) / 2

        def exact(t):
            return self.exact((row + t) / mp.mpf(float(self.rows_a_unit)))

        if row > 0:
            fit, error = rounded_remez(exact, lambda t: 1 / exact(t), DEGREE + 1, -half, half)
            return self._tune(fit, row), float(error)

        # No constant term, and error relative to W ~ a / 2: fit W / t, with its limit at zero.
        def exact_slope(t):
            t = t or mp.mpf(10) ** -30
            return exact(t) / t

        fit, error = rounded_remez(exact_slope, lambda t: 1 / exact_slope(t), DEGREE, mp.mpf(0), half)
        return [F(0), *fit], float(error)

    def _tune(self, fit: list[np.float32], row: int) -> list[np.float32]:
        """Moves the lowest three coefficients by a few ulps to minimise the float32 error on a sample."""
        spread = np.arange(1, 257) * GOLDEN % 1 - 0.5  # irregular, since numbers on a regular grid have few bits
        a = ((row + spread) / float(self.rows_a_unit)).astype(F)
        exact = np.array([float(self.exact(mp.mpf(float(v)))) for v in a])

        def error(low):
            table = np.repeat(np.array([*low, *fit[3:]])[:, None], ROWS, axis=1)
            return np.abs(self.evaluate(table, a) / exact - 1).max()

        def nearby(c, ulps):  # c first, since min returns the first of equal candidates
            return [F(c + step * np.spacing(c)) for step in sorted(range(-ulps, ulps + 1), key=abs)]

        candidates = itertools.product(nearby(fit[0], 1), nearby(fit[1], 2), nearby(fit[2], 2))
        return [*min(candidates, key=error), *fit[3:]]


def evaluate(table: np.ndarray, tail: Tail, x: np.ndarray) -> np.ndarray:
    """Returns max(x, 0) - W(|x|) by table."""
    a = np.abs(x)
    a = np.where(a < tail.clamp, a, tail.clamp)
    return np.where(x < 0, F(0), x) - tail.evaluate(table, a)


# Errors.

GELU_RANGES = {  # the first is measured absolutely
    "x < -5.5": (-3.4e38, -5.5),
    "-5.5 .. -3.375": (-5.5, -3.375),
    "-3.375 .. 0": (-3.375, -1e-30),
    "x > 0": (1e-30, 3.4e38),
}
SILU_RANGES = {
    "x < -22.18": (-3.4e38, -22.18),
    "-22.18 .. -5.5": (-22.18, -5.5),
    "-5.5 .. 0": (-5.5, -1e-30),
    "x > 0": (1e-30, 3.4e38),
}
BITS16 = np.arange(2**16, dtype=np.uint32)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """Returns GELU in float64."""
    return x * np.array([math.erfc(v) for v in -x * math.sqrt(0.5)]) / 2


def exact_silu(x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
    """Returns x sigmoid(w) in float64; w defaults to x."""
    return x / (1 + np.exp(np.minimum(-(x if w is None else w), 700)))


def exact_gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Returns tanh-GELU in float64."""
    return exact_silu(x, float(TANH_SCALE) * (x + float(TANH_CUBIC) * x**3))


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds finite float32 numbers to bfloat16, to nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(F)


def inputs(dtype: str, low: float, high: float) -> np.ndarray:
    """Returns all numbers of a 16-bit dtype in an interval, or a sample of float32 numbers."""
    if dtype == "float32":
        magnitudes = np.clip(np.abs([low, high]), 2.0**-16, 32)
        first, last = sorted(magnitudes.astype(F).view(np.uint32).tolist())
        spread = np.arange(1, 2**20 + 1) * GOLDEN % 1  # a regular step can miss the worst roundings
        x = (first + spread * (last - first)).astype(np.uint32).view(F)
        return -x if high <= 0 else x
    with np.errstate(invalid="ignore"):
        x = BITS16.astype(np.uint16).view(np.float16).astype(F) if dtype == "float16" else (BITS16 << 16).view(F)
    return x[(x >= low) & (x < high) & (x != 0)]


def errors(function, exact, dtype: str, low: float, high: float) -> tuple[float, float]:
    """Returns the largest error in ulps of the exact result in the dtype, and the largest absolute error."""
    digits, smallest = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}[dtype]
    x = inputs(dtype, low, high)
    y = function(x)
    y = {"float32": lambda y: y, "bfloat16": round_bfloat16, "float16": lambda y: y.astype(np.float16)}[dtype](y)
    reference = exact(x.astype(np.float64))
    error = np.abs(y - reference)
    exponent = np.maximum(np.frexp(reference)[1] - 1, smallest)
    return float((error / np.ldexp(1.0, exponent - digits + 1)).max()), float(error.max())


def error_table(ranges: dict, functions: dict) -> str:
    """Returns a table of errors: ulps, and the largest error in the first range."""
    lines = ["".join([f"{'':20}", *(f"{name:>16}" for name in ranges)])]
    for name, (table, tail, exact) in functions.items():
        for dtype in ("float32", "bfloat16", "float16"):
            cells = []
            for low, high in ranges.values():
                ulps, error = errors(lambda x, c=table, tail=tail: evaluate(c, tail, x), exact, dtype, low, high)
                cells.append(f"{ulps:.{3 if ulps < 1 else 1}f} ulp" if cells else f"{error:.1e}")
            lines.append("".join([f"{name:<11}{dtype:<9}", *(f"{cell:>16}" for cell in cells)]))
    return "\n".join(f"//     {line}" for line in lines)


# The header.

TEMPLATE = """\
// Polynomials for a fast float32 forward of GELU, tanh-GELU and SiLU. Written by
//     python tools/fast_forward.py
// which documents how they are fitted. Host only: device code cannot index a constexpr array at run time.
//
// Each function is max(x, 0) - W(|x|), computed in float32 operations that are each rounded once, so that all
// instruction sets return the same bits (X is gelu, gelu_tanh or silu, and fma is the fused multiply-add):
//     a = |x| < X_clamp ? |x| : X_clamp
//     shifted = fma(a, X_rows_a_unit, tail_magic)         its low five bits are the row: the integer
//     t = fma(a, X_rows_a_unit, tail_magic - shifted)     next to a * X_rows_a_unit; |t| <= 1/2
//     w = X_tail[5][row]; w = fma(w, t, X_tail[4][row]); ... ; w = fma(w, t, X_tail[0][row])
//     y = (x < 0 ? 0 : x) - w
// Row 0 has no constant term, so that small x keep their relative accuracy. The last row is zero, and so is W where |x|
// is clamped (there the exact W is at most {gelu_flushed}, {tanh_flushed} for tanh-GELU,
// {silu_flushed} for SiLU). NaN and the sign of zero are preserved.
//
// Relative error of the polynomials in exact arithmetic, before rounding to float32:
//     gelu_tail       {gelu_errors}
//     gelu_tanh_tail  {tanh_errors}
//     silu_tail       {silu_errors}
// Largest error of these operations in ulps of the exact result, except in the first column, which is absolute
// (float32: over a million numbers per column, from 2^-16 to 32; 16 bits: the float32 result rounded once, over all
// inputs). fma was emulated by the float64 product and sum, rounded to float32.
{gelu_table}
//
{silu_table}
#pragma once

namespace lomem::fast {{

// clang-format off
{constants}
// clang-format on

}}  // namespace lomem::fast
"""


def literal(value: np.float32) -> str:
    """Returns a C++ literal; nine digits represent every float32 exactly."""
    return f"{float(value):.8e}f"


def constant(name: str, value: np.float32) -> str:
    """Returns the definition of a scalar."""
    return f"constexpr float {name} = {literal(value)};"


def array(name: str, values: np.ndarray) -> str:
    """Returns the definition of a two-dimensional array."""

    def lines(row):
        cells = [f"{literal(v):>16}" for v in row]
        return ",\n".join("     " + ", ".join(cells[i : i + 4]) for i in range(0, len(cells), 4))

    rows = ",\n".join(f"    {{\n{lines(row)}}}" for row in values)
    return f"constexpr float {name}[{values.shape[0]}][{values.shape[1]}] = {{\n{rows}}};"


def header() -> str:
    """Returns the text of the header."""
    gelu, tanh, silu = Tail(gelu_tail, F(4)), Tail(gelu_tanh_tail, F(4)), Tail(silu_tail, SILU_ROWS_A_UNIT)
    gelu_table, gelu_errors = gelu.fit()
    tanh_table, tanh_errors = tanh.fit()
    silu_table, silu_errors = silu.fit()
    constants = [constant("tail_magic", TAIL_MAGIC)]
    for name, tail, table in (
        ("gelu", gelu, gelu_table),
        ("gelu_tanh", tanh, tanh_table),
        ("silu", silu, silu_table),
    ):
        constants += [
            "",
            constant(f"{name}_clamp", tail.clamp),
            constant(f"{name}_rows_a_unit", tail.rows_a_unit),
            array(f"{name}_tail", table),
        ]

    def flushed(tail):
        return mp.nstr(tail.exact(mp.mpf(tail.edge)), 2)

    def summary(errors, limits=()):
        def below(a):
            return max(e for row, e in enumerate(errors) if row + 0.5 <= a * gelu.rows_a_unit)

        return "".join(f"{below(a):.1e} for |x| < {a}, " for a in limits) + f"{max(errors):.1e} everywhere"

    return TEMPLATE.format(
        gelu_flushed=flushed(gelu),
        tanh_flushed=flushed(tanh),
        silu_flushed=flushed(silu),
        gelu_errors=summary(gelu_errors, (3.5, 5.5)),
        tanh_errors=summary(tanh_errors, (3.5, 5.5)),
        silu_errors=summary(silu_errors),
        gelu_table=error_table(
            GELU_RANGES,
            {"GELU": (gelu_table, gelu, exact_gelu), "tanh-GELU": (tanh_table, tanh, exact_gelu_tanh)},
        ),
        silu_table=error_table(SILU_RANGES, {"SiLU": (silu_table, silu, exact_silu)}),
        constants="\n".join(constants),
    )


def main() -> int:
    """Writes or checks the header."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the header differs")
    parser.add_argument("--output", default=str(HEADER), help="path of the header; - for standard output")
    arguments = parser.parse_args()

    text = header()
    if arguments.output == "-":
        print(text, end="")
        return 0
    path = Path(arguments.output)
    if arguments.check:
        if path.is_file() and path.read_text() == text:
            return 0
        print(f"{path}: differs from what {Path(__file__).name} writes", file=sys.stderr)
        return 1
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
