"""Plans the conversion of activations and of calls of activation functions."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .finder import CALLS, Finder, ways_of_its_own
from .forms import ActivationForm
from .kinds import Action, Criterion, Function, Kind
from .ledger import Candidate
from .modules import ConvertedActivation, StepCalls

__all__ = ["plan_activation", "plan_calls"]


def plan_activation(
    finder: Finder | None, name: str, module: nn.Module, form: ActivationForm, bits: int, criterion: Criterion
) -> Candidate:
    """The candidate for an activation. Without a run, it is converted."""
    reason = f"its backward pass saves {bits} bit{'s' * (bits > 1)} per element"
    c = Candidate(name, Kind.ACTIVATION, form, Action.of_bits(bits), reason)
    c.changes[name] = (ConvertedActivation, ConvertedActivation.attributes(module, form, bits, criterion))
    if finder is None:
        return c
    unused = finder.unused(name)
    calls = [call for call in finder.flows[0].calls_of(name) if call.requires_grad and call.single]
    if unused is not None or not calls:
        c.leave(unused or "it is called with more than a single tensor")
        return c
    c.own = finder.ledger.within(call.saved for call in calls)
    c.added = sum(_packed_bytes(call.numel, bits) for call in calls)
    return c


def _packed_bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def plan_calls(finder: Finder, skip: Callable[[str], bool], bits: int, criterion: Criterion) -> list[Candidate]:
    """The candidates for functional calls outside activation modules."""
    flow = finder.flows[0]
    functions: dict[str, dict[Function, None]] = {}
    for op in flow.recorder.ops:
        function = CALLS.get(op.func._overloadpacket)
        if function is not None and op.module is not None and not skip(op.module):
            functions.setdefault(op.module, {})[function] = None
    return [_plan_calls(finder, name, list(called), bits, criterion) for name, called in functions.items()]


def _plan_calls(finder: Finder, name: str, functions: list[Function], bits: int, criterion: Criterion) -> Candidate:
    verb = "are" if len(functions) > 1 else "is"
    form = " and ".join(function.call for function in functions)
    c = Candidate(name, Kind.CALL, form, Action.of_bits(bits), f"{form} {verb} replaced while its forward runs")
    c.changes[name] = (StepCalls, {"lomem_bits": bits, "lomem_criterion": criterion})
    calls = [call for call in finder.flows[0].activations if call.module == name and call.replaced]
    c.own = finder.ledger.within(call.saved for call in calls)
    c.added = sum(_packed_bytes(call.numel, bits) for call in calls)
    problem = ways_of_its_own(finder.modules[name])
    if problem is not None:
        c.leave(problem)
    elif not calls:
        c.leave(_why_no_calls(finder, name))
    return c


def _why_no_calls(finder: Finder, name: str) -> str:
    flow = finder.flows[0]
    seen = [call for call in flow.activations if call.module == name]
    ops = {i for call in seen for i in call.ops}
    mine = {i for i, op in enumerate(flow.recorder.ops) if op.module == name and op.func._overloadpacket in CALLS}
    if mine - ops or any(call.saved for call in seen):
        return "its calls cannot be intercepted"
    return "it needs no gradient, so it saves nothing"
