"""LowMemoryBP's ``lomem.functional``: the functions of its three modules."""

from . import activation, normalization, packing
from .activation import *  # noqa: F403
from .normalization import *  # noqa: F403
from .packing import *  # noqa: F403

_modules = (activation, normalization, packing)
__all__ = [*(name for module in _modules for name in module.__all__ if not name.endswith("Function"))]
