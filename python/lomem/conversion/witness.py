"""Runs a single module on synthetic inputs, and records its result, its writes and its ops."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .._trace.state import exclusive, generators_of, module_state, restore_module
from ..functional.norms import LAYER_NORM, RMS_NORM

__all__ = [
    "ACTIVATION_OPS",
    "LINEAR_OPS",
    "MODES",
    "NORM_OPS",
    "Refused",
    "Run",
    "attributes",
    "gradients",
    "own_tensors",
    "quietly",
    "run",
    "tensor_attribute",
    "unexplained",
    "uninitialized",
    "with_values",
]


class Refused(Exception):  # noqa: N818
    """A module is not what it was tested as.

    Args:
        reason: A clause about the module.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


#: Training and evaluation mode, each without gradients and with them.
MODES = ((False, False), (True, True), (True, False), (False, True))


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    """
    view _unsafe_view _reshape_alias permute transpose t unsqueeze squeeze expand alias slice select detach clone copy
    _to_copy to contiguous lift lift_fresh lift_fresh_copy empty empty_like empty_strided new_empty new_empty_strided
    zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full scalar_tensor fill zero is_same_size
    sym_size sym_stride sym_numel sym_storage_offset
    """
)
_ARITHMETIC = _names("add sub rsub mul div neg reciprocal addcmul addcdiv pow square sqrt rsqrt")
#: Ops that a layer or RMS norm may consist of. None is flat or has a kink anywhere, except for roots of squares, which
#: negative weights reveal. So a few inputs are representative of all.
NORM_OPS = (
    _MOVES
    | _ARITHMETIC
    | _names("mean sum var var_mean std std_mean linalg_vector_norm norm")
    | _names("native_layer_norm native_group_norm rms_norm _fused_rms_norm")
    | {op._schema.name for norm in (LAYER_NORM, RMS_NORM) for op in (norm.op, norm.forward)}
)
#: Ops that GELU and SiLU may consist of.
ACTIVATION_OPS = _MOVES | _ARITHMETIC | _names("erf erfc special_ndtr tanh sigmoid exp expm1 gelu silu")
#: Ops that a linear layer may consist of. Products with a number are excluded, since the number may change later.
LINEAR_OPS = _MOVES | _names("mm addmm bmm baddbmm mv addmv linear matmul add _addmm_activation")

#: Names of ops as users know them.
_SPOKEN = {"_local_scalar_dense": "item", "native_dropout": "dropout", "native_batch_norm": "batch_norm"}


