"""Which modules are converted, how, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._trace.recorder import Op, Storage
from .choose import Option, choose, shares
from .exchange import Converted, unexchangeable
from .flow import PRODUCTS, Call, Flow
from .modules import MSNorm, NormPlan, SharedInput, StepActivation, StepCalls
from .recognize import ActivationForm, LinearForm, NormForm, recognize_linear

__all__ = ["CONDITIONING", "Candidate", "Finder", "plan_norm"]

#: A channel's normalized input is recovered from the output where abs(beta) is at most this many times abs(gamma): of
#: the output's digits at most log2(1 + 8) = 3.2 bits are beta's.
CONDITIONING = 8.0

_aten = torch.ops.aten
CALLS = {_aten.gelu: "F.gelu", _aten.gelu_: "F.gelu", _aten.silu: "F.silu", _aten.silu_: "F.silu"}


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
        own: What it saves, as positions in the ledger.
        others: What others save, and save no more once it is converted.
        sharing: Of these, what they save is then what it keeps.
        takers: That nobody else keeps what it would keep, and why, in a few words.
        added: Bytes that it keeps once it is converted.
        gain: Bytes that the model keeps less; of what several let go together, a part.
        least: That its conversion must bring more than, the others being what they are.
    """

    name: str
    kind: str
    form: NormForm | ActivationForm | str
    action: str = "left"
    reason: str = ""
    changes: dict[str, tuple[type[Converted], dict[str, Any]]] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)
    sharing: set[int] = field(default_factory=set)
    takers: str = ""
    added: int = 0
    gain: int = 0
    least: int = 0

    def leave(self, reason: str) -> None:
        """Decides against it."""
        self.action, self.reason, self.changes, self.gain = "left", reason, {}, 0

    def drops(self, position: int) -> bool:
        """Whether something is saved no more once it is converted."""
        return position in self.own or position in self.others

    def contains(self, name: str) -> bool:
        """Whether a module is inside of it."""
        return name != self.name and (not self.name or name.startswith(f"{self.name}."))


def _is_weight(storage: Storage) -> bool:
    while storage.copy_of is not None:
        storage = storage.copy_of
    return storage.label == "parameter"


class Ledger:
    """What was saved in one run: parameters, inputs and copies of weights left out.

    Args:
        flow: The run.

    Attributes:
        saved: By position in the recorder's list.
        positions: Of each storage; it is kept as long as it is saved at one of them.
    """

    def __init__(self, flow: Flow) -> None:
        everything = enumerate(flow.recorder.saved)
        self.saved = {i: s for i, s in everything if s.storage.label is None and not _is_weight(s.storage)}
        self.positions: dict[Storage, list[int]] = {}
        for i, saved in self.saved.items():
            self.positions.setdefault(saved.storage, []).append(i)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(storage.nbytes for storage in self.positions)

    def within(self, ranges: Iterable[range]) -> set[int]:
        """Positions in some ranges."""
        return {i for positions in ranges for i in positions if i in self.saved}

    def of(self, storages: Iterable[Storage]) -> set[int]:
        """Positions of some storages."""
        return {i for storage in storages for i in self.positions.get(storage, ())}

    def storages(self, positions: Iterable[int]) -> set[Storage]:
        """Storages at some positions."""
        return {self.saved[i].storage for i in positions}


#: Of conversions that bring the same, the exact ones are preferred, and of these the simplest.
_RANKS = {"inverted": 0, "two outputs": 1, "normalized": 2}


def settle(found: list[Candidate], finder: Finder, excluded: Callable[[str], bool]) -> None:
    """Chooses the conversions with which the fewest bytes are kept, and leaves the others.

    What one brings depends on the others: of two norms of one input, either alone brings nothing, and an activation
    behind a norm that keeps its output brings nothing either.

    Args:
        found: All candidates.
        finder: The runs.
        excluded: Whether the user wants a module left.
    """
    order = {name: i for i, name in enumerate(finder.modules)}
    found = sorted(found, key=lambda c: (order[c.name], c.kind))
    for c in found:
        inside = _left_inside(c, found, finder, excluded) if c.kind == "call" and c.action != "left" else None
        if inside is not None:
            c.leave(f"{inside} inside it is left")
    candidates = [c for c in found if c.action != "left"]
    options = [_option(c, candidates, finder) for c in candidates]
    items = [(storage.nbytes, positions) for storage, positions in finder.ledger.positions.items()]
    picked = choose(options, items)
    chosen = [candidates[i] for i in sorted(picked)]
    for i, (c, gain) in enumerate(zip(candidates, shares(options, items, picked), strict=True)):
        c.gain = gain
        if c not in chosen:
            inside = next((candidates[j].name for j in sorted(options[i].needs) if j not in picked), None)
            c.leave(_no_gain(c, chosen, finder) if inside is None else f"{inside} inside it is left")
        elif (alone := _alone(c, chosen)) is not None:
            c.reason = f"it keeps less than before, though {alone}"
        elif gain <= 0 and (around := [d.name for d, o in zip(candidates, options, strict=True) if i in o.needs]):
            c.reason = f"calls in {_some(around)} are not replaced without those in it"


