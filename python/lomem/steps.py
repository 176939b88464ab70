"""Step functions, which approximate the derivative of an activation with a few bits per element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DrawnLevels", "StepFunction"]


@dataclass(frozen=True)
class DrawnLevels:
    """The levels among which a derivative is drawn at random: ``low + step * code`` for codes from 0 to 2^bits - 1.

    What the gradient is multiplied by is ``low + step * (code + u - 1/2)``, where ``u`` in (0, 1) is the random number
    that the code was drawn with (subtracted dither: Schuchman, IEEE Trans. Commun. Technol. 12, 1964). Its mean is the
    derivative.

    Attributes:
        low: The least value of the derivative.
        step: Distance of neighbouring levels. The last level is the largest value of the derivative.
        bits: Number of bits per code.
    """

    low: float
    step: float
    bits: int

    @property
    def deviation(self) -> float:
        """Standard deviation of what is drawn: ``step / sqrt(12)``, whatever the derivative is."""
        return self.step / math.sqrt(12)


@dataclass(frozen=True)
class StepFunction:
    """The derivative of a continuous, piecewise linear function.

    The methods compute in float64. They are for inspecting and testing step functions; training does not use them.

    Attributes:
        boundaries: Positions of the steps: 2^bits - 1 ascending finite numbers, with bits from 1 to 8.
        levels: Values of the derivative between the boundaries, from left to right: 2^bits finite numbers.

    Raises:
        ValueError: If a number is not finite, a length is wrong or the boundaries descend.
    """

    boundaries: tuple[float, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("boundaries", "levels"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise ValueError(f"lomem.StepFunction: {name}[{i}] is {value}, expected a finite number")
        count = len(self.levels)
        if count not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"lomem.StepFunction: levels has {count} entries, expected 2, 4, 8, ... or 256")
        if len(self.boundaries) != count - 1:
            raise ValueError(
                f"lomem.StepFunction: boundaries has {len(self.boundaries)} entries, expected {count - 1} for "
                f"{count} levels"
            )
        for i, (low, high) in enumerate(zip(self.boundaries, self.boundaries[1:], strict=False)):
            if high < low:
                raise ValueError(
                    f"lomem.StepFunction: boundaries[{i + 1}] is {high}, expected at least boundaries[{i}], {low}"
                )

    @property
    def bits(self) -> int:
        """Number of bits per code."""
        return len(self.boundaries).bit_length()

    def code(self, x: Any) -> Any:
        """Number of boundaries below x, 0 for NaN: an int64 tensor if x is a tensor, otherwise a NumPy array."""
        return _on_float64(self._code, x)

    def derivative(self, x: Any) -> Any:
        """The level at x: a float64 tensor if x is a tensor, otherwise a NumPy array."""
        return _on_float64(lambda t: self._tensor(self.levels, t)[self._code(t)], x)

    def primitive(self, x: Any) -> Any:
        """Integral of the derivative from the first boundary to x: a float64 tensor if x is one, else a NumPy array."""
        c, level = self.boundaries, self.levels
        heights = [0.0]
        for i in range(1, len(c)):
            heights.append(heights[-1] + level[i] * (c[i] - c[i - 1]))

        def value(t: Tensor) -> Tensor:
            code = self._code(t)
            at = self._tensor(c, t)[(code - 1).clamp(min=0)]
            height = self._tensor(heights, t)[(code - 1).clamp(min=0)]
            return height + self._tensor(level, t)[code] * (t - at)

        return _on_float64(value, x)

    def _code(self, x: Tensor) -> Tensor:
        code = torch.bucketize(x, self._tensor(self.boundaries, x))
        return torch.where(x.isnan(), torch.zeros_like(code), code)

    @staticmethod
    def _tensor(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=like.device)


def _on_float64(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Tensor):
        return function(x.detach().to(torch.float64))
    return function(torch.as_tensor(x, dtype=torch.float64)).numpy()
