"""Converting a model in place, and back."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .._trace.batch import as_batch
from .check import Outputs, verify
from .exchange import exchange_all, give_all_back, give_back, is_converted, original_class, wrapped_since
from .flow import trace
from .kinds import KEEP, Criterion, Kind, Norms
from .ledger import Candidate, Ledger
from .plan import Wishes, plan
from .report import Decision, Report

__all__ = ["NothingToConvertError", "convert", "restore"]


class NothingToConvertError(ValueError):
    """A model in which :func:`lomem.convert` finds nothing to convert."""


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    activations: str = "2bit",
    norms: str = "auto",
    criterion: str = "derivative",
    exclude: Iterable[str] = (),
    check: bool = True,
    tolerance: float | None = None,
    dry_run: bool = False,
) -> Report:
    """Reduces what a model saves for backward, in place.

    Activations that compute GELU (either form) or ``x * sigmoid(c * x)`` (SiLU and others), under whatever name, save 2
    bits per element, or as many as ``activations`` says; so do calls of ``F.gelu`` and ``F.silu`` in modules' forwards.
    Their results are unchanged, bit for bit; their gradient is that of a step function
    (:func:`lomem.functional.step_function`).

    Norms that compute layer or RMS norm, under whatever name, save what the linear layers behind them save anyway,
    where the example run shows that these do. Their gradient is exact to rounding. In order of preference:

    - *inverted*: the norm saves its output, and recovers the normalized input from it;
    - *two outputs*: the same under autocast where the output also goes where its full precision matters, such as the
      residual stream of a post-norm model: a copy in the autocast dtype is saved, which linear layers take;
    - *normalized*: where the weights and biases cannot be inverted, the norm saves the normalized input, and the linear
      layers that follow take their weights' gradients from it. Their results are unchanged.

    A module stays the same object, with its parameters, hooks and state_dict keys, so that state dicts load both ways.
    Call this under the autocast that the model is trained under, on the device that it is trained on, and after
    peft's wrapping and freezing, since what is frozen decides what is saved; and before compiling. See docs/convert.md.

    Args:
        model: Changed in place; as it was where this raises.
        example_inputs: A batch of the kind that the model is trained with, small: a tensor, a tuple of arguments or a
            dict of keyword arguments. Without it norms are left, since nothing is known of their consumers.
        activations: ``"1bit"``, ``"2bit"``, ... or ``"8bit"``. ``"keep"`` leaves all.
        norms: ``"auto"``, or ``"keep"`` to leave all.
        criterion: Which step functions the activations use: those fitted to the ``"derivative"`` or to the
            ``"primitive"``, as in :func:`lomem.functional.gelu`, or those that the ``"paper"`` published, which have
            2 bits.
        exclude: Names of modules to leave, with wildcards (``["*.layers.0.*"]``), each of which must match one.
        check: Whether to compare the outputs on the example inputs with the original model's, in training and in
            evaluation mode (of models with quantized weights, in training mode alone).
        tolerance: Largest relative difference that the check allows, in the 2-norm of an output. By default half of
            the digits of the narrowest dtype of weights, autocast and output, since a model may amplify rounding; where
            only activations were converted, 0.
        dry_run: Decides, and changes nothing.

    Returns:
        What was changed, what was not, and why.

    Raises:
        ValueError: Where an argument is wrong; where the model is converted already; where nothing can be converted,
            as a ``NothingToConvertError``.
        RuntimeError: Where the example inputs do not run, or where the check fails.
    """
    wishes = _wishes(model, activations, norms, criterion, exclude, tolerance)
    given = example_inputs
    inputs = None if given is None else as_batch("lomem.convert", "example_inputs", given, ValueError)
    candidates, flow = plan(model, inputs, wishes)
    chosen = [c for c in candidates if not c.left]
    modules = dict(model.named_modules())
    decisions = tuple(_decision(modules[c.name], c) for c in candidates)
    report = Report(decisions, None if flow is None else Ledger(flow).nbytes)
    if inputs is None and wishes.norms is Norms.AUTO and any(c.kind is Kind.NORM for c in candidates):
        report = dataclasses.replace(report, notes=("norms were left: their consumers show on example_inputs only",))
    if dry_run:
        return report
    if not chosen:
        reasons = "; ".join(f"{n} x {d.module} ({d.reason})" for d, n, _ in report.groups()[:4])
        raise NothingToConvertError(
            f"lomem.convert: found nothing to convert in {type(model).__name__}: {reasons or 'no norm, no activation'}"
        )
    before = Outputs(model, inputs) if check and inputs is not None and not _is_fake(model) else None
    try:
        exchange_all(modules, [c.changes for c in chosen])
        if inputs is None:
            return report
        after = Ledger(trace(model, inputs, (), training=True, grad=True)).nbytes
        assert report.saved_before is not None
        if after > report.saved_before:
            raise RuntimeError(
                f"lomem.convert: the converted model saves {after} bytes, expected at most {report.saved_before}"
            )
        report = dataclasses.replace(report, saved_after=after)
        if before is None:
            return report
        if not before.repeatable:
            note = "not checked: the original model's outputs are not the same each time"
            return dataclasses.replace(report, notes=(*report.notes, note))
        return dataclasses.replace(report, difference=verify(modules, chosen, before, tolerance))
    except BaseException:
        give_all_back(modules.values())
        raise


def restore(model: nn.Module) -> int:
    """Undoes :func:`convert`. Parameters keep their trained values.

    Args:
        model: Changed in place.

    Returns:
        The number of modules that were changed back.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"lomem.restore: model is a {type(model).__name__}, expected a torch.nn.Module")
    converted = [module for module in model.modules() if is_converted(module)]
    if not converted:
        raise ValueError(f"lomem.restore: no module of {type(model).__name__} is converted, expected a converted model")
    wrapped = [module for module in converted if wrapped_since(module)]
    if wrapped:
        raise ValueError(
            f"lomem.restore: a converted module is of the class {type(wrapped[0]).__name__} since, expected the one "
            "that lomem.convert gave it: restore before fully_shard, parametrizations and the like"
        )
    for module in converted:
        give_back(module)
    return len(converted)


