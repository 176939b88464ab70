"""Candidates for conversion, and the ledger of what is saved for backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .._trace.holders import holders_of
from .._trace.recorder import Storage
from .exchange import Converted
from .flow import Flow
from .forms import ActivationForm, NormForm
from .kinds import Action, Kind

__all__ = ["Candidate", "Ledger"]


@dataclass(eq=False)
class Candidate:
    """Something that may be converted.

    Attributes:
        name: Name of the module.
        kind: Whether it is a norm, an activation, calls of activations, dropouts, or copies for linear layers.
        form: What it computes.
        action: How it would be converted; LEFT if it is already decided against.
        reason: Why, as a clause.
        changes: Mixins and their attributes, by module name.
        own: What it saves, as positions in the ledger.
        others: What other modules save now, but not once it is converted.
        sharing: The subset of ``others`` whose modules then save the same tensor as it does.
        takers: A clause that says that no other module saves what it would save, and why.
        added: Bytes that it saves once converted.
        gain: Bytes that the model saves less because of it: its share of what several candidates free together.
        least: Its conversion must free more bytes than this, given the other conversions.
        needs: Names of the modules whose dropouts must be converted with it.
        chained: Whether linear layers rebuild what cheap ops make of its result.
    """

    name: str
    kind: Kind
    form: NormForm | ActivationForm | str
    action: Action = Action.LEFT
    reason: str = ""
    changes: dict[str, tuple[type[Converted], dict[str, Any]]] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)
    sharing: set[int] = field(default_factory=set)
    takers: str = ""
    added: int = 0
    gain: int = 0
    least: int = 0
    needs: set[str] = field(default_factory=set)
    chained: bool = False

    def leave(self, reason: str) -> None:
        """Decides against it."""
        self.action, self.reason, self.changes, self.gain = Action.LEFT, reason, {}, 0

    @property
    def left(self) -> bool:
        """Whether it has been decided against."""
        return self.action is Action.LEFT

    def drops(self, position: int) -> bool:
        """Whether a tensor is no longer saved once the candidate is converted."""
        return position in self.own or position in self.others

    def contains(self, name: str) -> bool:
        """Whether a module is inside this one."""
        return name != self.name and (not self.name or name.startswith(f"{self.name}."))


def _is_weight(storage: Storage) -> bool:
    while storage.copy_of is not None:
        storage = storage.copy_of
    return storage.label == "parameter"


class Ledger:
    """What was saved for backward in one run, excluding parameters, inputs and weight copies.

    Args:
        flow: The run.

    Attributes:
        saved: What was saved, by its position in the recorder's list.
        positions: The positions of each storage. It stays saved as long as one of them does.
    """

    def __init__(self, flow: Flow) -> None:
        everything = enumerate(flow.recorder.saved)
        self.saved = {i: s for i, s in everything if s.storage.label is None and not _is_weight(s.storage)}
        self.positions: dict[Storage, list[int]] = {}
        for i, saved in self.saved.items():
            self.positions.setdefault(saved.storage, []).append(i)

    @property
    def nbytes(self) -> int:
        """Bytes saved in total."""
        return sum(storage.nbytes for storage in self.positions)

    def holders(self) -> dict[str, int]:
        """Bytes by the module that saved them first, see :func:`lomem._trace.holders.holders_of`."""
        first = ((self.saved[positions[0]], storage.nbytes) for storage, positions in self.positions.items())
        return holders_of((saved.module or "(the model)", nbytes) for saved, nbytes in first)

    def within(self, ranges: Iterable[range]) -> set[int]:
        """The positions in some ranges."""
        return {i for positions in ranges for i in positions if i in self.saved}

    def of(self, storages: Iterable[Storage]) -> set[int]:
        """The positions of some storages."""
        return {i for storage in storages for i in self.positions.get(storage, ())}

    def freed(self, drops: set[int]) -> int:
        """Bytes that are no longer saved if nothing at some positions is."""
        return sum(s.nbytes for s in self.storages(drops) if drops.issuperset(self.positions[s]))

    def storages(self, positions: Iterable[int]) -> set[Storage]:
        """The storages at some positions."""
        return {self.saved[i].storage for i in positions}
