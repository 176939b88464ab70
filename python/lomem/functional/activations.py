"""The family of activations with few-bit derivatives, under the names and arguments of torch.nn.functional.

Imported by :mod:`lomem.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_unary
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _C
from ..steps import StepFunction

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "quick_gelu",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "step_activation",
    "step_function",
    "tanh",
    "tanhshrink",
    "threshold",
]

_step_activation = torch.ops.lomem.step_activation.default
_hard_activation = torch.ops.lomem.hard_activation.default
_step_codes = torch.ops.lomem.step_codes.default
_step_activation_backward = torch.ops.lomem.step_activation_backward.default


def _check_numbers(function: str, parameters: Sequence[Any]) -> None:
    for value in parameters:
        if isinstance(value, Tensor):
            raise TypeError(
                f"lomem.functional.{function}: got a tensor as parameter, expected a number: it would get no gradient"
            )


def is_jagged(input: Any) -> bool:
    """Whether ``input`` is a nested tensor of layout ``torch.jagged``: of those, torch's own ops are called."""
    # (Ordinary tensors are not asked, for it costs; proxies are not, for they answer with proxies. To a compiler a
    # jagged tensor has no function of its own.)
    if not (is_compiling() or has_torch_function_unary(input)) or not isinstance(input, Tensor):
        return False
    return input.is_nested and input.layout == torch.jagged


# The names of the ops' functions that are not those of torch's, and torch's functions without ``inplace``.
_TORCH_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
}


def _of_torch(function: str, input: Tensor, parameters: Sequence[float], inplace: bool) -> Tensor:
    if function in _TORCH_FUNCTIONS:
        return _TORCH_FUNCTIONS[function](input, *parameters)
    result: Tensor = getattr(F, function)(input, *parameters, inplace=inplace)
    return result


def _few_bit(
    function: str,
    input: Tensor,
    parameters: Sequence[float],
    bits: int,
    criterion: str,
    steps: StepFunction | None,
    inplace: bool = False,
) -> Tensor:
    _check_numbers(function, parameters)
    if is_jagged(input):
        if not is_compiling():  # raises as the op does
            _C.step_function(function, bits if steps is None else steps.bits, criterion, parameters)
        return _of_torch(function, input, parameters, inplace)
    if steps is None:
        output = _step_activation(input, function, parameters, bits, criterion=criterion)
    else:
        output = _step_activation(
            input,
            function,
            parameters,
            steps.bits,
            criterion=criterion,
            boundaries=steps.boundaries,
            levels=steps.levels,
        )
    return input.copy_(output) if inplace else output


def _exact(function: str, input: Tensor, parameters: Sequence[float] = (), inplace: bool = False) -> Tensor:
    _check_numbers(function, parameters)
    if is_jagged(input):
        return _of_torch(function, input, parameters, inplace)
    output = _hard_activation(input, function, parameters)
    return input.copy_(output) if inplace else output


