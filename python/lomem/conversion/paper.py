"""The step functions of the paper, which :func:`lomem.functional.gelu` and ``silu`` do not know by a criterion."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import functional as LF
from ..reference import REGELU2, RESILU2
from ..steps import StepFunction
from .kinds import Function

__all__ = ["paper"]


def paper(function: Function) -> tuple[Callable[..., Tensor], StepFunction]:
    """The published activation of 2 bits (ReGELU2 or ReSiLU2), and its step function."""
    return (LF.regelu2, REGELU2) if function is Function.GELU else (LF.resilu2, RESILU2)
