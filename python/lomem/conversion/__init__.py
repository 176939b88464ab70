"""Converting models: :func:`lomem.convert` and :func:`lomem.restore`."""

from ._convert import convert, restore
from ._report import Decision, Report

__all__ = ["Decision", "Report", "convert", "restore"]
