"""Converting models: :func:`lomem.convert` and :func:`lomem.restore`."""

from . import earlier
from .convert import NothingToConvertError, convert, restore
from .kinds import Action, Criterion, Kind
from .report import Decision, Report

__all__ = [
    "Action",
    "Criterion",
    "Decision",
    "Kind",
    "NothingToConvertError",
    "Report",
    "convert",
    "restore",
]
