"""Table of the operands that ops save for backward, for :mod:`lomem.memory` and :mod:`lomem.conversion`."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

__all__ = ["ATTENTION", "COPIES", "DROPOUTS", "KEEPS", "PRODUCTS", "saves_operands"]

_aten = torch.ops.aten

#: Matrix products and convolutions, with the positions of the two operands. Each is saved if the other one needs a
#: gradient.
PRODUCTS: dict[Any, tuple[int, ...]] = {
    _aten.linear: (0, 1),
    _aten.mkldnn_linear: (0, 1),
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.mv: (0, 1),
    _aten.addmv: (1, 2),
    _aten.convolution: (0, 1),
    _aten._convolution: (0, 1),
}

#: Attention: query, key and value, and an additive mask if the op takes one.
ATTENTION: dict[Any, tuple[int, ...]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 1, 2, 3),
    _aten._scaled_dot_product_flash_attention: (0, 1, 2),
    _aten._scaled_dot_product_efficient_attention: (0, 1, 2, 3),
    _aten._scaled_dot_product_cudnn_attention: (0, 1, 2, 3),
    _aten._scaled_dot_product_fused_attention_overrideable: (0, 1, 2, 3),
    _aten._flash_attention_forward: (0, 1, 2),
    _aten._efficient_attention_forward: (0, 1, 2, 3),
}

#: Copies of the operand in another dtype, layout or order. They save no operand.
COPIES = frozenset({_aten._to_copy, _aten.clone, _aten.roll})

#: Dropouts, which save their mask but no operand.
DROPOUTS = frozenset({_aten.native_dropout, _aten._fused_dropout})

#: All of the above, by overload packet.
KEEPS: MappingProxyType[Any, tuple[int, ...]] = MappingProxyType(
    {**PRODUCTS, **ATTENTION, **dict.fromkeys([*COPIES, *DROPOUTS], ())}
)


def saves_operands(func: torch._ops.OpOverload) -> bool:
    """Whether an op saves operands according to the table: products and attention."""
    return bool(KEEPS.get(func._overloadpacket))
