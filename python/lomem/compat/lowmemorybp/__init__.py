"""LowMemoryBP's names: ``import lomem.compat.lowmemorybp as lomem``.

Everything is thin over lomem's own. docs/coming-from.md says what differs and why.
"""

from . import activation, functional, nn, normalization, packing

__all__ = ["activation", "functional", "nn", "normalization", "packing"]
