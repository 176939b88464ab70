"""The linear layer whose weight gradient is estimated."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["randomized_linear"]

_randomized_linear = torch.ops.lomem.randomized_linear.default


def randomized_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    matmul: str = "gaussian",
    proj_dim: int | None = None,
    proj_dim_ratio: float | None = None,
    proj_dim_min: int | None = None,
    proj_dim_max: int | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Linear layer that keeps a few random combinations of the rows of its input for the backward pass.

    The result is bit for bit ``F.linear(input, weight, bias)``, and the gradients of ``input`` and ``bias`` are exact.
    The gradient of ``weight`` is an unbiased estimate: with ``X`` the input and ``dY`` the gradient of the output, as
    matrices of ``rows`` rows, it is ``(S dY)^T (S X)``, where ``S`` is random, has ``proj_dim`` rows and
    ``E[S^T S] = 1`` (Bershatsky et al., arXiv:2201.13195). ``S X`` and a seed are kept; ``S`` itself is drawn again,
    piece by piece, in the backward pass. docs/linear.md has formulas, variances and when not to use it.

    The seed is drawn from a stream of lomem's own, see :mod:`lomem.random`: no generator of torch is advanced, and the
    numbers that others draw are the same as with ``F.linear``. It is drawn by the op that makes ``S X``, beside which
    it stays: whatever a checkpoint computes again, the gradient is estimated from what belongs together. Where
    ``weight`` requires no gradient, grad mode is off or all rows are kept, nothing is drawn: this is ``F.linear``, and
    so are its gradients.

    Args:
        input: Shape ``(*, in_features)``, any strides; float64, float32, bfloat16 or float16. Under autocast it is cast
            as by ``F.linear``, and compressed and kept in that dtype.
        weight: Shape ``(out_features, in_features)``, the dtype of ``input``.
        bias: Shape ``(out_features,)``, the dtype of ``input``.
        matmul: What ``S`` is: ``"gaussian"`` or ``"rademacher"``, independent elements; ``"dct"`` or ``"dft"``, rows
            of an orthonormal transform behind random signs; ``"crs"``, rows of the input drawn in proportion to their
            norms; ``"wta-crs"``, the rows of the largest norms, and others drawn (Liu et al., arXiv:2305.15265).
        proj_dim: Number of rows that are kept, at least 1. Either this or ``proj_dim_ratio`` must be given.
        proj_dim_ratio: Share of the rows that is kept, in (0, 1]; rounded to a whole number of rows, halves up.
        proj_dim_min: Then at least so many, but never more than there are.
        proj_dim_max: Then at most so many.
        seed: A seed of the caller's: 0-d int64, on the device of ``input``. The host never reads it, so that a captured
            graph may change it between replays.

    Returns:
        A tensor of shape ``(*, out_features)``. Saved for backward: ``proj_dim * in_features`` elements of the dtype of
        ``input``; 8 bytes, the seed; for ``"crs"`` and ``"wta-crs"`` ``8 * proj_dim`` bytes of indices; and ``weight``,
        if ``input`` requires a gradient. Second derivatives of ``weight``'s gradient raise; those of ``input``'s are
        exact.
    """
    return _randomized_linear(
        input,
        weight,
        bias,
        matmul=matmul,
        proj_dim=proj_dim,
        proj_dim_ratio=proj_dim_ratio,
        proj_dim_min=proj_dim_min,
        proj_dim_max=proj_dim_max,
        seed=seed,
    )
