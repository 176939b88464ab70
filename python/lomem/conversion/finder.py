"""Queries on the recorded runs of a model."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from .adapters import SharedAdapter, is_adapter
from .exchange import unexchangeable
from .flow import Call, Flow
from .kinds import Function
from .ledger import Ledger
from .modules import SharedInput
from .recognize import recognize_linear

__all__ = ["CALLS", "Finder", "ways_of_its_own"]

_aten = torch.ops.aten

#: The ops whose calls are replaced.
CALLS = {
    _aten.gelu: Function.GELU,
    _aten.gelu_: Function.GELU,
    _aten.silu: Function.SILU,
    _aten.silu_: Function.SILU,
}


#: A mixin with its attributes.
Sharing: TypeAlias = tuple[type[SharedInput], dict[str, Any]]


class Finder:
    """Answers the planner's questions about the runs of a model: which modules ran, and what they saved.

    Args:
        model: The model.
        flows: Its runs. The first is in training mode with gradients.

    Attributes:
        modules: The model's modules, by name.
        flows: The runs.
        ledger: What was saved in the first run.
        reached: Names of modules that call GELU or SiLU with a gradient in the first run.
        callers: Names of modules that call them in any run, with or without a gradient.
        ran: Names of modules that ran, or that contain modules which ran.
    """

    def __init__(self, model: nn.Module, flows: list[Flow]) -> None:
        self.modules = dict(model.named_modules())
        self.flows = flows
        self.ledger = Ledger(flows[0])
        self.reached = {call.module or "" for call in flows[0].activations if call.replaced}
        ops = [op for flow in flows for op in flow.recorder.ops if op.module is not None]
        self.callers = {op.module or "" for op in ops if op.func._overloadpacket in CALLS}
        names = {call.name for flow in flows for call in flow.calls} | {op.module or "" for op in ops}
        self.ran = {".".join(path.split(".")[:n]) for path in names for n in range(path.count(".") + 2)}
        self._sharing: dict[str, Sharing | None] = {}

    def sharing(self, name: str) -> Sharing | None:
        """The change with which a linear layer rebuilds its input; None if the module is not one, or stays as it is."""
        if name not in self._sharing:
            self._sharing[name] = None if ways_of_its_own(self.modules[name]) else _sharing(self.modules[name])
        return self._sharing[name]

    def saved_by(self, call: Call) -> set[int]:
        """Positions in the ledger of what a module itself saved during a call, without the modules in it."""
        inside = f"{call.name}."
        saved = self.ledger.saved
        return {i for i in self.ledger.within([call.saved]) if not (saved[i].module or "").startswith(inside)}

    def unused(self, name: str) -> str | None:
        """Why a module saves nothing in the first run that a conversion could reduce, or None."""
        calls = self.flows[0].calls_of(name)
        if not calls:
            return "it did not run on the example inputs"
        if any(call.transformed for call in calls):
            return "it runs inside a function transform (torch.vmap and the like)"
        if not any(call.requires_grad for call in calls):
            return "it needs no gradient, so it saves nothing"
        return None


def _sharing(module: nn.Module) -> Sharing | None:
    if is_adapter(module):
        return SharedAdapter, SharedAdapter.attributes(module, None)
    form = recognize_linear(module)
    return None if form is None else (SharedInput, SharedInput.attributes(module, form))


def ways_of_its_own(module: nn.Module) -> str | None:
    """Why a module's class cannot be exchanged, or None."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if type(module).__reduce_ex__ is not object.__reduce_ex__ or type(module).__reduce__ is not object.__reduce__:
        return "its class defines how it is pickled"
    return unexchangeable(module, SharedInput)
