"""FewBit's ``fewbit.functional.variance``: what passes a point of a model, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["GradientStorage", "catch_gradients"]


class GradientStorage:
    """Keeps copies of an input and of a gradient. Subclasses override :meth:`postprocess`.

    Attributes:
        input: The last tensor given to :meth:`forward`, None before.
        grad_output: The last tensor given to :meth:`backward`, None before.
    """

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.grad_output: Tensor | None = None

    def forward(self, input: Tensor) -> None:
        """Keeps a detached copy of ``input``."""
        self.input = input.detach().clone()

    def backward(self, grad_output: Tensor) -> None:
        """Keeps a detached copy of ``grad_output``, and calls :meth:`postprocess`."""
        self.grad_output = grad_output.detach().clone()
        self.postprocess()

    def postprocess(self) -> None:
        """Called after every backward pass; does nothing by default."""


class _Catcher(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, storage: GradientStorage) -> Tensor:
        ctx.storage = storage
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        ctx.storage.backward(grad_output)
        return grad_output, None


def catch_gradients(input: Tensor, storage: GradientStorage) -> Tensor:
    """The identity; in the backward pass, ``storage.backward`` gets the gradient.

    Args:
        input: Any tensor.
        storage: Object with a method ``backward``.

    Returns:
        A view of ``input``. Nothing is saved for backward.
    """
    return _Catcher.apply(input, storage)  # type: ignore[no-any-return]
