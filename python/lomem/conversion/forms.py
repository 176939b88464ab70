"""The forms that modules are recognized as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kinds import Function, Kind, ResultDtype

__all__ = ["ActivationForm", "LinearForm", "NormForm", "NotRecognized"]


@dataclass(frozen=True)
class NormForm:
    """A layer or RMS norm, ``normalized * gamma + beta``.

    Attributes:
        centred: Whether the mean is subtracted: a layer norm, not an RMS norm.
        gamma: Name of the parameter (or buffer) that gamma is computed from, None if there is no gamma.
        one_plus: Whether gamma is 1 + that parameter.
        beta: Name of the parameter that is beta, None if there is no beta.
        eps: Number added to the variance or mean square; None for the machine epsilon of the compute dtype.
        shape: The normalized dimensions.
        axis: -1 if the last dimensions are normalized, 1 for the channels of (batch, channels, ...).
        ranks: Numbers of input dimensions for which this has been verified.
        dtype: Where the result's dtype comes from: the input, the weight or the promotion of both.
        autocast_dtype: The same under autocast, where the result may also be float32 or the autocast dtype.
        eps_name: Name of the attribute that eps is read from at each call, None if it is not read from one.
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
        """Name with its article, for sentences."""
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
        approximate: "none" or "tanh", for a GELU.
        scale: Scale of a SiLU: 1, or 1.702, which approximates GELU.
        torch_op: Whether the result equals that of torch's op, bit for bit. Otherwise the module's own forward is run.
        inplace: Whether the result is written to the input.
        scale_name: Name of the attribute that the scale is read from at each call, None if it is not read from one.
        approximate_name: The same for ``approximate``.
        inplace_name: The same for ``inplace``.
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
        """Name with its article, for sentences."""
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
        bias: Name of the parameter, None if there is no bias.
        transposed: Whether the weight has shape (out, in), as in :class:`torch.nn.Linear`.
    """

    weight: str
    bias: str | None
    transposed: bool


@dataclass(frozen=True)
class NotRecognized:
    """Why a module is not recognized as a norm or an activation.

    Attributes:
        reason: A clause about the module.
        near: Whether its values are those of a norm (or an activation) on ordinary inputs. If so, it is reported
            whatever its class is called.
        kind: What it was tested as.
    """

    reason: str
    near: bool
    kind: Kind
