"""Inputs and weights for testing whether a module is a norm, and the expected results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forms import NormForm
from .witness import Refused, Run, own_tensors, run

__all__ = [
    "BF16",
    "CPU",
    "F16",
    "F32",
    "F64",
    "FLOAT32",
    "SETTINGS",
    "Probe",
    "Setting",
    "close",
    "lost_samples",
    "rows_of_all_sizes",
    "statistics",
    "wrong_elements",
]

CPU = torch.device("cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

#: Relative error of a norm computed in float32, against float64: a few roundings, and sums of thousands of elements.
FLOAT32 = 1e-5
#: Error, in eps, of a norm computed in 16 bits throughout: a handful of roundings of half an eps each.
_ROUNDINGS = 8


@dataclass(frozen=True)
class Setting:
    """The dtypes that a module is run in.

    Attributes:
        weight: Dtype of its weights.
        input: Dtype of its input.
        autocast: Whether bfloat16 autocast is on.
    """

    weight: torch.dtype
    input: torch.dtype
    autocast: bool = False

    @property
    def dtypes(self) -> set[torch.dtype]:
        """All dtypes in which something is computed."""
        return {self.weight, self.input, *({BF16} if self.autocast else ())}

    def relative(self, result: torch.dtype) -> float:
        """Allowed relative rounding error."""
        return max(FLOAT32, *(_ROUNDINGS * torch.finfo(d).eps for d in {*self.dtypes, result} if d.itemsize == 2), 0)

    def smallest(self, result: torch.dtype) -> float:
        """Magnitude below which some step may round to 0."""
        return max(torch.finfo(d).tiny * torch.finfo(d).eps for d in {*self.dtypes, result, F32})

    def eps(self, form: NormForm) -> float:
        """The eps that a norm uses in this setting."""
        if form.eps is not None:
            return form.eps
        return torch.finfo(F64 if self.input == F64 else F32).eps


#: The settings tried. torch's own norms reject some of them.
SETTINGS = (
    *(Setting(dtype, dtype) for dtype in (F64, F32, BF16, F16)),
    Setting(F32, BF16),
    Setting(F32, F16),
    Setting(BF16, F32),
    *(Setting(w, x, autocast=True) for w in (F32, BF16) for x in (F32, BF16)),
)

#: Scales of inputs, as powers of 10. Rounding errors at the smallest and largest are ignored if the module's own
#: intermediate results lose digits.
_SCALES = {
    F64: (-100, -30, -18, -12, -9, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9, 12, 18, 30, 100),
    F32: (-30, -18, -12, -9, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 18, 30),
    F16: (-5, -4, -3, -2, -1, 0, 1, 2, 3, 4),
}
_SCALES[BF16] = _SCALES[F32]

#: Weights and biases: both signs, zeros, and magnitudes over the whole range of a dtype.
_WEIGHTS = (-2.0, 0.0, -0.0, -0.5, 0.05, 5.0, 100.0, -1.0, -1e4, 1e4, 1e-6, -1e-6, 1e-30, -1e-30, 1e30, -1e30, -3.0)


def statistics(x: Tensor, dims: tuple[int, ...], centred: bool) -> tuple[Tensor, Tensor]:
    """The input minus its mean, and the mean square of the result. For an RMS norm the mean is not subtracted."""
    centre = x.mean(dims, keepdim=True) if centred else torch.zeros((), dtype=x.dtype)
    return x - centre, (x - centre).square().mean(dims, keepdim=True)


def _uniform(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, dtype=F64)


class Probe:
    """Runs one module as a norm over some dimensions, with parameters drawn at random.

    Args:
        module: The module.
        shape: Shape of the normalized dimensions.
        axis: The axis, as in :class:`NormForm`.
        rank: Number of dimensions of inputs.
        generator: Random number generator.
    """

    def __init__(
        self, module: nn.Module, shape: tuple[int, ...], axis: int, rank: int, generator: torch.Generator
    ) -> None:
        self.module, self.shape, self.axis, self.rank, self.generator = module, shape, axis, rank, generator
        self.dims = tuple(range(-len(shape), 0)) if axis == -1 else (1,)
        self.scripted = isinstance(module, torch.jit.ScriptModule)
        self.names = [
            name
            for name, tensor in own_tensors(module).items()
            if tensor.numel() == math.prod(shape) and tensor.is_floating_point()
        ]
        self.setting = SETTINGS[0]

    def ordinary(self) -> dict[str, Tensor]:
        """Distinct weights away from 0 and 1, so that their effects can be told apart."""
        tensors = own_tensors(self.module)
        if self.scripted:
            return {name: tensors[name].detach().double() for name in self.names}
        return {name: 1.5 + _uniform(self.generator, tensors[name].shape) for name in self.names}

    def signed(self) -> dict[str, Tensor]:
        """Ordinary weights with random signs."""
        values = self.ordinary()
        return {name: v * (_uniform(self.generator, v.shape) - 0.5).sign() for name, v in values.items()}

    def extreme(self, setting: Setting) -> dict[str, Tensor]:
        """Weights with a channel of every kind in ``_WEIGHTS``."""
        largest = torch.finfo(setting.weight).max
        choices = torch.tensor([w for w in _WEIGHTS if abs(w) < largest], dtype=F64)
        values = {}
        for name, value in self.ordinary().items():
            drawn = choices[torch.randint(len(choices), value.shape, generator=self.generator)]
            values[name] = drawn * (1 - 0.5 * _uniform(self.generator, value.shape))
        return values

    def input(self, rows: Tensor) -> Tensor:
        """An input with one sample per scale in ``rows``."""
        sizes = (2, 3, 2, 3, 2)
        if self.axis == 1:
            shape = (len(rows), *self.shape, *sizes[: self.rank - 2])
        elif self.rank == len(self.shape):
            shape = self.shape
        else:
            shape = (len(rows), *sizes[: self.rank - len(self.shape) - 1], *self.shape)
        x = torch.randn(shape, generator=self.generator, dtype=F64) + 0.7
        return x * (rows.reshape(-1, *[1] * (self.rank - 1)) if self.rank > len(self.shape) else rows)

    @property
    def single(self) -> bool:
        """Whether an input is a single sample."""
        return self.axis == -1 and self.rank == len(self.shape)

    def scaled(self, scale: float) -> Tensor:
        """An ordinary input of a given scale."""
        return self.input(torch.full((1 if self.single or self.large else 3,), scale, dtype=F64))

    @property
    def large(self) -> bool:
        """Whether even a few samples take long."""
        return math.prod(self.shape) > 2**14

    def run(
        self,
        values: Mapping[str, Tensor],
        x: Tensor,
        setting: Setting | None = None,
        device: torch.device = CPU,
        **options: Any,
    ) -> Run:
        """Runs the module in the dtypes of a setting."""
        setting = setting or self.setting
        values = {name: value.to(device, setting.weight) for name, value in values.items()}
        with torch.autocast(device.type, BF16, enabled=setting.autocast, cache_enabled=False):
            # No cache: it would hold on to casts of the probe's weights.
            result = run(self.module, values, x.to(device, setting.input), **options)
        if result.value.shape != x.shape:
            raise Refused("its result does not have the shape of its input")
        return result

    def fit(self, values: Tensor) -> Tensor:
        """Weights in the shape in which they multiply an input."""
        return values.reshape(self.shape if self.axis == -1 else (*self.shape, *[1] * (self.rank - 2)))

    def affine(self, form: NormForm, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gamma and beta."""
        gamma = torch.ones((), dtype=F64) if form.gamma is None else self.fit(values[form.gamma]) + form.one_plus
        beta = torch.zeros((), dtype=F64) if form.beta is None else self.fit(values[form.beta])
        return gamma, beta

    def expected(self, form: NormForm, values: Mapping[str, Tensor], x: Tensor, eps: float) -> Tensor:
        """The norm's result, in float64."""
        x, square = statistics(x, self.dims, form.centred)
        gamma, beta = self.affine(form, values)
        return x * (square + eps).rsqrt() * gamma + beta


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    """Whether a result is finite and close to an expected one, relative to the norm of the latter."""
    return bool(torch.isfinite(a).all()) and (a.double() - b).norm().item() <= relative * b.norm().item()


