"""FewBit's ``fewbit.functional.linear``: linear layers whose weight gradient is an unbiased estimate."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...._trace.autocast import autocast_dtype, autocast_to
from ....functional.linear import OP

__all__ = ["linear_crs", "linear_grp", "linear_randomized"]


def projected_rows(
    rows: int,
    proj_dim_ratio: float | None,
    proj_dim: int | None,
    proj_dim_max: int | None,
    proj_dim_min: int | None,
) -> int:
    """Number of rows that are saved of an input with ``rows`` rows, by FewBit's rules.

    ``proj_dim``, else ``int(proj_dim_ratio * rows)``, else all; then at least ``proj_dim_min`` and at most
    ``proj_dim_max``.
    """
    if proj_dim is not None:
        result = operator.index(proj_dim)
    elif proj_dim_ratio is not None:
        if not proj_dim_ratio > 0:
            raise ValueError(
                "lomem.compat.fewbit.functional.linear_grp: "
                f"proj_dim_ratio is {proj_dim_ratio!r}, expected a positive number"
            )
        result = max(1, int(proj_dim_ratio * rows))
    else:
        result = max(1, rows)
    result = result if proj_dim_min is None else max(result, proj_dim_min)
    return result if proj_dim_max is None else min(result, proj_dim_max)


def linear_grp(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    proj_dim_ratio: float | None = None,
    proj_dim: int | None = None,
    proj_dim_max: int | None = None,
    proj_dim_min: int | None = None,
    matmul: str = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``F.linear`` that saves random combinations of the rows of its input; see docs/linear.md.

    Args:
        input: Shape ``(*, in_features)``; float64, float32, bfloat16 or float16.
        weight: Shape ``(out_features, in_features)``.
        bias: Shape ``(out_features,)``.
        proj_dim_ratio: Fraction of the rows saved; the product is rounded down.
        proj_dim: Number of rows saved, instead of a fraction. With neither, all are saved.
        proj_dim_max: Maximum number of rows saved.
        proj_dim_min: Minimum number of rows saved; ``proj_dim_max`` goes before it.
        matmul: ``"gaussian"``, ``"rademacher"``, ``"dct"`` or ``"dft"``; also lomem's ``"crs"`` and ``"wta-crs"``.
        generator: Generator from which each call that compresses its input draws a seed. By default the seed is the
            next one of :mod:`lomem.random`, and no generator of torch is advanced.

    Returns:
        A tensor of shape ``(*, out_features)``, that of ``F.linear`` bit for bit. The gradients of ``input`` and
        ``bias`` are exact; that of ``weight`` is if as many rows are saved as there are.

    Raises:
        ValueError: If an argument is out of range.
    """
    rows = math.prod(input.shape[:-1])
    saved = projected_rows(rows, proj_dim_ratio, proj_dim, proj_dim_max, proj_dim_min)
    seed = None
    if generator is not None and saved < rows and weight.requires_grad and torch.is_grad_enabled():
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).to(input.device)
    return OP(input, weight, bias, matmul=matmul, proj_dim=saved, seed=seed)  # type: ignore[no-any-return]


linear_randomized = linear_grp


class _SampledColumns(torch.autograd.Function):
    """``F.linear`` that saves some columns of its input, from which it computes those columns of the gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, scales: Tensor
    ) -> Tensor:
        needed = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(input[..., columns], columns, scales, needed)
        ctx.shape = weight.shape
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        kept, columns, scales, weight = ctx.saved_tensors
        grads = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = grad_output.new_zeros(ctx.shape)
        grad_weight[:, columns] = (grads.t() @ kept.reshape(-1, kept.shape[-1])) * scales.to(grad_output.dtype)
        grad_input = grad_output @ weight if ctx.needs_input_grad[0] else None
        return grad_input, grad_weight, grads.sum(0) if ctx.needs_input_grad[2] else None, None, None


def linear_crs(input: Tensor, weight: Tensor, bias: Tensor | None, nopairs: int) -> Tensor:
    """``F.linear`` that saves a random sample of the columns (features) of its input.

    ``nopairs`` columns are drawn uniformly, with replacement, from torch's default CPU generator. The gradient of the
    weight is that of the columns drawn, times ``in_features / nopairs`` and the number of times that each was drawn,
    and 0 in the others: an unbiased estimate. (lomem's ``matmul="crs"`` samples rows, in proportion to their norms.)

    Args:
        input: Shape ``(*, in_features)``.
        weight: Shape ``(out_features, in_features)``.
        bias: Shape ``(out_features,)``, or None.
        nopairs: Number of columns drawn, at least 1. If that is ``in_features`` or more, all are saved and the gradient
            is exact.

    Returns:
        A tensor of shape ``(*, out_features)``, that of ``F.linear`` bit for bit. The gradients of ``input`` and
        ``bias`` are exact. Saved for backward: each column that was drawn, once; a scale and an index per column; the
        weight, if the input needs a gradient. Second derivatives raise.

    Raises:
        ValueError: If ``nopairs`` is not as described.
    """
    if isinstance(nopairs, bool) or not isinstance(nopairs, int) or nopairs < 1:
        raise ValueError(
            f"lomem.compat.fewbit.functional.linear_crs: nopairs is {nopairs!r}, expected an integer of at least 1"
        )
    features = weight.shape[1]
    if nopairs >= features or not (weight.requires_grad and torch.is_grad_enabled()):
        return F.linear(input, weight, bias)
    drawn, counts = torch.randint(features, (nopairs,)).unique(return_counts=True)
    columns, scales = drawn.to(input.device), (counts * (features / nopairs)).to(input.device)
    device = input.device.type
    dtype = autocast_dtype(device)
    cast = [_cast(tensor, dtype) for tensor in (input, weight, bias)]
    with autocast_to(device, None):
        return _SampledColumns.apply(*cast, columns, scales)  # type: ignore[no-any-return]


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """What autocast makes of an argument of ``F.linear``."""
    return tensor if dtype is None or tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
