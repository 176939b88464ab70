"""Picks the set of options that frees the most: a search that knows nothing about models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["EXACT", "Option", "choose", "shares"]

#: Up to this many interdependent options, every set is tried; beyond it, only neighbours of good sets.
EXACT = 12


@dataclass(frozen=True)
class Option:
    """Something that may be chosen or not.

    Attributes:
        drops: Parts of items that it drops.
        added: Its cost.
        least: Its gain, given the other chosen options, must exceed this.
        rank: Breaks ties: of sets with equal gain, the one with the smallest sum of ranks is preferred.
        needs: Positions of the options that it requires.
    """

    drops: frozenset[int]
    added: int = 0
    least: int = 0
    rank: int = 0
    needs: frozenset[int] = frozenset()


def choose(options: Sequence[Option], items: Iterable[tuple[int, Iterable[int]]], exact: int = EXACT) -> set[int]:
    """The set of options with the largest gain: the sizes of the items freed, minus the costs of the options.

    Args:
        options: All options.
        items: Size and parts of each item. An item is freed when all of its parts are dropped, by any options.
        exact: Maximum number of interdependent options for which every combination is tried.

    Returns:
        Positions of the chosen options. Removing any one of them would lower the gain by more than its ``least``.
    """
    groups = _groups(options, items)
    chosen: set[int] = set()
    for members in _components(options, groups):
        problem = _Problem(options, members, groups)
        best = problem.by_enumeration() if len(members) <= exact else problem.by_search()
        chosen |= {i for i in members if best >> i & 1}
    return chosen


def shares(options: Sequence[Option], items: Iterable[tuple[int, Iterable[int]]], chosen: set[int]) -> list[int]:
    """The share of each option in the gain of a set; the shares add up to the gain.

    The size of an item is split among the options without which it would not be freed. If there are none, because
    several options drop each part, it is split among all that take part.
    """
    result = [-option.added if i in chosen else 0 for i, option in enumerate(options)]
    for size, masks in _groups(options, items):
        done = [[i for i in sorted(chosen) if mask >> i & 1] for mask in masks]
        if not all(done):
            continue
        alone = sorted({who[0] for who in done if len(who) == 1})
        parts = alone or sorted({i for who in done for i in who})
        for k, i in enumerate(parts):
            result[i] += size // len(parts) + (k < size % len(parts))
    return result


_Group = tuple[int, tuple[int, ...]]


def _groups(options: Sequence[Option], items: Iterable[tuple[int, Iterable[int]]]) -> list[_Group]:
    """The items that can be freed: size, and for each part a bit mask of the options that drop it. Equal ones merge."""
    droppers: dict[int, int] = {}
    for i, option in enumerate(options):
        for part in option.drops:
            droppers[part] = droppers.get(part, 0) | 1 << i
    sizes: dict[tuple[int, ...], int] = {}
    for size, parts in items:
        masks = {droppers.get(part, 0) for part in parts}
        if 0 not in masks:
            # A part with more droppers is implied by one whose droppers are a subset.
            least = tuple(sorted(m for m in masks if not any(o != m and o & m == o for o in masks)))
            sizes[least] = sizes.get(least, 0) + size
    return [(size, masks) for masks, size in sizes.items()]


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _components(options: Sequence[Option], groups: Iterable[_Group]) -> list[list[int]]:
    """Groups of options that depend on one another through items or needs."""
    parent = list(range(len(options)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for _, masks in groups:
        together = [i for mask in masks for i in _bits(mask)]
        for i in together[1:]:
            parent[root(i)] = root(together[0])
    for i, option in enumerate(options):
        for j in option.needs:
            parent[root(j)] = root(i)
    found: dict[int, list[int]] = {}
    for i in range(len(options)):
        found.setdefault(root(i), []).append(i)
    return list(found.values())


class _Problem:
    """The choice among interdependent options. Sets are integers with one bit per option."""

    def __init__(self, options: Sequence[Option], members: list[int], groups: list[_Group]) -> None:
        self.options, self.members = options, members
        mine = sum(1 << i for i in members)
        self.groups = [(size, masks) for size, masks in groups if masks[0] & mine]
        self.touching = {i: [g for g in self.groups if any(m >> i & 1 for m in g[1])] for i in members}
        self.needs = {i: sum(1 << j for j in options[i].needs) for i in members}

    def value(self, chosen: int) -> int:
        """The gain of a set."""
        gone = sum(size for size, masks in self.groups if all(mask & chosen for mask in masks))
        return gone - sum(self.options[i].added for i in _bits(chosen))

    def change(self, before: int, after: int) -> int:
        """The gain of one set minus that of another."""
        touched = {id(g): g for i in _bits(before ^ after) for g in self.touching[i]}.values()
        result = sum(self.options[i].added for i in _bits(before & ~after))
        result -= sum(self.options[i].added for i in _bits(after & ~before))
        for size, masks in touched:
            result += size * (all(m & after for m in masks) - all(m & before for m in masks))
        return result

    def order(self, chosen: int) -> tuple[int, ...]:
        """Tie-breaker: of sets with equal gain, the one with the greatest value is preferred."""
        members = list(_bits(chosen))
        return -sum(self.options[i].rank for i in members), -len(members), -chosen

    def without(self, chosen: int, i: int) -> int:
        """A set without an option and those that need it."""
        chosen &= ~(1 << i)
        for j in _bits(chosen):
            if chosen >> j & 1 and self.needs[j] & ~chosen:
                chosen = self.without(chosen, j)
        return chosen

    def with_needs(self, chosen: int, i: int) -> int:
        """A set with an option added, and those that it needs."""
        chosen |= 1 << i
        for j in _bits(self.needs[i] & ~chosen):
            chosen = self.with_needs(chosen, j)
        return chosen

    def allowed(self, chosen: int) -> bool:
        """Whether all options have what they need, and gain more than their ``least``."""
        return not any(self.needs[i] & ~chosen for i in _bits(chosen)) and self.weakest(chosen) is None

    def weakest(self, chosen: int) -> int | None:
        """The option with the smallest gain in a set if that is too small, otherwise None."""
        margins = [(self.change(self.without(chosen, i), chosen) - self.options[i].least, i) for i in _bits(chosen)]
        worst = min(margins, default=(1, -1))
        return worst[1] if worst[0] <= 0 else None

    def by_enumeration(self) -> int:
        """The best of all sets."""
        sets = [0]
        for i in self.members:
            sets += [chosen | 1 << i for chosen in sets]
        # allowed() is slow, so it is called on the best sets first. The empty set is always allowed.
        values = sorted(((self.value(chosen), self.order(chosen), chosen) for chosen in sets), reverse=True)
        return next(chosen for _, _, chosen in values if self.allowed(chosen))

    def by_search(self) -> int:
        """The best of several local optima."""
        everything = 0
        for i in self.members:
            everything = self.with_needs(everything, i)
        found = []
        for start in (everything, 0, self.greedy()):
            chosen = self.improve(start, lambda _: True)
            while (weakest := self.weakest(chosen)) is not None:
                chosen = self.without(chosen, weakest)
            found.append(self.improve(chosen, self.allowed))
        return max(found, key=lambda chosen: (self.value(chosen), self.order(chosen)))

    def greedy(self) -> int:
        """Adds the option with the largest gain until none helps."""
        chosen = 0
        while True:
            added = [self.with_needs(chosen, i) for i in self.members if not chosen >> i & 1]
            best = max(added, key=lambda after: self.change(chosen, after), default=chosen)
            if self.change(chosen, best) <= 0:
                return chosen
            chosen = best

    def improve(self, chosen: int, allowed: Callable[[int], bool]) -> int:
        """Takes steps as long as one leads to a better set: a local search."""

        def better(after: int) -> bool:
            more = self.change(chosen, after)
            return (more > 0 or (more == 0 and self.order(after) > self.order(chosen))) and allowed(after)

        places: list[int | _Group] = [*self.members, *self.groups]
        in_vain = 0
        for place in itertools.cycle(places):
            after = next((after for after in self.steps(chosen, place) if better(after)), None)
            chosen, in_vain = (chosen, in_vain + 1) if after is None else (after, 0)
            if in_vain == len(places):
                break
        return chosen

    def steps(self, chosen: int, place: int | _Group) -> Iterator[int]:
        """Neighbours of a set: with one option added, removed or replaced, or with all options that free an item."""
        if isinstance(place, int):
            yield self.without(chosen, place) if chosen >> place & 1 else self.with_needs(chosen, place)
            return
        everyone = 0
        for mask in place[1]:
            everyone |= mask
        after = chosen
        for i in _bits(everyone & ~chosen):
            after = self.with_needs(after, i)
            less = chosen
            for j in _bits(everyone & chosen):
                less = self.without(less, j)
                yield self.with_needs(self.without(chosen, j), i)
            yield self.with_needs(less, i)
        yield after
