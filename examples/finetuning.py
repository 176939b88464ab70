"""Shared code of the fine-tuning examples: trains the same model with several methods, alternating step by step."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lomem
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

#: Arguments of lomem.convert; None leaves the model unconverted.
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "exact": {"bits": 16},
    "8 bits": {"bits": 8},
    "2 bits": {"activations": "2bit", "pairs": "keep", "criterion": "derivative"},
    "2 bits, paper": {"pairs": "keep", "criterion": "paper"},
}

#: Number of batches over which saved bytes are averaged, because their lengths differ.
COUNTED = 4


class Task(ABC):
    """A pretrained model, its data, and a score on held-out data.

    Attributes:
        title: Title of the table.
        score_name: Name of the score, with its unit.
        sources: Model and data, with their licences.
        learning_rate: Peak of the learning rate schedule.
        packages: Packages that contain weights and data.
    """

    title: str
    score_name: str
    sources: Sequence[str]
    learning_rate: float
    packages: Sequence[str]

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The pretrained model in training mode, with new parameters drawn from the seed."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless batches from the seed's training set, in the seed's order."""

    @abstractmethod
    def score(self, model: nn.Module, seed: int) -> float:
        """The model's score on the seed's held-out set."""


def package_path(package: str) -> Path:
    """The folder of an installed package, which is not imported: these packages import others that are not needed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"this example needs the package {package}: see the first lines of {sys.argv[0]}")
    return Path(spec.submodule_search_locations[0])


@dataclass
class Result:
    """Result of one training run."""

    method: str
    seed: int
    score_before: float
    score: float = float("nan")
    saved_bytes: float = float("nan")
    step_ms: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


class Run:
    """A model in training, with its optimizer and schedule."""

    def __init__(self, model: nn.Module, learning_rate: float, steps: int, autocast: torch.dtype | None) -> None:
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_then_linear(steps))
        self._autocast = autocast

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with autocast(self._autocast):
            return self.model(**batch).loss

    def saved_bytes(self, batch: Batch) -> int:
        """Bytes that autograd saves for a batch, without parameters and buffers, which exist anyway."""
        with lomem.memory.saved_for_backward([*self.model.parameters(), *self.model.buffers()]) as saved:
            self.loss(batch)
        return saved.nbytes

    def step(self, batch: Batch) -> tuple[float, float]:
        """Takes one optimizer step; returns its milliseconds and its loss."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        milliseconds = (time.perf_counter() - start) * 1e3
        self.schedule.step()
        return milliseconds, loss.item()


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    """Automatic mixed precision on the CPU, disabled for None."""
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def warmup_then_linear(steps: int) -> Any:
    """Learning rate factor: warmup over a tenth of the steps, then linear decay to 0."""
    warmup = max(1, steps // 10)
    return lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def compare(task: Task, options: argparse.Namespace) -> list[Result]:
    """Trains with every method for each seed, on the same batches."""
    dtype = {"bf16": torch.bfloat16, "fp32": None}[options.precision]
    results: list[Result] = []
    for seed in options.seeds:
        start = task.model(seed)
        batches = task.batches(seed)
        first = [next(batches) for _ in range(COUNTED)]
        with autocast(dtype):
            before = task.score(start, seed)
        runs, of_seed = {}, {}
        for method in options.methods:
            model = copy.deepcopy(start)
            conversion = METHODS[method]
            if conversion is not None:
                with autocast(dtype):
                    report = lomem.convert(model, first[0], **conversion)
                if seed == options.seeds[0]:
                    print(f"{method}:\n{report}\n", flush=True)
            runs[method] = Run(model, task.learning_rate, options.steps, dtype)
            of_seed[method] = Result(method, seed, before)
            of_seed[method].saved_bytes = statistics.fmean(runs[method].saved_bytes(batch) for batch in first)
        train(task, runs, of_seed, seed, options.steps)
        for method, run in runs.items():
            with autocast(dtype):
                of_seed[method].score = task.score(run.model, seed)
        print(
            f"seed {seed}: {task.score_name} {before:.4g} before, then "
            + ", ".join(f"{result.score:.4g} {method}" for method, result in of_seed.items()),
            flush=True,
        )
        results += of_seed.values()
    return results


def gradients(model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients of all parameters, with the same dropout each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with autocast(dtype):
        loss = model(**batch).loss
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def print_gradient_errors(task: Task, options: argparse.Namespace) -> None:
    """Prints how far each method's gradient is from the plain model's, relative, in the 2-norm, on a batch per seed."""
    dtype = {"bf16": torch.bfloat16, "fp32": None}[options.precision]
    print(f"{task.title}: relative error of the gradient, {options.precision}")
    for seed in options.seeds:
        start = task.model(seed).float() if dtype is None else task.model(seed)
        batch = next(task.batches(seed))
        exact = gradients(start, batch, dtype)
        size = sum(g.norm() ** 2 for g in exact.values()) ** 0.5
        for method in options.methods:
            conversion = METHODS[method]
            if conversion is None:
                continue
            model = copy.deepcopy(start)
            with autocast(dtype):
                lomem.convert(model, batch, check=False, gradients=False, **conversion)
            difference = {name: g - exact[name] for name, g in gradients(model, batch, dtype).items()}
            whole = sum(d.norm() ** 2 for d in difference.values()) ** 0.5 / size
            # Of weights whose gradient counts.
            each = [float(d.norm() / exact[n].norm()) for n, d in difference.items() if exact[n].norm() > 1e-3 * size]
            print(
                f"seed {seed}, {method}: {whole:.4f} in all, {statistics.median(each):.4f} in the median of weights, "
                f"{max(each):.4f} in the worst",
                flush=True,
            )


def train(task: Task, runs: dict[str, Run], results: dict[str, Result], seed: int, steps: int) -> None:
    """Trains all runs, alternating step by step."""
    methods = list(runs)
    batches = task.batches(seed)
    began = time.perf_counter()
    for step in range(steps):
        batch = next(batches)
        turn = step % len(methods)
        for method in methods[turn:] + methods[:turn]:
            # All methods get the same dropout masks, so that they differ only in the conversion.
            torch.manual_seed(1_000_000 * seed + step)
            milliseconds, loss = runs[method].step(batch)
            results[method].step_ms.append(milliseconds)
            results[method].loss.append(loss)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            recent = ", ".join(f"{statistics.fmean(results[m].loss[-20:]):.4f}" for m in methods)
            seconds = time.perf_counter() - began
            print(
                f"seed {seed}, step {step + 1} of {steps}, {seconds:.0f} s: loss {recent}", file=sys.stderr, flush=True
            )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which is None for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def with_error(values: Sequence[float], form: str) -> str:
    """Formats the mean ± its standard error."""
    mean, error = mean_and_error(values)
    return format(mean, form) + (f" ± {error:{form.lstrip('+')}}" if error is not None else "")


def table(task: Task, results: list[Result], options: argparse.Namespace) -> str:
    """The comparison in Markdown."""
    runs = {method: [r for r in results if r.method == method] for method in options.methods}
    plain = runs.get("plain")
    seeds = len(options.seeds)
    n_seeds = f"{seeds} seed" + "s" * (seeds != 1)
    lines = [
        f"# {task.title}",
        "",
        f"{options.steps} steps, {options.precision}, {n_seeds}; score: {task.score_name}, on the held-out set.",
        f"Before training: {with_error([r.score_before for r in next(iter(runs.values()))], '.3f')}.",
        "",
        "| method | saved for backward, MiB | | step, ms | | score | difference |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, own in runs.items():
        saved = [r.saved_bytes / 2**20 for r in own]
        step = [statistics.median(r.step_ms) for r in own]
        smaller = slower = difference = ""
        if plain is not None and method != "plain":
            smaller = f"{100 * (sum(saved) / sum(r.saved_bytes / 2**20 for r in plain) - 1):+.1f} %"
            # Methods alternate, so ratios of neighbouring steps cancel drifts of the machine's speed.
            pairs = zip(plain, own, strict=True)
            ratios = [b / a for x, y in pairs for a, b in zip(x.step_ms, y.step_ms, strict=True)]
            slower = f"{100 * (statistics.median(ratios) - 1):+.1f} %"
            difference = with_error([b.score - a.score for a, b in zip(plain, own, strict=True)], "+.3f")
        score = with_error([r.score for r in own], ".3f")
        cells = [method, f"{statistics.fmean(saved):.2f}", smaller, f"{statistics.fmean(step):.0f}", slower, score]
        lines.append("| " + " | ".join([*cells, difference]) + " |")
    lines += [
        "",
        f"Scores: mean over {n_seeds} ± standard error. Differences to plain: mean ± standard error of the differences "
        "of each seed's two runs, which share batches, dropout and starting weights. Saved bytes: mean of "
        f"{COUNTED} batches of every seed, weights left out, autocast's copies of them not. Step: mean of the seeds' "
        "medians; the percentage is the median ratio of steps taken in turns.",
        "",
        *(f"- {source}" for source in task.sources),
        f"- {facts(task)['versions']}; {facts(task)['cpu']}, {facts(task)['threads']}",
        f"- `python {shlex.join(sys.argv)}`",
        "",
    ]
    return "\n".join(lines)


def facts(task: Task) -> dict[str, Any]:
    """Versions, CPU and threads, on which the figures depend."""
    names = ["lomem", "torch", "transformers", "peft", *task.packages]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in models if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return {"versions": versions, "cpu": cpu, "threads": f"{threads} thread" + "s" * (threads != 1)}


def main(task: Task, steps: int, seeds: int, methods: Sequence[str]) -> None:
    """Command line of an example: trains, prints the table, and writes it if a path is given."""
    parser = argparse.ArgumentParser(description=task.title)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, from 0 on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="steps of each training run (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(methods))
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="bf16: automatic mixed precision")
    parser.add_argument("--threads", type=int, default=None, help="number of threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="file for all figures, including every step")
    parser.add_argument("--table", type=Path, help="file for the table, in Markdown")
    parser.add_argument("--gradients", action="store_true", help="print errors of the gradient instead of training")
    options = parser.parse_args()
    options.seeds = list(range(options.seeds))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.gradients:
        print_gradient_errors(task, options)
        return
    results = compare(task, options)
    text = table(task, results, options)
    print(text)
    if options.table is not None:
        options.table.write_text(text, encoding="utf-8")
    if options.json is not None:
        settings = {"steps": options.steps, "precision": options.precision, "learning_rate": task.learning_rate}
        runs = [asdict(result) for result in results]
        contents = {"title": task.title, "score": task.score_name, **facts(task), **settings, "runs": runs}
        options.json.write_text(json.dumps(contents) + "\n", encoding="utf-8")
