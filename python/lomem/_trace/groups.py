"""Keeps tensors in 8 or 4 bits per element, in groups with a scale each, and brings them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._sharding import is_distributed
from .handover import in_a_region
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
    if tensor.layout != torch.strided or tensor.is_nested or tensor.dtype not in FLOATS:
        return False
    if is_compiling():  # which cannot ask a tensor whether it is from inference mode, and traces no training on those
        return not (is_distributed(tensor) or in_a_region())
    return not tensor.is_inference()


class Load:
    """Brings a tensor back from its codes, their scales, and the seed of its dither.

    Args:
        like: A tensor of the size, dtype and strides to be brought back.
        bits: Bits per element.

    Attributes:
        bits: Bits per element.
    """

    def __init__(self, like: Tensor, bits: int) -> None:
        self.bits, self._size, self._dtype = bits, like.shape, like.dtype
        # A compiler decides about strides after this has been traced.
        self._stride = None if is_compiling() else like.stride()

    def __call__(self, codes: Tensor, scales: Tensor, seed: Tensor) -> Tensor:
        scales = scales.view(torch.bfloat16)
        return torch.ops.lomem.dequantize_groups(  # type: ignore[no-any-return]
            codes, scales, self._size, self._stride, self._dtype, self.bits, seed, group_size=GROUP
        )


def _store(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and seed of a dense tensor. Each call draws one seed."""
    seed = draw_seed(x)
    codes, scales = torch.ops.lomem.quantize_groups(x, bits, seed, group_size=GROUP)
    # As integers, scales are safe from saved-tensor hooks that cast or compress numbers, or know no bfloat16.
    return codes, scales.view(torch.int16), seed


def _register() -> torch.library.Library | None:
    """Makes an op of this, for compiled graphs, in which every run draws a seed.

    A single one: codes are only of use with the seed that they were drawn with. A compiler may run it a second time in
    the backward pass, and then has all three from there. It is not among lomem's ops, since it is no more than two of
    these.
    """
    if torch._C._dispatch_has_kernel("lomem_trace::store"):  # the package has been imported again
        return None
    library = torch.library.Library("lomem_trace", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)
    library.define("store(Tensor x, int bits) -> (Tensor, Tensor, Tensor)", tags=tags)
    library.impl("store", _store, "CompositeExplicitAutograd")
    torch.library.register_fake("lomem_trace::store", _store, lib=library)
    return library


_library = _register()


def store(tensor: Tensor, bits: int) -> tuple[tuple[Tensor, Tensor, Tensor], Load]:
    """Codes, scales and seed of a tensor, rounded at random, and how to bring it back with subtracted dither.

    What comes back is the tensor plus noise that does not depend on it, uniform and half a step wide each way, so that
    its expectation is the tensor. Each call draws one seed, under a compiler each run of what is compiled.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction():
        x = tensor.detach()
        if is_compiling():
            return torch.ops.lomem_trace.store(x.contiguous(), bits), Load(x, bits)
        # Without gaps and overlaps; strides are kept otherwise.
        dense = x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)
        x = x if dense else x.contiguous()
        return _store(x, bits), Load(x, bits)


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
