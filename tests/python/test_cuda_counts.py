"""The tool that counts what CUDA kernels cost, on made-up figures and machine code."""

import copy
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_counts  # noqa: E402
import machine_code  # noqa: E402

KERNEL = "body_kernel<StepForward<GELU, Steps, bfloat16>>"
OLD = {
    "nvcc": "13.0.88",
    "arch": "sm_90",
    "multiprocessors": 132,
    "cases": {
        "step_encode f32 8 bits": {
            "elements": 1024,
            "ideal": 5,
            "loaded": 4,
            "stored": 1,
            "moved": 5,
            "ratio": 1,
            "small": 0,
            "instructions": 50.38,
            "active_lanes": 31.5,
            "conversions": 0.25,
            "divisions": 0,
            "special_functions": 0,
            "shuffles": 0,
            "wavefronts": 5.12,
            "kernels": [KERNEL],
        }
    },
    "machine code": {KERNEL: {"registers": 64, "instructions": 816, "per element": 32.9}},
}
CASE = "step_encode f32 8 bits"


def changed(kind, name, **figures):
    """The results with other figures."""
    new = copy.deepcopy(OLD)
    new[kind][name].update(figures)
    return new


def test_the_same_figures():
    assert cuda_counts.compare(OLD, copy.deepcopy(OLD)) == ([], [])


@pytest.mark.parametrize(
    ("figure", "value", "worse"),
    [
        ("moved", 5.06, True),
        ("moved", 5.04, None),  # 1 % is tolerated
        ("moved", 4.9, False),
        ("instructions", 51.5, True),
        ("instructions", 49, False),
        ("active_lanes", 30, True),
        ("active_lanes", 32, False),
        ("divisions", 0.01, None),  # of rounding
        ("divisions", 0.03, True),
        ("wavefronts", 6, True),
        ("wavefronts", 1, False),
        ("elements", 2048, True),
        ("ideal", 4, True),  # it must not change
        ("ideal", 6, True),
    ],
)
def test_a_figure_that_differs(figure, value, worse):
    comparison = cuda_counts.compare(OLD, changed("cases", CASE, **{figure: value}))
    assert [len(lines) for lines in comparison] == [int(worse is True), int(worse is False)]
    for line in [*comparison.worse, *comparison.better]:
        assert line.startswith(f"{CASE}: {figure} was ")
        assert f", is {value:g}" in line


def test_registers_and_machine_instructions():
    new = changed("machine code", KERNEL, registers=65, instructions=700)
    del new["machine code"][KERNEL]["per element"]
    comparison = cuda_counts.compare(OLD, new)
    assert comparison.worse == [
        f"{KERNEL}: registers was 64, is 65 (+1.6 %)",
        f"{KERNEL}: per element was 32.9, is None",
    ]
    assert comparison.better == [f"{KERNEL}: instructions was 816, is 700 (-14.2 %)"]


def test_another_compiler():
    """What it has no say in is still compared, and so is which kernels there are."""
    new = changed("machine code", KERNEL, registers=100)
    new["nvcc"] = "13.1.0"
    new["cases"][CASE].update(instructions=90, moved=10)
    new["machine code"]["another"] = {"registers": 1, "instructions": 1}
    assert cuda_counts.compare(OLD, new).worse == [f"{CASE}: moved was 5, is 10 (+100.0 %)", "another: a new kernel"]


def test_new_and_vanished_cases_and_kernels():
    new = copy.deepcopy(OLD)
    new["cases"]["another case 1"] = new["cases"].pop(CASE)
    new["machine code"]["other"] = new["machine code"].pop(KERNEL)
    assert cuda_counts.compare(OLD, new).worse == [
        "another case 1: a new case",
        f"{CASE}: the case is gone",
        f"{KERNEL}: the kernel is gone",
        "other: a new kernel",
    ]
    other = cuda_counts.compare(OLD, changed("cases", CASE, kernels=["a", "b"]))
    assert other.worse == [f"{CASE}: kernels were {KERNEL}, are a + b"]


def test_every_kernel_has_a_case():
    assert cuda_counts.not_launched(OLD) == []
    new = copy.deepcopy(OLD)
    new["machine code"] |= {"kernel<16>": {"registers": 1}, "kernel<8>": {"registers": 1}}
    assert cuda_counts.not_launched(new) == ["kernel<8>", "kernel<16>"]


def test_a_shared_access_where_there_was_none():
    old = copy.deepcopy(OLD)
    del old["cases"][CASE]["wavefronts"]
    assert cuda_counts.compare(old, OLD).worse == [f"{CASE}: wavefronts was None, is 5.12"]


def test_what_is_printed(capsys):
    assert cuda_counts.check(OLD, copy.deepcopy(OLD)) == 0
    assert capsys.readouterr().out == "2 cases and kernels: 0 figures worse, 0 better\n"
    assert cuda_counts.check(OLD, changed("cases", CASE, moved=4)) == 0
    assert "better: " in capsys.readouterr().out
    assert cuda_counts.check(OLD, changed("cases", CASE, moved=6)) == 1
    assert "WORSE: " in capsys.readouterr().out


