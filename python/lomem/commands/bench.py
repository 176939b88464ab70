"""``lomem bench``: lomem's ops against torch, compiled torch, Liger-Kernel and apex, on a CPU or a GPU.

In every round all contenders and the memory copies take turns. Times and ratios are medians over the rounds; ratios are
computed within a round, so a drifting clock does not matter. `docs/benchmarks.md` explains what is measured and how to
read it. Requires the optional packages of ``pip install 'lomem[bench]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.util
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C, __version__, functional, reference
from ..functional.norms import LAYER_NORM, RMS_NORM
from . import _reused_memory, bench_peers, bench_report
from .bench_report import ACTIVATIONS, DROPOUT, FEW_BIT, GATED, LORA, NORMS, STORAGE, Record, Results
from .plotting import check_folder, check_plot

try:
    import resource
except ImportError:  # not on Unix
    resource = None  # type: ignore[assignment]

Call = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PASSES = ("forward", "backward", "both")


class Plan(NamedTuple):
    """What to measure."""

    device: torch.device
    threads: list[int | None]
    elements: list[int]
    shapes: list[tuple[int, int]]
    dtypes: list[str]
    cases: list[str]
    rounds: int
    seconds: float
    compiled: bool
    rotate: bool

    def command(self) -> str:
        """The command line that runs this plan."""
        activations, norms = (
            [case for case in self.cases if case in family]
            for family in ((*ACTIVATIONS, *FEW_BIT, *GATED, *DROPOUT, *STORAGE), (*LORA, *NORMS))
        )
        options = {
            "device": str(self.device),
            "threads": ",".join(map(str, self.threads)) if self.device.type == "cpu" else "",
            "elements": ",".join(map(bench_report.count_name, self.elements)) if activations else "",
            "shapes": ",".join(f"{rows}x{columns}" for rows, columns in self.shapes) if norms else "",
            "dtypes": ",".join(self.dtypes),
            "only": "" if self.cases == bench_report.select(None) else ",".join(self.cases),
            "rounds": str(self.rounds),
            "seconds": f"{self.seconds:g}",
        }
        flags = [f"--{name} {value}" for name, value in options.items() if value]
        flags += ["--compile"] * self.compiled
        flags += ["--rotate"] * (self.rotate and self.device.type == "cpu")
        return " ".join([bench_report.PROGRAM, *flags])


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Makes a plan from the command line, with defaults that depend on the device."""
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() and _C.cuda_archs() else "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device}, expected cpu or cuda")
    cuda = device.type == "cuda"
    if cuda and not (torch.cuda.is_available() and _C.cuda_archs()):
        raise ValueError(
            f"--device is {device}, expected cpu: no GPU is available, or lomem was built without CUDA kernels"
        )
    dtypes = arguments.dtypes or ["fp32", "bf16", "fp16"]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtypes has {dtype}, expected some of {', '.join(DTYPES)}")
    default_shapes = [(2**26 // columns, columns) for columns in (768, 1024, 2048, 4096, 8192, 16384)]
    return Plan(
        device=device,
        # One thread first: later, idle OpenMP threads spin and slow down the others.
        threads=[None] if cuda else sorted(set(arguments.threads or [1, torch.get_num_threads()])),
        elements=arguments.elements or ([2**20, 2**24, 2**26] if cuda else [2**12, 2**16, 2**20, 2**24, 2**26]),
        shapes=arguments.shapes or (default_shapes if cuda else [(8192, 768), (2048, 4096)]),
        dtypes=dtypes,
        cases=bench_report.select(arguments.only),
        rounds=arguments.rounds or 15,
        seconds=arguments.seconds or 0.005,
        compiled=arguments.compile,
        rotate=cuda or arguments.rotate,
    )


# Cases and contenders.


class Contender(NamedTuple):
    """One implementation: a function of the inputs, and the minimum number of bytes moved per element."""

    function: Callable[..., Tensor]
    forward_bytes: float
    backward_bytes: float
    passes: tuple[str, ...] = PASSES

    def bytes(self, pass_: str) -> float:
        """Minimum number of bytes moved per element in a pass."""
        return self.forward_bytes * (pass_ != "backward") + self.backward_bytes * (pass_ != "forward")


class Case(NamedTuple):
    """Implementations of one function, and the shape and dtype of their input."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make_inputs: Callable[[], tuple[Tensor, ...]]
    contenders: dict[str, Contender]

    @property
    def elements(self) -> int:
        """Number of elements of the input, and of the output."""
        return torch.Size(self.shape).numel()

    @property
    def input_bytes(self) -> int:
        """Bytes of the input, without parameters."""
        return self.elements * DTYPES[self.dtype].itemsize


class Activation(NamedTuple):
    """lomem's and torch's function of an activation."""

    lomem: Callable[..., Tensor]
    torch: Callable[..., Tensor]


_PAPER: dict[str, Any] = {"bits": 2, "criterion": "paper"}
ACTIVATION_FUNCTIONS = {
    "gelu": Activation(partial(functional.gelu, **_PAPER), F.gelu),
    "gelu-tanh": Activation(
        partial(functional.gelu, approximate="tanh", **_PAPER), partial(F.gelu, approximate="tanh")
    ),
    "silu": Activation(partial(functional.silu, **_PAPER), F.silu),
}


def activation_case(name: str, elements: int, dtype: str, plan: Plan) -> Case:
    """An activation that saves 2 bits per element instead of its input."""
    size = DTYPES[dtype].itemsize
    codes = 2 / 8
    function = ACTIVATION_FUNCTIONS[name]
    contenders = {
        "lomem": Contender(function.lomem, 2 * size + codes, 2 * size + codes),
        # The backward pass is that of "lomem".
        "lomem fast": Contender(
            partial(function.lomem, fast=True), 2 * size + codes, 2 * size + codes, ("forward", "both")
        ),
        "torch": Contender(function.torch, 2 * size, 3 * size),
    }
    if plan.compiled:
        contenders["torch.compile"] = Contender(torch.compile(function.torch, dynamic=False), 2 * size, 3 * size)
    return Case(name, (elements,), dtype, activation_input(elements, dtype, plan), contenders)


def few_bit_case(name: str, elements: int, dtype: str, plan: Plan) -> Case:
    """GELU that saves the given number of bits per element; one contender computes only the codes."""
    size, bits = DTYPES[dtype].itemsize, int(name.removeprefix("gelu-").removesuffix("bit"))
    steps = functional.step_function("gelu", bits)
    contenders = {
        "lomem": Contender(partial(functional.gelu, bits=bits), 2 * size + bits / 8, 2 * size + bits / 8),
        "lomem drawn": Contender(
            partial(functional.gelu, bits=bits, rounding="stochastic"), 2 * size + bits / 8, 2 * size + bits / 8
        ),
        "lomem codes": Contender(
            lambda x: torch.ops.lomem.step_codes(x, steps.boundaries, bits), size + bits / 8, 0, ("forward",)
        ),
        "torch": Contender(F.gelu, 2 * size, 3 * size),
    }
    return Case(name, (elements,), dtype, activation_input(elements, dtype, plan), contenders)


GATED_FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "swiglu": ("silu", F.silu),
    "geglu": ("gelu", F.gelu),
    "geglu-tanh": ("gelu_tanh", partial(F.gelu, approximate="tanh")),
    "reglu": ("relu", F.relu),
    "glu": ("sigmoid", torch.sigmoid),
}


def gated_case(name: str, elements: int, dtype: str, plan: Plan) -> Case:
    """A gated unit of two tensors of this size."""
    size = DTYPES[dtype].itemsize
    activation, function = GATED_FUNCTIONS[name]

    def of_torch(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    make = activation_input(elements, dtype, plan)

    # torch's: silu and its backward pass, and two products.
    contenders = {
        "lomem": Contender(partial(functional.gated, activation=activation), 3 * size, 5 * size),
        "torch": Contender(of_torch, 5 * size, 9 * size),
    }
    if plan.compiled:
        contenders["torch.compile"] = Contender(torch.compile(of_torch, dynamic=False), 3 * size, 5 * size)
    if plan.device.type == "cuda" and name in ("swiglu", "geglu-tanh") and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        peer = liger.liger_swiglu if name == "swiglu" else liger.liger_geglu
        contenders["liger"] = Contender(peer, 3 * size, 5 * size)
    return Case(name, (elements,), dtype, lambda: make() + make(), contenders)


#: Rank of the adapters.
RANK = 16


def lora_case(name: str, shape: tuple[int, int], dtype: str, plan: Plan) -> Case:
    """A linear layer of this width with a frozen weight, and an adapter in float32 beside it."""
    columns = shape[1]
    p = 0.1 if name.endswith("dropout") else 0.0
    weight = torch.randn(columns, columns, device=plan.device).mul_(columns**-0.5).to(DTYPES[dtype])

    def make_inputs() -> tuple[Tensor, ...]:
        x = torch.randn(shape, device=plan.device).to(DTYPES[dtype])
        wide = torch.promote_types(x.dtype, torch.float32)
        adapter = (torch.randn(size, device=plan.device).mul_(0.1) for size in ((RANK, columns), (columns, RANK)))
        return (x.requires_grad_(), *(t.to(wide).requires_grad_() for t in adapter))

    def layer_with(adapter: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            result = F.linear(x, weight)
            return (result + adapter(x, a, b, 2.0, p=p)).to(result.dtype)

        return layer

    # Input and result, gradients of both, and the input again for the adapter's gradient: the products are what costs.
    size = DTYPES[dtype].itemsize
    functions = {"lomem": layer_with(functional.lora), "torch": layer_with(reference.lora)}
    if plan.compiled:
        functions["torch.compile"] = torch.compile(layer_with(reference.lora), dynamic=False)
    contenders = {name: Contender(function, 2 * size, 3 * size) for name, function in functions.items()}
    return Case(name, shape, dtype, make_inputs, contenders)


def dropout_case(name: str, elements: int, dtype: str, plan: Plan) -> Case:
    """Dropout of a tenth of the elements, that saves a mask of 1 bit per element, or a seed."""
    size = DTYPES[dtype].itemsize
    # What torch saves: a mask of bools on a GPU, and of the dtype of the input on a CPU.
    mask = size if plan.device.type == "cpu" else 1
    contenders = {
        "lomem": Contender(partial(functional.dropout, p=0.1), 2 * size + 1 / 8, 2 * size + 1 / 8),
        "lomem seed": Contender(partial(functional.dropout, p=0.1, saves="seed"), 2 * size, 2 * size),
        "torch": Contender(partial(F.dropout, p=0.1), 2 * size + mask, 2 * size + mask),
    }
    return Case(name, (elements,), dtype, activation_input(elements, dtype, plan), contenders)


def activation_input(elements: int, dtype: str, plan: Plan) -> Callable[[], tuple[Tensor]]:
    """Returns a function that makes inputs with values on every step."""
    return lambda: (torch.randn(elements, device=plan.device).mul_(2).to(DTYPES[dtype]).requires_grad_(),)


def norm_case(name: str, shape: tuple[int, int], dtype: str, plan: Plan) -> Case:
    """A norm with or without parameters that require gradients."""
    columns = shape[1]
    layer, affine = name.startswith("layer"), name.endswith("affine")

    def make_inputs() -> tuple[Tensor, ...]:
        x = torch.randn(shape, device=plan.device).to(DTYPES[dtype])
        # Weights away from 0, since lomem's backward pass divides by them.
        parameters = [torch.rand(columns, device=plan.device) + 0.5, torch.rand(columns, device=plan.device) - 0.5]
        count = (2 if layer else 1) if affine else 0
        return (x.requires_grad_(), *(p.to(DTYPES[dtype]).requires_grad_() for p in parameters[:count]))

    def over_rows(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *parameters: op(x, (columns,), *parameters, eps=1e-5)

    ours = (LAYER_NORM if layer else RMS_NORM).function
    theirs = F.layer_norm if layer else F.rms_norm
    functions = {"lomem": over_rows(ours), "torch": over_rows(theirs)}
    if not layer and plan.device.type == "cpu":
        functions[bench_report.LAYER_NORM] = over_rows(LAYER_NORM.function)
    if plan.compiled:
        functions["torch.compile"] = torch.compile(over_rows(theirs), dynamic=False)
    if plan.device.type == "cuda" and affine:
        functions |= bench_peers.of_norms(columns, layer=layer)
    size = DTYPES[dtype].itemsize
    contenders = {name: Contender(function, 2 * size, 3 * size) for name, function in functions.items()}
    return Case(name, shape, dtype, make_inputs, contenders)


def storage_case(name: str, elements: int, dtype: str, plan: Plan) -> Case:
    """A tensor to codes in groups of 128, or back; torch's contender is a copy of the tensor."""
    size, bits = DTYPES[dtype].itemsize, int(name[-4])
    seed = torch.tensor(5, device=plan.device)
    encode, decode = functional.quantize_groups, functional.dequantize_groups

    def make_inputs() -> tuple[Tensor, ...]:
        x = torch.randn(elements, device=plan.device).to(DTYPES[dtype])
        return (x, *encode(x, bits, seed=seed))

    def call(seed: Tensor | None) -> Callable[..., Any]:
        if name.startswith("de"):
            return lambda x, codes, scales: decode(codes, scales, x.shape, x.dtype, bits, seed=seed)
        return lambda x, *_: encode(x, bits, rounding="nearest" if seed is None else "stochastic", seed=seed)

    moved, functions = size + bits / 8 + 2 / 128, {"lomem": call(seed), "lomem nearest": call(None)}
    contenders = {key: Contender(function, moved, 0, ("forward",)) for key, function in functions.items()}
    contenders["torch"] = Contender(lambda x, *_: x.clone(), 2 * size, 0, ("forward",))
    return Case(name, (elements,), dtype, make_inputs, contenders)


def make_cases(name: str, plan: Plan) -> Iterator[Case]:
    """Yields the cases of one function for every size and dtype."""
    flat = {ACTIVATIONS: activation_case, GATED: gated_case, DROPOUT: dropout_case, FEW_BIT: few_bit_case}
    flat[STORAGE] = storage_case
    for family, make in flat.items():
        if name in family:
            yield from (make(name, *kind, plan) for kind in itertools.product(plan.elements, plan.dtypes))
    if name in (*LORA, *NORMS):
        of_rows = lora_case if name in LORA else norm_case
        yield from (of_rows(name, *kind, plan) for kind in itertools.product(plan.shapes, plan.dtypes))


def make_calls(contender: Contender, inputs: list[tuple[Tensor, ...]], gradients: list[Tensor]) -> dict[str, Call]:
    """Returns a callable per pass. Each call uses the next set of inputs."""
    outputs = [contender.function(*tensors) for tensors in inputs] if "backward" in contender.passes else []
    turn = itertools.cycle(range(len(inputs)))

    def forward() -> object:
        return contender.function(*inputs[next(turn)])

    def backward() -> object:
        i = next(turn)
        return torch.autograd.grad(outputs[i], inputs[i], gradients[i], retain_graph=True)

    def both() -> object:
        i = next(turn)
        return torch.autograd.grad(contender.function(*inputs[i]), inputs[i], gradients[i])

    calls: dict[str, Call] = {"forward": forward, "backward": backward, "both": both}
    return {pass_: calls[pass_] for pass_ in contender.passes}


# Time and page faults.


def reuse_memory() -> None:
    """Makes the allocator reuse the blocks freed last, as in a training loop that reuses its memory.

    By default the C library returns large blocks to the system when they are freed. Each call of an op would then get
    fresh pages for its result, which the system zeroes one page fault at a time, and that takes longer than the ops
    measured here. If glibc is told to retain the blocks, it hands out the one freed first, so results wander through
    the heap and out of the caches. Training pays for this with torch and lomem alike, so it is not part of the
    comparison.
    """
    _reused_memory.reuse()


class Disturbances(NamedTuple):
    """Page faults and preemptions of this process."""

    page_faults: float = 0  # without those that read from disk
    preemptions: float = 0  # a thread lost its CPU to another process

    @classmethod
    def so_far(cls) -> Disturbances:
        """Counts so far, over all threads."""
        if resource is None:
            return cls()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_minflt, usage.ru_nivcsw)


class Timing(NamedTuple):
    """Time and disturbances per call, averaged over a turn."""

    seconds: float
    disturbances: Disturbances = Disturbances()


class Timer:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # A GPU's queue holds about a thousand kernels; beyond that the host waits.
        self.most_repeats = 50 if self.cuda else 10_000
        self.cycles_of_enqueuing = 200_000  # device cycles per call, about 0.1 ms

    def __call__(self, call: Call, repeats: int) -> Timing:
        """Times `repeats` calls."""
        return Timing(self._on_gpu(call, repeats)) if self.cuda else self._on_cpu(call, repeats)

    @staticmethod
    def _on_cpu(call: Call, repeats: int) -> Timing:
        if repeats > 1:
            call()  # fills the caches as its own calls leave them
        before = Disturbances.so_far()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = time.perf_counter() - start
        after = Disturbances.so_far()
        return Timing(seconds / repeats, Disturbances(*((b - a) / repeats for a, b in zip(before, after, strict=True))))

    def _on_gpu(self, call: Call, repeats: int) -> float:
        """Seconds per call; the device is kept busy while the host enqueues, so only device time counts."""
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
            self.cycles_of_enqueuing *= 2  # the device woke up before the host had enqueued everything

    def repeats(self, call: Call, seconds: float) -> int:
        """Number of calls that take about the given time."""
        repeats = 1
        while True:
            elapsed = self(call, repeats).seconds * repeats
            if elapsed >= seconds / 4 or repeats >= self.most_repeats:
                return max(1, min(self.most_repeats, round(repeats * seconds / max(elapsed, 1e-9))))
            repeats *= 4


def warm_up(calls: list[Call]) -> None:
    """Runs the calls until compilation is done and page faults stop, so that the heap holds all they need."""
    for _ in range(5):
        before = Disturbances.so_far().page_faults
        for call in calls:
            call()
        if Disturbances.so_far().page_faults - before <= len(calls):
            return


# Copies, which measure the available bandwidth.


class Copy(NamedTuple):
    """A copy, and the number of bytes that it reads and writes."""

    call: Call
    bytes: int


def block_copy(source: Tensor, target: Tensor, pool: ThreadPoolExecutor | None, threads: int) -> Call:
    """The C library's copy, in slices on several threads. It bypasses the caches for large blocks; torch's does not.

    ctypes releases the GIL during the call. Nothing overlaps, so `memmove` does the same as `memcpy`.
    """
    if pool is None:
        return lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    bounds = [source.nbytes * i // threads for i in range(threads + 1)]

    def copy_slice(i: int) -> None:
        begin, end = bounds[i], bounds[i + 1]
        ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, end - begin)

    return lambda: list(pool.map(copy_slice, range(threads)))


class Copies:
    """Copies with a given number of threads."""

    def __init__(self, device: torch.device, threads: int | None) -> None:
        self.device = device
        self.threads = threads or 1
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def in_memory(self) -> Copy:
        """A copy between arrays too large for any cache."""
        size = min(max(8 * cache_bytes(self.device), 2**28), 2**30)
        source = torch.ones(size // 4, device=self.device)
        target = torch.zeros_like(source)
        if self.device.type == "cuda":
            return Copy(lambda: target.copy_(source), 2 * source.nbytes)
        return Copy(block_copy(source, target, self.pool, self.threads), 2 * source.nbytes)

    def of_same_size(self, inputs: list[tuple[Tensor, ...]]) -> dict[str, Call]:
        """Copies of a case's inputs. On a CPU two of them: torch's is faster in caches, the C library's in memory."""
        pairs = [(x.detach(), torch.empty_like(x, requires_grad=False)) for x, *_ in inputs]
        turn = itertools.cycle(pairs)

        def tensor_copy() -> object:
            source, target = next(turn)
            return target.copy_(source)

        if self.device.type == "cuda":
            return {"copy_": tensor_copy}
        blocks = itertools.cycle([block_copy(*pair, self.pool, self.threads) for pair in pairs])
        return {"copy_": tensor_copy, "memcpy": lambda: next(blocks)()}


def cpu_cache_bytes(level: int) -> int:
    """Size of a cache as seen by one core; 0 if unknown.

    Read from sysfs, since the C library's SC_LEVEL3_CACHE_SIZE is that of the whole socket on some CPUs.
    """
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "level").read_text()) == level and (folder / "type").read_text().strip() != "Instruction":
                return int((folder / "size").read_text().strip().removesuffix("K")) * 2**10
    name = f"SC_LEVEL{level}_CACHE_SIZE"
    return max(0, os.sysconf(name)) if name in getattr(os, "sysconf_names", {}) else 0


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return cpu_cache_bytes(3) or cpu_cache_bytes(2) or 2**25


