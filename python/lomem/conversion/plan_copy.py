"""Plans dropouts that save a bit per element, and linear layers that make copies of their input again."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from .._trace.recorder import Storage
from .cheap_ops import UNARY, StepKind
from .finder import Finder, ways_of_its_own
from .flow import StepCall
from .kinds import Action, Kind
from .ledger import Candidate
from .plan_pair import Chain, dropout_change, follow, may_follow

__all__ = ["plan_copies", "plan_dropouts"]


def plan_dropouts(finder: Finder) -> list[Candidate]:
    """The candidates for modules in whose forward dropouts run."""
    steps: dict[str, list[StepCall]] = {}
    for step in finder.flows[0].steps:
        if step.kind is StepKind.DROPOUT and step.module is not None:
            steps.setdefault(step.module, []).append(step)
    found = []
    for name, mine in steps.items():
        module = finder.modules[name]
        c = Candidate(name, Kind.DROPOUT, "dropout", Action.EXACT, "its mask takes a bit per element")
        mixin, attributes = dropout_change(module, 0)
        c.changes[name] = mixin, attributes
        # What it saves besides its operand.
        saved = finder.ledger.saved
        c.own = {i for step in mine for i in finder.ledger.within([step.saved]) if saved[i].storage is not step.operand}
        # One that needs no gradient saves no mask, unless a linear layer does.
        c.added = sum(step.small for step in mine if finder.ledger.within([step.saved]))
        problem = ways_of_its_own(module)
        if problem is not None:
            c.leave(problem)
        found.append(c)
    return found


def plan_copies(finder: Finder, claimed: Collection[str], known: Callable[[str], bool]) -> list[Candidate]:
    """The candidates for linear layers that save a cast or dropped-out copy of a tensor, which they can make again.

    LoRA layers do, each for itself. There is one candidate for all copies of a tensor, since it is saved once for all,
    and for all tensors that the same layers take.

    Args:
        finder: The runs.
        claimed: Names of linear layers that rebuild their input already.
        known: Whether a module is a norm or an activation, or excluded.
    """
    steps = [s for s in finder.flows[0].steps if s.kind in UNARY and may_follow(finder, s, known)]
    results = {step.result_id for step in steps}
    # Parameters, and inputs that a program fills again for the next batch, are changed in place.
    outer = {s.operand_id: s.operand for s in steps if s.whole and s.operand is not None and s.operand.label is None}
    roots = {i: storage for i, storage in outer.items() if i not in results}
    found = []
    for group in _groups(finder, roots, known):
        chain = follow(finder, group.items(), known, saved=True, copies=True)
        calls = (call for name in chain.linears for call in finder.flows[0].calls_of(name))
        # A layer that is converted makes all copies again that it is called with.
        others = any(call.input_id in results and call.input_id not in chain.taken for call in calls)
        if not chain.linears or others or set(chain.linears) & set(claimed):
            continue
        first = chain.steps[0]
        assert first.module is not None
        c = Candidate(_layer(finder, first.module), Kind.COPY, _form(chain), Action.EXACT, _saying(finder, chain))
        c.own, c.added, c.needs = chain.drops, chain.added, chain.dropouts
        used = {step.operand_id for step in chain.steps}
        kept = {storage for i, storage in group.items() if i in used and storage not in finder.ledger.positions}
        c.added += sum(storage.nbytes for storage in kept)
        c.changes = chain.changes(finder)
        found.append(c)
    return found


def _groups(finder: Finder, roots: dict[int, Storage], known: Callable[[str], bool]) -> list[dict[int, Storage]]:
    """Tensors whose copies go to the same linear layers, together."""
    groups: list[tuple[set[str], dict[int, Storage]]] = []
    for i, storage in roots.items():
        linears = set(follow(finder, [(i, storage)], known, saved=True, copies=True).linears)
        if not linears:
            continue
        mine = {i: storage}
        for other in [g for g in groups if g[0] & linears]:
            groups.remove(other)
            linears, mine = linears | other[0], other[1] | mine
        groups.append((linears, mine))
    return [group for _, group in groups]


def _layer(finder: Finder, name: str) -> str:
    """The module around a dropout, which is a layer's own."""
    while name and next(finder.modules[name].children(), None) is None:
        name = name.rpartition(".")[0]
        if isinstance(finder.modules[name], nn.ModuleDict | nn.ModuleList):
            name = name.rpartition(".")[0]
    return name


def _form(chain: Chain) -> str:
    return "copies by " + " and ".join(dict.fromkeys(str(step.kind) for step in chain.steps))


def _saying(finder: Finder, chain: Chain) -> str:
    names, single = chain.rebuilders(finder)
    return f"{names} {'makes its' if single else 'make their'} copy of the input again"
