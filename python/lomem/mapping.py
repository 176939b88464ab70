"""Replaces modules of a model one by one with a function, like FewBit's ``map_module`` and ``convert_linear``."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .nn import activations

__all__ = ["convert_activation", "convert_linear", "map_module"]


def map_module(
    root: nn.Module, fn: Callable[..., nn.Module], pattern: str | re.Pattern[str] | None = None
) -> nn.Module:
    r"""Replaces every module of a model with the result of a function, in place.

    Children are visited before their parents, and the root last. A module used in several places is passed to ``fn``
    once, and the same new module replaces it everywhere. Modules that ``fn`` adds are not visited.

    Example:
        >>> converter = lambda m: lomem.convert_linear(m, lomem.nn.RandomizedLinear, proj_dim_ratio=0.2)
        >>> model = lomem.map_module(model, converter, pattern=r"^encoder\\.")

    Args:
        root: The model; modified in place.
        fn: Function that takes a module and returns its replacement, or the module itself to leave it unchanged. A
            function with two positional parameters that have no defaults also gets the path of the module:
            ``"/encoder/layer/0"``, and ``"/"`` for the root.
        pattern: Regular expression searched in the qualified names of the modules (``"encoder.layer.0"``; the root's
            name is empty) and, if it contains a slash, in their paths. Only modules with a matching name or path are
            passed to ``fn``; for a module with several names, one match is enough. By default all modules match. If
            none does, there is a warning.

    Returns:
        The root, or the module that ``fn`` returned for it.

    Raises:
        TypeError: If ``root`` is not a module, ``fn`` is not callable or ``fn`` returns something other than a module.
        ValueError: If ``pattern`` is not a regular expression, or ``fn`` replaces a module of a ScriptModule.
    """

    def matches(compiled: re.Pattern[str], name: str) -> bool:
        in_path = "/" in compiled.pattern and compiled.search(_path(name)) is not None
        return in_path or compiled.search(name) is not None

    return mapped("lomem.map_module", root, fn, pattern, matches)


def mapped(
    function: str,
    root: nn.Module,
    fn: Callable[..., nn.Module],
    pattern: str | re.Pattern[str] | None,
    matches: Callable[[re.Pattern[str], str], bool],
    names: tuple[str, str] = ("fn", "pattern"),
) -> nn.Module:
    """:func:`map_module` for any reading of patterns.

    Args:
        function: Name of the public function that calls this one, for messages.
        root: As in :func:`map_module`.
        fn: As in :func:`map_module`.
        pattern: As in :func:`map_module`.
        matches: Whether a pattern matches the qualified name of a module.
        names: Names of the arguments ``fn`` and ``pattern``, for messages.
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"{function}: root is of type {type(root).__name__}, expected a torch.nn.Module")
    if not callable(fn):
        raise TypeError(
            f"{function}: {names[0]} is of type {type(fn).__name__}, expected a function that takes a module"
        )
    compiled = _pattern(f"{function}: {names[1]}", pattern)
    # The first matching name of each module that is passed to fn.
    chosen: dict[int, str] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if pattern is None or matches(compiled, name):
            chosen.setdefault(id(module), name)
    if not chosen:
        warnings.warn(
            f"{function}: {names[1]} {compiled.pattern!r} matches no module of the {type(root).__name__}, "
            f"whose modules have names such as {_examples(root)}",
            stacklevel=3,
        )
    takes_path = _takes_path(fn)
    # Keyed by the modules themselves, which keeps them alive: the id of a freed module may be reused.
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in replaced:
            for name, child in list(module._modules.items()):
                if child is not None and (new := visit(child)) is not child:
                    _replace(f"{function}: {names[0]}", module, name, new)
            replaced[module] = apply(module) if id(module) in chosen else module
        return replaced[module]

    def apply(module: nn.Module) -> nn.Module:
        result = fn(module, _path(chosen[id(module)])) if takes_path else fn(module)
        return _checked(f"{function}: {names[0]}", result, module)

    return visit(root)


def _path(name: str) -> str:
    """The path of a module: its qualified name in FewBit's notation."""
    return "/" + name.replace(".", "/")


