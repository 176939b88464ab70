"""Plans the conversion of activations and of calls of activation functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from .._trace.groups import stored_bytes
from .exchange import Converted
from .finder import CALLS, Finder, ways_of_its_own
from .forms import ActivationForm
from .kinds import Action, Criterion, Function, Kind, Wishes
from .ledger import Candidate
from .modules import ConvertedActivation, StepCalls
from .pairs import PairCalls, PairedActivation
from .plan_pair import Chain, follow

__all__ = ["plan_activation", "plan_calls"]


#: The change of one module.
OwnChange: TypeAlias = Mapping[str, tuple[type[Converted], dict[str, Any]]]

#: Why an activation or a call is left if only exact conversions are asked for.
_NOT_EXACT = "nothing can be rebuilt from its input, and only exact conversions are asked for"


def plan_activation(
    finder: Finder | None,
    name: str,
    module: nn.Module,
    form: ActivationForm,
    wishes: Wishes,
    known: Callable[[str], bool],
) -> Candidate:
    """The candidate for an activation. Without a run, it is converted.

    Args:
        finder: The runs, None for none.
        name: Name of the module.
        module: The module.
        form: What it computes.
        wishes: The options.
        known: Whether a module is a norm or an activation, or excluded.
    """
    bits, criterion = wishes.bits or 2, wishes.criterion
    c = Candidate(name, Kind.ACTIVATION, form, Action.of_bits(bits), _few(bits, criterion))
    c.changes[name] = (ConvertedActivation, ConvertedActivation.attributes(module, form, bits, criterion))
    if finder is None:
        if wishes.exact:
            c.leave("what may rebuild its result is unknown without example_inputs")
        return c
    unused = finder.unused(name)
    calls = [call for call in finder.flows[0].calls_of(name) if call.requires_grad and call.single]
    if unused is not None or not calls:
        c.leave(unused or "it is called with more than a single tensor")
        return c
    ledger = finder.ledger
    c.own = ledger.within(call.saved for call in calls)
    c.added = sum(_code_bytes(call.numel, bits, criterion) for call in calls)
    # A scale that is read at each call may change before the backward pass.
    if wishes.pairs and not form.inplace and form.scale_name is None:
        inputs = {call.input for call in calls if call.input is not None}
        results = {call.result_id: call.result for call in calls}
        chain = follow(finder, results.items(), known, saved=False)
        # An activation of several ops saves more than its input.
        kept = {i for i in c.own if ledger.saved[i].storage in inputs}
        # With linear layers behind it, it may also be a model's input that it saves, which the ledger leaves out.
        saved = dict(enumerate(finder.flows[0].recorder.saved)) if chain.linears else ledger.saved
        complete = all(any(i in saved and saved[i].storage is call.input for i in call.saved) for call in calls)
        takers = max(chain.takers, 1)

        def change(groups: int | None) -> OwnChange:
            attributes = PairedActivation.attributes(module, form, takers, chain.gated, groups)
            return {name: (PairedActivation, attributes)}

        groups = None
        if wishes.pair_groups is not None and kept:
            factors = set(results) if form.torch_op else set()
            groups = _in_groups(finder, chain, [call.numel for call in calls], factors, wishes.pair_groups)
        if complete and _pair(c, finder, chain, c.own - kept, change, groups, exact=wishes.exact):
            return c
    if wishes.exact:
        c.leave(_NOT_EXACT)
    return c


def _few(bits: int, criterion: Criterion) -> str:
    drawn = ", drawn at random" if criterion is Criterion.DRAWN else ""
    return f"its backward pass saves {bits} bit{'s' * (bits > 1)} per element{drawn}"


def _code_bytes(numel: int, bits: int, criterion: Criterion) -> int:
    """Bytes of the codes of an activation, and of the seed that they are drawn with."""
    return (numel * bits + 7) // 8 + (8 if criterion is Criterion.DRAWN else 0)


class _Groups(NamedTuple):
    """What a pair keeps in groups.

    Attributes:
        bits: Bits per element.
        drops: Positions in the ledger of the factors of products, which are kept in groups as the inputs are.
        added: Bytes that inputs and factors take.
    """

    bits: int
    drops: set[int]
    added: int


def _in_groups(finder: Finder, chain: Chain, numels: Iterable[int], results: set[int], bits: int) -> _Groups:
    """Plans to keep in groups what a chain starts from.

    Args:
        finder: The runs.
        chain: Where the results of an activation go.
        numels: Numbers of elements of its inputs.
        results: Identities of the results whose products keep both factors in groups.
        bits: Bits per element.
    """
    ledger = finder.ledger
    products = [step for step in chain.steps if step.gated and step.operand_id in results]
    drops = {i for s in products for i in ledger.within([s.saved]) if ledger.saved[i].storage is not s.operand}
    sizes = [s.result.nbytes // s.result.dtype.itemsize for s in products if s.result is not None]
    return _Groups(bits, drops, sum(stored_bytes(numel, bits) for numel in (*numels, *sizes)))


def _pair(
    c: Candidate,
    finder: Finder,
    chain: Chain,
    own: set[int],
    change: Callable[[int | None], OwnChange],
    groups: _Groups | None,
    *,
    exact: bool,
) -> bool:
    """Makes a candidate a pair if that frees at least as much as codes.

    Args:
        c: The candidate, planned with codes.
        finder: The runs.
        chain: Where its results go.
        own: What it saves besides its input.
        change: The change of the candidate's own module, for a number of bits per element in which its input is kept.
        groups: What it may keep in groups.
        exact: Whether codes are not allowed.
    """
    freed = finder.ledger.freed
    codes = freed(c.own) - c.added
    gain = freed(own | chain.drops) - chain.added
    others, added, saying, bits = chain.drops, chain.added, _saying(finder, chain), None
    if groups is not None:
        fewer = chain.drops | groups.drops
        gain_in_groups = freed(c.own | fewer) - chain.added - groups.added
        if gain_in_groups > gain:
            gain, own, others, added, bits = gain_in_groups, c.own, fewer, chain.added + groups.added, groups.bits
            saying += f"; {'both factors are' if groups.drops else 'its input is'} kept in {bits} bits per element"
    if gain <= 0 or (not exact and gain < codes):
        return False
    c.own, c.others, c.added, c.needs = own, others, added, chain.dropouts
    c.action, c.reason = Action.EXACT if bits is None else Action.of_groups(bits), saying
    c.changes = {**chain.changes(finder), **change(bits)}
    return True


def _saying(finder: Finder, chain: Chain) -> str:
    """A clause about a chain."""
    layers, single = chain.rebuilders(finder)
    rebuild = f"{layers} rebuild{'s' * single}"
    if chain.gated:
        product = "the product saves its factors, of which one is the activation's input"
        return f"{product}, and {rebuild} it" if layers else product
    return f"{rebuild} its result from its input" if layers else "it saves its input alone"


def plan_calls(
    finder: Finder, skip: Callable[[str], bool], known: Callable[[str], bool], wishes: Wishes
) -> list[Candidate]:
    """The candidates for functional calls outside activation modules.

    Args:
        finder: The runs.
        skip: Whether a module is an activation.
        known: Whether a module is a norm or an activation, or excluded.
        wishes: The options.
    """
    flow = finder.flows[0]
    functions: dict[str, dict[Function, None]] = {}
    for op in flow.recorder.ops:
        function = CALLS.get(op.func._overloadpacket)
        if function is not None and op.module is not None and not skip(op.module):
            functions.setdefault(op.module, {})[function] = None
    return [_plan_calls(finder, name, list(called), known, wishes) for name, called in functions.items()]


def _plan_calls(
    finder: Finder, name: str, functions: list[Function], known: Callable[[str], bool], wishes: Wishes
) -> Candidate:
    bits, criterion = wishes.bits or 2, wishes.criterion
    verb = "are" if len(functions) > 1 else "is"
    form = " and ".join(function.call for function in functions)
    c = Candidate(name, Kind.CALL, form, Action.of_bits(bits), f"{form} {verb} replaced while its forward runs")
    c.changes[name] = (StepCalls, {"lomem_bits": bits, "lomem_criterion": criterion})
    ledger = finder.ledger
    calls = [call for call in finder.flows[0].activations if call.module == name and call.replaced]
    c.own = ledger.within(call.saved for call in calls)
    c.added = sum(_code_bytes(call.numel, bits, criterion) for call in calls)
    problem = ways_of_its_own(finder.modules[name])
    if problem is not None:
        c.leave(problem)
        return c
    if not calls:
        c.leave(_why_no_calls(finder, name))
        return c
    if wishes.pairs and not any(call.inplace for call in calls):
        results = {call.result_id: call.result for call in calls}
        chain = follow(finder, results.items(), known, saved=False)

        def change(groups: int | None) -> OwnChange:
            takers = max(chain.takers, 1)
            return {name: (PairCalls, PairCalls.attributes(None, criterion, takers, activations=True, storage=groups))}

        groups = None
        if wishes.pair_groups is not None:
            numels = [call.numel for call in calls]
            groups = _in_groups(finder, chain, numels, set(results), wishes.pair_groups)
        if _pair(c, finder, chain, set(), change, groups, exact=wishes.exact):
            return c
    if wishes.exact:
        c.leave(_NOT_EXACT)
    return c


def _why_no_calls(finder: Finder, name: str) -> str:
    flow = finder.flows[0]
    seen = [call for call in flow.activations if call.module == name]
    ops = {i for call in seen for i in call.ops}
    mine = {i for i, op in enumerate(flow.recorder.ops) if op.module == name and op.func._overloadpacket in CALLS}
    if mine - ops or any(call.saved for call in seen):
        return "its calls cannot be intercepted"
    return "it needs no gradient, so it saves nothing"
