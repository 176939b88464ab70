"""Packs codes of 1 to 8 bits into bytes, and unpacks them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .activations import is_jagged

__all__ = [
    "pack_bits",
    "pack_bool_to_uint8",
    "unpack_bits",
    "unpack_uint8_to_bool",
]  # and the ops themselves, for the rest

PACK = torch.ops.lomem.pack_bits.default
UNPACK = torch.ops.lomem.unpack_bits.default


def _refuse_jagged(op: str, argument: str, tensor: Tensor) -> None:
    # In inference mode the op does not check this itself.
    if is_jagged(tensor):
        raise ValueError(f"lomem::{op}: {argument} is a nested tensor, expected a dense one")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of ``bits`` bits into bytes.

    Element ``i`` of the flattened codes occupies bits ``[bits*i, bits*i + bits)`` of a little-endian bit stream;
    padding bits are 0.

    Args:
        codes: uint8 tensor of any shape, with values below ``2**bits``.
        bits: Number of bits per code, 1 to 8.

    Returns:
        A 1-D uint8 tensor of ``ceil(bits * numel / 8)`` bytes.
    """
    _refuse_jagged("pack_bits", "codes", codes)
    return PACK(codes, bits)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Unpacks codes of ``bits`` bits, the inverse of :func:`pack_bits`.

    Args:
        packed: uint8 tensor of ``ceil(bits * numel / 8)`` bytes.
        bits: Number of bits per code, 1 to 8.
        numel: Number of codes.

    Returns:
        A 1-D uint8 tensor of ``numel`` codes.
    """
    _refuse_jagged("unpack_bits", "packed", packed)
    if isinstance(numel, int) and not is_compiling() and numel.bit_length() > 63:  # not an int64
        raise ValueError(f"lomem::unpack_bits: numel is {numel}, expected 0 to {2**59 - 1}")
    return UNPACK(packed, bits, numel)


# LowMemoryBP's names, so that code written for it runs unchanged.


def pack_bool_to_uint8(x: Tensor) -> Tensor:
    """LowMemoryBP's name for :func:`pack_bits` on a bool tensor, with one bit per element.

    Args:
        x: bool tensor of any shape.

    Returns:
        A 1-D uint8 tensor of ``ceil(numel / 8)`` bytes.
    """
    name = "lomem.functional.pack_bool_to_uint8"
    if x.dtype != torch.bool:
        raise ValueError(f"{name}: x has dtype {x.dtype}, expected torch.bool")
    if x.is_nested:
        raise ValueError(f"{name}: x is a nested tensor, expected a dense one")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: x has layout {x.layout}, expected a dense (torch.strided) tensor")
    return pack_bits(x.view(torch.uint8), 1)


def unpack_uint8_to_bool(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_bool_to_uint8`.

    Args:
        x: uint8 tensor of ``ceil(numel / 8)`` bytes.
        shape: Shape of the result.

    Returns:
        A bool tensor of shape ``shape``.
    """
    shape = torch.Size(shape)
    if not is_compiling() and any(size < 0 for size in shape):
        raise ValueError(f"lomem.functional.unpack_uint8_to_bool: shape is {tuple(shape)}, expected no negative size")
    # Not shape.numel(), which overflows. Not view(torch.bool): Inductor's C++ backend cannot use such a view as a mask.
    return (unpack_bits(x, 1, math.prod(shape)) != 0).reshape(shape)
