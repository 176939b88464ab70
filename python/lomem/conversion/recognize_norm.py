"""Recognizes modules that compute a layer or RMS norm, on their whole domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from .forms import NormForm, NotRecognized
from .kinds import Kind, ResultDtype
from .norm_probe import (
    BF16,
    CPU,
    F16,
    F32,
    F64,
    FLOAT32,
    SETTINGS,
    Probe,
    Setting,
    close,
    lost_samples,
    rows_of_all_sizes,
    statistics,
    wrong_elements,
)
from .witness import (
    MODES,
    NORM_OPS,
    Refused,
    attributes,
    gradients,
    own_tensors,
    quietly,
    tensor_attribute,
    unexplained,
    uninitialized,
)

__all__ = ["recognize_norm"]


class _Far(Refused):
    """The module is not a norm on ordinary inputs either."""


def _forms(probe: Probe) -> Iterator[NormForm]:
    names = probe.names
    gammas = [(None, False), *((name, plus) for name in names for plus in (False, True))]
    for centred in (False, True):
        for gamma, one_plus in gammas:
            for beta in (None, *(name for name in names if name != gamma)):
                shape, ranks, unknown = probe.shape, (probe.rank,), ResultDtype.INPUT
                yield NormForm(centred, gamma, one_plus, beta, 0.0, shape, probe.axis, ranks, unknown, unknown)


def _ordinarily(probe: Probe) -> NormForm:
    """The form that a module has on ordinary inputs, where eps has no effect, whatever it does with others."""
    own = next((t.dtype for t in own_tensors(probe.module).values() if t.is_floating_point()), F32)
    settings = [SETTINGS[0], SETTINGS[1], Setting(own, own)]
    problem: Refused | None = None
    for setting in settings if not probe.scripted else settings[2:]:
        for training in (False, True):
            for scale in (1e3, 10.0):
                probe.setting = setting
                values, x = probe.ordinary(), probe.scaled(scale)
                try:
                    result = probe.run(values, x, training=training).value
                except Refused as error:
                    problem = problem or error
                    continue
                relative = setting.relative(result.dtype)
                for form in _forms(probe):
                    if close(result, probe.expected(form, values, x, 0.0), relative):
                        return form
                problem = _Far("its result is not a layer norm or RMS norm of its input")
        if isinstance(problem, _Far):
            break
    raise _Far(problem.reason if problem is not None else "")


def _check_attributes(probe: Probe, form: NormForm) -> None:
    # Tensors without an effect now may have one later.
    for name in own_tensors(probe.module):
        if name not in (form.gamma, form.beta):
            raise Refused(f"its tensor {name} is not a weight or bias of a norm")
    attribute = tensor_attribute(probe.module)
    if attribute is not None:
        raise Refused(f"its attribute {attribute} is a tensor but neither a parameter nor a buffer")


def _first_runs(probe: Probe, form: NormForm) -> dict[Setting, torch.dtype]:
    """The dtype of the result in each setting. Refuses modules that, in any setting or mode, run ops norms do not."""
    # On the module's own device, since autocast's rules depend on it.
    tensors = own_tensors(probe.module).values()
    device = next((t.device for t in tensors if t.is_cuda and torch.cuda.is_available()), CPU)
    dtypes: dict[Setting, torch.dtype] = {}
    for setting in SETTINGS:
        values, x = probe.signed(), probe.scaled(1.0)
        for training, grad in MODES:
            try:
                result = probe.run(values, x, setting, device, training=training, grad=grad)
            except Refused:
                if setting in dtypes:
                    raise
                break  # torch's own norms reject some mixes of dtypes
            if result.written:
                raise Refused("it writes to its input")
            op = unexplained(result.ops, NORM_OPS)
            if op is not None:
                raise Refused(f"it also computes {op}, which is not part of {form.what}")
            if result.foreign:
                raise Refused("it uses a tensor that requires grad and is not one of its own")
            if dtypes.setdefault(setting, result.value.dtype) != result.value.dtype:
                raise Refused("the dtype of its result differs between training and evaluation mode")
    return dtypes


def _estimated_eps(probe: Probe, form: NormForm) -> float:
    # out = n * sqrt(v / (v + eps)), for inputs so small that eps has an effect.
    values = probe.ordinary()
    gamma, beta = probe.affine(form, values)
    low = torch.finfo(probe.setting.input).tiny
    for exponent in range(1, 24):
        if 10.0 ** (-2 * exponent) < 1e3 * low:
            return 0.0
        x = probe.scaled(10.0**-exponent).to(probe.setting.input).double()
        centred, square = statistics(x, probe.dims, form.centred)
        normalized = centred * square.rsqrt()
        result = probe.run(values, x).value.double()
        felt = (((result - beta) / gamma) * normalized).sum() / normalized.square().sum()
        if felt.item() < 0.9:
            break
    else:
        return 0.0
    # The mean square differs from row to row: solve for the eps that fits all best, from a good start.
    eps = square.mean().item() * (1 / felt.item() ** 2 - 1)
    for _ in range(60):
        ratio = (square / (square + eps)).sqrt()
        model = ((ratio * normalized) * normalized).sum() / normalized.square().sum()
        slope = -(0.5 * ratio / (square + eps) * normalized.square()).sum() / normalized.square().sum()
        eps = max(eps - ((model - felt) / slope).item(), eps / 4)
    return eps


def _numbers(module: nn.Module) -> dict[str, float]:
    """Numeric attributes of a module and its classes."""
    found: dict[str, Any] = {}
    for cls in reversed(type(module).__mro__):
        if cls not in nn.Module.__mro__:
            found.update(vars(cls))
    found.update(attributes(module))
    return {name: v for name, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _candidates_of_eps(probe: Probe, form: NormForm) -> Iterator[NormForm]:
    eps = _estimated_eps(probe, form)
    numbers = _numbers(probe.module)
    named = [name for name, v in numbers.items() if math.isclose(v, eps, rel_tol=1e-2) or v == eps]
    live = [name for name in named if _is_eps(probe, form, name)]
    for name in live + [name for name in named if name not in live]:
        yield replace(form, eps=float(numbers[name]), eps_name=name if name in live else None)
    if not form.centred and math.isclose(eps, torch.finfo(probe.setting.input).eps, rel_tol=1e-2):
        absent = [name for name, value in attributes(probe.module).items() if value is None]
        yield replace(form, eps=None, eps_name=next((name for name in absent if _is_eps(probe, form, name)), None))
    for dtype in (F32, BF16, F16, F64):
        if math.isclose(eps, torch.finfo(dtype).eps, rel_tol=1e-2):
            yield replace(form, eps=torch.finfo(dtype).eps)
    for digits in (2, 4):
        yield replace(form, eps=float(f"{eps:.{digits}g}"))


def _is_eps(probe: Probe, form: NormForm, name: str) -> bool:
    """Whether changing an attribute changes eps accordingly."""
    values, x, eps = probe.ordinary(), probe.scaled(0.5), 0.375
    try:
        result = probe.run(values, x, changed={name: eps}).value
    except Refused:
        return False
    return close(result, probe.expected(form, values, x, eps), 3 * probe.setting.relative(result.dtype))


def _with_eps(probe: Probe, form: NormForm, seen: Mapping[Setting, torch.dtype]) -> NormForm:
    problem: Refused | None = None
    for candidate in _candidates_of_eps(probe, form):
        scales = (30.0, 1.0, math.sqrt(candidate.eps) if candidate.eps else 1e-3, 1e-3)
        values = probe.ordinary()
        for scale in scales:
            x = probe.scaled(scale).to(probe.setting.input).double()
            result = probe.run(values, x).value
            expected = probe.expected(candidate, values, x, probe.setting.eps(candidate))
            if not close(result, expected, 3 * probe.setting.relative(result.dtype)):
                size = "small" if scale < 1 else "large"
                problem = problem or Refused(f"its result for {size} inputs is not that of a layer norm or RMS norm")
                break
        else:
            refused = _sweep(probe, candidate, seen)
            if refused is None:
                return candidate
            problem = refused
    raise problem or Refused("")


def _sweep(probe: Probe, form: NormForm, seen: Mapping[Setting, torch.dtype]) -> Refused | None:
    """Compares the module with the form over all inputs and all weights, in every setting."""
    for index, setting in enumerate(seen):
        for turn, (training, grad) in enumerate(MODES[:2] if probe.large else MODES):
            # Alternates, so that inputs and weights are each tried in every mode, in some of the settings.
            wide = (turn + index) % 2 == 1
            values = probe.signed() if wide else probe.extreme(setting)
            x = rows_of_all_sizes(probe, form, setting.input, index + turn) if wide else probe.scaled(1.0)
            values = {name: value.to(setting.weight).double() for name, value in values.items()}
            x = x.to(setting.input).double()
            options: dict[str, Any] = {"training": training, "grad": grad}
            try:
                result = probe.run(values, x, setting, **options)
            except Refused:
                if setting == probe.setting:
                    raise
                break  # a mix of dtypes that the module's own device supports and the CPU does not
            wrong = wrong_elements(probe, form, setting, values, x, result.value)
            if not wrong.any():
                continue
            if wide:
                again = probe.run(values, x, setting, keep=True, **options)
                wrong &= ~lost_samples(again.results, x)
                if not wrong.any():
                    continue
            return Refused(_where(form, x, wrong, wide))
    return None


def _where(form: NormForm, x: Tensor, wrong: Tensor, wide: bool) -> str:
    """Says for which inputs or weights the result is wrong."""
    if not wide:
        return f"for weights that are negative, 0, tiny or huge its result is not that of {form.what}"
    rows = x.flatten(1)[wrong.flatten(1).any(1)] if x.dim() > 1 else x[None]
    finite = rows[rows.isfinite().all(1)]
    if not len(finite):
        return f"for infinities or NaN its result is not that of {form.what}"
    return f"for inputs of magnitude {finite[0].abs().amax().item():.0e} its result is not that of {form.what}"


def _check_numbers(probe: Probe, form: NormForm) -> None:
    """Refuses modules with a number, other than eps, that has an effect: it may be a factor that is 1 for now."""
    for name, value in attributes(probe.module).items():
        if not isinstance(value, float) or value in (form.eps, 0.0):
            continue
        values, x = probe.ordinary(), probe.scaled(0.5)
        expected = probe.run(values, x, training=True).value
        try:
            result = probe.run(values, x, training=True, changed={name: 0.75 * value + 0.125}).value
        except Refused:
            result = torch.full_like(expected, math.nan)
        if not torch.equal(expected, result):
            raise Refused(f"its attribute {name} has an effect that norms do not have")


def _check_gradient(probe: Probe, form: NormForm) -> None:
    """Compares gradients of inputs and weights, for upstream gradients of several sizes, and for NaN."""
    scale = math.sqrt(form.eps) if form.eps else 1e-2
    for training in (False, True):
        x = probe.input(torch.tensor([scale] if probe.single else [1.0, scale, 1e3, 1.0, 1.0], dtype=F64))
        x = x.to(probe.setting.input).double()
        sizes = torch.tensor([1.0] if probe.single else [1.0, 1.0, 1.0, 1e8, 1e-8], dtype=F64)
        weights = probe.input(sizes) - 0.7 * sizes.reshape(-1, *[1] * (x.dim() - 1))
        given = {name: value.to(probe.setting.weight) for name, value in probe.signed().items()}
        values = {name: value.double() for name, value in given.items()}
        grads = gradients(probe.module, given, x.to(probe.setting.input), weights, training)
        if not _is_gradient(probe, form, values, x, weights, grads):
            raise Refused("its gradient is not that of a norm")
        weights[0] = math.nan
        if gradients(probe.module, given, x.to(probe.setting.input), weights, training)[0][0].isfinite().any():
            raise Refused("its gradient hides NaN")


def _is_gradient(
    probe: Probe, form: NormForm, values: Mapping[str, Tensor], x: Tensor, weights: Tensor, grads: Sequence[Tensor]
) -> bool:
    eps, relative = probe.setting.eps(form), 30 * probe.setting.relative(probe.setting.input)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        values = {name: value.clone().requires_grad_() for name, value in values.items()}
        loss = (probe.expected(form, values, leaf, eps) * weights).sum()
        expected = torch.autograd.grad(loss, [leaf, *values.values()])
    # The subtractions in the input's gradient may leave almost nothing of it, and exactly 0 for two elements.
    size = weights * probe.affine(form, values)[0].detach() * (statistics(x, probe.dims, form.centred)[1] + eps).rsqrt()
    samples = zip(*((t[None] if probe.single else t) for t in (grads[0], expected[0], size)), strict=True)
    for got, wanted, before in samples:
        if not (got.double() - wanted).norm().item() <= relative * max(wanted.norm().item(), before.norm().item()):
            return False
    return all(close(g, e, relative) for g, e in zip(grads[1:], expected[1:], strict=True))


_RULES: dict[ResultDtype, Callable[[Setting], torch.dtype]] = {
    ResultDtype.INPUT: lambda s: s.input,
    ResultDtype.WEIGHT: lambda s: s.weight,
    ResultDtype.PROMOTE: lambda s: torch.promote_types(s.input, s.weight),
    ResultDtype.FLOAT32: lambda s: F32,
    ResultDtype.AUTOCAST: lambda s: BF16,
}


def _dtype_rule(seen: Mapping[Setting, torch.dtype], autocast: bool) -> ResultDtype:
    """How the result's dtype follows from the dtypes of input and weight."""
    # float64 is left out: the rule holds there too, if nothing is cast.
    relevant = {s: d for s, d in seen.items() if s.autocast == autocast and s.input != F64}
    for where, rule in _RULES.items():
        possible = relevant and (autocast or where is not ResultDtype.AUTOCAST)
        if possible and all(rule(s) == d for s, d in relevant.items()):
            return where
    raise Refused("the dtype of its result follows no known rule")


