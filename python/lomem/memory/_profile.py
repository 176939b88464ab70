"""What one forward pass keeps for the backward pass, and who keeps it."""

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
    """What a module keeps: storages that it was the first to save, weight copies left out.

    Attributes:
        kind: Its class; empty for the loss.
        own: Bytes that it saved itself.
        subtree: With those of the modules in it.
    """

    kind: str
    own: int = 0
    subtree: int = 0


@dataclass
class Shared:
    """A storage that several modules saved, which counts once.

    Attributes:
        nbytes: Its size.
        dtype: Of the tensor by which it was first saved.
        shape: Of that tensor.
        modules: Those that saved it, in their order.
    """

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    modules: list[str]


@dataclass
class Unaccounted:
    """A storage that lives after the forward pass without having been saved.

    Attributes:
        nbytes: Its size.
        dtype: Of the tensor by which it was first seen.
        shape: Of that tensor.
        op: What made it.
        module: Where.
    """

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    op: str
    module: str


@dataclass
class Profile(Report):
    """What one forward pass keeps, each storage counted once.

    Attributes:
        saved_bytes: Saved for the backward pass: ``activation_bytes`` and ``weight_copy_bytes``. Parameters, buffers
            and inputs are there anyway and not in it.
        activation_bytes: Of them, all that is no copy of a weight.
        weight_copy_bytes: Of them, parameters and buffers in another dtype, as autocast makes them.
        input_bytes: Saved inputs, and other tensors that were there before, as the targets in a loss function.
        unaccounted_bytes: What lives after the forward pass and was not saved.
        modules: By qualified name: ``"(model)"`` is the model itself, ``"(loss)"`` what ran after it.
        classes: Bytes of activations by class of module.
        dtypes: Bytes of activations by dtype.
        shared: Storages that several modules saved.
        norms: The outputs of norms.
        unaccounted: The storages of ``unaccounted_bytes``.
        device: Where it ran.
        autocast: The dtype, None without.
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
        """What a picture stacks, in bytes."""
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
            ("inputs, there anyway", size(self.input_bytes)),
            ("alive and not saved (unaccounted)", size(self.unaccounted_bytes)),
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
                Section("Norms", ("norm", "class", "output", "output kept by, and if not why"), _norm_rows(self.norms))
            )
        if self.unaccounted:
            rows = top((u.nbytes, (f"{u.op} in {u.module}", *_what(u))) for u in self.unaccounted)
            sections.append(Section("Alive and not saved", ("made by", "tensor", "size"), rows))
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
    """Runs one forward pass and its loss, and says what they keep for the backward pass.

    It runs as it is called: in the model's mode, under the autocast around. A storage counts once, for the module that
    saved it first. The model is left as it was: buffers, attributes of its modules, gradients and random numbers too.

    Saved tensors are seen by hooks; what lives on without having been saved (a tensor on the ``ctx`` of a custom
    function, or on a module) is ``unaccounted``. Inside a checkpointed region nothing is kept but its inputs.

    Example:
        >>> print(lomem.memory.profile(model, x))

    Args:
        model: What runs.
        *args: Its arguments.
        loss: Makes a tensor of one element of the output. By default the output's ``loss`` if it has one, else the sum
            of its floating-point tensors that need gradients.
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
        gc.collect()  # an output in a cycle of references is not kept by anybody
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
    """Whether a storage is no result of the forward pass: also a constant, or targets in a loss function."""
    return storage.label in (PARAMETER, BUFFER, INPUT) or storage.born < 0


def is_weight_copy(storage: Storage) -> bool:
    """Whether conversions of dtype made a storage of a parameter or buffer."""
    return storage.copy_of is not None and origin_of(storage).label in (PARAMETER, BUFFER)


def _with_parents(name: str) -> list[str]:
    if name in ("(model)", "(loss)"):
        return [name]
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)] + ["(model)"]
