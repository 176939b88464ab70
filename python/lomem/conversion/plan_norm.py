"""Plans the conversion of norms."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from .._trace.float64 import in_float64
from .._trace.groups import stored_bytes
from .._trace.keeps import KEEPS, saves_operands
from .._trace.recorder import Op, Storage
from .cheap_ops import UNARY
from .finder import Finder
from .flow import Call
from .forms import NormForm
from .kinds import Action, Kind
from .ledger import Candidate
from .modules import MSNorm, NormPlan
from .plan_pair import Chain, follow

__all__ = ["CONDITIONING", "plan_norm"]

#: A channel's normalized input is recovered from the output if abs(beta) is at most this many times abs(gamma). Beta
#: then takes up at most log2(1 + 8) = 3.2 bits of the output's precision.
CONDITIONING = 8.0


def _real(tensor: Tensor) -> Tensor | None:
    # Fake and meta tensors have no values.
    return tensor.detach() if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" else None


def badly_conditioned(module: nn.Module, form: NormForm, dtype: torch.dtype) -> str | None:
    """Why the normalized input cannot be recovered from the output, or None if it can.

    Args:
        module: The norm.
        form: What it computes.
        dtype: Dtype of the output that is saved.
    """
    if form.gamma is None:
        return None
    gamma = _real(getattr(module, form.gamma))
    if gamma is None:
        return None
    gamma = (in_float64(gamma) + form.one_plus).abs()
    # Six bits above the smallest normal number: outputs have full precision for normalized inputs of at least 1/64.
    small = int((gamma < 64 * torch.finfo(dtype).tiny).sum())
    if small:
        return f"{small} of {gamma.numel()} weights are too small to divide by"
    beta = _real(getattr(module, form.beta)) if form.beta is not None else None
    if beta is not None:
        large = int((in_float64(beta).abs() > CONDITIONING * gamma).sum())
        if large:
            return f"in {large} of {gamma.numel()} channels the bias is over {CONDITIONING:g} times the weight"
    return None


def _takes_low_precision(op: Op, alias: Storage) -> bool:
    return op.inputs.index(alias) in KEEPS.get(op.func._overloadpacket, ())


def _refusal(finder: Finder, name: str, form: NormForm) -> str | None:
    """Why a norm is not converted, whatever that would save, or None."""
    if form.beta is not None and not form.centred:
        return "lomem has no RMS norm with a bias"
    unused = finder.unused(name)
    if unused is not None:
        return unused
    for flow in finder.flows:
        for call in flow.calls_of(name):
            if not call.single or call.result is None:
                return "it is called with more than a single tensor"
            changed = next((op for op in flow.recorder.ops[call.end :] if call.result in op.written), None)
            if changed is not None:
                return f"its output is changed in place by {changed.func._overloadpacket.__name__} in {_at(changed)}"
    return None


class _Output:
    """Where a norm's output goes, and in which dtype.

    Attributes:
        calls: The norm's calls in the first run.
        uses: Ops of the first run that take the output, or a copy of it.
        dtype: Dtype of the output.
        kept_dtype: Dtype in which it is saved once the norm is converted: the autocast dtype if that is narrower.
        low_precision: Whether all ops that take it cast it to the autocast dtype, or would.
        casts: Copies in the autocast dtype that are saved.
        results: Storages of the norm's results in the first run.
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
                # A product that takes it uncast although autocast is on runs in a block that turns autocast off.
                low = all(
                    _takes_low_precision(op, alias) and (not narrower or alias.dtype == autocast) for op, alias in uses
                )
                # A module that reads the dtype may cast a narrower tensor back, and save that cast.
                asked = narrower and any(s is call.result and n != name for s, n in flow.asked)
                self.low_precision &= low and bool(uses) and call.result not in flow.escaped and not asked
        casts = {s for call in self.calls for s in first.casts(_result(call), call.end) if s.dtype == autocast}
        self.casts = {s for s in casts if s in finder.ledger.positions}
        self.results = {_result(call) for call in self.calls}

    @property
    def numel(self) -> int:
        """Number of elements of the outputs that require a gradient."""
        return sum(call.numel for call in self.calls if call.requires_grad)

    def added(self, form: NormForm, module: nn.Module, groups: int | None = None) -> int:
        """Bytes that the norm saves once converted: its output or a substitute, rstd, and 1 + weight.

        Args:
            form: What it computes.
            module: The norm.
            groups: Bits per element, in groups, of the substitute. Linear layers then save copies of its weight and
                bias too, from which they rebuild its output.
        """
        numels = [call.numel for call in self.calls if call.requires_grad]
        rstd = 8 if self.dtype == torch.float64 else 4
        size = self.numel * self.kept_dtype.itemsize if groups is None else sum(stored_bytes(n, groups) for n in numels)
        size += self.numel // torch.Size(form.shape).numel() * rstd
        weight, bias = (None if name is None else getattr(module, name) for name in (form.gamma, form.beta))
        if weight is not None and form.one_plus:
            size += len(numels) * weight.numel() * (8 if weight.dtype == torch.float64 else 4)
        copied = [t for t in (None if form.one_plus else weight, bias) if t is not None and groups is not None]
        return size + sum(len(numels) * t.numel() * t.element_size() for t in copied)


