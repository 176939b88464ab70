"""Seeds for random rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 tensor on ``device``, drawn from torch's generator."""
    return torch.empty((), dtype=torch.int64, device=device).random_()
