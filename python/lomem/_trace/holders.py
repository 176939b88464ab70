"""Which modules hold what is saved for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

__all__ = ["holders_of", "large_holders"]


def holders_of(saved: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes by module, largest first. Numbers in names become ``*``, so that equal layers are one holder.

    Args:
        saved: Names of modules, and sizes of what they saved.
    """
    holders: Counter[str] = Counter()
    for name, nbytes in saved:
        holders[".".join("*" if part.isdecimal() else part for part in name.split("."))] += nbytes
    return dict(holders.most_common())


def large_holders(holders: Mapping[str, int]) -> dict[str, int]:
    """Those with at least 1 % of the bytes."""
    total = sum(holders.values())
    return {name: nbytes for name, nbytes in holders.items() if 100 * nbytes >= total}
