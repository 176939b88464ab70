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
from ..steps import DrawnLevels, StepFunction

__all__ = [
    "celu",
    "drawn_levels",
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
_drawn_activation = torch.ops.lomem.drawn_activation.default
_drawn_activation_forward = torch.ops.lomem.drawn_activation_forward.default
_drawn_activation_backward = torch.ops.lomem.drawn_activation_backward.default
_step_codes = torch.ops.lomem.step_codes.default
_step_activation_backward = torch.ops.lomem.step_activation_backward.default


def _check_numbers(function: str, parameters: Sequence[Any]) -> None:
    for value in parameters:
        if isinstance(value, Tensor):
            raise TypeError(
                f"lomem.functional.{function}: got a tensor as parameter, expected a number: a tensor gets no gradient"
            )


def is_jagged(input: Any) -> bool:
    """Whether ``input`` is a nested tensor with layout ``torch.jagged``; for those, torch's own ops are called."""
    # Plain tensors are not queried because of the cost, nor are proxies, which answer with proxies. While compiling,
    # a jagged tensor has no __torch_function__, so every tensor is queried.
    if not (is_compiling() or has_torch_function_unary(input)) or not isinstance(input, Tensor):
        return False
    return input.is_nested and input.layout == torch.jagged


# Functions whose name is not that of a function in torch.nn.functional, or whose torch function has no ``inplace``.
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
    rounding: str,
    seed: Tensor | None,
    inplace: bool = False,
    fast: bool = False,
) -> Tensor:
    if rounding != "nearest" or seed is not None:
        return _drawn(function, input, parameters, bits, criterion, steps, rounding, seed, inplace)
    if steps is not None:
        bits, criterion = steps.bits, "derivative" if criterion == "paper" else criterion
    # User-supplied steps change only the gradient.
    steps_matter = steps is not None and input.requires_grad and torch.is_grad_enabled()
    if not (steps_matter or has_torch_function_unary(input) or is_compiling()):
        output = _C.few_bit_activation(input, function, parameters, bits, criterion, fast)
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
    """The path for compilers and tensor subclasses, through the dispatcher."""
    _check_numbers(function, parameters)
    if is_jagged(input):
        if not is_compiling():  # raises the op's errors for bad arguments
            _C.step_function(function, bits, criterion, parameters)
        return _of_torch(function, input, parameters, inplace)
    spelled = {} if steps is None else {"boundaries": steps.boundaries, "levels": steps.levels}
    output = _step_activation(input, function, parameters, bits, criterion=criterion, fast=fast, **spelled)
    return input.copy_(output) if inplace else output


def _drawn(
    function: str,
    input: Tensor,
    parameters: tuple[float, ...],
    bits: int,
    criterion: str,
    steps: StepFunction | None,
    rounding: str,
    seed: Tensor | None,
    inplace: bool,
) -> Tensor:
    """The path for codes drawn at random."""
    name = f"lomem.functional.{'gelu' if function == 'gelu_tanh' else function}"
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{name}: rounding is {rounding!r}, expected 'nearest' or 'stochastic'")
    if rounding == "nearest":
        raise ValueError(f"{name}: seed is given, expected None with rounding='nearest', which draws nothing")
    if not (seed is None or isinstance(seed, Tensor)):
        raise TypeError(f"{name}: seed is {seed!r}, expected a 0-d int64 tensor or None")
    if steps is not None or criterion != "derivative":
        wrong = (
            f"criterion is {criterion!r}, expected 'derivative'" if steps is None else "steps are given, expected None"
        )
        raise ValueError(f"{name}: {wrong} with rounding='stochastic', which has no step function")
    _check_numbers(function, parameters)
    if is_jagged(input):
        if not is_compiling():  # raises the op's errors for bad arguments
            _C.drawn_levels(function, bits, parameters)
        return _of_torch(function, input, parameters, inplace)
    output = _drawn_activation(input, function, parameters, bits, seed)
    return input.copy_(output) if inplace else output


