"""Reports registers, spills and stack use of the CUDA kernels, as given by the compiler.

As a compiler launcher (`cuda_resources.py --record nvcc ...`), runs the compiler and saves its report next to the
object file. With a build folder (`cuda_resources.py build/cuda`), prints a table of every kernel and architecture and
fails if a kernel spills registers or keeps an array in local memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".ptxas"


class Kernel(NamedTuple):
    """The compiler's report on one kernel for one architecture."""

    name: str
    arch: str
    registers: int
    spilled_bytes: int
    stack_bytes: int


def record(command: list[str]) -> int:
    """Runs the compiler, saves its report on kernels and passes the rest of its output on."""
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    report, other = [], []
    for line in result.stderr.splitlines(keepends=True):
        is_report = line.startswith("ptxas info") or re.match(r"\s+\d+ bytes (stack frame|gmem|cmem)", line)
        (report if is_report else other).append(line)
    sys.stderr.write("".join(other))
    if result.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + SUFFIX).write_text("".join(report), encoding="utf-8")
    return result.returncode


def parse(report: str) -> Iterator[Kernel]:
    """Yields the kernels of one report."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    for match in entry.finditer(report):
        spilled = int(match["stores"]) + int(match["loads"])
        yield Kernel(match["name"], match["arch"], int(match["registers"]), spilled, int(match["stack"]))


def readable(names: list[str]) -> list[str]:
    """Demangles names and drops the namespaces that all of them share."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    result = []
    for line in text.splitlines():
        name = re.sub(r"^void |\((?!lomem::Norm\)).*$", "", line)
        name = name.replace("(lomem::Norm)0", "layer").replace("(lomem::Norm)1", "rms")
        name = name.replace("lomem::cuda::", "").replace("lomem::", "")
        result.append(re.sub(r"> (?=>)", ">", re.sub(r"TwoBitStep<(\w+)Constants>", r"\1", name)))
    return result


def cell(kernel: Kernel | None) -> str:
    """Formats one kernel on one architecture as a table cell."""
    if kernel is None:
        return "-"
    spilled = f"+{kernel.spilled_bytes}" if kernel.spilled_bytes else ""
    return f"{kernel.registers}{spilled}" + (f"~{kernel.stack_bytes}" if kernel.stack_bytes else "")


def main(folder: Path) -> int:
    """Prints the table; returns 1 if a kernel uses local memory, 2 if there are no reports."""
    kernels = [kernel for path in folder.rglob("*" + SUFFIX) for kernel in parse(path.read_text(encoding="utf-8"))]
    if not kernels:
        print(f"no reports under {folder}: build it with LOMEM_CUDA=ON and LOMEM_CUDA_RESOURCES=ON", file=sys.stderr)
        return 2
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch)))
    table: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel in kernels:
        table[kernel.name][kernel.arch] = kernel
    names = readable(list(table))
    width = max(map(len, names))
    print("registers per thread; +n: bytes spilled; ~n: bytes of stack")
    print(f"{'kernel':<{width}}" + "".join(f"{arch:>8}" for arch in archs))
    for name, row in sorted(zip(names, table.values(), strict=True), key=lambda pair: pair[0]):
        cells = [cell(row.get(arch)) for arch in archs]
        print(f"{name:<{width}}" + "".join(f"{text:>8}" for text in cells))
    spills = sum(kernel.spilled_bytes > 0 for kernel in kernels)
    stacks = sum(kernel.stack_bytes > 0 for kernel in kernels)
    print(f"{len(table)} kernels, {len(archs)} architectures, {spills} with spills, {stacks} with a stack")
    return 1 if spills or stacks else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        sys.exit(record(sys.argv[2:]))
    if len(sys.argv) != 2:
        sys.exit("usage: cuda_resources.py BUILD_FOLDER")
    sys.exit(main(Path(sys.argv[1])))
