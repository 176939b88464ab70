"""Writes cpp/src/activations/data.cpp: the step functions that the library ships.

They are fitted with lomem.fit.fit for 1 to 8 bits and both criteria, under uniform density on the real line. For
sigmoid and softsign this is impossible with one bit (both levels would be 0, the slope of the asymptotes); for those,
the table contains the optimal step function under the standard normal density with free outer pieces.

Requires lomem with NumPy and SciPy; takes about a minute. The last few digits depend on the machine, so the check has a
tolerance.

    python tools/step_tables.py             # write the file
    python tools/step_tables.py --check     # exit 1 if the file is off by more than 1e-9
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from lomem.fit import fit
from lomem.fit._functions import DERIVED, FUNCTIONS

SOURCE = Path(__file__).resolve().parents[1] / "cpp/src/activations/data.cpp"

TABULATED = tuple(sorted(FUNCTIONS.keys() - DERIVED))
CRITERIA = ("derivative", "primitive")
BITS = range(1, 9)
# Their asymptotes are parallel, so a one-bit step function with the slopes of both would be 0 everywhere.
PARALLEL = ("sigmoid", "softsign")

TOLERANCE = 1e-9  # relative; the condition number of a minimum with 8 bits is 1e5, times a rounding of 1e-16

HEAD = """\
// The step functions that ship with the library. Written by tools/step_tables.py: do not edit.
//
// They are optimal under a uniform density on the line, except for one bit of sigmoid and softsign: their asymptotes
// are parallel, so both levels would be 0. Those tables are optimal under the standard normal density, with free outer
// levels.
//
// `exp` is e^x - 1 below 0 and x above. Its last boundary is 0: its levels below 0, times alpha, work for an ELU.
// (With one bit and `primitive`, h~ consists of its asymptotes, which do not meet there.)

// clang-format off
#include "data.h"

namespace lomem::detail {
namespace {
"""

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Table:
    """Contents of a StepTable."""

    error: float
    boundaries: tuple[float, ...]
    levels: tuple[float, ...]


def table(key: Key) -> Table:
    """Fits one step function."""
    function, criterion, bits = key
    density = "gaussian" if bits == 1 and function in PARALLEL else "uniform"
    result = fit(function, bits, criterion=criterion, density=density)
    if not result.certificate.optimal:
        raise ArithmeticError(f"{key}: not a minimum: {result.certificate}")
    return Table(result.error, result.boundaries, result.levels)


def tables(keys: list[Key], jobs: int) -> dict[Key, Table]:
    """Fits all step functions."""
    # Spawn, since forking a process with torch's threads may hang.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return dict(zip(keys, pool.map(table, keys, chunksize=1), strict=True))


def source(found: dict[Key, Table]) -> str:
    """Text of the C++ file."""
    arrays, rows = [], []
    for (function, criterion, bits), entry in sorted(found.items()):
        name = f"{function}_{criterion}_{bits}"
        for kind in ("boundaries", "levels"):
            values = ", ".join(f"{value:.17g}" for value in getattr(entry, kind))
            lines = "\n".join(textwrap.wrap(values, 116, initial_indent="    ", subsequent_indent="    "))
            arrays.append(f"constexpr double {name}_{kind}[] = {{\n{lines}}};\n")
        rows.append(f'    {{"{function}", "{criterion}", {bits}, {entry.error:.17g},\n')
        rows.append(f"     {name}_boundaries, {name}_levels}},\n")
    return (
        f"{HEAD}\n{''.join(arrays)}\n}}  // namespace\n\nconst StepTable step_tables[] = {{\n{''.join(rows)}}};\n"
        f"const int step_table_count = {len(found)};\n\n}}  // namespace lomem::detail\n"
    )


def parse(text: str) -> dict[Key, Table]:
    """Parses the tables in the C++ file."""
    number = r"[-+.\de]+"
    arrays = {
        name: tuple(float(value) for value in re.findall(number, values))
        for name, values in re.findall(r"double (\w+)\[\] = \{([^}]*)\}", text)
    }
    rows = re.findall(rf'\{{"(\w+)", "(\w+)", (\d), ({number}),\s+(\w+), (\w+)\}}', text)
    return {
        (function, criterion, int(bits)): Table(float(error), arrays[boundaries], arrays[levels])
        for function, criterion, bits, error, boundaries, levels in rows
    }


def differs(a: Table, b: Table) -> bool:
    """Whether two tables differ by more than rounding."""
    pairs = zip((a.error, *a.boundaries, *a.levels), (b.error, *b.boundaries, *b.levels), strict=True)
    return any(abs(x - y) > TOLERANCE * max(1.0, abs(x)) for x, y in pairs)


def main() -> int:
    """Writes or checks the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file differs")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes (default: 2)")
    arguments = parser.parse_args()

    # Longest fits first.
    keys = [(f, c, bits) for bits in reversed(BITS) for c in reversed(CRITERIA) for f in TABULATED]
    found = tables(keys, arguments.jobs)
    if not arguments.check:
        SOURCE.write_text(source(found))
        return 0
    committed = parse(SOURCE.read_text())
    stale = [key for key in found if key not in committed or differs(committed[key], found[key])]
    for key in stale:
        print(f"{SOURCE.name}: {key} differs", file=sys.stderr)
    return bool(stale) or len(committed) != len(found)


if __name__ == "__main__":
    sys.exit(main())
