"""Linear layer with an estimated weight gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._sharding import is_distributed

__all__ = ["randomized_linear"]  # and OP, the op itself, for the rest of the package

OP = torch.ops.lomem.randomized_linear.default


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
    """Linear layer that saves a few random combinations of the rows of its input for the backward pass.

    The result equals ``F.linear(input, weight, bias)`` bit for bit, and the gradients of ``input`` and ``bias`` are
    exact. The gradient of ``weight`` is an unbiased estimate: with the input ``X`` and the gradient of the output
    ``dY`` as matrices with ``rows`` rows, it is ``(S dY)^T (S X)``, where ``S`` is random, has ``proj_dim`` rows and
    ``E[S^T S] = 1`` (Bershatsky et al., arXiv:2201.13195). Only ``S X`` and a seed are saved; ``S`` is regenerated
    block by block in the backward pass. docs/linear.md has formulas, variances and when not to use it.

    The seed comes from lomem's own stream, see :mod:`lomem.random`: no torch generator is advanced, so all other random
    numbers are the same as with ``F.linear``. The op that computes ``S X`` draws the seed and returns the two together,
    so that they match even if a checkpoint recomputes them. If ``weight`` requires no gradient, grad mode is off or all
    rows are saved, no seed is drawn, and results and gradients are those of ``F.linear``.

    Args:
        input: Shape ``(*, in_features)``, any strides; float64, float32, bfloat16 or float16. Under autocast it is cast
            as in ``F.linear``, and compressed and saved in that dtype.
        weight: Shape ``(out_features, in_features)``, same dtype as ``input``.
        bias: Shape ``(out_features,)``, same dtype as ``input``.
        matmul: Distribution of ``S``. ``"gaussian"`` or ``"rademacher"``: independent elements. ``"dct"`` or ``"dft"``:
            rows of an orthonormal transform after random sign flips. ``"crs"``: rows of the input sampled in proportion
            to their norms. ``"wta-crs"``: the rows with the largest norms, plus sampled ones (Liu et al.,
            arXiv:2305.15265).
        proj_dim: Number of rows saved, at least 1. Either this or ``proj_dim_ratio`` must be given.
        proj_dim_ratio: Fraction of the rows saved, in (0, 1]; rounded to a whole number of rows, halves up.
        proj_dim_min: Minimum number of rows saved, capped at the number of rows of the input.
        proj_dim_max: Maximum number of rows saved.
        seed: User-supplied seed: a 0-d int64 tensor on the device of ``input``. The host never reads it, so it can
            change between replays of a captured graph.

    Returns:
        A tensor of shape ``(*, out_features)``. Saved for backward: ``proj_dim * in_features`` elements in the dtype of
        ``input``; 8 bytes for the seed; ``8 * proj_dim`` bytes of indices for ``"crs"`` and ``"wta-crs"``; and
        ``weight`` if ``input`` requires a gradient. Second derivatives through the gradient of ``weight`` raise; those
        through the gradient of ``input`` are exact.
    """
    options = {
        "matmul": matmul,
        "proj_dim": proj_dim,
        "proj_dim_ratio": proj_dim_ratio,
        "proj_dim_min": proj_dim_min,
        "proj_dim_max": proj_dim_max,
    }
    if is_distributed(input, weight, bias):
        from .._sharding import products

        return products.compressed_linear(input, weight, bias, seed=seed, **options)  # type: ignore[no-any-return]
    return OP(input, weight, bias, **options, seed=seed)
