"""Converting a model in place, and back."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .._trace.autocast import autocast_dtype
from .exchange import exchange, give_back, is_converted, original_class, wrapped_since
from .flow import Flow, Inputs, as_inputs, trace, untouched
from .plan import Candidate, Finder, Ledger, plan_activation, plan_calls, plan_norm, settle, ways_of_its_own
from .recognize import (
    ActivationForm,
    NormForm,
    NotRecognized,
    recognize_activation,
    recognize_norm,
    signature,
)
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
    exclude: Iterable[str] = (),
    check: bool = True,
    tolerance: float | None = None,
    dry_run: bool = False,
) -> Report:
    """Makes a model keep less for the backward pass, in place.

    Activations that compute GELU (either form), QuickGELU or SiLU, under whatever name, keep 2 bits an element, or as
    many as ``activations`` says; so do calls of ``F.gelu`` and ``F.silu`` in modules' forwards. Their results stay what
    they are, bit for bit; their gradient is a step function (:func:`lomem.functional.regelu2`).

    Norms that compute layer or RMS norm, under whatever name, keep what linear layers behind them keep anyway, where
    the example run shows that these do. Their gradient is exact to rounding. In order of preference:

    - *inverted*: the norm keeps its output, and recovers the normalized input from it;
    - *two outputs*: the same under autocast where the output also goes where its full precision matters, such as the
      residual stream of a post-norm model: kept is a copy in the autocast dtype, which linear layers take;
    - *normalized*: where weights and biases do not allow to invert, the norm keeps the normalized input, and linear
      layers that follow take their weights' gradients from it. Their results stay what they are.

    A module stays the object that it is, with its parameters, hooks and state_dict keys, so that state dicts go both
    ways. Call this under the autocast that the model is trained under, on the device that it is trained on, and after
    peft's wrapping and freezing: what is frozen decides what is kept. Before compiling. See docs/convert.md.

    Args:
        model: Changed in place; as it was where this raises.
        example_inputs: A batch of the kind that the model is trained with, small: a tensor, a tuple of arguments or a
            dict of keyword arguments. Without it norms are left, since nothing is known of their consumers.
        activations: ``"1bit"``, ``"2bit"``, ... or ``"8bit"``. 2 bits are those of
            :func:`lomem.functional.regelu2` and :func:`lomem.functional.resilu2`, others those of
            :func:`lomem.functional.gelu` and :func:`lomem.functional.silu`. ``"keep"`` leaves all.
        norms: ``"auto"``, or ``"keep"`` to leave all.
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
        ValueError: Of arguments; where the model is converted already; where nothing can be converted, a
            ``NothingToConvertError``.
        RuntimeError: Where the example inputs do not run, or where the check fails.
    """
    _check_arguments(model, activations, norms, tolerance)
    inputs = None if example_inputs is None else as_inputs("lomem.convert: example_inputs", example_inputs)
    patterns = _patterns(model, exclude)
    candidates, flow = _candidates(model, inputs, activations, norms, patterns)
    chosen = [c for c in candidates if c.action != "left"]
    modules = dict(model.named_modules())
    decisions = tuple(_decision(modules[c.name], c) for c in candidates)
    report = Report(decisions, None if flow is None else Ledger(flow).nbytes)
    if inputs is None and norms == "auto" and any(c.kind == "norm" for c in candidates):
        report = dataclasses.replace(report, notes=("norms were left: their consumers show on example_inputs only",))
    if dry_run:
        return report
    if not chosen:
        reasons = "; ".join(f"{n} x {d.module} ({d.reason})" for d, n, _ in report.groups()[:4])
        raise NothingToConvertError(
            f"lomem.convert: found nothing to convert in {type(model).__name__}: {reasons or 'no norm, no activation'}"
        )
    before = _Outputs(model, inputs) if check and inputs is not None and not _is_fake(model) else None
    try:
        _exchange_all(modules, chosen)
        if inputs is None:
            return report
        after = Ledger(trace(model, inputs, (), training=True, grad=True)).nbytes
        assert report.saved_before is not None
        if after > report.saved_before:
            raise RuntimeError(
                f"lomem.convert: the converted model keeps {after} bytes, expected at most {report.saved_before}"
            )
        report = dataclasses.replace(report, saved_after=after)
        if before is None:
            return report
        if not before.repeatable:
            note = "not checked: the original model's outputs are not the same each time"
            return dataclasses.replace(report, notes=(*report.notes, note))
        exact = all(c.kind != "norm" for c in chosen)
        allowed = 0.0 if exact and tolerance is None else tolerance
        difference = before.compare(allowed)
        if difference.excessive:
            raise RuntimeError(_different(difference, _at_fault(modules, chosen, before, allowed)))
        return dataclasses.replace(report, difference=difference.largest)
    except BaseException:
        _give_all_back(modules)
        raise


def _exchange_all(modules: dict[str, nn.Module], chosen: list[Candidate]) -> None:
    changes = {name: change for c in chosen for name, change in c.changes.items()}
    for name, (mixin, attributes) in changes.items():
        exchange(modules[name], mixin, **attributes)


def _give_all_back(modules: dict[str, nn.Module]) -> None:
    for module in modules.values():
        if is_converted(module):
            give_back(module)


def _at_fault(
    modules: dict[str, nn.Module], chosen: list[Candidate], outputs: _Outputs, tolerance: float | None
) -> Candidate:
    """The conversion with which, after all before it, the outputs differ by too much."""
    passing, failing = 0, len(chosen)
    while failing - passing > 1:
        middle = (passing + failing) // 2
        _give_all_back(modules)
        _exchange_all(modules, chosen[:middle])
        if outputs.compare(tolerance).excessive:
            failing = middle
        else:
            passing = middle
    return chosen[failing - 1]


def _different(difference: _Difference, c: Candidate) -> str:
    return (
        f"lomem.convert: an output of the converted model differs by {difference.largest:.2g} (relative), expected at "
        f"most {difference.allowed:.2g}, once {c.name or 'the model'} ({c.form}) is converted: exclude={[c.name]} "
        "leaves it; the model is as it was"
    )


def restore(model: nn.Module) -> int:
    """Undoes :func:`convert`; parameters keep what they have learnt.

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


