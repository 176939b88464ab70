"""Times whole training steps on the CPU, and counts what their forward passes save, by several methods.

    $ python benchmarks/whole_step.py                          # or make whole-step; about half an hour
    $ python benchmarks/whole_step.py --small --rounds 6       # tiny models, a minute
    $ python benchmarks/whole_step.py --cases vit-s --methods plain,lomem
    $ python benchmarks/whole_step.py --bytes-only             # counts bytes alone, by more methods; some minutes

Models have random weights and the published sizes. A step is: gradients to None, forward pass, loss, backward pass,
optimizer step. Every method has a process of its own; the processes take turns, step by step, in rotating order. Times
are of the CPU, so that waiting for a core does not count; with several threads they are wall-clock times. The machine
must be idle otherwise in any case. Writes benchmarks/results/whole-step.json and .md. Needs transformers and peft
(pip install 'lomem[models]') and, for torch.compile, a C++ compiler.

--bytes-only writes benchmarks/results/saved-by-method.json and .md instead. Its methods include some whose time on a
CPU says nothing: offloading, which has nowhere to go there, and the formulas of fused kernels (fused_stand_ins.py).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lomem
import torch
import torch._functorch.config
from bytes_alive import bytes_alive
from fused_stand_ins import FusedLoss, fuse_norms_and_products
from lomem.commands import bench
from lomem.commands.gated_mlp import rebuild_products
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

Batch = dict[str, Tensor]

RESULTS = Path(__file__).parent / "results/whole-step"

COUNTED = RESULTS.with_name("saved-by-method")


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    Attributes:
        title: Title of its row.
        bits: Of lomem.convert; 0 if the model is not converted.
        every: One in so many blocks is checkpointed; 0 for none.
        compiled: Whether the model is compiled.
        budget: The compiler's activation_memory_budget.
        fused: What computes as a fused kernel does: "mlp", or "kernels" for norms and gated products.
        fused_loss: Whether the loss is computed with the output layer, in chunks.
        offloaded: Whether all that is saved goes to the memory of the host.
    """

    title: str
    bits: int | None = 0
    every: int = 0
    compiled: bool = False
    budget: float = 1.0
    fused: str = ""
    fused_loss: bool = False
    offloaded: bool = False

    @property
    def timed(self) -> bool:
        """Whether its time on a CPU is that of the method."""
        return not (self.fused or self.fused_loss or self.offloaded)


