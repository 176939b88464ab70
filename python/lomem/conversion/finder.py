"""Queries on the recorded runs of a model."""

from __future__ import annotations

import torch
from torch import nn

from .exchange import unexchangeable
from .flow import Flow
from .forms import LinearForm
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
        self._linear: dict[str, LinearForm | None] = {}

    def linear(self, name: str) -> LinearForm | None:
        """The form of a linear layer; None if the module is not one, or cannot be converted."""
        if name not in self._linear:
            self._linear[name] = None if ways_of_its_own(self.modules[name]) else recognize_linear(self.modules[name])
        return self._linear[name]

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


def ways_of_its_own(module: nn.Module) -> str | None:
    """Why a module's class cannot be exchanged, or None."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if type(module).__reduce_ex__ is not object.__reduce_ex__ or type(module).__reduce__ is not object.__reduce__:
        return "its class defines how it is pickled"
    return unexchangeable(module, SharedInput)
