"""Checks that the tests on the emulator notice wrong kernels: edits one, runs the tests with it, and expects a failure.

    python tests/cpp/cuda/emulator/mutants.py build/emulate            # all of MUTANTS
    python tests/cpp/cuda/emulator/mutants.py build/emulate NAME ...   # some

The build folder is that of the preset `emulate`, built. Nothing in it or in the sources is changed. If the tests pass
with a mutant, they have a gap, which needs a test, or the edit changes nothing and does not belong here. A mutant whose
text is no longer in the source fails and must be updated.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[4]
INCLUDE = ROOT / "cpp/include"
SECONDS = 300  # for the tests of one mutant

SWEEP = "lomem_cuda_sweep_tests"
DEVICE = "lomem_cuda_emulated_tests"


class Mutant(NamedTuple):
    """An edit of a header, and the test that must notice it."""

    name: str
    header: str
    old: str
    new: str
    kernels: str
    tests: str
    program: str = SWEEP
    nth: int = 0  # which of the places where `old` stands
    endless: bool = False  # whether the kernel may loop forever


ACTIVATIONS = "Sweep.Activations"
GATED = "Sweep.Gated"
NORMS = "Sweep.*Norms"
STORAGE = "Sweep.Storage"
DRAWN = "Sweep.Drawn"
FULL = "if (aligned && Grid::is_full(block, n)) {"
UNALIGNED = "if (Grid::is_full(block, n)) {"

MUTANTS = [
    Mutant(
        "no barrier after the preparation of a block",
        "cuda/launch.cuh",
        "    __syncthreads();\n",
        "    ;\n",
        "activations",
        ACTIVATIONS,
    ),
    Mutant(
        "a block too few",
        "cuda/launch.cuh",
        "static_cast<unsigned>(blocks), threads",
        "static_cast<unsigned>((blocks + 1) / 2), threads",
        "activations",
        ACTIVATIONS,
    ),
    Mutant("vectors at any address, forward", "cuda/step.cuh", FULL, UNALIGNED, "activations", ACTIVATIONS, nth=0),
    Mutant("vectors at any address, codes", "cuda/step.cuh", FULL, UNALIGNED, "activations", ACTIVATIONS, nth=1),
    Mutant("vectors at any address, backward", "cuda/step.cuh", FULL, UNALIGNED, "activations", ACTIVATIONS, nth=2),
    Mutant("vectors at any address, packing", "cuda/packing.cuh", FULL, UNALIGNED, "packing", ACTIVATIONS, nth=0),
    Mutant("vectors at any address, unpacking", "cuda/packing.cuh", FULL, UNALIGNED, "packing", ACTIVATIONS, nth=1),
    Mutant(
        "vectors at any address, encoding groups",
        "cuda/storage.cuh",
        "if (aligned && begin + unit <= n) {\n      return load",
        "if (begin + unit <= n) {\n      return load",
        "storage",
        STORAGE,
    ),
    Mutant(
        "vectors at any address, decoding groups",
        "cuda/storage.cuh",
        FULL,
        UNALIGNED,
        "storage",
        STORAGE,
    ),
    Mutant(
        "the largest of a part of the group",
        "cuda/storage.cuh",
        "i < group_units; i += width",
        "i < group_units; i += 2 * width",
        "storage",
        STORAGE,
    ),
    Mutant(
        "the scale of another group",
        "cuda/storage.cuh",
        "scales[begin / unit / group_units] = scale",
        "scales[begin / unit / group_units ^ 1] = scale",
        "storage",
        STORAGE,
    ),
    Mutant("no offset of the stream", "cuda/storage.cuh", "*seed), offset}", "*seed), 0}", "storage", STORAGE),
    Mutant(
        "random numbers of the neighbor",
        "core/rounding.h",
        "random_half(j < 4 ? low : high, j % 2 != 0)",
        "random_half(j < 4 ? low : high, j % 2 == 0)",
        "storage",
        STORAGE,
    ),
    Mutant(
        "the scale of the first unit of a thread",
        "cuda/storage.cuh",
        "scale[u] = scales[unit >> shift];",
        "scale[u] = scales[Grid::unit(block, thread, 0) >> shift];",
        "storage",
        STORAGE,
    ),
    Mutant(
        "groups of twice as many units",
        "cuda/storage.cuh",
        "while (elements << shift < group)",
        "while (elements << shift <= group)",
        "storage",
        STORAGE,
    ),
    Mutant("no dither", "cuda/storage.cuh", "code += dither(", "code += 0.0f * dither(", "storage", STORAGE),
    Mutant(
        "the dither is added",
        "core/rounding.h",
        "(static_cast<float>(random) + 0.5f) * 0x1p-16f - 0.5f;",
        "0.5f - (static_cast<float>(random) + 0.5f) * 0x1p-16f;",
        "storage",
        STORAGE,
    ),
    Mutant("dither without its mean", "core/rounding.h", "* 0x1p-16f - 0.5f;", "* 0x1p-16f;", "storage", STORAGE),
    Mutant(
        "dither of the neighbor",
        "cuda/storage.cuh",
        "random_of(numbers, place + j)",
        "random_of(numbers, (place + j) ^ 1)",
        "storage",
        STORAGE,
    ),
    Mutant(
        "dither of the first half of a block",
        "cuda/storage.cuh",
        "random_of(numbers, place + j)",
        "random_of(numbers, 0 * place + j)",
        "storage",
        STORAGE,
    ),
    Mutant(
        "dither of the next block",
        "cuda/storage.cuh",
        "random.block(begin)",
        "random.block(begin + group_size)",
        "storage",
        STORAGE,
    ),
    Mutant(
        "dither of the first stream",
        "cuda/storage.cuh",
        "random.block(begin)",
        "RoundingBits{random.seed, 0}.block(begin)",
        "storage",
        STORAGE,
    ),
    Mutant("no dither of a drawn level", "core/drawn.h", "+ dither(random)", "+ 0.0f * dither(random)", "drawn", DRAWN),
    Mutant("drawn codes rounded down", "core/drawn.h", "+ (0xffffu ^ random)", "+ 0 * random", "drawn", DRAWN),
    Mutant("a drawn origin on the right", "core/drawn.h", "d > 0.0f ? 1 : 0", "d >= 0.0f ? 1 : 0", "drawn", DRAWN),
    Mutant("a bound within the pieces", "core/drawn.h", "!(m < table", "!(m <= table", "drawn", DRAWN),
    Mutant(
        "the first rows of drawn coefficients only",
        "cuda/drawn.cuh",
        "k <= DrawnTable::degree; k += rows",
        "k < DrawnTable::degree; k += rows",
        "drawn",
        DRAWN,
    ),
    Mutant("no offset of a draw", "cuda/drawn.cuh", "*seed), offset}", "*seed), 0}", "drawn", DRAWN),
    Mutant(
        "vectors at any address, drawing",
        "cuda/drawn.cuh",
        "if (aligned && begin + unit <= n) {",
        "if (begin + unit <= n) {",
        "drawn",
        DRAWN,
        nth=0,
    ),
    Mutant(
        "vectors at any address, gradients of a draw",
        "cuda/drawn.cuh",
        "if (aligned && begin + unit <= n) {",
        "if (begin + unit <= n) {",
        "drawn",
        DRAWN,
        nth=1,
    ),
    Mutant(
        "a block is full that is not",
        "cuda/step.cuh",
        "block_elements <= n;",
        "block_elements <= n + 1;",
        "activations",
        "*StepForward*",
        DEVICE,
    ),
    Mutant(
        "a block of codes is full that is not",
        "cuda/packing.cuh",
        "block_codes <= n;",
        "block_codes <= n + 8;",
        "packing",
        "*Packing",
        DEVICE,
    ),
    Mutant(
        "NaN is above every boundary, bfloat16",
        "cuda/step.cuh",
        "__hgt2_mask(a, b)",
        "__hgtu2_mask(a, b)",
        "activations",
        "*SixteenBitPatterns",
        DEVICE,
        nth=0,
    ),
    Mutant(
        "NaN is above every boundary, float16",
        "cuda/step.cuh",
        "__hgt2_mask(a, b)",
        "__hgtu2_mask(a, b)",
        "activations",
        "*SixteenBitPatterns",
        DEVICE,
        nth=1,
    ),
    Mutant(
        "the last boundary is not prepared",
        "cuda/step.cuh",
        "if (thread < max_code(bits)) {",
        "if (thread < max_code(bits) - 1) {",
        "activations",
        ACTIVATIONS,
    ),
    Mutant(
        "a boundary too many is prepared",
        "cuda/step.cuh",
        "if (thread < max_code(bits)) {",
        "if (thread <= max_code(bits)) {",
        "activations",
        ACTIVATIONS,
    ),
    Mutant(
        "a band without its upper end",
        "core/step.h",
        "static_cast<int>(x <= high)",
        "static_cast<int>(x < high)",
        "activations",
        ACTIVATIONS,
    ),
    Mutant(
        "the largest code does not fit",
        "cuda/packing.cuh",
        "any > max_code(bits)",
        "any >= max_code(bits)",
        "packing",
        ACTIVATIONS,
    ),
    Mutant(
        "a byte of the last codes is lost",
        "cuda/packing.cuh",
        "b < packed_bytes(count, bits)",
        "b < packed_bytes(count, bits) - 1",
        "packing",
        ACTIVATIONS,
    ),
    Mutant(
        "vectors at any address, gated",
        "cuda/gated.cuh",
        "is_aligned(data, max_access) && (",
        "(",
        "gated",
        GATED,
    ),
    Mutant(
        "a block of units is full that is not",
        "cuda/gated.cuh",
        "block_elements <= rows * cols",
        "block_elements <= rows * cols + 1",
        "gated",
        "*Gated*",
        DEVICE,
    ),
    Mutant(
        "pairs in the wrong order", "cuda/gated.cuh", "x[j] = first[2 * j];", "x[j] = first[2 * j + 1];", "gated", GATED
    ),
    Mutant(
        "the activation is not rounded",
        "cuda/gated.cuh",
        "to_compute(value) * to_compute(factor)",
        "Function::value(to_compute(x)) * to_compute(factor)",
        "gated",
        GATED,
    ),
    Mutant(
        "the derivative of the other half",
        "core/gated.h",
        "z >= V{} ? small : large",
        "z >= V{} ? large : small",
        "gated",
        GATED,
    ),
    Mutant("one buffer for two sums", "cuda/group.cuh", "    turn ^= 1;\n", "", "layer_norm", NORMS),
    Mutant("no barrier in a sum", "cuda/group.cuh", "    __syncthreads();\n", "", "rms_norm", NORMS),
    Mutant(
        "a wrong partner in a sum", "cuda/group.cuh", "sums[i], distance)", "sums[i], distance ^ 1)", "rms_norm", NORMS
    ),
    Mutant("half of the lanes in the mask", "cuda/group.cuh", "0xffffffffu", "0x0000ffffu", "rms_norm", NORMS),
    Mutant("a warp beyond the last row", "cuda/group.cuh", "if (i < count) {", "if (i <= count) {", "rms_norm", NORMS),
    Mutant(
        "sums of warps that are not there",
        "cuda/group.cuh",
        "warp < threads / warp_size ?",
        "warp <= threads / warp_size ?",
        "rms_norm",
        NORMS,
    ),
    Mutant(
        "columns beyond the row are not zero",
        "cuda/norm.cuh",
        "vectors[Tiling::vectors] = {};",
        "vectors[Tiling::vectors];",
        "layer_norm",
        NORMS,
    ),
    Mutant(
        "a vector beyond the row",
        "cuda/norm.cuh",
        "place.column(k, width) < place.cols; ++k",
        "place.column(k, width) <= place.cols; ++k",
        "layer_norm",
        NORMS,
    ),
    Mutant(
        "every address is aligned",
        "cuda/vector.cuh",
        "return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(alignment) == 0;",
        "return alignment > 0 || pointer == nullptr;",
        "rms_norm",
        NORMS,
    ),
    Mutant(
        "the mean is not subtracted",
        "core/norm.h",
        "rstd * (g - mean_g - y * mean_gy)",
        "rstd * (g - y * mean_gy)",
        "layer_norm",
        NORMS,
    ),
    Mutant(
        "eps outside of the root",
        "core/norm.h",
        "std::sqrt(moment + eps)",
        "(std::sqrt(moment) + eps)",
        "rms_norm",
        NORMS,
    ),
    Mutant(
        "the last strip of rows is not added",
        "cuda/norm.cuh",
        "strip < strips; strip += parts",
        "strip < strips - 1; strip += parts",
        "layer_norm",
        NORMS,
    ),
]


def place(mutant: Mutant, text: str) -> int:
    """Where the edit begins in the text of its header."""
    places = text.count(mutant.old)
    if places <= mutant.nth:
        raise ValueError(f"{mutant.header} has {places} times {mutant.old!r}, expected more than {mutant.nth}")
    at = -1
    for _ in range(mutant.nth + 1):
        at = text.index(mutant.old, at + 1)
    return at


def mutated(mutant: Mutant, text: str) -> str:
    """The text of a header after the edit."""
    at = place(mutant, text)
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


def compile_command(build: Path, kernels: str) -> list[str]:
    """How the build compiles cpp/cuda/<kernels>.cu, without a launcher, to PTX of the newest architecture alone."""
    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    [command] = [c["command"] for c in commands if Path(c["file"]) == ROOT / f"cpp/cuda/{kernels}.cu"]
    words = shlex.split(command)
    words = words[next(k for k, word in enumerate(words) if Path(word).name == "nvcc") :]
    targets = [word for word in words if word.startswith("--generate-code")]
    words = [word for word in words if word not in targets[:-1]]
    return [re.sub(r",sm_\d+|sm_\d+,", "", word) for word in words]  # without machine code


def link_command(build: Path, program: str) -> list[str]:
    """How the build links a test program."""
    lines = subprocess.run(
        ["ninja", "-C", str(build), "-t", "commands", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    line = next(line for line in reversed(lines) if f"/{program} " in f"{line} " and ".cu.o" in line)
    words = shlex.split(line.split("&&")[1])
    return words


def run_mutant(mutant: Mutant, build: Path) -> str:
    """Builds and runs the tests with an edit. Returns what noticed it, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        include = Path(folder, "include")
        shutil.copytree(INCLUDE, include)
        header = include / "lomem" / mutant.header
        header.write_text(mutated(mutant, header.read_text(encoding="utf-8")), encoding="utf-8")

        compiled = Path(folder, "kernels.o")
        command = [word.replace(str(INCLUDE), str(include)) for word in compile_command(build, mutant.kernels)]
        command[command.index("-o") + 1] = str(compiled)
        if "-MF" in command:
            command[command.index("-MF") + 1] = str(compiled) + ".d"
        subprocess.run(command, cwd=build, capture_output=True, text=True, check=True)

        program = Path(folder, mutant.program)
        command = link_command(build, mutant.program)
        command = [str(compiled) if word.endswith(f"/{mutant.kernels}.cu.o") else word for word in command]
        command[command.index("-o") + 1] = str(program)
        subprocess.run(command, cwd=build, capture_output=True, text=True, check=True)

        return noticed(mutant, program)


