"""Converts a model in place, and restores it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import _C
from .._trace.batch import Batch, as_batch
from .advice import LEAST, LEAST_OF_ONE_DRAW, advice, warning
from .check import Outputs, verify
from .exchange import exchange_all, give_all_back, give_back, is_converted, original_class, wrapped_since
from .fidelity import ExactGradient, GradientWarning
from .flow import trace
from .kinds import KEEP, Auto, Criterion, Kind, Rounding, Wishes
from .ledger import Candidate, Ledger
from .plan import plan
from .report import Decision, Report

__all__ = ["NothingToConvertError", "convert", "restore"]


class NothingToConvertError(ValueError):
    """Raised if :func:`lomem.convert` finds nothing to convert in a model."""


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    bits: int | None = None,
    activations: str | None = None,
    norms: str | None = None,
    pairs: str | None = None,
    dropouts: str = "auto",
    criterion: str | None = None,
    rounding: str | None = None,
    exclude: Iterable[str] = (),
    check: bool = True,
    tolerance: float | None = None,
    dry_run: bool = False,
    gradients: bool = True,
    loss: Callable[[Any], Tensor] | None = None,
) -> Report:
    """Reduces what a model saves for backward. Converts the model in place.

    Modules are recognized by what they compute, not by name.

    Pairs: a linear layer saves its input. If that is a cheap function of what is saved anyway (the result of an
    activation that saves its input, a gated product like ``silu(gate) * up``, a norm's output scaled and shifted, a
    cast), the layer rebuilds it in the backward pass instead. A gated product saves gate and up. Results are unchanged,
    bit for bit, and gradients are exact.

    Dropouts save a bit per element, and drop what they dropped before, for the same state of torch's random numbers.
    A linear layer whose input is a cast or dropped-out copy of another tensor, as LoRA layers make for each adapter,
    saves that tensor, which others save or share, and makes the copy again.

    Where no linear layer saves the result of an activation, those that compute GELU (exact or tanh) or
    ``x * sigmoid(c * x)`` save 4 bits per element, or as many as ``activations`` says; so do calls of ``F.gelu`` and
    ``F.silu`` in a module's forward. Their results are unchanged, bit for bit. Their derivative is rounded to so many
    bits at random, which makes the gradient noisy, but right in the mean (:func:`lomem.functional.drawn_levels`); with
    ``criterion`` it is that of a step function (:func:`lomem.functional.step_function`).

    Norms that compute layer or RMS norm save what the linear layers after them save anyway, if the example run shows
    that these do. Their gradient is exact up to rounding. In order of preference:

    - *inverted*: the norm saves its output, and recovers the normalized input from it;
    - *two outputs*: the same under autocast if the output is also used in full precision, as in the residual stream
      of a post-norm model: the norm and the linear layers save a copy in the autocast dtype;
    - *normalized*: if the weights and biases cannot be inverted, the norm saves the normalized input, and the linear
      layers that follow compute their weight gradients from it. Their results are unchanged.

    A module stays the same object, with its parameters, hooks and state_dict keys, so state dicts load both ways.
    Call this under the autocast setting and on the device used in training, after wrapping with peft and freezing
    (what is frozen determines what is saved), and before compiling. See docs/convert.md.

    Args:
        model: The model, changed in place. Unchanged if this raises.
        example_inputs: A small batch of the kind that the model is trained with: a tensor, a tuple of arguments or a
            dict of keyword arguments. Without it, norms are left unconverted and there are no pairs, since consumers
            are unknown.
        bits: One dial for the next three options. 16 allows only what is exact: pairs and norms, but no few-bit codes.
            8, 4 and 2 stand for that many bits for activations, and for 8, 4 and 4 bits for pairs and norms. None, the
            default, stands for exact pairs and norms, and 4 bits for activations.
        activations: ``"1bit"``, ``"2bit"``, ... or ``"8bit"``, where no linear layer saves the result; ``"keep"``
            converts none. None, as for the next two, leaves it to ``bits``.
        norms: ``"auto"``; ``"8bit"`` or ``"4bit"`` has norms whose output only linear layers save keep their normalized
            input in groups (:func:`lomem.functional.quantize_groups`), from which these layers rebuild their input;
            ``"keep"`` converts none.
        pairs: ``"auto"``; ``"8bit"`` or ``"4bit"`` has pairs keep what they start from in groups, an activation's input
            or gate and up; with ``"keep"``, no linear layer rebuilds the result of an activation, a product, a cast or
            a dropout.
        dropouts: ``"auto"``; ``"keep"`` converts none.
        criterion: Has the activations use step functions: those fitted to the ``"derivative"`` or to the
            ``"primitive"``, as in :func:`lomem.functional.gelu`, or the 2-bit ones published in the ``"paper"``.
        rounding: ``"stochastic"``, the default without ``criterion``: activations round their derivative at random,
            with seeds of :mod:`lomem.random`. ``"nearest"``: they use step functions, those fitted to the derivative if
            there is no ``criterion``.
        exclude: Names of modules to skip, with wildcards (``["*.layers.0.*"]``). Each must match a module.
        check: Whether to compare the outputs on the example inputs with the original model's, in training and in
            evaluation mode (only in training mode if weights are quantized).
        tolerance: Largest relative difference that the check allows, in the 2-norm of an output. By default half the
            digits of the narrowest dtype among weights, autocast and output, since a model may amplify rounding; 0 if
            only activations were converted.
        dry_run: Whether to only report the decisions, changing nothing.
        gradients: Whether to compare the gradient of the trained parameters on the example inputs with the original
            model's, in training mode, if not all conversions are exact: ``Report.gradient`` and ``Report.layers``. This
            takes two more passes, forward and backward, and up to the memory of three gradients. If it is not possible,
            ``Report.notes`` says why.
        loss: Maps the model's output to the scalar whose gradient is compared. By default it is the output's ``loss``
            (attribute or key), if that is a scalar tensor that requires a gradient; else the output itself, if it is
            one; else the sum, in float32, of all floating-point tensors of the output that require a gradient, each
            element times a number of the standard normal distribution, the same every time.

    Returns:
        What was converted, what was not, and why.

    Warns:
        GradientWarning: If the cosine of the gradient to the exact one is below 0.95, or below 0.9 where it is one draw
            of a gradient that is right in the mean. The message names the layers that are the furthest off, and a
            setting with which the gradient is expected to be closer.

    Raises:
        ValueError: If an argument is wrong, the model is already converted, or there is nothing to convert
            (``NothingToConvertError``).
        RuntimeError: If the model does not run on the example inputs, or the check fails.
    """
    wishes = _wishes(model, bits, activations, norms, pairs, dropouts, criterion, rounding, exclude, tolerance)
    _check_gradients(gradients, loss)
    batch = example_inputs
    inputs = None if batch is None else as_batch("lomem.convert", "example_inputs", batch, ValueError)
    candidates, flow = plan(model, inputs, wishes)
    chosen = [c for c in candidates if not c.left]
    modules = dict(model.named_modules())
    decisions = tuple(_decision(modules[c.name], c) for c in candidates)
    report = Report(decisions, None if flow is None else Ledger(flow).nbytes)
    if inputs is None and wishes.norms and any(c.kind is Kind.NORM for c in candidates):
        report = _noted(report, "norms were not converted: pass example_inputs to convert them")
    if dry_run:
        return report
    if not chosen:
        reasons = "; ".join(f"{n} x {d.module} ({d.reason})" for d, n, _ in report.groups()[:4])
        kinds = "no norms, activations or dropouts"
        raise NothingToConvertError(
            f"lomem.convert: found nothing to convert in {type(model).__name__}: {reasons or kinds}"
        )
    before = Outputs(model, inputs) if check and inputs is not None and not _is_fake(model) else None
    exact = None
    if gradients and inputs is not None and not all(c.action.exact for c in chosen):
        exact = _exact_gradient(model, inputs, loss, before)
    if any(_draws(c, wishes) for c in chosen):
        _C.begin_random_stream()  # so that a program that sets torch's seed draws the same seeds each time
    try:
        exchange_all(modules, [c.changes for c in chosen])
        if inputs is None:
            return report
        ledger = Ledger(trace(model, inputs, (), training=True, grad=True))
        after = ledger.nbytes
        assert report.saved_before is not None
        if after > report.saved_before:
            raise RuntimeError(
                f"lomem.convert: the converted model saves {after} bytes, expected at most {report.saved_before}"
            )
        report = dataclasses.replace(report, saved_after=after, holders=ledger.holders())
        if before is not None and before.repeatable:
            report = dataclasses.replace(report, difference=verify(modules, chosen, before, tolerance))
        elif before is not None:
            report = _noted(report, "not checked: the original model's outputs are not reproducible")
        if exact is None:
            return report
        given = {"activations": activations, "norms": norms, "pairs": pairs}
        report, message = _with_gradient(report, exact, chosen, wishes, given)
        if message is not None:
            warnings.warn(f"lomem.convert: {message}", GradientWarning, stacklevel=2)
        return report
    except BaseException:
        give_all_back(modules.values())
        raise


def _noted(report: Report, note: str) -> Report:
    return dataclasses.replace(report, notes=(*report.notes, note))


def _draws(c: Candidate, wishes: Wishes) -> bool:
    """Whether what is converted draws random numbers of lomem's stream."""
    codes = c.action.code_bits is not None and wishes.criterion is Criterion.DRAWN
    return codes or c.action.group_bits is not None


