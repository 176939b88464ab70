"""What a module computes, found out by running it on made-up inputs: its name and its source do not matter."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .._state import module_state, restore_module

__all__ = [
    "ActivationForm",
    "LinearForm",
    "NormForm",
    "recognize_activation",
    "recognize_linear",
    "recognize_norm",
    "signature",
]


@dataclass(frozen=True)
class NormForm:
    """A layer or RMS norm, ``normalized * gamma + beta``.

    Attributes:
        centred: Layer norm (the mean is subtracted), not RMS norm.
        gamma: Name of the parameter (or buffer) that gamma is made of, None for no gamma.
        one_plus: Whether gamma is 1 + that parameter.
        beta: Name of the parameter that is beta.
        eps: Added to the variance or mean square; None for the machine epsilon of the dtype computed in.
        shape: The normalized dimensions.
        axis: -1: the last dimensions are normalized. 1: the channels of (batch, channels, ...).
        ranks: Numbers of dimensions of inputs of which all this is known.
        dtype: Of the result: "input", "weight" or "promote" (of both).
        autocast_dtype: The same under autocast, or "float32" or "autocast".
        eps_name: Name of the attribute that eps is read from, None where it is a constant.
    """

    centred: bool
    gamma: str | None
    one_plus: bool
    beta: str | None
    eps: float | None
    shape: tuple[int, ...]
    axis: int
    ranks: tuple[int, ...]
    dtype: str
    autocast_dtype: str
    eps_name: str | None = None

    def __str__(self) -> str:
        kind = "layer norm" if self.centred else "RMS norm"
        gamma = [] if self.gamma is None else [f"1 + {self.gamma}" if self.one_plus else self.gamma]
        beta = [] if self.beta is None else [self.beta]
        return f"{kind} ({', '.join(gamma + beta)})" if gamma + beta else kind


@dataclass(frozen=True)
class ActivationForm:
    """GELU, or ``x * sigmoid(scale * x)``.

    Attributes:
        kind: "gelu" or "silu".
        approximate: Of a GELU, "none" or "tanh".
        scale: Of a SiLU: 1, or 1.702 for QuickGELU.
        torch_op: Whether the result is torch's own op's, bit for bit. Else the module's own forward has to run.
        inplace: Whether the result is written to the input.
        scale_name: Name of the attribute that the scale is read from, None where it is a constant.
        approximate_name: The same of ``approximate``.
        inplace_name: The same of ``inplace``.
    """

    kind: str
    approximate: str = "none"
    scale: float = 1.0
    torch_op: bool = True
    inplace: bool = False
    scale_name: str | None = None
    approximate_name: str | None = None
    inplace_name: str | None = None

    def __str__(self) -> str:
        if self.kind == "gelu":
            return "GELU" if self.approximate == "none" else "GELU (tanh)"
        return "SiLU" if self.scale == 1 else f"x * sigmoid({self.scale:.4g} x)"


@dataclass(frozen=True)
class LinearForm:
    """``x @ weight.T + bias``, or without the transpose.

    Attributes:
        weight: Name of the parameter.
        bias: Name of the parameter, None for none.
        transposed: Whether the weight has shape (out, in), as in :class:`torch.nn.Linear`.
    """

    weight: str
    bias: str | None
    transposed: bool


class _Unrecognized(Exception):  # noqa: N818
    pass


@contextlib.contextmanager
def _with_values(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    # Under the module's own names, and without a copy of the module: its parameters may be anything (fake, sharded,
    # subclasses), and it may refer to the whole model. What it changes of itself is set back.
    before = module_state(module)
    try:
        for name, tensor in _own_tensors(module).items():
            table = module._parameters if name in module._parameters else module._buffers
            table[name] = values[name] if name in values else tensor.detach().clone()  # type: ignore[assignment]
        yield
    finally:
        restore_module(module, *before)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _forward(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, bool]:
    """The result, and whether the input was changed; the same in training and in evaluation mode."""
    results = []
    for training in (True, False):
        # `forward`, not the call: hooks are the user's.
        with _with_values(module, values):
            module.training = training
            argument = x.detach().clone()
            try:
                result = module.forward(argument)
            except Exception as error:
                raise _Unrecognized("it does not run on a tensor alone") from error
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise _Unrecognized("its result is no tensor")
        results.append((result, not torch.equal(argument, x)))
    if results[0][1] != results[1][1] or not torch.equal(results[0][0], results[1][0]):
        raise _Unrecognized("its result is not the same each time, or not in training and evaluation mode")
    return results[0]


def _run(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    result, _ = _forward(module, values, x)
    if result.shape != x.shape:
        raise _Unrecognized("its result has another shape than its input")
    return result


def _gradients(module: nn.Module, values: dict[str, Tensor], x: Tensor, weights: Tensor) -> list[Tensor]:
    """Of input and values, of a weighted sum of the result."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        values = {name: value.clone().requires_grad_() for name, value in values.items()}
        try:
            with _with_values(module, values):
                loss = (module.forward(x * 1) * weights).sum()
            return list(torch.autograd.grad(loss, [x, *values.values()]))
        except RuntimeError as error:
            raise _Unrecognized("it has no gradient") from error


