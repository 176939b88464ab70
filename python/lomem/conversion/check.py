"""Checks that a converted model computes what it did before, and finds the conversion at fault if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._trace.autocast import autocast_dtype
from .._trace.batch import Batch
from .._trace.float64 import in_float64
from .._trace.state import seed
from .exchange import exchange_all, give_all_back
from .flow import modes, untouched
from .kinds import Kind
from .ledger import Candidate

__all__ = ["Difference", "Outputs", "verify"]


class Outputs:
    """Outputs of the original model, to compare with those of the converted one."""

    def __init__(self, model: nn.Module, inputs: Batch) -> None:
        self._model, self._inputs = model, inputs
        self._dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self._first = self._run()
        again = self._run()
        #: Whether the model's outputs are reproducible.
        self.repeatable = all(_same(a, b) for a, b in zip(self._first, again, strict=True))

    def _run(self) -> list[Tensor]:
        outputs = []
        for training in modes(self._model):
            # With gradients in training: only then do converted modules behave differently.
            with untouched(self._model, training, self._inputs), torch.set_grad_enabled(training):
                seed(self._model, self._inputs.tensors())  # the same dropout every time
                leaves = tree_leaves(self._inputs.call(self._model))
            outputs += [t.detach().clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        return outputs

    def compare(self, tolerance: float | None) -> Difference:
        """Runs the model again and returns the largest difference from the original outputs."""
        worst = Difference(0.0, 0.0 if tolerance is None else tolerance)
        for before, after in zip(self._first, self._run(), strict=True):
            if _same(before, after):
                continue
            # Modules that always compute in float32 are no more precise than that, and an output is no more precise
            # than the weights and the autocast dtype, whatever its own dtype.
            low = autocast_dtype(before.device.type) or torch.float32
            dtypes = {before.dtype, torch.float32, *self._dtypes, low}
            allowed = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 if tolerance is None else tolerance
            difference = Difference(_relative(before, after), allowed)
            # The first excessive difference, otherwise the largest.
            if not worst.excessive and (difference.excessive or difference.largest > worst.largest):
                worst = difference
        return worst


@dataclass(frozen=True)
class Difference:
    """Difference of an output from the original model's.

    Attributes:
        largest: The difference, relative to the norm of the output.
        allowed: Largest difference allowed.
    """

    largest: float
    allowed: float

    @property
    def excessive(self) -> bool:
        """Whether the difference is larger than allowed, or NaN."""
        return not self.largest <= self.allowed


def _relative(before: Tensor, after: Tensor) -> float:
    finite = before.isfinite() & after.isfinite()
    same = torch.equal(before[~finite], after[~finite]) or bool((before.isnan() == after.isnan()).all())
    before, after = in_float64(before[finite]), in_float64(after[finite])
    norm = before.norm().item()
    return (after - before).norm().item() / norm if norm and same else float("inf")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def verify(
    modules: Mapping[str, nn.Module], chosen: list[Candidate], before: Outputs, tolerance: float | None
) -> float:
    """Compares the outputs of a converted model with the original ones.

    Args:
        modules: All modules of the model, by name.
        chosen: The conversions made.
        before: Outputs of the original model.
        tolerance: Largest relative difference allowed; None derives it from the dtypes, or 0 if only activations were
            converted.

    Returns:
        The largest relative difference.

    Raises:
        RuntimeError: If the difference is too large. The message names the conversion at fault; the model is left
            partly converted.
    """
    exact = all(c.kind is not Kind.NORM for c in chosen)
    allowed = 0.0 if exact and tolerance is None else tolerance
    difference = before.compare(allowed)
    if not difference.excessive:
        return difference.largest
    c = _at_fault(modules, chosen, before, allowed)
    raise RuntimeError(
        f"lomem.convert: an output of the converted model differs by {difference.largest:.2g} (relative), expected at "
        f"most {difference.allowed:.2g}, once {c.name or 'the model'} ({c.form}) is converted: pass exclude={[c.name]} "
        "to skip it; the model is unchanged"
    )


def _at_fault(
    modules: Mapping[str, nn.Module], chosen: list[Candidate], outputs: Outputs, tolerance: float | None
) -> Candidate:
    """The first conversion that makes the outputs differ too much, by bisection."""
    passing, failing = 0, len(chosen)
    while failing - passing > 1:
        middle = (passing + failing) // 2
        give_all_back(modules.values())
        exchange_all(modules, [c.changes for c in chosen[:middle]])
        if outputs.compare(tolerance).excessive:
            failing = middle
        else:
            passing = middle
    return chosen[failing - 1]
