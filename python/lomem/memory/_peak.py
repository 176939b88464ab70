"""Measures the peak memory of a training step, and breaks it down into categories."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from .._trace.batch import as_batch
from .._trace.holders import holders_of, large_holders
from .._trace.recorder import Op, Recorder, Storage
from .._trace.state import preserved
from .._units import size
from ._norms import module_name
from ._profile import is_weight_copy, was_there
from ._report import Report, Section, dtype_name
from ._run import BUFFER, PARAMETER, Loss, Run, tensors_in, translated

__all__ = ["CATEGORIES", "Peak", "StepPeak", "measure_step", "step_peak"]

GRADIENT, STATE = "gradient", "optimizer state"

#: Categories of memory, roughly in order of precedence.
CATEGORIES = (
    "parameters",
    "optimizer state",
    "gradients",
    "weight copies",
    "recomputed",
    "activations",
    "inputs",
    "temporaries",
)


@dataclass
class Peak:
    """The moment at which the most memory is held.

    Attributes:
        nbytes: Bytes held while the op runs, including its results.
        categories: Bytes in each of :data:`CATEGORIES`.
        phase: ``"forward"`` (with the loss), ``"backward"`` or ``"optimizer"``.
        op: The op that runs.
        module: Module in which it runs; ``""`` during backward, except in recomputed modules.
        node: Name of the autograd node, during backward.
        index: Index of the op in the timeline.
    """

    nbytes: int
    categories: dict[str, int]
    phase: str
    op: str
    module: str
    node: str | None
    index: int

    def __str__(self) -> str:
        where = [f"in `{self.module}`"] if self.module else []
        where += [f"of {self.node}"] if self.node else []
        return " ".join([f"{size(self.nbytes)} at {self.op}", *where, f"({self.phase})"])


@dataclass
class StepPeak(Report):
    """Memory of one training step, in steady state.

    Attributes:
        source: ``"measured"`` or ``"estimated"``.
        device: Device on which it ran, or for which it was estimated.
        autocast: Autocast dtype of the forward pass, None without autocast.
        peak: Peak of the whole step.
        forward_backward: Peak before the optimizer's step. It includes the optimizer's state.
        saved_bytes: Bytes that the forward pass saved for backward, as in :func:`lomem.memory.profile`.
        weight_copy_bytes: The part of them that is copies of weights in another dtype.
        holders: These bytes by the module that saved them first, largest first. Numbers in names are replaced by ``*``,
            so that equal layers are one holder.
        timeline: Bytes held while each op ran.
        phases: Index in the timeline at which each phase begins.
    """

    source: str
    device: str
    autocast: torch.dtype | None
    peak: Peak
    forward_backward: Peak
    saved_bytes: int
    weight_copy_bytes: int
    holders: dict[str, int]
    timeline: list[int]
    phases: dict[str, int]

    def categories(self) -> dict[str, int]:
        """Bytes in each category at the peak of the step, for plots."""
        return self.peak.categories

    def sections(self) -> list[Section]:
        """The tables."""
        under = f", autocast to {dtype_name(self.autocast)}" if self.autocast is not None else ""
        peaks = (self.peak, self.forward_backward)
        rows = [
            (name, *(size(peak.categories[name]) for peak in peaks))
            for name in CATEGORIES
            if any(peak.categories[name] for peak in peaks)
        ]
        rows.append(("peak", *(size(peak.nbytes) for peak in peaks)))
        columns = ("", "step", "forward and backward")
        facts = [
            ("peak of the step", str(self.peak)),
            ("peak of forward and backward", str(self.forward_backward)),
            ("saved for backward", f"{size(self.saved_bytes)}, {size(self.weight_copy_bytes)} of them weight copies"),
        ]
        title = f"A training step, {self.source} for {self.device}{under}"
        holders = [(name, size(n)) for name, n in large_holders(self.holders).items()]
        return [
            Section(title, columns, rows),
            Section("Where", ("", ""), facts),
            Section("Saved for backward by (at least 1 %)", ("module", "size"), holders),
        ]


def step_peak(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizer | None = None,
    *,
    loss: Loss | None = None,
    steps: int = 2,
    autocast: torch.dtype | None = None,
) -> StepPeak:
    """Runs training steps, and reports the memory at the peak of the last one by category.

    A step sets gradients to None and runs forward, loss, backward and ``optimizer.step()``. Every storage that an op
    creates is followed until it is freed, and belongs to one category. Workspaces inside ops, the allocator's rounding,
    and earlier allocations that the step does not touch are not counted.

    The model and the optimizer are restored bit for bit: the optimizer's parameters and state and the model's buffers
    are copied to CPU memory in the meantime. Random state, gradients, attributes of modules, and inputs that were
    written to are restored too. Nothing is copied for fake models.

    Example:
        >>> print(lomem.memory.step_peak(model, batch, torch.optim.AdamW(model.parameters())))

    Args:
        model: The model to train.
        batch: Its arguments: a dict of keyword arguments, a tuple or list of positional ones, or a tensor.
        optimizer: Optimizer of the model's parameters; without one the step ends with the backward pass.
        loss: Loss function, as for :func:`lomem.memory.profile`.
        steps: Number of steps to run. The first one creates the optimizer's state.
        autocast: Autocast dtype of the forward pass; by default that of the surrounding autocast block. The backward
            pass and the optimizer run without autocast.
    """
    return measure_step("lomem.memory.step_peak", model, batch, optimizer, loss, steps, autocast)


def measure_step(
    function: str,
    model: nn.Module,
    batch: Any,
    optimizer: Optimizer | None,
    loss: Loss | None,
    steps: int,
    autocast: torch.dtype | None,
) -> StepPeak:
    """Implements :func:`step_peak`; ``function`` is the name in error messages."""
    run = Run(function, model, as_batch(function, "batch", batch), loss, autocast)
    if optimizer is not None:
        _check_optimizer(function, model, optimizer)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{function}: steps is {steps!r}, expected a positive integer")
    with contextlib.ExitStack() as stack:
        fake = run.fake_mode()
        stack.enter_context(fake or contextlib.nullcontext())
        stack.enter_context(preserved(model, optimizer, run.inputs))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_garbage_collection())
        counts = _StepCounts()
        if fake is not None and optimizer is not None:
            # Below the recorder, which sees the same ops as for a real model.
            stack.enter_context(counts)
        for _ in range(steps - 1):
            _Step(run, optimizer, counts).run(None)
        return _Step(run, optimizer, counts).measure()


def _check_optimizer(function: str, model: nn.Module, optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{function}: optimizer is of type {type(optimizer).__name__}, expected a torch.optim.Optimizer or None"
        )
    own = set(model.parameters())
    strange = sum(p not in own for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise ValueError(
            f"{function}: optimizer holds {strange} tensors that are not in model, expected only parameters of model"
        )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # Otherwise outputs in reference cycles would be freed at a moment that depends on the rest of the program.
    with Recorder():
        torch.empty(0)  # the first op under a dispatch mode imports modules, whose garbage holds the current frames
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Step:
    """One step, and the indices of the ops at which its phases begin."""

    def __init__(self, run: Run, optimizer: Optimizer | None, counts: _StepCounts) -> None:
        self._run, self._optimizer, self._counts = run, optimizer, counts
        self._leaves = [*run.model.parameters(), *(t for t in run.inputs if t.requires_grad)]
        self._phases = {"forward": 0}
        self._saved: dict[Storage, str] = {}  # with the module that saved it first

    def run(self, recorder: Recorder | None) -> None:
        loss = self._run.forward()
        if recorder is not None:
            self._phases["backward"] = len(recorder.ops)
            living = set(recorder.living())
            for saved in recorder.saved:
                if saved.storage in living:
                    self._saved.setdefault(saved.storage, module_name(saved.module))
        self._run.backward(loss)
        if recorder is not None:
            self._phases["optimizer"] = len(recorder.ops)
            recorder.label(self._gradients(), GRADIENT)
        if self._optimizer is not None:
            with translated(self._run.function), self._counts.answered():
                self._optimizer.step()
            if recorder is not None:
                recorder.label(self._state(), STATE)
        for leaf in self._leaves:
            leaf.grad = None

    def measure(self) -> StepPeak:
        with Recorder(self._run.model) as recorder:
            self._run.label(recorder)
            recorder.label(self._state(), STATE)
            self.run(recorder)
        classes = [self._category(recorder, storage) for storage in recorder.storages]
        held = list(_held(recorder, classes))
        totals = [sum(counts.values()) for counts in held]
        end = self._phases["optimizer"]
        saved = [s for s in self._saved if not was_there(s)]
        if self._optimizer is None:
            del self._phases["optimizer"]
        return StepPeak(
            source="measured" if self._run.fake_mode() is None else "estimated",
            device=str(self._run.device),
            autocast=self._run.autocast,
            peak=self._peak(recorder.ops, held, totals),
            forward_backward=self._peak(recorder.ops, held, totals[:end]),
            saved_bytes=sum(s.nbytes for s in saved),
            weight_copy_bytes=sum(s.nbytes for s in saved if is_weight_copy(s)),
            holders=holders_of((self._saved[s], s.nbytes) for s in saved),
            timeline=totals,
            phases=self._phases,
        )

    def _gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in self._leaves if leaf.grad is not None]

    def _state(self) -> list[Tensor]:
        return tensors_in(list(self._optimizer.state.values())) if self._optimizer is not None else []

    def _category(self, recorder: Recorder, storage: Storage) -> str:
        if storage.label in (PARAMETER, BUFFER):
            return "parameters"
        if storage.label == STATE:
            return "optimizer state"
        if storage.label == GRADIENT:
            return "gradients"
        if was_there(storage):
            return "inputs"
        if is_weight_copy(storage):
            return "weight copies"
        if storage in self._saved:
            return "activations"
        # Modules run during backward only if checkpointing recomputes them.
        if storage.born >= self._phases["backward"] and recorder.ops[storage.born].module is not None:
            return "recomputed"
        return "temporaries"

    def _phase(self, index: int) -> str:
        return max((name for name in self._phases if self._phases[name] <= index), key=self._phases.__getitem__)

    def _peak(self, ops: list[Op], held: list[Counter[str]], totals: list[int]) -> Peak:
        index = max(range(len(totals)), key=totals.__getitem__)
        op = ops[index]
        phase = self._phase(index)
        module = "" if op.module is None and phase != "forward" else module_name(op.module)
        categories = {name: held[index][name] for name in CATEGORIES}
        return Peak(totals[index], categories, phase, str(op.func), module, op.node, index)


class _StepCounts(TorchDispatchMode):
    """Mode that lets an optimizer read its step count from a fake tensor. Any number will do."""

    def __init__(self) -> None:
        super().__init__()
        self._on = False

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Answers inside this block only: for a model the answer would be wrong."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._on and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


def _held(recorder: Recorder, classes: Iterable[str]) -> Iterator[Counter[str]]:
    """The bytes of each category that are held while each op runs."""
    changes: list[Counter[str]] = [Counter() for _ in range(len(recorder.ops) + 1)]
    for storage, name in zip(recorder.storages, classes, strict=True):
        # A storage that existed before the step counts from the start, even if it is first seen later.
        changes[max(storage.born, 0)][name] += storage.nbytes
        if storage.died is not None:
            changes[storage.died][name] -= storage.nbytes
    held: Counter[str] = Counter()
    for change in itertools.islice(changes, len(recorder.ops)):
        held.update(change)
        yield held.copy()
