"""Dropout as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout` that saves 1 bit per element, or a seed; see :func:`lomem.functional.dropout`.

    Args:
        p: Probability of an element to be dropped, in [0, 1).
        inplace: False. The result is always a tensor of its own.
        saves: What is saved for backward: ``"mask"`` or ``"seed"``.

    Raises:
        ValueError: If ``p`` is not in [0, 1), ``inplace`` is true, or ``saves`` is unknown.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, saves: str = "mask") -> None:
        if inplace:
            raise ValueError("lomem.nn.Dropout: inplace is True, expected False: the input is not overwritten")
        # Calling the op on the meta device checks the arguments here rather than in the first forward pass.
        F.dropout(torch.empty(2, device="meta"), p, saves=saves)
        super().__init__(p)
        self.saves = saves

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` with some elements set to 0 and the others scaled; in evaluation mode, ``input`` itself."""
        return F.dropout(input, self.p, self.training, saves=self.saves)

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        return f"p={self.p}, saves={self.saves!r}"
