"""FewBit's ``fewbit.modules.linear``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....nn import linear
from ..functional.linear import linear_crs, linear_grp, projected_rows

__all__ = ["LinearCRS", "LinearGRP", "RandomizedLinear"]


class LinearCRS(nn.Linear):
    """:class:`torch.nn.Linear` that saves a random sample of the columns (features) of its input.

    See :func:`lomem.compat.fewbit.functional.linear_crs`. In evaluation mode the layer is :class:`torch.nn.Linear`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether the layer has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        proj_dim: Number of columns drawn, with replacement. The default is half of ``out_features``. If that is
            ``in_features`` or more, the gradient is exact.

    Raises:
        ValueError: If ``proj_dim`` is not an integer of at least 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        proj_dim: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.proj_dim = max(1, out_features // 2) if proj_dim is None else proj_dim
        if isinstance(proj_dim, bool) or not isinstance(self.proj_dim, int) or self.proj_dim < 1:
            raise ValueError(
                f"lomem.compat.fewbit.LinearCRS: proj_dim is {proj_dim!r}, expected an integer of at least 1"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ weight.T + bias``."""
        if not self.training:
            return super().forward(input)
        return linear_crs(input, self.weight, self.bias, self.proj_dim)

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        return f"{super().extra_repr()}, proj_dim={self.proj_dim}"


class RandomizedLinear(linear.RandomizedLinear):
    """:class:`torch.nn.Linear` that saves random combinations of the rows of its input; see docs/linear.md.

    lomem's layer of this name, with FewBit's arguments; see :func:`lomem.compat.fewbit.functional.linear_grp`. In
    evaluation mode the layer is :class:`torch.nn.Linear`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether the layer has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        proj_dim_ratio: Fraction of the rows saved; the product is rounded down.
        proj_dim: Number of rows saved, instead of a fraction. With neither, all are saved.
        proj_dim_min: Minimum number of rows saved.
        proj_dim_max: Maximum number of rows saved.
        matmul: ``"gaussian"``, ``"rademacher"``, ``"dct"`` or ``"dft"``; also lomem's ``"crs"`` and ``"wta-crs"``.
        generator: Generator from which seeds are drawn. By default they come from :mod:`lomem.random`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        proj_dim_ratio: float | None = None,
        proj_dim: int | None = None,
        proj_dim_min: int | None = None,
        proj_dim_max: int | None = None,
        matmul: str = "gaussian",
        generator: torch.Generator | None = None,
    ) -> None:
        # lomem's layer checks what they have in common. FewBit's also takes ratios above 1, and neither size.
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            proj_dim=1 if proj_dim is None else proj_dim,
            matmul=matmul,
        )
        projected_rows(1, proj_dim_ratio, proj_dim, proj_dim_max, proj_dim_min)
        self.proj_dim_ratio = proj_dim_ratio
        self.proj_dim = proj_dim
        self.proj_dim_min = proj_dim_min
        self.proj_dim_max = proj_dim_max
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ weight.T + bias``."""
        if not self.training:
            return nn.Linear.forward(self, input)
        return linear_grp(
            input,
            self.weight,
            self.bias,
            self.proj_dim_ratio,
            self.proj_dim,
            self.proj_dim_max,
            self.proj_dim_min,
            self.matmul,
            self.generator,
        )


#: FewBit's older name.
LinearGRP = RandomizedLinear
