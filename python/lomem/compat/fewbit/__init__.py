"""FewBit's names: ``import lomem.compat.fewbit as fewbit``.

Everything is thin over lomem's own: functions over :mod:`lomem.functional`, modules over :mod:`lomem.nn`.
docs/coming-from.md says what differs and why.
"""

from . import functional, modules, util
from .modules import *  # noqa: F403
from .util import convert_linear, map_module

__all__ = [*modules.__all__, "convert_linear", "functional", "map_module", "modules", "util"]
