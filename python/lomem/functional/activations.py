"""The activations, under the names and arguments of :mod:`torch.nn.functional`."""

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
    "regelu2",
    "relu",
    "relu6",
    "resilu2",
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
_regelu2 = torch.ops.lomem.regelu2.default
_resilu2 = torch.ops.lomem.resilu2.default
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
    parameters: tuple[float, ...],
    bits: int,
    criterion: str,
    steps: StepFunction | None,
    inplace: bool = False,
    fast: bool = False,
) -> Tensor:
    if steps is not None:
        bits, criterion = steps.bits, "derivative" if criterion == "paper" else criterion
    if not (has_torch_function_unary(input) or is_compiling()):
        # (The values do not depend on the steps.)
        if steps is None or not (input.requires_grad and torch.is_grad_enabled()):
            output = _C.step_activation(input, function, parameters, bits, criterion, fast)
            if output is not NotImplemented:
                return input.copy_(output) if inplace else output
    return _few_bit_op(function, input, parameters, bits, criterion, steps, inplace, fast)


def _few_bit_op(
    function: str,
    input: Tensor,
    parameters: tuple[float, ...],
    bits: int,
    criterion: str,
    steps: StepFunction | None,
    inplace: bool,
    fast: bool,
) -> Tensor:
    """As compilers and subclasses of tensors see it."""
    _check_numbers(function, parameters)
    if is_jagged(input):
        if not is_compiling():  # raises as the op does
            _C.step_function(function, bits, criterion, parameters)
        return _of_torch(function, input, parameters, inplace)
    spelled = {} if steps is None else {"boundaries": steps.boundaries, "levels": steps.levels}
    output = _step_activation(input, function, parameters, bits, criterion=criterion, fast=fast, **spelled)
    return input.copy_(output) if inplace else output


def _exact(function: str, input: Tensor, parameters: tuple[float, ...] = (), inplace: bool = False) -> Tensor:
    if not (has_torch_function_unary(input) or is_compiling()):
        output = _C.hard_activation(input, function, parameters)
        if output is not NotImplemented:
            return input.copy_(output) if inplace else output
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
    fast: bool = False,
) -> Tensor:
    """GELU that saves ``bits`` bits per element for the backward pass.

    The result is bit for bit ``F.gelu(input, approximate=approximate)``. The gradient is ``grad_output`` times a step
    function of ``2**bits`` levels.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16. NaN is above no boundary.
        approximate: ``"none"`` or ``"tanh"``.
        bits: 1 to 8.
        criterion: Which step function stands in for the derivative. ``"derivative"``: the one that is nearest to the
            derivative in the mean square over the line (Novikov et al., arXiv:2202.00441). ``"primitive"``: the one
            whose integral is nearest to the activation (Yang et al., ICML 2024, arXiv:2406.16282). ``"paper"``: the
            one that the latter paper publishes, which exists for GELU, QuickGELU and SiLU at 2 bits; see
            :func:`regelu2`.
        steps: A step function in place of the library's, with bits of its own, as :mod:`lomem.fit` makes them.
        fast: Allows a faster forward pass that is not bit for bit torch's; see :func:`regelu2`.

    Returns:
        A tensor of the shape, dtype and strides that ``F.gelu`` returns. Saved for backward:
        ``ceil(bits * numel / 8)`` bytes.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"lomem.functional.gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    function = "gelu" if approximate == "none" else "gelu_tanh"
    return _few_bit(function, input, (), bits, criterion, steps, fast=fast)


def quick_gelu(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``input * sigmoid(1.702 * input)``, as CLIP has it, that saves ``bits`` bits per element.

    Arguments and what is saved are those of :func:`gelu`.
    """
    return _few_bit("quick_gelu", input, (), bits, criterion, steps)


def silu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    fast: bool = False,
) -> Tensor:
    """``F.silu`` that saves ``bits`` bits per element. Arguments and what is saved are those of :func:`gelu`.

    With ``inplace`` the result overwrites ``input``; a temporary of its size is made either way.
    """
    return _few_bit("silu", input, (), bits, criterion, steps, inplace, fast)


def mish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.mish`` that saves ``bits`` bits per element. Arguments as in :func:`silu`."""
    return _few_bit("mish", input, (), bits, criterion, steps, inplace)


def sigmoid(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``torch.sigmoid`` that saves ``bits`` bits per element, not the output.

    Arguments as in :func:`gelu`. torch keeps the output, which costs nothing more where the next operation keeps it
    too.
    """
    return _few_bit("sigmoid", input, (), bits, criterion, steps)


def tanh(input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None) -> Tensor:
    """``torch.tanh`` that saves ``bits`` bits per element, not the output; see :func:`sigmoid`."""
    return _few_bit("tanh", input, (), bits, criterion, steps)