def _examples(root: nn.Module) -> str:
    """The last of a model's names, which tends to be the longest, as a name and as a path."""
    *_, (name, _) = root.named_modules()
    return f"{name!r}, in paths {_path(name)!r}"


def _takes_path(fn: Callable[..., Any]) -> bool:
    """Whether a function has two positional parameters without defaults."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # implemented in C
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2


def _pattern(argument: str, pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile("" if pattern is None else pattern)
    except (TypeError, re.error) as error:
        raise ValueError(f"{argument} is {pattern!r}, expected a regular expression: {error}") from error


def _replace(argument: str, module: nn.Module, name: str, new: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{argument} returned a {type(new).__name__} for module {name!r} of a ScriptModule, whose "
            "modules cannot be replaced, expected the module itself"
        )
    setattr(module, name, new)


def _checked(argument: str, result: object, module: nn.Module) -> nn.Module:
    if not isinstance(result, nn.Module):
        raise TypeError(f"{argument} returned {type(result).__name__} for a {type(module).__name__}, expected a module")
    return result


def convert_linear(module: nn.Module, cls: Callable[..., nn.Linear], **kwargs: Any) -> nn.Module:
    """Converts a :class:`torch.nn.Linear` to another linear layer class.

    The new layer has the same parameters (the same tensors, so optimizers and tied weights keep working), the same
    training mode and the same hooks (shared, so their handles keep working). All other modules are returned unchanged:
    modules that are not linear layers; subclasses of :class:`torch.nn.Linear`, which may compute or hold something
    different (quantized layers, the output projection of :class:`torch.nn.MultiheadAttention`, layers already
    converted); and linear layers whose ``forward`` was replaced, since the replacement would be lost.

    Args:
        module: Any module; not modified.
        cls: :class:`lomem.nn.RandomizedLinear`, or another subclass of :class:`torch.nn.Linear` that takes the same
            arguments.
        **kwargs: Further keyword arguments of ``cls``.

    Returns:
        The new layer, or ``module`` if it is not converted.
    """
    if type(module) is not nn.Linear or "forward" in vars(module):
        return module
    # The meta device needs no memory and draws no random numbers; the parameters are replaced below.
    result = cls(module.in_features, module.out_features, module.bias is not None, device="meta", **kwargs)
    return _taking_over(result, module)


def convert_activation(module: nn.Module, **kwargs: Any) -> nn.Module:
    """Converts an activation of :mod:`torch.nn` to the one of the same name in :mod:`lomem.nn`.

    The new module has the same arguments, training mode and hooks. All other modules are returned unchanged, including
    subclasses of torch's activations.

    Example:
        >>> model = lomem.map_module(model, lambda m: lomem.convert_activation(m, bits=4))

    Args:
        module: Any module; not modified.
        **kwargs: ``bits``, ``criterion`` and ``rounding`` of the new module, see :class:`lomem.nn.FewBitActivation`;
            ignored for activations whose exact gradient needs only 1 bit per element.

    Returns:
        The new module, or ``module`` if it is not converted.
    """
    kind = type(module)
    counterpart = getattr(activations, kind.__name__, None)
    of_torch = counterpart is not None and getattr(nn, kind.__name__, None) is kind
    if not of_torch or kind.__name__ not in activations.__all__ or "forward" in vars(module):
        return module
    assert counterpart is not None
    result = counterpart.__new__(counterpart)
    nn.Module.__init__(result)
    _taking_over(result, module)
    if issubclass(counterpart, activations.FewBitActivation):
        made = activations.Sigmoid(**kwargs)  # all of them have these attributes
        vars(result).update({name: vars(made)[name] for name in ("_bits", "_steps", "_rounding", "criterion")})
    return result


def _taking_over(result: nn.Module, module: nn.Module) -> nn.Module:
    """Gives ``result`` the state of a module: parameters, hooks, training mode and any other attributes."""
    for name, value in vars(module).items():
        # Hook dictionaries are shared, since handles remove hooks from them; other containers are copied.
        shared = "hooks" in name or not isinstance(value, (dict, set))
        vars(result)[name] = value if shared else value.copy()
    return result
