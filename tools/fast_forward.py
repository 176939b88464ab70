"""Polynomials of the fast float32 forward of GELU and SiLU: writes fast_forward_tables.h.

GELU(x) = max(x, 0) - W(|x|) with W(a) = a Phi(-a), and tanh-GELU and SiLU likewise with
W(a) = a / (1 + exp(w(a))). Both GELUs take W from a table of polynomials around the multiples of
1/4, fitted in relative error; SiLU takes exp from one polynomial. Every fit is minimax (Remez's
exchange in 40 digits) and is rounded to float32 from the highest coefficient down, the lower ones
being fitted again each time; the lowest three of a row are then moved by an ulp or two where that
lowers the error of the float32 evaluation itself. The same bytes come out on every machine.

Needs mpmath and numpy; takes less than a minute.

    python tools/fast_forward.py             # write the header
    python tools/fast_forward.py --check     # exit 1 where the header differs from that
    python tools/fast_forward.py --gelu-degree 4 --exp-degree 5 --output -   # cheaper, less accurate
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

DEFAULT = (5, 6)  # degrees of the tables and of exp

ROWS = 32
EXP_CLAMP = F(88)  # exp(88) is finite, and so is 127 = rint(88 log2(e)) as an exponent
LN2_HI = F(mp.floor(mp.ln(2) * 2**16) / 2**16)  # 16 bits: times an integer up to 127 it is exact
LN2_LO = F(mp.ln(2) - mp.mpf(float(LN2_HI)))
LOG2_E = F(1 / mp.ln(2))
INTEGER_MAGIC = F(1.5 * 2**23)  # x + magic is x rounded to an integer, ties to even, which its low bits hold

TANH_SCALE = mp.sqrt(8 / mp.pi)  # tanh-GELU is x sigmoid(TANH_SCALE (x + TANH_CUBIC x^3))
TANH_CUBIC = mp.mpf("0.044715")
TANH_W1 = F(TANH_SCALE)
TANH_W3 = F(TANH_SCALE * TANH_CUBIC)
TANH_CLAMP = F(10)  # TANH_SCALE (10 + TANH_CUBIC 1000) = 87.3


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
    """Minimises the maximum of |weight(t) (p(t) - target(t))| over polynomials p with so many terms.

    Returns p's coefficients from the constant up, and that maximum to a tenth of a percent.
    """

    def error(t, f, w):
        return w * (horner(p, t) - f)

    def peak(sample, errors, i):
        """Returns the vertex of the parabola through three errors, where that is larger."""
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
    # Off by one, for the weight may be zero in the middle.
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
        while len(peaks) > terms + 1:  # signs must go on alternating
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
    """Fits as remez does, with float32 coefficients; returns them and the error before rounding."""
    _, best = remez(target, weight, terms, low, high)
    rounded: list[np.float32] = []  # from the constant up, those below still missing
    for missing in range(terms, 0, -1):
        known = [mp.mpf(0)] * missing + [mp.mpf(float(c)) for c in rounded]
        p, _ = remez(lambda t, known=known: target(t) - horner(known, t), weight, missing, low, high)
        rounded.insert(0, F(p[-1]))
    return rounded, best


@dataclass(frozen=True)
class Tail:
    """W on ROWS intervals around the multiples of step / scale; the last row is zero."""

    exact: Real
    degree: int
    scale: int = 1  # the polynomials are in t = scale a - step row
    step: float = 0.25

    @property
    def clamp(self) -> np.float32:
        """Where the row that is zero is centred."""
        return F((ROWS - 1) * self.step / self.scale)

    @property
    def magic(self) -> np.float32:
        """What rounds to a multiple of step when added, and leaves the row in the low bits."""
        return F(INTEGER_MAGIC * F(self.step))

    def fit(self) -> tuple[np.ndarray, list[float]]:
        """Returns the coefficients, [degree + 1][ROWS], and the relative error of each row before rounding."""
        rows, errors = zip(*(self._fit_row(row) for row in range(ROWS - 1)), strict=True)
        return np.array([*rows, [F(0)] * (self.degree + 1)]).T, list(errors)

    def _fit_row(self, row: int) -> tuple[list[np.float32], float]:
        centre, half = mp.mpf(row) * self.step, mp.mpf(self.step) / 2

        def exact(t):
            return self.exact((centre + t) / self.scale)

        if row > 0:
            fit, error = rounded_remez(exact, lambda t: 1 / exact(t), self.degree + 1, -half, half)
            return self._tune(fit, row), float(error)

        # No constant, and relative to W ~ a / 2: fit W / t, at zero by its limit.
        def exact_slope(t):
            t = t or mp.mpf(10) ** -30
            return exact(t) / t

        fit, error = rounded_remez(exact_slope, lambda t: 1 / exact_slope(t), self.degree, mp.mpf(0), half)
        return [F(0), *fit], float(error)

    def _tune(self, fit: list[np.float32], row: int) -> list[np.float32]:
        """Moves the lowest three coefficients by few ulps, to the least float32 error on a sample."""
        golden = (math.sqrt(5) - 1) / 2
        spread = np.arange(1, 257) * golden % 1 - 0.5  # not a regular grid: its numbers have few bits
        a = ((row + spread) * self.step / self.scale).astype(F)
        t = a * F(self.scale) - F(row * self.step)
        exact = np.array([float(self.exact(mp.mpf(float(v)))) for v in a])

        def error(low):
            return np.abs(horner([*low, *fit[3:]], t) / exact - 1).max()

        def nearby(c, ulps):  # c first: of equals, min takes the first
            return [F(c + step * np.spacing(c)) for step in sorted(range(-ulps, ulps + 1), key=abs)]

        candidates = itertools.product(nearby(fit[0], 1), nearby(fit[1], 2), nearby(fit[2], 2))
        return [*min(candidates, key=error), *fit[3:]]


def fit_exp(degree: int) -> tuple[list[np.float32], float]:
    """Fits exp in relative error on |r| <= ln(2) / 2 and what rounding adds to r; the constant is one."""
    half = mp.ln(2) / 2 + mp.mpf("1e-5")
    tiny = mp.mpf(10) ** -15
    fit, error = rounded_remez(
        lambda r: mp.expm1(r or tiny) / (r or tiny), lambda r: abs(r) * mp.exp(-r), degree, -half, half
    )
    return [F(1), *fit], float(error)


# The float32 evaluation, one rounding an operation.


def plus(x: np.ndarray) -> np.ndarray:
    """Returns max(x, 0), NaN for NaN and -0 for -0."""
    return np.where(x < 0, F(0), x)


def clamped(x: np.ndarray, limit: np.float32) -> np.ndarray:
    """Returns min(|x|, limit)."""
    a = np.abs(x)
    return np.where(a < limit, a, limit)


def evaluate_tail(table: np.ndarray, tail: Tail, x: np.ndarray) -> np.ndarray:
    """Returns max(x, 0) - W(|x|) by table."""
    a = clamped(x, tail.clamp)
    u = a * F(tail.scale)
    shifted = u + tail.magic
    t = u - (shifted - tail.magic)
    row = shifted.view(np.int32) & (ROWS - 1)
    return plus(x) - horner([c[row] for c in table], t)


def evaluate_exp(polynomial: list[np.float32], a: np.ndarray) -> np.ndarray:
    """Returns exp(a) for 0 <= a <= EXP_CLAMP."""
    shifted = a * LOG2_E + INTEGER_MAGIC
    n = shifted - INTEGER_MAGIC
    r = a - n * LN2_HI - n * LN2_LO
    return (horner(polynomial, r).view(np.int32) + (shifted.view(np.int32) << 23)).view(F)


def evaluate_silu(polynomial: list[np.float32], x: np.ndarray) -> np.ndarray:
    """Returns max(x, 0) - a / (1 + exp(a))."""
    a = clamped(x, EXP_CLAMP)
    return plus(x) - a / (F(1) + evaluate_exp(polynomial, a))


def evaluate_gelu_tanh(polynomial: list[np.float32], x: np.ndarray) -> np.ndarray:
    """Returns tanh-GELU by exp."""
    a = clamped(x, TANH_CLAMP)
    w = a * (a * a * TANH_W3 + TANH_W1)
    return plus(x) - a / (F(1) + evaluate_exp(polynomial, w))


# Errors.

RANGES = {
    "x < -5.5": (-3.4e38, -5.5),
    "-5.5 .. -3.375": (-5.5, -3.375),
    "-3.375 .. 0": (-3.375, -1e-30),
    "x > 0": (1e-30, 3.4e38),
}
BITS16 = np.arange(2**16, dtype=np.uint32)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """Returns GELU in float64."""
    return x * np.array([math.erfc(v) for v in -x * math.sqrt(0.5)]) / 2


def exact_silu(x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
    """Returns x sigmoid(w), of w = x if not given, in float64."""
    return x / (1 + np.exp(np.minimum(-(x if w is None else w), 700)))


def exact_gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Returns tanh-GELU in float64."""
    return exact_silu(x, float(TANH_SCALE) * (x + float(TANH_CUBIC) * x**3))


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds finite float32 numbers to bfloat16, to nearest, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(F)