def noticed(mutant: Mutant, program: Path) -> str:
    """Runs the tests. Returns what failed, or an empty string; raises ValueError if they cannot run."""
    try:
        tests = subprocess.run(
            [program, f"--gtest_filter={mutant.tests}", "--gtest_fail_fast"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        if mutant.endless:
            return "no end"
        raise ValueError(f"{mutant.name}: the tests take more than {SECONDS} seconds") from None
    if tests.returncode == 0 and "Running 0 tests" not in tests.stdout:
        return ""
    reports = [line for line in tests.stderr.splitlines() if line.startswith("emulator: ")]
    faults = sorted({line.split(":")[1].strip() for line in reports})
    wrong = re.search("Expected equality|Expected: |exceeds|difference between", tests.stdout) is not None
    if "[  FAILED  ]" not in tests.stdout:  # such as PTX that cannot be parsed
        raise ValueError(f"{mutant.name}: exit {tests.returncode}: {(tests.stderr or tests.stdout).strip()[-200:]}")
    return ", ".join([*(["wrong values"] if wrong else []), *faults])


def main() -> int:
    """Runs the mutants; returns 1 if the tests pass with one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build", type=Path, help="the build folder of the preset `emulate`")
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of mutants; all if there are none")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"unknown mutants: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    build = arguments.build.resolve()
    # Without an edit, the tests pass.
    controls = {(mutant.kernels, mutant.tests, mutant.program): mutant for mutant in chosen}
    for mutant in controls.values():
        failed = run_mutant(mutant._replace(name="no edit", new=mutant.old), build)
        if failed:
            sys.exit(f"{mutant.program} --gtest_filter={mutant.tests} fails without an edit: {failed}")
    missed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, noticed in zip(chosen, pool.map(lambda one: run_mutant(one, build), chosen), strict=True):
            print(f"{'noticed' if noticed else 'MISSED ':8} {mutant.name}: {noticed or mutant.tests}", flush=True)
            missed += not noticed
    print(f"{len(chosen) - missed} of {len(chosen)} mutants noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
