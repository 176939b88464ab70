"""Replacing modules of a model one by one, by a function: FewBit's ``map_module`` and ``convert_linear``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .nn import activations

__all__ = ["convert_activation", "convert_linear", "map_module"]


def map_module(
    root: nn.Module, fn: Callable[[nn.Module], nn.Module], pattern: str | re.Pattern[str] | None = None
) -> nn.Module:
    r"""Replaces every module of a model by what a function makes of it, in place.

    Modules inside others come first, the root comes last. A module that is used in several places is given to ``fn``
    once, and the same new module takes its place in all of them. What ``fn`` brings with it is not given to it.

    Example:
        >>> converter = lambda m: lomem.convert_linear(m, lomem.nn.RandomizedLinear, proj_dim_ratio=0.2)
        >>> model = lomem.map_module(model, converter, pattern=r"^encoder\\.")

    Args:
        root: The model; changed in place.
        fn: Of a module, returns what is to take its place, or the module itself to leave it.
        pattern: Regular expression, searched in the qualified names (``"encoder.layer.0"``; the root's is empty).
            ``fn`` is given the modules that it is found in; those of several names, if it is found in one of them. By
            default all.

    Returns:
        The root, or what ``fn`` made of it.
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"lomem.map_module: root is of type {type(root).__name__}, expected a torch.nn.Module")
    if not callable(fn):
        raise TypeError(f"lomem.map_module: fn is of type {type(fn).__name__}, expected a function of a module")
    found = _pattern(pattern).search
    chosen = {id(module) for name, module in root.named_modules(remove_duplicate=False) if found(name)}
    # The modules themselves are the keys, and so alive: an address may be another module's soon after.
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in replaced:
            for name, child in list(module._modules.items()):
                if child is not None and (new := visit(child)) is not child:
                    _replace(module, name, new)
            replaced[module] = _checked(fn(module), module) if id(module) in chosen else module
        return replaced[module]

    return visit(root)


def _pattern(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile("" if pattern is None else pattern)
    except (TypeError, re.error) as error:
        raise ValueError(f"lomem.map_module: pattern is {pattern!r}, expected a regular expression: {error}") from error


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"lomem.map_module: fn returned a {type(new).__name__} for module {name!r} of a ScriptModule, whose "
            "modules cannot be replaced, expected the module itself"
        )
    setattr(module, name, new)


def _checked(result: object, module: nn.Module) -> nn.Module:
    if not isinstance(result, nn.Module):
        raise TypeError(
            f"lomem.map_module: fn returned {type(result).__name__} for a {type(module).__name__}, expected a module"
        )
    return result


def convert_linear(module: nn.Module, cls: Callable[..., nn.Linear], **kwargs: Any) -> nn.Module:
    """Makes another kind of linear layer of an :class:`torch.nn.Linear`.

    The new layer has the same parameters (the tensors themselves, so that optimizers and ties go on), the same training
    mode and the same hooks, which the two share, so that their handles go on. Everything else is returned as it is:
    modules that are not linear layers; subclasses of :class:`torch.nn.Linear`, which compute or keep something of their
    own (quantized layers, the output projection of :class:`torch.nn.MultiheadAttention`, layers that are converted
    already); and linear layers whose ``forward`` was replaced, since that would be lost.

    Args:
        module: Any module; not changed.
        cls: :class:`lomem.nn.RandomizedLinear`, or another subclass of :class:`torch.nn.Linear` with its arguments.
        **kwargs: Further arguments of ``cls``.

    Returns:
        The new layer, or ``module``.
    """
    if type(module) is not nn.Linear or "forward" in vars(module):
        return module
    # Made without memory and without random numbers; what it holds is replaced.
    result = cls(module.in_features, module.out_features, module.bias is not None, device="meta", **kwargs)
    return _taking_over(result, module)


def convert_activation(module: nn.Module, **kwargs: Any) -> nn.Module:
    """Makes the activation of :mod:`lomem.nn` of the same name of one of :mod:`torch.nn`.

    The new module has the same arguments, training mode and hooks. Everything else is returned as it is, subclasses of
    torch's activations too.

    Example:
        >>> model = lomem.map_module(model, lambda m: lomem.convert_activation(m, bits=4))

    Args:
        module: Any module; not changed.
        **kwargs: ``bits`` and ``criterion`` of the new module, see :class:`lomem.nn.FewBitActivation`; not used for
            those of straight pieces, which keep 1 bit.

    Returns:
        The new module, or ``module``.
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
        made = activations.QuickGELU(**kwargs)  # of which the attributes are what all of them have
        vars(result).update({name: vars(made)[name] for name in ("_bits", "_steps", "criterion")})
    return result


def _taking_over(result: nn.Module, module: nn.Module) -> nn.Module:
    """The result with what a module holds: parameters, hooks, training mode, and what others have noted there."""
    for name, value in vars(module).items():
        # Hooks: the very dictionaries, for the handles that remove them. Else, containers of its own.
        shared = "hooks" in name or not isinstance(value, (dict, set))
        vars(result)[name] = value if shared else value.copy()
    return result
