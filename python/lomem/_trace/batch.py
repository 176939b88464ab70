"""The arguments of a model, as a user may pass them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Batch", "as_batch"]


@dataclass(frozen=True)
class Batch:
    """Positional and keyword arguments of a model.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, model: nn.Module) -> Any:
        """Runs the model."""
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves of all arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A batch with ``function(tensor)`` in place of each tensor."""
        return Batch(*tree_map_only(Tensor, function, (self.args, self.kwargs)))


def as_batch(function: str, argument: str, value: Any, error: type[Exception] = TypeError) -> Batch:
    """Reads a batch.

    Args:
        function: Name of the public function, for the message.
        argument: Name of its argument, for the message.
        value: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        error: Exception raised for anything else.
    """
    if isinstance(value, Tensor):
        return Batch((value,), {})
    if isinstance(value, Mapping):
        return Batch((), dict(value))
    if isinstance(value, tuple | list):
        return Batch(tuple(value), {})
    raise error(
        f"{function}: {argument} is of type {type(value).__name__}, expected a dict of keyword arguments, "
        "a tuple or list of positional ones, or a tensor"
    )
