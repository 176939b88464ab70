"""The tools of the repository: benchmarks, and the check of the CUDA kernels' registers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    return subprocess.run(
        [sys.executable, *(str(part) for part in command)], capture_output=True, text=True, timeout=600, check=False
    )


def test_benchmark_writes_what_it_prints(tmp_path):
    file = tmp_path / "results" / "cpu.json"
    options = ["--device", "cpu", "--elements", "4K", "--columns", "64", "--dtypes", "bf16,fp32"]
    result = run(ROOT / "benchmarks/ops.py", *options, "--rounds", "2", "--seconds", "0.0001", "--json", file)
    assert result.returncode == 0, result.stderr
    contents = json.loads(file.read_text(encoding="utf-8"))
    assert contents["command"].startswith("python benchmarks/ops.py --device cpu")
    assert contents["machine"]["device"] == "cpu"
    # Three activations and two norms with and without parameters, two dtypes, three passes, two contenders.
    records = contents["records"]
    assert len(records) == (3 + 2 * 2) * 2 * 3 * 2
    for record in records:
        assert record["microseconds"] > 0
        bandwidth = record["bytes_per_element"] * record["elements"] / record["microseconds"] * 1e-3
        assert abs(record["gigabytes_per_second"] - bandwidth) <= 1e-6 * bandwidth
        assert record["contender"] != "lomem" or record["time_over_lomem"] == 1
        assert f"{record['microseconds']:.1f}" in result.stdout
    # What must be moved at least: input and output, and 2 bits of codes.
    bytes_of = {(r["case"], r["dtype"], r["pass"], r["contender"]): r["bytes_per_element"] for r in records}
    assert bytes_of["regelu2", "bf16", "forward", "lomem"] == 2 + 2 + 0.25
    assert bytes_of["regelu2", "bf16", "backward", "torch"] == 2 + 2 + 2
    assert bytes_of["resilu2", "fp32", "both", "lomem"] == 2 * (4 + 4 + 0.25)
    assert bytes_of["layer norm, 64 columns", "bf16", "backward", "lomem"] == 3 * 2


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
