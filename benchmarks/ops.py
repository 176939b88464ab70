"""Times lomem's ops against torch's, compiled torch, Liger-Kernel and apex, on a CPU or a GPU.

All contenders take turns in every round, a copy of device memory among them, and what is reported are medians over the
rounds: of times, and of the ratios within a round, so that a clock that drifts does not matter. On a GPU the device is
kept busy while the host enqueues, so that times are those of the device. Inputs rotate through more memory than the
caches hold.

    python benchmarks/ops.py                                 # the machine's best device, default sizes
    python benchmarks/ops.py --device cpu --elements 1M --rounds 11
    python benchmarks/ops.py --compile --json results.json   # also torch.compile; keep the figures

Columns: `bytes` is what an op has to move at least, an element (input, output, codes); `GB/s` those bytes over the
time; `of copy` that bandwidth over the copy's; `lomem is` the time of the contender over lomem's: above 1, lomem is
faster.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import lomem
import torch

# The tests' own: what an op is, and what it is compared with.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "python"))
from helpers import ACTIVATIONS, NORMS, make_norm_parameters

Call = Callable[[], object]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PASSES = ("forward", "backward", "both")


class Contender(NamedTuple):
    """One implementation: a function of the inputs, and the bytes an element that it must move in each pass."""

    function: Callable[..., torch.Tensor]
    forward_bytes: float
    backward_bytes: float


class Case(NamedTuple):
    """What is timed: implementations of one function on inputs of one kind."""

    name: str
    elements: int
    dtype: str
    make_inputs: Callable[[], tuple[torch.Tensor, ...]]
    contenders: dict[str, Contender]


def activation_cases(device: torch.device, elements: list[int], dtypes: list[str], *, compiled: bool) -> Iterator[Case]:
    """Step activations: 2 bits an element in place of the input."""
    for (name, activation), n, dtype in itertools.product(ACTIVATIONS.items(), elements, dtypes):
        size = torch.empty((), dtype=DTYPES[dtype]).element_size()

        def make_inputs(n: int = n, dtype: str = dtype) -> tuple[torch.Tensor]:
            return (torch.randn(n, device=device).mul_(2).to(DTYPES[dtype]).requires_grad_(),)

        codes = activation.step.bits / 8
        contenders = {
            "lomem": Contender(activation.op, 2 * size + codes, 2 * size + codes),
            "torch": Contender(activation.torch_op, 2 * size, 3 * size),
        }
        if compiled:
            contenders["torch.compile"] = Contender(
                torch.compile(activation.torch_op, dynamic=False), 2 * size, 3 * size
            )
        yield Case(name, n, dtype, make_inputs, contenders)


def norm_cases(
    device: torch.device, elements: list[int], dtypes: list[str], columns: list[int], *, compiled: bool
) -> Iterator[Case]:
    """Norms, without and with affine parameters that need gradients."""
    for (kind, norm), affine, cols, dtype in itertools.product(NORMS.items(), (False, True), columns, dtypes):
        n = max(elements) // cols * cols
        size = torch.empty((), dtype=DTYPES[dtype]).element_size()

        def make_inputs(norm=norm, affine=affine, cols=cols, dtype=dtype, n=n) -> tuple[torch.Tensor, ...]:
            x = torch.randn(n // cols, cols, device=device).to(DTYPES[dtype]).requires_grad_()
            parameters = make_norm_parameters(norm, (cols,), DTYPES[dtype], device) if affine else ()
            return (x, *(p.requires_grad_() for p in parameters))

        def apply(op, cols=cols):
            return lambda x, *parameters: op(x, (cols,), *parameters, eps=1e-5)

        contenders = {name: apply(op) for name, op in {"lomem": norm.op, "torch": norm.torch_op}.items()}
        if compiled:
            contenders["torch.compile"] = torch.compile(apply(norm.torch_op), dynamic=False)
        if device.type == "cuda" and affine:
            contenders |= peers_of_norms(kind, cols, DTYPES[dtype], device)
        yield Case(
            f"{kind} norm, {cols} columns{', affine' if affine else ''}",
            n,
            dtype,
            make_inputs,
            {name: Contender(function, 2 * size, 3 * size) for name, function in contenders.items()},
        )


def peers_of_norms(kind: str, cols: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """Norms of other libraries, where they are installed. They are affine always."""
    peers: dict[str, Callable] = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        if kind == "layer":
            peers["liger"] = lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5)
        else:
            # Not in place: torch's does not overwrite the gradient either.
            peers["liger"] = lambda x, weight: liger.liger_rms_norm(x, weight, 1e-5, 0.0, "llama", False)
    if importlib.util.find_spec("apex"):
        from apex.normalization import fused_layer_norm as apex

        if kind == "layer":
            peers["apex"] = lambda x, weight, bias: apex.fused_layer_norm_affine(x, weight, bias, (cols,), 1e-5, True)
        else:
            peers["apex"] = lambda x, weight: apex.fused_rms_norm_affine(x, weight, (cols,), 1e-5, True)
    return peers


def make_calls(case: Case, contender: Contender, sets: int) -> dict[str, Call]:
    """A callable a pass. Each call takes the next set of inputs."""
    inputs = [case.make_inputs() for _ in range(sets)]
    outputs = [contender.function(*tensors) for tensors in inputs]
    gradients = [torch.randn_like(output) for output in outputs]
    turn = itertools.cycle(range(sets))

    def forward() -> object:
        return contender.function(*inputs[next(turn)])

    def backward() -> object:
        i = next(turn)
        return torch.autograd.grad(outputs[i], inputs[i], gradients[i], retain_graph=True)

    def both() -> object:
        i = next(turn)
        return torch.autograd.grad(contender.function(*inputs[i]), inputs[i], gradients[i])

    return {"forward": forward, "backward": backward, "both": both}


class Timer:
    """Seconds a call, on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.cycles_of_enqueuing = 200_000  # of the device, a call: about 0.1 ms

    def __call__(self, call: Call, repeats: int) -> float:
        """Calls `repeats` times."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        while True:
            torch.cuda.synchronize()
            torch.cuda._sleep(self.cycles_of_enqueuing * repeats)
            begin.record()
            for _ in range(repeats):
                call()
            end.record()
            waited = not begin.query()
            torch.cuda.synchronize()
            if waited:
                return begin.elapsed_time(end) / 1000 / repeats
            self.cycles_of_enqueuing *= 2  # the device was done sleeping before the host was done enqueuing

    def repeats(self, call: Call, seconds: float) -> int:
        """How many calls take about so long. Also warms up."""
        for _ in range(3):
            call()
        return max(1, min(50, round(seconds / max(self(call, 3), 1e-9))))


def cache_bytes(device: torch.device) -> int:
    """The last cache's size: inputs rotate through four times as much."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 * 2**20


