"""Which modules are converted, how, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._record import Op, Storage
from ._exchange import Converted, unexchangeable
from ._flow import PRODUCTS, Call, Flow
from ._modules import MSNorm, NormPlan, SharedInput, StepActivation, StepCalls
from ._recognize import ActivationForm, LinearForm, NormForm, recognize_linear

__all__ = ["CONDITIONING", "Candidate", "Finder", "plan_norm"]

#: A channel's normalized input is recovered from the output where abs(beta) is at most this many times abs(gamma): of
#: the output's digits at most log2(1 + 8) = 3.2 bits are beta's.
CONDITIONING = 8.0

_aten = torch.ops.aten
_UNSHARED = "no consumer keeps its output"
CALLS = {_aten.gelu: "F.gelu", _aten.silu: "F.silu"}


@dataclass(eq=False)
class Candidate:
    """Something that may be converted.

    Attributes:
        name: Of the module.
        kind: "norm", "activation" or "call".
        form: What it computes.
        action: What would become of it; "left" where that is decided already.
        reason: For that.
        changes: Mixins and their attributes, by the module's name.
        keeps: Storages that the original keeps, and another may keep too.
        replaces: Storages that nobody keeps once it is converted.
        added: Bytes that it keeps when it is converted.
        gain: Bytes fewer.
        least: That it must be more than.
    """

    name: str
    kind: str
    form: NormForm | ActivationForm | str
    action: str = "left"
    reason: str = ""
    changes: dict[str, tuple[type[Converted], dict[str, Any]]] = field(default_factory=dict)
    keeps: set[Storage] = field(default_factory=set)
    replaces: set[Storage] = field(default_factory=set)
    added: int = 0
    gain: int = 0
    least: int = 0

    def leave(self, reason: str) -> None:
        """Decides against it."""
        self.action, self.reason, self.changes, self.gain = "left", reason, {}, 0


def _is_weight(storage: Storage) -> bool:
    while storage.copy_of is not None:
        storage = storage.copy_of
    return storage.label == "parameter"


class Ledger:
    """Who keeps what, in one run.

    Args:
        flow: The run.
        activations: Names of modules whose calls of functions are their own affair.
    """

    def __init__(self, flow: Flow, activations: Collection[str] = ()) -> None:
        self.owners: dict[Storage, set[tuple[str, str]]] = {}
        ops = [(i, op) for i, op in enumerate(flow.recorder.ops) if op.module not in activations]
        calls = {(i, op.module): "call" for i, op in ops if op.func._overloadpacket in CALLS}
        for saved in flow.recorder.saved:
            if saved.storage.label is None and not _is_weight(saved.storage):
                # gelu and silu save their input: before the op.
                owner = (saved.module or "", calls.get((saved.op, saved.module), "module"))
                self.owners.setdefault(saved.storage, set()).add(owner)

    @property
    def nbytes(self) -> int:
        """Of all that is kept, parameters, inputs and copies of weights left out."""
        return sum(storage.nbytes for storage in self.owners)

    def kept_by(self, name: str, kind: str = "module") -> set[Storage]:
        """The storages that a module keeps, or the functional calls in it."""
        return {storage for storage, owners in self.owners.items() if (name, kind) in owners}

    def kept_by_others(self, storage: Storage, name: str) -> bool:
        """Whether anyone but a module keeps a storage."""
        return any(owner != name for owner, _ in self.owners.get(storage, ()))


def settle(candidates: list[Candidate], ledger: Ledger) -> None:
    """Leaves the candidates whose conversion would keep no less, the others being converted.

    Storages may be shared: of two norms of one input, either alone gains nothing by being converted.
    """

    def owner(c: Candidate) -> tuple[str, str]:
        return c.name, "call" if c.kind == "call" else "module"

    while True:
        chosen = [c for c in candidates if c.action != "left"]
        owners = {owner(c) for c in chosen}
        for c in chosen:
            gone = {s for s in c.keeps if ledger.owners[s] <= owners} | {s for s in c.replaces if s in ledger.owners}
            c.gain = sum(s.nbytes for s in gone) - c.added
        worst = min(chosen, key=lambda c: c.gain - c.least, default=None)
        if worst is None or worst.gain > worst.least:
            break
        worst.leave(worst.reason if worst.reason.startswith(_UNSHARED) else _no_gain(worst, ledger))
    for c in chosen:
        if c.reason.startswith(_UNSHARED):
            c.reason = f"it keeps less than before, though {c.reason}"


def _no_gain(c: Candidate, ledger: Ledger) -> str:
    if not c.keeps:
        return "it keeps nothing"
    others = {name for s in c.keeps for name, _ in ledger.owners[s] if name != c.name}
    return f"its input is kept by {_some(others)} too" if others else "it would keep hardly less"


def _some(names: Iterable[str]) -> str:
    listed = sorted(name or "the model" for name in names)
    return ", ".join(listed[:3]) + (" and others" if len(listed) > 3 else "")


def _real(tensor: Tensor) -> Tensor | None:
    # Of fake and meta tensors nothing is known.
    return tensor.detach() if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" else None


def badly_conditioned(module: nn.Module, form: NormForm, dtype: torch.dtype) -> str | None:
    """Why the normalized input cannot be recovered from the output, or None where it can.

    Args:
        module: The norm.
        form: What it computes.
        dtype: Of the output that is kept.
    """
    if form.gamma is None:
        return None
    gamma = _real(getattr(module, form.gamma))
    if gamma is None:
        return None
    gamma = (gamma.double() + form.one_plus).abs()
    # Six bits above the smallest normal number: outputs of normalized inputs of 1/64 and more have all their digits.
    small = int((gamma < 64 * torch.finfo(dtype).tiny).sum())
    if small:
        return f"{small} of {gamma.numel()} weights are too small to divide by"
    beta = _real(getattr(module, form.beta)) if form.beta is not None else None
    if beta is not None:
        large = int((beta.double().abs() > CONDITIONING * gamma).sum())
        if large:
            return f"in {large} of {gamma.numel()} channels the bias is over {CONDITIONING:g} times the weight"
    return None


class Finder:
    """Who takes the results of norms: what :func:`plan_norm` asks of the runs of a model.

    Args:
        model: The model.
        flows: Its runs, the first of them in training mode with gradients.
        activations: Names of the modules that are activations.
    """

    def __init__(self, model: nn.Module, flows: list[Flow], activations: Collection[str]) -> None:
        self.modules = dict(model.named_modules())
        self.flows = flows
        self.ledger = Ledger(flows[0], activations)
        self._linear: dict[str, LinearForm | None] = {}

    def linear(self, name: str) -> LinearForm | None:
        """The form of a linear layer, None where it is none or has another way of running."""
        if name not in self._linear:
            self._linear[name] = None if ways_of_its_own(self.modules[name]) else recognize_linear(self.modules[name])
        return self._linear[name]


def ways_of_its_own(module: nn.Module) -> str | None:
    """Why a module's class cannot be exchanged, or None."""
    if "forward" in vars(module):
        return "its forward is replaced on the object"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if type(module).__reduce_ex__ is not object.__reduce_ex__ or type(module).__reduce__ is not object.__reduce__:
        return "it is pickled in a way of its own"
    return unexchangeable(module, SharedInput)


