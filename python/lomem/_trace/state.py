"""Restores what a measurement must not change."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _C

#: Held while something of the whole process is set: random numbers, the compiler's stance, filters of warnings, torch's
#: switches. Two threads that did so at the same time would each restore what the other had set, and leave it so.
exclusive = threading.RLock()


@contextlib.contextmanager
def preserved(model: nn.Module, optimizer: Optimizer | None = None, inputs: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restores the model, the optimizer, the inputs and the random state after the block, even if it raises.

    What a training step may change (buffers, the optimizer's parameters and state) is copied to the CPU, and copied
    back bit for bit into the same tensors. Gradients are set aside: inside the block there are none. Attributes and
    hooks of modules are restored, but not changes inside other values (a list that the forward pass appends to). One
    thread at a time is in such a block.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    parameters = list(dict.fromkeys([*model.parameters(), *held]))
    inputs = list(inputs)
    with exclusive, contextlib.ExitStack() as stack:
        stack.enter_context(_random_numbers([*parameters, *model.buffers(), *inputs], generators_of(model)))
        for tensor in inputs:
            stack.callback(_written_back, tensor, _copy(tensor), _version(tensor))
        for tensor in dict.fromkeys([*held, *model.buffers()]):
            stack.callback(_set, tensor, _copy(tensor))
        if optimizer is not None:
            stack.callback(_restore_optimizer, optimizer, *_optimizer_state(optimizer))
        for module in model.modules():
            stack.callback(restore_module, module, *module_state(module))
        for parameter in parameters:
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        yield


def seed(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Seeds torch's random numbers of a model's devices with 0, inside of :func:`preserved`.

    ``torch.manual_seed`` would seed the other devices too, which nobody restores.
    """
    torch.default_generator.manual_seed(0)
    for device in {t.device for t in (*model.parameters(), *model.buffers(), *inputs)}:
        if device.type in ("cpu", "meta"):
            continue
        module: Any = torch.get_device_module(device)
        generators = getattr(module, "default_generators", None)
        if generators:
            generators[device.index or 0].manual_seed(0)
        else:  # of a single device
            module.manual_seed(0)


def generators_of(model: nn.Module) -> list[torch.Generator]:
    """The random number generators that modules hold as attributes."""
    found = (v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Generator))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _random_numbers(tensors: Iterable[Tensor], generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    state = random.getstate()
    numpy = sys.modules.get("numpy")  # transformers uses it to draw masks
    with contextlib.ExitStack() as stack:
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted({d.type for d in devices}):
            indices = sorted(d.index or 0 for d in devices if d.type == kind)
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        stack.callback(random.setstate, state)
        stack.callback(_C.set_random_state, _C.random_state())
        for generator in generators:
            stack.callback(generator.set_state, generator.get_state())
        yield


def _copy(tensor: Tensor) -> Tensor:
    # Meta tensors have no data to copy.
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def _set(tensor: Tensor, value: Tensor) -> None:
    if tensor.is_meta:
        return
    with torch.no_grad():
        tensor.data.copy_(value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _written_back(tensor: Tensor, value: Tensor, version: int | None) -> None:
    # Only an in-place first layer writes to an input. Others may not be writable (expanded), so they are left alone.
    if _version(tensor) != version:
        _set(tensor, value)


#: Where a module keeps its hooks. Its forward pass may add some, as those of transformers do in the first run.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def module_state(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Attributes, parameters, buffers and hooks of a module, for :func:`restore_module`."""
    if isinstance(module, torch.jit.ScriptModule):
        return (dict(vars(module)), script_attributes(module))
    hooks = [dict(vars(module)[name]) for name in _HOOKS]
    return dict(vars(module)), dict(module._parameters), dict(module._buffers), *hooks


def restore_module(module: nn.Module, attributes: dict[str, Any], *tensors: dict[str, Any]) -> None:
    """Restores a module's attributes, parameters, buffers and hooks."""
    if isinstance(module, torch.jit.ScriptModule):
        for name, value in tensors[0].items():
            module._c.setattr(name, value)
        held = [(vars(module), attributes)]
    else:
        parameters, buffers, *hooks = tensors
        held = [(vars(module), attributes), (module._parameters, parameters), (module._buffers, buffers)]
        held += [(attributes[name], before) for name, before in zip(_HOOKS, hooks, strict=True)]
    for now, before in held:
        for name in [name for name in now if name not in before]:
            del now[name]
        now.update(before)


def script_attributes(module: torch.jit.ScriptModule) -> dict[str, Any]:
    """The attributes of a module held by TorchScript rather than in Python, including parameters and buffers."""
    # Not in the stubs.
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
    return {name: module._c.getattr(name) for name in kind.get_attributes()}


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[Tensor, Any], list[tuple[Tensor, Tensor]], list[Any]]:
    def kept(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t, value)  # new containers with the same tensors

    state = {parameter: kept(values) for parameter, values in optimizer.state.items()}
    tensors = [leaf for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor)]
    groups = [kept({name: value for name, value in g.items() if name != "params"}) for g in optimizer.param_groups]
    tensors += [leaf for leaf in tree_leaves(groups) if isinstance(leaf, Tensor)]
    return state, [(tensor, _copy(tensor)) for tensor in tensors], groups


def _restore_optimizer(
    optimizer: Optimizer, state: dict[Tensor, Any], copies: list[tuple[Tensor, Tensor]], groups: list[Any]
) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)
    for tensor, value in copies:
        _set(tensor, value)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)