@contextlib.contextmanager
def _quietly() -> Iterator[torch.Generator]:
    # Real tensors also where the model is fake, no graph, no autocast, and the global generators left alone.
    with (
        warnings.catch_warnings(),
        unset_fake_temporarily(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        warnings.simplefilter("ignore")  # of mixes of dtypes, which are tried on purpose
        yield torch.Generator().manual_seed(0)


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _statistics(x: Tensor, dims: tuple[int, ...], centred: bool) -> tuple[Tensor, Tensor]:
    centre = x.mean(dims, keepdim=True) if centred else torch.zeros((), dtype=x.dtype)
    return x - centre, (x - centre).square().mean(dims, keepdim=True)


class _NormProbe:
    """Runs one module as a norm over some dimensions, with parameters drawn at random."""

    def __init__(
        self, module: nn.Module, shape: tuple[int, ...], axis: int, rank: int, generator: torch.Generator
    ) -> None:
        self.module, self.shape, self.axis, self.rank, self.generator = module, shape, axis, rank, generator
        self.dims = tuple(range(-len(shape), 0)) if axis == -1 else (1,)
        self.values = {}
        for name, tensor in _own_tensors(module).items():
            if tensor.numel() == math.prod(shape) and tensor.is_floating_point():
                # Away from 0 and from 1, and each another: what becomes of them can be told apart.
                self.values[name] = (1.5 + torch.rand(tensor.shape, generator=generator)).double()

    def input(self, scale: float) -> Tensor:
        sizes = (3, 5, 2, 4, 3, 2)
        if self.axis == 1:
            shape = (2, *self.shape, *sizes[: self.rank - 2])
        else:
            shape = (*sizes[: self.rank - len(self.shape)], *self.shape)
        return (_normal(self.generator, *shape) + 0.7) * scale

    def run(self, x: Tensor) -> Tensor:
        return _run(self.module, self.values, x).double()

    def fit(self, values: Tensor) -> Tensor:
        return values.reshape(self.shape if self.axis == -1 else (*self.shape, *[1] * (self.rank - 2)))

    def affine(self, form: NormForm) -> tuple[Tensor, Tensor]:
        gamma = torch.ones(()).double() if form.gamma is None else self.fit(self.values[form.gamma]) + form.one_plus
        beta = torch.zeros(()).double() if form.beta is None else self.fit(self.values[form.beta])
        return gamma, beta

    def expected(self, form: NormForm, x: Tensor) -> Tensor:
        x, square = _statistics(x, self.dims, form.centred)
        gamma, beta = self.affine(form)
        return x * (square + (form.eps or 0)).rsqrt() * gamma + beta


def _close(a: Tensor, b: Tensor, relative: float) -> bool:
    return bool(torch.isfinite(a).all()) and (a - b).norm().item() <= relative * b.norm().item()


def _norm_forms(probe: _NormProbe, shape: tuple[int, ...], axis: int) -> Iterator[NormForm]:
    names = list(probe.values)
    gammas = [(None, False), *((name, plus) for name in names for plus in (False, True))]
    for centred in (False, True):
        for gamma, one_plus in gammas:
            for beta in (None, *(name for name in names if name != gamma)):
                yield NormForm(centred, gamma, one_plus, beta, 0.0, shape, axis, (probe.rank,), "", "")


def _eps(probe: _NormProbe, form: NormForm) -> float | None:
    # out = n * sqrt(v / (v + eps)) of inputs so small that eps is felt.
    gamma, beta = probe.affine(form)
    for exponent in range(1, 24):
        x = probe.input(10.0**-exponent)
        centred, square = _statistics(x, probe.dims, form.centred)
        normalized = centred * square.rsqrt()
        felt = (((probe.run(x) - beta) / gamma) * normalized).sum() / normalized.square().sum()
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
    if math.isclose(eps, torch.finfo(torch.float64).eps, rel_tol=1e-3):
        return None
    named = [v for v in vars(probe.module).values() if isinstance(v, float) and math.isclose(v, eps, rel_tol=1e-2)]
    return named[0] if named else float(f"{eps:.2g}")


#: Of a norm computed in float32, against float64.
_FLOAT32 = 1e-5


def _dtype_rule(probe: _NormProbe, autocast: bool) -> str:
    """How the result's dtype follows from those of input and weight."""
    # On the module's own device: autocast's rules are others on each.
    device = next(
        (t.device for t in _own_tensors(probe.module).values() if t.is_cuda and torch.cuda.is_available()),
        torch.device("cpu"),
    )
    seen = []
    for input_dtype in (torch.float32, torch.bfloat16):
        for weight_dtype in (torch.float32, torch.bfloat16):
            values = {name: value.to(device, weight_dtype) for name, value in probe.values.items()}
            # No cache: it would keep what the probe's own weights were cast to.
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
                try:
                    result = _run(probe.module, values, probe.input(1.0).to(device, input_dtype))
                except _Unrecognized:
                    continue  # torch's own norms refuse some mixes
            seen.append((input_dtype, weight_dtype, result.dtype))
    rules = {
        "input": lambda i, w: i,
        "weight": lambda i, w: w,
        "promote": torch.promote_types,
        "float32": lambda i, w: torch.float32,
        "autocast": lambda i, w: torch.bfloat16,
    }
    allowed = list(rules) if autocast else ["input", "weight", "promote", "float32"]
    for name in allowed:
        if seen and all(rules[name](i, w) == result for i, w, result in seen):
            return name
    raise _Unrecognized("the dtype of its result follows no known rule")


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def signature(module: nn.Module) -> Hashable:
    """What modules without submodules have in common that compute the same of the same tensors; unique where unknown.

    The class, and all attributes, where these are plain values.
    """
    attributes = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
    plain = (int, float, str, torch.dtype, torch.device, type(None))
    for value in attributes.values():
        if not isinstance(value, plain) and not (isinstance(value, tuple) and all(isinstance(v, int) for v in value)):
            return id(module)
    tensors = [(n, t.shape, t.dtype, t.device) for n, t in _own_tensors(module).items()]
    return type(module), tuple(attributes.items()), tuple(tensors)


def recognize_norm(module: nn.Module, input_shapes: Sequence[Sequence[int]] = ()) -> NormForm | str:
    """What norm a module is, or why it is none.

    Args:
        module: Without submodules.
        input_shapes: Of inputs that it was seen with.
    """
    if next(module.children(), None) is not None:
        return "it has submodules"
    tensors = _own_tensors(module)
    shapes = list(dict.fromkeys(tuple(t.shape) for t in tensors.values() if t.is_floating_point() and t.dim() > 0))
    named = getattr(module, "normalized_shape", None)
    if not shapes:
        if isinstance(named, Sequence):
            shapes = [tuple(named)]
        elif input_shapes and len(input_shapes[0]) > 0:
            shapes = [(input_shapes[0][-1],)]
        else:
            return "nothing says over how many elements it normalizes"
    if len(shapes) > 1 or len(tensors) > 2:
        return "its parameters are not those of a norm"
    shape = shapes[0]
    if math.prod(shape) < 2:
        return "it normalizes single elements"
    if not input_shapes and len(shape) > 1 and tuple(named or ()) != shape:
        return "nothing says over how many elements it normalizes"
    ranks = sorted({len(s) for s in input_shapes}) or [len(shape) + 1]
    axes = [axis for axis in (-1, 1) if all(_fits(shape, axis, s) for s in input_shapes)]
    reason = "its parameters have another shape than those of a norm of its input"
    with _quietly() as generator:
        for axis in axes if len(shape) == 1 else axes[:1]:
            try:
                forms = [
                    _recognize_norm(_NormProbe(module, shape, axis, rank, generator))
                    for rank in ranks
                    if axis == -1 or rank > 2
                ]
            except _Unrecognized as error:
                if axis == axes[0]:
                    reason = str(error)
                continue
            if not forms:
                forms = [_recognize_norm(_NormProbe(module, shape, axis, 4, generator))]
            if any(replace(form, ranks=()) != replace(forms[0], ranks=()) for form in forms):
                return "it computes other things of inputs with other numbers of dimensions"
            return replace(forms[0], ranks=tuple(form.ranks[0] for form in forms))
    return reason


def _fits(shape: tuple[int, ...], axis: int, input_shape: Sequence[int]) -> bool:
    if axis == -1:
        return tuple(input_shape[-len(shape) :]) == shape
    return len(shape) == 1 and len(input_shape) > 2 and input_shape[1] == shape[0]


def _recognize_norm(probe: _NormProbe) -> NormForm:
    # Large inputs: whatever eps is, it is not felt.
    x = probe.input(1e3)
    result = probe.run(x)
    for form in _norm_forms(probe, probe.shape, probe.axis):
        if _close(result, probe.expected(form, x), _FLOAT32):
            break
    else:
        raise _Unrecognized("its result is no layer norm or RMS norm of its input")
    # What has no effect now may have one later.
    for name in _own_tensors(probe.module):
        if name not in (form.gamma, form.beta):
            raise _Unrecognized(f"its tensor {name} is no weight or bias of a norm")
    if probe.axis == 1 and result.is_contiguous():
        raise _Unrecognized("it makes its result contiguous")
    form = replace(form, eps=_eps(probe, form))
    for name, value in vars(probe.module).items():
        if isinstance(value, float) and value not in (form.eps, 0.0):
            raise _Unrecognized(f"its attribute {name} is not known to be of a norm")
    for scale in (1.0, 30.0, math.sqrt(form.eps) if form.eps else 1e-3):
        x = probe.input(scale)
        if not _close(probe.run(x), probe.expected(form, x), 3 * _FLOAT32):
            raise _Unrecognized("it treats small inputs as no layer norm or RMS norm does")
    _check_norm_gradient(probe, form)
    return replace(form, dtype=_dtype_rule(probe, autocast=False), autocast_dtype=_dtype_rule(probe, autocast=True))


def _check_norm_gradient(probe: _NormProbe, form: NormForm) -> None:
    x, weights = probe.input(1.0), probe.input(1.0)
    values = probe.values
    grads = _gradients(probe.module, values, x, weights)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        probe.values = {name: value.clone().requires_grad_() for name, value in values.items()}
        loss = (probe.expected(form, x) * weights).sum()
        expected = torch.autograd.grad(loss, [x, *probe.values.values()])
        probe.values = values
    if not all(_close(g, e, 30 * _FLOAT32) for g, e in zip(grads, expected, strict=True)):
        raise _Unrecognized("its gradient is not that of a norm")


def recognize_activation(module: nn.Module) -> ActivationForm | None:
    """What activation a module is, or None."""
    if next(module.children(), None) is not None or _own_tensors(module):
        return None
    with _quietly():
        try:
            return _recognize_activation(module)
        except _Unrecognized:
            return None


def _recognize_activation(module: nn.Module) -> ActivationForm | None:
    x = torch.linspace(-40, 40, 8009, dtype=torch.float64).reshape(-1, 1)
    result, inplace = _forward(module, {}, x)
    if result.shape != x.shape:
        return None
    at_one = _run(module, {}, torch.ones(1, dtype=torch.float64)).item()
    functions: dict[ActivationForm, Callable[[Tensor], Tensor]] = {
        ActivationForm("gelu"): F.gelu,
        ActivationForm("gelu", "tanh"): functools.partial(F.gelu, approximate="tanh"),
    }
    if 0 < at_one < 1:
        # Of x * sigmoid(s * x), s by its value at 1.
        scale = round(math.log(at_one / (1 - at_one)), 6)
        functions[ActivationForm("silu", scale=scale)] = lambda x: x * torch.sigmoid(scale * x)
    for form, function in functions.items():
        # Of single precision inside, and of constants that are written with ten digits.
        if not torch.allclose(result.double(), function(x), rtol=1e-6, atol=1e-6):
            continue
        (gradient,) = _gradients(module, {}, x, torch.ones_like(x))
        with torch.enable_grad():
            (expected,) = torch.autograd.grad(function(x.requires_grad_()).sum(), x)
        if not torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5):
            return None
        x = x.detach()
        torch_op = _is_torch_op(module, form)
        return replace(form, torch_op=torch_op, inplace=inplace) if torch_op or not inplace else None
    return None


def _is_torch_op(module: nn.Module, form: ActivationForm) -> bool:
    if form.kind == "silu" and form.scale != 1:
        return False
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.linspace(-40, 40, 8009, dtype=dtype)
        expected = F.silu(x) if form.kind == "silu" else F.gelu(x, approximate=form.approximate)
        result = _run(module, {}, x)
        if result.dtype != dtype or not torch.equal(result, expected):
            return False
    return True


def recognize_linear(module: nn.Module) -> LinearForm | None:
    """What linear layer a module is, or None."""
    if next(module.children(), None) is not None:
        return None
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    matrices = [name for name, p in parameters.items() if p.dim() == 2 and p.is_floating_point()]
    vectors = [name for name, p in parameters.items() if p.dim() == 1 and p.is_floating_point()]
    if len(matrices) != 1 or len(vectors) > 1 or len(parameters) != 1 + len(vectors):
        return None
    weight, bias = matrices[0], vectors[0] if vectors else None
    shape = parameters[weight].shape
    if module._buffers or any(isinstance(value, float) for value in vars(module).values()):
        return None  # a mask, a scale: what they are now need not last
    if type(module).forward is nn.Linear.forward:
        own = (weight, bias) == ("weight", "bias" if bias is not None else None)
        return LinearForm(weight, bias, transposed=True) if own else None
    with _quietly() as generator:
        for transposed in (True, False):
            inner, outer = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
            if bias is not None and len(parameters[bias]) != outer:
                continue
            # A small stand-in first: most modules need not know their sizes.
            for size in ((5, 3), (inner, outer)):
                if _is_linear(module, weight, bias, transposed, size, generator):
                    return LinearForm(weight, bias, transposed)
    return None


def _is_linear(
    module: nn.Module,
    weight: str,
    bias: str | None,
    transposed: bool,
    size: tuple[int, int],
    generator: torch.Generator,
) -> bool:
    inner, outer = size
    values = {weight: _normal(generator, *((outer, inner) if transposed else (inner, outer)))}
    if bias is not None:
        values[bias] = _normal(generator, outer)
    x = _normal(generator, 3, inner)
    expected = F.linear(x, values[weight] if transposed else values[weight].T, values.get(bias or ""))
    try:
        result, changed = _forward(module, values, x)
    except _Unrecognized:
        return False
    return not changed and result.shape == expected.shape and _close(result, expected, 1e-9)