def _takes_low_precision(op: Op, alias: Storage) -> bool:
    positions = PRODUCTS.get(op.func._overloadpacket)
    return positions is not None and op.inputs.index(alias) in positions


def _refusal(finder: Finder, name: str) -> str | None:
    """Why a norm is left whatever would be gained, or None."""
    first = finder.flows[0].calls_of(name)
    if not first:
        return "it did not run on the example inputs"
    if not any(call.requires_grad for call in first):
        return "it needs no gradient: it keeps nothing"
    for flow in finder.flows:
        for call in flow.calls_of(name):
            if not call.single or call.result is None:
                return "it is called with more than a tensor"
            changed = next((op for op in flow.recorder.ops[call.end :] if call.result in op.written), None)
            if changed is not None:
                return f"its output is changed in place by {changed.func._overloadpacket.__name__} in {_at(changed)}"
    return None


class _Output:
    """Where a norm's output goes, and as what.

    Attributes:
        calls: Of the norm, in the first run.
        uses: Ops of the first run that take the output, or a copy of it.
        dtype: Of the output.
        kept_dtype: In which it is kept once it is converted: autocast's, where that is narrower.
        low_precision: Whether all who take it cast it to autocast's dtype, or would.
        casts: Copies in autocast's dtype that somebody keeps.
    """

    def __init__(self, finder: Finder, name: str) -> None:
        first, autocast = finder.flows[0], _autocast_dtype()
        self.calls = first.calls_of(name)
        self.dtype = self.calls[0].dtype or torch.float32
        narrower = autocast is not None and autocast.itemsize < self.dtype.itemsize and self.dtype != torch.float64
        self.kept_dtype = autocast if autocast is not None and narrower else self.dtype
        self.low_precision = True
        self.uses: list[tuple[Op, Storage]] = []
        for flow in finder.flows:
            for call in flow.calls_of(name):
                uses = list(flow.uses(_result(call), call.end))
                self.uses += uses if flow is first else []
                # A product that takes it uncast, though autocast is on, has it turned off around it.
                low = all(
                    _takes_low_precision(op, alias) and (not narrower or alias.dtype == autocast) for op, alias in uses
                )
                self.low_precision &= low and bool(uses) and call.result not in flow.escaped
        casts = {s for call in self.calls for s in first.casts(_result(call), call.end) if s.dtype == autocast}
        self.casts = {s for s in casts if s in finder.ledger.owners}
        self.results = {_result(call) for call in self.calls}

    @property
    def numel(self) -> int:
        """Of all calls."""
        return sum(call.numel for call in self.calls)