def _left_inside(c: Candidate, found: list[Candidate], finder: Finder, excluded: Callable[[str], bool]) -> str | None:
    """A module which is left, and would be converted with the one around it: that has the calls in both replaced."""
    for d in found:
        if d.kind != "norm" and d.action == "left" and c.contains(d.name):
            unknown = d.name in finder.callers or d.name not in finder.ran
            if d.name in finder.reached or (excluded(d.name) and unknown):
                return d.name
    known = {d.name for d in found}
    for name, module in finder.modules.items():
        own = next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn.")
        if own and c.contains(name) and name not in finder.ran | known and excluded(name):
            return name
    return None


def _option(c: Candidate, candidates: list[Candidate], finder: Finder) -> Option:
    rank = 3 * len(candidates) if c.kind != "norm" else _RANKS[c.action]
    reached = [i for i, d in enumerate(candidates) if d.kind != "norm" and d.name in finder.reached]
    needs = frozenset(i for i in reached if c.kind == "call" and c.contains(candidates[i].name))
    return Option(frozenset(c.own | c.others), c.added, c.least, rank, needs)


def _alone(c: Candidate, chosen: list[Candidate]) -> str | None:
    """Why nobody else keeps what a norm keeps, the others being converted; None where somebody does."""
    if c.kind != "norm":
        return None
    who = {i: [d.name for d in chosen if d is not c and d.drops(i)] for i in c.sharing}
    if not all(who.values()):
        return None
    names = {name for converted in who.values() for name in converted}
    return f"{_some(names)} {'keep' if len(names) > 1 else 'keeps'} its output no more" if names else c.takers


def _no_gain(c: Candidate, chosen: list[Candidate], finder: Finder) -> str:
    """Why a candidate brings too little, the others being converted."""
    ledger = finder.ledger
    if not c.own:
        return "it keeps nothing"
    alone = _alone(c, chosen)
    if alone is not None:
        return alone
    kept, others = set(), set()
    for i in ledger.of(ledger.storages(c.own)) - c.own:
        if not any(d.drops(i) for d in chosen):
            kept.add(ledger.saved[i].storage)
            others.add(ledger.saved[i].module or "")
    for d in chosen:
        # What such a norm keeps is the same tensor.
        if d.kind == "norm" and (mine := c.own & d.sharing):
            kept |= ledger.storages(mine)
            others.add(d.name)
    if not others:
        return "it would keep hardly less"
    return f"{_what(c, kept, finder)} is kept by {_some(others)} too"


def _what(c: Candidate, storages: set[Storage], finder: Finder) -> str:
    calls = finder.flows[0].calls_of(c.name)
    if c.kind == "call":
        return "its input"
    if storages <= {call.result for call in calls}:
        return "its output"
    inside = any(call.start <= storage.born < call.end for call in calls for storage in storages)
    return "part of what it keeps" if inside else "its input"


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

    Attributes:
        modules: By name.
        ledger: Of the first run.
        reached: Names of modules in which GELU or SiLU is called, in the first run and with a gradient.
        callers: The same in any run, with or without.
        ran: Names of modules that ran, or modules in them.
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


def _unused(finder: Finder, name: str) -> str | None:
    """Why nothing of a module is kept in the first run that a conversion could change, or None."""
    calls = finder.flows[0].calls_of(name)
    if not calls:
        return "it did not run on the example inputs"
    if any(call.transformed for call in calls):
        return "it runs inside a function transform (torch.vmap and the like)"
    if not any(call.requires_grad for call in calls):
        return "it needs no gradient: it keeps nothing"
    return None


def _refusal(finder: Finder, name: str, form: NormForm) -> str | None:
    """Why a norm is left whatever would be gained, or None."""
    if form.beta is not None and not form.centred:
        return "no op is an RMS norm with a bias"
    unused = _unused(finder, name)
    if unused is not None:
        return unused
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
                # Who asks for the dtype may cast a narrower one back, and keep a cast of that.
                asked = narrower and any(s is call.result and n != name for s, n in flow.asked)
                self.low_precision &= low and bool(uses) and call.result not in flow.escaped and not asked
        casts = {s for call in self.calls for s in first.casts(_result(call), call.end) if s.dtype == autocast}
        self.casts = {s for s in casts if s in finder.ledger.positions}
        self.results = {_result(call) for call in self.calls}

    @property
    def numel(self) -> int:
        """Of the calls that have a gradient."""
        return sum(call.numel for call in self.calls if call.requires_grad)

    def added(self, form: NormForm, weight: Tensor | None) -> int:
        """Bytes that the norm keeps once it is converted: its output or what takes the place, rstd, and 1 + weight."""
        calls = sum(call.requires_grad for call in self.calls)
        rstd = 8 if self.dtype == torch.float64 else 4
        size = self.numel * self.kept_dtype.itemsize + self.numel // torch.Size(form.shape).numel() * rstd
        if weight is not None and form.one_plus:
            size += calls * weight.numel() * (8 if weight.dtype == torch.float64 else 4)
        return size