def _check_arguments(model: Any, activations: str, norms: str, tolerance: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"lomem.convert: model is a {type(model).__name__}, expected a torch.nn.Module")
    if activations not in (*_BITS, "keep"):
        raise ValueError(
            f"lomem.convert: activations is {activations!r}, expected '1bit', '2bit', ... '8bit' or 'keep'"
        )
    if norms not in ("auto", "keep"):
        raise ValueError(f"lomem.convert: norms is {norms!r}, expected 'auto' or 'keep'")
    if not (tolerance is None or (isinstance(tolerance, int | float) and tolerance >= 0)):
        raise ValueError(f"lomem.convert: tolerance is {tolerance!r}, expected a number of at least 0")
    if activations == norms == "keep":
        raise ValueError("lomem.convert: activations and norms are both 'keep', expected something to convert")
    converted = sum(is_converted(module) for module in model.modules())
    if converted:
        raise ValueError(
            f"lomem.convert: {converted} modules of {type(model).__name__} are converted already, expected a plain "
            "model: lomem.restore makes it one"
        )


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
    return Decision(c.name, c.kind, kind, str(c.form), c.action, c.reason, c.gain if c.action != "left" else 0)


#: Parts of class names of modules that are meant to be norms: those that are none of ours get a verdict too.
_NORM_NAMES = ("norm", "layer_norm", "ln_")
#: Those that are called so and are something else.
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.LocalResponseNorm, nn.CrossMapLRN2d)


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            yield name, module


def _modes(model: nn.Module) -> tuple[bool, ...]:
    # Quantized weights are not run in evaluation mode: bitsandbytes packs them anew there on the CPU, with fewer digits
    # and for good.
    quantized = any(not p.is_floating_point() for p in model.parameters())
    return (True,) if quantized else (True, False)


def _run(model: nn.Module, inputs: Inputs, watched: Iterable[str], training: bool, grad: bool) -> Flow:
    try:
        return trace(model, inputs, watched, training=training, grad=grad)
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise RuntimeError(
            f"lomem.convert: example_inputs do not run in {mode} mode: {type(error).__name__}: {error}"
        ) from error


def _flows(model: nn.Module, inputs: Inputs, watched: list[str]) -> list[Flow]:
    # With gradients for what is kept; without for what escapes in objects that hide tensors; evaluation mode for the
    # ways that training does not go.
    _initialize(model, inputs)
    flows = [_run(model, inputs, watched, training=True, grad=True)]
    for training in _modes(model):
        try:
            flows.append(_run(model, inputs, watched, training, grad=False))
        except RuntimeError:
            if not training:
                raise
            flows[0].hide_nothing()  # it needs gradients in training (`retain_grad`)
    return flows


def _initialize(model: nn.Module, inputs: Inputs) -> None:
    # Lazy modules get their parameters from a first run, by whomever. It cannot be undone.
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        with torch.no_grad():
            inputs.call(model)


