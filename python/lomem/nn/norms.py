"""Memory-sharing norms as modules."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F

__all__ = ["MSLayerNorm", "MSRMSNorm"]


class MemorySharingNorm(nn.Module):
    """Base class of the norms. Subclasses register ``weight`` and ``bias``."""

    weight: nn.Parameter | None
    _names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        output_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        # operator.index accepts any integer type, including NumPy's, but no float.
        sizes = normalized_shape if isinstance(normalized_shape, Sequence) else (operator.index(normalized_shape),)
        self.normalized_shape = tuple(sizes)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.output_dtype = output_dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        # LowMemoryBP's modules have the names of these, so its pickles load here. They have no affine parameters.
        super().__setstate__({"elementwise_affine": False, "output_dtype": None, **state})
        self.normalized_shape = tuple(self.normalized_shape)
        vars(self).pop("num_dims", None)
        for name in self._names:
            self._parameters.setdefault(name, None)

    @property
    def num_dims(self) -> int:
        """Number of dimensions that are normalized over."""
        return len(self.normalized_shape)

    def _register(self, name: str, present: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        parameter = torch.empty(self.normalized_shape, device=device, dtype=dtype) if present else None
        self.register_parameter(name, None if parameter is None else nn.Parameter(parameter))

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        text = f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        return text if self.output_dtype is None else text + f", output_dtype={self.output_dtype}"


class MSLayerNorm(MemorySharingNorm):
    """Layer normalization that saves its output for the backward pass.

    Takes the arguments of :class:`torch.nn.LayerNorm`, but ``elementwise_affine`` is off by default, as in LowMemoryBP.
    See :func:`lomem.functional.ms_layer_norm`.

    Args:
        normalized_shape: Sizes of the last dimensions of the input, or the size of the last one as an int.
        eps: Value added to the variance.
        elementwise_affine: Whether the norm has a weight (initially 1) and a bias (initially 0) of shape
            ``normalized_shape``. The backward pass divides by the weight: if one becomes 0, training raises on the CPU,
            and on CUDA the whole gradient of the input is NaN (see the function).
        bias: Whether the norm has a bias; ignored without ``elementwise_affine``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        output_dtype: Dtype of the output. The default is the autocast dtype if autocast is on, otherwise the dtype of
            the input.
    """

    eps: float
    bias: nn.Parameter | None
    _names = ("weight", "bias")

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
        super().__init__(normalized_shape, eps, elementwise_affine, output_dtype)
        self._register("weight", elementwise_affine, device, dtype)
        self._register("bias", elementwise_affine and bias, device, dtype)
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
        """Formats the arguments for ``repr``."""
        return super().extra_repr() + f", bias={self.bias is not None}"


class MSRMSNorm(MemorySharingNorm):
    """RMS normalization that saves its output for the backward pass.

    Takes the arguments of :class:`torch.nn.RMSNorm`, but ``elementwise_affine`` is off by default, as in LowMemoryBP.
    See :func:`lomem.functional.ms_rms_norm`.

    Args:
        normalized_shape: Sizes of the last dimensions of the input, or the size of the last one as an int.
        eps: Value added to the mean square. The default, as in :class:`torch.nn.RMSNorm`, is the machine epsilon of the
            computation dtype (LowMemoryBP's default was 1e-5).
        elementwise_affine: Whether the norm has a weight of shape ``normalized_shape``, initially 1. See
            :class:`MSLayerNorm` for weights that become 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        output_dtype: Dtype of the output. The default is the autocast dtype if autocast is on, otherwise the dtype of
            the input.
    """

    _names = ("weight",)

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
        super().__init__(normalized_shape, eps, elementwise_affine, output_dtype)
        self._register("weight", elementwise_affine, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight to 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` normalized over its last dimensions."""
        return F.ms_rms_norm(input, self.normalized_shape, self.weight, self.eps, dtype=self.output_dtype)
