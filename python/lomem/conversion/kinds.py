"""Enums of a conversion: what is converted, how, and with what options."""

from __future__ import annotations

import enum
import fnmatch
from dataclasses import dataclass

__all__ = ["KEEP", "Action", "Auto", "Criterion", "Function", "Kind", "ResultDtype", "Rounding", "Text", "Wishes"]

#: Option value that converts no activations, or no norms.
KEEP = "keep"


class Text(str, enum.Enum):
    """An enum whose members equal, print and serialize as their text."""

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


class Kind(Text):
    """What a decision is about."""

    NORM = "norm"
    ACTIVATION = "activation"
    CALL = "call"
    DROPOUT = "dropout"
    COPY = "copy"


class Action(Text):
    """How a module is converted."""

    LEFT = "left"
    EXACT = "exact"
    INVERTED = "inverted"
    TWO_OUTPUTS = "two outputs"
    NORMALIZED = "normalized"
    ONE_BIT = "1bit"
    TWO_BITS = "2bit"
    THREE_BITS = "3bit"
    FOUR_BITS = "4bit"
    FIVE_BITS = "5bit"
    SIX_BITS = "6bit"
    SEVEN_BITS = "7bit"
    EIGHT_BITS = "8bit"
    FOUR_BIT_GROUPS = "4bit groups"
    EIGHT_BIT_GROUPS = "8bit groups"

    @classmethod
    def of_bits(cls, bits: int) -> Action:
        """The action for an activation that saves this many bits per element."""
        return cls(f"{bits}bit")

    @classmethod
    def of_groups(cls, bits: int) -> Action:
        """The action for what is kept in groups, with this many bits per element."""
        return cls(f"{bits}bit groups")

    @property
    def code_bits(self) -> int | None:
        """Bits per element of the codes of a step function; None for what has none."""
        digit, _, rest = self.value.partition("bit")
        return int(digit) if digit.isdigit() and not rest else None

    @property
    def group_bits(self) -> int | None:
        """Bits per element of what is kept in groups; None for what is not."""
        digit, _, rest = self.value.partition("bit")
        return int(digit) if digit.isdigit() and rest else None

    @property
    def exact(self) -> bool:
        """Whether gradients are exact up to rounding."""
        return self.code_bits is None and self.group_bits is None


class Function(Text):
    """The activations that are converted."""

    GELU = "gelu"
    SILU = "silu"

    @property
    def call(self) -> str:
        """The function as spelled in code."""
        return f"F.{self.value}"


class ResultDtype(Text):
    """Where the dtype of a norm's result comes from."""

    INPUT = "input"
    WEIGHT = "weight"
    PROMOTE = "promote"
    FLOAT32 = "float32"
    AUTOCAST = "autocast"


class Criterion(Text):
    """What the step functions of activations are fitted to; or that there are none, because codes are drawn."""

    DERIVATIVE = "derivative"
    PRIMITIVE = "primitive"
    PAPER = "paper"
    #: Without the option ``criterion``; not a value of it.
    DRAWN = "drawn"


class Rounding(Text):
    """How derivatives of activations become a few bits."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class Auto(Text):
    """The values of the options ``norms``, ``pairs`` and ``dropouts``."""

    AUTO = "auto"
    KEEP = KEEP


@dataclass(frozen=True)
class Wishes:
    """The options of a conversion.

    Attributes:
        bits: Bits per element that activations save where a pair does not save more; None converts no activations.
        criterion: What their step functions are fitted to.
        norms: Whether norms are converted.
        pairs: Whether linear layers rebuild their input.
        dropouts: Whether dropouts are converted.
        exact: Whether only exact conversions are made.
        exclude: Name patterns of modules that are not converted.
        pair_groups: Bits per element, in groups, in which pairs keep what they start from; None to keep it as it is.
        norm_groups: Bits per element, in groups, in which norms save their normalized input; None to save what linear
            layers save anyway.
    """

    bits: int | None
    criterion: Criterion
    norms: bool
    pairs: bool
    dropouts: bool
    exact: bool
    exclude: tuple[str, ...]
    pair_groups: int | None = None
    norm_groups: int | None = None

    def keeps(self, kind: Kind) -> bool:
        """Whether conversion of a kind is turned off."""
        kept = {Kind.NORM: not self.norms, Kind.DROPOUT: not self.dropouts, Kind.COPY: not self.pairs}
        return kept.get(kind, self.bits is None)

    def excludes(self, name: str) -> bool:
        """Whether a module is excluded by name."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
