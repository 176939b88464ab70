"""Bytes as people read them."""

from __future__ import annotations

__all__ = ["size", "unit_of"]

_UNITS = ("B", "KiB", "MiB", "GiB")


def unit_of(nbytes: float) -> tuple[str, int]:
    """The largest unit of which there is one or more (``"B"``, ``"KiB"``, ``"MiB"`` or ``"GiB"``), and its bytes."""
    # 1023.995 KiB and more would be written as 1024.0 KiB.
    power = next((p for p in (3, 2, 1) if abs(nbytes) >= 2 ** (10 * p) * (1 - 2**-14)), 0)
    return _UNITS[power], 2 ** (10 * power)


def size(nbytes: int) -> str:
    """Bytes in the unit that shows something: ``384 B``, ``1.25 KiB``, ``17.69 MiB``, ``260.1 MiB``."""
    unit, factor = unit_of(nbytes)
    if factor == 1:
        return f"{nbytes} B"
    value = nbytes / factor
    return f"{value:,.2f} {unit}" if abs(value) < 99.995 else f"{value:,.1f} {unit}"
