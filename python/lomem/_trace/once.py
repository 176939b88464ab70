"""Backward passes that cannot be differentiated themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["differentiable_once"]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Has the backward pass of an autograd function raise if a graph of it is asked for.

    torch's ``once_differentiable`` raises later, when the second derivative is computed, and not even then if
    ``torch.autograd.grad`` is given inputs that its error does not lie on the way to: the result silently lacks a part.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lomem.convert: a backward pass of the converted model got create_graph=True, expected False: what it "
                "saves cannot be differentiated twice; call lomem.restore(model) first"
            )
        return backward(ctx, *grads)

    return once
