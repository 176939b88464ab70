"""Counts the machine instructions of the activation kernels, without a GPU.

Prints the number of instructions per element for each step kernel, on the path that whole blocks take. With `--torch
libtorch_cuda.so`, also compares the floating-point instructions of the forward kernels, and their constants, with those
of torch's GELU and SiLU: kernels that evaluate the same operations return the same bits.

Needs the disassemblers of the CUDA toolkit (cuobjdump and nvdisasm, which are also in Triton's wheel) and c++filt.

    make cuda-check
    python benchmarks/cuda_instructions.py build/cuda --arch 90 --torch .../torch/lib/libtorch_cuda.so
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ELEMENT_BYTES = {"double": 8, "float": 4, "bfloat16": 2, "float16": 2}
# torch's kernel for the same function and dtype, identified by parts of its mangled name.
TORCH_KERNELS = {
    "GELU": ("18GeluCUDAKernelImpl", "GeluTypeEENKUlvE0_"),
    "GELUTanh": ("18GeluCUDAKernelImpl", "GeluTypeEENKUlvE_"),
    "SiLU": ("silu_kernel", ""),
}
TORCH_DTYPES = {"float": "EUlfE", "bfloat16": "BFloat16E", "float16": "4HalfE"}
FLOATING_POINT = re.compile(r"^(F(ADD|MUL|FMA|SEL|SETP|CHK)|D(ADD|MUL|FMA|SETP)|MUFU)")


def run(*command: object) -> str:
    """Runs a command that must succeed, and returns its standard output."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def kernels(library: Path, arch: str, contains: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Mangled names and instructions of the kernels in a library, without subroutines (for rare cases)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["cuobjdump", "--extract-elf", f"sm_{arch}.cubin", str(library.resolve())],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        for cubin in sorted(Path(folder).iterdir()):
            if not any(part.encode() in cubin.read_bytes() for part in contains):
                continue
            name, instructions = "", []
            for line in run("nvdisasm", "-c", cubin).splitlines():
                if section := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
                    if name:
                        yield name, instructions
                    name, instructions = section[1], []
                elif line.startswith("$") and name:
                    yield name, instructions
                    name = ""
                elif name and (instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)):
                    instructions.append(instruction[1])
            if name:
                yield name, instructions


def opcode(instruction: str) -> str:
    """The opcode of an instruction: FFMA for `@P0 FFMA R1, ...`."""
    return re.sub(r"^@!?U?P\w+ ", "", instruction).split()[0]


def arithmetic(instructions: Iterable[str], boundaries: bool) -> Counter[tuple[str, ...]]:
    """Counts floating-point instructions and their constants; `boundaries` leaves out the comparisons for codes."""
    result: Counter[tuple[str, ...]] = Counter()
    for instruction in instructions:
        name = opcode(instruction)
        if FLOATING_POINT.match(name) and not (boundaries and name.startswith(("FSETP.GT", "DSETP.GT"))):
            constants = re.findall(r"(?<![\w\[.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w\]])", instruction)
            result[(name, *sorted(constants))] += 1
    return result


def whole_blocks(instructions: list[str]) -> list[str]:
    """The instructions that whole blocks run: those up to the first EXIT."""
    return instructions[: instructions.index("EXIT") + 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="a build folder with liblomem_cuda.so")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--torch", type=Path, metavar="libtorch_cuda.so")
    arguments = parser.parse_args()
    library = next(arguments.build.rglob("liblomem_cuda.so"))

    forward = {}
    print(f"sm_{arguments.arch}: instructions per element")
    for mangled, instructions in kernels(library, arguments.arch, ("Step",)):
        name = run("c++filt", mangled)
        if match := re.search(r"StepForward<lomem::(\w+), .*, (?:lomem::)?(\w+)> >", name):
            function, dtype, bits = match[1], match[2], 2
        elif match := re.search(r"StepBackward<(?:lomem::)?(\w+), (\d)> >", name):
            function, dtype, bits = None, match[1], int(match[2])
        else:
            continue
        elements = 16 // ELEMENT_BYTES[dtype]
        while elements * bits % 8:
            elements *= 2
        path = whole_blocks(instructions)
        per_thread = 2 * elements  # two units per thread: cuda/step.cuh
        label = f"forward {function}" if function else f"backward {bits} bits"
        print(f"  {label:<18}{dtype:<10}{len(path) / per_thread:6.1f}")
        if function:
            forward[function, dtype] = (arithmetic(path, boundaries=True), per_thread)

    if not arguments.torch:
        return 0
    different = 0
    print(f"\nfloating-point instructions per element, compared with those of {arguments.torch.name}")
    theirs = [
        (name, instructions)
        for name, instructions in kernels(arguments.torch, arguments.arch, ("GeluCUDAKernelImpl", "silu_kernel"))
        if "vectorized_elementwise_kernel" in name and "Backward" not in name and "backward" not in name
    ]
    for (function, dtype), (ours, per_thread) in sorted(forward.items()):
        if dtype not in TORCH_DTYPES:
            continue  # float64 division and erf are subroutines
        wanted = (*TORCH_KERNELS[function], TORCH_DTYPES[dtype])
        for name, instructions in theirs:
            if not all(part in name for part in wanted):
                continue
            # torch's kernel contains the code per element twice: for whole blocks and for the last one.
            copies = arithmetic(instructions, boundaries=False)
            scale = sum(copies.values()) / sum(ours.values())
            same = {key: count * scale for key, count in ours.items()} == dict(copies)
            different += not same
            vector = re.search(r"kernelILi(\d)", name)
            print(
                f"  {function:<10}{dtype:<10}{sum(ours.values()) / per_thread:6.1f}  vectors of {vector[1]}: "
                f"{'the same' if same else 'different'}"
            )
            if not same:
                keys = sorted({*ours, *copies})
                print(
                    "\n".join(
                        f"    {key}: {ours[key] * scale:g} against {copies[key]}"
                        for key in keys
                        if ours[key] * scale != copies[key]
                    )
                )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
