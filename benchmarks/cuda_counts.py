"""Counts what every CUDA kernel costs per element of a large tensor, without a GPU.

Bytes, sectors, PTX instructions and conflicts come from an emulator, which executes a few blocks of each grid
(tests/cpp/cuda/emulator/counts.cpp says what each figure is); registers and machine instructions, from a disassembler
(machine_code.py). Writes both to benchmarks/results, or, with --check, compares them with what is there: a figure that
got worse, a new kernel and one that is gone are errors.
Figures that depend on the compiler are compared only if the version of nvcc is the same.

    make cuda-counts         # writes benchmarks/results/cuda-counts.json and .md
    make cuda-counts-check   # compares

With --torch, compares the arithmetic of the activations' forward kernels with that of torch's instead: kernels that
evaluate the same operations return the same bits.

    python benchmarks/cuda_counts.py build/emulate --torch .../torch/lib/libtorch_cuda.so
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine_code

RESULTS = Path(__file__).resolve().parent / "results" / "cuda-counts.json"
TOLERANCE = 0.01


class Figure(NamedTuple):
    """How a figure is rounded and compared."""

    digits: int
    better: int  # -1: less is better; 1: more is; 0: it must not change
    compiled: bool  # whether the compiler has a say in it


#: Of a case; `ratio` is moved / ideal.
FIGURES = {
    "elements": Figure(0, 0, False),
    "ideal": Figure(3, 0, False),
    "loaded": Figure(3, -1, False),
    "stored": Figure(3, -1, False),
    "moved": Figure(3, -1, False),
    "ratio": Figure(3, -1, False),
    "small": Figure(3, -1, False),
    "instructions": Figure(2, -1, True),
    "active_lanes": Figure(2, 1, True),
    "conversions": Figure(2, -1, True),
    "divisions": Figure(2, -1, True),
    "special_functions": Figure(2, -1, True),
    "shuffles": Figure(2, -1, True),
    "wavefronts": Figure(2, -1, False),
}
#: Of a kernel's machine code.
MACHINE_FIGURES = {
    "registers": Figure(0, -1, True),
    "instructions": Figure(0, -1, True),
    "per element": Figure(1, -1, True),
}

Results = dict[str, Any]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 512 before 1024."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# Counting -------------------------------------------------------------------------------------------------------------


def emulated(program: Path) -> Results:
    """Runs the program of the emulator; returns its figures, rounded, and the kernels of each case."""
    output = json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    mangled = sorted({name for case in output["cases"] for name in case["kernels"]})
    names = dict(zip(mangled, machine_code.readable(mangled), strict=True))
    cases = {}
    for case in output["cases"]:
        case["ratio"] = case["moved"] / case["ideal"]
        figures = {key: rounded(case[key], figure.digits) for key, figure in FIGURES.items() if key in case}
        cases[case["case"]] = figures | {"kernels": sorted((names[name] for name in case["kernels"]), key=natural)}
    return {"multiprocessors": output["multiprocessors"], "cases": cases}


def rounded(value: float, digits: int) -> float | int:
    """A number without decimals is an int: 3, not 3.0."""
    result = round(value, digits)
    return int(result) if result == int(result) else result


def nvcc_version(program: Path) -> str:
    """The compiler's version, which it writes into the PTX."""
    match = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", program.read_bytes())
    if match is None:
        raise SystemExit(f"{program} has no PTX that is not compressed: build it with the preset emulate")
    return match[1].decode()


def count(build: Path, arch: str) -> Results:
    """All figures of a build."""
    program = program_in(build)
    results = {
        "nvcc": nvcc_version(program),
        "arch": f"sm_{arch}",
        **emulated(program),
        "machine code": machine_code.summary(program, arch),
    }
    if missing := not_launched(results):
        raise SystemExit(f"counts.cpp has no case that launches {', '.join(missing)}")
    return results


def not_launched(results: Results) -> list[str]:
    """Compiled kernels of which there are no figures."""
    launched = {kernel for case in results["cases"].values() for kernel in case["kernels"]}
    return sorted(results["machine code"].keys() - launched, key=natural)


def program_in(build: Path) -> Path:
    """The emulator's program in a build folder."""
    program = next((path for path in build.rglob("lomem_cuda_counts") if path.is_file()), None)
    if program is None:
        raise SystemExit(f"there is no lomem_cuda_counts in {build}: run make cuda-counts")
    return program


# Comparison -----------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A line for each figure that differs."""

    worse: list[str]
    better: list[str]


def compare(old: Results, new: Results) -> Comparison:
    """Compares figures with committed ones."""
    result = Comparison([], [])
    same_compiler = old["nvcc"] == new["nvcc"]
    for kind, figures in (("cases", FIGURES), ("machine code", MACHINE_FIGURES)):
        what = "case" if kind == "cases" else "kernel"
        for name in sorted({*old[kind], *new[kind]}, key=natural):
            if name not in old[kind]:
                result.worse.append(f"{name}: a new {what}")
            elif name not in new[kind]:
                result.worse.append(f"{name}: the {what} is gone")
            else:
                was, now = old[kind][name], new[kind][name]
                for key, figure in figures.items():
                    if same_compiler or not figure.compiled:
                        compare_figure(result, f"{name}: {key}", figure, was.get(key), now.get(key))
                if was.get("kernels") != now.get("kernels"):
                    before, after = (" + ".join(one["kernels"]) for one in (was, now))
                    result.worse.append(f"{name}: kernels were {before}, are {after}")
    return result