def plan_norm(finder: Finder, name: str, form: NormForm) -> Candidate:
    """What would become of a norm."""
    c = Candidate(name, "norm", form)
    refusal = _refusal(finder, name, form)
    if refusal is not None:
        c.leave(refusal)
        return c
    output = _Output(finder, name)
    narrower = output.kept_dtype != output.dtype
    linears = _linears_behind(finder, name, output)
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
    _account(c, finder, output, linears if shared else None)
    takers = _takers(finder, name, linears) if shared else 0
    plan = NormPlan(form, problem is None, output.low_precision, shared, takers)
    c.changes[name] = (MSNorm, MSNorm.attributes(finder.modules[name], plan))
    for linear in linears if shared else ():
        linear_form = finder.linear(linear)
        assert linear_form is not None
        c.changes[linear] = (SharedInput, SharedInput.attributes(finder.modules[linear], linear_form))
    return c


def _account(c: Candidate, finder: Finder, output: _Output, linears: dict[str, set[int]] | None) -> None:
    """What a norm keeps, now and then, and others no more; linear layers, where these have to be told what it keeps."""
    assert isinstance(c.form, NormForm)
    ledger, module = finder.ledger, finder.modules[c.name]
    c.own = ledger.within(call.saved for call in output.calls)
    # One float a row less, the mean, is no reason.
    c.least = sum(s.nbytes for s in ledger.storages(c.own)) // 4
    c.added = output.added(c.form, None if c.form.gamma is None else getattr(module, c.form.gamma))
    kept = ledger.of(output.results | output.casts) - c.own
    others = "consumer"
    if linears is None:
        c.others = c.sharing = kept
    else:
        c.others = c.sharing = {i for positions in linears.values() for i in positions}
        # Whoever is no linear layer, or called with something made of the output, keeps what it kept: casts of its own,
        # or of parts, where the output is not cast as a whole.
        rest, whole = kept - c.others, output.numel * output.kept_dtype.itemsize
        if rest:
            others = "linear layer"
            output.low_precision &= sum(s.nbytes for s in ledger.storages(rest)) > whole
        if rest and output.low_precision:
            c.others = kept
            c.added += whole
    c.takers = f"no {others} keeps its output{_who(finder, output.uses)}"


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
        # Not by getattr: a parametrized weight may be another each time that it is asked for.
        weight = None if module is None else module._parameters.get("weight")
        if op.func._overloadpacket in PRODUCTS and isinstance(weight, Tensor) and not weight.requires_grad:
            return f": the weight of {type(module).__name__} is frozen"
        if op.func._overloadpacket not in PRODUCTS:
            return f": {op.func._overloadpacket.__name__} takes it"
    return ""


def _linears_behind(finder: Finder, name: str, output: _Output) -> dict[str, set[int]]:
    """Linear layers that are called with the very tensor that a norm returned, in the first run, and what they save.

    Of it or a copy in another dtype, that is, and only where the norm keeps all the digits that they compute with.
    """
    ids = {call.result_id for call in output.calls}
    kept, eps = output.results | output.casts, torch.finfo(output.kept_dtype).eps
    found: dict[str, set[int]] = {}
    for call in finder.flows[0].calls:
        if call.input_id not in ids or call.name == name or not call.single or len(call.shapes[0]) < 2:
            continue
        saved = {i: finder.ledger.saved[i] for i in finder.ledger.within([call.saved])}
        mine = {i for i, s in saved.items() if s.storage in kept and torch.finfo(s.dtype).eps >= eps}
        if mine and finder.linear(call.name) is not None:
            found[call.name] = found.get(call.name, set()) | mine
    return found


def _takers(finder: Finder, name: str, linears: Collection[str]) -> int:
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
    unused = _unused(finder, name)
    calls = [call for call in finder.flows[0].calls_of(name) if call.requires_grad and call.single]
    if unused is not None or not calls:
        c.leave(unused or "it is called with more than a tensor")
        return c
    c.own = finder.ledger.within(call.saved for call in calls)
    c.added = sum(_packed_bytes(call.numel, bits) for call in calls)
    return c


def _packed_bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def plan_calls(finder: Finder, skip: Callable[[str], bool], bits: int) -> list[Candidate]:
    """What would become of functional calls, outside of activation modules."""
    flow = finder.flows[0]
    functions: dict[str, dict[str, None]] = {}
    for op in flow.recorder.ops:
        function = CALLS.get(op.func._overloadpacket)
        if function is not None and op.module is not None and not skip(op.module):
            functions.setdefault(op.module, {})[function] = None
    return [_plan_calls(finder, name, " and ".join(names), bits) for name, names in functions.items()]


def _plan_calls(finder: Finder, name: str, functions: str, bits: int) -> Candidate:
    verb = "are" if " and " in functions else "is"
    c = Candidate(name, "call", functions, f"{bits}bit", f"{functions} {verb} replaced while its forward runs")
    c.changes[name] = (StepCalls, {"lomem_bits": bits})
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
        return "its calls are made in a way in which they cannot be replaced"
    return "it needs no gradient: it keeps nothing"
