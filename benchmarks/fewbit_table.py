"""Estimates FewBit's table of RoBERTa on MRPC: plain, 3-bit GELU, randomized linear layers, and both.

    $ python benchmarks/fewbit_table.py      # or make fewbit-table; takes a minute, without GPU or weights

Writes benchmarks/results/fewbit-roberta.json and .md. Needs transformers (pip install 'lomem[models]').
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lomem
import torch
from lomem import memory
from lomem.commands import presets
from lomem.memory import StepPeak
from torch import nn

RATIO = 0.2
MATMUL = "gaussian"

#: Peak memory in GiB, from the table in FewBit's README.
FEWBIT = {"plain": 11.30, "3-bit GELU": 9.75, "randomized linear": 9.20, "both": 7.60}

ATTENTION = {
    "sdpa": "fused attention (scaled_dot_product_attention, which keeps no scores)",
    "eager": "attention as a chain of ops (which keeps scores, probabilities and dropout's results)",
}

NOTES = f"""\
- Setting: RoBERTa-base with its classification head, batch 128, 128 tokens a sequence, all parameters trained by Adam
  in float32 without autocast. FewBit's README gives model, task and batch size; the length of 128, the optimizer and
  the attention are assumptions here.
- Randomized are all linear layers of the encoder, 72 of them, at {RATIO:.0%} of the rows (16,384 rows, of which 3,277
  are kept; "{MATMUL}"). Not the two of the classification head, which see one token a sequence.
- FewBit's figures were measured on a GPU, by the software of 2022; these are estimates of a training step's peak with
  gradients and Adam's state. Not in them: workspaces inside ops, the allocator's rounding, and the pieces of at most
  64 MiB in which random matrices are drawn.
- Query, key and value layers take the same input. Exact layers keep it once together; randomized ones keep
  {RATIO:.0%} of it each. That, and what other layers keep, is why the saving is not larger.
"""


def randomize(model: nn.Module) -> None:
    """Randomizes all linear layers in the encoder of a RoBERTa model."""
    lomem.map_module(
        model,
        lambda m: lomem.convert_linear(m, lomem.nn.RandomizedLinear, proj_dim_ratio=RATIO, matmul=MATMUL),
        pattern=r"(^|\.)encoder\.",
    )


def few_bit_gelu(model: nn.Module) -> None:
    """Replaces the GELUs of a RoBERTa model by 3-bit ones."""
    gelu: Any = lomem.nn.GELU  # type: ignore[attr-defined, unused-ignore]
    lomem.map_module(
        model, lambda m: gelu(bits=3) if isinstance(m, nn.GELU) or type(m).__name__ == "GELUActivation" else m
    )


def both(model: nn.Module) -> None:
    """3-bit GELUs and randomized linear layers."""
    few_bit_gelu(model)
    randomize(model)


ROWS: dict[str, Callable[[nn.Module], None] | None] = {
    "plain": None,
    "3-bit GELU": few_bit_gelu,
    "randomized linear": randomize,
    "both": both,
}
if not hasattr(lomem.nn, "GELU"):
    for name in ("3-bit GELU", "both"):
        del ROWS[name]


def estimate(preset: presets.Preset, batch_size: int, attention: str) -> dict[str, StepPeak]:
    """Estimates the rows of the table."""
    options = {**preset.options, "attn_implementation": attention}
    preset = dataclasses.replace(preset, options=options, dtype=torch.float32, autocast=None)
    return {
        name: memory.estimate(
            preset.build, lambda: preset.batch(batch_size), torch.optim.Adam, device="cuda", transform=transform
        )
        for name, transform in ROWS.items()
    }


def markdown(results: dict[str, dict[str, StepPeak]]) -> str:
    """The tables in Markdown."""
    lines = [
        "# RoBERTa-base on MRPC, batch 128: FewBit's table, estimated",
        "",
        f"`python benchmarks/fewbit_table.py` (lomem {lomem.__version__}, torch {torch.__version__})",
    ]
    for attention, rows in results.items():
        plain = rows["plain"]
        lines += [
            "",
            f"With {ATTENTION[attention]}, GiB:",
            "",
            "| | saved for backward | change | peak of a step | change | FewBit's README | change |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in rows.items():
            cells = [
                (row.saved_bytes / 2**30, plain.saved_bytes / 2**30),
                (row.peak.nbytes / 2**30, plain.peak.nbytes / 2**30),
                (FEWBIT[name], FEWBIT["plain"]),
            ]
            texts = [f"{value:.2f} | {100 * (value / base - 1):+.1f} %" for value, base in cells]
            lines.append(f"| {name} | " + " | ".join(texts).replace("+0.0 %", "") + " |")
    return "\n".join([*lines, "", "What differs from FewBit's:", "", NOTES])


def figures(row: StepPeak) -> dict[str, Any]:
    """The figures of an estimate that go into the JSON file."""
    return {
        "saved_bytes": row.saved_bytes,
        "peak_bytes": row.peak.nbytes,
        "peak_categories": {name: nbytes for name, nbytes in row.peak.categories.items() if nbytes},
    }


def main() -> None:
    """Prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results_folder = Path(__file__).with_name("results")
    parser.add_argument("--json", type=Path, default=results_folder / "fewbit-roberta.json")
    parser.add_argument("--table", type=Path, default=results_folder / "fewbit-roberta.md")
    parser.add_argument("--small", action="store_true", help="a model of two small layers, to try the command")
    arguments = parser.parse_args()
    preset = presets.get("roberta-base")
    preset, batch_size = (preset.small(), 4) if arguments.small else (preset, 128)
    results = {attention: estimate(preset, batch_size, attention) for attention in ATTENTION}
    text = markdown(results)
    print(text)
    arguments.table.write_text(text)
    values = {
        "command": "python benchmarks/fewbit_table.py" + " --small" * arguments.small,
        "lomem": lomem.__version__,
        "torch": torch.__version__,
        "ratio": RATIO,
        "matmul": MATMUL,
        "fewbit_peak_gib": FEWBIT,
        "estimates": {
            attention: {name: figures(row) for name, row in rows.items()} for attention, rows in results.items()
        },
    }
    arguments.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
