"""The tools of the repository: the check of the CUDA kernels' registers."""

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
