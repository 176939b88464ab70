"""The activations as modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _C
from .. import functional as F
from ..steps import DrawnLevels, StepFunction

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "FewBitActivation",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "QuickGELU",
    "ReGELU2",
    "ReLU",
    "ReLU6",
    "ReSiLU2",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "StepActivation",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


class WithSteps(nn.Module):
    """Base class of the activations with a step function as their derivative."""

    steps: StepFunction | None

    def exact(self, input: Tensor) -> Tensor:
        """Applies the activation with its exact gradient."""
        raise NotImplementedError

    def step_function(self) -> StepFunction:
        """The step function in use."""
        raise NotImplementedError


class FewBitActivation(WithSteps):
    """Base class of the activations that save a few bits per element, with a step function as their derivative.

    Each is a subclass of torch's module of the same name, takes its arguments, returns bit-identical results and has
    the attributes below in addition to torch's. They can be set at any time and are not part of the ``state_dict``.

    Args:
        args: Positional arguments of torch's module.
        bits: Number of bits saved per element for the backward pass, 1 to 8.
        criterion: ``"derivative"``, ``"primitive"`` or ``"paper"``; see :func:`lomem.functional.gelu`.
        steps: Step function to use instead of the library's; its number of bits overrides ``bits``. See
            :mod:`lomem.fit`.
        rounding: ``"nearest"``, or ``"stochastic"`` to draw codes at random, with a seed of :mod:`lomem.random` in each
            call, so that the mean of the gradient is the exact one; see :func:`lomem.functional.gelu`. Building such a
            module restarts the stream of seeds.
        kwargs: Keyword arguments of torch's module.

    Raises:
        ValueError: If an argument is out of range, or there is no ``"paper"`` step function.
    """

    _function: ClassVar[Callable[..., Tensor]]
    _arguments: ClassVar[tuple[str, ...]] = ()
    #: Arguments of the function that torch's function does not have.
    _options: ClassVar[tuple[str, ...]] = ()

    criterion: str
    _bits: int
    _steps: StepFunction | None
    _rounding: str = "nearest"  # of modules pickled by versions without it

    def __init__(
        self,
        *args: Any,
        bits: int = 3,
        criterion: str = "derivative",
        steps: StepFunction | None = None,
        rounding: str = "nearest",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._steps = None
        self.bits = bits
        if criterion not in ("derivative", "primitive", "paper"):
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: criterion is {criterion!r}, expected 'derivative', 'primitive' or "
                "'paper'"
            )
        self.criterion = criterion
        self.rounding = rounding
        if rounding == "stochastic" and criterion != "derivative":
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: criterion is {criterion!r}, expected 'derivative' with "
                "rounding='stochastic', which has no step function"
            )
        self.steps = steps
        if rounding == "stochastic":
            _C.begin_random_stream()
        if criterion == "paper":
            self.step_function()  # raises if there is none

    @property
    def bits(self) -> int:
        """Number of bits saved per element. Setting it drops ``steps`` with a different number of bits."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        try:
            width = -1 if isinstance(bits, bool) else operator.index(bits)
        except TypeError:
            width = -1
        if not 1 <= width <= 8:
            raise ValueError(f"lomem.nn.{type(self).__name__}: bits is {bits!r}, expected 1 to 8")
        self._bits = width
        if self._steps is not None and self._steps.bits != width:
            self._steps = None

    @property
    def steps(self) -> StepFunction | None:
        """User-supplied step function, or None. Changing a parameter of the activation drops it."""
        return self._steps

    @steps.setter
    def steps(self, steps: StepFunction | None) -> None:
        steps = getattr(steps, "step", steps)  # also accepts the result of lomem.fit.fit
        if steps is not None and not isinstance(steps, StepFunction):
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: steps is a {type(steps).__name__}, expected a lomem.StepFunction"
            )
        if steps is not None and self._rounding == "stochastic":
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: steps are given, expected None with rounding='stochastic', which has "
                "no step function"
            )
        self._steps = steps
        if steps is not None:
            self._bits = steps.bits

    @property
    def rounding(self) -> str:
        """``"nearest"`` or ``"stochastic"``. Setting it to the latter drops ``steps``."""
        return self._rounding

    @rounding.setter
    def rounding(self, rounding: str) -> None:
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: rounding is {rounding!r}, expected 'nearest' or 'stochastic'"
            )
        self._rounding = rounding
        if rounding == "stochastic":
            self._steps = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("criterion", *self._arguments) and name != "inplace" and self.__dict__.get("_steps") is not None:
            self._steps = None  # they were fitted to the previous function
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the activation; the result is bit-identical to that of torch's module."""
        arguments = [getattr(self, name) for name in self._arguments]
        options = {name: getattr(self, name) for name in self._options}
        if self._rounding == "stochastic":
            return type(self)._function(input, *arguments, bits=self._bits, rounding=self._rounding, **options)
        return type(self)._function(
            input, *arguments, bits=self._bits, criterion=self.criterion, steps=self._steps, **options
        )

    def exact(self, input: Tensor) -> Tensor:
        """Applies the activation with torch's exact gradient, never in place."""
        return super().forward(input.clone() if getattr(self, "inplace", False) else input)

    def step_function(self) -> StepFunction:
        """The step function in use.

        Raises:
            ValueError: With ``rounding="stochastic"``, which has none; see :meth:`drawn_levels`.
        """
        if self._rounding == "stochastic":
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: rounding is 'stochastic', expected 'nearest': it has no step function"
            )
        if self.steps is not None:
            return self.steps
        return F.step_function(self._name(), self.bits, criterion=self.criterion, parameters=self._parameter_values())

    def drawn_levels(self) -> DrawnLevels:
        """The levels among which ``rounding="stochastic"`` draws."""
        return F.drawn_levels(self._name(), self.bits, parameters=self._parameter_values())

    def _name(self) -> str:
        """Name of the activation that the op takes."""
        return type(self)._function.__name__

    def _parameter_values(self) -> list[float]:
        return [float(getattr(self, name)) for name in self._arguments if name != "inplace"]

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        how = f"criterion={self.criterion!r}" if self.steps is None else "steps=..."
        how = how if self.rounding == "nearest" else f"rounding={self.rounding!r}"
        options = [f"{name}=True" for name in self._options if getattr(self, name)]
        return ", ".join(filter(None, (super().extra_repr(), f"bits={self.bits}", how, *options)))


