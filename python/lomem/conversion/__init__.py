"""Converting models: :func:`lomem.convert` and :func:`lomem.restore`."""

from ._convert import NothingToConvertError, convert, restore
from ._report import Decision, Report

__all__ = ["Decision", "NothingToConvertError", "Report", "convert", "restore"]
