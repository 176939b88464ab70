"""Randomized linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _C
from .. import functional as F

__all__ = ["RandomizedLinear"]


class RandomizedLinear(nn.Linear):
    """:class:`torch.nn.Linear` that saves a few random combinations of the rows of its input.

    Parameters, state dict and results are those of :class:`torch.nn.Linear`; the gradient of the weight is an unbiased
    estimate. In evaluation mode, and if the weight needs no gradient, the layer behaves exactly like
    :class:`torch.nn.Linear`. See :func:`lomem.functional.randomized_linear`. Building a layer restarts the stream of
    seeds, see :mod:`lomem.random`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether the layer has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        proj_dim: Number of rows saved, at least 1. Either this or ``proj_dim_ratio`` must be given.
        proj_dim_ratio: Fraction of the rows saved, in (0, 1]. All leading dimensions of the input count as rows.
        proj_dim_min: Minimum number of rows saved.
        proj_dim_max: Maximum number of rows saved.
        matmul: ``"gaussian"``, ``"rademacher"``, ``"dct"``, ``"dft"``, ``"crs"`` or ``"wta-crs"``; see
            :func:`lomem.functional.randomized_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_dim: int | None = None,
        proj_dim_ratio: float | None = None,
        proj_dim_min: int | None = None,
        proj_dim_max: int | None = None,
        matmul: str = "gaussian",
    ) -> None:
        # Calling the op on the meta device checks the arguments here rather than in the first forward pass.
        none = torch.empty((1, 1), device="meta")
        F.randomized_linear(
            none,
            none,
            matmul=matmul,
            proj_dim=proj_dim,
            proj_dim_ratio=proj_dim_ratio,
            proj_dim_min=proj_dim_min,
            proj_dim_max=proj_dim_max,
        )
        _C.begin_random_stream()
        super().__init__(in_features, out_features, bias, device, dtype)
        self.matmul = matmul
        self.proj_dim = proj_dim
        self.proj_dim_ratio = proj_dim_ratio
        self.proj_dim_min = proj_dim_min
        self.proj_dim_max = proj_dim_max

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ weight.T + bias``."""
        if not self.training:
            return super().forward(input)
        return F.randomized_linear(
            input,
            self.weight,
            self.bias,
            matmul=self.matmul,
            proj_dim=self.proj_dim,
            proj_dim_ratio=self.proj_dim_ratio,
            proj_dim_min=self.proj_dim_min,
            proj_dim_max=self.proj_dim_max,
        )

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        names = ("proj_dim", "proj_dim_ratio", "proj_dim_min", "proj_dim_max")
        sizes = "".join(f", {name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)
        return f"{super().extra_repr()}, matmul={self.matmul!r}{sizes}"
