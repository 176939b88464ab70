"""FewBit's ``fewbit.modules.activations``.

Subclasses of the modules of the same names in :mod:`lomem.nn`. They take the arguments of torch's modules without
``approximate`` and ``inplace``, and by keyword ``bits``: the number of bits saved per element, 1 to 8. None, the
default, is 3. The piecewise linear ones save 1 bit per element, whatever ``bits`` is.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .... import nn as lnn
from ....steps import StepFunction
from ..functional.activations import BITS, step_function, stepwise, store

# lomem's modules that torch has under the same name.
_SHARED = {
    name: kind
    for name, kind in vars(lnn.activations).items()
    if name in lnn.activations.__all__ and issubclass(kind, getattr(nn, name, ()))
}
STEPWISE = (*sorted(name for name, kind in _SHARED.items() if not issubclass(kind, lnn.FewBitActivation)), "Stepwise")
CONTINOUS = tuple(sorted(name for name, kind in _SHARED.items() if issubclass(kind, lnn.FewBitActivation)))

__all__ = [*STEPWISE, *CONTINOUS]


class Stepwise(nn.Module):
    """The identity, with a step function as its derivative; see :func:`lomem.compat.fewbit.functional.stepwise`.

    Args:
        borders: 1-D tensor of the borders between the levels, ascending, without or with both ends of the domain. The
            buffer ``borders`` has no ends.
        levels: 1-D tensor of 1 to 256 levels, kept as a buffer.
        parity: None only: give the step function on both sides.
        shift: None only.

    Raises:
        ValueError: If an argument is not as described.
    """

    borders: Tensor
    levels: Tensor

    def __init__(
        self,
        borders: Tensor,
        levels: Tensor,
        parity: bool | None = None,
        shift: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        step_function("lomem.compat.fewbit.Stepwise", borders, levels)  # checks them
        self.register_buffer("borders", borders[1:-1] if borders.numel() > levels.numel() else borders)
        self.register_buffer("levels", levels)
        self.parity = parity
        self.shift = shift
        for name, value in (("parity", parity), ("shift", shift)):
            if value is not None:
                raise ValueError(
                    f"lomem.compat.fewbit.Stepwise: {name} is {value!r}, expected None and the whole step function"
                )

    def forward(self, xs: Tensor) -> Tensor:
        """Returns a copy of ``xs``."""
        return stepwise(xs, self.borders, self.levels, self.parity, self.shift)


class _WithStore(lnn.FewBitActivation):
    """An activation that looks for its step function in the store."""

    def _stored(self) -> StepFunction | None:
        replaced = self.steps is not None or self.rounding != "nearest"
        return None if replaced else store.steps(type(self)._function.__name__, self.bits)

    def forward(self, input: Tensor) -> Tensor:
        """Applies the activation; the result is bit-identical to that of torch's module."""
        steps = self._stored()
        if steps is None:
            return super().forward(input)
        return type(self)._function(input, *[getattr(self, name) for name in self._arguments], steps=steps)

    def step_function(self) -> StepFunction:
        """The step function in use."""
        return self._stored() or super().step_function()


def _with_arguments_of_fewbit(name: str, of_lomem: type[nn.Module]) -> type[nn.Module]:
    few_bits = issubclass(of_lomem, lnn.FewBitActivation)
    kind = inspect.Parameter
    parameters = [
        p
        for p in inspect.signature(getattr(nn, name)).parameters.values()
        if p.kind is kind.POSITIONAL_OR_KEYWORD and p.name not in ("approximate", "inplace")
    ]
    bits = kind("bits", kind.KEYWORD_ONLY, default=None, annotation=int | None)
    signature = inspect.Signature([*parameters, bits])

    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"lomem.compat.fewbit.{name}: {error}, expected {signature}") from None
        bits = arguments.pop("bits", None)
        super(cls, self).__init__(**arguments, **({"bits": BITS if bits is None else bits} if few_bits else {}))

    members = {
        "__doc__": f""":class:`torch.nn.{name}` that saves few bits per element.

    :class:`lomem.nn.{name}` with FewBit's arguments; see :mod:`lomem.compat.fewbit.modules.activations`.
    """,
        "__init__": construct,
        "__module__": __name__,
        "__signature__": signature,
    }
    cls: type[nn.Module] = type(name, (_WithStore, of_lomem) if few_bits else (of_lomem,), members)
    return cls


for _name, _kind in _SHARED.items():
    globals()[_name] = _with_arguments_of_fewbit(_name, _kind)


def __getattr__(name: str) -> Any:  # for type checkers, which do not see the names that are set above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
