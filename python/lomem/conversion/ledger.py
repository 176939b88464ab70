"""What may be converted, and what is saved for backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
        name: Of the module.
        kind: Whether it is a norm, an activation or calls of activations.
        form: What it computes.
        action: What would become of it; LEFT where that is decided already.
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

    def leave(self, reason: str) -> None:
        """Decides against it."""
        self.action, self.reason, self.changes, self.gain = Action.LEFT, reason, {}, 0

    @property
    def left(self) -> bool:
        """Whether it is decided against."""
        return self.action is Action.LEFT

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
