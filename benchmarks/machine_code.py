"""The machine code of the CUDA kernels in a library or program: instructions, hot paths, comparison with torch's.

A part of cuda_counts.py. Needs cuobjdump and nvdisasm (of the CUDA toolkit, or `pip install --group cuda`) and c++filt.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cmake"))

from cuda_resources import readable

ELEMENT_BYTES = {"double": 8, "float": 4, "bfloat16": 2, "float16": 2}
# torch's kernel for the same function and dtype, identified by parts of its mangled name.
TORCH_KERNELS = {
    "GELU": ("18GeluCUDAKernelImpl", "GeluTypeEENKUlvE0_"),
    "GELUTanh": ("18GeluCUDAKernelImpl", "GeluTypeEENKUlvE_"),
    "SiLU": ("silu_kernel", ""),
}
TORCH_DTYPES = {"float": "EUlfE", "bfloat16": "BFloat16E", "float16": "4HalfE"}
FLOATING_POINT = re.compile(r"^(F(ADD|MUL|FMA|SEL|SETP|CHK)|D(ADD|MUL|FMA|SETP)|MUFU)")


class Code(NamedTuple):
    """The code of a kernel, without its subroutines, which handle rare cases."""

    mangled: str
    instructions: list[str]
    targets: dict[int, int]  # of the branches that stay in the kernel
    registers: int


def find(tool: str) -> str:
    """The path of a disassembler: on PATH, or where pip puts it."""
    installed = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{tool}")
    path = shutil.which(tool) or next(map(str, sorted(installed)), None)
    if path is None:
        raise SystemExit(f"there is no {tool}: install it with pip install --group cuda, or a CUDA toolkit that has it")
    return path


def run(tool: str, *arguments: object, folder: str | None = None) -> str:
    """Runs a disassembler and returns its output."""
    command = [find(tool), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> Iterator[tuple[str, list[str], dict[int, int]]]:
    """Names, instructions and branches of the kernels in nvdisasm's output."""
    for section in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if line.startswith("$"):  # a subroutine
                break
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                instructions.append(instruction[1])
        targets = {}
        for k, instruction in enumerate(instructions):
            label = re.search(r"BRA.*?(\.L_\w+)", instruction)
            if label and labels.get(label[1], len(instructions)) < len(instructions):
                targets[k] = labels[label[1]]
        yield section[: section.index(",")], instructions, targets


