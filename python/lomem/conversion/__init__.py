"""Converting models: :func:`lomem.convert` and :func:`lomem.restore`."""

from . import earlier
from .convert import NothingToConvertError, convert, restore
from .fidelity import GradientFidelity, GradientWarning
from .kinds import Action, Criterion, Kind
from .report import Decision, Report

__all__ = [
    "Action",
    "Criterion",
    "Decision",
    "GradientFidelity",
    "GradientWarning",
    "Kind",
    "NothingToConvertError",
    "Report",
    "convert",
    "restore",
]