def _exact_gradient(
    model: nn.Module, inputs: Batch, loss: Callable[[Any], Tensor] | None, outputs: Outputs | None
) -> ExactGradient | str:
    """The gradient of a model that is not converted yet, or why there is none."""
    if _is_fake(model):
        return "the model's tensors have no data"
    if outputs is not None and not outputs.repeatable:
        return "the original model's outputs are not reproducible"
    exact = ExactGradient(model, inputs, loss)
    return exact if exact.missing is None else exact.missing


def _with_gradient(
    report: Report,
    exact: ExactGradient | str,
    chosen: list[Candidate],
    wishes: Wishes,
    given: Mapping[str, str | None],
) -> tuple[Report, str | None]:
    """The report with the comparison of the gradients, and what to warn of."""
    compared = exact if isinstance(exact, str) else exact.compare()
    if isinstance(compared, str):
        return _noted(report, f"gradients were not compared: {compared}"), None
    assert isinstance(exact, ExactGradient)
    whole, layers = compared
    missing = len(exact.layers) - len(layers)
    if missing > 0:
        # As of all layers behind a last one that is 0 at first: they count once that has been trained.
        note = (
            f"{missing} of {len(exact.layers)} layers with trained parameters have no gradient on the example batch yet"
        )
        report = _noted(report, note)
    if not math.isfinite(whole.error):
        message = (
            "the gradient on the example batch is not finite, but was before the conversion: lomem.restore undoes it"
        )
        return _noted(report, message), message
    report = dataclasses.replace(report, gradient=whole, layers=layers)
    groups = any(c.action.group_bits is not None for c in chosen)
    drawn = wishes.criterion is Criterion.DRAWN and any(c.action.code_bits is not None for c in chosen)
    if whole.cosine >= (LEAST_OF_ONE_DRAW if drawn and not groups else LEAST):
        return report, None
    message = warning(whole, layers, advice(whole, chosen, wishes, given), drawn=drawn)
    return _noted(report, message), message


