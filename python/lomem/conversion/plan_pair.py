"""Plans pairs: which linear layers rebuild their input, and from what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .._trace.recorder import Storage
from .exchange import Converted
from .finder import Finder, ways_of_its_own
from .flow import StepCall
from .modules import SharedInput
from .pairs import PairCalls, StepKind

__all__ = ["Chain", "follow"]


@dataclass
class Chain:
    """Where results go by cheap ops, and what need not be saved there.

    Attributes:
        steps: The cheap ops.
        linears: Names of the linear layers that rebuild their input.
        drops: Positions in the ledger of what they and the cheap ops no longer save.
        takers: Maximum number of linear layers called with one result.
        added: Bytes of small operands that are saved in addition.
    """

    steps: list[StepCall] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    drops: set[int] = field(default_factory=set)
    takers: int = 0
    added: int = 0

    @property
    def modules(self) -> list[str]:
        """Modules in which the cheap ops run."""
        return sorted({step.module for step in self.steps if step.module is not None})

    @property
    def gated(self) -> bool:
        """Whether one of the ops is a product of two large factors."""
        return any(step.gated for step in self.steps)

    def changes(self, finder: Finder) -> dict[str, tuple[type[Converted], dict[str, Any]]]:
        """The changes to modules that the chain needs, without those of its source."""
        takers = max(self.takers, 1)
        options = {"lomem_bits": None, "lomem_criterion": PairCalls.lomem_criterion, "lomem_takers": takers}
        result: dict[str, tuple[type[Converted], dict[str, Any]]]
        result = {name: (PairCalls, dict(options)) for name in self.modules}
        for name in self.linears:
            form = finder.linear(name)
            assert form is not None
            result[name] = SharedInput, SharedInput.attributes(finder.modules[name], form)
        return result


def follow(
    finder: Finder,
    sources: Iterable[tuple[int, Storage | None]],
    known: Callable[[str], bool],
    *,
    saved: bool,
) -> Chain:
    """Follows results through cheap ops to linear layers.

    Args:
        finder: The runs.
        sources: Identities and storages of the results.
        known: Whether a module is a norm or an activation, or excluded: it takes no part.
        saved: Whether the sources themselves are saved anyway. Then neither linear layers that take them directly nor
            products of them gain anything.
    """
    flow, ledger, chain = finder.flows[0], finder.ledger, Chain()
    changed = {storage for op in flow.recorder.ops for storage in op.written}
    rebuilt: dict[int, Storage] = {i: s for i, s in sources if s is not None and s not in changed}
    first = set(rebuilt)
    for step in flow.steps:
        if step.operand_id not in rebuilt or step.result is None or step.result in changed or step.module is None:
            continue
        if known(step.module) or ways_of_its_own(finder.modules[step.module]) is not None:
            continue
        if step.kind is StepKind.CAST and step.result in flow.escaped:
            continue
        rebuilt[step.result_id] = step.result
        chain.steps.append(step)
        if not (saved and step.operand_id in first):
            mine = {i for i in ledger.within([step.saved]) if ledger.saved[i].storage is step.operand}
            chain.drops |= mine
    given = {i for i in rebuilt if not (saved and i in first)}
    storages = {rebuilt[i] for i in given}
    storages |= {s for s in flow.recorder.storages if s.copy_of in storages}
    takers: dict[int, int] = {}
    for call in flow.calls:
        if call.input_id not in given or not call.single or len(call.shapes[0]) < 2 or known(call.name):
            continue
        mine = {i for i in ledger.within([call.saved]) if ledger.saved[i].storage in storages}
        if mine and finder.linear(call.name) is not None:
            chain.drops |= mine
            chain.linears += [call.name] if call.name not in chain.linears else []
            takers[call.input_id] = takers.get(call.input_id, 0) + 1
    chain.takers = max(takers.values(), default=0)
    chain.steps = _needed(chain.steps, set(takers))
    chain.added = sum(step.small for step in chain.steps)
    return chain


def _needed(steps: list[StepCall], taken: set[int]) -> list[StepCall]:
    """The ops on the way to linear layers, and products, which gain by themselves."""
    needed = []
    for step in reversed(steps):
        if step.result_id in taken or step.gated:
            needed.append(step)
            taken = taken | {step.operand_id}
    return needed[::-1]