def kernels(program: Path, arch: str, contains: tuple[str, ...] = ()) -> Iterator[Code]:
    """The kernels of a library or program that were compiled for an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "--extract-elf", f"sm_{arch}.cubin", program.resolve(), folder=folder)
        for cubin in sorted(Path(folder).iterdir()):
            if contains and not any(part.encode() in cubin.read_bytes() for part in contains):
                continue
            usage = re.findall(r"Function (\S+):\s+REG:(\d+)", run("cuobjdump", "--dump-resource-usage", cubin))
            registers = {name: int(count) for name, count in usage}
            for name, instructions, targets in parse(run("nvdisasm", "-c", cubin)):
                yield Code(name, instructions, targets, registers.get(name, 0))


def opcode(instruction: str) -> str:
    """The opcode of an instruction: FFMA for `@P0 FFMA R1, ...`."""
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0]


def whole_blocks(instructions: list[str]) -> list[str]:
    """The instructions that whole blocks of the step kernels run: those up to the first EXIT."""
    return instructions[: instructions.index("EXIT") + 1]


def successors(code: Code, k: int) -> list[int]:
    """The instructions that may follow one, without those before it."""
    instruction = code.instructions[k]
    # A branch may have a condition of its own: BRA.U UP0, or BRA.DIV, which diverged warps take.
    conditional = instruction.startswith("@") or bool(re.match(r"BRA\S*\s+[^`\s]", instruction))
    result = [code.targets[k]] if code.targets.get(k, 0) > k else []
    if conditional or not opcode(instruction).startswith(("BRA", "EXIT", "RET")):
        result.append(k + 1)
    return [target for target in result if target < len(code.instructions)]


def hot_path(code: Code, sought: re.Pattern[str]) -> list[int]:
    """Of all ways through a kernel, the one with the most sought instructions, then the fewest calls and instructions.

    Every loop is passed once.
    """
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    for k in range(len(code.instructions) - 1, -1, -1):
        ends = [((0, 0, 0), None)] if opcode(code.instructions[k]).startswith(("EXIT", "RET")) else []
        ways = ends + [(best[target][0], target) for target in successors(code, k) if target in best]
        if ways:
            (found, calls, steps), target = max(ways, key=lambda way: way[0])
            here = code.instructions[k]
            score = (found + bool(sought.search(here)), calls - opcode(here).startswith("CALL"), steps - 1)
            best[k] = score, target
    path = []
    k: int | None = 0 if 0 in best else None
    while k is not None:
        path.append(k)
        k = best[k][1]
    return path


def longest_loop(code: Code, path: list[int]) -> list[int]:
    """The part of a path that the largest loop on it repeats; empty if there is none."""
    loops = [(code.targets[k], k) for k in path if code.targets.get(k, k) < k]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    return [k for k in path if begin <= k <= end]


# What the path of whole vectors has: loads and stores of 16 bytes, arithmetic, and, in kernels for vectors of 8, which
# take any dtype, conversions of bfloat16. So it is bfloat16's there, and float32's in kernels for vectors of 4.
SOUGHT = {
    8: re.compile(r"(LDG|STG)\S*\.128|F2FP\.BF16|0x10000(?![0-9a-f])|0xffff0000|FFMA|FMUL|FADD"),
    4: re.compile(r"(LDG|STG)\S*\.128|FFMA|FMUL|FADD"),
}


def instructions_per_element(code: Code, name: str) -> float | None:
    """Instructions on the hot path, of a kernel with a readable name; None if it has no simple hot path.

    Of norms, the path with weight (and bias), whose dtype is that of the input.
    """
    if match := re.search(r"Step(?:Forward|Encode|Backward)<.*?\b(double|float|bfloat16|float16)\b", name):
        bits = re.search(r"Coder<\w+, (\d)>|StepBackward<\w+, (\d)>", name)
        width = int(bits[1] or bits[2]) if bits else 1 if "BandCoder" in name else 2
        elements = 16 // ELEMENT_BYTES[match[1]]
        while elements * width % 8:
            elements *= 2
        return len(whole_blocks(code.instructions)) / (2 * elements)  # two units per thread: cuda/step.cuh
    if re.search(r"body_kernel<\w+Bits<\d>", name):
        path = hot_path(code, re.compile(r"(LDG|STG)\S*\.64"))
        return len(path) / 16  # two groups of eight codes: cuda/packing.cuh
    tiling = re.search(r"(?:Rows|Strips)<.*Tiling<float, ([48]), ([1-9]\d*)\b", name)
    if tiling is None:
        return None
    path = hot_path(code, SOUGHT[int(tiling[1])])
    return len(longest_loop(code, path) or path) / (int(tiling[1]) * int(tiling[2]))


def summary(program: Path, arch: str) -> dict[str, dict[str, float]]:
    """Registers, instructions, and instructions per element of the hot path, of every kernel by its readable name."""
    codes = list(kernels(program, arch))
    result = {}
    for code, name in zip(codes, readable([code.mangled for code in codes]), strict=True):
        result[name] = {"registers": code.registers, "instructions": len(code.instructions)}
        per_element = instructions_per_element(code, name)
        if per_element is not None:
            result[name]["per element"] = round(per_element, 1)
    return result


# Comparison with torch ------------------------------------------------------------------------------------------------


def arithmetic(instructions: Iterable[str], boundaries: bool) -> Counter[tuple[str, ...]]:
    """Counts floating-point instructions and their constants; `boundaries` leaves out the comparisons for codes."""
    result: Counter[tuple[str, ...]] = Counter()
    for instruction in instructions:
        name = opcode(instruction)
        if FLOATING_POINT.match(name) and not (boundaries and name.startswith(("FSETP.GT", "DSETP.GT"))):
            constants = re.findall(r"(?<![\w\[.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w\]])", instruction)
            result[(name, *sorted(constants))] += 1
    return result


def compare_with_torch(program: Path, torch: Path, arch: str) -> int:
    """Prints whether forward kernels contain the same arithmetic as torch's; returns how many do not."""
    theirs = [
        code
        for code in kernels(torch, arch, ("GeluCUDAKernelImpl", "silu_kernel"))
        if "vectorized_elementwise_kernel" in code.mangled and "ackward" not in code.mangled
    ]
    forward = {}
    codes = [code for code in kernels(program, arch, ("StepForward",)) if "StepForward" in code.mangled]
    for code, name in zip(codes, readable([code.mangled for code in codes]), strict=True):
        match = re.search(r"StepForward<(\w+), .*, (\w+)>", name)
        if match and match[2] in TORCH_DTYPES:  # float64 division and erf are subroutines
            path = arithmetic(whole_blocks(code.instructions), boundaries=True)
            forward[match[1], match[2]] = (path, 2 * 16 // ELEMENT_BYTES[match[2]])
    different = 0
    print(f"floating-point instructions per element, compared with those of {torch.name}")
    for (function, dtype), (ours, per_thread) in sorted(forward.items()):
        wanted = (*TORCH_KERNELS[function], TORCH_DTYPES[dtype])
        for code in theirs:
            if not all(part in code.mangled for part in wanted):
                continue
            # torch's kernel contains the code per element twice: for whole blocks and for the last one.
            copies = arithmetic(code.instructions, boundaries=False)
            scale = sum(copies.values()) / sum(ours.values())
            keys = sorted({*ours, *copies})
            unlike = [key for key in keys if ours[key] * scale != copies[key]]
            different += bool(unlike)
            vector = re.search(r"kernelILi(\d)", code.mangled)
            print(
                f"  {function:<10}{dtype:<10}{sum(ours.values()) / per_thread:6.1f}  vectors of {vector[1]}: "
                f"{'different' if unlike else 'the same'}"
            )
            for key in unlike:
                print(f"    {key}: {ours[key] * scale:g} against {copies[key]}")
    return different