def restore(model: nn.Module) -> int:
    """Undoes :func:`convert`. Parameters keep their trained values.

    Args:
        model: The converted model, changed in place.

    Returns:
        Number of modules restored.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"lomem.restore: model is a {type(model).__name__}, expected a torch.nn.Module")
    converted = [module for module in model.modules() if is_converted(module)]
    if not converted:
        raise ValueError(f"lomem.restore: no module of {type(model).__name__} is converted, expected a converted model")
    wrapped = [module for module in converted if wrapped_since(module)]
    if wrapped:
        raise ValueError(
            f"lomem.restore: a converted module has become a {type(wrapped[0]).__name__}, expected the class that "
            "lomem.convert gave it: restore before fully_shard, parametrizations and the like"
        )
    for module in converted:
        give_back(module)
    return len(converted)


_BITS = {f"{bits}bit": bits for bits in range(1, 9)}
_GROUPS = {"8bit": 8, "4bit": 4}
#: What the dial stands for: activations, and both norms and pairs. The default is what docs/convert.md's rule admits.
_DIAL = {None: ("4bit", "auto"), 16: ("4bit", "auto"), 8: ("8bit", "8bit"), 4: ("4bit", "4bit"), 2: ("2bit", "4bit")}


def _wishes(
    model: Any,
    bits: Any,
    activations: Any,
    norms: Any,
    pairs: Any,
    dropouts: Any,
    criterion: Any,
    rounding: Any,
    exclude: Any,
    tolerance: Any,
) -> Wishes:
    """Checks the arguments."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"lomem.convert: model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(bits, bool) or not (bits is None or isinstance(bits, int)) or bits not in _DIAL:
        raise ValueError(f"lomem.convert: bits is {bits!r}, expected 16, 8, 4, 2 or None")
    few_bits, groups = _DIAL[bits]
    if activations is None:
        activations = "2bit" if bits is None and criterion == Criterion.PAPER else few_bits
    norms, pairs = (groups if value is None else value for value in (norms, pairs))
    if activations not in (*_BITS, KEEP):
        raise ValueError(
            f"lomem.convert: activations is {activations!r}, expected '1bit', '2bit', ... '8bit' or 'keep'"
        )
    for name, value in (("norms", norms), ("pairs", pairs)):
        if value not in [*Auto, *_GROUPS]:
            raise ValueError(f"lomem.convert: {name} is {value!r}, expected 'auto', '8bit', '4bit' or 'keep'")
        if bits == 16 and value in _GROUPS:
            raise ValueError(f"lomem.convert: {name} is {value!r}, expected 'auto' or 'keep' with bits=16")
    if dropouts not in [*Auto]:
        raise ValueError(f"lomem.convert: dropouts is {dropouts!r}, expected 'auto' or 'keep'")
    if criterion not in [None, *Criterion] or criterion == Criterion.DRAWN:
        raise ValueError(
            f"lomem.convert: criterion is {criterion!r}, expected 'derivative', 'primitive', 'paper' or None"
        )
    if rounding not in [None, *Rounding]:
        raise ValueError(f"lomem.convert: rounding is {rounding!r}, expected 'stochastic', 'nearest' or None")
    if rounding == Rounding.STOCHASTIC and criterion is not None:
        raise ValueError(
            f"lomem.convert: criterion is {criterion!r}, expected None with rounding='stochastic', which has no step "
            "function"
        )
    if criterion is None:
        criterion = Criterion.DERIVATIVE if rounding == Rounding.NEAREST else Criterion.DRAWN
    if not (tolerance is None or (isinstance(tolerance, int | float) and tolerance >= 0)):
        raise ValueError(f"lomem.convert: tolerance is {tolerance!r}, expected a number of at least 0")
    few = _BITS.get(activations)
    if criterion == Criterion.PAPER and few not in (2, None):
        raise ValueError(
            f"lomem.convert: activations is {activations!r}, expected '2bit' with criterion='paper', which has "
            "only 2-bit step functions"
        )
    if {activations, norms, pairs, dropouts} == {KEEP}:
        raise ValueError(
            "lomem.convert: activations, norms, pairs and dropouts are all 'keep', expected something to convert"
        )
    converted = sum(is_converted(module) for module in model.modules())
    if converted:
        raise ValueError(
            f"lomem.convert: {converted} modules of {type(model).__name__} are already converted, expected a plain "
            "model: call lomem.restore first"
        )
    return Wishes(
        few,
        Criterion(criterion),
        norms=norms != KEEP,
        pairs=pairs != KEEP,
        dropouts=dropouts != KEEP,
        exact=bits == 16,
        exclude=tuple(_patterns(model, exclude)),
        pair_groups=_GROUPS.get(pairs),
        norm_groups=_GROUPS.get(norms),
    )


def _check_gradients(gradients: Any, loss: Any) -> None:
    if not isinstance(gradients, bool):
        raise ValueError(f"lomem.convert: gradients is {gradients!r}, expected True or False")
    if loss is not None and not callable(loss):
        raise ValueError(
            f"lomem.convert: loss is {loss!r}, expected None or a function that maps the model's output to a scalar"
        )


def _patterns(model: nn.Module, exclude: Any) -> list[str]:
    patterns = [exclude] if isinstance(exclude, str) else list(exclude) if isinstance(exclude, Iterable) else [exclude]
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not isinstance(pattern, str) or not fnmatch.filter(names, pattern):
            raise ValueError(f"lomem.convert: exclude has {pattern!r}, expected names of modules, wildcards allowed")
    return patterns


def _is_fake(model: nn.Module) -> bool:
    return any(isinstance(t, FakeTensor) or t.is_meta for t in (*model.parameters(), *model.buffers()))


def _decision(module: nn.Module, c: Candidate) -> Decision:
    kind = original_class(module).__name__
    return Decision(c.name, c.kind, kind, str(c.form), c.action, c.reason, 0 if c.left else c.gain)
