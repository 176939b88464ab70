"""LowMemoryBP's ``lomem.functional``: the functions of its three modules."""

from . import activation, normalization, packing
from .activation import *  # noqa: F403
from .normalization import *  # noqa: F403
from .packing import *  # noqa: F403

__all__ = [
    name for module in (activation, normalization, packing) for name in module.__all__ if not name.endswith("Function")
]
