"""FewBit's ``fewbit.modules.variance``: how large the noise of a randomized linear layer is, next to the batch's.

``X`` is the input and ``Y`` the gradient of the output, as matrices with a row per example. The formulas are those of
Bershatsky et al., arXiv:2201.13195, section 2.3. For the exact variances of lomem's matrices see docs/linear.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.linear import projected_rows
from ..functional.variance import GradientStorage, catch_gradients

__all__ = ["VarianceEstimator"]  # and the three estimates, which FewBit does not export either

_SIZES = ("proj_dim_ratio", "proj_dim", "proj_dim_max", "proj_dim_min")


def _square(tensor: Tensor) -> Tensor:
    return tensor.square().sum()


def estimate_correlation(input: Tensor, output: Tensor) -> Tensor:
    """``‖X^T Y‖^2 / (‖X‖^2 ‖Y‖^2)``, between 0 and 1.

    Args:
        input: ``X``, shape ``(rows, in_features)``.
        output: ``Y``, shape ``(rows, out_features)``.
    """
    return _square(input.t() @ output) / (_square(input) * _square(output))


def estimate_variance_sgd(input: Tensor, output: Tensor, bs: int | None = None) -> Tensor:
    """Variance of the gradient of the weight over batches: ``(B sum_k ‖x_k‖^2 ‖y_k‖^2 - ‖X^T Y‖^2) / (B - 1)``.

    Args:
        input: ``X``, shape ``(rows, in_features)``.
        output: ``Y``, shape ``(rows, out_features)``.
        bs: ``B``, by default the number of rows. With 1 the result is NaN.
    """
    bs = input.shape[0] if bs is None else bs
    products = input.square().sum(1) @ output.square().sum(1)
    difference = bs * products - _square(input.t() @ output)
    return difference / (bs - 1) if bs > 1 else torch.full_like(difference, math.nan)


def estimate_variance_rmm(input: Tensor, output: Tensor, bs_proj: int | None = None) -> Tensor:
    """Variance of the estimate of the gradient for one batch: ``(‖X‖^2 ‖Y‖^2 - ‖X^T Y‖^2) / B_proj``.

    Args:
        input: ``X``, shape ``(rows, in_features)``.
        output: ``Y``, shape ``(rows, out_features)``.
        bs_proj: ``B_proj``, the number of rows saved, by default all.
    """
    bs_proj = input.shape[0] if bs_proj is None else bs_proj
    return (_square(input) * _square(output) - _square(input.t() @ output)) / bs_proj


class _Estimates(GradientStorage):
    """Estimates after each backward pass."""

    def __init__(self, callback: Callable[[Tensor, Tensor, Tensor, int], Any] | None) -> None:
        super().__init__()
        self.callback = callback
        self.step = 0
        self.variance: tuple[Tensor, Tensor, Tensor] | None = None
        self.bs: int | None = None
        self.bs_proj: int | None = None

    def postprocess(self) -> None:
        """Computes the three numbers and calls the callback."""
        if self.input is None or self.grad_output is None:
            return
        # 16-bit sums of squares would overflow; under autocast the two may differ in dtype.
        dtype = torch.promote_types(torch.promote_types(self.input.dtype, self.grad_output.dtype), torch.float32)
        x, y = (tensor.reshape(-1, tensor.shape[-1]).to(dtype) for tensor in (self.input, self.grad_output))
        self.variance = (
            estimate_correlation(x, y),
            estimate_variance_sgd(x, y, self.bs),
            estimate_variance_rmm(x, y, self.bs_proj),
        )
        if self.callback is not None:
            self.callback(*self.variance, self.step)
        self.step += 1


class VarianceEstimator(nn.Module):
    """A randomized linear layer that estimates its noise in every backward pass.

    Args:
        model: A layer with the attributes of :class:`lomem.compat.fewbit.LinearGRP`; :class:`lomem.nn`'s has
            them too.
        callback: Called after each backward pass with :func:`estimate_correlation`, :func:`estimate_variance_sgd`,
            :func:`estimate_variance_rmm` and the number of passes before.

    Attributes:
        state: Copies of the last input and gradient of the output.

    Raises:
        TypeError: If ``model`` is no such layer, or ``callback`` is not callable.
    """

    def __init__(self, model: nn.Module, callback: Callable[[Tensor, Tensor, Tensor, int], Any] | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not all(hasattr(model, name) for name in _SIZES):
            raise TypeError(
                f"lomem.compat.fewbit.VarianceEstimator: model is of type {type(model).__name__}, expected a "
                f"randomized linear layer, with the attributes {', '.join(_SIZES)}"
            )
        if callback is not None and not callable(callback):
            raise TypeError(
                f"lomem.compat.fewbit.VarianceEstimator: callback is of type {type(callback).__name__}, expected a "
                "function of four arguments"
            )
        self.model = model
        self.state = _Estimates(callback)

    @property
    def variance(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The three estimates of the last backward pass, None before."""
        return self.state.variance

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer. If it returns a tuple, the gradient of the first element counts."""
        rows = math.prod(input.shape[:-1])
        self.state.bs = rows
        self.state.bs_proj = min(rows, projected_rows(rows, *(getattr(self.model, name) for name in _SIZES)))
        self.state.forward(input)
        output = self.model(input, *args, **kwargs)
        if isinstance(output, tuple):
            return catch_gradients(output[0], self.state), *output[1:]
        return catch_gradients(output, self.state)
