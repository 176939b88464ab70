"""The ops as modules, in place of those of :mod:`torch.nn`."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _C
from . import activations
from .. import functional as F
from .activations import *  # noqa: F403

__all__ = [*activations.__all__, "MSLayerNorm", "MSRMSNorm", "RandomizedLinear", "ReGELU2", "ReSiLU2"]

for _name in activations.__all__:
    # Where they are pickled from, and what they print as.
    getattr(activations, _name).__module__ = __name__


class ReGELU2(nn.Module):
    """GELU whose backward pass keeps 2 bits an element, in place of :class:`torch.nn.GELU`.

    See :func:`lomem.functional.regelu2`.

    Args:
        approximate: ``"none"`` or ``"tanh"``.
        fast: Allows a faster forward that is not bit for bit torch's.
    """

    def __init__(self, approximate: str = "none", *, fast: bool = False) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"lomem.nn.ReGELU2: approximate is {approximate!r}, expected 'none' or 'tanh'")
        self.approximate = approximate
        self.fast = fast

    def forward(self, input: Tensor) -> Tensor:
        """Returns GELU of ``input``."""
        return F.regelu2(input, self.approximate, fast=self.fast)

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return f"approximate={self.approximate!r}" + (", fast=True" if self.fast else "")


class ReSiLU2(nn.Module):
    """SiLU whose backward pass keeps 2 bits an element, in place of :class:`torch.nn.SiLU`.

    See :func:`lomem.functional.resilu2`.

    Args:
        inplace: Whether the result overwrites the input, as in :class:`torch.nn.SiLU`. It saves no
            memory here: a temporary of the input's size is made either way.
        fast: Allows a faster forward that is not bit for bit torch's.
    """

    def __init__(self, inplace: bool = False, *, fast: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.fast = fast

    def forward(self, input: Tensor) -> Tensor:
        """Returns SiLU of ``input``."""
        output = F.resilu2(input, fast=self.fast)
        return input.copy_(output) if self.inplace else output

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return ", ".join(f"{name}=True" for name in ("inplace", "fast") if getattr(self, name))


def _shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    # operator.index: any integer (numpy's too), and no float.
    return tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (operator.index(normalized_shape),)


def _repr(norm: MSLayerNorm | MSRMSNorm) -> str:
    text = f"{norm.normalized_shape}, eps={norm.eps}, elementwise_affine={norm.elementwise_affine}"
    return text if norm.output_dtype is None else text + f", output_dtype={norm.output_dtype}"


class MSLayerNorm(nn.Module):
    """Layer normalization that keeps its output for the backward pass.

    Takes the arguments of :class:`torch.nn.LayerNorm`; ``elementwise_affine`` is off by default, as in
    LowMemoryBP. See :func:`lomem.functional.ms_layer_norm`.

    Args:
        normalized_shape: The last dimensions of the input, or the last one as an int.
        eps: Added to the variance.
        elementwise_affine: Whether there is a weight (initially 1) and a bias (initially 0) of shape
            ``normalized_shape``.
        bias: With ``elementwise_affine``, whether there is a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        output_dtype: Of the output; by default the autocast dtype where autocast is on, else that of
            the input.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.output_dtype = output_dtype
        for name, present in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            parameter = torch.empty(self.normalized_shape, device=device, dtype=dtype) if present else None
            self.register_parameter(name, None if parameter is None else nn.Parameter(parameter))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight to 1 and bias to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` normalized over its last dimensions."""
        return F.ms_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, dtype=self.output_dtype)

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return _repr(self) + f", bias={self.bias is not None}"


class MSRMSNorm(nn.Module):
    """RMS normalization that keeps its output for the backward pass.

    Takes the arguments of :class:`torch.nn.RMSNorm`; ``elementwise_affine`` is off by default, as in
    LowMemoryBP. See :func:`lomem.functional.ms_rms_norm`.

    Args:
        normalized_shape: The last dimensions of the input, or the last one as an int.
        eps: Added to the mean square. By default, as in :class:`torch.nn.RMSNorm`, the machine
            epsilon of the type computed in. (LowMemoryBP's default was 1e-5.)
        elementwise_affine: Whether there is a weight of shape ``normalized_shape``, initially 1.
        device: Of the parameters.
        dtype: Of the parameters.
        output_dtype: Of the output; by default the autocast dtype where autocast is on, else that of
            the input.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _shape(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.output_dtype = output_dtype
        parameter = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if parameter is None else nn.Parameter(parameter))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` normalized over its last dimensions."""
        return F.ms_rms_norm(input, self.normalized_shape, self.weight, self.eps, dtype=self.output_dtype)

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return _repr(self)


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