METHODS = {
    "plain": Method("plain"),
    "lomem": Method("`lomem.convert`", None),
    "exact": Method("`lomem.convert(bits=16)`", 16),
    "8bit": Method("`lomem.convert(bits=8)`", 8),
    "compile": Method("`torch.compile`", compiled=True),
    "exact-compile": Method("`lomem.convert(bits=16)`, `torch.compile`", 16, compiled=True),
    "8bit-compile": Method("`lomem.convert(bits=8)`, `torch.compile`", 8, compiled=True),
    "checkpointing": Method("gradient checkpointing", every=1),
    "every-second": Method("`lomem.convert(bits=16)`, checkpointing of every second block", 16, every=2),
}
#: Of which bytes are counted besides.
MORE_METHODS = {
    "half": Method("checkpointing of every second block", every=2),
    "budget": Method("`torch.compile`, `activation_memory_budget = 0.5`", compiled=True, budget=0.5),
    "offload": Method("`save_on_cpu`", offloaded=True),
    "fused-mlp": Method("MLP that rebuilds its product, as unsloth's", fused="mlp"),
    "fused": Method("fused norms and SwiGLU, as Liger's", fused="kernels"),
    "fused-loss": Method("fused loss", fused_loss=True),
    "fused-all": Method("fused norms and SwiGLU, fused loss", fused="kernels", fused_loss=True),
    "exact-budget": Method(
        "`lomem.convert(bits=16)`, `torch.compile`, `activation_memory_budget = 0.5`", 16, compiled=True, budget=0.5
    ),
    "8bit-budget": Method(
        "`lomem.convert(bits=8)`, `torch.compile`, `activation_memory_budget = 0.5`", 8, compiled=True, budget=0.5
    ),
    "exact-offload": Method("`lomem.convert(bits=16)`, `save_on_cpu`", 16, offloaded=True),
    "8bit-every-second": Method("`lomem.convert(bits=8)`, checkpointing of every second block", 8, every=2),
    "exact-loss": Method("`lomem.convert(bits=16)`, fused loss", 16, fused_loss=True),
    "8bit-loss": Method("`lomem.convert(bits=8)`, fused loss", 8, fused_loss=True),
    "8bit-every-second-loss": Method(
        "`lomem.convert(bits=8)`, checkpointing of every second block, fused loss", 8, every=2, fused_loss=True
    ),
    "checkpointing-loss": Method("gradient checkpointing, fused loss", every=1, fused_loss=True),
}
_ALL = {**METHODS, **MORE_METHODS}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        title: Title of its table.
        make: Function of whether the model is to be tiny, which makes the model.
        batch: Makes a batch of it.
        autocast: Dtype of automatic mixed precision, None for none.
        repeats: Number of steps that are timed together.
        fused: What of it fused kernels compute: of "mlp", "kernels" and "loss".
    """

    title: str
    make: Callable[[bool], Any]
    batch: Callable[[bool], Batch]
    autocast: torch.dtype | None = None
    repeats: int = 1
    fused: tuple[str, ...] = ()

    def has(self, method: Method) -> bool:
        """Whether the method changes anything in it."""
        return {method.fused, "loss" * method.fused_loss} <= {"", *self.fused}


def smollm2(small: bool, **options: Any) -> Any:
    """A model of SmolLM2-135M's sizes in bfloat16, frozen, with LoRA.

    Args:
        small: Whether it is to be tiny.
        **options: Options of LoRA. By default the adapters have the model's dtype, so that nothing is cast.
    """
    import peft
    import transformers

    sizes = (64, 160, 2, 4, 2, 128) if small else (576, 1536, 30, 9, 3, 49152)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = transformers.LlamaConfig(
        **dict(zip((*names, "vocab_size"), sizes, strict=True)),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wide = options.pop("autocast_adapter_dtype", False)
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=projections, **options)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=wide)
    # (On the meta device peft leaves adapters in float32.)
    return model if wide else model.to(torch.bfloat16)


def tokens(small: bool) -> Batch:
    """Two sequences of tokens."""
    ids = torch.randint(0, 128, (2, 16)) if small else torch.randint(0, 49152, (2, 256))
    return {"input_ids": ids, "labels": ids}


def vit_s(small: bool) -> Any:
    """A Vision Transformer S/16."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64 if small else 384,
        intermediate_size=256 if small else 1536,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=2 if small else 6,
        image_size=32 if small else 224,
        patch_size=16,
        num_labels=1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return transformers.ViTForImageClassification(config)


def images(small: bool) -> Batch:
    """Images of as many classes."""
    pixels = torch.randn(2, 3, 32, 32) if small else torch.randn(16, 3, 224, 224)
    return {"pixel_values": pixels, "labels": torch.arange(len(pixels))}


