"""Prints a table of how the tests went with each version of torch, and writes it to benchmarks/results.

    python tools/versions.py 2.11.0 2.15.0     # or make versions, which runs the tests

Reads build/versions/<version>/results.xml, which pytest wrote (--junitxml), and exits with 1 if a test failed or a
version has no results.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/results/torch-versions.md"
HEAD = "| torch | tests | passed | failed | expected to fail | skipped |\n|---|---:|---:|---:|---:|---:|"


def summary(results: Path) -> tuple[str, list[str]]:
    """The cells of a row, and the names of the tests that failed."""
    cases = list(ET.parse(results).getroot().iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    expected = sum(skip.get("type") == "pytest.xfail" for skip in skips)
    counts = [len(cases), len(cases) - len(failed) - len(skips), len(failed), expected, len(skips) - expected]
    return " | ".join(f"{count:,}" for count in counts), sorted(failed)


def main(versions: list[str]) -> int:
    """Prints and writes the table; returns the exit code."""
    rows, failures = [], {}
    for version in versions:
        results = ROOT / "build/versions" / version / "results.xml"
        if not results.is_file():
            rows.append(f"| {version} | no results | | | | |")
            failures[version] = ["no results"]
            continue
        cells, failures[version] = summary(results)
        rows.append(f"| {version} | {cells} |")
    lines = ["The Python tests (`make versions`), on the CPU:", "", HEAD, *rows]
    for version, names in failures.items():
        if names:
            lines += ["", f"With torch {version}:", "", *(f"- `{name}`" for name in names)]
    table = "\n".join(lines) + "\n"
    TABLE.write_text(table, encoding="utf-8")
    print(table, end="")
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
