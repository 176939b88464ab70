"""FewBit's ``fewbit.util``: replacing modules, and tensors that a graph of autograd refers to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ...mapping import convert_linear, mapped

__all__ = ["convert_linear", "estimate_memory_usage", "map_module", "teniter", "traverse"]


def map_module(root: nn.Module, func: Callable[..., nn.Module], patt: str | re.Pattern[str] | None = None) -> nn.Module:
    """Replaces every module of a model with the result of a function, in place; see :func:`lomem.map_module`.

    Args:
        root: The model; modified in place.
        func: Function that takes a module and its path, and returns a module. Paths are like ``"/encoder/layer/0"``,
            and ``"/"`` for the root. A function that takes one argument gets the module alone.
        patt: Regular expression that the beginning of a path has to match. If it matches none, there is a warning.

    Returns:
        The root, or the module that ``func`` returned for it.

    Raises:
        TypeError: If ``root`` is not a module, ``func`` is not callable or ``func`` returns something other than a
            module.
        ValueError: If ``patt`` is not a regular expression, or ``func`` replaces a module of a ScriptModule.
    """

    def matches(compiled: re.Pattern[str], name: str) -> bool:
        return compiled.match("/" + name.replace(".", "/")) is not None

    def with_path(module: nn.Module, path: str) -> nn.Module:
        return func(module, path)

    fn = with_path if callable(func) and _takes_two(func) else func
    return mapped("lomem.compat.fewbit.util.map_module", root, fn, patt, matches, ("func", "patt"))


def _takes_two(func: Callable[..., Any]) -> bool:
    try:
        inspect.signature(func).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def traverse(variable: Tensor, callback: Callable[[Any, Tensor, bool], Any]) -> None:
    """Calls a function for every tensor that the graph behind a tensor refers to, in depth-first order.

    A tensor may come more than once. The ops of lomem that are nodes in C++ do not tell what they save; to count bytes,
    use :func:`lomem.memory.saved_for_backward`, which sees everything.

    Args:
        variable: The tensor. Without a graph there are no calls.
        callback: Function of a node, a tensor, and whether the node saved it for the backward pass. (A leaf, as a
            parameter is, was not saved.)
    """
    visited = set()
    nodes = [variable.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        for tensor in getattr(node, "saved_tensors", ()):
            if isinstance(tensor, Tensor):
                callback(node, tensor, True)
        if hasattr(node, "variable"):
            callback(node, node.variable.data, False)
        for name in dir(node):
            if name.startswith("_saved_"):
                saved = getattr(node, name)
                for tensor in saved if isinstance(saved, (list, tuple)) else (saved,):
                    if isinstance(tensor, Tensor):
                        callback(node, tensor, True)
        nodes += [child for child, _ in reversed(node.next_functions)]


def teniter(variable: Tensor, include_ordinary: bool = True, include_saved: bool = False) -> Iterator[Tensor]:
    """Yields the tensors that :func:`traverse` finds, each object once.

    Args:
        variable: The tensor.
        include_ordinary: Whether leaves are yielded.
        include_saved: Whether saved tensors are yielded. autograd unpacks a tensor that is the output of the node that
            saves it to a new object every time, so one that its consumer saves too comes twice.
    """
    found: dict[int, tuple[Tensor, bool, bool]] = {}

    def note(node: Any, tensor: Tensor, saved: bool) -> None:
        _, ordinary, was_saved = found.get(id(tensor), (None, False, False))
        found[id(tensor)] = (tensor, ordinary or not saved, was_saved or saved)

    traverse(variable, note)
    for tensor, ordinary, saved in found.values():
        if (ordinary and include_ordinary) or (saved and include_saved):
            yield tensor


def estimate_memory_usage(variable: Tensor, saved_only: bool = False) -> int:
    """Bytes of the tensors that :func:`teniter` yields.

    Args:
        variable: The tensor.
        saved_only: Whether saved tensors are counted, or leaves.
    """
    tensors = teniter(variable, include_ordinary=not saved_only, include_saved=saved_only)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