def _exact(function: str, input: Tensor, parameters: tuple[float, ...] = (), inplace: bool = False) -> Tensor:
    if not (has_torch_function_unary(input) or is_compiling()):
        output = _C.exact_activation(input, function, parameters)
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
    rounding: str = "nearest",
    seed: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """GELU that saves ``bits`` bits per element for the backward pass.

    The result equals ``F.gelu(input, approximate=approximate)`` bit for bit. The gradient is ``grad_output`` times a
    step function with ``2**bits`` levels.

    Args:
        input: Tensor of any shape and strides; float64, float32, bfloat16 or float16. NaN counts as below all
            boundaries.
        approximate: ``"none"`` or ``"tanh"``.
        bits: Number of bits saved per element, 1 to 8.
        criterion: Choice of the step function that replaces the derivative. ``"derivative"``: the one closest to the
            derivative in mean square over the real line (Novikov et al., arXiv:2202.00441). ``"primitive"``: the one
            whose integral is closest to the activation (Yang et al., ICML 2024, arXiv:2406.16282). ``"paper"``: the
            one published in the latter paper, available for GELU, QuickGELU and SiLU with 2 bits; see :func:`regelu2`.
        steps: Step function to use instead of the library's, for example one from :mod:`lomem.fit`. Its number of bits
            overrides ``bits``.
        rounding: ``"nearest"``: the gradient is that of a step function. ``"stochastic"``: the derivative itself is
            rounded to one of ``2**bits`` evenly spaced levels at random, so that the mean of the gradient over the
            draws is the exact gradient (stochastic rounding with subtracted dither). The standard deviation of the
            derivative is that of :func:`drawn_levels`, whatever the input is. There is no ``criterion`` to choose then.
        seed: With ``rounding="stochastic"``: 0-d int64 tensor on the device of ``input`` from which random numbers are
            drawn; the same seed gives the same gradient. By default the next one of :mod:`lomem.random`.
        fast: Allows a faster forward pass whose results are not bit-identical to torch's; see :func:`regelu2`. Has no
            effect with ``rounding="stochastic"``.

    Returns:
        A tensor with the shape, dtype and strides that ``F.gelu`` returns. Saved for backward:
        ``ceil(bits * numel / 8)`` bytes, and 8 bytes of a seed with ``rounding="stochastic"``.

    Raises:
        ValueError: If an argument is out of range, or the library has no step function for it.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"lomem.functional.gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    function = "gelu" if approximate == "none" else "gelu_tanh"
    return _few_bit(function, input, (), bits, criterion, steps, rounding, seed, fast=fast)


def quick_gelu(
    input: Tensor,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``input * sigmoid(1.702 * input)``, as in CLIP, that saves ``bits`` bits per element.

    Arguments and saved bytes are as in :func:`gelu`.
    """
    return _few_bit("quick_gelu", input, (), bits, criterion, steps, rounding, seed)


def silu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """``F.silu`` that saves ``bits`` bits per element. Arguments and saved bytes are as in :func:`gelu`.

    With ``inplace=True`` the result overwrites ``input``; a temporary of the same size is allocated either way.
    """
    return _few_bit("silu", input, (), bits, criterion, steps, rounding, seed, inplace, fast)


def mish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.mish`` that saves ``bits`` bits per element. Arguments as in :func:`silu`."""
    return _few_bit("mish", input, (), bits, criterion, steps, rounding, seed, inplace)


def sigmoid(
    input: Tensor,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``torch.sigmoid`` that saves ``bits`` bits per element, not the output.

    Arguments as in :func:`gelu`. torch saves the output, which costs nothing extra if the next op saves it too.
    """
    return _few_bit("sigmoid", input, (), bits, criterion, steps, rounding, seed)


