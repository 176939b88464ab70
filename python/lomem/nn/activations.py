"""The activations as modules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from ..steps import StepFunction

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


class FewBitActivation(nn.Module):
    """What the activations of this family share: how many bits are kept, and which step function says what for.

    Each is a subclass of torch's module of the same name, takes its arguments, computes the same bits and has, beside
    its attributes, those below. They may be set at any time; they are no part of the ``state_dict``.

    Args:
        args: Of torch's module.
        bits: Kept for the backward pass of each element, 1 to 8.
        criterion: ``"derivative"``, ``"primitive"`` or ``"paper"``; see :func:`lomem.functional.gelu`.
        steps: A step function in place of the library's, with bits of its own; see :mod:`lomem.fit`.
        kwargs: Of torch's module.
    """

    _function: ClassVar[Callable[..., Tensor]]
    _arguments: ClassVar[tuple[str, ...]] = ()
    #: Arguments of the function that torch's has not.
    _options: ClassVar[tuple[str, ...]] = ()

    criterion: str
    _bits: int
    _steps: StepFunction | None

    def __init__(
        self,
        *args: Any,
        bits: int = 3,
        criterion: str = "derivative",
        steps: StepFunction | None = None,
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
        self.steps = steps
        if criterion == "paper":
            self.step_function()  # raises where there is none

    @property
    def bits(self) -> int:
        """Kept for the backward pass of each element. Setting it drops ``steps`` of another number of bits."""
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
        """In place of the library's. Setting another parameter of the function drops them."""
        return self._steps

    @steps.setter
    def steps(self, steps: StepFunction | None) -> None:
        steps = getattr(steps, "step", steps)  # of what lomem.fit.fit returns
        if steps is not None and not isinstance(steps, StepFunction):
            raise ValueError(
                f"lomem.nn.{type(self).__name__}: steps is a {type(steps).__name__}, expected a lomem.StepFunction"
            )
        self._steps = steps
        if steps is not None:
            self._bits = steps.bits

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("criterion", *self._arguments) and name != "inplace" and self.__dict__.get("_steps") is not None:
            self._steps = None  # they were for what the function was
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """Returns what torch's module returns."""
        arguments = [getattr(self, name) for name in self._arguments]
        options = {name: getattr(self, name) for name in self._options}
        return type(self)._function(
            input, *arguments, bits=self._bits, criterion=self.criterion, steps=self._steps, **options
        )

    def exact(self, input: Tensor) -> Tensor:
        """What torch's module returns, with torch's gradient. Not in place."""
        return super().forward(input.clone() if getattr(self, "inplace", False) else input)

    def step_function(self) -> StepFunction:
        """The step function in use."""
        if self.steps is not None:
            return self.steps
        return F.step_function(self._name(), self.bits, criterion=self.criterion, parameters=self._parameter_values())

    def _name(self) -> str:
        """Of the function, for the op."""
        return type(self)._function.__name__

    def _parameter_values(self) -> list[float]:
        return [float(getattr(self, name)) for name in self._arguments if name != "inplace"]

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        how = f"criterion={self.criterion!r}" if self.steps is None else "steps=..."
        options = [f"{name}=True" for name in self._options if getattr(self, name)]
        return ", ".join(filter(None, (super().extra_repr(), f"bits={self.bits}", how, *options)))


class _Exact(nn.Module):
    """An activation of straight pieces: torch's module, gradient and all, that keeps 1 bit an element."""

    _function: ClassVar[Callable[..., Tensor]]
    _arguments: ClassVar[tuple[str, ...]] = ()

    def forward(self, input: Tensor) -> Tensor:
        """Returns what torch's module returns."""
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
    """``x * sigmoid(1.702 x)``, that saves few bits per element; see :func:`lomem.functional.quick_gelu`."""

    _function = staticmethod(F.quick_gelu)

    def exact(self, input: Tensor) -> Tensor:
        """The function, with its own gradient."""
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
    """:class:`torch.nn.ReLU` whose backward pass keeps 1 bit an element; see :func:`lomem.functional.relu`."""

    _function = staticmethod(F.relu)
    _arguments = ("inplace",)


class LeakyReLU(_Exact, nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` that saves 1 bit per element; see :func:`lomem.functional.leaky_relu`."""

    _function = staticmethod(F.leaky_relu)
    _arguments = ("negative_slope", "inplace")


class ReLU6(_Exact, nn.ReLU6):
    """:class:`torch.nn.ReLU6` whose backward pass keeps 1 bit an element; see :func:`lomem.functional.relu6`."""

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
        fast: Allows a faster forward that is not bit for bit torch's.
    """

    def __init__(self, approximate: str = "none", *, fast: bool = False) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"lomem.nn.ReGELU2: approximate is {approximate!r}, expected 'none' or 'tanh'")
        self.approximate = approximate
        self.fast = fast

    def forward(self, input: Tensor) -> Tensor:
        """Returns GELU of ``input``."""
        return F.regelu2(input, self.approximate, fast=self.fast)

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return f"approximate={self.approximate!r}" + (", fast=True" if self.fast else "")


class ReSiLU2(nn.Module):
    """SiLU that saves 2 bits per element, in place of :class:`torch.nn.SiLU`.

    See :func:`lomem.functional.resilu2`.

    Args:
        inplace: Whether the result overwrites the input, as in :class:`torch.nn.SiLU`. It saves no
            memory here: a temporary of the input's size is made either way.
        fast: Allows a faster forward that is not bit for bit torch's.
    """

    def __init__(self, inplace: bool = False, *, fast: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.fast = fast

    def forward(self, input: Tensor) -> Tensor:
        """Returns SiLU of ``input``."""
        output = F.resilu2(input, fast=self.fast)
        return input.copy_(output) if self.inplace else output

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return ", ".join(f"{name}=True" for name in ("inplace", "fast") if getattr(self, name))


class StepActivation(nn.Module):
    """A function of the caller's with a derivative of steps; see :func:`lomem.functional.step_activation`.

    Args:
        fn: Works element by element.
        boundaries: Ascending; ``2**bits - 1`` of them.
        levels: ``2**bits``.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], boundaries: Sequence[float], levels: Sequence[float]) -> None:
        super().__init__()
        self.fn = fn
        self.steps = StepFunction(tuple(boundaries), tuple(levels))

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``fn(input)``."""
        return F.step_activation(input, self.fn, self.steps.boundaries, self.steps.levels)

    def exact(self, input: Tensor) -> Tensor:
        """``fn(input)`` with its own gradient."""
        return self.fn(input)

    def step_function(self) -> StepFunction:
        """The step function in use."""
        return self.steps

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        name = getattr(self.fn, "__name__", None) or type(self.fn).__name__
        return f"{name}, bits={self.steps.bits}"
