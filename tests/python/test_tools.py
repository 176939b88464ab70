"""The tools of the repository: what kernels use, the table of versions, tests of other libraries."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    return subprocess.run(
        [sys.executable, *(str(part) for part in command)], capture_output=True, text=True, timeout=600, check=False
    )


REPORT = """\
ptxas info    : Compiling entry function '_ZN5lomem4cuda6kernelIfEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN5lomem4cuda6kernelIfEEvv
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compiling entry function '_ZN5lomem4cuda6kernelIdEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN5lomem4cuda6kernelIdEEvv
    {stack} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_local_memory_fails_the_check(tmp_path):
    check = ROOT / "cmake/cuda_resources.py"
    assert run(check, tmp_path).returncode == 2, "no reports"
    for stores, loads, stack in [(0, 0, 0), (8, 4, 0), (0, 4, 0), (0, 0, 16)]:
        report = REPORT.format(stores=stores, loads=loads, stack=stack)
        (tmp_path / "kernel.o.ptxas").write_text(report, encoding="utf-8")
        result = run(check, tmp_path)
        spilled = stores + loads
        assert result.returncode == (1 if spilled or stack else 0)
        end = f"{int(spilled > 0)} with spills, {int(stack > 0)} with a stack"
        assert result.stdout.splitlines()[-1] == f"2 kernels, 1 architectures, {end}"
        registers = [line.split()[-1] for line in result.stdout.splitlines() if line.startswith("kernel<")]
        assert registers == [f"40~{stack}" if stack else "40", f"32+{spilled}" if spilled else "32"]


def test_recording_a_compiler(tmp_path):
    compiler = tmp_path / "compiler.py"
    compiler.write_text(
        "import sys\n"
        "sys.stderr.write('ptxas info    : Used 7 registers\\nwarning: something else\\n')\n"
        "sys.exit(int(sys.argv[-1]))\n",
        encoding="utf-8",
    )
    for code in (0, 3):
        target = tmp_path / f"{code}.o"
        result = run(ROOT / "cmake/cuda_resources.py", "--record", sys.executable, compiler, "-o", target, code)
        assert result.returncode == code
        assert result.stderr == "warning: something else\n"
        assert target.with_name(target.name + ".ptxas").exists() == (code == 0)


RESULTS = """\
<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails[1]"><failure message=""/></testcase>
<testcase classname="a" name="cannot"><error message=""/></testcase>
<testcase classname="a" name="known"><skipped type="pytest.xfail" message=""/></testcase>
<testcase classname="a" name="elsewhere"><skipped type="pytest.skip" message=""/></testcase>
</testsuite></testsuites>
"""


