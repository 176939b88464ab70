"""Recognizes modules that compute GELU or SiLU for all numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import ActivationForm, NotRecognized
from .kinds import Function, Kind
from .witness import (
    ACTIVATION_OPS,
    MODES,
    Refused,
    Run,
    attributes,
    gradients,
    own_tensors,
    quietly,
    run,
    tensor_attribute,
    unexplained,
    uninitialized,
)

__all__ = ["recognize_activation"]

_F64, _F32 = torch.float64, torch.float32
_DTYPES = (_F64, _F32, torch.bfloat16, torch.float16)

#: Allowed error of a result relative to ``x``: that of a factor between 0 and 1 in single precision, with constants
#: written with seven digits.
_FLOAT32 = 2e-6
#: The same in 16 bits, in eps: roundings of that factor and of its intermediate results, half an eps each.
_ROUNDINGS = 4


def _function(form: ActivationForm) -> Callable[[Tensor], Tensor]:
    if form.kind is Function.GELU:
        return functools.partial(F.gelu, approximate=form.approximate)
    return F.silu if form.scale == 1 else lambda x: x * torch.sigmoid(form.scale * x)


def _ordinary(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-40, 40, 8008, dtype=_F64).to(dtype).reshape(-1, 8)


def _everything(dtype: torch.dtype) -> Tensor:
    """All 16-bit numbers, or numbers of all magnitudes."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(-1, 8)
    info = torch.finfo(dtype)
    low, high = math.log2(info.tiny * info.eps), math.log2(info.max) - 1e-9
    sizes = torch.cat([torch.linspace(low, high, 800, dtype=_F64).exp2(), torch.tensor([info.max], dtype=_F64)])
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=_F64)
    middle = torch.linspace(-40, 40, 2001, dtype=_F64)
    return torch.cat([sizes, -sizes, special, middle]).to(dtype).reshape(-1, 8)


def _run(module: nn.Module, x: Tensor, **options: Any) -> Run:
    result = run(module, {}, x, **options)
    if result.value.shape != x.shape:
        raise Refused("its result does not have the shape of its input")
    return result


def _ordinarily(module: nn.Module) -> tuple[ActivationForm, torch.dtype]:
    """The form that a module has on ordinary inputs, and the dtype in which it was found."""
    problem: Refused | None = None
    for dtype in (_F64, _F32):
        for training in (False, True):
            try:
                x = _ordinary(dtype)
                result = _run(module, x, training=training).value.double()
                at_one = _run(module, torch.ones(1, 1, dtype=dtype), training=training).value.item()
            except Refused as error:
                problem = problem or error
                continue
            for form in _forms(at_one):
                expected = _function(form)(x.double())
                # Tolerates single precision inside, and constants written with ten digits.
                if torch.allclose(result, expected, rtol=1e-6, atol=1e-6):
                    return form, dtype
            problem = Refused("its result is not the GELU or SiLU of its input")
    raise problem or Refused("")


def _forms(at_one: float) -> Iterator[ActivationForm]:
    yield ActivationForm(Function.GELU)
    yield ActivationForm(Function.GELU, "tanh")
    if 0 < at_one < 1:
        # The scale s of x * sigmoid(s * x), from its value at 1.
        scale = round(math.log(at_one / (1 - at_one)), 6)
        if abs(scale) > 1e-3:  # otherwise it is x / 2
            yield ActivationForm(Function.SILU, scale=scale)


def _check_runs(module: nn.Module, form: ActivationForm, runs: dict[torch.dtype, list[Run]]) -> ActivationForm:
    every = [r for in_dtype in runs.values() for r in in_dtype]
    for r in every:
        op = unexplained(r.ops, ACTIVATION_OPS)
        if op is not None:
            raise Refused(f"it also computes {op}, which is not part of {form.what}")
        if r.foreign:
            raise Refused("it uses a tensor that requires grad and is not one of its own")
    if len({r.written for r in every}) != 1:
        raise Refused("it writes to its input on some calls only")
    if any(r.value.dtype != in_dtype[0].value.dtype for in_dtype in runs.values() for r in in_dtype):
        raise Refused("the dtype of its result differs between training and evaluation mode")
    return replace(form, inplace=every[0].written)


def _check_values(module: nn.Module, form: ActivationForm, runs: dict[torch.dtype, list[Run]]) -> None:
    for dtype, in_dtype in runs.items():
        x = _everything(dtype)
        expected = _function(form)(x.double())
        for (training, grad), r in zip(MODES, in_dtype, strict=True):
            wrong = _wrong(x.double(), r.value, expected, dtype)
            if wrong.any():
                again = _run(module, x, training=training, grad=grad, keep=True)
                for part in again.results:
                    # If an intermediate result is not finite, the form is better.
                    if part.shape == x.shape:
                        wrong &= part.isfinite() | ~x.isfinite()
            if wrong.any():
                raise Refused(f"for {_spoken(x[wrong])} its result is not that of {form.what}")


def _spoken(values: Tensor) -> str:
    odd = ~values.isfinite()
    return "infinities or NaN" if odd.all() else f"{values[~odd][0].item():.4g}"


