"""LowMemoryBP's module of this name; see :mod:`lomem.compat.lowmemorybp.packing`."""

from .compat.lowmemorybp import packing
from .compat.lowmemorybp.packing import *  # noqa: F403

__all__ = [*packing.__all__]
