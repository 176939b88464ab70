"""A training step of converted models: loss, gradients, and memory against the estimate."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import lomem
import torch
from lomem.commands import presets
from torch import Tensor, nn

from . import events
from .options import Options

#: Arguments of lomem.convert.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activations": {"norms": "keep"},
    "norms": {"activations": "keep"},
    "both": {"activations": "2bit"},
}
MODELS = ("vit-b", "llama")


class Case(NamedTuple):
    """A model, how it is trained and what is converted."""

    model: str
    autocast: torch.dtype | None
    conversion: str
    rehearse: bool

    @property
    def device(self) -> str:
        """Device of the model."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}, {'fp32' if self.autocast is None else 'bf16 autocast'}, {self.conversion}"


def preset(case: Case) -> presets.Preset:
    """The model with its sizes: ViT-B, and a LLaMA that is small enough for random weights."""
    if case.model == "vit-b":
        chosen = dataclasses.replace(presets.get("vit-b"), batch_size=32)
    else:
        small = {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2816}
        heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 16)
        llama = presets.get("llama-7b")
        chosen = dataclasses.replace(llama, options={**llama.options, **small, **heads}, batch_size=8, seq_len=512)
    return dataclasses.replace(chosen.small() if case.rehearse else chosen, dtype=torch.float32)


def make_batch(case: Case, size: int | None = None) -> dict[str, Tensor]:
    """Random pixels or tokens, on the default device."""
    batch = preset(case).batch(size)
    for tensor in batch.values():
        if tensor.is_floating_point():
            tensor.normal_()
        elif tensor.dim() > 1:
            tensor.random_(0, preset(case).config().vocab_size)
    return batch


def under_autocast(case: Case, device: str) -> torch.autocast:
    """The autocast block of the forward pass."""
    return torch.autocast(device, case.autocast, enabled=case.autocast is not None)


def convert(case: Case, device: str, model: nn.Module) -> nn.Module:
    """Converts a model that is on the device, as for training."""
    if case.conversion != "plain":
        with under_autocast(case, device):
            lomem.convert(model, make_batch(case, 2), **CONVERSIONS[case.conversion])
    return model


def build(case: Case) -> nn.Module:
    """The model, on the default device."""
    torch.manual_seed(0)
    model: nn.Module = preset(case).build()
    return model


def build_converted(case: Case) -> nn.Module:
    """The converted model, on the default device."""
    return convert(case, case.device, build(case))


# Loss and gradients.


def step(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    with under_autocast(case, case.device):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare_training(case: Case) -> None:
    """Loss and gradients of a model before any conversion, and against these, after each."""
    with torch.device(case.device):
        model, batch = build(case), make_batch(case)
        loss, gradient = step(case, model, batch)
        again, _ = step(case, model, batch)
        # Otherwise nothing below could be exact.
        events.check(f"{case.name}: the loss is reproducible", torch.equal(loss, again), f"{loss:.9g}, {again:.9g}")
        for conversion in ("activations", "norms", "both"):
            converted = case._replace(conversion=conversion)
            attempt(converted, compare_conversion, converted, model, batch, loss, gradient)


def compare_conversion(case: Case, model: nn.Module, batch: dict[str, Tensor], loss: Tensor, gradient: Tensor) -> None:
    """The same step of the converted model."""
    convert(case, case.device, model)
    try:
        judge(case, (loss, gradient), step(case, model, batch))
    finally:
        lomem.restore(model)


def judge(case: Case, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
    """Compares with the limits.

    Activations leave the forward pass as it is, bit for bit, and their gradient is that of a step function: how far it
    is off is a figure; a gradient of zeros would be off by 1. Norms round differently, and their gradient is exact up
    to rounding: a loss is a mean, in which roundings cancel, but a model may amplify those of a gradient, to half the
    digits (as lomem.convert assumes).
    """
    eps = torch.finfo(case.autocast or torch.float32).eps
    off, gradient_off = (((b - a).norm() / a.norm()).item() for a, b in zip(before, after, strict=True))
    loss_limit = 0.0 if case.conversion == "activations" else 2 * eps if case.autocast else 100 * eps
    gradient_limit = eps**0.5 if case.conversion == "norms" else 1.0
    events.check(f"{case.name}: loss", off <= loss_limit, f"relative difference {off:.3g}, at most {loss_limit:.3g}")
    message = f"relative difference {gradient_off:.3g}, at most {gradient_limit:.3g}"
    events.check(f"{case.name}: gradients", gradient_off <= gradient_limit, message)
    events.figure("Training step", model=case.name, loss=f"{off:.2g}", gradients=f"{gradient_off:.2g}")


# Memory.


def estimated(case: Case) -> int:
    """Peak of a training step with AdamW, from fake tensors."""
    transform = partial(convert, case, "cpu")  # fake tensors are on the CPU
    report = lomem.memory.estimate(
        partial(build, case),
        partial(make_batch, case),
        torch.optim.AdamW,
        device=case.device,
        autocast=case.autocast,
        transform=transform,
    )
    return report.peak.nbytes


def measured(case: Case) -> int:
    """The same on the device."""
    if not case.rehearse:
        make = partial(make_batch, case)
        return lomem.memory.measured_peak(
            partial(build_converted, case), make, torch.optim.AdamW, autocast=case.autocast
        )
    model = build_converted(case)
    optimizer = torch.optim.AdamW(model.parameters())
    return lomem.memory.step_peak(model, make_batch(case), optimizer, autocast=case.autocast).peak.nbytes


def peaks(case: Case) -> tuple[Case, int, int]:
    """Both, in a process of a pool."""
    torch.set_num_threads(1)
    return case, estimated(case), measured(case)


def compare_memory(case: Case, estimate: int, peak: int) -> None:
    """An estimate leaves out workspaces and rounding, 0 to 8 % of the peak (docs/memory.md); a CPU has none."""
    off = (peak - estimate) / peak
    low, high = (0.0, 0.0) if case.rehearse else (-0.001, 0.08)
    message = f"{off:.2%} above the estimate, expected {low:.1%} to {high:.1%}"
    events.check(f"{case.name}: peak", low <= off <= high, message)
    columns = {"estimate MiB": f"{estimate / 2**20:.1f}", "measured MiB": f"{peak / 2**20:.1f}", "off": f"{off:.2%}"}
    events.figure("Peak memory of a step with AdamW", model=case.name, **columns)


def compare_all(options: Options) -> None:
    """Everything, each figure as soon as it is known."""
    cases = [
        Case(model, autocast, "plain", options.rehearse)
        for model, autocast in itertools.product(MODELS, (None, torch.bfloat16))
    ]
    for case in cases:
        attempt(case, compare_training, case)
    converted = [case._replace(conversion=conversion) for conversion in ("plain", "both") for case in cases]
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(min(options.jobs, len(converted)), mp_context=spawn) as pool:
        running = {pool.submit(peaks, case): case for case in converted}
        for future in as_completed(running):
            attempt(running[future], lambda future=future: compare_memory(*future.result()))


def attempt(case: Case, function: Any, *arguments: Any) -> None:
    """One case that raises does not hide what the others show."""
    try:
        function(*arguments)
    except Exception as error:
        events.check(f"{case.name}: {type(error).__name__}", False, str(error))
