"""Seeds of what is rounded at random, from lomem's own stream (:mod:`lomem.random`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _C

__all__ = ["draw_seed"]


def draw_seed(like: Tensor) -> Tensor:
    """The next seed, 0-d int64, on the device of a tensor.

    torch's generators are read, not advanced: whatever else draws random numbers, in a checkpointed region that is
    recomputed too, draws the same with and without these seeds.
    """
    if like.is_meta or isinstance(like, FakeTensor):  # whose device need not exist
        return torch.empty((), dtype=torch.int64, device=like.device)
    return _C.draw_seed(like)