def test_the_file_has_a_line_for_each_case():
    results = copy.deepcopy(OLD)
    for cols in (1024, 512, 32):
        results["cases"][f"layer_norm forward f32 plain {cols}"] = OLD["cases"][CASE]
    text = cuda_counts.as_json(results)
    assert json.loads(text) == results
    lines = [line.split('"')[1] for line in text.splitlines() if '"elements"' in line]
    assert lines == [*(f"layer_norm forward f32 plain {cols}" for cols in (32, 512, 1024)), CASE]


def test_tables_begin_with_the_worst():
    results = copy.deepcopy(OLD)
    results["cases"]["step_encode f32 3 bits"] = OLD["cases"][CASE] | {"ratio": 2.086}
    results["cases"]["layer_norm forward f32 plain 512"] = OLD["cases"][CASE]
    text = cuda_counts.as_markdown(results)
    assert text.index("| f32 3 bits | 2.086 |") < text.index("| f32 8 bits | 1 |")
    assert "## layer_norm forward\n" in text
    assert f"| `{KERNEL}` | 64 | 816 | 32.9 |" in text


def test_the_committed_figures():
    """They are what the tool writes, and the table beside them is theirs."""
    text = cuda_counts.RESULTS.read_text(encoding="utf-8")
    results = json.loads(text)
    assert cuda_counts.as_json(results) == text
    table = cuda_counts.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert cuda_counts.as_markdown(results) == table
    assert cuda_counts.not_launched(results) == []


def test_figures_in_the_document():
    """The table of docs/cuda.md has rounded figures of the file."""
    cases = json.loads(cuda_counts.RESULTS.read_text(encoding="utf-8"))["cases"]
    text = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("| `") and row.count("|") == 6]
    rows = [[cell.strip(" `") for cell in row] for row in rows]
    assert len(rows) > 5
    for name, *figures in rows:
        case = cases[name]
        keys = ("ideal", "ratio", "instructions", "wavefronts")
        decimals = (2, 2, 0, 1)
        expected = [f"{case[k]:.{n}f}" if k in case else "" for k, n in zip(keys, decimals, strict=True)]
        assert figures == expected, name


# Machine code

LISTING = """\
\t.section\t.text.kernel,"ax",@progbits
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*0040*/                   FFMA R4, R4, R4, R4 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0080*/                   CALL.REL.NOINC `($subroutine) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   WARPSYNC.ALL ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
$subroutine:
        /*00d0*/                   RET.REL.NODEC R2 `(kernel) ;
"""


@pytest.fixture
def code():
    [(name, instructions, targets)] = machine_code.parse(LISTING)
    return machine_code.Code(name, instructions, targets, 8)


def test_a_listing_is_parsed(code):
    assert code.mangled == "kernel"
    assert len(code.instructions) == 13
    assert code.instructions[2] == "LDG.E.128 R4, desc[UR6][R2.64]"
    assert code.targets == {1: 7, 3: 10, 5: 2, 11: 2, 12: 12}
    assert [machine_code.opcode(code.instructions[k]) for k in (1, 3)] == ["BRA", "BRA.DIV"]


def test_the_hot_path(code):
    path = machine_code.hot_path(code, machine_code.SOUGHT[4])
    assert path == [0, 1, 2, 3, 4, 5, 6]
    assert machine_code.longest_loop(code, path) == [2, 3, 4, 5]
    assert machine_code.longest_loop(code, [7, 8, 9]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("body_kernel<StepForward<GELU, Steps, bfloat16>>", 7 / 16),
        ("body_kernel<StepEncode<SearchCoder<float, 3>, float>>", 7 / 16),
        ("body_kernel<StepEncode<BandCoder<double>, double>>", 7 / 16),
        ("body_kernel<StepBackward<double, 2>>", 7 / 8),
        ("warps_kernel<NormBackwardStrips<layer, Tiling<float, 4, 2, 32>>>", 4 / 8),
        ("blocks_kernel<NormForwardRows<rms, Tiling<float, 8, 0, 512>>>", None),
        ("body_kernel<AddStripsBody<float>>", None),
    ],
)
def test_instructions_per_element(code, name, expected):
    assert machine_code.instructions_per_element(code, name) == expected


OURS = "_ZN5lomem4cuda11body_kernelINS0_11StepForwardINS_4GELUENS_5StepsEfEEEEvT_"
THEIRS = "vectorized_elementwise_kernelILi4E18GeluCUDAKernelImplGeluTypeEENKUlvE0_EUlfE"


@pytest.mark.parametrize(("constant", "different"), [("0.5", 0), ("0.25", 1)])
def test_the_comparison_with_torch(constant, different, monkeypatch, capsys):
    arithmetic = ["FMUL R1, R2, 0.5", "FSETP.GT.AND P0, PT, R1, -3.18, PT", "FFMA R1, R1, R2, R3", "EXIT"]
    codes = {
        "ours": machine_code.Code(OURS, arithmetic, {}, 8),
        "theirs": machine_code.Code(THEIRS, [f"FMUL R1, R2, {constant}", "FFMA R5, R1, R2, R3"] * 2, {}, 8),
    }
    monkeypatch.setattr(machine_code, "kernels", lambda program, arch, contains: [codes[program.name]])
    assert machine_code.compare_with_torch(Path("ours"), Path("theirs"), "90") == different
    assert f"vectors of 4: {'different' if different else 'the same'}" in capsys.readouterr().out
