"""Dropout that saves 1 bit per element, or a seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import is_jagged

__all__ = ["dropout"]

_dropout = torch.ops.lomem.dropout.default


def dropout(input: Tensor, p: float = 0.5, training: bool = True, *, saves: str = "mask") -> Tensor:
    """Dropout that saves 1 bit per element, or a seed, for the backward pass (torch saves 8 to 64 bits per element).

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        p: Probability of an element to be dropped, in [0, 1). The other elements are multiplied by ``1 / (1 - p)``.
        training: If false, or if ``p`` is 0, the result is ``input`` itself, as in torch.
        saves: ``"mask"``: 1 bit per element. The result equals ``F.dropout(input, p, training)`` bit for bit for the
            same state of torch's generator, which is left in the same state too. ``"seed"``: 8 bytes, from which the
            backward pass draws the mask again. The seed is one number of torch's generator, so other elements are
            dropped than torch drops; which ones follows from the seed alone, on every device.

    Returns:
        A tensor of the shape and dtype of ``input``, also under autocast. Gradients are exact, and can be
        differentiated again.

    Raises:
        RuntimeError: If ``input`` has another dtype or layout.
        ValueError: If ``p`` is not in [0, 1), or ``saves`` is unknown.
    """
    if is_jagged(input):
        return F.dropout(input, p, training)
    # (The op checks what is left.)
    if (not training or p == 0) and 0 <= p < 1 and saves in ("mask", "seed"):
        return input
    return _dropout(input, p, saves=saves)
