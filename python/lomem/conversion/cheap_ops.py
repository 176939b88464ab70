"""The cheap ops through which offers are passed: products, sums, casts, dropouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from .._sharding import is_distributed
from .._trace.groups import FLOATS
from .kinds import Text

__all__ = ["UNARY", "Step", "StepKind", "are_same", "as_step", "is_small"]


class StepKind(Text):
    """The cheap ops that offers are passed through."""

    PRODUCT = "product"
    SUM = "sum"
    CAST = "cast"
    DROPOUT = "dropout"


_aten = torch.ops.aten


#: Tensors whose storages are followed.
_ORDINARY = (Tensor, nn.Parameter, FakeTensor)
#: All the callables under which torch shows these functions to modes, out of place.
_STEPS: dict[Any, StepKind] = {
    **dict.fromkeys(
        [
            torch.mul,
            torch.multiply,
            Tensor.mul,
            Tensor.multiply,
            Tensor.__mul__,
            Tensor.__rmul__,
            _aten.mul,
            _aten.mul.Tensor,
        ],
        StepKind.PRODUCT,
    ),
    **dict.fromkeys(
        [
            torch.add,
            torch.sub,
            torch.subtract,
            Tensor.add,
            Tensor.sub,
            Tensor.subtract,
            Tensor.__add__,
            Tensor.__radd__,
            Tensor.__sub__,
            _aten.add,
            _aten.add.Tensor,
            _aten.sub,
            _aten.sub.Tensor,
        ],
        StepKind.SUM,
    ),
    **dict.fromkeys(
        [Tensor.to, Tensor.type, Tensor.type_as, Tensor.double, Tensor.float, Tensor.bfloat16, Tensor.half],
        StepKind.CAST,
    ),
    **dict.fromkeys([F.dropout, torch.dropout, _aten.dropout, _aten.dropout.default], StepKind.DROPOUT),
}
#: Those of one operand.
UNARY = (StepKind.CAST, StepKind.DROPOUT)


class Step(NamedTuple):
    """A call of a cheap op.

    Attributes:
        kind: Which one.
        positions: Positions among the arguments of the operands that are tensors.
        operands: These tensors.
        p: Of a dropout, the probability that an element is dropped.
    """

    kind: StepKind
    positions: tuple[int, ...]
    operands: tuple[Tensor, ...]
    p: float = 0.0

    def makes(self, result: Any) -> bool:
        """Whether the result is what can be rebuilt: a cast may also go to integers, or to another device."""
        if self.kind is not StepKind.CAST:
            return isinstance(result, Tensor)
        (x,) = self.operands
        return isinstance(result, Tensor) and {x.dtype, result.dtype} <= {*FLOATS} and result.device == x.device

    def passes_on(self, operand: int) -> bool:
        """Whether the result is as cheap to rebuild as one operand."""
        first = self.operands[operand]
        others = [t for i, t in enumerate(self.operands) if i != operand]
        if self.kind in UNARY:
            return True
        broadcast = torch.broadcast_shapes(*(t.shape for t in self.operands))
        if any(t.device != first.device for t in others) or not are_same(first.shape, broadcast):
            return False
        # A product saves its factors. A summand as large as the sum would only be saved in its place.
        return all(
            is_small(t, first) or (self.kind is StepKind.PRODUCT and are_same(t.shape, first.shape)) for t in others
        )


def are_same(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are equal; under a compiler, whether they are known to be."""
    if not is_compiling():
        return shape == other
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # of what depends on data, it knows only so much

    return len(shape) == len(other) and all(guard_or_false(m == n) for m, n in zip(shape, other, strict=True))


def is_small(tensor: Tensor, than: Tensor) -> bool:
    """Whether a tensor is so much smaller than another that saving it does not count."""
    m, n = tensor.numel(), than.numel()
    if not is_compiling():
        return 4 * m <= n
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    # Where the batch depends on data, what does not, such as a parameter, is small.
    return guard_or_true(4 * m <= n) and not guard_or_false(m == n)


def as_step(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Step | None:
    """Parses a call seen by a mode; None if it is no cheap op, or has unusual arguments."""
    kind = _STEPS.get(func)
    if func is Tensor.type and len(args) + len(kwargs) == 1:
        return None  # asks for the type
    if kind is None or not args or any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    if kind is StepKind.DROPOUT and is_distributed(*args):
        return None  # of shards, lomem drops other elements than torch
    p = _probability(args, kwargs) if kind is StepKind.DROPOUT else 0.0
    found = range(1) if kind in UNARY else range(len(args))
    positions = tuple(i for i in found if isinstance(args[i], Tensor))
    operands = tuple(args[i] for i in positions)
    ordinary = is_compiling() or all(_is_ordinary(t) and not t.is_inference() for t in operands)
    if not operands or p is None or not ordinary:
        return None
    return Step(kind, positions, operands, p)


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in _ORDINARY or is_distributed(tensor)


def _probability(args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """The probability of a dropout; None if it is off, in place, or drops everything."""
    names = ("p", "training", "inplace")
    options: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    options |= {"training" if n == "train" else n: value for n, value in kwargs.items()}
    options |= dict(zip(names, args[1:], strict=False))
    p = options["p"]
    x = args[0]
    drops = options["training"] and not options["inplace"] and isinstance(p, int | float) and 0 < p < 1
    usual = isinstance(x, Tensor) and x.dtype in FLOATS and x.layout == torch.strided and not x.is_nested
    return p if drops and usual and options.keys() == {*names} else None
