"""Finds out whether the outputs of norms are also saved by other modules, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .._trace.handover import offered
from .._trace.hooks import hook_after
from .._trace.keeps import COPIES, DROPOUTS, saves_operands
from .._trace.recorder import Op, Recorder, Storage
from ..nn.norms import MemorySharingNorm
from ._report import dtype_name
from ._run import tensors_in

_NORMS = (MemorySharingNorm, nn.LayerNorm, nn.RMSNorm)
#: Ops that draw the mask of a hand-written dropout.
_RANDOM = frozenset({torch.ops.aten.bernoulli, torch.ops.aten.bernoulli_})


@dataclass
class NormOutput:
    """One output of a norm.

    Attributes:
        module: Qualified name of the norm.
        kind: Class of the norm.
        nbytes: Bytes of the output's storage.
        dtype: Dtype of the output.
        kept_by_norm: Whether the norm itself saved the output for backward, as memory-sharing norms do.
        shared_with: Other modules that saved the same storage.
        reasons: Why other consumers of the output do not save it.
    """

    module: str
    kind: str
    nbytes: int
    dtype: torch.dtype
    kept_by_norm: bool
    shared_with: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def shared(self) -> bool:
        """Whether another module saves the output anyway, so that it costs the norm nothing."""
        return bool(self.shared_with)


def is_norm(module: nn.Module) -> bool:
    """Whether a module's outputs are followed: torch's norms, lomem's norms, and converted ones."""
    return isinstance(module, _NORMS) or getattr(module, "lomem_norm", None) is not None


class NormCalls:
    """Context manager that records the outputs of norms, inside a recorder's block."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model, self._recorder = model, recorder
        self._calls: list[tuple[str, nn.Module, Storage, int]] = []

    def __enter__(self) -> NormCalls:
        self._handles = []
        for name, module in self._model.named_modules():
            if is_norm(module):

                def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    # A converted norm may save, and share, something other than its result.
                    for tensor in offered(output)[:1] or tensors_in(output):
                        for storage in self._recorder.records(tensor):
                            self._calls.append((name, module, storage, len(self._recorder.ops)))

                self._handles.append(hook_after(module, note))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def outputs(self) -> list[NormOutput]:
        """The recorded outputs. Call after the forward pass."""
        explain = _Explain(self._model, self._recorder)
        result = []
        for name, module, storage, op in self._calls:
            savers = explain.savers(storage)
            result.append(
                NormOutput(
                    name,
                    type(module).__name__,
                    storage.nbytes,
                    storage.dtype,
                    any(_inside(saver, name) for saver in savers),
                    [saver for saver in savers if not _inside(saver, name)],
                    list(dict.fromkeys(explain.reasons(storage, op, name))),
                )
            )
        return result


def _inside(module: str | None, parent: str) -> bool:
    return module is not None and (module == parent or module.startswith(parent + "."))


def _name(op: Op) -> str:
    return op.func._schema.name.split("::")[1]


class _Explain:
    """Follows the ops that take a storage."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._modules = dict(model.named_modules())
        self._frozen: dict[Storage, str] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and parameter.dim() > 1:
                self._frozen |= dict.fromkeys(recorder.records(parameter), name)
        self._savers: dict[Storage, dict[str, None]] = {}
        for saved in recorder.saved:
            self._savers.setdefault(saved.storage, {})[module_name(saved.module)] = None
        self._consumers: dict[Storage, list[tuple[int, Op]]] = {}
        self._random: set[Storage] = set()
        for index, op in enumerate(recorder.ops):
            for storage in op.inputs:
                self._consumers.setdefault(storage, []).append((index, op))
            if op.func._overloadpacket in _RANDOM:
                self._random.update(op.outputs)

    def savers(self, storage: Storage) -> list[str]:
        return list(self._savers.get(storage, ()))

    def reasons(self, storage: Storage, start: int, norm: str) -> Iterator[str]:
        """Why ops outside the norm, from index ``start`` on, that take a storage do not save it."""
        savers = self.savers(storage)
        explained = any(not _inside(saver, norm) for saver in savers)
        others: dict[str, None] = {}
        for index, op in self._consumers.get(storage, ()):
            if index < start or _inside(op.module, norm):
                continue
            where = module_name(op.module)
            module = self._modules.get(op.module) if op.module is not None else None
            why: list[str] = []
            if isinstance(module, _DropoutNd):
                why = [f"the dropout `{where}` is in between"]
            elif op.func._overloadpacket in DROPOUTS or any(s in self._random for s in op.inputs):
                why = [f"a dropout in `{where}` is in between"]
            elif op.func._overloadpacket in COPIES:
                why = list(self._copy(storage, op.outputs[0], index, norm))
            elif where in savers:
                continue
            elif saves_operands(op.func):
                why = [self._unsaved_product(op, where)]
            else:
                others[f"{_name(op)} in `{where}`"] = None
            explained = explained or bool(why)
            yield from why
        if not explained:
            listed = ", ".join(list(others)[:3])
            yield "no matrix product takes it" + (f": it goes to {listed}" if others else "")

    def _copy(self, storage: Storage, copy: Storage, index: int, norm: str) -> Iterator[str]:
        kind = f"a {dtype_name(copy.dtype)} copy" if copy.dtype != storage.dtype else "a copy"
        savers = self.savers(copy)
        for saver in savers:
            yield f"`{saver}` saves {kind} of it"
        if not savers:
            yield from self.reasons(copy, index + 1, norm)

    def _unsaved_product(self, op: Op, where: str) -> str:
        for storage in op.inputs:
            origin = origin_of(storage)
            if origin in self._frozen:
                owner = self._frozen[origin].rpartition(".")[0]
                return f"the weight of `{owner}` is frozen: it saves no input"
        return f"`{where}` saves no input: its weight needs no gradient there, or it is checkpointed"


def origin_of(storage: Storage) -> Storage:
    """The start of the chain of dtype conversions that made a storage."""
    while storage.copy_of is not None:
        storage = storage.copy_of
    return storage


def module_name(module: str | None) -> str:
    """The name under which a module is reported. Ops outside the model belong to the loss."""
    return "(loss)" if module is None else module or "(model)"
