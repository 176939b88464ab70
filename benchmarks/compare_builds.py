"""Compares the speed of two builds of lomem: runs `lomem bench` with both, alternating.

Each build runs the benchmark several times. The ratio of a figure is this build's time divided by the other's, in
consecutive runs. The script prints the geometric mean of the ratios and its 95 % confidence interval (Student's t on
the logarithms). A figure whose whole interval is above --limit is a regression, and the exit status is then 1. The
machine must be idle otherwise.

    python benchmarks/compare_builds.py [--runs 8] [--limit 1.03] [--json FILE] OTHER <arguments of lomem bench>

OTHER is the folder that contains the other build's lomem/.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

#: 97.5 % quantiles of Student's t distribution by degrees of freedom; above the last, that of 30 applies.
T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 11: 2.20, 15: 2.13, 19: 2.09}
KEY = ("case", "shape", "dtype", "threads", "pass")


def measure(folder, options):
    """Maps figures to microseconds of lomem's ops."""
    environment = {**os.environ, **({"PYTHONPATH": folder} if folder else {})}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "figures.json"
        command = [sys.executable, "-m", "lomem", "bench", "--device", "cpu", *options, "--json", str(file)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        records = json.loads(file.read_text())["records"]
    ours = [r for r in records if r["contender"].startswith("lomem")]
    return {(*(str(r[k]) for k in KEY), r["contender"]): r["microseconds"] for r in ours}


def interval(ratios):
    """The geometric mean, and the ends of its 95 % confidence interval."""
    logs = [math.log(r) for r in ratios]
    freedom = len(logs) - 1
    t = T.get(freedom) or next((T[n] for n in sorted(T) if n >= freedom), 2.05)
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="folder that contains the other build's lomem/")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--limit", type=float, default=1.03)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="arguments of lomem bench")
    arguments = parser.parse_args()
    pairs = []
    for run in range(arguments.runs):
        builds = [None, arguments.other] if run % 2 else [arguments.other, None]
        figures = {folder: measure(folder, arguments.options) for folder in builds}
        pairs.append((figures[None], figures[arguments.other]))
        print(f"run {run + 1} of {arguments.runs}", file=sys.stderr)
    shared = [key for key in pairs[0][0] if all(key in a and key in b for a, b in pairs)]
    rows = [(key, *interval([a[key] / b[key] for a, b in pairs])) for key in shared]
    rows.sort(key=lambda row: -row[2])
    for key, mean, low, high in rows:
        mark = "  slower" if low > arguments.limit else ""
        print(f"{' '.join(key):<70}{mean:>7.3f}  [{low:.3f}, {high:.3f}]{mark}")
    slower = sum(low > arguments.limit for _, _, low, _ in rows)
    print(f"{len(rows)} figures, {slower} slower than {arguments.limit} times the other build's")
    if arguments.json:
        result = [{"figure": list(key), "ratio": mean, "low": low, "high": high} for key, mean, low, high in rows]
        Path(arguments.json).write_text(json.dumps({"runs": arguments.runs, "figures": result}, indent=1) + "\n")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