def tanh(
    input: Tensor,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``torch.tanh`` that saves ``bits`` bits per element, not the output; see :func:`sigmoid`."""
    return _few_bit("tanh", input, (), bits, criterion, steps, rounding, seed)


def tanhshrink(
    input: Tensor,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.tanhshrink`` that saves ``bits`` bits per element. Arguments as in :func:`gelu`."""
    return _few_bit("tanhshrink", input, (), bits, criterion, steps, rounding, seed)


def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.softplus`` that saves ``bits`` bits per element. Other arguments as in :func:`gelu`.

    Args:
        input: As in :func:`gelu`.
        beta: Positive number. The step function is that of ``beta=1`` with its boundaries divided by ``beta``, which is
            also the optimal one.
        threshold: Above ``threshold / beta`` the function is the identity. If that is not far out, the steps for
            ``"derivative"`` are fitted on the first call (a third of a second for 8 bits); for ``"primitive"``, which
            has no jumps, they are those of log(1 + exp(beta x)) / beta.
        bits: Number of bits saved per element, 1 to 8.
        criterion: ``"derivative"`` or ``"primitive"``; see :func:`gelu`.
        steps: Step function to use instead of the library's.
        rounding: ``"nearest"`` or ``"stochastic"``; see :func:`gelu`.
        seed: Where random numbers are drawn from; see :func:`gelu`.
    """
    return _few_bit("softplus", input, (beta, threshold), bits, criterion, steps, rounding, seed)


def softsign(
    input: Tensor,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.softsign`` that saves ``bits`` bits per element. Arguments as in :func:`gelu`."""
    return _few_bit("softsign", input, (), bits, criterion, steps, rounding, seed)


def logsigmoid(
    input: Tensor,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.logsigmoid`` that saves ``bits`` bits per element. Arguments as in :func:`gelu`."""
    return _few_bit("logsigmoid", input, (), bits, criterion, steps, rounding, seed)


def elu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.elu`` that saves ``bits`` bits per element. Other arguments as in :func:`silu`.

    Args:
        input: As in :func:`gelu`.
        alpha: Finite number. If it is not 1, the derivative jumps at 0, and the steps are fitted on the first call, in
            less than a tenth of a second.
        inplace: Whether the result overwrites ``input``.
        bits: Number of bits saved per element, 1 to 8.
        criterion: ``"derivative"`` or ``"primitive"``; see :func:`gelu`.
        steps: Step function to use instead of the library's.
        rounding: ``"nearest"`` or ``"stochastic"``; see :func:`gelu`.
        seed: Where random numbers are drawn from; see :func:`gelu`.
    """
    return _few_bit("elu", input, (alpha,), bits, criterion, steps, rounding, seed, inplace)


def celu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.celu`` that saves ``bits`` bits per element. Other arguments as in :func:`silu`.

    ``alpha`` is positive. The step function is ELU's with its boundaries multiplied by ``alpha``, which is optimal.
    """
    return _few_bit("celu", input, (alpha,), bits, criterion, steps, rounding, seed, inplace)


def selu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.selu`` that saves ``bits`` bits per element. Arguments as in :func:`silu`."""
    return _few_bit("selu", input, (), bits, criterion, steps, rounding, seed, inplace)


def hardswish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = 3,
    criterion: str = "derivative",
    steps: StepFunction | None = None,
    rounding: str = "nearest",
    seed: Tensor | None = None,
) -> Tensor:
    """``F.hardswish`` that saves ``bits`` bits per element. Arguments as in :func:`silu`."""
    return _few_bit("hardswish", input, (), bits, criterion, steps, rounding, seed, inplace)


# LowMemoryBP's names, so that code written for it runs unchanged.


def regelu2(input: Tensor, approximate: str = "none", *, fast: bool = False) -> Tensor:
    """GELU that saves 2 bits per element: :func:`gelu` with ``bits=2, criterion="paper"``.

    The gradient is that of a sum of three ReLUs fitted to GELU, that is, a step function with four levels (Yang et al.,
    ICML 2024, arXiv:2406.16282, ReGELU2). A NaN input gives a NaN result; it counts as below all boundaries, so its
    derivative is the lowest level, 0.

    Args:
        input: Tensor of any shape and strides; float64, float32, bfloat16 or float16.
        approximate: ``"none"`` or ``"tanh"``, as in ``F.gelu``. The step function is the same for both.
        fast: Allows a faster forward pass on CPUs with AVX2 or AVX-512, which evaluates minimax polynomials in float32.
            The results are then not bit-identical to torch's. float32: within 2.2 ulp of the exact value for
            x > -3.375, and within 2e-10 below. 16-bit dtypes: correctly rounded for x > -5.5, except near ties. Below
            -7.63 the results are 0. Has no effect for float64, other devices and inputs that are not dense in memory.

    Returns:
        A tensor with the shape, dtype and strides that ``F.gelu`` returns. Saved for backward: ``ceil(numel / 4)``
        bytes.
    """
    if has_torch_function_unary(input) or is_compiling():  # graphs keep the name
        if is_jagged(input):
            return F.gelu(input, approximate=approximate)
        return _regelu2(input, approximate=approximate, fast=fast)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"lomem.functional.regelu2: approximate is {approximate!r}, expected 'none' or 'tanh'")
    function = "gelu" if approximate == "none" else "gelu_tanh"
    output = _C.few_bit_activation(input, function, (), 2, "paper", fast)
    return _regelu2(input, approximate=approximate, fast=fast) if output is NotImplemented else output


