"""Whether a module is a layer or RMS norm, on all of its domain."""

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
    """A module that is no norm on ordinary inputs either."""


def _forms(probe: Probe) -> Iterator[NormForm]:
    names = probe.names
    gammas = [(None, False), *((name, plus) for name in names for plus in (False, True))]
    for centred in (False, True):
        for gamma, one_plus in gammas:
            for beta in (None, *(name for name in names if name != gamma)):
                shape, ranks, unknown = probe.shape, (probe.rank,), ResultDtype.INPUT
                yield NormForm(centred, gamma, one_plus, beta, 0.0, shape, probe.axis, ranks, unknown, unknown)


def _ordinarily(probe: Probe) -> NormForm:
    """The form that a module has on ordinary inputs, whatever it does with others; its eps is not felt there."""
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
                problem = _Far("its result is no layer norm or RMS norm of its input")
        if isinstance(problem, _Far):
            break
    raise _Far(problem.reason if problem is not None else "")


def _check_attributes(probe: Probe, form: NormForm) -> None:
    # What has no effect now may have one later.
    for name in own_tensors(probe.module):
        if name not in (form.gamma, form.beta):
            raise Refused(f"its tensor {name} is no weight or bias of a norm")
    attribute = tensor_attribute(probe.module)
    if attribute is not None:
        raise Refused(f"its attribute {attribute} is a tensor, and neither parameter nor buffer")


def _first_runs(probe: Probe, form: NormForm) -> dict[Setting, torch.dtype]:
    """The dtypes of results, where every run in every setting and mode is made of what norms are made of."""
    # On the module's own device: autocast's rules are others on each.
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
                break  # torch's own norms refuse some mixes
            if result.written:
                raise Refused("it writes to its input")
            op = unexplained(result.ops, NORM_OPS)
            if op is not None:
                raise Refused(f"it also computes {op}, which is no part of {form.what}")
            if result.foreign:
                raise Refused("it computes with a tensor that requires grad and is none of its own")
            if dtypes.setdefault(setting, result.value.dtype) != result.value.dtype:
                raise Refused("the dtype of its result is not the same in training and evaluation mode")
    return dtypes


def _estimated_eps(probe: Probe, form: NormForm) -> float:
    # out = n * sqrt(v / (v + eps)) of inputs so small that eps is felt.
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
    # Each row has a square mean of its own; solve for the eps with which all are met best, from a good start.
    eps = square.mean().item() * (1 / felt.item() ** 2 - 1)
    for _ in range(60):
        ratio = (square / (square + eps)).sqrt()
        model = ((ratio * normalized) * normalized).sum() / normalized.square().sum()
        slope = -(0.5 * ratio / (square + eps) * normalized.square()).sum() / normalized.square().sum()
        eps = max(eps - ((model - felt) / slope).item(), eps / 4)
    return eps


def _numbers(module: nn.Module) -> dict[str, float]:
    """Attributes of a module and of its classes that are numbers."""
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
    """Whether another value of an attribute is another eps."""
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
                problem = problem or Refused(f"it treats {size} inputs as no layer norm or RMS norm does")
                break
        else:
            refused = _sweep(probe, candidate, seen)
            if refused is None:
                return candidate
            problem = refused
    raise problem or Refused("")


def _sweep(probe: Probe, form: NormForm, seen: Mapping[Setting, torch.dtype]) -> Refused | None:
    """Compares with the form over all inputs and over all weights, in every setting."""
    for index, setting in enumerate(seen):
        for turn, (training, grad) in enumerate(MODES[:2] if probe.large else MODES):
            # So that each is tried in each mode, in some of the settings.
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
                break  # a mix of dtypes that the module's own device takes, and the CPU does not
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
    """Of what it is something else, in words."""
    if not wide:
        return f"of weights that are negative, 0, tiny or huge it computes something else than {form.what}"
    rows = x.flatten(1)[wrong.flatten(1).any(1)] if x.dim() > 1 else x[None]
    finite = rows[rows.isfinite().all(1)]
    if not len(finite):
        return f"it treats infinities or NaN as {form.what} does not"
    return f"of inputs of the size {finite[0].abs().amax().item():.0e} it computes something else than {form.what}"


def _check_numbers(probe: Probe, form: NormForm) -> None:
    """A number that is not eps may be a factor of 1 today: it must be of no effect."""
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
            raise Refused(f"its attribute {name} is not known to be of a norm")


def _check_gradient(probe: Probe, form: NormForm) -> None:
    """Compares gradients of inputs and weights, of upstream gradients of several sizes, and of NaN."""
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
    # What is subtracted from an input's gradient may leave nearly nothing of it: all, of two elements.
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
    """How the result's dtype follows from those of input and weight."""
    # Of float64 too, if nothing is cast.
    relevant = {s: d for s, d in seen.items() if s.autocast == autocast and s.input != F64}
    for where, rule in _RULES.items():
        possible = relevant and (autocast or where is not ResultDtype.AUTOCAST)
        if possible and all(rule(s) == d for s, d in relevant.items()):
            return where
    raise Refused("the dtype of its result follows no known rule")


