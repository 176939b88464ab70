"""What the tests of activations share."""

from functools import partial

import lomem
import torch
import torch.nn.functional as F
from lomem import reference
from torch import nn

LF = lomem.functional


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


# name -> (function of the library, what it computes, the op's name for it, its parameters)
SMOOTH = {
    "gelu": (LF.gelu, F.gelu, "gelu", ()),
    "gelu-tanh": (partial(LF.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh"), "gelu_tanh", ()),
    "quick_gelu": (LF.quick_gelu, quick_gelu, "quick_gelu", ()),
    "silu": (LF.silu, F.silu, "silu", ()),
    "mish": (LF.mish, F.mish, "mish", ()),
    "sigmoid": (LF.sigmoid, F.sigmoid, "sigmoid", ()),
    "tanh": (LF.tanh, F.tanh, "tanh", ()),
    "tanhshrink": (LF.tanhshrink, F.tanhshrink, "tanhshrink", ()),
    "softplus": (LF.softplus, F.softplus, "softplus", (1.0, 20.0)),
    "softplus-parameters": (
        partial(LF.softplus, beta=1.7, threshold=2.0),
        partial(F.softplus, beta=1.7, threshold=2.0),
        "softplus",
        (1.7, 2.0),
    ),
    "softsign": (LF.softsign, F.softsign, "softsign", ()),
    "logsigmoid": (LF.logsigmoid, F.logsigmoid, "logsigmoid", ()),
    "elu": (LF.elu, F.elu, "elu", (1.0,)),
    "elu-parameters": (partial(LF.elu, alpha=1.3), partial(F.elu, alpha=1.3), "elu", (1.3,)),
    "celu": (LF.celu, F.celu, "celu", (1.0,)),
    "celu-parameters": (partial(LF.celu, alpha=0.6), partial(F.celu, alpha=0.6), "celu", (0.6,)),
    "selu": (LF.selu, F.selu, "selu", ()),
    "hardswish": (LF.hardswish, F.hardswish, "hardswish", ()),
}


HARD = {
    "relu": (LF.relu, F.relu),
    "leaky_relu": (LF.leaky_relu, F.leaky_relu),
    "leaky_relu-parameters": (partial(LF.leaky_relu, negative_slope=0.3), partial(F.leaky_relu, negative_slope=0.3)),
    "leaky_relu-zero": (partial(LF.leaky_relu, negative_slope=0.0), partial(F.leaky_relu, negative_slope=0.0)),
    "relu6": (LF.relu6, F.relu6),
    "threshold": (partial(LF.threshold, threshold=0.1, value=-0.7), partial(F.threshold, threshold=0.1, value=-0.7)),
    "threshold-negative": (
        partial(LF.threshold, threshold=-2.3, value=9.0),
        partial(F.threshold, threshold=-2.3, value=9.0),
    ),
    "hardtanh": (LF.hardtanh, F.hardtanh),
    "hardtanh-parameters": (
        partial(LF.hardtanh, min_val=-0.3, max_val=0.7),
        partial(F.hardtanh, min_val=-0.3, max_val=0.7),
    ),
    "hardsigmoid": (LF.hardsigmoid, F.hardsigmoid),
    "hardshrink": (LF.hardshrink, F.hardshrink),
    "hardshrink-parameters": (partial(LF.hardshrink, lambd=0.3), partial(F.hardshrink, lambd=0.3)),
    "softshrink": (LF.softshrink, F.softshrink),
    "softshrink-parameters": (partial(LF.softshrink, lambd=0.3), partial(F.softshrink, lambd=0.3)),
    "softshrink-zero": (partial(LF.softshrink, lambd=0.0), partial(F.softshrink, lambd=0.0)),
}


ALL = {**{name: entry[:2] for name, entry in SMOOTH.items()}, **HARD}


# The same functions as modules: what makes one, and torch's.
MODULES = {
    "gelu": (partial(lomem.nn.GELU), nn.GELU()),
    "gelu-tanh": (partial(lomem.nn.GELU, "tanh"), nn.GELU("tanh")),
    "silu": (lomem.nn.SiLU, nn.SiLU()),
    "mish": (lomem.nn.Mish, nn.Mish()),
    "sigmoid": (lomem.nn.Sigmoid, nn.Sigmoid()),
    "tanh": (lomem.nn.Tanh, nn.Tanh()),
    "tanhshrink": (lomem.nn.Tanhshrink, nn.Tanhshrink()),
    "softplus": (partial(lomem.nn.Softplus, 2.0, threshold=5.0), nn.Softplus(2.0, 5.0)),
    "softsign": (lomem.nn.Softsign, nn.Softsign()),
    "logsigmoid": (lomem.nn.LogSigmoid, nn.LogSigmoid()),
    "elu": (partial(lomem.nn.ELU, 0.5), nn.ELU(0.5)),
    "celu": (partial(lomem.nn.CELU, 0.5), nn.CELU(0.5)),
    "selu": (lomem.nn.SELU, nn.SELU()),
    "hardswish": (lomem.nn.Hardswish, nn.Hardswish()),
    "relu": (lomem.nn.ReLU, nn.ReLU()),
    "leaky_relu": (partial(lomem.nn.LeakyReLU, 0.2), nn.LeakyReLU(0.2)),
    "relu6": (lomem.nn.ReLU6, nn.ReLU6()),
    "threshold": (partial(lomem.nn.Threshold, 0.1, 20.0), nn.Threshold(0.1, 20.0)),
    "hardtanh": (partial(lomem.nn.Hardtanh, -2.0, 0.5), nn.Hardtanh(-2.0, 0.5)),
    "hardsigmoid": (lomem.nn.Hardsigmoid, nn.Hardsigmoid()),
    "hardshrink": (partial(lomem.nn.Hardshrink, 0.2), nn.Hardshrink(0.2)),
    "softshrink": (partial(lomem.nn.Softshrink, 0.2), nn.Softshrink(0.2)),
}

# Those that torch has no module for.
MODULES_OF_LOMEM_ALONE = {"QuickGELU"}

# x sigmoid(1.702 x), which models spell out.
STRETCHED_SILU = "quick_gelu"


BITS = range(1, 9)


def levels_of(step, dtype):
    return torch.tensor(step.levels, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)


def expected_gradient(x, grad, step):
    """grad * level[code], computed in float64 and rounded once; with one bit, a level of 0 gives 0."""
    level = levels_of(step, x.dtype)[reference.step_codes(x, step).long().cpu()].to(x.device).double()
    product = grad.double() * level
    return (torch.where(level == 0, 0.0, product) if step.bits == 1 else product).to(x.dtype)


def saved_by(op, x):
    """op(x), and the tensors that it saves."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = op(x)
    return y, saved


def jagged(*rows, width=5):
    values = [torch.randn(count, width) for count in rows]
    return torch.nested.nested_tensor(values, layout=torch.jagged).requires_grad_()


def outcome(f, x):
    """f(x) and its gradient, as ordinary tensors, and bytes that are kept; or the type of error."""
    try:
        (y, saved), leaf = saved_by(f, x), x
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y) * 0.7)
    except (RuntimeError, NotImplementedError) as error:
        return type(error)
    return y.is_nested, y.values().detach(), grad.values(), sum(t.values().nbytes for t in saved if t.is_nested)


def assert_same_outcome(got, want):
    assert type(got) is type(want)
    if isinstance(want, tuple):
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(got, want, strict=True))
    else:
        assert got is want