class _Exact(nn.Module):
    """Base class of the activations whose exact gradient needs only 1 bit per element."""

    _function: ClassVar[Callable[..., Tensor]]
    _arguments: ClassVar[tuple[str, ...]] = ()

    def forward(self, input: Tensor) -> Tensor:
        """Applies the activation; result and gradient are those of torch's module."""
        return type(self)._function(input, *[getattr(self, name) for name in self._arguments])


class GELU(FewBitActivation, nn.GELU):
    """:class:`torch.nn.GELU` that saves few bits per element; see :func:`lomem.functional.gelu`."""

    _function = staticmethod(F.gelu)
    _arguments = ("approximate",)
    _options = ("fast",)

    fast: bool = False

    def __init__(self, approximate: str = "none", *, fast: bool = False, **kwargs: Any) -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"lomem.nn.GELU: approximate is {approximate!r}, expected 'none' or 'tanh'")
        super().__init__(approximate, **kwargs)
        self.fast = fast

    def _name(self) -> str:
        return "gelu" if self.approximate == "none" else "gelu_tanh"

    def _parameter_values(self) -> list[float]:
        return []


class QuickGELU(FewBitActivation):
    """``x * sigmoid(1.702 x)`` that saves few bits per element; see :func:`lomem.functional.quick_gelu`."""

    _function = staticmethod(F.quick_gelu)

    def exact(self, input: Tensor) -> Tensor:
        """Applies the activation with its exact gradient."""
        return input * torch.sigmoid(1.702 * input)


