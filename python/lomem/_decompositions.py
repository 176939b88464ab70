"""What lomem's ops compute, in plain torch: for exported programs that are to run without lomem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checkpoint import DRAWN, EXACT, FEW_BIT
from .functional import linear

__all__ = ["decompositions"]

#: The functions of activations, of an input and of their parameters in the order of their signature in torch.
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activation(input: Tensor, function: str, parameters: Sequence[float], *options: Any, **others: Any) -> Tensor:
    of = _ACTIVATIONS.get(function) or getattr(F, function)
    return of(input, *parameters)  # type: ignore[no-any-return]


def _gated_linear(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, *, layout: str = "gate_up"
) -> Tensor:
    return F.linear(reference.gated(gate, up, activation, layout=layout), weight, bias)


def _lora(
    input: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    x = input.to(dtype or lora_a.dtype)
    x = F.dropout(x, p) if p > 0 else x
    return F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b, bias) * scaling


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    # As the kernels, in float32 whatever the dtypes: torch's norm takes weights of the input's dtype alone.
    wide = torch.promote_types(input.dtype, torch.float32)
    gamma, beta = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(input.to(wide), normalized_shape, gamma, beta, eps).to(dtype or input.dtype)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    wide = torch.promote_types(input.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    return F.rms_norm(input.to(wide), normalized_shape, weight, eps).to(dtype or input.dtype)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return F.linear(input, weight, bias)


_TABLE: dict[str, Callable[..., Tensor]] = {
    **{ops[0]: _activation for ops in (DRAWN, EXACT, FEW_BIT)},
    "dropout": lambda x, p, saves="mask": F.dropout(x, p),
    "gated": reference.gated,
    "gated_linear": _gated_linear,
    "lora": _lora,
    "ms_layer_norm": _layer_norm,
    "ms_rms_norm": _rms_norm,
    "regelu2": lambda x, approximate="none", fast=False: F.gelu(x, approximate=approximate),
    "resilu2": lambda x, fast=False: F.silu(x),
}


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """What the ops of lomem's layers compute, in torch's ops, for ``torch.export.ExportedProgram.run_decompositions``.

        program = torch.export.export(model, (x,))
        program = program.run_decompositions(lomem.decompositions())

    The program then needs no lomem where it is loaded. Its results are those of the layers, up to rounding. If it is
    differentiated, its gradients are torch's, and it saves what torch saves.

    Returns:
        A new dict from ops to functions. To use torch's own table as well, ``update`` that of
        ``torch.export.default_decompositions()`` with it.
    """
    table = {getattr(torch.ops.lomem, name).default: function for name, function in _TABLE.items()}
    return {**table, linear.OP: _linear}
