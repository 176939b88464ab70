"""``lomem bench``: that figures are consistent, kept and shown as they are. None is asserted to be small or large."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from lomem.commands import cli

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from lomem.commands import bench, bench_report

TINY = "--elements 1K,4K --shapes 8x64 --dtypes fp32,bf16 --rounds 2 --seconds 0.0001"
PNG = b"\x89PNG"
FAST_PASSES = ("forward", "both")


def run(*command):
    return subprocess.run(
        [sys.executable, *(str(part) for part in command)], capture_output=True, text=True, timeout=600, check=False
    )


class Run:
    """A run of the command, and what it wrote."""

    def __init__(self, device, folder):
        self.device = device
        self.json, self.table, self.plot = (folder / f"run.{suffix}" for suffix in ("json", "md", "png"))
        threads = ("--threads", "2,1") if device == "cpu" else ()
        outputs = ("--json", self.json, "--table", self.table, "--plot", self.plot)
        self.result = run("-m", "lomem", "bench", "--device", device, *threads, *TINY.split(), *outputs)
        assert self.result.returncode == 0, self.result.stderr
        self.contents = json.loads(self.json.read_text(encoding="utf-8"))
        self.records = self.contents["records"]
        self.threads = [1, 2] if device == "cpu" else [None]


@pytest.fixture(scope="module", params=DEVICES)
def finished(request, tmp_path_factory):
    return Run(request.param, tmp_path_factory.mktemp("bench"))


def test_every_case_pass_contender_and_number_of_threads_has_a_record(finished):
    lines = [(r["case"], *r["shape"], r["dtype"], r["threads"], r["pass"], r["contender"]) for r in finished.records]
    lines = [line for line in lines if line[-1] not in ("liger", "apex")]
    expected = []
    for threads in finished.threads:
        for case in bench_report.ACTIVATIONS:
            for size in (1024, 4096):
                for dtype in ("fp32", "bf16"):
                    key = (case, size, dtype, threads)
                    expected += [(*key, pass_, name) for pass_ in bench.PASSES for name in ("lomem", "torch")]
                    expected += [(*key, pass_, "lomem fast") for pass_ in FAST_PASSES]
        for case in bench_report.NORMS:
            names = ["lomem", "torch"]
            names += ["lomem layer-norm"] if finished.device == "cpu" and case.startswith("rms") else []
            for dtype in ("fp32", "bf16"):
                expected += [(case, 8, 64, dtype, threads, pass_, name) for pass_ in bench.PASSES for name in names]
    assert sorted(lines, key=str) == sorted(expected, key=str)


def test_one_thread_is_measured_first(finished):
    assert list(dict.fromkeys(record["threads"] for record in finished.records)) == finished.threads


def test_bytes_are_what_must_be_moved(finished):
    of = {(r["case"], r["dtype"], r["pass"], r["contender"]): r["bytes_per_element"] for r in finished.records}
    # Input and output, and 2 bits of codes; backward, torch reads the input besides.
    assert of["gelu", "bf16", "forward", "lomem"] == 2 + 2 + 0.25
    assert of["gelu-tanh", "bf16", "forward", "lomem fast"] == 2 + 2 + 0.25
    assert of["gelu", "bf16", "backward", "lomem"] == 2 + 2 + 0.25
    assert of["gelu", "bf16", "backward", "torch"] == 2 + 2 + 2
    assert of["silu", "fp32", "both", "lomem"] == 2 * (4 + 4 + 0.25)
    assert of["silu", "fp32", "both", "torch"] == 2 * 4 + 3 * 4
    assert of["layer-norm", "bf16", "backward", "lomem"] == 3 * 2
    assert of["rms-norm-affine", "fp32", "both", "torch"] == 5 * 4


def test_figures_follow_from_times(finished):
    # Figures have six significant digits: each is rounded by up to 5e-6, and two or three go into a comparison.
    for record in finished.records:
        assert record["elements"] == torch.Size(record["shape"]).numel()
        assert record["microseconds"] > 0
        bandwidth = record["bytes_per_element"] * record["elements"] / record["microseconds"] * 1e-3
        assert record["gigabytes_per_second"] == pytest.approx(bandwidth, rel=1.1e-5)
        for copy in ("copy", "copy_same_size"):
            fraction = bandwidth / record[f"{copy}_gigabytes_per_second"]
            assert record[f"fraction_of_{copy}"] == pytest.approx(fraction, rel=1.6e-5)
        assert record["contender"] != "lomem" or record["time_over_lomem"] == 1
        assert record["contender"] != "torch" or record["torch_time_over_time"] == 1
        for disturbance in ("page_faults", "preemptions"):
            assert (record[disturbance] is None) == (finished.device != "cpu")
            assert (record[disturbance] or 0) >= 0


def test_the_file_says_what_ran_and_where_but_not_whose(finished):
    machine = finished.contents["machine"]
    assert finished.contents["program"] == "lomem bench"
    assert finished.contents == {"program": "lomem bench", **bench_report.load(finished.json)._asdict()}
    assert str(finished.json.parent) not in finished.json.read_text(encoding="utf-8")
    assert machine["torch"] == torch.__version__
    assert machine["lomem_cpu_capability"] == bench._C.cpu_capability()
    if finished.device == "cpu":
        assert machine["device"] == "cpu"
        assert machine["threads"] == [1, 2]
    command = shlex.split(finished.contents["command"])
    assert command[:2] == ["lomem", "bench"]
    again = bench.make_plan(cli.parser().parse_args(command[1:]))
    assert again.command() == finished.contents["command"]
    assert again.elements == [1024, 4096]
    assert again.shapes == [(8, 64)]


def test_a_run_can_be_shown_again(finished, tmp_path):
    table, plot = tmp_path / "again.md", tmp_path / "again.pdf"
    result = run("-m", "lomem", "bench", "--from", finished.json, "--table", table, "--plot", plot)
    assert result.returncode == 0, result.stderr
    assert result.stdout == finished.result.stdout
    assert table.read_bytes() == finished.table.read_bytes()
    assert plot.read_bytes().startswith(b"%PDF")
    assert finished.plot.read_bytes().startswith(PNG)


def test_tables_hold_every_time_and_ratio(finished):
    printed = finished.result.stdout.split()
    rows = [line.strip("| ").split(" | ") for line in finished.table.read_text(encoding="utf-8").splitlines()]
    ratios = [cell.strip(" |") for row in rows for cell in row[3:]]
    for record in finished.records:
        assert bench_report._microseconds(record["microseconds"]) in printed
        if record["contender"] != "torch":
            ratio = f"{record['torch_time_over_time']:.2f}"
            assert f"{ratio}x" in printed
            ratios.remove(ratio)  # each stands there once


def test_only_some_cases_are_shown(finished, capsys):
    assert cli.main(["bench", "--from", str(finished.json), "--only", "silu,rms-norm"]) == 0
    shown = capsys.readouterr().out
    assert "silu" in shown
    assert "rms-norm" in shown
    assert "gelu" not in shown
    assert "affine" not in shown


def test_figures_of_a_gpu_and_of_peers_are_shown(finished, tmp_path, capsys):
    """What a machine with a GPU writes: no threads, no page faults, other libraries' norms."""
    records = [
        {**r, "threads": None, "page_faults": None, "preemptions": None, "contender": name}
        for r in finished.records
        if r["threads"] == finished.threads[0] and r["contender"] != "lomem layer-norm"
        for name in [r["contender"], *(["liger"] if r["contender"] == "torch" and "affine" in r["case"] else [])]
    ]
    results = bench_report.Results("lomem bench", {**finished.contents["machine"], "device": "A GPU"}, records)
    file, table, plot = (tmp_path / name for name in ("gpu.json", "gpu.md", "gpu.png"))
    bench_report.save(results, file)
    assert cli.main(["bench", "--from", str(file), "--table", str(table), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "liger" in shown
    assert "page faults" not in shown
    assert "thread" not in shown.partition("of copy")[2]
    assert "# lomem bench: A GPU" in table.read_text(encoding="utf-8")
    assert plot.read_bytes().startswith(PNG)


def plan_of(*arguments):
    return bench.make_plan(cli.parser().parse_args(["bench", "--device", "cpu", *arguments]))


def test_medians_and_ratios_within_a_round():
    """Hand-made times: the ratio is the median of ratios, not the ratio of medians."""
    plan = plan_of("--threads", "1", "--elements", "4K", "--dtypes", "fp16", "--rounds", "3")
    case = next(bench.make_cases("gelu", plan))
    seconds = {
        ("copy", "memory"): [2.0, 1.0, 4.0],
        ("copy", "copy_"): [3.0, 3.0, 9.0],
        ("copy", "memcpy"): [4.0, 4.0, 1.0],
        ("forward", "lomem"): [1.0, 2.0, 4.0],
        ("forward", "torch"): [6.0, 2.0, 4.0],
    }
    timings = {
        key: [bench.Timing(s, bench.Disturbances(3 * i, i)) for i, s in enumerate(v)] for key, v in seconds.items()
    }
    copies = bench.Copies(plan.device, 1)
    memory = bench.Copy(lambda: None, 1000)
    ours, theirs = bench.make_records(case, plan, copies, memory, timings)
    assert ours["microseconds"] == 2e6
    assert theirs["microseconds"] == 4e6
    assert theirs["time_over_lomem"] == ours["torch_time_over_time"] == 1  # of 6, 1, 1
    assert ours["copy_gigabytes_per_second"] == pytest.approx(500e-9, rel=1e-5)
    assert ours["copy_same_size_gigabytes_per_second"] == pytest.approx(2 * 2 * 4096 / 3 * 1e-9, rel=1e-5)
    assert ours["page_faults"] == 3
    assert ours["preemptions"] == 1


def test_copies_copy_every_byte():
    for threads in (1, 3):
        copies = bench.Copies(torch.device("cpu"), threads)
        source = torch.arange(1001, dtype=torch.int32)
        target = torch.zeros_like(source)
        bench.block_copy(source, target, copies.pool, threads)()
        assert torch.equal(source, target)


def test_a_gpu_is_kept_busy_while_the_host_enqueues(monkeypatch):
    """With a GPU in name only: where it was done sleeping too early, the turn is taken again behind a longer sleep."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            self.elapsed_time = lambda end: 30.0
            self.record = lambda: None
            self.query = lambda: len(slept) < 3  # passed before the host was done

    for name, fake in (("Event", Event), ("synchronize", lambda: None), ("_sleep", slept.append)):
        monkeypatch.setattr(torch.cuda, name, fake)
    calls = []
    timing = bench.Timer(torch.device("cuda"))(lambda: calls.append(0), 3)
    assert timing == bench.Timing(0.01)
    assert len(calls) == 3 * len(slept)
    assert len(slept) == 3
    assert slept[2] == 2 * slept[1] == 4 * slept[0]


def test_results_take_the_place_of_those_freed_last():
    script = """
import torch
from lomem.commands import _reused_memory, bench
torch.set_num_threads(1)
before = torch.arange(2**20)
bench.reuse_memory()
def faults():
    start = bench.Disturbances.so_far().page_faults
    for _ in range(10):
        torch.ones(2**24)
    return bench.Disturbances.so_far().page_faults - start
faults()
assert faults() < 100, "of 4096 pages each"

first, second, other = (torch.arange(n) for n in (1000, 1000, 1001))
places = first.data_ptr(), second.data_ptr()
assert not any(place % 64 for place in places)
del first, second  # in this order
again = torch.arange(1000), torch.arange(1000)
assert (again[0].data_ptr(), again[1].data_ptr()) == places[::-1]
assert torch.arange(1001).data_ptr() != other.data_ptr()

_reused_memory.release()
assert all(bool((t == torch.arange(len(t))).all()) for t in (*again, other, before)), "what is in use stays"
empty = torch.empty(0)
assert empty.data_ptr() == 0 and torch.empty(0).data_ptr() == 0
del empty, before, again, other
_reused_memory.release()
print("done")
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_rotating_inputs_exceed_the_cache():
    plan = plan_of("--rotate", "--elements", "16M,4K", "--dtypes", "fp32")
    large, small = bench.make_cases("gelu", plan)
    assert bench.sets_of_inputs(large, plan) * 3 * large.input_bytes >= 4 * bench.cache_bytes(plan.device)
    assert bench.sets_of_inputs(small, plan) == 64
    assert bench.sets_of_inputs(large, plan_of("--elements", "16M")) == 1
    inputs = [small.make_inputs(), small.make_inputs()]
    seen = []
    contender = bench.Contender(lambda x: seen.append(x) or x * 2, 0, 0)
    calls = bench.make_calls(contender, inputs, [torch.ones(4096)] * 2)
    seen.clear()
    for _ in range(3):
        calls["forward"]()
    assert [x is inputs[i][0] for x, i in zip(seen, (0, 1, 0), strict=True)] == [True] * 3


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_few_bit_cases(bits):
    plan = plan_of()
    (case,) = bench.make_cases(f"gelu-{bits}bit", plan._replace(elements=[1024], dtypes=["bf16"]))
    assert {name: (c.forward_bytes, c.backward_bytes, c.passes) for name, c in case.contenders.items()} == {
        "lomem": (4 + bits / 8, 4 + bits / 8, bench.PASSES),
        "lomem drawn": (4 + bits / 8, 4 + bits / 8, bench.PASSES),
        "lomem codes": (2 + bits / 8, 0, ("forward",)),
        "torch": (4, 6, bench.PASSES),
    }
    (x,) = case.make_inputs()
    assert case.contenders["lomem codes"].function(x).nbytes == 128 * bits
    for name in ("lomem", "lomem drawn"):
        assert torch.equal(case.contenders[name].function(x), case.contenders["torch"].function(x))


@pytest.mark.parametrize("name", bench_report.GATED)
def test_cases_of_gated_units(name):
    case = bench.gated_case(name, 1024, "bf16", plan_of())
    assert {name: (c.forward_bytes, c.backward_bytes) for name, c in case.contenders.items()} == {
        "lomem": (6, 10),
        "torch": (10, 18),
    }
    inputs = case.make_inputs()
    assert [x.shape for x in inputs] == [(1024,)] * 2
    assert torch.equal(case.contenders["lomem"].function(*inputs), case.contenders["torch"].function(*inputs))
    calls = bench.make_calls(case.contenders["lomem"], [inputs], [torch.ones(1024, dtype=torch.bfloat16)])
    assert [gradient.shape for gradient in calls["both"]()] == [(1024,)] * 2


def test_gated_units_are_measured_where_they_are_asked_for():
    assert not set(bench_report.GATED) & set(bench_report.select(None))
    assert bench_report.select(["gated"]) == list(bench_report.GATED)
    assert set(bench_report.GATED) == set(bench.GATED_FUNCTIONS)


@pytest.mark.parametrize("name", bench_report.LORA)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cases_of_adapters(dtype, name):
    plan = plan_of()._replace(shapes=[(12, 24)], dtypes=[dtype])
    (case,) = bench.make_cases(name, plan)
    size = bench.DTYPES[dtype].itemsize
    assert {name: (c.forward_bytes, c.backward_bytes) for name, c in case.contenders.items()} == dict.fromkeys(
        ("lomem", "torch"), (2 * size, 3 * size)
    )
    x, a, b = inputs = case.make_inputs()
    assert (x.shape, a.shape, b.shape) == ((12, 24), (bench.RANK, 24), (24, bench.RANK))
    assert (x.dtype, a.dtype) == (bench.DTYPES[dtype], torch.float32)
    results = []
    for contender in case.contenders.values():
        torch.manual_seed(0)
        results.append((contender.function(*inputs), *bench.make_calls(contender, [inputs], [x])["backward"]()))
    assert torch.equal(results[0][0], results[1][0])
    assert not set(bench_report.LORA) & set(bench_report.select(None))
    assert bench_report.select(["lora"]) == list(bench_report.LORA)


def test_cases_of_dropout():
    plan = plan_of()
    (case,) = bench.make_cases("dropout", plan._replace(elements=[1024], dtypes=["bf16"]))
    assert {name: (c.forward_bytes, c.backward_bytes) for name, c in case.contenders.items()} == {
        "lomem": (4 + 1 / 8, 4 + 1 / 8),
        "lomem seed": (4, 4),
        "torch": (6, 6),
    }
    results = []
    for contender in case.contenders.values():
        torch.manual_seed(0)
        results.append(contender.function(torch.ones(1024, dtype=torch.bfloat16)))
    assert torch.equal(results[0], results[2])
    assert 50 < int((results[1] == 0).sum()) < 160
    assert not set(bench_report.DROPOUT) & set(bench_report.select(None))
    assert bench_report.select(["dropout"]) == list(bench_report.DROPOUT)


def test_cases_of_storage():
    plan = plan_of()._replace(elements=[1024], dtypes=["bf16"])
    for name in bench_report.STORAGE:
        bits = 8 if "8" in name else 4
        (case,) = bench.make_cases(name, plan)
        moved = {key: c.forward_bytes for key, c in case.contenders.items()}
        ours = ("lomem", "lomem nearest")
        assert moved == {**dict.fromkeys(ours, 2 + bits / 8 + 1 / 64), "torch": 4}
        inputs = case.make_inputs()
        results = {key: c.function(*inputs) for key, c in case.contenders.items()}
        if name.startswith("de"):
            # With dither, off by half a step at most; without, of the same codes, by one; and rounded to bfloat16.
            for key, steps in zip(ours, (0.5, 1), strict=True):
                atol = steps * float(inputs[2].max()) + 2**-6
                torch.testing.assert_close(results[key], results["torch"], atol=atol, rtol=0)
        else:
            assert all(len(results[key][0]) == 1024 * bits // 8 for key in ours)
    assert not set(bench_report.STORAGE) & set(bench_report.select(None))
    assert bench_report.select(["storage"]) == list(bench_report.STORAGE)


def test_few_bit_cases_are_measured_where_they_are_asked_for():
    assert not set(bench_report.FEW_BIT) & set(bench_report.select(None))
    assert bench_report.select(["few-bit"]) == list(bench_report.FEW_BIT)


def test_defaults_and_names():
    plan = plan_of()
    assert plan.threads[0] == 1
    assert plan.threads[-1] == torch.get_num_threads()
    assert plan.elements == [2**12, 2**16, 2**20, 2**24, 2**26]
    assert plan.dtypes == ["fp32", "bf16", "fp16"]
    assert not plan.rotate
    assert set(bench_report.ACTIVATIONS) == set(bench.ACTIVATION_FUNCTIONS)
    for count, name in ((4096, "4K"), (2**26, "64M"), (5, "5"), (1025, "1025"), (2**31, "2G")):
        assert bench_report.count_name(count) == name
        assert cli._count(name) == count
    assert bench_report.shape_name([8192, 768]) == "8192x768"
    name = bench.results_name("cpu")
    assert name
    assert name == "".join(c for c in name.lower() if c.isalnum() or c == "-")
    for level in (1, 2, 3, 9):
        assert bench.cpu_cache_bytes(level) >= 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--dtypes fp8", "--dtypes has fp8, expected some of fp32, bf16, fp16, fp64"),
        ("--dtypes fp32,", "--dtypes has , expected some of fp32, bf16, fp16, fp64"),
        ("--elements 12Q", "argument --elements: got 12Q, expected a size such as 4096, 64K or 1M"),
        ("--elements 1K,,2K", "argument --elements: got nothing, expected a size such as 4096, 64K or 1M"),
        ("--elements 0", "argument --elements: got 0, expected a size such as 4096, 64K or 1M"),
        ("--elements -4", "argument --elements: got -4, expected a size such as 4096, 64K or 1M"),
        ("--shapes 64", "argument --shapes: got 64, expected rows and columns such as 8192x768"),
        ("--shapes 64x", "argument --shapes: got nothing, expected a size such as 4096, 64K or 1M"),
        ("--threads 0", "argument --threads: got 0, expected a number of at least 1"),
        ("--threads two", "argument --threads: invalid list value: 'two'"),
        ("--rounds 0", "argument --rounds: got 0, expected a number of at least 1"),
        ("--seconds nan", "argument --seconds: got nan, expected a number greater than 0"),
        ("--device tpu", "argument --device: got tpu, expected cpu or cuda"),
        ("--device meta", "--device is meta, expected cpu or cuda"),
        (
            "--only relu",
            "--only is relu, expected some of activations, dropout, few-bit, gated, lora, norms, storage, gelu, gelu",
        ),
        ("--from nothing.json", "--from is nothing.json, expected a file that exists"),
        ("--from some.json --threads 2", "--threads is given with --from, expected only one of them"),
        ("--from some.json --json other.json", "--json is given with --from, expected only one of them"),
        ("--json nowhere/run.json", "--json is nowhere/run.json, expected a file in a folder that exists"),
        ("--table nowhere/run.md", "--table is nowhere/run.md, expected a file in a folder that exists"),
        ("--plot run.doc", "--plot is run.doc, expected a file name that ends in one of "),
        ("--plot run.png --only norms", "--plot shows an activation, expected one of gelu, gelu-tanh, silu among"),
    ],
)
def test_bad_arguments_are_one_sentence(options, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["bench", *options.split()])
        prefix = "lomem bench: "
    except SystemExit as stop:
        status = stop.code
        prefix = "lomem bench: error: "
    assert status in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(prefix + sentence)


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "figures",
        "[]",
        "{}",
        '{"program": "another", "command": "", "machine": {}, "records": []}',
        '{"program": "lomem bench", "command": "", "machine": {}, "records": [{"case": "gelu"}]}',
        '{"program": "lomem bench", "command": "", "machine": {}, "records": [1]}',
        '{"program": "lomem bench", "records": []}',
        b"\xff\xfe",
    ],
)
def test_files_of_other_programs_are_refused(contents, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    assert cli.main(["bench", "--from", str(file)]) == 1
    expected = f"lomem bench: --from is {file}, expected a file that `lomem bench --json` of this version wrote\n"
    assert capsys.readouterr().err == expected


def without(module, *options):
    arguments = ["bench", "--device", "cpu", "--threads", "1", *map(str, options)]
    hidden = f"import sys; sys.modules[{module!r}] = None"
    script = f"{hidden}; from lomem.commands import cli; sys.exit(cli.main({arguments}))"
    return run("-c", script)


def test_missing_packages_are_one_sentence(tmp_path):
    result = without("rich")
    assert result.returncode == 1
    assert result.stderr.startswith("lomem bench: the benchmark needs the package rich")
    assert result.stderr.endswith(": pip install 'lomem[bench]'\n")
    result = without("matplotlib", "--plot", tmp_path / "run.png")
    assert result.returncode == 1
    assert result.stderr.startswith("lomem bench: --plot needs the package matplotlib")
    assert result.stderr.endswith(": pip install 'lomem[bench]'\n")


def test_matplotlib_is_needed_only_to_draw(tmp_path):
    file = tmp_path / "run.json"
    result = without("matplotlib", *TINY.split(), "--only", "silu", "--json", file, "--table", tmp_path / "run.md")
    assert result.returncode == 0, result.stderr
    assert {record["case"] for record in bench_report.load(file).records} == {"silu"}


def test_compiled_contenders_are_cases_too():
    arguments = argparse.Namespace(**{**vars(cli.parser().parse_args(["bench", "--compile", "--device", "cpu"]))})
    plan = bench.make_plan(arguments)._replace(elements=[1024], shapes=[(8, 64)], dtypes=["fp32"])
    for name in plan.cases:
        (case,) = bench.make_cases(name, plan)
        assert "torch.compile" in case.contenders
        assert case.contenders["torch.compile"][1:] == case.contenders["torch"][1:]


def test_figures_of_few_bits_are_shown_without_being_asked_for(tmp_path):
    table = tmp_path / "table.md"
    figures = Path(__file__).parents[2] / "benchmarks/results/amd-epyc-few-bit.json"
    assert cli.main(["bench", "--from", str(figures), "--table", str(table)]) == 0
    assert "gelu-8bit" in table.read_text()