def make_copy(device: torch.device) -> tuple[Call, int]:
    """A copy within the device's memory, and the bytes that it reads and writes."""
    n = max(16 * cache_bytes(device), 2**28) // 4
    source, target = torch.randn(n, device=device), torch.empty(n, device=device)
    return lambda: target.copy_(source), 2 * 4 * n


def measure(case: Case, device: torch.device, rounds: int, seconds: float) -> list[dict]:
    """One record a pass and contender."""
    timer = Timer(device)
    copy, copy_bytes = make_copy(device)
    copy_repeats = timer.repeats(copy, seconds)
    input_bytes = case.elements * torch.empty((), dtype=DTYPES[case.dtype]).element_size()
    sets = max(1, min(8, -(-4 * cache_bytes(device) // (3 * input_bytes))))
    calls = {name: make_calls(case, contender, sets) for name, contender in case.contenders.items()}
    records = []
    for pass_ in PASSES:
        repeats = {name: timer.repeats(call[pass_], seconds) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in (*calls, "copy")}
        for round_ in range(rounds):
            times["copy"].append(timer(copy, copy_repeats))
            # The order rotates, so that none always follows the same other.
            names = list(calls)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                times[name].append(timer(calls[name][pass_], repeats[name]))
        bandwidth_of_copy = copy_bytes / statistics.median(times["copy"])
        for name, contender in case.contenders.items():
            per_element = {
                "forward": contender.forward_bytes,
                "backward": contender.backward_bytes,
                "both": contender.forward_bytes + contender.backward_bytes,
            }[pass_]
            median = statistics.median(times[name])
            bandwidth = per_element * case.elements / median
            records.append(
                {
                    "case": case.name,
                    "elements": case.elements,
                    "dtype": case.dtype,
                    "pass": pass_,
                    "contender": name,
                    "microseconds": median * 1e6,
                    "bytes_per_element": per_element,
                    "gigabytes_per_second": bandwidth / 1e9,
                    "fraction_of_copy": bandwidth / bandwidth_of_copy,
                    "time_over_lomem": statistics.median(
                        t / ours for t, ours in zip(times[name], times["lomem"], strict=True)
                    ),
                    "copy_gigabytes_per_second": bandwidth_of_copy / 1e9,
                }
            )
    return records


def print_records(records: list[dict]) -> None:
    """The records of one case."""
    first = records[0]
    print(f"\n{first['case']}, {first['elements']:,} elements, {first['dtype']}")
    print(f"  {'pass':<10}{'':<14}{'us':>10}{'bytes':>8}{'GB/s':>9}{'of copy':>9}{'lomem is':>10}")
    for r in records:
        print(
            f"  {r['pass']:<10}{r['contender']:<14}{r['microseconds']:>10.1f}{r['bytes_per_element']:>8.2f}"
            f"{r['gigabytes_per_second']:>9.0f}{r['fraction_of_copy']:>9.1%}{r['time_over_lomem']:>9.2f}x",
            flush=True,
        )


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on and with."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "lomem": lomem.__version__,
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
    for name in ("triton", "liger_kernel", "apex"):
        facts[name] = "installed" if importlib.util.find_spec(name) else "not installed"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "lomem_cuda_archs": " ".join(lomem._C.cuda_archs()),
        }
    return facts


def count(text: str) -> int:
    """`64M` is 64 * 2^20."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)


def listed(parse: Callable[[str], object]) -> Callable[[str], list]:
    """An argument type: a list with commas."""
    return lambda text: [parse(part) for part in text.split(",")]


def dtype_name(text: str) -> str:
    """One of the dtypes."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {text}, expected one of {', '.join(DTYPES)}")
    return text


def main() -> None:
    cuda = torch.cuda.is_available() and bool(lomem._C.cuda_archs())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if cuda else "cpu"))
    parser.add_argument("--elements", type=listed(count), help="sizes (default: 1M,16M,64M; on a CPU 1M,16M)")
    parser.add_argument("--columns", type=listed(count), default=[768, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtypes", type=listed(dtype_name), default=["bf16", "fp16", "fp32"])
    parser.add_argument("--only", choices=["activations", "norms"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.005, help="of each contender in each round (default: 0.005)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes its time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures")
    arguments = parser.parse_args()
    device = arguments.device
    elements = arguments.elements or [2**20, 2**24, 2**26][: 3 if device.type == "cuda" else 2]
    if arguments.compile:
        import torch._dynamo.config as dynamo_config
        from torch._functorch import config as functorch_config

        functorch_config.donated_buffer = False  # the backward pass is run again and again
        dynamo_config.fail_on_recompile_limit_hit = True  # never eager in compiled code's name
    facts = machine(device)
    for name, value in facts.items():
        print(f"{name:<20}{value}")

    cases: Iterator[Case] = iter(())
    if arguments.only != "norms":
        cases = activation_cases(device, elements, arguments.dtypes, compiled=arguments.compile)
    if arguments.only != "activations":
        norms = norm_cases(device, elements, arguments.dtypes, arguments.columns, compiled=arguments.compile)
        cases = itertools.chain(cases, norms)
    records = []
    for case in cases:
        if arguments.compile:
            torch._dynamo.reset()  # each case compiles for its own shape
        records += measure(case, device, arguments.rounds, arguments.seconds)
        print_records(records[-len(PASSES) * len(case.contenders) :])
    if arguments.json:
        command = " ".join(["python", "benchmarks/ops.py", *sys.argv[1:]])
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        contents = {"command": command, "machine": facts, "records": records}
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
