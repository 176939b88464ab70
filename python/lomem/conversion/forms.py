"""What modules are recognized as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kinds import Function, Kind, ResultDtype

__all__ = ["ActivationForm", "LinearForm", "NormForm", "NotRecognized"]


@dataclass(frozen=True)
class NormForm:
    """A layer or RMS norm, ``normalized * gamma + beta``.

    Attributes:
        centred: Layer norm (the mean is subtracted), not RMS norm.
        gamma: Name of the parameter (or buffer) that gamma is made of, None for no gamma.
        one_plus: Whether gamma is 1 + that parameter.
        beta: Name of the parameter that is beta.
        eps: Added to the variance or mean square; None for the machine epsilon of the dtype computed in.
        shape: The normalized dimensions.
        axis: -1: the last dimensions are normalized. 1: the channels of (batch, channels, ...).
        ranks: Numbers of dimensions of inputs of which all this is known.
        dtype: Where the result's dtype comes from: the input, the weight or the promotion of both.
        autocast_dtype: The same under autocast, where the result may also be of float32 or of autocast's dtype.
        eps_name: Name of the attribute that eps is read from at each call, None where no attribute is.
    """

    centred: bool
    gamma: str | None
    one_plus: bool
    beta: str | None
    eps: float | None
    shape: tuple[int, ...]
    axis: int
    ranks: tuple[int, ...]
    dtype: ResultDtype
    autocast_dtype: ResultDtype
    eps_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "autocast_dtype"):
            object.__setattr__(self, name, ResultDtype(getattr(self, name)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # pickles of earlier versions hold plain text

    @property
    def what(self) -> str:
        """With its article, for sentences."""
        return "a layer norm" if self.centred else "an RMS norm"

    def __str__(self) -> str:
        kind = "layer norm" if self.centred else "RMS norm"
        gamma = [] if self.gamma is None else [f"1 + {self.gamma}" if self.one_plus else self.gamma]
        beta = [] if self.beta is None else [self.beta]
        return f"{kind} ({', '.join(gamma + beta)})" if gamma + beta else kind


@dataclass(frozen=True)
class ActivationForm:
    """GELU, or ``x * sigmoid(scale * x)``.

    Attributes:
        kind: Which of the two it is.
        approximate: Of a GELU, "none" or "tanh".
        scale: Of a SiLU: 1, or the factor of an approximation of GELU, 1.702.
        torch_op: Whether the result is torch's own op's, bit for bit. Else the module's own forward has to run.
        inplace: Whether the result is written to the input.
        scale_name: Name of the attribute that the scale is read from at each call, None where no attribute is.
        approximate_name: The same of ``approximate``.
        inplace_name: The same of ``inplace``.
    """

    kind: Function
    approximate: str = "none"
    scale: float = 1.0
    torch_op: bool = True
    inplace: bool = False
    scale_name: str | None = None
    approximate_name: str | None = None
    inplace_name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Function(self.kind))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # pickles of earlier versions hold plain text

    @property
    def what(self) -> str:
        """With its article, for sentences."""
        return "a GELU" if self.kind is Function.GELU else "a SiLU"

    def __str__(self) -> str:
        if self.kind is Function.GELU:
            return "GELU" if self.approximate == "none" else "GELU (tanh)"
        return "SiLU" if self.scale == 1 else f"x * sigmoid({self.scale:.4g} x)"


@dataclass(frozen=True)
class LinearForm:
    """``x @ weight.T + bias``, or without the transpose.

    Attributes:
        weight: Name of the parameter.
        bias: Name of the parameter, None for none.
        transposed: Whether the weight has shape (out, in), as in :class:`torch.nn.Linear`.
    """

    weight: str
    bias: str | None
    transposed: bool


@dataclass(frozen=True)
class NotRecognized:
    """Why a module is no norm, or no activation.

    Attributes:
        reason: A clause about the module.
        near: Whether its values are those of a norm (or an activation) on ordinary inputs. It deserves a verdict then,
            whatever its class is called.
        kind: What it was tried as.
    """

    reason: str
    near: bool
    kind: Kind