def _recognized(probe: Probe, form: NormForm) -> NormForm:
    """The complete form of a module that has it on ordinary inputs; raises ``Refused`` if a check fails."""
    if probe.scripted:
        raise Refused("it is a TorchScript module")
    _check_attributes(probe, form)
    seen = _first_runs(probe, form)
    if probe.axis == 1 and probe.run(probe.ordinary(), probe.scaled(1.0)).value.is_contiguous():
        raise Refused("its result is laid out channels first, while that of lomem's norm would be channels last")
    form = _with_eps(probe, form, seen)
    _check_numbers(probe, form)
    _check_gradient(probe, form)
    return replace(form, dtype=_dtype_rule(seen, autocast=False), autocast_dtype=_dtype_rule(seen, autocast=True))


def _try(probe: Probe) -> NormForm | NotRecognized:
    try:
        form = _ordinarily(probe)
    except _Far as error:
        return NotRecognized(error.reason, near=False, kind=Kind.NORM)
    try:
        return _recognized(probe, form)
    except Refused as error:
        return NotRecognized(error.reason, near=True, kind=Kind.NORM)


def _normalizes_samples(probe: Probe) -> bool:
    """Whether it normalizes all but the first dimension, with a weight per channel, as ``GroupNorm(1, channels)``."""
    values, x = probe.ordinary(), probe.scaled(1e3)
    normalized = torch.nn.functional.layer_norm(x, x.shape[1:], eps=0.0)
    try:
        result = probe.run(values, x).value.double()
    except Refused:
        return False
    if not probe.names:
        return close(result, normalized, FLOAT32)
    # The result must be linear in the normalized values, with one factor and offset per channel for all samples.
    dims = (0, *range(2, x.dim()))
    centre = normalized.mean(dims, keepdim=True)
    slope = ((result - result.mean(dims, keepdim=True)) * (normalized - centre)).sum(dims, keepdim=True)
    slope = slope / (normalized - centre).square().sum(dims, keepdim=True)
    return close(result, (normalized - centre) * slope + result.mean(dims, keepdim=True), FLOAT32)


