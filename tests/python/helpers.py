"""What the tests share: dtypes, inputs in every layout, comparisons."""

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lomem
import torch
import torch.nn.functional as F
from lomem import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]

# Path of a library that replaces the CPU kernels by the CUDA kernels, executed on the CPU.
CUDA_ON_HOST = os.environ.get("LOMEM_CUDA_ON_HOST", "")
if CUDA_ON_HOST:
    # It calls functions of the library that Python has loaded.
    ctypes.CDLL(str(Path(lomem.__file__).with_name("lib") / "liblomem.so"), mode=ctypes.RTLD_GLOBAL)


def _emulator_fault_count():
    """A function of the emulator of a GPU (tests/cpp/cuda/emulator); None if the kernels do not run on it."""
    count = getattr(ctypes.CDLL(CUDA_ON_HOST), "lomem_emulator_fault_count", None) if CUDA_ON_HOST else None
    if count is not None:
        count.restype = ctypes.c_ulonglong
    return count


_fault_count = _emulator_fault_count()
#: Whether the ops run CUDA kernels on the emulator: their exp, erf and tanh are not those of torch's CPU kernels.
EMULATED = _fault_count is not None


def emulator_faults():
    """Number of faults of CUDA kernels so far, if they run on the emulator."""
    return _fault_count() if EMULATED else 0


def runs_cuda_kernels(device):
    """Whether the ops run CUDA kernels there: sums have another order, and double precision a smaller part."""
    return torch.device(device).type == "cuda" or bool(CUDA_ON_HOST)


# Spacing at 1, twice the relative error of one rounding.
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


class Activation(NamedTuple):
    """A step activation, in all its forms."""

    op: Callable
    torch_op: Callable  # what its forward is
    step: lomem.StepFunction
    forward: Callable  # the op that also makes codes
    module: Callable
    reference: Callable


def paper_forward(function):
    """The op that makes values and codes of the published step function."""
    op = torch.ops.lomem.step_activation_forward.default
    return lambda x, fast=False: op(x, function, [], 2, criterion="paper", fast=fast)


ACTIVATIONS = {
    "regelu2": Activation(
        lomem.functional.regelu2,
        F.gelu,
        reference.REGELU2,
        paper_forward("gelu"),
        lomem.nn.ReGELU2,
        reference.regelu2,
    ),
    "regelu2-tanh": Activation(
        partial(lomem.functional.regelu2, approximate="tanh"),
        partial(F.gelu, approximate="tanh"),
        reference.REGELU2,
        paper_forward("gelu_tanh"),
        partial(lomem.nn.ReGELU2, approximate="tanh"),
        partial(reference.regelu2, approximate="tanh"),
    ),
    "resilu2": Activation(
        lomem.functional.resilu2,
        F.silu,
        reference.RESILU2,
        paper_forward("silu"),
        lomem.nn.ReSiLU2,
        reference.resilu2,
    ),
}

# Those that are ops of their own, GELU's and SiLU's.
PUBLISHED = {name: entry for name, entry in ACTIVATIONS.items() if "-" not in name}


class LayerNorm:
    """LayerNorm: the op, torch's, and how many parameters it takes."""

    op = staticmethod(lomem.functional.ms_layer_norm)
    torch_op = staticmethod(F.layer_norm)
    reference = staticmethod(reference.ms_layer_norm)
    parameters = 2


class RMSNorm:
    """RMSNorm. eps is given, since torch's default depends on the dtype."""

    op = staticmethod(lomem.functional.ms_rms_norm)
    torch_op = staticmethod(F.rms_norm)
    reference = staticmethod(reference.ms_rms_norm)
    parameters = 1


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def make_norm_parameters(norm, shape, dtype, device="cpu", conditioned=True):
    """Weights of both signs away from 0; biases of the same size."""
    weight = torch.rand(shape, device=device) + 0.5
    weight = (weight * torch.where(torch.rand(shape, device=device) < 0.3, -1, 1)).to(dtype)
    bias = ((torch.rand(shape, device=device) - 0.5) * (1 if conditioned else 100)).to(dtype)
    return (weight, bias)[: norm.parameters]


# name -> function of (dtype, device) that makes an input of that layout, with values on every step
LAYOUTS = {
    "contiguous": lambda **kw: torch.randn(3, 5, 7, **kw),
    "channels_last": lambda **kw: torch.randn(2, 5, 4, 3, **kw).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda **kw: torch.randn(2, 3, 4, 3, 2, **kw).to(memory_format=torch.channels_last_3d),
    "transposed": lambda **kw: torch.randn(6, 11, **kw).t(),
    "permuted": lambda **kw: torch.randn(3, 4, 5, 2, **kw).permute(2, 0, 3, 1),
    "sliced": lambda **kw: torch.randn(9, 14, **kw)[1::2, 3:11],
    "sliced_transposed": lambda **kw: torch.randn(9, 14, **kw)[1::2, 3:11].t(),
    "strided_1d": lambda **kw: torch.randn(50, **kw)[::3],
    "expanded": lambda **kw: torch.randn(5, 1, 3, **kw).expand(5, 4, 3),
    "expanded_scalar": lambda **kw: torch.randn((), **kw).expand(7),
    "unaligned": lambda **kw: torch.randn(38, **kw)[1:],
    "0-d": lambda **kw: torch.randn((), **kw),
    "one_element": lambda **kw: torch.randn(1, 1, 1, **kw).transpose(0, 2),
    "empty": lambda **kw: torch.randn(3, 0, 2, **kw),
    "empty_1d": lambda **kw: torch.randn(0, **kw),
}


def make_input(layout, dtype, device, scale=4):
    """An input whose values reach all steps. Scaling in place keeps the strides."""
    base = LAYOUTS[layout](dtype=torch.float64, device=device).mul(scale)
    return base.to(dtype)


def all_patterns(dtype, device="cpu"):
    """All 65,536 values of a 16-bit dtype, NaNs and infinities included."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).to(device)


def same_bits(a, b):
    """Same dtype, shape, strides and bits (so that NaN equals NaN, and 0 does not equal -0)."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def in_memory_order(tensor):
    """The elements of a dense tensor, as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def rounding_steps(a, b):
    """Distance of two tensors of one dtype in representable values."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]

    def ordered(t):
        i = t.contiguous().view(bits).to(torch.int64)
        sign = torch.iinfo(bits).min
        return torch.where(i < 0, sign - i, i)

    return (ordered(a) - ordered(b)).abs()
