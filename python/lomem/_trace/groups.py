"""Keeps tensors in 8 or 4 bits per element, in groups with a scale each, and brings them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .seeds import draw_seed

__all__ = ["FLOATS", "GROUP", "KERNELS", "FromGroups", "Load", "can_store", "store", "stored_bytes"]

#: Number of elements that share a scale.
GROUP = 128
#: The dtypes of lomem's ops.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Types of devices that lomem has kernels for.
KERNELS = ("cpu", "cuda", "meta")


def stored_bytes(numel: int, bits: int) -> int:
    """Bytes that a tensor takes in groups: its codes, scales in bfloat16, and a seed."""
    return (numel * bits + 7) // 8 + 2 * -(-numel // GROUP) + 8


def can_store(tensor: Tensor) -> bool:
    """Whether a tensor can be kept in groups."""
    if is_compiling():  # which cannot ask a tensor whether it is from inference mode
        return False
    ordinary = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_inference()
    return ordinary and tensor.dtype in FLOATS


class Load:
    """Brings a tensor back from its codes, their scales, and the seed of its dither.

    Attributes:
        bits: Bits per element.
    """

    def __init__(self, like: Tensor, bits: int) -> None:
        self.bits, self._size, self._dtype = bits, like.shape, like.dtype
        self._stride = like.stride()

    def __call__(self, codes: Tensor, scales: Tensor, seed: Tensor) -> Tensor:
        scales = scales.view(torch.bfloat16)
        return torch.ops.lomem.dequantize_groups(  # type: ignore[no-any-return]
            codes, scales, self._size, self._stride, self._dtype, self.bits, seed, group_size=GROUP
        )


def store(tensor: Tensor, bits: int) -> tuple[tuple[Tensor, Tensor, Tensor], Load]:
    """Codes, scales and seed of a tensor, rounded at random, and how to bring it back with subtracted dither.

    What comes back is the tensor plus noise that does not depend on it, uniform and half a step wide each way, so that
    its expectation is the tensor. Each call draws one seed.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction():
        x = tensor.detach()
        # Without gaps and overlaps; strides are kept otherwise.
        dense = x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)
        x = x if dense else x.contiguous()
        seed = draw_seed(x)
        codes, scales = torch.ops.lomem.quantize_groups(x, bits, seed, group_size=GROUP)
        # As integers, scales are safe from saved-tensor hooks that cast or compress numbers, or know no bfloat16.
        return (codes, scales.view(torch.int16), seed), Load(x, bits)


class FromGroups:
    """A function of tensors that are kept in groups: ``function(loads[0](codes, scales, seed), ...)``.

    Args:
        function: The function.
        loads: How to bring back its first arguments. Others are passed on as they are.
    """

    def __init__(self, function: Callable[..., Tensor], *loads: Load) -> None:
        self.function, self.loads = function, loads

    def bring(self, kept: Sequence[Any]) -> list[Tensor]:
        """The tensors that are kept in groups."""
        return [load(*kept[3 * i : 3 * i + 3]) for i, load in enumerate(self.loads)]

    def __call__(self, *kept: Any) -> Tensor:
        return self.function(*self.bring(kept), *kept[3 * len(self.loads) :])