def tanhshrink(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``F.tanhshrink`` that saves ``bits`` bits per element. Arguments as in :func:`gelu`."""
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
    """``F.softplus`` that saves ``bits`` bits per element. Other arguments as in :func:`gelu`.

    Args:
        input: As in :func:`gelu`.
        beta: Positive. The step function is that of ``beta`` 1 with its boundaries divided by ``beta``, which is the
            best one too.
        threshold: Above ``threshold / beta`` the function is the identity. Where that is not far out, the steps for
            ``"derivative"`` are fitted to it at the first call (with 8 bits a third of a second); for ``"primitive"``,
            which has no jumps, they are those of log(1 + exp(beta x)) / beta.
        bits: 1 to 8.
        criterion: ``"derivative"`` or ``"primitive"``; see :func:`gelu`.
        steps: A step function in place of the library's.
    """
    return _few_bit("softplus", input, (beta, threshold), bits, criterion, steps)


def softsign(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``F.softsign`` that saves ``bits`` bits per element. Arguments as in :func:`gelu`."""
    return _few_bit("softsign", input, (), bits, criterion, steps)


def logsigmoid(
    input: Tensor, *, bits: int = 3, criterion: str = "derivative", steps: StepFunction | None = None
) -> Tensor:
    """``F.logsigmoid`` that saves ``bits`` bits per element. Arguments as in :func:`gelu`."""
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
    """``F.elu`` that saves ``bits`` bits per element. Other arguments as in :func:`silu`.

    Args:
        input: As in :func:`gelu`.
        alpha: Finite. Where it is not 1, so that the derivative jumps at 0, the steps are fitted at the first call, in
            less than a tenth of a second.
        inplace: Whether the result overwrites ``input``.
        bits: 1 to 8.
        criterion: ``"derivative"`` or ``"primitive"``; see :func:`gelu`.
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
    """``F.celu`` that saves ``bits`` bits per element. Other arguments as in :func:`silu`.

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
    """``F.selu`` that saves ``bits`` bits per element. Arguments as in :func:`silu`."""
    return _few_bit("selu", input, (), bits, criterion, steps, inplace)


def hardswish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
) -> Tensor:
    """``F.hardswish`` that saves ``bits`` bits per element. Arguments as in :func:`silu`."""
    return _few_bit("hardswish", input, (), bits, criterion, steps, inplace)


# Names of LowMemoryBP, so that its users change nothing.


def regelu2(input: Tensor, approximate: str = "none", *, fast: bool = False) -> Tensor:
    """GELU that saves 2 bits per element: :func:`gelu` with ``bits=2, criterion="paper"``.

    The gradient is that of a sum of three ReLUs, a step function of four levels, fitted to GELU (Yang et al., ICML
    2024, arXiv:2406.16282, ReGELU2). A NaN input gives a NaN result and, as it is above no boundary, the gradient of
    the lowest level, 0.

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        approximate: ``"none"`` or ``"tanh"``, as in ``F.gelu``. The step function is the same.
        fast: Allows a faster forward pass on CPUs with AVX2 or AVX-512: minimax polynomials of the same function,
            evaluated in float32, in place of torch's. Results are then not bit for bit torch's. float32: within 2.2
            units in the last place of the exact value for x > -3.375, and within 2e-10 below. 16 bits: rounded
            correctly for x > -5.5, except near ties. Below -7.63 they are 0. float64, other devices and inputs with
            gaps in memory are computed as without.

    Returns:
        A tensor of the shape, dtype and strides that ``F.gelu`` returns. Saved for backward: ``ceil(numel / 4)``
        bytes.
    """
    if has_torch_function_unary(input) or is_compiling():  # graphs keep the name
        if is_jagged(input):
            return F.gelu(input, approximate=approximate)
        return _regelu2(input, approximate=approximate, fast=fast)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"lomem.functional.regelu2: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return _few_bit("gelu" if approximate == "none" else "gelu_tanh", input, (), 2, "paper", None, fast=fast)


def resilu2(input: Tensor, *, fast: bool = False) -> Tensor:
    """SiLU that saves 2 bits per element: :func:`silu` with ``bits=2, criterion="paper"``.

    The gradient is that of a sum of three ReLUs, a step function of four levels, fitted to SiLU (Yang et al., ICML
    2024, arXiv:2406.16282, ReSiLU2).

    Args:
        input: Any shape and strides; float64, float32, bfloat16 or float16.
        fast: As in :func:`regelu2`. float32: within 4 units in the last place of the exact value for x > -22, and
            within 6e-9 below. 16 bits: rounded correctly for x > -22, except near ties. Below -22.2 they are 0.

    Returns:
        A tensor of the shape, dtype and strides that ``F.silu`` returns. Saved for backward: ``ceil(numel / 4)``
        bytes.
    """
    if has_torch_function_unary(input) or is_compiling():
        if is_jagged(input):
            return F.silu(input)
        return _resilu2(input, fast=fast)
    return _few_bit("silu", input, (), 2, "paper", None, fast=fast)


# Activations whose derivative has two values: one bit per element says all of it.


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``, forward and gradient, that saves 1 bit per element, not the output.

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
    """``F.leaky_relu``, forward and gradient, that saves 1 bit per element; see :func:`relu`."""
    return _exact("leaky_relu", input, (negative_slope,), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6``, forward and gradient, that saves 1 bit per element; see :func:`relu`.

    At NaN the gradient is 0.
    """
    return _exact("relu6", input, inplace=inplace)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``F.threshold``, forward and gradient, that saves 1 bit per element; see :func:`relu`."""
    return _exact("threshold", input, (threshold, value), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``F.hardtanh``, forward and gradient, that saves 1 bit per element; see :func:`relu6`."""
    if min_val > max_val:
        raise ValueError(f"lomem.functional.hardtanh: min_val is {min_val}, expected at most max_val, {max_val}")
    return _exact("hardtanh", input, (min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``, forward and gradient, that saves 1 bit per element; see :func:`relu6`."""
    return _exact("hardsigmoid", input, inplace=inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``F.hardshrink``, forward and gradient, that saves 1 bit per element; see :func:`relu`.

    At NaN the gradient is ``grad_output``.
    """
    return _exact("hardshrink", input, (lambd,))


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``F.softshrink``, forward and gradient, that saves 1 bit per element; see :func:`hardshrink`."""
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
        criterion: ``"derivative"``, ``"primitive"`` or ``"paper"``; see :func:`gelu`.
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