def _recognized(probe: Probe, form: NormForm) -> NormForm:
    """The form with all that belongs to it, of a module that has it on ordinary inputs."""
    if probe.scripted:
        raise Refused("it is a TorchScript module")
    _check_attributes(probe, form)
    seen = _first_runs(probe, form)
    if probe.axis == 1 and probe.run(probe.ordinary(), probe.scaled(1.0)).value.is_contiguous():
        raise Refused("its result lies in memory channels first, that of lomem's norm would lie channels last")
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
    """Whether it is a norm over all but the first dimension, with a weight a channel, as ``GroupNorm(1, channels)``."""
    values, x = probe.ordinary(), probe.scaled(1e3)
    normalized = torch.nn.functional.layer_norm(x, x.shape[1:], eps=0.0)
    try:
        result = probe.run(values, x).value.double()
    except Refused:
        return False
    if not probe.names:
        return close(result, normalized, FLOAT32)
    # Linear in each sample's normalized values, with the same factor and offset for all samples of a channel.
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
    """The dimensions over which a module may normalize."""
    tensors = own_tensors(module).values()
    shapes = list(dict.fromkeys(tuple(t.shape) for t in tensors if t.is_floating_point() and t.dim() > 0))
    named = getattr(module, "normalized_shape", None)
    if not shapes:
        if isinstance(named, Sequence) and not isinstance(named, str):
            return tuple(named)
        if input_shapes and len(input_shapes[0]) > 0 and input_shapes[0][-1] > 1:
            return (input_shapes[0][-1],)
        raise Refused("nothing says over how many elements it normalizes")
    shape = max(shapes, key=math.prod)
    # Gains, gates and masks may be there beside weight and bias. Matrices may not, of which running would take long.
    small = sum(math.prod(s) == math.prod(shape) for s in shapes) == 1 and len(tensors) <= 8
    if not small or any(not t.is_floating_point() and t.numel() > 1 for t in tensors):
        raise Refused("its parameters are not those of a norm")
    if math.prod(shape) < 2:
        raise Refused("it normalizes single elements")
    if not input_shapes and len(shape) > 1 and tuple(named or ()) != shape:
        raise Refused("nothing says over how many elements it normalizes")
    return shape


def _check_kind(module: nn.Module) -> None:
    """Refuses what need not be run."""
    if uninitialized(module):
        raise Refused("its parameters are not initialized yet")
    if next(module.children(), None) is not None:
        raise Refused("it has submodules")
    if isinstance(module, nn.Linear | nn.Embedding | _ConvNd):
        raise Refused("its parameters are not those of a norm")  # and may be large
    if isinstance(module, _NormBase):
        raise Refused(f"it is {'a batch' if isinstance(module, _BatchNorm) else 'an instance'} norm")


def recognize_norm(module: nn.Module, input_shapes: Sequence[Sequence[int]] = ()) -> NormForm | NotRecognized:
    """What norm a module is, or why it is none.

    It is one where two witnesses agree: its values and gradients over the whole range of inputs and weights, in every
    dtype and mode, and the ops that it is made of. Nothing is raised, whatever the module does.

    Args:
        module: The module.
        input_shapes: Of inputs that it was seen with.
    """
    try:
        _check_kind(module)
        shape = _shape(module, input_shapes)
    except Refused as error:
        return NotRecognized(error.reason, near=False, kind=Kind.NORM)
    except Exception as error:  # a module that is like no other
        return _not_run(error)
    try:
        with quietly() as generator:
            return _recognize(module, shape, input_shapes, generator)
    except Exception as error:  # a module that is like no other
        return _not_run(error)


def _not_run(error: Exception) -> NotRecognized:
    return NotRecognized(f"it cannot be run by itself ({type(error).__name__})", near=False, kind=Kind.NORM)


def _recognize(
    module: nn.Module, shape: tuple[int, ...], input_shapes: Sequence[Sequence[int]], generator: torch.Generator
) -> NormForm | NotRecognized:
    ranks = sorted({len(s) for s in input_shapes}) or [len(shape) + 1]
    axes = [axis for axis in (-1, 1) if all(_fits(shape, axis, s) for s in input_shapes)]
    reason = "its parameters have another shape than those of a norm of its input"
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
            reason = "it computes other things of inputs with other numbers of dimensions"
            return NotRecognized(reason, near=True, kind=Kind.NORM)
        return replace(forms[0], ranks=tuple(form.ranks[0] for form in forms))
    rank = max(ranks)
    if 1 in axes or (input_shapes and len(input_shapes[0]) > 2 and not own_tensors(module)):
        width = shape if 1 in axes else (input_shapes[0][1],)
        if _normalizes_samples(Probe(module, width, 1, max(rank, 3), generator)):
            return replace(refused, reason="it normalizes channels and positions together", near=True)
    return refused
