"""Reports what a conversion did, and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .._trace.holders import large_holders
from .._units import size
from .fidelity import GradientFidelity
from .kinds import Action, Kind, Text

__all__ = ["Decision", "Report"]


@dataclass(frozen=True)
class Decision:
    """The decision about one norm, activation, dropout, functional call, or tensor that linear layers copy.

    Attributes:
        name: Qualified name of the module.
        kind: ``"norm"``, ``"activation"``, ``"dropout"``, ``"call"`` (of ``F.gelu`` or ``F.silu`` in the module's
            forward), or ``"copy"`` (linear layers save casts or dropped-out copies of their input, as LoRA's do).
        module: Name of the module's class.
        computes: What it was recognized as.
        action: What was done: ``"1bit"`` to ``"8bit"``, ``"4bit groups"``, ``"8bit groups"``, ``"exact"``,
            ``"inverted"``, ``"two outputs"``, ``"normalized"``, or ``"left"`` (not converted).
        reason: Why, as a clause.
        saved_bytes: Reduction of the bytes saved for backward in the example run; 0 if the module is not converted or
            there was no run.
    """

    name: str
    kind: Kind
    module: str
    computes: str
    action: Action
    reason: str
    saved_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))
        object.__setattr__(self, "action", Action(self.action))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # pickles of earlier versions hold plain text


@dataclass(frozen=True)
class Report:
    """What :func:`lomem.convert` did.

    Attributes:
        decisions: In the order of the model's modules.
        saved_before: Bytes saved for backward on the example inputs, in training mode; None if there was no run.
        saved_after: The same after the conversion.
        difference: Largest difference of an output from the original model's, relative to that output's norm; None if
            not checked, 0 if only activations were converted.
        notes: Further remarks.
        holders: The bytes of ``saved_after`` by the module that saves them first, largest first; numbers in names are
            replaced by ``*``, so that equal layers are one holder.
        gradient: How the gradient of all trained parameters on the example inputs compares with the exact one; None if
            it was not compared, as where all conversions are exact.
        layers: The same by the module that holds the parameters; one that several modules hold counts for the first.
            Those whose exact gradient is 0 are left out.
    """

    decisions: tuple[Decision, ...]
    saved_before: int | None = None
    saved_after: int | None = None
    difference: float | None = None
    notes: tuple[str, ...] = ()
    holders: dict[str, int] = field(default_factory=dict)
    gradient: GradientFidelity | None = None
    layers: dict[str, GradientFidelity] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of earlier versions have none of these.
        self.__dict__.update({"holders": {}, "gradient": None, "layers": {}} | state)

    @property
    def converted(self) -> tuple[Decision, ...]:
        """Decisions to convert."""
        return tuple(d for d in self.decisions if d.action is not Action.LEFT)

    @property
    def left(self) -> tuple[Decision, ...]:
        """Decisions not to convert."""
        return tuple(d for d in self.decisions if d.action is Action.LEFT)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self, dict_factory=lambda items: {k: str(v) if isinstance(v, Text) else v for k, v in items})

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def groups(self) -> list[tuple[Decision, int, int]]:
        """Groups of decisions that differ only in name: the first one, their number, and their total bytes."""
        alike: Counter[tuple[str, ...]] = Counter()
        nbytes: Counter[tuple[str, ...]] = Counter()
        first: dict[tuple[str, ...], Decision] = {}
        for d in self.decisions:
            key = (d.kind, d.module, d.computes, d.action, d.reason)
            first.setdefault(key, d)
            alike[key] += 1
            nbytes[key] += d.saved_bytes
        return [(d, alike[key], nbytes[key]) for key, d in first.items()]

    def table(self, *, every: bool = False) -> Any:
        """A table for rich's console.

        Args:
            every: Whether each decision gets a row, rather than each group of equal ones.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("Report.table needs the package rich: pip install rich") from error
        rows = [(d, 1, d.saved_bytes) for d in self.decisions] if every else self.groups()
        result = Table(title="lomem.convert", caption="\n".join(self._summary()), caption_justify="left")
        for heading in ("module", "number", "class", "computes", "action", "size", "reason"):
            result.add_column(heading, justify="right" if heading in ("number", "size") else "left", overflow="fold")
        for d, number, nbytes in rows:
            saved = size(-nbytes) if nbytes else ""
            result.add_row(d.name or "(the model)", str(number), d.module, d.computes, str(d.action), saved, d.reason)
        return result

    def _summary(self) -> list[str]:
        lines = [f"{len(self.converted)} converted, {len(self.left)} left"]
        if self.saved_before is not None and self.saved_after is not None:
            before, after = self.saved_before, self.saved_after
            percent = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
            lines.append(f"saved for backward: {size(before)} -> {size(after)}{percent}")
        if self.difference is not None:
            lines.append(f"largest relative difference of an output: {self.difference:.2g}")
        if self.gradient is not None:
            lines.append(f"gradient on the example batch: {self.gradient}")
        return [*lines, *self.notes]

    def __str__(self) -> str:
        lines = ["lomem.convert: " + "; ".join(self._summary())]
        for d, number, _ in self.groups():
            where = d.name or "(the model)"
            also = f" and {number - 1} more" if number > 1 else ""
            lines.append(f"  {d.action}: {where}{also} [{d.module}, {d.computes}]: {d.reason}")
        large = large_holders(self.holders)
        if large:
            lines.append("still saved, by module (* for numbers):")
            lines += [f"  {size(nbytes)}: {name}" for name, nbytes in large.items()]
        return "\n".join(lines)
