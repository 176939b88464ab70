"""What fused kernels for language models save, by plain ops: the formulas of Liger-Kernel's, without the kernels.

They compute what transformers' layers compute and save what Liger-Kernel's functions save: a norm its input and a
number per row (`LigerRMSNormFunction`), a gated product gate and up (`LigerSiLUMulFunction`), and the loss, computed
with the output layer in chunks of rows, the gradient of its input (`LigerFusedLinearCrossEntropyFunction`), in place of
the logits. Rotary embeddings save nothing either way. Times of these say nothing.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Rows of logits that exist at a time.
CHUNK = 64


class _Norm(torch.autograd.Function):
    """An RMSNorm that saves its input and the reciprocals of the roots, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        y = x.float() * scale
        g = (grad * weight).float()
        grad_x = scale * (g - y * (g * y).mean(-1, keepdim=True))
        grad_weight = (grad.float() * y).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x.to(x.dtype), grad_weight, None


class _Product(torch.autograd.Function):
    """SwiGLU's product, which saves gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        gate, up = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            product = F.silu(gate) * up
        return torch.autograd.grad(product, (gate, up), grad)


class _Loss(torch.autograd.Function):
    """The mean cross entropy of a frozen linear layer's output; saves the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total, grad = rows.new_zeros((), dtype=torch.float32), torch.empty_like(rows)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK].detach().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(part, weight.detach()).float()
                loss = F.cross_entropy(logits, labels[start : start + CHUNK], reduction="sum") / len(rows)
            grad[start : start + CHUNK] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return saved * grad.to(saved.dtype), None, None


def _norm(module: Any, x: Tensor) -> Any:
    return _Norm.apply(x, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Any:
    return module.down_proj(_Product.apply(module.gate_proj(x), module.up_proj(x)))


def fuse_norms_and_products(model: nn.Module) -> None:
    """Makes the norms and gated MLPs of a LLaMA of transformers save what fused kernels save, in place.

    Args:
        model: The model, with or without peft's LoRA.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = functools.partial(_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, LlamaMLP):
            module.forward = functools.partial(_mlp, module)  # type: ignore[method-assign]


class FusedLoss:
    """The forward pass of a LLaMA of transformers, with its output layer and loss as one.

    Args:
        model: The model, with or without peft's LoRA; its output layer is frozen.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Any:
        """An object with the loss, as the model returns it."""
        hidden = self._model.model(input_ids=input_ids).last_hidden_state
        rows = hidden[:, :-1].flatten(0, 1)  # a token's row predicts the next one
        return SimpleNamespace(loss=_Loss.apply(rows, self._model.lm_head.weight, labels[:, 1:].flatten()))