def _recognize(leaves: dict[str, nn.Module], flows: list[Flow]) -> dict[str, ActivationForm | NormForm | NotRecognized]:
    """What is an activation, a norm, or near enough to deserve a verdict."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for call in (call for flow in flows for call in flow.calls if call.shapes):
        shapes.setdefault(call.name, set()).add(call.shapes[0])
    # Models have many modules of a kind.
    known: dict[Hashable, Any] = {}

    def once(recognize: Callable[..., Any], module: nn.Module, *arguments: Any) -> Any:
        key = recognize, signature(module), arguments
        if key not in known:
            known[key] = recognize(module, *arguments)
        return known[key]

    result: dict[str, ActivationForm | NormForm | NotRecognized] = {}
    for name, module in leaves.items():
        activation = once(recognize_activation, module)
        if isinstance(activation, ActivationForm) or activation.near:
            result[name] = activation
            continue
        named = _is_named_norm(module)
        if not named and next(module.parameters(), next(module.buffers(), None)) is None:
            continue  # a dropout and the like
        norm = once(recognize_norm, module, tuple(sorted(shapes.get(name, ()))))
        if isinstance(norm, NormForm) or norm.near or named:
            result[name] = norm
    return result


def _is_named_norm(module: nn.Module) -> bool:
    """Whether its name promises a norm over the last dimensions or channels."""
    if isinstance(module, _OTHER_NORMS) or type(module).__module__.startswith("torch.nn.utils."):
        return False
    return any(part in type(module).__name__.lower() for part in _NORM_NAMES)


def _candidates(
    model: nn.Module, inputs: Inputs | None, activations: str, norms: str, patterns: list[str]
) -> tuple[list[Candidate], Flow | None]:
    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    leaves = dict(_leaves(model))
    watched = [n for n, m in leaves.items() if not isinstance(m, nn.Embedding)]
    flows = []
    if inputs is not None:
        flows = _flows(model, inputs, watched)
    finder = Finder(model, flows) if flows else None
    bits = _BITS.get(activations, 2)
    found = []
    recognized = _recognize(leaves, flows)
    for name, what in recognized.items():
        if isinstance(what, ActivationForm):
            found.append(_activation_candidate(name, leaves[name], what, finder, bits))
        elif isinstance(what, NormForm):
            found.append(_norm_candidate(name, leaves[name], what, finder))
        else:
            c = Candidate(name, what.kind, f"another {what.kind}")
            c.leave(what.reason)
            found.append(c)
    if finder is not None:
        activation_modules = {name for name, what in recognized.items() if isinstance(what, ActivationForm)}
        found += plan_calls(finder, activation_modules.__contains__, bits)
    if flows and flows[0].differentiates:
        for c in found:
            c.leave("the model takes gradients in its forward pass, and they are part of its result")
    for c in found:
        wanted = norms if c.kind == "norm" else activations
        if c.action != "left" and (wanted == "keep" or excluded(c.name)):
            c.leave(f"{c.kind}s are kept" if wanted == "keep" else "it is excluded")
    if finder is not None:
        settle(found, finder, excluded)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda c: order[c.name]), flows[0] if flows else None


def _activation_candidate(
    name: str, module: nn.Module, form: ActivationForm, finder: Finder | None, bits: int
) -> Candidate:
    problem = ways_of_its_own(module)
    if problem is not None:
        c = Candidate(name, "activation", form)
        c.leave(problem)
        return c
    return plan_activation(finder, name, module, form, bits)


def _norm_candidate(name: str, module: nn.Module, form: NormForm, finder: Finder | None) -> Candidate:
    problem = ways_of_its_own(module)
    if problem is None and finder is None:
        problem = "without example_inputs its consumers are not known"
    if problem is not None or finder is None:
        c = Candidate(name, "norm", form)
        c.leave(problem or "")
        return c
    return plan_norm(finder, name, form)


class _Outputs:
    """What a model returns, before and after."""

    def __init__(self, model: nn.Module, inputs: Inputs | None) -> None:
        assert inputs is not None
        self._model, self._inputs = model, inputs
        self._dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self._first = self._run()
        again = self._run()
        #: Whether the model computes the same each time.
        self.repeatable = all(_same(a, b) for a, b in zip(self._first, again, strict=True))

    def _run(self) -> list[Tensor]:
        outputs = []
        for training in _modes(self._model):
            # With gradients in training: that is when converted modules do something else.
            with untouched(self._model, training, self._inputs), torch.set_grad_enabled(training):
                torch.manual_seed(0)  # the same dropout each time; put back afterwards
                leaves = tree_leaves(self._inputs.call(self._model))
            outputs += [t.detach().clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        return outputs

    def compare(self, tolerance: float | None) -> _Difference:
        """How much the outputs differ now."""
        worst = _Difference(0.0, 0.0 if tolerance is None else tolerance)
        for before, after in zip(self._first, self._run(), strict=True):
            if _same(before, after):
                continue
            # Modules that compute in float32 whatever they are given have no more digits than that; an output has no
            # more than the weights and autocast's dtype, whatever its own.
            low = autocast_dtype(before.device.type) or torch.float32
            dtypes = {before.dtype, torch.float32, *self._dtypes, low}
            allowed = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5 if tolerance is None else tolerance
            difference = _Difference(_relative(before, after), allowed)
            # The first that is too large, else the largest.
            if not worst.excessive and (difference.excessive or difference.largest > worst.largest):
                worst = difference
        return worst


@dataclasses.dataclass(frozen=True)
class _Difference:
    largest: float
    allowed: float

    @property
    def excessive(self) -> bool:
        return not self.largest <= self.allowed


def _relative(before: Tensor, after: Tensor) -> float:
    finite = before.isfinite() & after.isfinite()
    same = torch.equal(before[~finite], after[~finite]) or bool((before.isnan() == after.isnan()).all())
    before, after = before[finite].double(), after[finite].double()
    norm = before.norm().item()
    return (after - before).norm().item() / norm if norm and same else float("inf")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
