"""The randomized linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _C
from .. import functional as F

__all__ = ["RandomizedLinear"]


class RandomizedLinear(nn.Linear):
    """Linear layer that keeps a few random combinations of the rows of its input, in place of :class:`torch.nn.Linear`.

    The same parameters, state dict and results; its weight's gradient is an unbiased estimate. In evaluation mode, and
    where no gradient of the weight is needed, it is :class:`torch.nn.Linear` in everything. See
    :func:`lomem.functional.randomized_linear`. Building a layer begins the stream of seeds anew: see
    :mod:`lomem.random`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        proj_dim: Number of rows that are kept. Either this or ``proj_dim_ratio`` must be given.
        proj_dim_ratio: Share of the rows that is kept, in (0, 1]. Rows: all leading dimensions of the input.
        proj_dim_min: At least so many rows are kept.
        proj_dim_max: At most so many rows are kept.
        matmul: ``"gaussian"``, ``"rademacher"``, ``"dct"``, ``"dft"``, ``"crs"`` or ``"wta-crs"``.
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
        # The op knows the rules: asked here, so that a mistake shows where it is made.
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
        """Arguments, for ``repr``."""
        names = ("proj_dim", "proj_dim_ratio", "proj_dim_min", "proj_dim_max")
        sizes = "".join(f", {name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)
        return f"{super().extra_repr()}, matmul={self.matmul!r}{sizes}"
