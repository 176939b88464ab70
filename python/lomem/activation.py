"""LowMemoryBP's module of this name; see :mod:`lomem.compat.lowmemorybp.activation`."""

from .compat.lowmemorybp import activation
from .compat.lowmemorybp.activation import *  # noqa: F403

__all__ = [*activation.__all__]
