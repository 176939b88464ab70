"""Random seeds of randomized layers and of what is rounded at random, drawn from lomem's own stream.

torch's generators are never advanced. Each call of a randomized layer that compresses its input draws one seed, and so
does each tensor that a converted model keeps in groups, and each call of an activation that draws its codes. The seed
depends on three things: the initial seed of torch's default CPU generator at that time (which is read, never advanced),
the start of the stream, and the number of seeds drawn since. Building a module that draws, and converting a model to
one that does, restarts the stream at the current position of torch's default CPU generator. So a program that calls
:func:`torch.manual_seed`, builds its model and trains it draws the same seeds on every run, also when it does so twice
in one process. Processes with the same seed draw the same seeds; processes with different seeds draw different ones.

To restart the stream without rebuilding the model, call :func:`manual_seed`. To resume a run, save the state with
:func:`get_state` and restore it with :func:`set_state`.
"""

from __future__ import annotations

import operator

from . import _C

__all__ = ["get_state", "manual_seed", "set_state"]


def manual_seed(seed: int) -> None:
    """Restarts the stream of seeds.

    Args:
        seed: Any integer; it is reduced modulo 2^64. The seeds drawn also depend on the one passed to
            :func:`torch.manual_seed`.
    """
    _C.manual_seed(operator.index(seed) % 2**64)


def get_state() -> tuple[int, int]:
    """Returns the start of the stream and the number of seeds drawn since: two integers, for :func:`set_state`."""
    return _C.random_state()


def set_state(state: tuple[int, int]) -> None:
    """Restores a state from :func:`get_state`. The seed of torch's generator has to be restored through torch."""
    key, count = state
    _C.set_random_state((operator.index(key), operator.index(count)))