def test_the_table_of_versions(tmp_path):
    script = tmp_path / "tools/versions.py"
    for folder in (script.parent, tmp_path / "benchmarks/results", *(tmp_path / "build/versions" / v for v in "ab")):
        folder.mkdir(parents=True)
    script.write_text((ROOT / "tools/versions.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "build/versions/a/results.xml").write_text(RESULTS, encoding="utf-8")
    result = run(script, "a", "c")
    assert result.returncode == 1, "a test failed, and a version has no results"
    assert "| a | 5 | 1 | 2 | 1 | 1 |\n| c | no results | | | | |\n" in result.stdout
    assert result.stdout.endswith(
        "With torch a:\n\n- `a::cannot`\n- `a::fails[1]`\n\nWith torch c:\n\n- `no results`\n"
    )
    assert (tmp_path / "benchmarks/results/torch-versions.md").read_text(encoding="utf-8") == result.stdout
    passes = RESULTS.replace("<failure", "<note").replace("<error", "<note")
    (tmp_path / "build/versions/b/results.xml").write_text(passes, encoding="utf-8")
    result = run(script, "b")
    assert (result.returncode, "| b | 5 | 3 | 0 | 1 | 1 |\n" in result.stdout) == (0, True)


TEST_OF_FEWBIT = """\
from unittest import TestCase, skip, skipUnless
import fewbit
import torch
from fewbit.approx import StepWiseFunction, estimate_error
from fewbit.compat import removeprefix
from fewbit.functional.activations import gelu, store
@skipUnless(torch.cuda.is_available(), "")
class TestSome(TestCase):
    def test_gelu(self):
        x = torch.linspace(-5, 5, 101, device="cuda").to("cuda:1").cuda().requires_grad_()
        y = gelu(x)
        y.sum().backward()
        self.assertTrue(torch.equal(y, torch.nn.functional.gelu(x)))
        self.assertEqual((fewbit.GELU.__module__, x.device.type), ("lomem.compat.fewbit.modules.activations", "cpu"))
        self.assertLessEqual(len(set(x.grad.tolist())), 8)
    def test_stand_ins(self):
        steps = StepWiseFunction(*[part.double().numpy() for part in store.get("tanh", 1)])
        # A line over steps: the integral of (x - level)^2.
        integral = sum(
            ((high - level) ** 3 - (low - level) ** 3) / 3
            for low, high, level in zip(steps.borders[:-1], steps.borders[1:], steps.levels)
        )
        self.assertAlmostEqual(1, estimate_error(lambda x: x, steps, 1e-2)[0] / integral, delta=1e-6)
        self.assertEqual(removeprefix("TestSome", "Test"), "Some")
    @skip("")
    def test_nothing(self):
        pass
"""
SCRIPT_OF_LOWMEMORYBP = """\
import time
import torch
from lomem import functional, packing
def count(n):
    for _ in range(n):
        calls.append(n)
    torch.cuda.synchronize("cuda:0")
if __name__ == "__main__":
    calls = []
    num_repeat = 100
    x = torch.rand(9, device="cuda:0") > 0.5
    count(num_repeat)
    same = (packing.unpack_uint8_to_bool(functional.pack_bool_to_uint8(x), (9,)) == x).all()
    print("pass!" if same and calls == [1] and x.device.type == "cpu" else "fail!")
"""


def test_tests_of_other_libraries(tmp_path):
    tool = ROOT / "tools/peer_tests.py"
    result = run(tool, "fewbit", tmp_path)
    assert result.returncode == 2
    assert f"checkout is {tmp_path}, expected a folder with tests fewbit/**/*_test.py" in result.stderr

    folder = tmp_path / "fewbit/functional"
    folder.mkdir(parents=True)
    (tmp_path / "fewbit/__init__.py").write_text("raise AssertionError", encoding="utf-8")
    (tmp_path / "fewbit/fft_test.py").write_text("import fewbit.fft", encoding="utf-8")
    (folder / "some_test.py").write_text(TEST_OF_FEWBIT, encoding="utf-8")
    result = run(tool, "fewbit", tmp_path)
    assert result.stdout == (
        "fewbit/fft_test.py: left out\nfewbit/functional/some_test.py: 2 passed, 1 skipped, 0 failed\n"
    )
    assert (result.returncode, result.stderr) == (0, "")
    (folder / "some_test.py").write_text(TEST_OF_FEWBIT.replace("(x))", "(2 * x))"), encoding="utf-8")
    (folder / "other_test.py").write_text("from fewbit import nothing", encoding="utf-8")
    result = run(tool, "fewbit", tmp_path)
    assert result.stdout.splitlines()[1:] == [
        "fewbit/functional/other_test.py: 0 passed, 0 skipped, 1 failed",
        "fewbit/functional/some_test.py: 1 passed, 1 skipped, 1 failed",
    ]
    assert result.returncode == 1
    assert "test_gelu" in result.stderr
    assert "cannot import name 'nothing'" in result.stderr

    (tmp_path / "test").mkdir()
    (tmp_path / "test/test_pass.py").write_text(SCRIPT_OF_LOWMEMORYBP, encoding="utf-8")
    result = run(tool, "lowmemorybp", tmp_path)
    assert (result.stdout, result.stderr) == ("test/test_pass.py: 1 passed, 0 skipped, 0 failed\n", "")
    assert result.returncode == 0
    (tmp_path / "test/test_fail.py").write_text(SCRIPT_OF_LOWMEMORYBP.replace("== [1]", "== []"), encoding="utf-8")
    (tmp_path / "test/test_raise.py").write_text("raise ValueError('why')", encoding="utf-8")
    result = run(tool, "lowmemorybp", tmp_path)
    assert result.stdout.splitlines() == [
        "test/test_fail.py: 0 passed, 0 skipped, 1 failed",
        "test/test_pass.py: 1 passed, 0 skipped, 0 failed",
        "test/test_raise.py: 0 passed, 0 skipped, 1 failed",
    ]
    assert result.returncode == 1
    assert "fail!" in result.stderr
    assert "ValueError: why" in result.stderr
