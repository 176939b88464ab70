"""Low-rank adapters of linear layers, which save no copy of their input."""

from __future__ import annotations

import torch
from torch import Tensor

from .._sharding import is_distributed

__all__ = ["lora"]

_lora = torch.ops.lomem.lora.default


def lora(
    input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """What a low-rank adapter adds to the result of a linear layer (LoRA; Hu et al., arXiv:2106.09685).

    The result equals ``F.linear(F.linear(F.dropout(input.to(lora_a.dtype), p), lora_a), lora_b, bias) * scaling`` of
    torch's ops bit for bit, for the same state of the generator. They save the copy of ``input`` that ``lora_a`` takes,
    in its dtype, and the mask of dropout. Here ``input`` is saved as it is given, so that adapters on one tensor, and
    what else saves it, share it; the copy is made again in the backward pass and freed at once.

    Args:
        input: Shape ``(*, in_features)``, any strides; float64, float32, bfloat16 or float16.
        lora_a: Shape ``(rank, in_features)``, any of these dtypes. Under autocast, the weights are cast as in
            ``F.linear``; dropout takes place in the dtype that ``lora_a`` has before.
        lora_b: Shape ``(out_features, rank)``, same dtype as ``lora_a``.
        scaling: What the result is multiplied by.
        bias: Shape ``(out_features,)``, same dtype as ``lora_a``. It is scaled too.
        p: Probability that an element of ``input`` is dropped, in [0, 1).
        training: Whether anything is dropped.

    Returns:
        A tensor of shape ``(*, out_features)``, in the dtype of ``lora_a``, or under autocast in that of autocast.
        Saved for backward: ``input`` if ``lora_a`` requires a gradient; its product with ``lora_a``, of shape
        ``(*, rank)``, if ``lora_b`` does; 1 bit per element of ``input`` if ``p`` is not 0; and the weights. Second
        derivatives are exact.

    Raises:
        RuntimeError: If shapes, dtypes or devices do not match.
        ValueError: If ``scaling`` is not finite, or ``p`` not in [0, 1).
    """
    if is_distributed(input, lora_a, lora_b, bias):
        from .._sharding import products

        return products.lora(input, lora_a, lora_b, scaling, bias=bias, p=p if training else 0.0)  # type: ignore[no-any-return]
    return _lora(input, lora_a, lora_b, scaling, bias=bias, p=p if training else 0.0)