def plan_norm(finder: Finder, name: str, form: NormForm) -> Candidate:
    """What would become of a norm."""
    c = Candidate(name, "norm", form)
    refusal = _refusal(finder, name)
    if refusal is not None:
        c.leave(refusal)
        return c
    output = _Output(finder, name)
    narrower = output.kept_dtype != output.dtype
    linears = _linears_behind(finder, name)
    problem = badly_conditioned(finder.modules[name], form, output.kept_dtype)
    if problem is not None and (len(form.shape) != 1 or not (linears or narrower)):
        c.leave(f"{problem}, and no linear layer takes its output as it is")
        return c
    shared = problem is not None or (narrower and not output.low_precision)
    if problem is not None:
        c.action, c.reason = "normalized", f"{problem}: linear layers keep the normalized input"
    elif shared:
        c.action = "two outputs"
        c.reason = f"linear layers keep a {str(output.kept_dtype)[6:]} copy, others take the full precision"
    else:
        c.action, c.reason = "inverted", "its consumers keep its output"
    kept = output.results | output.casts
    if not any(finder.ledger.kept_by_others(storage, name) for storage in kept):
        c.reason = f"{_UNSHARED}{_who(finder, output.uses)}"
    takers = _takers(finder, name, linears) if shared else 0
    plan = NormPlan(form, problem is None, output.low_precision, shared, takers)
    c.changes[name] = (MSNorm, MSNorm.attributes(finder.modules[name], plan))
    for linear in linears if shared else ():
        linear_form = finder.linear(linear)
        assert linear_form is not None
        c.changes[linear] = (SharedInput, SharedInput.attributes(finder.modules[linear], linear_form))
    c.keeps = finder.ledger.kept_by(name)
    # One float a row less, the mean, is no reason.
    c.least = sum(s.nbytes for s in c.keeps) // 4
    rstd = 8 if output.dtype == torch.float64 else 4
    c.added = output.numel * output.kept_dtype.itemsize + output.numel // torch.Size(form.shape).numel() * rstd
    # Whoever is no linear layer, or called with something made of the output, keeps what it kept.
    behind = {s for linear in linears for s in finder.ledger.kept_by(linear)}
    c.replaces = kept & behind if shared else kept if output.low_precision else output.results
    return c


