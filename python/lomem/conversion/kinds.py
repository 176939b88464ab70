"""Enums of a conversion: what is converted, how, and with what options."""

from __future__ import annotations

import enum

__all__ = ["KEEP", "Action", "Criterion", "Function", "Kind", "Norms", "ResultDtype", "Text"]

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


class Action(Text):
    """How a module is converted."""

    LEFT = "left"
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

    @classmethod
    def of_bits(cls, bits: int) -> Action:
        """The action for an activation that saves this many bits per element."""
        return cls(f"{bits}bit")


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
    """What the step functions of activations are fitted to."""

    DERIVATIVE = "derivative"
    PRIMITIVE = "primitive"
    PAPER = "paper"


class Norms(Text):
    """The values of the option ``norms``."""

    AUTO = "auto"
    KEEP = KEEP
