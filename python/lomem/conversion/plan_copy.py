"""Plans dropouts that save a bit per element, and linear layers that make copies of their input again."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from .finder import Finder, ways_of_its_own
from .flow import StepCall
from .kinds import Action, Kind
from .ledger import Candidate
from .pairs import UNARY, StepKind
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
        c.added = sum(step.small for step in mine)
        problem = ways_of_its_own(module)
        if problem is not None:
            c.leave(problem)
        found.append(c)
    return found


def plan_copies(finder: Finder, claimed: Collection[str], known: Callable[[str], bool]) -> list[Candidate]:
    """The candidates for linear layers that save a cast or dropped-out copy of a tensor, which they can make again.

    LoRA layers do, each for itself. One candidate for all copies of a tensor, since it is saved once for all.

    Args:
        finder: The runs.
        claimed: Names of linear layers that rebuild their input already.
        known: Whether a module is a norm or an activation, or excluded.
    """
    flow, found = finder.flows[0], []
    steps = [step for step in flow.steps if may_follow(finder, step, known)]
    results = {step.result_id for step in steps}
    roots = {s.operand_id: s for s in steps if s.kind in UNARY and s.operand_id not in results}
    for root in roots.values():
        if root.operand is None:
            continue
        chain = follow(finder, [(root.operand_id, root.operand)], known, saved=True)
        if not chain.linears or set(chain.linears) & set(claimed):
            continue
        first = next(step for step in chain.steps if step.operand_id == root.operand_id)
        assert first.module is not None
        c = Candidate(_layer(finder, first.module), Kind.COPY, _form(chain), Action.EXACT, _saying(finder, chain))
        c.own, c.added, c.needs = chain.drops, chain.added, chain.dropouts
        if root.operand.label is None and root.operand not in finder.ledger.positions:
            c.added += root.operand.nbytes
        c.changes = chain.changes(finder)
        found.append(c)
    return found


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
