"""LowMemoryBP's module of this name; see :mod:`lomem.compat.lowmemorybp.normalization`."""

from .compat.lowmemorybp import normalization
from .compat.lowmemorybp.normalization import *  # noqa: F403

__all__ = [*normalization.__all__]