# Measuring.


def sets_of_inputs(case: Case, plan: Plan) -> int:
    """Number of input sets that fill four times the last-level cache, at most 64; 1 if inputs do not rotate."""
    if not plan.rotate:
        return 1
    return max(1, min(64, -(-4 * cache_bytes(plan.device) // (3 * case.input_bytes))))


def measure(case: Case, plan: Plan, copies: Copies, memory: Copy) -> list[Record]:
    """Measures a case; returns one record per pass and contender."""
    timer = Timer(plan.device)
    inputs = [case.make_inputs() for _ in range(sets_of_inputs(case, plan))]
    gradients = [torch.randn_like(tensors[0]) for tensors in inputs]
    calls = {name: make_calls(contender, inputs, gradients) for name, contender in case.contenders.items()}
    # These take turns: the copies of this size, then the contenders, pass by pass.
    groups: dict[str, dict[str, Call]] = {"copy": copies.of_same_size(inputs)}
    groups |= {pass_: {name: call[pass_] for name, call in calls.items() if pass_ in call} for pass_ in PASSES}
    groups = {pass_: group for pass_, group in groups.items() if group}
    warm_up([call for group in groups.values() for call in group.values()])
    repeats = {
        (pass_, name): timer.repeats(call, plan.seconds)
        for pass_, group in groups.items()
        for name, call in group.items()
    }
    timings: dict[tuple[str, str], list[Timing]] = {key: [] for key in (*repeats, ("copy", "memory"))}
    for round_ in range(plan.rounds):
        memory.call()  # untimed: OpenMP threads that spin after the last op have stopped by its end
        timings["copy", "memory"].append(timer(memory.call, 1))
        for pass_, group in groups.items():
            # The order rotates, so that no contender always follows the same one.
            names = list(group)
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                timings[pass_, name].append(timer(group[name], repeats[pass_, name]))
    return list(make_records(case, plan, copies, memory, timings))


def make_records(
    case: Case, plan: Plan, copies: Copies, memory: Copy, timings: dict[tuple[str, str], list[Timing]]
) -> Iterator[Record]:
    """Yields the records: medians and the bandwidths computed from them."""
    cpu = plan.device.type == "cpu"
    seconds = {key: [timing.seconds for timing in values] for key, values in timings.items()}
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    of_memory = memory.bytes / medians.pop(("copy", "memory"))
    of_same_size = 2 * case.input_bytes / min(median for (pass_, _), median in medians.items() if pass_ == "copy")
    for (pass_, name), median in medians.items():
        if pass_ == "copy":
            continue
        per_element = case.contenders[name].bytes(pass_)
        bandwidth = per_element * case.elements / median
        faults, preemptions = zip(*(timing.disturbances for timing in timings[pass_, name]), strict=True)
        yield {
            "case": case.name,
            "shape": list(case.shape),
            "elements": case.elements,
            "dtype": case.dtype,
            "threads": copies.threads if cpu else None,
            "pass": pass_,
            "contender": name,
            "microseconds": digits(median * 1e6),
            "bytes_per_element": per_element,
            "gigabytes_per_second": digits(bandwidth / 1e9),
            "copy_gigabytes_per_second": digits(of_memory / 1e9),
            "copy_same_size_gigabytes_per_second": digits(of_same_size / 1e9),
            "fraction_of_copy": digits(bandwidth / of_memory),
            "fraction_of_copy_same_size": digits(bandwidth / of_same_size),
            "time_over_lomem": digits(median_ratio(seconds[pass_, name], seconds[pass_, "lomem"])),
            "torch_time_over_time": digits(median_ratio(seconds[pass_, "torch"], seconds[pass_, name])),
            "page_faults": digits(statistics.fmean(faults)) if cpu else None,
            "preemptions": digits(statistics.fmean(preemptions)) if cpu else None,
        }


def digits(value: float) -> float:
    """Rounds to six significant digits."""
    return float(f"{value:.6g}")


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def run(plan: Plan) -> Iterator[list[Record]]:
    """Runs a plan; yields the records of one table at a time."""
    if plan.compiled:
        import torch._dynamo.config as dynamo_config
        from torch._functorch import config as functorch_config

        functorch_config.donated_buffer = False  # the backward pass runs repeatedly
        dynamo_config.fail_on_recompile_limit_hit = True  # no silent fallback to eager mode
    for threads in plan.threads:
        if threads is not None:
            torch.set_num_threads(threads)
        copies = Copies(plan.device, threads)
        memory = copies.in_memory()
        for name in plan.cases:
            records: list[Record] = []
            for case in make_cases(name, plan):
                progress(f"{name} {bench_report.shape_name(list(case.shape))} {case.dtype}")
                if plan.compiled:
                    torch._dynamo.reset()  # each case compiles for its own shape
                with device_of(plan), without_garbage_collection():
                    records += measure(case, plan, copies, memory)
                _reused_memory.release()  # the next case needs blocks of other sizes
            progress("")
            yield records


def device_of(plan: Plan) -> contextlib.AbstractContextManager[object]:
    """Makes the plan's GPU the current device, since events and streams belong to a device."""
    return torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disables the garbage collector, as timeit does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def progress(text: str) -> None:
    """Shows the current case on a terminal, without a refresh thread that would disturb the measurement."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# The machine.


def cpu_name() -> str:
    """Model name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def physical_cores() -> int | None:
    """Number of cores, not counting hyper-threads."""
    with contextlib.suppress(OSError):
        topologies = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology")
        return len({tuple((t / n).read_text() for n in ("physical_package_id", "core_id")) for t in topologies}) or None
    return None


def commit() -> str:
    """Commit of the current checkout, if there is one."""
    if Path("cpp/include/lomem/version.h").exists():
        with contextlib.suppress(OSError):
            command = ["git", "describe", "--always", "--dirty"]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def machine(plan: Plan) -> dict[str, Any]:
    """Hardware and software that the results were measured with."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "lomem": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "glibc": platform.libc_ver()[1] or None,
        "device": "cpu",
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "l2_cache_bytes": cpu_cache_bytes(2) or None,
        "l3_cache_bytes": cpu_cache_bytes(3) or None,
        "lomem_cpu_capability": _C.cpu_capability(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if plan.device.type == "cpu":
        facts["threads"] = plan.threads
    else:
        properties = torch.cuda.get_device_properties(plan.device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_bytes": properties.L2_cache_size,
            "l3_cache_bytes": None,
            "cuda": torch.version.cuda,
            "lomem_cuda_archs": " ".join(_C.cuda_archs()),
        }
    for name in ("triton", "liger_kernel", "apex"):
        facts[name] = "installed" if importlib.util.find_spec(name) else "not installed"
    return facts


def results_name(device: str) -> str:
    """File name for results: the name of the CPU or GPU, in lower case with hyphens."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: argparse.Namespace) -> int:
    """Runs ``lomem bench``: measures or reads results, prints them and writes the requested files."""
    for option in ("json", "table"):
        if getattr(arguments, option) is not None:
            check_folder(f"--{option}", getattr(arguments, option))
    if arguments.plot is not None:
        check_plot(arguments.plot, "bench")
        bench_report.check_drawn(bench_report.select(arguments.only))
    results = replay(arguments) if arguments.from_file is not None else measure_and_print(arguments)
    if arguments.table is not None:
        Path(arguments.table).write_text(bench_report.markdown(results), encoding="utf-8")
    if arguments.plot is not None:
        bench_report.plot(results, arguments.plot)
    return 0


def make_console() -> bench_report.Console:
    """A console as wide as the terminal, or 160 columns in a file or a pipe."""
    console = bench_report.Console()
    return console if console.is_terminal else bench_report.Console(width=160)


def replay(arguments: argparse.Namespace) -> Results:
    """Prints saved results."""
    console = make_console()
    results = bench_report.load(arguments.from_file)
    if arguments.only is not None:
        cases = bench_report.select(arguments.only)
        results = results._replace(records=[record for record in results.records if record["case"] in cases])
    if not results.records:
        raise ValueError(f"--only is {','.join(arguments.only)}, expected a case that {arguments.from_file} has")
    bench_report.print_header(results, console)
    for records in bench_report.by_table(results.records):
        bench_report.print_table(records, console)
    return results


def measure_and_print(arguments: argparse.Namespace) -> Results:
    """Measures, prints and saves table by table."""
    plan = make_plan(arguments)
    reuse_memory()
    console = make_console()
    results = Results(plan.command(), machine(plan), [])
    bench_report.print_header(results, console)
    for records in run(plan):
        bench_report.print_table(records, console)
        results.records.extend(records)
        if arguments.json is not None:
            bench_report.save(results, arguments.json)
    return results
