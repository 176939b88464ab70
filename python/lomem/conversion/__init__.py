"""Converting models: :func:`lomem.convert` and :func:`lomem.restore`."""

from .convert import NothingToConvertError, convert, restore
from .report import Decision, Report

__all__ = ["Decision", "NothingToConvertError", "Report", "convert", "restore"]
