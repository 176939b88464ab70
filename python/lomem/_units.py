"""Byte counts with human-readable units."""

from __future__ import annotations

__all__ = ["size", "unit_of"]

_UNITS = ("B", "KiB", "MiB", "GiB")


def unit_of(nbytes: float) -> tuple[str, int]:
    """The largest unit (``"B"``, ``"KiB"``, ``"MiB"`` or ``"GiB"``) not above ``nbytes``, and its size in bytes."""
    # 1023.995 KiB and above would print as 1024.0 KiB, so they use the next unit.
    power = next((p for p in (3, 2, 1) if abs(nbytes) >= 2 ** (10 * p) * (1 - 2**-14)), 0)
    return _UNITS[power], 2 ** (10 * power)


def size(nbytes: int) -> str:
    """Formats a byte count with a suitable unit: ``384 B``, ``1.25 KiB``, ``17.69 MiB``, ``260.1 MiB``."""
    unit, factor = unit_of(nbytes)
    if factor == 1:
        return f"{nbytes} B"
    value = nbytes / factor
    return f"{value:,.2f} {unit}" if abs(value) < 99.995 else f"{value:,.1f} {unit}"
