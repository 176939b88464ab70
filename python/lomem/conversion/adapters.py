"""Low-rank adapters of lomem.nn in converted models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._sharding import is_distributed
from .._trace.autocast import autocast_dtype, autocast_to
from .._trace.handover import linear_of_offered, take
from ..nn import LoRALinear
from .modules import SharedInput, hands_nothing_over
from .pair_functions import dropped, dropped_again

__all__ = ["SharedAdapter", "is_adapter"]


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a low-rank adapter, as the library has it."""
    if not isinstance(module, LoRALinear):
        return False
    cls = type(module)
    return cls.forward is LoRALinear.forward and cls._update is LoRALinear._update


class SharedAdapter(SharedInput):
    """A linear layer with an adapter that saves what its producer offers instead of its input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same result as the original."""
        return super(SharedInput, self).forward(*args, **kwargs)

    def _update(self, input: Tensor) -> Tensor:
        layer: Any = self
        taken = None if hands_nothing_over() else take(input)  # even if it goes unused: the producer counts its takers
        a, b, bias, scaling = layer.lora_A.weight, layer.lora_B.weight, layer.lora_B.bias, layer.scaling
        p = layer.dropout if layer.training else 0.0
        device, dtype = input.device.type, a.dtype
        low = None if dtype == torch.float64 else autocast_dtype(device)
        if (
            taken is None
            or input.dim() < 2
            or is_distributed(input, a, b)
            or (p > 0 and is_compiling())
            or not self.may_take(*taken, input, low or dtype, a)
        ):
            return super()._update(input)  # type: ignore[misc,no-any-return]
        kept, made = taken
        # By the ops of the library's own function, of which the first product saves what it is given.
        x, saved = input.to(dtype), list(kept)
        if p > 0:
            x, mask = dropped(x, p)
            saved.append(mask)
        # (The function must hold neither the offer nor a tensor.)
        of_producer, number = made.rebuild, len(kept)

        def rebuild(*tensors: Any) -> Tensor:
            x = of_producer(*tensors[:number]).to(dtype)
            return dropped_again(x, tensors[number], p) if p > 0 else x

        with autocast_to(device, None):
            options = {"differentiable": made.differentiable}
            product = linear_of_offered(x, a, None, low or dtype, saved, rebuild, **options)
        update = F.linear(product, b, bias)
        return update if scaling == 1 else update * scaling
