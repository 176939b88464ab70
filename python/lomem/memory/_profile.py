"""Profiles what one forward pass saves for backward, and which modules save it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._trace.batch import Batch
from .._trace.recorder import Recorder, Storage
from .._trace.state import preserved
from .._units import size
from ._norms import NormCalls, NormOutput, module_name, origin_of
from ._report import Report, Section, dtype_name, top
from ._run import BUFFER, INPUT, PARAMETER, Loss, Run

__all__ = ["ModuleBytes", "Profile", "Shared", "Unaccounted", "profile"]


@dataclass
class ModuleBytes:
    """Bytes that a module saves: storages that it was the first to save, excluding weight copies.

    Attributes:
        kind: Class of the module; empty for the loss.
        own: Bytes that it saved itself.
        subtree: Bytes including those of its submodules.
    """

    kind: str
    own: int = 0
    subtree: int = 0


@dataclass
class Shared:
    """A storage that several modules saved. It counts once.

    Attributes:
        nbytes: Size of the storage.
        dtype: Dtype of the tensor by which it was first saved.
        shape: Shape of that tensor.
        modules: Modules that saved it, in order.
    """

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    modules: list[str]


@dataclass
class Unaccounted:
    """A storage that is alive after the forward pass although autograd did not save it.

    Attributes:
        nbytes: Size of the storage.
        dtype: Dtype of the tensor by which it was first seen.
        shape: Shape of that tensor.
        op: Op that made it.
        module: Module in which that op ran.
    """

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    op: str
    module: str


@dataclass
class Profile(Report):
    """What one forward pass saves for backward. Each storage counts once.

    Attributes:
        saved_bytes: Bytes saved for backward: ``activation_bytes + weight_copy_bytes``. Parameters, buffers and inputs
            do not count, since they are in memory anyway.
        activation_bytes: The part of ``saved_bytes`` that is not copies of weights.
        weight_copy_bytes: Parameters and buffers copied to another dtype, as autocast does.
        input_bytes: Saved inputs and other tensors from before the forward pass, such as targets of a loss function.
        unaccounted_bytes: Bytes alive after the forward pass that autograd did not save.
        modules: Bytes by qualified name: ``"(model)"`` is the model itself, ``"(loss)"`` what ran after it.
        classes: Bytes of activations by class of module.
        dtypes: Bytes of activations by dtype.
        shared: Storages that several modules saved.
        norms: Outputs of norms.
        unaccounted: The storages of ``unaccounted_bytes``.
        device: Device on which it ran.
        autocast: Autocast dtype, None without autocast.
    """

    saved_bytes: int
    activation_bytes: int
    weight_copy_bytes: int
    input_bytes: int
    unaccounted_bytes: int
    modules: dict[str, ModuleBytes]
    classes: dict[str, int]
    dtypes: dict[torch.dtype, int]
    shared: list[Shared]
    norms: list[NormOutput]
    unaccounted: list[Unaccounted]
    device: str
    autocast: torch.dtype | None

    def categories(self) -> dict[str, int]:
        """Bytes in each category, for plots."""
        return {
            "activations": self.activation_bytes,
            "weight copies": self.weight_copy_bytes,
            "unaccounted": self.unaccounted_bytes,
        }

    def sections(self) -> list[Section]:
        """The tables."""
        under = f", autocast to {dtype_name(self.autocast)}" if self.autocast is not None else ""
        totals = [
            ("activations", size(self.activation_bytes)),
            ("weight copies", size(self.weight_copy_bytes)),
            ("saved", size(self.saved_bytes)),
            ("inputs (already in memory)", size(self.input_bytes)),
            ("alive but not saved (unaccounted)", size(self.unaccounted_bytes)),
        ]
        modules = [(m.own, (name, m.kind, size(m.own), size(m.subtree))) for name, m in self.modules.items() if m.own]
        sections = [
            Section(f"Saved for backward on {self.device}{under}", ("", "size"), totals),
            Section("By module", ("module", "class", "own", "with submodules"), top(modules)),
            Section("By class", ("class", "size"), top((n, (name, size(n))) for name, n in self.classes.items())),
            Section("By dtype", ("dtype", "size"), top((n, (dtype_name(d), size(n))) for d, n in self.dtypes.items())),
        ]
        if self.shared:
            rows = top((s.nbytes, (", ".join(s.modules), *_what(s))) for s in self.shared)
            sections.append(Section("Shared: counted once", ("modules", "tensor", "size"), rows))
        if self.norms:
            sections.append(
                Section("Norms", ("norm", "class", "output", "output saved by, or why not"), _norm_rows(self.norms))
            )
        if self.unaccounted:
            rows = top((u.nbytes, (f"{u.op} in {u.module}", *_what(u))) for u in self.unaccounted)
            sections.append(Section("Alive but not saved", ("made by", "tensor", "size"), rows))
        return sections


def _what(storage: Shared | Unaccounted) -> tuple[str, str]:
    return f"{dtype_name(storage.dtype)} {list(storage.shape)}", size(storage.nbytes)


def _norm_rows(norms: Iterable[NormOutput]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for norm in norms:
        keepers = [*(["itself"] if norm.kept_by_norm else []), *norm.shared_with]
        text = "; ".join([*([", ".join(keepers)] if keepers else []), *norm.reasons])
        rows.append((norm.module, norm.kind, size(norm.nbytes), text))
    return rows


def profile(model: nn.Module, *args: Any, loss: Loss | None = None, **kwargs: Any) -> Profile:
    """Runs one forward pass and its loss, and reports what they save for backward.

    The model runs in its current mode, under the surrounding autocast. A storage counts once, for the module that saved
    it first. The model is left unchanged, including buffers, attributes of its modules, gradients and random state.

    Saved tensors are found by hooks. What stays alive without being saved (a tensor on the ``ctx`` of a custom
    function, or on a module) is ``unaccounted``. A checkpointed region saves only its inputs.

    Example:
        >>> print(lomem.memory.profile(model, x))

    Args:
        model: The model to run.
        *args: Its positional arguments.
        loss: Function of the output that returns a tensor of one element. By default the output's ``loss`` if it has
            one, otherwise the sum of its floating-point tensors that require gradients.
        **kwargs: Its keyword arguments.
    """
    run = Run("lomem.memory.profile", model, Batch(args, kwargs), loss)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.fake_mode() or contextlib.nullcontext())
        stack.enter_context(preserved(model, inputs=run.inputs))
        stack.enter_context(torch.enable_grad())
        recorder = stack.enter_context(Recorder(model))
        norms = stack.enter_context(NormCalls(model, recorder))
        run.label(recorder)
        value = run.forward()
        gc.collect()  # an output that is only in a reference cycle does not count
        recorder.label([value], "loss")
        living = set(recorder.living())
    return _profile(run, recorder, living, norms.outputs())


def _profile(run: Run, recorder: Recorder, living: set[Storage], norms: list[NormOutput]) -> Profile:
    by_storage: dict[Storage, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {}
    for saved in recorder.saved:
        if saved.storage in living:
            by_storage.setdefault(saved.storage, []).append((module_name(saved.module), saved.dtype, saved.shape))
    kinds = {module_name(name): type(module).__name__ for name, module in run.model.named_modules()}
    modules = {name: ModuleBytes(kind) for name, kind in kinds.items()} | {"(loss)": ModuleBytes("")}
    classes: dict[str, int] = {}
    dtypes: dict[torch.dtype, int] = {}
    shared = []
    activations = copies = inputs = 0
    for storage, savers in by_storage.items():
        if was_there(storage):
            inputs += storage.nbytes if storage.label not in (PARAMETER, BUFFER) else 0
            continue
        if is_weight_copy(storage):
            copies += storage.nbytes
            continue
        name, dtype, shape = savers[0]
        activations += storage.nbytes
        modules[name].own += storage.nbytes
        for parent in _with_parents(name):
            modules[parent].subtree += storage.nbytes
        kind = modules[name].kind or name
        classes[kind] = classes.get(kind, 0) + storage.nbytes
        dtypes[dtype] = dtypes.get(dtype, 0) + storage.nbytes
        names = list(dict.fromkeys(name for name, *_ in savers))
        if len(names) > 1:
            shared.append(Shared(storage.nbytes, dtype, shape, names))
    unaccounted = [
        Unaccounted(
            s.nbytes, s.dtype, s.shape, str(recorder.ops[s.born].func), module_name(recorder.ops[s.born].module)
        )
        for s in recorder.storages
        if s in living and s.born >= 0 and s.label is None and s not in by_storage
    ]
    return Profile(
        saved_bytes=activations + copies,
        activation_bytes=activations,
        weight_copy_bytes=copies,
        input_bytes=inputs,
        unaccounted_bytes=sum(u.nbytes for u in unaccounted),
        modules=modules,
        classes=classes,
        dtypes=dtypes,
        shared=shared,
        norms=norms,
        unaccounted=unaccounted,
        device=str(run.device),
        autocast=run.autocast,
    )


def was_there(storage: Storage) -> bool:
    """Whether a storage existed before the forward pass, such as a constant or the targets of a loss function."""
    return storage.label in (PARAMETER, BUFFER, INPUT) or storage.born < 0


def is_weight_copy(storage: Storage) -> bool:
    """Whether a storage is a copy of a parameter or buffer in another dtype."""
    return storage.copy_of is not None and origin_of(storage).label in (PARAMETER, BUFFER)


def _with_parents(name: str) -> list[str]:
    if name in ("(model)", "(loss)"):
        return [name]
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)] + ["(model)"]
