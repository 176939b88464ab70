"""Counts what tiny models with Liger-Kernel's layers save for the backward pass, before and after lomem.convert.

    $ pip install --no-deps liger-kernel         # beside a build of torch that has Triton
    $ python benchmarks/liger_bytes.py           # a minute

Without a GPU, Triton's interpreter runs the kernels on the CPU. Bytes do not depend on that: the same functions save
the same tensors. Writes benchmarks/results/liger-bytes.json and .md. tests/python/test_liger.py trains the same models.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import liger_models
import lomem
import torch
from bytes_alive import bytes_alive

RESULTS = Path(__file__).parent / "results/liger-bytes"
#: What is trained, by name.
CASES = {"full": "LLaMA", "lora": "LLaMA, LoRA"}
#: Of lomem.convert; None if the model is not converted.
BITS = (None, 16, 8)


def count(patch: str, bits: int | None, *, lora: bool) -> int:
    """Bytes that the forward pass of a model leaves alive."""
    with liger_models.patched("llama", patch, lora=lora) as (model, batch):
        if bits is not None:
            with contextlib.suppress(lomem.NothingToConvertError):
                lomem.convert(model, batch, bits=bits, gradients=False)
        return bytes_alive(lambda: model(**batch).loss)[0]


def table(saved: dict[str, dict[str, list[int]]]) -> list[str]:
    """The lines of a table in Markdown, of the bytes by case and by what is patched."""
    columns = [title for case in CASES.values() for title in (case, "`bits=16`", "`bits=8`")]
    lines = [f"| Liger-Kernel computes | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for patch in liger_models.PATCHES:
        cells = [f"{n / 1024:.1f}" for case in CASES for n in saved[case][patch]]
        lines.append(f"| {patch} | {' | '.join(cells)} |")
    return lines


def markdown(contents: dict[str, Any]) -> str:
    """The file of results."""
    lines = [
        "# What models with Liger-Kernel's layers save for backward",
        "",
        "KiB, of LLaMAs of two layers of width 32 and 8 tokens, as they are and converted:",
        "",
        *table(contents["saved"]),
        "",
        "Saved: what the forward pass keeps for the backward pass, parameters and batch left out. LoRA: r4 on all",
        "linear layers but the last. Where there is nothing to convert, a model stays as it is.",
        "",
        f"- {contents['versions']}; {contents['device']}",
        "- `python benchmarks/liger_bytes.py`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    problem = liger_models.load()
    if problem:
        sys.exit(f"liger_bytes.py: {problem}")
    torch.set_num_threads(1)  # of tiny tensors
    saved: dict[str, dict[str, list[int]]] = {case: {} for case in CASES}
    for case, counts in saved.items():
        for patch in liger_models.PATCHES:
            counts[patch] = [count(patch, bits, lora=case == "lora") for bits in BITS]
            print(f"{case}: {patch}: {counts[patch]}", file=sys.stderr, flush=True)
    names = ("lomem", "torch", "triton", "liger_kernel", "transformers", "peft")
    contents = {
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter on a CPU",
        "saved": saved,
    }
    RESULTS.with_suffix(".json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(markdown(contents), encoding="utf-8")
    print(markdown(contents))


if __name__ == "__main__":
    main()
