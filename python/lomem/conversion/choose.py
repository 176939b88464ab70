"""Which of several options together let go the most: a search that knows nothing of models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["EXACT", "Option", "choose", "shares"]

#: Of so many options that depend on one another every set is looked at; of more, those near to good ones.
EXACT = 12


@dataclass(frozen=True)
class Option:
    """What may be done or not.

    Attributes:
        drops: What it lets go, of the parts of items.
        added: What it costs.
        least: What it must bring more than, the others being what they are.
        rank: Of sets that bring the same, those with the smallest sum are preferred.
        needs: Positions of the options without which it may not be done.
    """

    drops: frozenset[int]
    added: int = 0
    least: int = 0
    rank: int = 0
    needs: frozenset[int] = frozenset()


def choose(options: Sequence[Option], items: Iterable[tuple[int, Iterable[int]]], exact: int = EXACT) -> set[int]:
    """The set of options that brings the most: the sizes of the items that are gone, less what the options cost.

    Args:
        options: All of them.
        items: Size and parts of each. An item is gone when all of its parts are let go, by whichever options.
        exact: Up to how many options that depend on one another are tried in every combination.

    Returns:
        Positions of options. Each brings more than its least: without it, the others would bring less by that.
    """
    groups = _groups(options, items)
    chosen: set[int] = set()
    for members in _components(options, groups):
        problem = _Problem(options, members, groups)
        best = problem.by_enumeration() if len(members) <= exact else problem.by_search()
        chosen |= {i for i in members if best >> i & 1}
    return chosen


def shares(options: Sequence[Option], items: Iterable[tuple[int, Iterable[int]]], chosen: set[int]) -> list[int]:
    """What each option brings, in a set of them; of all together, the sum.

    The size of an item is split among those without whom it would not be gone; where several ways lead there, among all
    who take part.
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
    """The items that can be gone: size, and of each part who lets it go, as bits; alike ones together."""
    droppers: dict[int, int] = {}
    for i, option in enumerate(options):
        for part in option.drops:
            droppers[part] = droppers.get(part, 0) | 1 << i
    sizes: dict[tuple[int, ...], int] = {}
    for size, parts in items:
        masks = {droppers.get(part, 0) for part in parts}
        if 0 not in masks:
            # Who lets one part go for sure lets those go that more can.
            least = tuple(sorted(m for m in masks if not any(o != m and o & m == o for o in masks)))
            sizes[least] = sizes.get(least, 0) + size
    return [(size, masks) for masks, size in sizes.items()]


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _components(options: Sequence[Option], groups: Iterable[_Group]) -> list[list[int]]:
    """Options that depend on one another, by items or needs."""
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
    """Of options that depend on one another. Sets are integers, a bit for each option."""

    def __init__(self, options: Sequence[Option], members: list[int], groups: list[_Group]) -> None:
        self.options, self.members = options, members
        mine = sum(1 << i for i in members)
        self.groups = [(size, masks) for size, masks in groups if masks[0] & mine]
        self.touching = {i: [g for g in self.groups if any(m >> i & 1 for m in g[1])] for i in members}
        self.needs = {i: sum(1 << j for j in options[i].needs) for i in members}

    def value(self, chosen: int) -> int:
        """What a set brings."""
        gone = sum(size for size, masks in self.groups if all(mask & chosen for mask in masks))
        return gone - sum(self.options[i].added for i in _bits(chosen))

    def change(self, before: int, after: int) -> int:
        """What one set brings more than another."""
        touched = {id(g): g for i in _bits(before ^ after) for g in self.touching[i]}.values()
        result = sum(self.options[i].added for i in _bits(before & ~after))
        result -= sum(self.options[i].added for i in _bits(after & ~before))
        for size, masks in touched:
            result += size * (all(m & after for m in masks) - all(m & before for m in masks))
        return result

    def order(self, chosen: int) -> tuple[int, ...]:
        """Of sets that bring the same, the greatest is preferred."""
        members = list(_bits(chosen))
        return -sum(self.options[i].rank for i in members), -len(members), -chosen

    def without(self, chosen: int, i: int) -> int:
        """A set less an option, and those that need it."""
        chosen &= ~(1 << i)
        for j in _bits(chosen):
            if chosen >> j & 1 and self.needs[j] & ~chosen:
                chosen = self.without(chosen, j)
        return chosen

    def with_needs(self, chosen: int, i: int) -> int:
        """A set and an option, and those that it needs."""
        chosen |= 1 << i
        for j in _bits(self.needs[i] & ~chosen):
            chosen = self.with_needs(chosen, j)
        return chosen

    def allowed(self, chosen: int) -> bool:
        """Whether all have what they need, and bring more than their least."""
        return not any(self.needs[i] & ~chosen for i in _bits(chosen)) and self.weakest(chosen) is None

    def weakest(self, chosen: int) -> int | None:
        """The option that brings the least in a set, where that is too little."""
        margins = [(self.change(self.without(chosen, i), chosen) - self.options[i].least, i) for i in _bits(chosen)]
        worst = min(margins, default=(1, -1))
        return worst[1] if worst[0] <= 0 else None

    def by_enumeration(self) -> int:
        """The best of all sets."""
        sets = [0]
        for i in self.members:
            sets += [chosen | 1 << i for chosen in sets]
        # Most sets are not worth asking whether they are allowed. The empty one is.
        values = sorted(((self.value(chosen), self.order(chosen), chosen) for chosen in sets), reverse=True)
        return next(chosen for _, _, chosen in values if self.allowed(chosen))

    def by_search(self) -> int:
        """The best of some sets from which no small step leads to a better one."""
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
        """One option after the other, each the one that brings the most."""
        chosen = 0
        while True:
            added = [self.with_needs(chosen, i) for i in self.members if not chosen >> i & 1]
            best = max(added, key=lambda after: self.change(chosen, after), default=chosen)
            if self.change(chosen, best) <= 0:
                return chosen
            chosen = best

    def improve(self, chosen: int, allowed: Callable[[int], bool]) -> int:
        """Takes steps as long as one leads to a better set."""

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
        """Sets that are near to a set: less or more an option, one in place of others, all that let an item go."""
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