def inputs(dtype: str, low: float, high: float) -> np.ndarray:
    """Returns all numbers of a 16-bit type between two, or float32 numbers that sample it."""
    if dtype == "float32":
        magnitudes = np.clip(np.abs([low, high]), 2.0**-16, 32)
        first, last = sorted(magnitudes.astype(F).view(np.uint32).tolist())
        step = (last - first) // 2**20 | 1  # odd: the numbers' last bits vary
        x = np.arange(first, last, step, dtype=np.uint32).view(F)
        return -x if high <= 0 else x
    with np.errstate(invalid="ignore"):
        x = BITS16.astype(np.uint16).view(np.float16).astype(F) if dtype == "float16" else (BITS16 << 16).view(F)
    return x[(x >= low) & (x < high) & (x != 0)]


def errors(function, exact, dtype: str, low: float, high: float) -> tuple[float, float]:
    """Returns the largest error in ulps of the exact result in that type, and the largest error."""
    digits, smallest = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}[dtype]
    x = inputs(dtype, low, high)
    y = function(x)
    y = {"float32": lambda y: y, "bfloat16": round_bfloat16, "float16": lambda y: y.astype(np.float16)}[dtype](y)
    reference = exact(x.astype(np.float64))
    error = np.abs(y - reference)
    exponent = np.maximum(np.frexp(reference)[1] - 1, smallest)
    return float((error / np.ldexp(1.0, exponent - digits + 1)).max()), float(error.max())