def plan_norm(
    finder: Finder, name: str, form: NormForm, pairs: bool, known: Callable[[str], bool], groups: int | None = None
) -> Candidate:
    """The candidate for a norm.

    Args:
        finder: The runs.
        name: Name of the module.
        form: What it computes.
        pairs: Whether linear layers may rebuild what cheap ops make of its output.
        known: Whether a module is a norm or an activation, or excluded.
        groups: Bits per element, in groups, in which its normalized input may be saved; None for none of the kind.
    """
    c = _plan_exactly(finder, name, form, pairs, known)
    if groups is None or _refusal(finder, name, form) is not None:
        return c
    return _in_groups(finder, c, form, pairs, known, groups)


def _in_groups(
    finder: Finder, exact: Candidate, form: NormForm, pairs: bool, known: Callable[[str], bool], bits: int
) -> Candidate:
    """The candidate that saves the normalized input in groups, if that is fewer bytes, otherwise the exact one."""
    name, module = exact.name, finder.modules[exact.name]
    output = _Output(finder, name)
    chain = follow(finder, ((call.result_id, call.result) for call in output.calls), known, saved=False)
    if not chain.linears or (chain.steps and not pairs):
        return exact
    c = Candidate(name, Kind.NORM, form, Action.of_groups(bits), "", chained=True)
    c.own = finder.ledger.within(call.saved for call in output.calls)
    c.others, c.needs = chain.drops, chain.dropouts
    c.added = output.added(form, module, bits) + chain.added
    freed = finder.ledger.freed
    # The norm's own input may be saved by others; whether it is makes no difference between the two.
    least = 0 if exact.left else freed(exact.own | exact.others) - exact.added
    if freed(c.own | c.others) - c.added <= least:
        return exact
    c.least = exact.least
    names, single = chain.rebuilders(finder)
    c.reason = f"it saves its normalized input in {bits} bits per element, from which {names} "
    c.reason += "rebuilds its input" if single else "rebuild their input"
    # Where a compiler cannot store it (a checkpointed region, a DTensor), it is converted as it would be exactly.
    plan: NormPlan | None = None if exact.left else exact.changes[name][1]["lomem_norm"]
    takers = _takers(finder, name, chain.linears) + bool(chain.steps)
    inverted, shared = (False, True) if plan is None else (plan.inverted, plan.shared)
    plan = NormPlan(form, inverted, output.low_precision, shared, takers, True, bits)
    c.changes = {**chain.changes(finder), name: (MSNorm, MSNorm.attributes(module, plan))}
    return c


def _plan_exactly(finder: Finder, name: str, form: NormForm, pairs: bool, known: Callable[[str], bool]) -> Candidate:
    """The candidate for a norm that saves no more than linear layers do anyway, see :func:`plan_norm`."""
    c = Candidate(name, Kind.NORM, form)
    refusal = _refusal(finder, name, form)
    if refusal is not None:
        c.leave(refusal)
        return c
    output = _Output(finder, name)
    narrower = output.kept_dtype != output.dtype
    linears = _linears_behind(finder, name, output)
    problem = badly_conditioned(finder.modules[name], form, output.kept_dtype)
    if problem is not None and (len(form.shape) != 1 or not (linears or narrower)):
        c.leave(f"{problem}, and no linear layer takes its output directly")
        return c
    shared = problem is not None or (narrower and not output.low_precision)
    chain = Chain()
    if pairs and problem is None:
        chain = follow(finder, ((call.result_id, call.result) for call in output.calls), known, saved=True)
        if chain.linears and shared and not _made_from_copies(finder, chain, output.kept_dtype):
            # What is rebuilt from its output is as precise as that.
            if linears:
                chain = Chain()
            else:
                shared, output.kept_dtype = False, output.dtype
    if problem is not None:
        c.action, c.reason = Action.NORMALIZED, f"{problem}: linear layers save the normalized input"
    elif shared:
        c.action = Action.TWO_OUTPUTS
        c.reason = f"linear layers save a {str(output.kept_dtype)[6:]} copy, other consumers need full precision"
    else:
        c.action, c.reason = Action.INVERTED, "its consumers save its output"
    _account(c, finder, output, linears if shared else None)
    chained = bool(chain.linears)
    # Those behind a chain do not take the norm's own offer, which is to last for them.
    takers = _takers(finder, name, linears) + chained if shared else 0
    if chained:
        c.others = c.others | chain.drops
        c.added += chain.added
        c.needs = chain.dropouts
        c.chained = True
        what = "its consumers save its output, from which" if c.sharing else "it saves its output, from which"
        names, single = chain.rebuilders(finder)
        rebuild = f"{names} {'rebuilds its' if single else 'rebuild their'} input"
        c.reason = f"{c.reason}, and {rebuild} from it" if shared else f"{what} {rebuild}"
        c.changes.update(chain.changes(finder))
    plan = NormPlan(form, problem is None, output.low_precision, shared, takers, chained)
    c.changes[name] = (MSNorm, MSNorm.attributes(finder.modules[name], plan))
    for linear in linears if shared else ():
        sharing = finder.sharing(linear)
        assert sharing is not None
        c.changes[linear] = sharing
    return c


