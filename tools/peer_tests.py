"""Runs the tests of FewBit or LowMemoryBP with lomem in place of the library, on the CPU.

    python tools/peer_tests.py fewbit CHECKOUT         # unittest, of CHECKOUT/fewbit/**/*_test.py
    python tools/peer_tests.py lowmemorybp CHECKOUT    # scripts, CHECKOUT/test/test_*.py

CHECKOUT is a folder with the library's repository; only its test files are read. The exit status is 0 if all pass.

- FewBit: `import fewbit` is `lomem.compat.fewbit`. Of FewBit's modules that lomem leaves out, tests of others import
  three; `stand_ins` defines what they need. The tests of two, LEFT_OUT, do not run.
- LowMemoryBP: its package has the name of ours, and its names are ours too, so its scripts run as they are. One that
  can print "pass!" has to; the others have to run to their end. `num_repeat`, which only times, is read as 1.
- "cuda" is read as "cpu", and `torch.cuda` says that there is a GPU.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
import traceback
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import lomem
import numpy as np
import torch
from lomem.compat import fewbit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/python"))

from cuda_stand_in import CPUAsCUDA  # noqa: E402

#: Tests of modules that `lomem.compat.fewbit` leaves out; see docs/coming-from.md.
LEFT_OUT = ("approx_test.py", "fft_test.py")


class Result(NamedTuple):
    """What became of the tests of one file."""

    passed: int
    skipped: int
    #: Name and traceback, or output.
    failed: list[tuple[str, str]]


class _PlainGELU(torch.autograd.Function):
    """GELU whose derivative is lomem's step function, in plain torch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        step = lomem.functional.step_function("gelu", fewbit.functional.activations.BITS)
        codes = torch.bucketize(x, torch.tensor(step.boundaries, dtype=x.dtype))
        ctx.save_for_backward(torch.tensor(step.levels, dtype=x.dtype)[codes.where(~x.isnan(), 0)])
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (slopes,) = ctx.saved_tensors
        return grad * slopes  # type: ignore[no-any-return]


def stand_ins() -> dict[str, dict[str, Any]]:
    """Modules of FewBit without a counterpart in lomem, with what tests of other modules import from them."""

    def step_function(borders: np.ndarray, levels: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(borders=borders, levels=levels)

    def squared_error(fn: Callable[[np.ndarray], np.ndarray], steps: Any, dx: float) -> tuple[float, list[float]]:
        """The integral of ``(fn - steps)**2`` over the domain, and over each step: midpoints not more than dx apart."""
        errors = []
        for low, high, level in zip(steps.borders[:-1], steps.borders[1:], steps.levels, strict=True):
            edges = np.linspace(low, high, 2 + int((high - low) / dx), dtype=np.float64)
            errors.append(float((np.diff(edges) * (fn((edges[1:] + edges[:-1]) / 2) - level) ** 2).sum()))
        return sum(errors), errors

    def gelu_in_plain_torch(x: torch.Tensor) -> torch.Tensor:
        return _PlainGELU.apply(x)  # type: ignore[no-any-return]

    return {
        "activation": {"gelu_op": fewbit.functional.activations.gelu, "gelu_py": gelu_in_plain_torch},
        "approx": {"StepWiseFunction": step_function, "estimate_error": squared_error},
        "compat": {"removeprefix": str.removeprefix},
    }


def fewbit_modules() -> dict[str, ModuleType]:
    """What `sys.modules` has to hold for `import fewbit` and its submodules."""
    prefix = fewbit.__name__
    modules = {
        "fewbit" + name.removeprefix(prefix): module
        for name, module in sys.modules.items()
        if name == prefix or name.startswith(prefix + ".")
    }
    for name, contents in stand_ins().items():
        modules[f"fewbit.{name}"] = ModuleType(f"fewbit.{name}")
        vars(modules[f"fewbit.{name}"]).update(contents)
    return modules


@contextlib.contextmanager
def cuda_is_the_cpu() -> Iterator[None]:
    """Puts on the CPU what is meant for a GPU."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "synchronize"),
        CPUAsCUDA(),
    ):
        yield


class _Passed(unittest.TestResult):
    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self.passed += 1


def run_unittests(path: Path) -> Result:
    """Runs the test cases of a module."""
    with mock.patch.dict(sys.modules, fewbit_modules()), cuda_is_the_cpu():
        module = ModuleType(path.stem)
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
        result = _Passed()
        unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    # Of a test with subtests, each that fails is in the list.
    failed = [(str(test), text) for test, text in [*result.failures, *result.errors]]
    return Result(result.passed, len(result.skipped), failed)


class _Once(ast.NodeTransformer):
    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        if [ast.unparse(target) for target in node.targets] == ["num_repeat"]:
            node.value = ast.Constant(1)
        return node


def run_script(path: Path) -> Result:
    """Runs a program, which is one test."""
    source = path.read_text(encoding="utf-8")
    tree = ast.fix_missing_locations(_Once().visit(ast.parse(source)))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), cuda_is_the_cpu():
        exec(compile(tree, str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})
    if "pass!" in source and "pass!" not in output.getvalue():
        return Result(0, 0, [(path.name, output.getvalue())])
    return Result(1, 0, [])


def run(path: Path) -> Result:
    """Runs a file of tests, with the same random numbers every time."""
    torch.manual_seed(0)
    try:
        return run_unittests(path) if path.name.endswith("_test.py") else run_script(path)
    except Exception:
        return Result(0, 0, [(path.name, traceback.format_exc())])


def main() -> int:
    """Runs the tests, and prints a line per file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=["fewbit", "lowmemorybp"])
    parser.add_argument("checkout", type=Path)
    arguments = parser.parse_args()
    pattern = "fewbit/**/*_test.py" if arguments.library == "fewbit" else "test/test_*.py"
    found = sorted(arguments.checkout.glob(pattern))
    if not found:
        parser.error(f"checkout is {arguments.checkout}, expected a folder with tests {pattern}")
    failures = 0
    for path in found:
        name = path.relative_to(arguments.checkout).as_posix()
        if path.name in LEFT_OUT:
            print(f"{name}: left out")
            continue
        passed, skipped, failed = run(path)
        print(f"{name}: {passed} passed, {skipped} skipped, {len(failed)} failed", flush=True)
        for test, text in failed:
            print(f"{test}\n{text}", file=sys.stderr)
        failures += len(failed)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