def error_table(functions: dict) -> list[str]:
    """Returns the lines of a table of errors: ulps, and the largest error where W is next to nothing."""
    lines = ["".join([f"{'':27}", *(f"{name:>16}" for name in RANGES)]).rstrip()]
    for name, (function, exact) in functions.items():
        for dtype in ("float32", "bfloat16", "float16"):
            cells = []
            for low, high in RANGES.values():
                ulps, error = errors(function, exact, dtype, low, high)
                cells.append(f"{error:.1e}" if low < -5.5 else f"{ulps:.{3 if ulps < 1 else 1}f} ulp")
            lines.append("".join([f"{name:<18}{dtype:<9}", *(f"{cell:>16}" for cell in cells)]))
    return lines


# The header.

TEMPLATE = """\
// Polynomials of a fast float32 forward of GELU, tanh-GELU and SiLU. Written by
//     python tools/fast_forward.py{options}
// which says how they are fitted. For the host: device code cannot index a constexpr array at run
// time.
//
// Every operation below is one float32 operation, rounded on its own (no fused multiply-add), so
// that all instruction sets return the same bits.
//
// GELU(x) = max(x, 0) - W(|x|) by table:
//     a = |x| < gelu_clamp ? |x| : gelu_clamp{scaled}
//     shifted = {u} + gelu_magic        its low five bits are the row: {rows}
//     t = {u} - (shifted - gelu_magic)  exact
//     W = (...(c[{degree}][row] t + c[{last}][row]) t + ... + c[1][row]) t + c[0][row]
//     y = (x < 0 ? 0 : x) - W
// with c = gelu_tail or gelu_tanh_tail. Row 0 has no constant: small x keep their relative
// accuracy. The last row is zero, and so is GELU of what is clamped (then the exact W is at most
// {flushed}, {flushed_tanh} for tanh-GELU). NaN stays NaN, and the sign of zero stays.
//
// SiLU(x) = max(x, 0) - a / (1 + exp(a)):
//     a = |x| < exp_clamp ? |x| : exp_clamp
//     shifted = a * log2_e + integer_magic
//     n = shifted - integer_magic
//     r = (a - n * ln2_hi) - n * ln2_lo     n * ln2_hi is exact
//     p = (...(exp_polynomial[{exp_degree}] r + ...) r + exp_polynomial[1]) r + exp_polynomial[0]
//     exp(a) = p with (bits of shifted) << 23 added to its bits, unsigned
// tanh-GELU can take the same way: a clamped to tanh_clamp, a / (1 + exp(w)) with
//     w = a * (a * a * tanh_w3 + tanh_w1)
//
// Relative error of the polynomials in exact arithmetic, before rounding to float32:
//     gelu_tail       {gelu_errors}
//     gelu_tanh_tail  {tanh_errors}
//     exp_polynomial  {exp_error}
// Largest error of these operations (float32: of a million numbers a column, from 2^-16
// to 32; 16 bits: the float32 result rounded once, of all inputs), in ulps of the exact result, and
// absolute where x < -5.5:
{table}
#pragma once

namespace lomem::fast {{

// clang-format off
{constants}
// clang-format on

}}  // namespace lomem::fast
"""


def literal(value: np.float32) -> str:
    """Returns a C++ literal: nine digits are enough for every float32."""
    return f"{float(value):.8e}f"


