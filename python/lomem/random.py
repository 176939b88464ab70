"""The random numbers of randomized layers: a stream of seeds of lomem's own, which shifts nobody else's numbers.

Every call of a randomized layer that compresses its input draws one seed. It follows from three things: the initial
seed of torch's default CPU generator when it is drawn (which is read, never advanced), where the stream began, and how
many seeds were drawn since. A stream begins wherever a :class:`lomem.nn.RandomizedLinear` is built, at the position of
torch's default CPU generator. So a program that calls :func:`torch.manual_seed`, builds its model and trains it draws
the same seeds whenever it runs, twice in one process too. Processes with one seed draw alike, with different seeds
differently.

Without building a model anew, :func:`manual_seed` begins the stream anew, and :func:`get_state` and :func:`set_state`
go on where a run ended.
"""

from __future__ import annotations

import operator

from . import _C

__all__ = ["get_state", "manual_seed", "set_state"]


def manual_seed(seed: int) -> None:
    """Begins the stream of seeds anew.

    Args:
        seed: Any integer, of which 64 bits count. Seeds that are drawn follow from the one of :func:`torch.manual_seed`
            too.
    """
    _C.manual_seed(operator.index(seed) % 2**64)


def get_state() -> tuple[int, int]:
    """Returns where the stream began and how many seeds were drawn since: two integers, for :func:`set_state`."""
    return _C.random_state()


def set_state(state: tuple[int, int]) -> None:
    """Goes on from a state that :func:`get_state` returned; the seed of torch's generator is torch's to restore."""
    key, count = state
    _C.set_random_state((operator.index(key), operator.index(count)))