def gelu(
    input: Tensor,
    approximate: str = "none",
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """GELU whose backward pass keeps ``bits`` bits an element.

    The result is bit for bit ``F.gelu(input, approximate=approximate)``. The gradient is ``grad_output`` times a step
    function of ``2**bits`` levels.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16. NaN is above no boundary.
        approximate: ``"none"`` or ``"tanh"``.
        bits: 1 to 8.
        criterion: What the library's step function is the best at, in the mean square over the line: ``"primitive"``,
            its integral is nearest to the activation (Yang et al., ICML 2024, arXiv:2406.16282; of 2 bits it is that of
            :func:`regelu2`); ``"derivative"``, it is nearest to the derivative (Novikov et al., arXiv:2202.00441).
        steps: A step function in place of the library's, with bits of its own, as :mod:`lomem.fit` makes them.

    Returns:
        A tensor of the shape, dtype and strides that ``F.gelu`` returns. Saved for backward:
        ``ceil(bits * numel / 8)`` bytes.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"lomem.functional.gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return _few_bit("gelu" if approximate == "none" else "gelu_tanh", input, (), bits, criterion, steps)


def quick_gelu(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``input * sigmoid(1.702 * input)``, as CLIP has it, whose backward pass keeps ``bits`` bits an element.

    Arguments and what is saved: as of :func:`gelu`.
    """
    return _few_bit("quick_gelu", input, (), bits, criterion, steps)


def silu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.silu`` whose backward pass keeps ``bits`` bits an element. Arguments and what is saved: as of :func:`gelu`.

    With ``inplace`` the result overwrites ``input``; a temporary of its size is made either way.
    """
    return _few_bit("silu", input, (), bits, criterion, steps, inplace)


def mish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.mish`` whose backward pass keeps ``bits`` bits an element. Arguments: as of :func:`silu`."""
    return _few_bit("mish", input, (), bits, criterion, steps, inplace)


def sigmoid(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``torch.sigmoid`` whose backward pass keeps ``bits`` bits an element, not the output.

    Arguments: as of :func:`gelu`. torch keeps the output, which costs nothing more where the next operation keeps it
    too.
    """
    return _few_bit("sigmoid", input, (), bits, criterion, steps)


def tanh(input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None) -> Tensor:
    """``torch.tanh`` whose backward pass keeps ``bits`` bits an element, not the output; see :func:`sigmoid`."""
    return _few_bit("tanh", input, (), bits, criterion, steps)


def tanhshrink(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``F.tanhshrink`` whose backward pass keeps ``bits`` bits an element. Arguments: as of :func:`gelu`."""
    return _few_bit("tanhshrink", input, (), bits, criterion, steps)


def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.softplus`` whose backward pass keeps ``bits`` bits an element. Other arguments: as of :func:`gelu`.

    Args:
        input: As of :func:`gelu`.
        beta: Positive. The step function is that of ``beta`` 1 with its boundaries divided by ``beta``, which is the
            best one too.
        threshold: Above ``threshold / beta`` the function is the identity. Where that is not far out, the steps for
            ``"derivative"`` are fitted to it at the first call (with 8 bits a third of a second); for ``"primitive"``,
            which has no jumps, they are those of log(1 + exp(beta x)) / beta.
        bits: 1 to 8.
        criterion: ``"primitive"`` or ``"derivative"``.
        steps: A step function in place of the library's.
    """
    return _few_bit("softplus", input, (beta, threshold), bits, criterion, steps)


def softsign(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``F.softsign`` whose backward pass keeps ``bits`` bits an element. Arguments: as of :func:`gelu`."""
    return _few_bit("softsign", input, (), bits, criterion, steps)


def logsigmoid(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``F.logsigmoid`` whose backward pass keeps ``bits`` bits an element. Arguments: as of :func:`gelu`."""
    return _few_bit("logsigmoid", input, (), bits, criterion, steps)


def elu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.elu`` whose backward pass keeps ``bits`` bits an element. Other arguments: as of :func:`silu`.

    Args:
        input: As of :func:`gelu`.
        alpha: Finite. Where it is not 1, so that the derivative jumps at 0, the steps are fitted at the first call, in
            less than a tenth of a second.
        inplace: Whether the result overwrites ``input``.
        bits: 1 to 8.
        criterion: ``"primitive"`` or ``"derivative"``.
        steps: A step function in place of the library's.
    """
    return _few_bit("elu", input, (alpha,), bits, criterion, steps, inplace)


def celu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.celu`` whose backward pass keeps ``bits`` bits an element. Other arguments: as of :func:`silu`.

    ``alpha``: positive; the step function is ELU's with its boundaries multiplied by ``alpha``, which is the best one.
    """
    return _few_bit("celu", input, (alpha,), bits, criterion, steps, inplace)


def selu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.selu`` whose backward pass keeps ``bits`` bits an element. Arguments: as of :func:`silu`."""
    return _few_bit("selu", input, (), bits, criterion, steps, inplace)


def hardswish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.hardswish`` whose backward pass keeps ``bits`` bits an element. Arguments: as of :func:`silu`."""
    return _few_bit("hardswish", input, (), bits, criterion, steps, inplace)


# Activations of straight pieces. Their derivative has two values: one bit an element is all of it.


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``, forward and gradient, whose backward pass keeps 1 bit an element, not the output.

    torch keeps the output, which costs nothing more where the next operation keeps it too: a linear or convolutional
    layer behind it does, a pooling layer may not.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        inplace: Whether the result overwrites ``input``; a temporary of its size is made either way.

    Returns:
        What ``F.relu`` returns. Saved for backward: ``ceil(numel / 8)`` bytes. The gradient is torch's, at the kinks
        too; where the derivative is 0, it is 0 for an infinite ``grad_output`` as well.
    """
    return _exact("relu", input, inplace=inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``F.leaky_relu``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`relu`."""
    return _exact("leaky_relu", input, (negative_slope,), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`relu`.

    At NaN the gradient is 0.
    """
    return _exact("relu6", input, inplace=inplace)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``F.threshold``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`relu`."""
    return _exact("threshold", input, (threshold, value), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``F.hardtanh``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`relu6`."""
    if min_val > max_val:
        raise ValueError(f"lomem.functional.hardtanh: min_val is {min_val}, expected at most max_val, {max_val}")
    return _exact("hardtanh", input, (min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`relu6`."""
    return _exact("hardsigmoid", input, inplace=inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``F.hardshrink``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`relu`.

    At NaN the gradient is ``grad_output``.
    """
    return _exact("hardshrink", input, (lambd,))


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``F.softshrink``, forward and gradient, whose backward pass keeps 1 bit an element; see :func:`hardshrink`."""
    return _exact("softshrink", input, (lambd,))


def step_function(
    function: str, bits: int, *, criterion: str = "derivative", parameters: Sequence[float] = ()
) -> StepFunction:
    """The step function that the library has for an activation.

    Args:
        function: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, ``"silu"``, ``"mish"``, ``"sigmoid"``, ``"tanh"``,
            ``"tanhshrink"``, ``"softplus"``, ``"softsign"``, ``"logsigmoid"``, ``"elu"``, ``"celu"``, ``"selu"`` or
            ``"hardswish"``.
        bits: 1 to 8.
        criterion: ``"primitive"`` or ``"derivative"``; see :func:`gelu`.
        parameters: All of the function's: ``(beta, threshold)`` of softplus, ``(alpha,)`` of elu and celu.
    """
    boundaries, levels = _C.step_function(function, bits, criterion, parameters)
    return StepFunction(tuple(boundaries), tuple(levels))


def _checked(fn: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``fn(input)``, of which nothing is expected but that it works element by element and returns a tensor."""
    version = None if is_compiling() or input.is_inference() else input._version
    output = fn(input)
    name = "lomem.functional.step_activation"
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{name}: fn returns {kind}, expected a tensor of floating-point numbers")
    if output.shape != input.shape:
        raise ValueError(
            f"{name}: fn returns shape {tuple(output.shape)}, expected that of its argument, {tuple(input.shape)}"
        )
    if version is not None and input._version != version:
        raise ValueError(f"{name}: fn writes to its argument, expected that it leaves it alone")
    return output


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_input(input: Tensor) -> None:
    """As the ops check theirs: ``fn`` may take anything."""
    name = "lomem.functional.step_activation"
    if input.is_nested:
        raise ValueError(f"{name}: input is a nested tensor, expected a dense one")
    if input.layout != torch.strided:
        raise ValueError(f"{name}: input has layout {input.layout}, expected a dense (torch.strided) tensor")
    if input.dtype not in _FLOATS:
        dtype = str(input.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: input has dtype {dtype}, expected float64, float32, bfloat16 or float16")
    if not is_compiling() and input.numel() > 2**59 - 1:
        raise ValueError(f"{name}: input has {input.numel()} elements, expected at most {2**59 - 1}")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if is_traceable_wrapper_subclass(a) and is_traceable_wrapper_subclass(b):
        return any(
            _share_memory(getattr(a, of_a), getattr(b, of_b))
            for of_a in a.__tensor_flatten__()[0]
            for of_b in b.__tensor_flatten__()[0]
        )
    # (Its address would be asked of what has none: a wrapper's storage holds nothing.)
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class _WithSteps(torch.autograd.Function):
    """A function of the caller's, with the derivative of a step function."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, fn: Callable[[Tensor], Tensor], steps: StepFunction) -> Tensor:
        ctx.steps = steps
        ctx.save_for_backward(_step_codes(input, steps.boundaries, steps.bits))
        output = _checked(fn, input.detach())
        # What shares memory with the input would be taken for it. (Compilers see to that themselves.)
        return output.clone() if not is_compiling() and _share_memory(output, input) else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        steps = ctx.steps
        return _step_activation_backward(grad_output, codes, steps.levels, steps.bits), None, None


def step_activation(
    input: Tensor,
    fn: Callable[[Tensor], Tensor],
    boundaries: Sequence[float],
    levels: Sequence[float],
) -> Tensor:
    """``fn(input)`` with a derivative of steps: ``grad_output * levels[number of boundaries below input]``.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        fn: A function of one tensor that works element by element: its result has the shape of its argument. It is
            called without a gradient, and parameters of its own get none.
        boundaries: Ascending; ``2**bits - 1`` of them, ``bits`` from 1 to 8. float64 inputs are compared with them as
            given, others with their float32 roundings. :mod:`lomem.fit` finds the best ones for a function.
        levels: ``2**bits``.

    Returns:
        ``fn(input)``. Saved for backward: ``ceil(bits * numel / 8)`` bytes. ``torch.jit.trace`` records ``fn`` with
        its exact gradient: a graph of TorchScript cannot hold the other one.
    """
    steps = StepFunction(tuple(boundaries), tuple(levels))
    if isinstance(fn, torch.nn.Module) and any(p.requires_grad for p in fn.parameters()):
        raise ValueError(
            f"lomem.functional.step_activation: fn, a {type(fn).__name__}, has parameters that require gradients, "
            "expected none: they would get no gradient"
        )
    if not is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        raise NotImplementedError(
            "lomem.functional.step_activation: called under torch.func or forward-mode differentiation, expected "
            "neither: they are not supported"
        )
    if not is_compiling() and torch.jit.is_tracing():
        return fn(input)
    if is_jagged(input):
        return _checked(fn, input)
    _check_input(input)
    if torch.is_grad_enabled() and input.requires_grad:
        return _WithSteps.apply(input, fn, steps)
    with torch.no_grad():
        return _checked(fn, input)