def _fits(shape: tuple[int, ...], axis: int, input_shape: Sequence[int]) -> bool:
    if axis == -1:
        return tuple(input_shape[-len(shape) :]) == shape
    return len(shape) == 1 and len(input_shape) > 2 and input_shape[1] == shape[0]


def _shape(module: nn.Module, input_shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of the dimensions that a module may normalize over."""
    tensors = own_tensors(module).values()
    shapes = list(dict.fromkeys(tuple(t.shape) for t in tensors if t.is_floating_point() and t.dim() > 0))
    named = getattr(module, "normalized_shape", None)
    if not shapes:
        if isinstance(named, Sequence) and not isinstance(named, str):
            return tuple(named)
        if input_shapes and len(input_shapes[0]) > 0 and input_shapes[0][-1] > 1:
            return (input_shapes[0][-1],)
        raise Refused("the number of elements that it normalizes over is unknown")
    shape = max(shapes, key=math.prod)
    # Gains, gates and masks are allowed beside weight and bias. Matrices are not: running them would take long.
    small = sum(math.prod(s) == math.prod(shape) for s in shapes) == 1 and len(tensors) <= 8
    if not small or any(not t.is_floating_point() and t.numel() > 1 for t in tensors):
        raise Refused("its parameters are not those of a norm")
    if math.prod(shape) < 2:
        raise Refused("it normalizes single elements")
    if not input_shapes and len(shape) > 1 and tuple(named or ()) != shape:
        raise Refused("the number of elements that it normalizes over is unknown")
    return shape


def _check_kind(module: nn.Module) -> None:
    """Refuses modules that need not be run."""
    if uninitialized(module):
        raise Refused("its parameters are not initialized yet")
    if next(module.children(), None) is not None:
        raise Refused("it has submodules")
    if isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
        raise Refused("its parameters are not those of a norm")  # and may be large to run
    if isinstance(module, _NormBase):
        raise Refused(f"it is {'a batch' if isinstance(module, _BatchNorm) else 'an instance'} norm")


def recognize_norm(module: nn.Module, input_shapes: Sequence[Sequence[int]] = ()) -> NormForm | NotRecognized:
    """Recognizes a norm, or says why the module is not one.

    Two kinds of evidence must agree: values and gradients over the whole range of inputs and weights, in every dtype
    and mode, and the ops that the module runs. Never raises, whatever the module does.

    Args:
        module: The module.
        input_shapes: Shapes of inputs that it was called with.
    """
    try:
        _check_kind(module)
        shape = _shape(module, input_shapes)
    except Refused as error:
        return NotRecognized(error.reason, near=False, kind=Kind.NORM)
    except Exception as error:  # an unusual module may raise anything
        return _not_run(error)
    try:
        with quietly() as generator:
            return _recognize(module, shape, input_shapes, generator)
    except Exception as error:  # an unusual module may raise anything
        return _not_run(error)


def _not_run(error: Exception) -> NotRecognized:
    return NotRecognized(f"it cannot be run on its own ({type(error).__name__})", near=False, kind=Kind.NORM)


def _recognize(
    module: nn.Module, shape: tuple[int, ...], input_shapes: Sequence[Sequence[int]], generator: torch.Generator
) -> NormForm | NotRecognized:
    ranks = sorted({len(s) for s in input_shapes}) or [len(shape) + 1]
    axes = [axis for axis in (-1, 1) if all(_fits(shape, axis, s) for s in input_shapes)]
    reason = "its parameters do not have the shape of a norm over its input"
    refused = NotRecognized(reason, near=False, kind=Kind.NORM)
    for axis in axes if len(shape) == 1 else axes[:1]:
        probes = [Probe(module, shape, axis, rank, generator) for rank in ranks if axis == -1 or rank > 2]
        tried = [_try(probe) for probe in probes or [Probe(module, shape, axis, 4, generator)]]
        failed = [form for form in tried if isinstance(form, NotRecognized)]
        forms = [form for form in tried if isinstance(form, NormForm)]
        if failed:
            first = next((f for f in failed if f.near), failed[0])
            near = first.near or bool(forms)
            refused = replace(first, near=True) if near else first if axis == axes[0] else refused
            if near:
                return refused
            continue
        if any(replace(form, ranks=()) != replace(forms[0], ranks=()) for form in forms):
            reason = "what it computes depends on its input's number of dimensions"
            return NotRecognized(reason, near=True, kind=Kind.NORM)
        return replace(forms[0], ranks=tuple(form.ranks[0] for form in forms))
    rank = max(ranks)
    if 1 in axes or (input_shapes and len(input_shapes[0]) > 2 and not own_tensors(module)):
        width = shape if 1 in axes else (input_shapes[0][1],)
        if _normalizes_samples(Probe(module, width, 1, max(rank, 3), generator)):
            return replace(refused, reason="it normalizes channels and positions together", near=True)
    return refused
