"""Decides which candidates are converted together, and says why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .._trace.recorder import Storage
from .choose import Option, choose, shares
from .finder import Finder
from .kinds import Action, Kind
from .ledger import Candidate

__all__ = ["settle"]

#: Among conversions that free the same bytes, exact ones are preferred, and among those the simplest.
_ACTIVATIONS = (Kind.ACTIVATION, Kind.CALL)
_RANKS = {Action.INVERTED: 0, Action.EXACT: 0, Action.TWO_OUTPUTS: 1, Action.NORMALIZED: 2}


def settle(found: list[Candidate], finder: Finder, excluded: Callable[[str], bool]) -> None:
    """Chooses the set of conversions that minimizes the bytes saved for backward, and rejects the others.

    What a conversion frees depends on the others: of two norms with the same input, converting only one frees nothing.
    Nor does converting an activation after a norm that saves its output.

    Args:
        found: All candidates.
        finder: The runs.
        excluded: Whether the user excludes a module.
    """
    order = {name: i for i, name in enumerate(finder.modules)}
    found = sorted(found, key=lambda c: (order[c.name], c.kind))
    for c in found:
        inside = _left_inside(c, found, finder, excluded) if c.kind is Kind.CALL and not c.left else None
        if inside is not None:
            c.leave(f"{inside} inside it is not converted")
    candidates = [c for c in found if not c.left]
    options = [_option(c, candidates, finder) for c in candidates]
    items = [(storage.nbytes, positions) for storage, positions in finder.ledger.positions.items()]
    picked = choose(options, items)
    chosen = [candidates[i] for i in sorted(picked)]
    for i, (c, gain) in enumerate(zip(candidates, shares(options, items, picked), strict=True)):
        c.gain = gain
        if c not in chosen:
            inside = next((candidates[j].name for j in sorted(options[i].needs) if j not in picked), None)
            c.leave(_no_gain(c, chosen, finder) if inside is None else f"{inside} inside it is not converted")
        elif (alone := _alone(c, chosen)) is not None:
            c.reason = f"it saves less than before, though {alone}"
        elif (
            gain <= 0
            and c.kind in _ACTIVATIONS
            and (around := [d.name for d, o in zip(candidates, options, strict=True) if i in o.needs])
        ):
            c.reason = f"calls in {_some(around)} can only be replaced together with those in it"


def _left_inside(c: Candidate, found: list[Candidate], finder: Finder, excluded: Callable[[str], bool]) -> str | None:
    """A module that is not converted, but whose calls would be replaced along with those of the module around it."""
    for d in found:
        if d.kind in _ACTIVATIONS and d.left and c.contains(d.name):
            unknown = d.name in finder.callers or d.name not in finder.ran
            if d.name in finder.reached or (excluded(d.name) and unknown):
                return d.name
    known = {d.name for d in found}
    for name, module in finder.modules.items():
        own = next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn.")
        if own and c.contains(name) and name not in finder.ran | known and excluded(name):
            return name
    return None


def _option(c: Candidate, candidates: list[Candidate], finder: Finder) -> Option:
    rank = _RANKS.get(c.action, 3 * len(candidates))
    reached = [i for i, d in enumerate(candidates) if d.kind in _ACTIVATIONS and d.name in finder.reached]
    needs = frozenset(i for i in reached if c.kind is Kind.CALL and c.contains(candidates[i].name))
    needs |= {i for i, d in enumerate(candidates) if d.kind is Kind.DROPOUT and d.name in c.needs}
    return Option(frozenset(c.own | c.others), c.added, c.least, rank, needs)


def _alone(c: Candidate, chosen: list[Candidate]) -> str | None:
    """Why no other module saves what a norm saves, given the other conversions; None if one does."""
    if c.kind is not Kind.NORM or c.chained:
        return None
    who = {i: [d.name for d in chosen if d is not c and d.drops(i)] for i in c.sharing}
    if not all(who.values()):
        return None
    names = {name for converted in who.values() for name in converted}
    return f"{_some(names)} no longer {'save' if len(names) > 1 else 'saves'} its output" if names else c.takers


def _no_gain(c: Candidate, chosen: list[Candidate], finder: Finder) -> str:
    """Why a candidate frees too little, given the other conversions."""
    ledger = finder.ledger
    if not c.own | c.others:
        return "it saves nothing"
    alone = _alone(c, chosen)
    if alone is not None:
        return alone
    kept, others = set(), set()
    for i in ledger.of(ledger.storages(c.own)) - c.own:
        if not any(d.drops(i) for d in chosen):
            kept.add(ledger.saved[i].storage)
            others.add(ledger.saved[i].module or "")
    for d in chosen:
        # A converted norm that saves the same tensor.
        if d.kind is Kind.NORM and (mine := c.own & d.sharing):
            kept |= ledger.storages(mine)
            others.add(d.name)
    if not others:
        return "converting it would free hardly anything"
    return f"{_what(c, kept, finder)} is also saved by {_some(others)}"


def _what(c: Candidate, storages: set[Storage], finder: Finder) -> str:
    calls = finder.flows[0].calls_of(c.name)
    if c.kind is Kind.CALL:
        return "its input"
    if storages <= {call.result for call in calls}:
        return "its output"
    inside = any(call.start <= storage.born < call.end for call in calls for storage in storages)
    return "part of what it saves" if inside else "its input"


def _some(names: Iterable[str]) -> str:
    listed = sorted(name or "the model" for name in names)
    return ", ".join(listed[:3]) + (" and others" if len(listed) > 3 else "")
