"""Gated units, which save their operands alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._sharding import is_distributed
from .activations import is_jagged

__all__ = ["gated", "gated_linear"]

_gated = torch.ops.lomem.gated.default
_gated_linear = torch.ops.lomem.gated_linear.default


def gated(gate: Tensor, up: Tensor | None = None, activation: str = "silu", *, layout: str = "gate_up") -> Tensor:
    """Gated unit ``activation(gate) * up`` that saves ``gate`` and ``up`` alone (Shazeer, arXiv:2002.05202).

    The result equals ``activation(gate) * up`` of torch's ops bit for bit. They also save ``activation(gate)``, which
    is computed again here; the gradients are computed in one pass, in float32 for 16-bit dtypes, and rounded once.

    Args:
        gate: Any shape and strides; float64, float32, bfloat16 or float16. Without ``up``, shape ``(*, 2 * features)``:
            both operands in one tensor, as a fused projection returns them. Views, such as halves of a tensor, are
            saved as views.
        up: Same shape and dtype as ``gate``.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` or ``"gelu_tanh"`` (GeGLU), ``"relu"`` (ReGLU) or ``"sigmoid"``
            (GLU).
        layout: Without ``up``, where the operands are in the last dimension of ``gate``: ``"gate_up"`` or ``"up_gate"``
            (one half each), or ``"interleaved"`` (``gate`` at even places, ``up`` at odd ones).

    Returns:
        A tensor of the shape of ``up``, or ``(*, features)``, in the dtype of ``gate``, also under autocast. Second
        derivatives are exact.

    Raises:
        RuntimeError: If shapes, dtypes or devices do not match, or the last dimension of one tensor for both operands
            is not even.
        ValueError: If ``activation`` or ``layout`` is unknown.
    """
    if is_jagged(gate) or is_jagged(up):
        return reference.gated(gate, up, activation, layout=layout)
    return _gated(gate, up, activation, layout=layout)


def gated_linear(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    *,
    layout: str = "gate_up",
) -> Tensor:
    """``F.linear(gated(gate, up), weight, bias)`` that does not save the input of the linear layer.

    It is computed again in the backward pass, in the pass over ``gate`` and ``up`` that computes their gradients. Saved
    for backward are ``gate``, ``up`` and ``weight``.

    Args:
        gate: As in :func:`gated`, with at least one dimension.
        up: As in :func:`gated`.
        weight: Shape ``(out_features, features)``. If its dtype is not that of ``gate``, the result of the unit is
            rounded to it. Under autocast, ``weight`` and ``bias`` are cast as in ``F.linear``.
        bias: Shape ``(out_features,)``, same dtype as ``weight``.
        activation: As in :func:`gated`.
        layout: As in :func:`gated`.

    Returns:
        A tensor of shape ``(*, out_features)`` in the dtype of ``weight``. Second derivatives are exact.

    Raises:
        RuntimeError: As :func:`gated`, and if ``weight`` or ``bias`` do not match.
        ValueError: As :func:`gated`.
    """
    if is_distributed(gate, up, weight, bias):
        from .._sharding import products

        return products.gated_linear(gate, up, weight, bias, activation, layout=layout)  # type: ignore[no-any-return]
    return _gated_linear(gate, up, weight, bias, activation, layout=layout)