def _name(func: torch._ops.OpOverload, args: tuple[Any, ...], result: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    # In place or not, an op computes the same. But a rounding mode makes it a different one.
    name = name.rstrip("_") if not name.endswith("__") else name
    if func._overloadname.endswith("_mode"):
        name = f"{name} with a rounding mode"
    if name in _MOVES and args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
        integers = args[0].is_floating_point() and not result.is_floating_point()
        # A cast to integers has zero gradient.
        name = f"a cast to {str(result.dtype)[6:]}" if integers else name
    return name if namespace == "aten" else f"{namespace}::{name}"


def unexplained(ops: Iterable[str], explained: frozenset[str]) -> str | None:
    """The first op that is not among the allowed ones, or None."""
    for name in ops:
        if name not in explained and not name.startswith("prim::"):
            return _SPOKEN.get(name, name)
    return None


class _Ops(TorchDispatchMode):
    """Records the ops of one run.

    Args:
        keep: Whether to keep the results of the ops.
        grad: Whether the module's arguments and tensors require grad.
    """

    def __init__(self, keep: bool, grad: bool) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.results: list[Tensor] = []
        self.foreign = False
        self._keep, self._grad = keep, grad

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._grad:
            # A tensor that requires grad comes from elsewhere.
            self.foreign |= any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values()))
        result = func(*args, **kwargs)
        self.ops.append(_name(func, args, result))
        if self._keep:
            self.results += [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        return result


@dataclass
class Run:
    """One run of a module.

    Attributes:
        value: The result.
        ops: Names of its ops.
        written: Whether the module wrote to its input.
        foreign: Whether it used a tensor that requires grad and is not one of its own.
        results: Results of its ops, if requested.
    """

    value: Tensor
    ops: list[str]
    written: bool
    foreign: bool
    results: list[Tensor]


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    # Compiled functions take seconds and hide their ops. If there are any, torch._dynamo has been imported.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def quietly() -> Iterator[torch.Generator]:
    """Isolates the block: real tensors even under fake mode, no graph, no autocast, no change to global generators.

    One thread at a time is in such a block.
    """
    with (
        exclusive,
        warnings.catch_warnings(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.autograd.set_detect_anomaly(False),  # some gradients are NaN on purpose
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),  # override any outer hooks
        _eagerly(),
    ):
        warnings.simplefilter("ignore")  # about mixes of dtypes, which are tried on purpose
        yield torch.Generator().manual_seed(0)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, without submodules."""
    tensors = {**dict(module._parameters.items()), **dict(module._buffers.items())}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, without those that every module has."""
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


def tensor_attribute(module: nn.Module) -> str | None:
    """Name of an attribute that is or holds a tensor but is not a parameter or buffer; None if there is none."""
    for name, value in attributes(module).items():
        leaves = tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return name
    return None


@contextlib.contextmanager
def with_values(module: nn.Module, values: Mapping[str, Tensor], changed: Mapping[str, Any]) -> Iterator[None]:
    """Gives a module other parameters and attributes inside the block.

    The module is not copied: its parameters may be anything (fake, sharded, subclasses), and it may refer to the whole
    model. Its changes to itself are undone.
    """
    if isinstance(module, torch.jit.ScriptModule):
        yield  # its parameters cannot be replaced
        return
    before = module_state(module)
    drawn = [(generator, generator.get_state()) for generator in generators_of(module)]
    try:
        for name, tensor in own_tensors(module).items():
            table = module._parameters if name in module._parameters else module._buffers
            table[name] = values[name] if name in values else tensor.detach().clone()  # type: ignore[assignment]
        for name, value in changed.items():
            setattr(module, name, value)
        yield
    finally:
        restore_module(module, *before)
        for generator, state in drawn:
            generator.set_state(state)


def uninitialized(module: nn.Module) -> bool:
    """Whether a module is lazy and has not run yet."""
    return any(is_lazy(t) for t in own_tensors(module).values())


def _bits(tensor: Tensor) -> Tensor:
    # NaN is not equal to itself, but its bytes are.
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, and the contents of containers among them."""

    def contents(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(v)) for key, v in value.items()]
        return [id(v) for v in value] if isinstance(value, list | set) else None

    return {name: (value, contents(value)) for name, value in attributes(module).items()}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first attribute that was set or deleted, or whose contents changed; None if there is none."""
    for name in {**before, **after}:
        (a, x), (b, y) = before.get(name, (Refused, None)), after.get(name, (Refused, None))
        if a is not b or x != y:
            return name
    return None


def run(
    module: nn.Module,
    values: Mapping[str, Tensor],
    x: Tensor,
    *,
    training: bool = False,
    grad: bool = False,
    keep: bool = False,
    changed: Mapping[str, Any] | None = None,
) -> Run:
    """Runs a module on one tensor, without its hooks, which are the user's.

    Args:
        module: The module.
        values: Tensors that replace its own; the others stay.
        x: Its argument, which is copied.
        training: The mode.
        grad: Whether input and values require grad.
        keep: Whether to keep the results of its ops.
        changed: Attributes that replace its own.
    """
    with torch.set_grad_enabled(grad):
        # Not a leaf: leaves that require grad cannot be written to.
        argument = x.detach().clone().requires_grad_(grad).clone()
        version = argument._version
        values = {name: value.detach().clone().requires_grad_(grad) for name, value in values.items()}
        ops = _Ops(keep, grad)
        try:
            with with_values(module, values, changed or {}):
                if not isinstance(module, torch.jit.ScriptModule):
                    module.training = training
                state = _state(module)
                with ops:
                    result = module.forward(argument)
                touched = _changed(state, _state(module))
        except Exception as error:
            raise Refused("it does not run on a single synthetic tensor") from error
    if touched is not None:
        raise Refused(f"its forward changes its attribute {touched}")
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise Refused("its result is not a floating-point tensor")
    written = argument._version != version or not torch.equal(_bits(argument), _bits(x))
    return Run(result.detach(), ops.ops, written, ops.foreign, ops.results)


def gradients(
    module: nn.Module, values: Mapping[str, Tensor], x: Tensor, weights: Tensor, training: bool
) -> list[Tensor]:
    """Gradients of a weighted sum of the result, with respect to input and values."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        try:
            with with_values(module, values, {}):
                if not isinstance(module, torch.jit.ScriptModule):
                    module.training = training
                result = module.forward(x * 1)
            return list(torch.autograd.grad(result, [x, *values.values()], weights.to(result.dtype)))
        except Exception as error:
            raise Refused("it has no gradient") from error