class SiLU(FewBitActivation, nn.SiLU):
    """:class:`torch.nn.SiLU` that saves few bits per element; see :func:`lomem.functional.silu`."""

    _function = staticmethod(F.silu)
    _arguments = ("inplace",)
    _options = ("fast",)

    fast: bool = False

    def __init__(self, inplace: bool = False, *, fast: bool = False, **kwargs: Any) -> None:
        super().__init__(inplace, **kwargs)
        self.fast = fast


class Mish(FewBitActivation, nn.Mish):
    """:class:`torch.nn.Mish` that saves few bits per element; see :func:`lomem.functional.mish`."""

    _function = staticmethod(F.mish)
    _arguments = ("inplace",)


class Sigmoid(FewBitActivation, nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` that saves few bits per element; see :func:`lomem.functional.sigmoid`."""

    _function = staticmethod(F.sigmoid)


class Tanh(FewBitActivation, nn.Tanh):
    """:class:`torch.nn.Tanh` that saves few bits per element; see :func:`lomem.functional.tanh`."""

    _function = staticmethod(F.tanh)


class Tanhshrink(FewBitActivation, nn.Tanhshrink):
    """:class:`torch.nn.Tanhshrink` that saves few bits per element; see :func:`lomem.functional.tanhshrink`."""

    _function = staticmethod(F.tanhshrink)


class Softplus(FewBitActivation, nn.Softplus):
    """:class:`torch.nn.Softplus` that saves few bits per element; see :func:`lomem.functional.softplus`."""

    _function = staticmethod(F.softplus)
    _arguments = ("beta", "threshold")


class Softsign(FewBitActivation, nn.Softsign):
    """:class:`torch.nn.Softsign` that saves few bits per element; see :func:`lomem.functional.softsign`."""

    _function = staticmethod(F.softsign)


class LogSigmoid(FewBitActivation, nn.LogSigmoid):
    """:class:`torch.nn.LogSigmoid` that saves few bits per element; see :func:`lomem.functional.logsigmoid`."""

    _function = staticmethod(F.logsigmoid)


class ELU(FewBitActivation, nn.ELU):
    """:class:`torch.nn.ELU` that saves few bits per element; see :func:`lomem.functional.elu`."""

    _function = staticmethod(F.elu)
    _arguments = ("alpha", "inplace")


class CELU(FewBitActivation, nn.CELU):
    """:class:`torch.nn.CELU` that saves few bits per element; see :func:`lomem.functional.celu`."""

    _function = staticmethod(F.celu)
    _arguments = ("alpha", "inplace")


class SELU(FewBitActivation, nn.SELU):
    """:class:`torch.nn.SELU` that saves few bits per element; see :func:`lomem.functional.selu`."""

    _function = staticmethod(F.selu)
    _arguments = ("inplace",)


class Hardswish(FewBitActivation, nn.Hardswish):
    """:class:`torch.nn.Hardswish` that saves few bits per element; see :func:`lomem.functional.hardswish`."""

    _function = staticmethod(F.hardswish)
    _arguments = ("inplace",)


class ReLU(_Exact, nn.ReLU):
    """:class:`torch.nn.ReLU` that saves 1 bit per element; see :func:`lomem.functional.relu`."""

    _function = staticmethod(F.relu)
    _arguments = ("inplace",)


class LeakyReLU(_Exact, nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` that saves 1 bit per element; see :func:`lomem.functional.leaky_relu`."""

    _function = staticmethod(F.leaky_relu)
    _arguments = ("negative_slope", "inplace")


class ReLU6(_Exact, nn.ReLU6):
    """:class:`torch.nn.ReLU6` that saves 1 bit per element; see :func:`lomem.functional.relu6`."""

    _function = staticmethod(F.relu6)
    _arguments = ("inplace",)


class Threshold(_Exact, nn.Threshold):
    """:class:`torch.nn.Threshold` that saves 1 bit per element; see :func:`lomem.functional.threshold`."""

    _function = staticmethod(F.threshold)
    _arguments = ("threshold", "value", "inplace")


class Hardtanh(_Exact, nn.Hardtanh):
    """:class:`torch.nn.Hardtanh` that saves 1 bit per element; see :func:`lomem.functional.hardtanh`."""

    _function = staticmethod(F.hardtanh)
    _arguments = ("min_val", "max_val", "inplace")


class Hardsigmoid(_Exact, nn.Hardsigmoid):
    """:class:`torch.nn.Hardsigmoid` that saves 1 bit per element; see :func:`lomem.functional.hardsigmoid`."""

    _function = staticmethod(F.hardsigmoid)
    _arguments = ("inplace",)


class Hardshrink(_Exact, nn.Hardshrink):
    """:class:`torch.nn.Hardshrink` that saves 1 bit per element; see :func:`lomem.functional.hardshrink`."""

    _function = staticmethod(F.hardshrink)
    _arguments = ("lambd",)


class Softshrink(_Exact, nn.Softshrink):
    """:class:`torch.nn.Softshrink` that saves 1 bit per element; see :func:`lomem.functional.softshrink`."""

    _function = staticmethod(F.softshrink)
    _arguments = ("lambd",)


class ReGELU2(nn.Module):
    """GELU that saves 2 bits per element, in place of :class:`torch.nn.GELU`.

    See :func:`lomem.functional.regelu2`.

    Args:
        approximate: ``"none"`` or ``"tanh"``.
        fast: Allows a faster forward pass whose results are not bit-identical to torch's.
    """

    approximate: str = "none"  # of pickles of LowMemoryBP's module, which has the same name and no attributes
    fast: bool = False

    def __init__(self, approximate: str = "none", *, fast: bool = False) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"lomem.nn.ReGELU2: approximate is {approximate!r}, expected 'none' or 'tanh'")
        self.approximate = approximate
        self.fast = fast

    def forward(self, input: Tensor) -> Tensor:
        """Applies GELU."""
        return F.regelu2(input, self.approximate, fast=self.fast)

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        return f"approximate={self.approximate!r}" + (", fast=True" if self.fast else "")


class ReSiLU2(nn.Module):
    """SiLU that saves 2 bits per element, in place of :class:`torch.nn.SiLU`.

    See :func:`lomem.functional.resilu2`.

    Args:
        inplace: Whether the result overwrites the input, as in :class:`torch.nn.SiLU`. This saves no memory here: a
            temporary of the input's size is allocated either way.
        fast: Allows a faster forward pass whose results are not bit-identical to torch's.
    """

    inplace: bool = False  # of pickles of LowMemoryBP's module
    fast: bool = False

    def __init__(self, inplace: bool = False, *, fast: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.fast = fast

    def forward(self, input: Tensor) -> Tensor:
        """Applies SiLU."""
        output = F.resilu2(input, fast=self.fast)
        return input.copy_(output) if self.inplace else output

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        return ", ".join(f"{name}=True" for name in ("inplace", "fast") if getattr(self, name))


class StepActivation(WithSteps):
    """A user-supplied function with a step function as its derivative.

    See :func:`lomem.functional.step_activation`.

    Args:
        fn: Elementwise function of one tensor.
        boundaries: ``2**bits - 1`` ascending numbers, with ``bits`` from 1 to 8.
        levels: ``2**bits`` numbers.
    """

    steps: StepFunction

    def __init__(self, fn: Callable[[Tensor], Tensor], boundaries: Sequence[float], levels: Sequence[float]) -> None:
        super().__init__()
        self.fn = fn
        self.steps = StepFunction(tuple(boundaries), tuple(levels))

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``fn(input)``."""
        return F.step_activation(input, self.fn, self.steps.boundaries, self.steps.levels)

    def exact(self, input: Tensor) -> Tensor:
        """Returns ``fn(input)`` with its exact gradient."""
        return self.fn(input)

    def step_function(self) -> StepFunction:
        """The step function in use."""
        return self.steps

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        name = getattr(self.fn, "__name__", None) or type(self.fn).__name__
        return f"{name}, bits={self.steps.bits}"
