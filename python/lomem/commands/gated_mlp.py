"""Gated MLPs that save gate and up and rebuild their product, for comparison.

``down(activation(gate(x)) * up(x))`` saves gate, up, the result of the activation, and the product, the input of the
last layer. The last two follow from the first two. This is how unsloth (``LoRA_MLP``), NeMo Automodel
(``LoRASwiGLUMLPFunction``) and flash-linear-attention (``swiglu_linear``) save memory; their kernels also fuse the
layers, which changes nothing here. The gradient is exact.

This is a contender of :func:`lomem.convert`: it shares no code with it, and needs to know the names of the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .linear4bit import Linear4bit

__all__ = ["rebuild_products"]

_LAYERS = ("gate_proj", "up_proj", "act_fn", "down_proj")


def rebuild_products(model: nn.Module) -> int:
    """Makes the gated MLPs of a model save gate and up alone, in place.

    Args:
        model: A model whose gated MLPs have the layers ``gate_proj``, ``up_proj``, ``act_fn`` and ``down_proj``, as
            those of LLaMA, Qwen and Gemma in transformers have, with or without peft's LoRA.

    Returns:
        Number of MLPs.

    Raises:
        ValueError: If there is none, or if LoRA has dropout, which the published implementations do not support either.
    """
    mlps = [module for module in model.modules() if all(hasattr(module, name) for name in _LAYERS)]
    if not mlps:
        raise ValueError(f"{type(model).__name__} has no gated MLP, expected modules with {', '.join(_LAYERS)}")
    for mlp in cast("list[Any]", mlps):
        down = _Down(mlp.down_proj)
        mlp.forward = functools.partial(_forward, mlp, down)
    return len(mlps)


def _forward(mlp: Any, down: _Down, x: Tensor) -> Any:
    return _GatedLinear.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn, down, *down.parameters)


class _Down:
    """A linear layer, possibly with LoRA.

    Args:
        layer: The layer, or peft's wrapper of it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.linear: Any = getattr(layer, "base_layer", layer)
        self.adapters: list[tuple[Any, Any, float]] = []
        wrapper: Any = layer
        for name in getattr(layer, "active_adapters", []):
            if not isinstance(wrapper.lora_dropout[name], nn.Identity):
                raise ValueError("LoRA has dropout, expected none: the MLP could not be rebuilt without its mask")
            self.adapters.append((wrapper.lora_A[name], wrapper.lora_B[name], wrapper.scaling[name]))
        modules = [self.linear, *(module for a, b, _ in self.adapters for module in (a, b))]
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]

    def __call__(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        for adapter in self.adapters:
            result = (result + self._adapted(x, *adapter)).to(result.dtype)
        return result  # type: ignore[no-any-return]

    @staticmethod
    def _adapted(x: Tensor, a: nn.Linear, b: nn.Linear, scale: float) -> Tensor:
        return b(a(x.to(a.weight.dtype))) * scale  # type: ignore[no-any-return]

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the input and of the parameters."""
        weight, bias = self.linear.weight, self.linear.bias
        grads: dict[Tensor, Tensor] = {}
        rows = grad.flatten(0, -2)
        if isinstance(self.linear, Linear4bit):
            dtype = self.linear.compute_dtype
            grad_x = (grad.to(dtype) @ self.linear.dequantize()).to(x.dtype)
        else:
            grad_x = grad @ weight.to(grad.dtype)
        if weight.requires_grad:
            grads[weight] = (rows.T @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        if bias is not None and bias.requires_grad:
            grads[bias] = rows.sum(0).to(bias.dtype)
        leaf = x.detach().requires_grad_()
        for a, b, scale in self.adapters:
            with torch.enable_grad():
                adapted = self._adapted(leaf, a, b, scale)
            parameters = [p for p in (*a.parameters(), *b.parameters()) if p.requires_grad]
            of_x, *others = torch.autograd.grad(adapted, [leaf, *parameters], grad.to(adapted.dtype))
            grad_x = grad_x + of_x
            grads.update(zip(parameters, others, strict=True))
        return grad_x, [grads[p] for p in self.parameters]


class _GatedLinear(torch.autograd.Function):
    """The product of an activation of gate and up, and the linear layer behind it; saves gate and up."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor], down: _Down, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.down = activation, down
        # As in the forward pass, the rebuilt linear layer computes in autocast's dtype.
        kind = gate.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return down(activation(gate) * up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            with torch.enable_grad():
                product = ctx.activation(gate) * up
            grad_product, grads = ctx.down.backward(product.detach(), grad)
        grad_gate, grad_up = torch.autograd.grad(product, (gate, up), grad_product.to(product.dtype))
        return grad_gate, grad_up, None, None, *grads