def _autocast_dtype() -> torch.dtype | None:
    device = next((d for d in ("cuda", "cpu") if torch.is_autocast_enabled(d)), None)
    return None if device is None else torch.get_autocast_dtype(device)


def _result(call: Call) -> Storage:
    assert call.result is not None
    return call.result


def _at(op: Op) -> str:
    return op.module or "the model"


def _who(finder: Finder, uses: list[tuple[Op, Storage]]) -> str:
    """Who takes it instead, in a few words."""
    for op, _ in uses:
        module = finder.modules.get(op.module or "")
        weight = getattr(module, "weight", None)
        if op.func._overloadpacket in PRODUCTS and isinstance(weight, Tensor) and not weight.requires_grad:
            return f": the weight of {type(module).__name__} is frozen"
        if op.func._overloadpacket not in PRODUCTS:
            return f": {op.func._overloadpacket.__name__} takes it"
    return ""


def _linears_behind(finder: Finder, name: str) -> list[str]:
    """Linear layers that are called with the very tensor that a norm returned, and keep it, in the first run."""
    flow = finder.flows[0]
    ids = {call.result_id for call in flow.calls_of(name)}
    names = dict.fromkeys(call.name for call in flow.calls if call.input_id in ids and call.name != name)
    return [n for n in names if finder.linear(n) is not None and finder.ledger.kept_by(n)]


def _takers(finder: Finder, name: str, linears: list[str]) -> int:
    """How many calls of linear layers one result of a norm goes to, at most."""
    flow = finder.flows[0]
    ids = [call.result_id for call in flow.calls_of(name)]
    return max(sum(call.input_id == i and call.name in linears for call in flow.calls) for i in ids)


def plan_activation(finder: Finder | None, name: str, module: nn.Module, form: ActivationForm, bits: int) -> Candidate:
    """What would become of an activation; without a run, that it is converted."""
    reason = f"its backward pass keeps {bits} bit{'s' * (bits > 1)} an element"
    c = Candidate(name, "activation", form, f"{bits}bit", reason)
    c.changes[name] = (StepActivation, StepActivation.attributes(module, form, bits))
    if finder is None:
        return c
    calls = finder.flows[0].calls_of(name)
    if not calls:
        c.leave("it did not run on the example inputs")
        return c
    if not any(call.requires_grad for call in calls):
        c.leave("it needs no gradient: it keeps nothing")
        return c
    c.keeps = finder.ledger.kept_by(name)
    # torch's own op keeps its input alone; the parts of a composite may keep its output, which stays where others do.
    c.added = sum(_packed_bytes(call.numel, bits) for call in calls)
    return c


def _packed_bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def plan_calls(finder: Finder, skip: Callable[[str], bool], bits: int) -> list[Candidate]:
    """What would become of functional calls, outside of activation modules."""
    found: dict[str, Candidate] = {}
    for op in finder.flows[0].recorder.ops:
        function = CALLS.get(op.func._overloadpacket)
        name = op.module
        if function is None or name is None or skip(name):
            continue
        c = found.get(name)
        if c is None:
            c = found[name] = Candidate(
                name, "call", function, f"{bits}bit", f"{function} is replaced while its forward runs"
            )
            c.keeps = finder.ledger.kept_by(name, "call")
            c.changes[name] = (StepCalls, {"lomem_bits": bits})
            problem = ways_of_its_own(finder.modules[name])
            if problem is not None:
                c.leave(problem)
        if op.outputs:
            c.added += _packed_bytes(op.inputs[0].nbytes // op.inputs[0].dtype.itemsize, bits)
    return list(found.values())
