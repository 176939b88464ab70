"""Seeds of what is rounded at random, from lomem's own stream (:mod:`lomem.random`)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed"]


def draw_seed(like: Tensor) -> Tensor:
    """The next seed, 0-d int64, on the device of a tensor.

    torch's generators are read, not advanced: whatever else draws random numbers, in a checkpointed region that is
    recomputed too, draws the same with and without these seeds.
    """
    return torch.ops.lomem.draw_seed(like.detach())  # type: ignore[no-any-return]