def compare_figure(result: Comparison, name: str, figure: Figure, old: float | None, new: float | None) -> None:
    """Adds a line if two figures differ by more than 1 % and more than rounding can explain."""
    if old is None or new is None:
        if old != new:
            result.worse.append(f"{name} was {old}, is {new}")
        return
    rounding = 10.0**-figure.digits if figure.digits else 0
    if abs(new - old) <= TOLERANCE * abs(old) + rounding * (1 + 1e-6):
        return
    line = f"{name} was {old:g}, is {new:g}" + (f" ({100 * (new / old - 1):+.1f} %)" if old else "")
    (result.better if (new - old) * figure.better > 0 else result.worse).append(line)


# Files ----------------------------------------------------------------------------------------------------------------


def as_json(results: Results) -> str:
    """JSON with a line for each case and each kernel, so that a diff can be read."""
    parts = []
    for key, value in results.items():
        if isinstance(value, dict):
            lines = [f"    {json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value, key=natural)]
            parts.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n  }")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def table(header: list[str], rows: Iterable[list[object]]) -> str:
    """A table in Markdown, whose first column is text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


COLUMNS = {
    "ratio": "moved / ideal",
    "ideal": "ideal",
    "moved": "moved",
    "loaded": "loaded",
    "stored": "stored",
    "small": "small",
    "instructions": "PTX",
    "active_lanes": "lanes",
    "conversions": "cvt",
    "divisions": "div",
    "special_functions": "special",
    "shuffles": "shfl",
    "wavefronts": "wavefronts",
}


def family(case: str) -> str:
    """The first words of a case's name: `step_encode`, `layer_norm forward`."""
    words = case.split()
    return " ".join(words[: 2 if "norm" in words[0] else 1])


def as_markdown(results: Results) -> str:
    """A table for each family of kernels, the worst ratios first."""
    text = f"""# What the CUDA kernels cost per element

Counted without a GPU: tensors of 64M elements, {results["multiprocessors"]} multiprocessors, nvcc {results["nvcc"]}.

| column | per element |
|---|---|
| ideal | bytes of the arguments of the op, each once |
| moved | bytes of the 32-byte sectors that warps ask for; there are no caches |
| loaded, stored | bytes that threads ask for |
| small | as moved, of weights, their gradients and the workspace: from caches, so not in the columns before |
| PTX | instructions, and among them |
| cvt, div, special, shfl | conversions; divisions and square roots; approximate functions; shuffles |
| lanes | active ones of 32, not per element |
| wavefronts | per access to shared memory: 1 without bank conflicts |

A call that launches several kernels has their sum.
"""
    families = defaultdict(list)
    for name in sorted(results["cases"], key=natural):
        families[family(name)].append(name)
    for title, names in families.items():
        order = sorted(names, key=lambda name: (-results["cases"][name]["ratio"], natural(name)))
        rows = [
            [name.removeprefix(title).strip(), *(results["cases"][name].get(key, "") for key in COLUMNS)]
            for name in order
        ]
        text += f"\n## {title}\n\n" + table(["", *COLUMNS.values()], rows)
    rows = [
        [f"`{name}`", *(results["machine code"][name].get(key, "") for key in MACHINE_FIGURES)]
        for name in sorted(results["machine code"], key=natural)
    ]
    text += f"""
## Machine code for {results["arch"]}

Instructions per element are those of the path that whole blocks take; for norms, with weight and bias of the input's
dtype, which is bfloat16 in kernels for vectors of 8 elements, float32 in those for 4. Kernels with another loop than
that over rows have none.

"""
    text += table(["kernel", "registers", "instructions", "per element"], rows)
    return text + "\n`make cuda-counts`\n"


def check(old: Results, new: Results) -> int:
    """Prints what differs; returns 1 if anything got worse."""
    comparison = compare(old, new)
    if old["nvcc"] != new["nvcc"]:
        print(f"nvcc was {old['nvcc']}, is {new['nvcc']}: instructions and registers are not compared")
    for line in comparison.better:
        print(f"better: {line}")
    for line in comparison.worse:
        print(f"WORSE: {line}")
    total = len(new["cases"]) + len(new["machine code"])
    print(f"{total} cases and kernels: {len(comparison.worse)} figures worse, {len(comparison.better)} better")
    if comparison.worse or comparison.better:
        print("make cuda-counts writes the new figures")
    return 1 if comparison.worse else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="a build folder of the preset emulate")
    parser.add_argument("--arch", default="90", help="whose machine code is counted")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the figures; a table goes beside them")
    parser.add_argument("--check", action="store_true", help="compare with the figures instead of writing them")
    parser.add_argument("--torch", type=Path, metavar="libtorch_cuda.so", help="compare arithmetic with this library's")
    arguments = parser.parse_args()
    if arguments.torch:
        different = machine_code.compare_with_torch(program_in(arguments.build), arguments.torch, arguments.arch)
        return 1 if different else 0
    results = count(arguments.build, arguments.arch)
    if arguments.check:
        return check(json.loads(arguments.json.read_text(encoding="utf-8")), results)
    arguments.json.write_text(as_json(results), encoding="utf-8")
    arguments.json.with_suffix(".md").write_text(as_markdown(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