def _made_from_copies(finder: Finder, chain: Chain, dtype: torch.dtype) -> bool:
    """Whether linear layers only make copies of a norm's output again, none more precise than ``dtype``."""
    saved, eps = finder.ledger.saved, torch.finfo(dtype).eps
    return all(s.kind in UNARY for s in chain.steps) and all(
        torch.finfo(saved[i].dtype).eps >= eps for i in chain.drops
    )


def _account(c: Candidate, finder: Finder, output: _Output, linears: dict[str, set[int]] | None) -> None:
    """Fills in what a norm saves before and after conversion, and what others no longer save.

    Args:
        c: The norm's candidate.
        finder: The runs.
        output: Where its output goes.
        linears: Linear layers to convert together with the norm, with what they save; None if there is no need to.
    """
    assert isinstance(c.form, NormForm)
    ledger, module = finder.ledger, finder.modules[c.name]
    c.own = ledger.within(call.saved for call in output.calls)
    # Saving one float less per row, the mean, is not worth a conversion.
    c.least = sum(s.nbytes for s in ledger.storages(c.own)) // 4
    c.added = output.added(c.form, module)
    kept = ledger.of(output.results | output.casts) - c.own
    others = "consumer"
    if linears is None:
        c.others = c.sharing = kept
    else:
        c.others = c.sharing = {i for positions in linears.values() for i in positions}
        # A module that is not a linear layer, or takes something derived from the output, saves what it saved before:
        # its own casts, or casts of parts if the output is not cast as a whole.
        rest, whole = kept - c.others, output.numel * output.kept_dtype.itemsize
        if rest:
            others = "linear layer"
            output.low_precision &= sum(s.nbytes for s in ledger.storages(rest)) > whole
        if rest and output.low_precision:
            c.others = kept
            c.added += whole
    c.takers = f"no {others} saves its output{_who(finder, output.uses)}"


def _autocast_dtype() -> torch.dtype | None:
    device = next((d for d in ("cuda", "cpu") if torch.is_autocast_enabled(d)), None)
    return None if device is None else torch.get_autocast_dtype(device)


def _result(call: Call) -> Storage:
    assert call.result is not None
    return call.result


def _at(op: Op) -> str:
    return op.module or "the model"


def _who(finder: Finder, uses: list[tuple[Op, Storage]]) -> str:
    """A clause that says what takes the output instead."""
    for op, _ in uses:
        module = finder.modules.get(op.module or "")
        # Not by getattr: a parametrized weight may differ at each access.
        weight = None if module is None else module._parameters.get("weight")
        if saves_operands(op.func) and isinstance(weight, Tensor) and not weight.requires_grad:
            return f": the weight of {type(module).__name__} is frozen"
        if not saves_operands(op.func):
            return f": {op.func._overloadpacket.__name__} takes it"
    return ""


def _linears_behind(finder: Finder, name: str, output: _Output) -> dict[str, set[int]]:
    """Linear layers called in the first run with the very tensor that a norm returned, and what they save of it.

    That is the result or a copy in another dtype. Layers are listed only if they compute in no higher precision than
    the norm saves.
    """
    ids = {call.result_id for call in output.calls}
    kept, eps = output.results | output.casts, torch.finfo(output.kept_dtype).eps
    found: dict[str, set[int]] = {}
    for call in finder.flows[0].calls:
        if call.input_id not in ids or call.name == name or not call.single or len(call.shapes[0]) < 2:
            continue
        # (An adapter saves the result as it is given, but computes in the autocast dtype too.)
        if call.dtype is None or torch.finfo(call.dtype).eps < eps:
            continue
        mine = {i for i in finder.saved_by(call) if finder.ledger.saved[i].storage in kept}
        if mine and finder.sharing(call.name) is not None:
            found[call.name] = found.get(call.name, set()) | mine
    return found


def _takers(finder: Finder, name: str, linears: Collection[str]) -> int:
    """Maximum number of calls of linear layers that take one result of a norm."""
    flow = finder.flows[0]
    ids = [call.result_id for call in flow.calls_of(name)]
    return max(sum(call.input_id == i and call.name in linears for call in flow.calls) for i in ids)
