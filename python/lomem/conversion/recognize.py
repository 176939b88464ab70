"""Finds out what a module computes by running it on synthetic inputs, whatever its name and source code."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import ActivationForm, LinearForm, NormForm, NotRecognized
from .recognize_activation import recognize_activation
from .recognize_norm import recognize_norm
from .witness import (
    LINEAR_OPS,
    MODES,
    Refused,
    Run,
    attributes,
    own_tensors,
    quietly,
    run,
    tensor_attribute,
    unexplained,
    uninitialized,
)

__all__ = [
    "ActivationForm",
    "LinearForm",
    "NormForm",
    "NotRecognized",
    "recognize_activation",
    "recognize_linear",
    "recognize_norm",
    "signature",
]


def signature(module: nn.Module) -> Hashable:
    """A key that is equal for modules that compute the same function, given equal tensors; unique if that is unknown.

    It is made of the class and all attributes, for modules without submodules. Valid while the modules live.
    """
    if uninitialized(module):
        return id(module)
    tensors = [(n, t.shape, t.dtype, t.device) for n, t in own_tensors(module).items()]
    return type(module), tuple((n, _key(value)) for n, value in attributes(module).items()), tuple(tensors)


def _key(value: object) -> Hashable:
    """Compares plain values by equality; others, such as functions, by identity."""
    plain = (int, float, str, torch.dtype, torch.device, type(None))
    if isinstance(value, plain):
        return type(value), value
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return value
    if type(value) is functools.partial:
        return id(value.func), tuple(map(_key, value.args)), tuple((n, _key(v)) for n, v in value.keywords.items())
    return object, id(value)


def recognize_linear(module: nn.Module) -> LinearForm | None:
    """Recognizes a linear layer; None if the module is not one. Never raises, whatever the module does.

    Args:
        module: The module.
    """
    try:
        return _recognize_linear(module)
    except Exception:  # an unusual module may raise anything
        return None


def _recognize_linear(module: nn.Module) -> LinearForm | None:
    if uninitialized(module) or next(module.children(), None) is not None:
        return None
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    matrices = [name for name, p in parameters.items() if p.dim() == 2 and p.is_floating_point()]
    vectors = [name for name, p in parameters.items() if p.dim() == 1 and p.is_floating_point()]
    if len(matrices) != 1 or len(vectors) > 1 or len(parameters) != 1 + len(vectors):
        return None
    weight, bias = matrices[0], vectors[0] if vectors else None
    shape = parameters[weight].shape
    if module._buffers or any(isinstance(value, float) for value in vars(module).values()):
        return None  # a mask or a scale, whose value may change later
    if type(module).forward is nn.Linear.forward:
        own = (weight, bias) == ("weight", "bias" if bias is not None else None)
        return LinearForm(weight, bias, transposed=True) if own else None
    if isinstance(module, torch.jit.ScriptModule) or tensor_attribute(module) is not None:
        return None
    with quietly() as generator:
        for transposed in (True, False):
            inner, outer = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
            if bias is not None and len(parameters[bias]) != outer:
                continue
            form = LinearForm(weight, bias, transposed)
            # A small weight first: most modules do not depend on their sizes.
            if any(_is_linear(module, form, size, generator) for size in ((5, 3), (inner, outer))):
                return form
    return None


#: Relative error of a product in each dtype, against float64, for sums of a few thousand elements.
_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}


def _is_linear(module: nn.Module, form: LinearForm, size: tuple[int, int], generator: torch.Generator) -> bool:
    """Whether a module is a linear layer in every mode, in the first dtype that it accepts, for inputs of all sizes."""
    inner, outer = size
    x = torch.randn(6, inner, generator=generator, dtype=torch.float64)
    x *= torch.tensor([[1.0], [1e-8], [1e8], [-1.0], [0.0], [math.nan]], dtype=torch.float64)
    values = {form.weight: torch.randn(outer, inner, generator=generator, dtype=torch.float64) * 30}
    if form.bias is not None:
        values[form.bias] = torch.randn(outer, generator=generator, dtype=torch.float64)
    expected = F.linear(x, values[form.weight], values.get(form.bias or ""))
    if not form.transposed:
        values[form.weight] = values[form.weight].T.contiguous()
    for dtype, relative in _RELATIVE.items():
        given = {name: value.to(dtype) for name, value in values.items()}
        try:
            runs = [run(module, given, x.to(dtype), training=training, grad=grad) for training, grad in MODES]
        except Refused:
            continue
        return all(_is_product(r, expected, relative) for r in runs)
    return False


def _is_product(r: Run, expected: Tensor, relative: float) -> bool:
    if r.written or r.foreign or unexplained(r.ops, LINEAR_OPS) is not None or r.value.shape != expected.shape:
        return False
    rows = zip(r.value.double(), expected, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=relative * _size(b), equal_nan=True) for a, b in rows)


def _size(row: Tensor) -> float:
    return row.norm().item() if row.isfinite().all() else 0.0