def resilu2(input: Tensor, *, fast: bool = False) -> Tensor:
    """SiLU that saves 2 bits per element: :func:`silu` with ``bits=2, criterion="paper"``.

    The gradient is that of a sum of three ReLUs fitted to SiLU, that is, a step function with four levels (Yang et al.,
    ICML 2024, arXiv:2406.16282, ReSiLU2).

    Args:
        input: Tensor of any shape and strides; float64, float32, bfloat16 or float16.
        fast: As in :func:`regelu2`. float32: within 4 ulp of the exact value for x > -22, and within 6e-9 below. 16-bit
            dtypes: correctly rounded for x > -22, except near ties. Below -22.2 the results are 0.

    Returns:
        A tensor with the shape, dtype and strides that ``F.silu`` returns. Saved for backward: ``ceil(numel / 4)``
        bytes.
    """
    if has_torch_function_unary(input) or is_compiling():
        if is_jagged(input):
            return F.silu(input)
        return _resilu2(input, fast=fast)
    output = _C.few_bit_activation(input, "silu", (), 2, "paper", fast)
    return _resilu2(input, fast=fast) if output is NotImplemented else output


# Activations whose derivative takes only two values, so that one bit per element is exact.


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu`` with its exact gradient that saves 1 bit per element, not the output.

    torch saves the output, which costs nothing extra if the next op saves it too: a linear or convolutional layer does,
    a pooling layer may not.

    Args:
        input: Tensor of any shape and strides; float64, float32, bfloat16 or float16.
        inplace: Whether the result overwrites ``input``; a temporary of the same size is allocated either way.

    Returns:
        The same tensor as ``F.relu``. Saved for backward: ``ceil(numel / 8)`` bytes. The gradient is torch's, including
        at the kinks; where the derivative is 0, it is 0 even for an infinite ``grad_output``.
    """
    return _exact("relu", input, inplace=inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``F.leaky_relu`` with its exact gradient that saves 1 bit per element; see :func:`relu`."""
    return _exact("leaky_relu", input, (negative_slope,), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6`` with its exact gradient that saves 1 bit per element; see :func:`relu`.

    At NaN the gradient is 0.
    """
    return _exact("relu6", input, inplace=inplace)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``F.threshold`` with its exact gradient that saves 1 bit per element; see :func:`relu`."""
    return _exact("threshold", input, (threshold, value), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``F.hardtanh`` with its exact gradient that saves 1 bit per element; see :func:`relu6`."""
    if min_val > max_val:
        raise ValueError(f"lomem.functional.hardtanh: min_val is {min_val}, expected at most max_val, {max_val}")
    return _exact("hardtanh", input, (min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid`` with its exact gradient that saves 1 bit per element; see :func:`relu6`."""
    return _exact("hardsigmoid", input, inplace=inplace)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``F.hardshrink`` with its exact gradient that saves 1 bit per element; see :func:`relu`.

    At NaN the gradient is ``grad_output``.
    """
    return _exact("hardshrink", input, (lambd,))


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """``F.softshrink`` with its exact gradient that saves 1 bit per element; see :func:`hardshrink`."""
    return _exact("softshrink", input, (lambd,))


def step_function(
    function: str, bits: int, *, criterion: str = "derivative", parameters: Sequence[float] = ()
) -> StepFunction:
    """Returns the library's step function for an activation.

    Args:
        function: Name of the activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, ``"silu"``, ``"mish"``,
            ``"sigmoid"``, ``"tanh"``, ``"tanhshrink"``, ``"softplus"``, ``"softsign"``, ``"logsigmoid"``, ``"elu"``,
            ``"celu"``, ``"selu"`` or ``"hardswish"``.
        bits: Number of bits per code, 1 to 8.
        criterion: ``"derivative"``, ``"primitive"`` or ``"paper"``; see :func:`gelu`.
        parameters: All parameters of the activation: ``(beta, threshold)`` for softplus, ``(alpha,)`` for elu and celu.

    Raises:
        ValueError: If an argument is out of range, or the library has no step function for it.
    """
    boundaries, levels = _C.step_function(function, bits, criterion, parameters)
    return StepFunction(tuple(boundaries), tuple(levels))


def drawn_levels(function: str, bits: int, *, parameters: Sequence[float] = ()) -> DrawnLevels:
    """Returns the levels among which ``rounding="stochastic"`` draws the derivative of an activation.

    Args:
        function: Name of the activation, as in :func:`step_function`.
        bits: Number of bits per code, 1 to 8.
        parameters: All parameters of the activation, as in :func:`step_function`.

    Raises:
        ValueError: If an argument is out of range.
    """
    low, step = _C.drawn_levels(function, bits, parameters)
    return DrawnLevels(low, step, bits)


def _low_and_step(function: str, bits: int) -> tuple[float, float]:
    """The levels, for compilers too."""
    return _C.drawn_levels(function, bits, ())


# As torch.compiler.assume_constant_result does, which imports the compiler.
_low_and_step._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _DrawnOf(torch.autograd.Function):
    """A function that computes one of the table by other ops, with a derivative drawn at random."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, fn: Callable[[Tensor], Tensor], function: str, bits: int, scale: float
    ) -> Tensor:
        # The op draws the seed too, which compilers know. (In 16 bits, a rounded product would be another element.)
        x = input.detach().contiguous()
        scaled = x if scale == 1 else (x if x.dtype == torch.float64 else x.float()) * scale
        _, codes, seed = _drawn_activation_forward(scaled, function, (), bits)
        ctx.save_for_backward(codes, seed)
        ctx.levels, ctx.bits = _low_and_step(function, bits), bits
        output = _checked(fn, input.detach())
        return output.clone() if not is_compiling() and _share_memory(output, input) else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, seed = ctx.saved_tensors
        grad = _drawn_activation_backward(grad_output, codes, seed, *ctx.levels, ctx.bits)
        return grad, None, None, None, None


def drawn_of(input: Tensor, fn: Callable[[Tensor], Tensor], function: str, bits: int, scale: float = 1.0) -> Tensor:
    """``fn(input)``, which is ``h(scale * input) / scale`` for an activation h, with a gradient drawn at random.

    Args:
        input: As in :func:`step_activation`.
        fn: As in :func:`step_activation`.
        function: Name of h.
        bits: Number of bits saved per element, 1 to 8.
        scale: A number.
    """
    _refuse_transforms("lomem.convert")
    return _DrawnOf.apply(input, fn, function, bits, scale)  # type: ignore[no-any-return]


def _checked(fn: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``fn(input)``, after checking that ``fn`` returns a tensor of the same shape and does not modify its argument."""
    version = None if is_compiling() or input.is_inference() else input._version
    output = fn(input)
    name = "lomem.functional.step_activation"
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{name}: fn returns {kind}, expected a floating-point tensor")
    if output.shape != input.shape:
        raise ValueError(
            f"{name}: fn returns shape {tuple(output.shape)}, expected that of its argument, {tuple(input.shape)}"
        )
    if version is not None and input._version != version:
        raise ValueError(f"{name}: fn modifies its argument, expected a function that does not")
    return output


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_input(input: Tensor) -> None:
    """Checks the input as the ops do, since ``fn`` may accept anything."""
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
        inner = [[getattr(t, name) for name in t.__tensor_flatten__()[0]] for t in (a, b)]
        # (A DTensor also has a mesh.)
        inner = [[t for t in of if isinstance(t, Tensor)] for of in inner]
        return any(_share_memory(of_a, of_b) for of_a in inner[0] for of_b in inner[1])
    # Not data_ptr(): the storage of a wrapper subclass has none.
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class _WithSteps(torch.autograd.Function):
    """A user-supplied function with a step function as its derivative."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, fn: Callable[[Tensor], Tensor], steps: StepFunction) -> Tensor:
        ctx.steps = steps
        ctx.save_for_backward(_step_codes(input, steps.boundaries, steps.bits))
        output = _checked(fn, input.detach())
        # autograd would take an output that shares memory with the input for the input. (Compilers handle this.)
        return output.clone() if not is_compiling() and _share_memory(output, input) else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        steps = ctx.steps
        return _step_activation_backward(grad_output, codes, steps.levels, steps.bits), None, None


def _refuse_transforms(name: str) -> None:
    if not is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        raise NotImplementedError(
            f"{name}: called under torch.func or forward-mode differentiation, expected neither: they are not supported"
        )


def step_activation(
    input: Tensor,
    fn: Callable[[Tensor], Tensor],
    boundaries: Sequence[float],
    levels: Sequence[float],
) -> Tensor:
    """``fn(input)`` with the gradient ``grad_output * levels[number of boundaries below input]``.

    Args:
        input: Tensor of any shape and strides; float64, float32, bfloat16 or float16.
        fn: Elementwise function of one tensor: its result has the shape of its argument. It is called without autograd
            and must have no parameters that require gradients.
        boundaries: ``2**bits - 1`` ascending numbers, with ``bits`` from 1 to 8. float64 inputs are compared with them
            as given, inputs of other dtypes with their float32 roundings. :mod:`lomem.fit` finds the best ones for a
            function.
        levels: ``2**bits`` numbers.

    Returns:
        ``fn(input)``. Saved for backward: ``ceil(bits * numel / 8)`` bytes. ``torch.jit.trace`` records ``fn`` with
        its exact gradient, since TorchScript cannot represent the step function.

    Raises:
        ValueError: If an argument is not as described.
        NotImplementedError: Under ``torch.func`` transforms and forward-mode differentiation.
    """
    return with_steps(input, fn, StepFunction(tuple(boundaries), tuple(levels)))


def with_steps(input: Tensor, fn: Callable[[Tensor], Tensor], steps: StepFunction) -> Tensor:
    """:func:`step_activation` with the step function as an object."""
    if isinstance(fn, torch.nn.Module) and any(p.requires_grad for p in fn.parameters()):
        raise ValueError(
            f"lomem.functional.step_activation: fn, a {type(fn).__name__}, has parameters that require gradients, "
            "expected none: they would get no gradient"
        )
    _refuse_transforms("lomem.functional.step_activation")
    if not is_compiling() and torch.jit.is_tracing():
        return fn(input)
    if is_jagged(input):
        return _checked(fn, input)
    _check_input(input)
    if torch.is_grad_enabled() and input.requires_grad:
        return _WithSteps.apply(input, fn, steps)
    with torch.no_grad():
        return _checked(fn, input)