def _wrong(x: Tensor, result: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(max(dtype, result.dtype, key=lambda d: torch.finfo(d).eps))
    relative = max(_FLOAT32, _ROUNDINGS * info.eps if info.bits == 16 else 0)
    # What single precision rounds to 0 may be 0 in double precision too.
    allowed = relative * x.abs() + 8 * max(info.tiny * info.eps, torch.finfo(_F32).tiny)
    wide = result.double()
    wrong = wide.isfinite() & ((wide - expected).abs() > allowed)
    # The result must not be finite where the form is infinite or NaN.
    return torch.where(expected.isfinite() & (expected.abs() <= info.max), wrong, wide.isfinite())


def _check_gradient(module: nn.Module, form: ActivationForm, base: torch.dtype) -> None:
    for dtype in dict.fromkeys((base, _F32)):
        x = _everything(dtype)
        # The gradient is linear in the upstream gradient.
        weights = torch.tensor([1.0, -1e6, 1e-6, 3.0], dtype=_F64).repeat(x.numel() // 4).view_as(x)
        for training in (False, True):
            (gradient,) = gradients(module, {}, x, weights, training)
            with torch.enable_grad():
                leaf = x.double().requires_grad_()
                (expected,) = torch.autograd.grad(_function(form)(leaf).sum(), leaf)
            got = gradient.double() / weights
            known = expected.isfinite() & got.isfinite()
            if not torch.allclose(got[known], expected[known], rtol=1e-5, atol=1e-5):
                raise Refused(f"its gradient is not that of {form.what}")
            ordinary = (x.abs() > 1e-3) & (x.abs() < 30)
            if not known[ordinary].all():
                raise Refused(f"its gradient is not that of {form.what}")
            if gradients(module, {}, x, torch.full_like(weights, math.nan), training)[0].isfinite().any():
                raise Refused("its gradient hides NaN")


def _is_torch_op(form: ActivationForm, runs: dict[torch.dtype, list[Run]]) -> bool:
    if (form.kind is Function.SILU and form.scale != 1) or len(runs) < len(_DTYPES):
        return False
    for dtype, in_dtype in runs.items():
        expected = _function(form)(_everything(dtype))
        for r in in_dtype:
            same = (r.value == expected) | (r.value.isnan() & expected.isnan())
            if r.value.dtype != dtype or not same.all():
                return False
    return True


def _follows(module: nn.Module, name: str, value: object, form: ActivationForm, dtype: torch.dtype) -> bool:
    """Whether changing an attribute to a value gives the module a form."""
    x = _ordinary(dtype)
    try:
        result = run(module, {}, x, changed={name: value})
    except Refused:
        return False
    if result.value.shape != x.shape or result.written != form.inplace:
        return False
    return torch.allclose(result.value.double(), _function(form)(x.double()), rtol=1e-6, atol=1e-6)


def _is_near(value: object, scale: float) -> bool:
    """Whether an attribute's value may be the scale."""
    return isinstance(value, int | float) and math.isclose(value, scale, rel_tol=1e-4)


def _with_names(module: nn.Module, form: ActivationForm, dtype: torch.dtype) -> ActivationForm:
    """The form, with the names of attributes that the module reads at each call."""
    for name, value in attributes(module).items():
        if isinstance(value, bool):
            other = replace(form, inplace=not form.inplace)
            # Written only if gradients allow, as torch's own op does.
            if _follows(module, name, not value, other, dtype):
                form = replace(form, inplace_name=name)
        elif form.kind is Function.GELU and value == form.approximate:
            other = replace(form, approximate="tanh" if value == "none" else "none")
            if _follows(module, name, other.approximate, other, dtype):
                form = replace(form, approximate_name=name)
        elif form.kind is Function.SILU and _is_near(value, form.scale):
            other = replace(form, scale=2.375)
            if _follows(module, name, other.scale, other, dtype):
                form = replace(form, scale=float(value), scale_name=name)
    return form


def recognize_activation(module: nn.Module) -> ActivationForm | NotRecognized:
    """Recognizes an activation, or says why the module is not one.

    As for norms, two kinds of evidence must agree: values and gradients over all numbers, and the ops that the module
    runs. Never raises, whatever the module does.

    Args:
        module: The module.
    """
    try:
        reason = _refusal(module)
        if reason is not None:
            return NotRecognized(reason, near=False, kind=Kind.ACTIVATION)
        with quietly():
            return _recognize(module)
    except Exception as error:  # an unusual module may raise anything
        return NotRecognized(f"it cannot be run on its own ({type(error).__name__})", near=False, kind=Kind.ACTIVATION)


def _refusal(module: nn.Module) -> str | None:
    if uninitialized(module):
        return "its parameters are not initialized yet"
    if next(module.children(), None) is not None:
        return "it has submodules"
    if any(tensor.numel() != 1 for tensor in own_tensors(module).values()):
        return "it has parameters"
    return None


def _recognize(module: nn.Module) -> ActivationForm | NotRecognized:
    try:
        form, base = _ordinarily(module)
    except Refused as error:
        return NotRecognized(error.reason, near=False, kind=Kind.ACTIVATION)
    try:
        return _recognized(module, form, base)
    except Refused as error:
        return NotRecognized(error.reason, near=True, kind=Kind.ACTIVATION)


def _recognized(module: nn.Module, form: ActivationForm, base: torch.dtype) -> ActivationForm:
    if isinstance(module, torch.jit.ScriptModule):
        raise Refused("it is a TorchScript module")
    own = next(iter(own_tensors(module)), None)
    if own is not None:
        raise Refused(f"its tensor {own} is not part of {form.what}")
    name = tensor_attribute(module)
    if name is not None:
        raise Refused(f"its attribute {name} is a tensor but neither a parameter nor a buffer")
    runs: dict[torch.dtype, list[Run]] = {}
    for dtype in _DTYPES:
        try:
            runs[dtype] = [_run(module, _everything(dtype), training=t, grad=g) for t, g in MODES]
        except Refused:
            if dtype == base:
                raise
    form = _with_names(module, _check_runs(module, form, runs), base)
    _check_values(module, form, runs)
    _check_gradient(module, form, base)
    form = replace(form, torch_op=form.scale_name is None and _is_torch_op(form, runs))
    if form.inplace and not form.torch_op:
        raise Refused("it writes to its input")
    return form