def rows_of_all_sizes(probe: Probe, form: NormForm, dtype: torch.dtype, offset: int) -> Tensor:
    """Samples over the whole range of a dtype: scales, constants, zeros, infinities and NaN."""
    # For large norms, only some of them at a time.
    room = max(6, 2**15 // math.prod(probe.shape))
    scales = [10.0**exponent for exponent in _SCALES[dtype]]
    if probe.single:
        return probe.input(torch.tensor([scales[offset % len(scales)]], dtype=F64))
    step = -(-len(scales) // room)
    scales = scales[offset % step :: step]
    x = probe.input(torch.tensor(scales, dtype=F64))
    x[1::4] = -x[1::4]
    special = torch.zeros((7, *x.shape[1:]), dtype=F64)
    # Powers of 2: their mean is exact in every order of summation, so the centred values are exactly 0.
    for i, value in enumerate((1.0, -0.25)):
        # Without eps, this would be 0 / 0.
        special[i] = value if form.eps != 0.0 else x[0]
    special[2] = 0.0 if form.eps != 0.0 else x[0]
    for i, value in enumerate((math.inf, -math.inf, math.nan)):
        special[3 + i] = x[0].sign()
        special[3 + i].flatten()[-1] = value
    special[6] = x[len(scales) // 2].sign()
    special[6].flatten()[0] = 100.0  # an outlier
    return torch.cat([x, special])


def wrong_elements(
    probe: Probe, form: NormForm, setting: Setting, values: Mapping[str, Tensor], x: Tensor, result: Tensor
) -> Tensor:
    """Which elements of a result differ from the form's.

    Elements that are infinite or NaN but finite in the form do not count: there the form is better.
    """
    eps, relative = setting.eps(form), setting.relative(result.dtype)
    expected = probe.expected(form, values, x, eps)
    centred, square = statistics(x, probe.dims, form.centred)
    rstd = (square + eps).rsqrt()
    gamma, beta = probe.affine(form, values)
    parts = (gamma - 1).abs() + 1 if form.one_plus else gamma.abs()  # `y + y * weight` cancels
    # The input is rounded before its mean is subtracted.
    normalized = (centred.abs() + (x.abs().amax(probe.dims, keepdim=True) if form.centred else 0)) * rstd
    if form.centred:
        # If the variance is the mean of squares minus the square of the mean, both are rounded, and little or nothing
        # may remain.
        ratio = torch.where(square > 0, (x.mean(probe.dims, keepdim=True) * rstd).square(), 0.0)
        normalized = normalized * (1 + torch.where(relative * ratio < 0.25, ratio, math.inf))
    smallest = setting.smallest(result.dtype)
    allowed = relative * (normalized * parts + beta.abs()) + _ROUNDINGS * smallest * (1 + parts + normalized)
    wide = result.double()
    wrong = (wide - expected).abs() > allowed
    largest = min(torch.finfo(d).max for d in {*setting.dtypes, result.dtype})
    finite = wide.isfinite()
    wrong = torch.where(expected.isnan(), finite, wrong & finite)
    over = expected.abs() > 0.9 * largest
    return torch.where(over & ~expected.isnan(), finite & (expected.abs() > 1.1 * torch.finfo(result.dtype).max), wrong)


def lost_samples(results: Sequence[Tensor], x: Tensor) -> Tensor:
    """Samples for which the module's own intermediate results, such as squares, overflow or underflow."""
    if x.dim() == 0:
        return torch.zeros((), dtype=torch.bool)
    flat = x.flatten(1) if x.dim() > 1 else x[None]
    varied = (flat != flat[:, :1]).any(1)
    lost = torch.zeros(len(flat), dtype=torch.bool)
    for result in results:
        if x.dim() < 2 or result.numel() == 0 or result.dim() == 0 or result.shape[0] % len(x):
            broken, size = (~result.isfinite()).any(), result.abs().amax() if result.numel() else torch.tensor(1.0)
            lost |= broken | (x.dim() < 2 and bool(size < 64 * torch.finfo(result.dtype).tiny))
            continue
        rows = result.reshape(len(x), -1)
        # Of a sample of several rows, one alone may overflow: its variance is then infinite, and 1 / std 0.
        # (With one number per row, no dimension is left to take the largest of.)
        sizes = result.abs() if result.dim() == 1 else result.abs().amax(-1)
        size = sizes.reshape(len(x), -1).amin(1)
        lost |= ~rows.isfinite().all(1) | (varied & (size < 64 * torch.finfo(result.dtype).tiny))
    finite = flat.isfinite().all(1)
    return (lost & finite).reshape(-1, *[1] * (x.dim() - 1)) if x.dim() > 1 else lost & finite
