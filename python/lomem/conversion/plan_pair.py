"""Plans pairs: which linear layers rebuild their input, and from what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._trace.recorder import Storage
from .cheap_ops import UNARY, StepKind
from .exchange import Converted
from .finder import Finder, ways_of_its_own
from .flow import StepCall
from .pairs import ConvertedDropout, PairCalls

__all__ = ["Chain", "dropout_change", "follow", "may_follow"]


@dataclass
class Chain:
    """Where results go by cheap ops, and what need not be saved there.

    Attributes:
        steps: The cheap ops.
        linears: Names of the linear layers that rebuild their input.
        drops: Positions in the ledger of what they and the cheap ops no longer save.
        takers: Maximum number of linear layers called with one result, and one more if cheap ops take it too.
        taken: Identities of the linear layers' inputs.
        added: Bytes of small operands that are saved in addition.
        copies: Whether it starts from tensors that nobody offers.
    """

    steps: list[StepCall] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    drops: set[int] = field(default_factory=set)
    takers: int = 0
    taken: set[int] = field(default_factory=set)
    added: int = 0
    copies: bool = False

    @property
    def dropouts(self) -> set[str]:
        """Modules in which dropouts among the ops run."""
        return {step.module for step in self.steps if step.kind is StepKind.DROPOUT and step.module is not None}

    @property
    def modules(self) -> list[str]:
        """Modules in which the other ops run."""
        return sorted({s.module for s in self.steps if s.kind is not StepKind.DROPOUT and s.module is not None})

    def rebuilders(self, finder: Finder) -> tuple[str, bool]:
        """The linear layers as text, without the names of the modules around them, and whether it is a single one."""
        names = sorted({_short(finder, name) for name in self.linears})
        if len(names) > 3:
            return f"{len(names)} linear layers", False
        return ", ".join(names[:-2]) + ", " * (len(names) == 3) + " and ".join(names[-2:]), len(names) == 1

    @property
    def gated(self) -> bool:
        """Whether one of the ops is a product of two large factors."""
        return any(step.gated for step in self.steps)

    def changes(self, finder: Finder) -> dict[str, tuple[type[Converted], dict[str, Any]]]:
        """The changes to modules that the chain needs, without those of its source."""
        takers = max(self.takers, 1)
        result: dict[str, tuple[type[Converted], dict[str, Any]]]
        result = {name: (PairCalls, PairCalls.attributes(takers=takers)) for name in self.modules}
        for name in self.dropouts:
            mixin, attributes = dropout_change(finder.modules[name], takers)
            both = attributes if name not in result else mixin.combined(attributes, result[name][1])[1]
            result[name] = mixin, dict(both)
        for name in self.linears:
            sharing = finder.sharing(name)
            assert sharing is not None
            result[name] = sharing[0], {**sharing[1], "lomem_copies": self.copies}
        return result


def follow(
    finder: Finder,
    sources: Iterable[tuple[int, Storage | None]],
    known: Callable[[str], bool],
    *,
    saved: bool,
    copies: bool = False,
) -> Chain:
    """Follows results through cheap ops to linear layers.

    Args:
        finder: The runs.
        sources: Identities and storages of the results.
        known: Whether a module is a norm or an activation, or excluded: it takes no part.
        saved: Whether the sources themselves are saved anyway. Then neither linear layers that take them directly nor
            products of them gain anything.
        copies: Whether to follow only casts and dropouts, of tensors that nobody offers.
    """
    flow, ledger, chain = finder.flows[0], finder.ledger, Chain(copies=copies)
    changed = {storage for op in flow.recorder.ops for storage in op.written}
    rebuilt: dict[int, Storage] = {i: s for i, s in sources if s is not None and s not in changed}
    first = set(rebuilt)
    freed: dict[StepCall, set[int]] = {}
    for step in flow.steps:
        if step.operand_id not in rebuilt or step.result in changed or not may_follow(finder, step, known):
            continue
        assert step.result is not None
        if copies and step.kind not in UNARY:
            continue
        if step.kind in UNARY and step.result in flow.escaped:
            continue
        rebuilt[step.result_id] = step.result
        chain.steps.append(step)
        gains = not ((saved and step.operand_id in first) or step.squared)
        freed[step] = {i for i in ledger.within([step.saved]) if gains and ledger.saved[i].storage is step.operand}
    given = {i for i in rebuilt if not (saved and i in first)}
    storages = {rebuilt[i] for i in given}
    storages |= {s for s in flow.recorder.storages if s.copy_of in storages}
    takers: dict[int, int] = {}
    for call in flow.calls:
        if call.input_id not in given or not call.single or len(call.shapes[0]) < 2 or known(call.name):
            continue
        mine = {i for i in finder.saved_by(call) if ledger.saved[i].storage in storages}
        if mine and finder.sharing(call.name) is not None:
            chain.drops |= mine
            chain.linears += [call.name] if call.name not in chain.linears else []
            takers[call.input_id] = takers.get(call.input_id, 0) + 1
    chain.taken = set(takers)
    chain.steps = _needed(chain.steps, chain.taken, freed)
    chain.drops |= {i for step in chain.steps for i in freed[step]}
    # A result that cheap ops take too is offered for as long as it exists: they may come after the linear layers.
    also = {step.operand_id for step in chain.steps}
    chain.takers = max((number + (i in also) for i, number in takers.items()), default=0)
    # The mask of a dropout that needs a gradient is saved by itself.
    chain.added = sum(s.small for s in chain.steps if s.kind is not StepKind.DROPOUT or not ledger.within([s.saved]))
    return chain


def may_follow(finder: Finder, step: StepCall, known: Callable[[str], bool]) -> bool:
    """Whether a cheap op runs in a module that can pass on what its operand is rebuilt from."""
    if step.result is None or step.module is None or known(step.module):
        return False
    return ways_of_its_own(finder.modules[step.module]) is None


def dropout_change(module: nn.Module, takers: int) -> tuple[type[Converted], dict[str, Any]]:
    """The change of a module in whose forward a dropout runs.

    Args:
        module: The module.
        takers: Maximum number of linear layers that make a result again; 0 for none.
    """
    if type(module).forward is nn.Dropout.forward:
        return ConvertedDropout, {"lomem_takers": takers}
    return PairCalls, PairCalls.attributes(takers=takers, dropouts=True)


def _short(finder: Finder, name: str) -> str:
    parts = name.split(".")
    # That of an adapter in a dict of adapters would be its own.
    adapters = len(parts) > 2 and isinstance(finder.modules[".".join(parts[:-1])], nn.ModuleDict)
    return ".".join(parts[-3:-1]) if adapters else parts[-1]


def _needed(steps: list[StepCall], taken: set[int], freed: dict[StepCall, set[int]]) -> list[StepCall]:
    """The ops on the way to linear layers, and products, which gain by themselves if they save their operand."""
    needed = []
    for step in reversed(steps):
        if step.result_id in taken or step.gated or (step.kind is StepKind.PRODUCT and freed[step]):
            needed.append(step)
            taken = taken | {step.operand_id}
    return needed[::-1]