_BITS = {f"{bits}bit": bits for bits in range(1, 9)}


def _wishes(model: Any, activations: Any, norms: Any, criterion: Any, exclude: Any, tolerance: Any) -> Wishes:
    """The arguments, checked."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"lomem.convert: model is a {type(model).__name__}, expected a torch.nn.Module")
    if activations not in (*_BITS, KEEP):
        raise ValueError(
            f"lomem.convert: activations is {activations!r}, expected '1bit', '2bit', ... '8bit' or 'keep'"
        )
    if norms not in [*Norms]:
        raise ValueError(f"lomem.convert: norms is {norms!r}, expected 'auto' or 'keep'")
    if criterion not in [*Criterion]:
        raise ValueError(f"lomem.convert: criterion is {criterion!r}, expected 'derivative', 'primitive' or 'paper'")
    if not (tolerance is None or (isinstance(tolerance, int | float) and tolerance >= 0)):
        raise ValueError(f"lomem.convert: tolerance is {tolerance!r}, expected a number of at least 0")
    bits = _BITS.get(activations)
    if criterion == Criterion.PAPER and bits not in (2, None):
        raise ValueError(
            f"lomem.convert: activations is {activations!r}, expected '2bit' with criterion='paper', whose step "
            "functions have 2 bits"
        )
    if activations == norms == KEEP:
        raise ValueError("lomem.convert: activations and norms are both 'keep', expected something to convert")
    converted = sum(is_converted(module) for module in model.modules())
    if converted:
        raise ValueError(
            f"lomem.convert: {converted} modules of {type(model).__name__} are converted already, expected a plain "
            "model: lomem.restore makes it one"
        )
    return Wishes(bits, Criterion(criterion), Norms(norms), tuple(_patterns(model, exclude)))


def _patterns(model: nn.Module, exclude: Any) -> list[str]:
    patterns = [exclude] if isinstance(exclude, str) else list(exclude) if isinstance(exclude, Iterable) else [exclude]
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not isinstance(pattern, str) or not fnmatch.filter(names, pattern):
            raise ValueError(f"lomem.convert: exclude has {pattern!r}, expected names of modules, with wildcards")
    return patterns


def _is_fake(model: nn.Module) -> bool:
    return any(isinstance(t, FakeTensor) or t.is_meta for t in (*model.parameters(), *model.buffers()))


def _decision(module: nn.Module, c: Candidate) -> Decision:
    kind = original_class(module).__name__
    return Decision(c.name, c.kind, kind, str(c.form), c.action, c.reason, 0 if c.left else c.gain)