def constant(name: str, value: np.float32) -> str:
    """Returns the definition of a scalar."""
    return f"inline constexpr float {name} = {literal(value)};"


def array(name: str, values: np.ndarray) -> str:
    """Returns the definition of an array of one or two dimensions."""
    shape = "".join(f"[{n}]" for n in values.shape)

    def lines(row, indent):
        cells = [f"{literal(v):>16}" for v in row]
        return ",\n".join(indent + ", ".join(cells[i : i + 4]) for i in range(0, len(cells), 4))

    if values.ndim == 1:
        return f"inline constexpr float {name}{shape} = {{\n{lines(values, '    ')}}};"
    rows = ",\n".join(f"    {{\n{lines(row, '     ')}}}" for row in values)
    return f"inline constexpr float {name}{shape} = {{\n{rows}}};"


def tails(degree: int) -> tuple[Tail, Tail]:
    """Returns GELU's and tanh-GELU's; degree 4 has narrower rows and goes less far."""
    spacing = {5: {}, 4: {"scale": 5, "step": 1.0}}[degree]
    return Tail(gelu_tail, degree, **spacing), Tail(gelu_tanh_tail, degree, **spacing)


def header(gelu_degree: int, exp_degree: int) -> str:
    """Returns the header's text."""
    gelu, tanh = tails(gelu_degree)
    gelu_table, gelu_errors = gelu.fit()
    tanh_table, tanh_errors = tanh.fit()
    polynomial, exp_error = fit_exp(exp_degree)
    table = error_table(
        {
            "GELU": (lambda x: evaluate_tail(gelu_table, gelu, x), exact_gelu),
            "tanh-GELU": (lambda x: evaluate_tail(tanh_table, tanh, x), exact_gelu_tanh),
            "tanh-GELU by exp": (lambda x: evaluate_gelu_tanh(polynomial, x), exact_gelu_tanh),
            "SiLU": (lambda x: evaluate_silu(polynomial, x), exact_silu),
        }
    )
    constants = [
        constant("gelu_clamp", gelu.clamp),
        *([constant("gelu_scale", F(gelu.scale))] if gelu.scale != 1 else []),
        constant("gelu_magic", gelu.magic),
        array("gelu_tail", gelu_table),
        array("gelu_tanh_tail", tanh_table),
        "",
        constant("exp_clamp", EXP_CLAMP),
        constant("log2_e", LOG2_E),
        constant("integer_magic", INTEGER_MAGIC),
        constant("ln2_hi", LN2_HI),
        constant("ln2_lo", LN2_LO),
        array("exp_polynomial", np.array(polynomial)),
        "",
        constant("tanh_clamp", TANH_CLAMP),
        constant("tanh_w1", TANH_W1),
        constant("tanh_w3", TANH_W3),
    ]

    def summary(errors, tail):
        def below(a):
            return max(e for row, e in enumerate(errors) if (row + 0.5) * tail.step / tail.scale <= a)

        return ", ".join(f"{below(a):.1e} for a < {a}" for a in (3.5, 5.5)) + f", {max(errors):.1e} everywhere"

    edge = (mp.mpf(ROWS) - 1.5) * gelu.step / gelu.scale
    options = "" if (gelu_degree, exp_degree) == DEFAULT else f" --gelu-degree {gelu_degree} --exp-degree {exp_degree}"
    return TEMPLATE.format(
        options=options,
        scaled="" if gelu.scale == 1 else "\n//     u = a * gelu_scale",
        u="a" if gelu.scale == 1 else "u",
        rows=f"the multiple of 1/{round(gelu.scale / gelu.step)} next to a",
        degree=gelu_degree,
        last=gelu_degree - 1,
        flushed=mp.nstr(gelu_tail(edge), 2),
        flushed_tanh=mp.nstr(gelu_tanh_tail(edge), 2),
        exp_degree=exp_degree,
        gelu_errors=summary(gelu_errors, gelu),
        tanh_errors=summary(tanh_errors, tanh),
        exp_error=f"{exp_error:.1e}",
        table="\n".join(f"//     {line}" for line in table),
        constants="\n".join(constants),
    )


def main() -> int:
    """Writes the header, or compares with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the header differs")
    parser.add_argument("--output", default=str(HEADER), help="the header; - for standard output")
    parser.add_argument("--gelu-degree", type=int, choices=(4, 5), default=DEFAULT[0])
    parser.add_argument("--exp-degree", type=int, choices=(5, 6), default=DEFAULT[1])
    arguments = parser.parse_args()

    text = header(arguments.gelu_degree, arguments.exp_degree)
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