class _Pair(nn.Module):
    """An activation and the linear layer behind it, with a loss that costs nothing."""

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(features, features // 4, dtype=dtype))

    def forward(self, input: Tensor) -> Any:
        return SimpleNamespace(loss=self.layers(input).sum())


def pair(small: bool) -> Any:
    """GELU and a linear layer."""
    return _Pair(64 if small else 4096, torch.bfloat16)


def elements(small: bool) -> Batch:
    """A million elements."""
    x = torch.randn((16, 64) if small else (256, 4096), dtype=torch.bfloat16)
    return {"input": x.requires_grad_()}


CASES = {
    "gelu-linear": Case("GELU of 1M elements and a linear layer, 4096 to 1024, bfloat16", pair, elements, repeats=10),
    "smollm2-lora": Case(
        "SmolLM2-135M, LoRA r16 on all linear layers, bfloat16, batch 2 x 256 tokens",
        smollm2,
        tokens,
        fused=("mlp", "kernels", "loss"),
    ),
    "smollm2-lora-dropout": Case(
        "SmolLM2-135M in bfloat16, LoRA r16 with dropout 0.1 in float32 (peft's default), batch 2 x 256 tokens",
        functools.partial(smollm2, lora_dropout=0.1, autocast_adapter_dtype=True),
        tokens,
        fused=("kernels", "loss"),
    ),
    "vit-s": Case("ViT-S/16, full fine-tuning, float32, batch 16", vit_s, images),
    "vit-s-amp": Case("ViT-S/16, full fine-tuning, autocast to bfloat16, batch 16", vit_s, images, torch.bfloat16),
}


#: Of which bytes are counted by default.
COUNTED_CASES = ["smollm2-lora", "vit-s-amp"]


def checkpoint_blocks(model: Any, every: int) -> None:
    """Checkpoints the first of every so many blocks of a model of transformers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = number % every == 0


# --- One process ------------------------------------------------------------------------------------------------------


class Training:
    """A model in training by one method."""

    def __init__(self, case: Case, method: str, model: Any, batch: Batch) -> None:
        self.batch = batch
        self.autocast, self.method, self.repeats = case.autocast, _ALL[method], case.repeats
        self.model: nn.Module = model.train()
        self.forward: Any = self.model
        how = self.method
        if how.fused == "mlp":
            rebuild_products(self.model)
        elif how.fused:
            fuse_norms_and_products(self.model)
        if how.bits != 0:
            # Decisions do not depend on sizes: one sequence of 32 tokens, or one image.
            example = {name: t[:1, :32] if name == "input_ids" else t[:1] for name, t in self.batch.items()}
            if "input_ids" in example:
                example["labels"] = example["input_ids"]
            with self._autocast():
                lomem.convert(self.model, example, bits=how.bits, gradients=False)
        if how.compiled:
            torch._functorch.config.activation_memory_budget = how.budget
            self.forward = torch.compile(self.model)
        if how.every:
            if hasattr(model, "gradient_checkpointing_enable"):
                checkpoint_blocks(model, how.every)
            elif how.every == 1:  # (What is not made of blocks has no second one.)
                self.forward = functools.partial(checkpoint, self.model, use_reentrant=False)
        if how.fused_loss:
            self.forward = FusedLoss(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast is not None)

    def loss(self) -> Tensor:
        """The loss of the batch."""
        with self._autocast():
            return self.forward(**self.batch).loss  # type: ignore[no-any-return]

    def step(self) -> float:
        """Takes a step, or as many as are timed together; returns the seconds of one."""
        # On several threads, time of the CPU would include that of threads that spin.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        for _ in range(self.repeats):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.optimizer.step()
        return (clock() - start) / self.repeats

    def saved_bytes(self) -> tuple[int, int]:
        """Bytes that the forward pass keeps for the backward pass, and those of it in the memory of the host."""
        if self.method.compiled:
            # Under a mode nothing would be compiled; what autograd saves is all that a compiled function keeps.
            exclude = [*self.model.parameters(), *self.model.buffers(), *self.batch.values()]
            with lomem.memory.saved_for_backward(exclude) as saved:
                self.loss()
            return saved.nbytes, 0
        if self.method.offloaded:
            with (offloaded := Offloaded()):
                return bytes_alive(self.loss)[0], offloaded.nbytes
        return bytes_alive(self.loss)[0], 0


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """What torch.autograd.graph.save_on_cpu does, on a CPU that stands for a GPU.

    There, save_on_cpu would find all tensors in place. Copies are made outside of the modes that count.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        super().__init__(self._pack, lambda copy: copy)

    def _pack(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():
            copy = tensor.detach().clone()
        self.nbytes += copy.nbytes
        return copy


def serve(options: argparse.Namespace) -> None:
    """Prints the bytes saved, then takes a step for every line of standard input, and prints its seconds."""
    # Whatever a library prints must not come between.
    with contextlib.redirect_stdout(sys.stderr):
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        case, method = CASES[options.serve[0]], options.serve[1]
        training = Training(case, method, case.make(options.small), case.batch(options.small))
        for _ in range(0 if options.bytes_only else 2):  # compiles, and makes the optimizer's state
            training.step()
        saved = training.saved_bytes()
    print(json.dumps(saved), flush=True)
    for _ in sys.stdin:
        print(training.step(), flush=True)


# --- All processes ----------------------------------------------------------------------------------------------------


class Process:
    """The process of a method."""

    def __init__(self, case: str, method: str, options: argparse.Namespace) -> None:
        self._name = f"{case}, {method}"
        command = [sys.executable, __file__, "--serve", case, method, "--threads", str(options.threads)]
        command += ["--small"] * options.small + ["--bytes-only"] * options.bytes_only
        # Idle threads must not spin while it is the others' turn.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(options.threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.saved_bytes, self.host_bytes = json.loads(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._name} ended with status {self._process.wait()}")
        return line

    def step(self) -> float:
        """Takes a step; returns its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes saved and seconds of every step, by method."""
    processes: dict[str, Process] = {}
    try:
        for method in options.methods:  # one after the other, since compiling takes all there is
            print(f"{case}: {method} starts", file=sys.stderr, flush=True)
            processes[method] = Process(case, method, options)
        seconds: dict[str, list[float]] = {method: [] for method in processes}
        for number in range(options.rounds):
            turn = number % len(processes)
            for method in [*processes][turn:] + [*processes][:turn]:
                seconds[method].append(processes[method].step())
            print(f"{case}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    finally:
        for process in processes.values():
            process.close()
    return {m: {"saved_bytes": p.saved_bytes, "seconds": seconds[m]} for m, p in processes.items()}


def count(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes saved by method. No model but a compiled one is run: shapes are enough."""
    result = {}
    case = CASES[name]
    for method in filter(lambda method: case.has(_ALL[method]), options.methods):
        if _ALL[method].compiled:
            process = Process(name, method, options)
            process.close()
            saved, host = process.saved_bytes, process.host_bytes
        else:
            with lomem.memory.fake(lambda: case.make(options.small)) as model:
                saved, host = Training(case, method, model, case.batch(options.small)).saved_bytes()
        result[method] = {"saved_bytes": saved, "host_bytes": host}
        print(f"{name}: {method}: {saved:,} bytes, {host:,} on the host", file=sys.stderr, flush=True)
    return result


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the median of their distribution is with a probability of at least 95 %.

    Holds for every distribution: the number of values below its median is binomial. Needs at least 6 values.
    """
    n = len(values)
    below, cut = 0.0, -1
    while below + math.comb(n, cut + 1) / 2**n <= 0.025:
        cut += 1
        below += math.comb(n, cut) / 2**n
    if cut < 0:
        raise ValueError(f"got {n} rounds, expected at least 6 for an interval of 95 %")
    ordered = sorted(values)
    return ordered[cut], ordered[n - 1 - cut]


def table(title: str, results: dict[str, Any]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"## {title}", "", "| method | saved, MiB | | step, ms | ratio to plain | 95 % interval |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    plain = results.get("plain")
    for method, result in results.items():
        cells = [_ALL[method].title, f"{result['saved_bytes'] / 2**20:.1f}", "", "", "", ""]
        step = 1e3 * statistics.median(result["seconds"])
        cells[3] = f"{step:,.0f}" if step >= 100 else f"{step:.3g}"
        if plain is not None and method != "plain":
            ratios = [a / b for a, b in zip(result["seconds"], plain["seconds"], strict=True)]
            low, high = interval_of_median(ratios)
            cells[2] = f"{100 * (result['saved_bytes'] / plain['saved_bytes'] - 1):+.1f} %"
            cells[4] = f"{statistics.median(ratios):.3f}"
            cells[5] = f"{low:.3f} to {high:.3f}"
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def counted_table(case: dict[str, Any], timed: dict[str, Any]) -> list[str]:
    """The lines of a table of bytes, with ratios of times of steps where they were measured.

    Args:
        case: A case of the file of bytes.
        timed: The same case of the file of times, or an empty one.
    """
    lines = ["| method | saved, MiB | | on the host, MiB | step time, plain = 1 |", "|---|---:|---:|---:|---:|"]
    plain = case["methods"].get("plain")
    steps = timed.get("methods", {})
    for method, result in case["methods"].items():
        cells = [_ALL[method].title, f"{result['saved_bytes'] / 2**20:.1f}", "", "", ""]
        if plain is not None and method != "plain":
            cells[2] = f"{100 * (result['saved_bytes'] / plain['saved_bytes'] - 1):+.1f} %"
        if result["host_bytes"]:
            cells[3] = f"{result['host_bytes'] / 2**20:.1f}"
        # A time of another conversion, of an earlier version, would be that of another method.
        same = steps.get(method, {}).get("saved_bytes") == result["saved_bytes"]
        if same and "plain" in steps and method != "plain":
            pairs = zip(steps[method]["seconds"], steps["plain"]["seconds"], strict=True)
            cells[4] = f"{statistics.median(a / b for a, b in pairs):.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def counted_markdown(contents: dict[str, Any]) -> str:
    """The file of bytes."""
    lines = ["# What methods save for backward", ""]
    for case in contents["cases"].values():
        lines += [f"## {case['title']}", "", *(line.rsplit("|", 2)[0] + "|" for line in counted_table(case, {})), ""]
    lines += [
        "Saved: what the forward pass keeps for the backward pass, parameters and batch left out; of compiled models,",
        "what autograd saves. On the host: the copies that offloading makes, weights among them. Fused kernels: the",
        "tensors that they save, by plain ops (benchmarks/fused_stand_ins.py).",
        "",
        f"- {contents['versions']}",
        "- `python benchmarks/whole_step.py --bytes-only`",
        "",
    ]
    return "\n".join(lines)


def merged(contents: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results with those of other cases and methods that the file has, if they are of the same versions."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = [of["cases"] for of in (old, contents) if of.get("versions") == contents["versions"]]
    cases = {}
    for name, case in CASES.items():
        methods = {
            method: result for of in known for method, result in of.get(name, {"methods": {}})["methods"].items()
        }
        if methods:
            cases[name] = {"title": case.title, "methods": {m: methods[m] for m in _ALL if m in methods}}
    return {"versions": contents["versions"], "cases": cases}


def markdown(contents: dict[str, Any]) -> str:
    """The file of results."""
    machine = contents["machine"]
    lines = [
        "# Whole training steps on a CPU",
        "",
        *(line for case in contents["cases"].values() for line in table(case["title"], case["methods"])),
        "Saved: what the forward pass keeps for the backward pass, parameters and batch left out, copies of weights",
        "that autocast makes not; of compiled models, what autograd saves. Step: median, in time of the CPU on one",
        "thread and in wall-clock time on several. Ratio: median of the ratios of the steps of a round, and the",
        "interval that holds the median of their distribution with 95 %, whatever that distribution is.",
        "",
        f"- {machine['rounds']} rounds; a process for each method, which take turns step by step",
        f"- {machine['versions']} ({machine['commit']})",
        f"- {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['date']}",
        f"- Load average: {machine['load'][0]:.1f} before, {machine['load'][1]:.1f} after; an idle machine has at most "
        f"{machine['threads']}",
        *([f"- {contents['note']}"] if contents["note"] else []),
        f"- `{contents['command']}`",
        "",
    ]
    return "\n".join(lines)


def versions() -> str:
    """The versions of the libraries."""
    return ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("lomem", "torch", "transformers", "peft")
    )


def facts(options: argparse.Namespace, load: tuple[float, float]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "versions": versions(),
        "commit": bench.commit(),
        "cpu": bench.cpu_name(),
        "cores": bench.physical_cores(),
        "threads": options.threads,
        "rounds": options.rounds,
        "load": load,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _list(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"got {name}, expected some of {', '.join(known)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_list(CASES), metavar="CASE,...", help=", ".join(CASES))
    parser.add_argument("--methods", type=_list(_ALL), metavar="METHOD,...", help=", ".join(_ALL))
    parser.add_argument("--bytes-only", action="store_true", help="count bytes, take no steps")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--note", default="", help="a line to add to the results")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    if options.bytes_only and options.small and not (options.json and options.table):
        parser.error("--small is given with --bytes-only, expected --json and --table too: the figures are no results")
    results = COUNTED if options.bytes_only else RESULTS
    options.json = options.json or results.with_suffix(".json")
    options.table = options.table or results.with_suffix(".md")
    options.cases = options.cases or (COUNTED_CASES if options.bytes_only else list(CASES))
    options.methods = options.methods or list(_ALL if options.bytes_only else METHODS)
    command = shlex.join(["python", "benchmarks/whole_step.py", *sys.argv[1:]])
    if options.bytes_only:
        cases = {name: {"title": CASES[name].title, "methods": count(name, options)} for name in options.cases}
        contents = merged({"versions": versions(), "cases": cases}, options.json)
        finish(options, contents, counted_markdown(contents))
        return
    for name in options.methods:
        if not _ALL[name].timed:
            parser.error(f"--methods has {name}, whose time on a CPU says nothing: pass --bytes-only")
    interval_of_median([0.0] * options.rounds)  # fails here rather than at the end
    before = os.getloadavg()[0]
    contents: dict[str, Any] = {"command": command, "note": options.note, "machine": {}, "cases": {}}
    for name in options.cases:
        contents["cases"][name] = {"title": CASES[name].title, "methods": measure(name, options)}
        contents["machine"] = facts(options, (before, os.getloadavg()[0]))
        finish(options, contents, markdown(contents))  # each at once: a later one may fail


def finish(options: argparse.Namespace, contents: dict[str, Any], text: str) -> None:
    """Writes the results."""
    options.json.write_text(json.dumps(contents) + "\n", encoding="utf-8")
    options.table.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
