"""What lomem.convert recognizes a module as, whatever its name and implementation."""

import math
import re
import threading
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from activations_helpers import MODULES
from lomem._trace.batch import as_batch
from lomem._trace.state import preserved
from lomem.conversion.flow import untouched
from lomem.conversion.recognize import (
    ActivationForm,
    NormForm,
    NotRecognized,
    recognize_activation,
    recognize_linear,
    recognize_norm,
    signature,
)
from lomem.conversion.witness import quietly
from torch import nn
from torch._dynamo import eval_frame

D = 24


class Norm(nn.Module):
    """A norm made of separate parts."""

    def __init__(self, centred, gamma, beta, eps, *, double=False):
        super().__init__()
        self.centred, self.tiny, self.double_precision = centred, eps, double
        if gamma:
            self.g = nn.Parameter(torch.zeros(D) if gamma == "1 + g" else torch.ones(D))
        self.plus = gamma == "1 + g"
        if beta:
            self.shift = nn.Parameter(torch.zeros(D))

    def forward(self, hidden):
        x = hidden.double() if self.double_precision else hidden.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny)
        if hasattr(self, "g"):
            x = x * (1 + self.g if self.plus else self.g)
        return (x + self.shift if hasattr(self, "shift") else x).to(hidden.dtype)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("gamma", [None, "g", "1 + g"])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-6, 3e-7, 1e-12])
def test_a_norm_is_recognized_part_by_part(centred, gamma, beta, eps):
    norm = Norm(centred, gamma, beta, eps)
    if gamma is None and not beta:
        norm.normalized_shape = (D,)
    form = recognize_norm(norm)
    assert isinstance(form, NormForm), form
    assert (form.centred, form.one_plus, form.eps, form.shape, form.axis) == (
        centred,
        gamma == "1 + g",
        eps,
        (D,),
        -1,
    )
    assert (form.gamma, form.beta) == ("g" if gamma else None, "shift" if beta else None)
    assert form.dtype == "input"


@pytest.mark.parametrize("shape", [(4, D), (2, 4, D)])
def test_a_norm_whose_statistics_have_a_dimension_less_is_recognized(shape):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.square().mean(-1) + 1e-6)[..., None])

    form = recognize_norm(Rows(), [shape])
    assert isinstance(form, NormForm), form
    assert (form.centred, form.gamma, form.eps) == (False, "weight", 1e-6)


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 2.5e-5, 1e-8, 0.0])
def test_eps_is_found_where_no_attribute_holds_it(eps):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))

        def forward(self, x):
            return F.rms_norm(x, (D,), self.weight, eps)

    assert recognize_norm(Hidden()).eps == eps


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.LayerNorm(D), (True, "weight", "bias", 1e-5, (D,))),
        (nn.LayerNorm(D, bias=False, eps=1e-6), (True, "weight", None, 1e-6, (D,))),
        (nn.LayerNorm(D, elementwise_affine=False), (True, None, None, 1e-5, (D,))),
        (nn.LayerNorm((4, D)), (True, "weight", "bias", 1e-5, (4, D))),
        (nn.RMSNorm(D), (False, "weight", None, None, (D,))),
        (nn.RMSNorm(D, eps=1e-6), (False, "weight", None, 1e-6, (D,))),
        (nn.LayerNorm(D).bfloat16(), (True, "weight", "bias", 1e-5, (D,))),
    ],
)
def test_torch_norms_are_recognized(norm, expected):
    form = recognize_norm(norm)
    assert (form.centred, form.gamma, form.beta, form.eps, form.shape) == expected
    assert (form.dtype, form.one_plus, form.axis) == ("input", False, -1)


@pytest.mark.parametrize("size", [256, 384, 512, 768])
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_rows_of_a_sample_may_overflow_one_by_one(norm, size):
    # The squares of inputs of 4e18 add up to about float32's largest number: to less in one row, to more in the next.
    for eps in (1e-12, 1e-6, 1e-5):
        assert isinstance(recognize_norm(norm(size, eps=eps), ((2, 5, size),)), NormForm), (size, eps)


def test_a_norm_of_channels_is_recognized():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    form = recognize_norm(ChannelsFirst(D))
    assert (form.axis, form.centred, form.gamma, form.beta) == (1, True, "weight", "bias")


def test_the_rule_for_the_dtype_of_the_result_is_recognized():
    class Weighted(nn.Module):
        def __init__(self, rule):
            super().__init__()
            self.weight, self.rule = nn.Parameter(torch.ones(D)), rule

        def forward(self, x):
            y = F.rms_norm(x.float(), (D,), eps=1e-6)
            if self.rule == "promote":
                return self.weight * y.to(x.dtype)
            if self.rule == "weight":
                return self.weight * y.to(self.weight.dtype)
            y = y * self.weight.float()
            return y if self.rule == "float32" else y.to(x.dtype)

    for rule in ("input", "promote", "weight", "float32"):
        assert recognize_norm(Weighted(rule)).dtype == rule


class _NotANorm(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.function = forward

    def forward(self, x):
        return self.function(x) * self.weight


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(D),
        nn.BatchNorm1d(D).eval(),
        nn.GroupNorm(4, D),
        nn.InstanceNorm1d(D, affine=True),
        nn.Linear(D, D),
        nn.PReLU(D),
        nn.Dropout(),
        nn.Sequential(nn.LayerNorm(D)),
        _NotANorm(lambda x: F.normalize(x, dim=-1)),
        _NotANorm(lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3)),  # eps outside the root
        _NotANorm(lambda x: (x - x.median(-1, keepdim=True).values) / x.std(-1, keepdim=True)),
        _NotANorm(lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)),  # divides by D - 1
        _NotANorm(lambda x: F.rms_norm(x, (D,)).clamp(max=2)),
        _NotANorm(lambda x: F.rms_norm(x, (D,)) + torch.rand(())),
        _NotANorm(lambda x: F.rms_norm(x, (D,)) + 0.01 * x),
        _NotANorm(lambda x: F.rms_norm(x, (x.shape[0], D))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_no_norm_is_none(module):
    found = recognize_norm(module, [(5, D)])
    assert isinstance(found, NotRecognized)
    assert found.kind == "norm"
    assert found.reason


class WithNeutralParts(nn.LayerNorm):
    """A norm with a part that has no effect for now."""

    def __init__(self, forward, **tensors):
        super().__init__(D)
        self.function = forward
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x):
        return self.function(self, super().forward(x), x)


class Detached(nn.RMSNorm):
    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt().detach() * self.weight


class Scaled(nn.RMSNorm):
    scale: float

    def __init__(self):
        super().__init__(D, eps=1e-6)
        self.scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


NEUTRAL = {
    "gain": (WithNeutralParts(lambda m, y, x: y * m.gain, gain=torch.ones(())), "gain is not a weight or bias"),
    "gate": (WithNeutralParts(lambda m, y, x: y + m.alpha * x, alpha=torch.zeros(())), "alpha is not a weight or bias"),
    "dropout": (
        WithNeutralParts(lambda m, y, x: F.dropout(y, 0.5, m.training)).eval(),
        "also computes (dropout|bernoulli)",
    ),
    "detached": (Detached(D, eps=1e-6), "its gradient is not that of a norm"),
    "scale": (Scaled(), "its attribute scale has an effect"),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_norm_with_a_part_that_has_no_effect_now_is_none(name):
    module, match = NEUTRAL[name]
    found = recognize_norm(module, [(5, D)])
    assert isinstance(found, NotRecognized)
    assert found.near  # so it is reported
    assert re.search(match, found.reason)


def test_a_norm_is_what_it_is_for_the_inputs_that_it_gets():
    # Over all dimensions but the batch; for a matrix that is the last one.
    assert recognize_norm(nn.GroupNorm(1, D), [(5, D)]).ranks == (2,)
    assert isinstance(recognize_norm(nn.GroupNorm(1, D), [(5, D, 3, 3)]), NotRecognized)
    assert isinstance(recognize_norm(nn.GroupNorm(1, D), [(5, D, D, D)]), NotRecognized)
    assert isinstance(recognize_norm(nn.GroupNorm(1, D), [(5, D), (5, D, 3)]), NotRecognized)
    assert recognize_norm(nn.LayerNorm(D), [(D,), (5, D), (2, 3, 4, D)]).ranks == (1, 2, 4)
    assert isinstance(recognize_norm(nn.LayerNorm(D), [(5, 2 * D)]), NotRecognized)


def test_an_activation_with_another_gradient_is_none():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return F.gelu(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert isinstance(recognize_activation(Function(Straight.apply)), NotRecognized)
    assert isinstance(recognize_activation(Function(lambda x: F.gelu(x.detach()))), NotRecognized)


def test_an_activation_with_dropout_in_training_is_none():
    class Dropped(nn.Module):
        def forward(self, x):
            return F.dropout(F.gelu(x), 0.5, self.training)

    assert isinstance(recognize_activation(Dropped().eval()), NotRecognized)


def test_a_linear_layer_whose_weight_is_made_of_others_is_none():
    pruned = prune.identity(nn.Linear(6, 6), "weight")
    assert recognize_linear(pruned) is None
    assert recognize_linear(nn.utils.spectral_norm(nn.Linear(6, 6)).eval()) is None

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.register_buffer("mask", torch.ones(6, 6))

        def forward(self, x):
            return F.linear(x, self.weight * self.mask, self.bias)

    class DropConnect(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)

    assert recognize_linear(Masked()) is None
    assert recognize_linear(DropConnect(6, 6).eval()) is None
    assert isinstance(recognize_norm(prune.identity(nn.RMSNorm(D), "weight"), [(5, D)]), NotRecognized)


def test_modules_of_one_signature_are_alike():
    assert signature(nn.LayerNorm(D)) == signature(nn.LayerNorm(D))
    assert signature(nn.GELU()) == signature(nn.GELU())
    different = [
        nn.LayerNorm(D),
        nn.LayerNorm(D + 1),
        nn.LayerNorm(D, eps=1e-6),
        nn.LayerNorm(D, bias=False),
        nn.LayerNorm(D).double(),
        nn.RMSNorm(D),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.SiLU(inplace=True),
    ]
    assert len({signature(module) for module in different}) == len(different)
    # Functions are compared by identity only.
    assert signature(Function(F.gelu)) == signature(Function(F.gelu))
    assert signature(Function(lambda x: x)) != signature(Function(lambda x: x))
    tanh = [Function(partial(F.gelu, approximate=kind)) for kind in ("tanh", "tanh", "none")]
    assert signature(tanh[0]) == signature(tanh[1]) != signature(tanh[2])
    # 1, True and 1.0 are equal but not the same.
    assert len({signature(Function(value)) for value in (1, True, 1.0)}) == 3


def test_a_module_that_counts_its_calls_is_as_it_was():
    class Counting(nn.LayerNorm):
        calls = 0

        def __init__(self):
            super().__init__(D)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return super().forward(x)

    module = Counting()
    recognize_norm(module, [(5, D)])
    assert (module.calls, module.seen.item(), module.training) == (0, 0, True)


def test_recognition_leaves_everything_as_it_was():
    norm = nn.LayerNorm(D)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    weight, state = norm.weight, torch.get_rng_state()
    recognize_norm(norm)
    recognize_activation(nn.GELU())
    assert norm.weight is weight
    assert torch.equal(weight, torch.ones(D))
    assert torch.equal(state, torch.get_rng_state())
    assert not calls
    assert norm.weight.grad is None


BLOCKS = {
    "quietly": quietly,
    "preserved": lambda: preserved(nn.GELU()),
    "untouched": lambda: untouched(nn.GELU(), True, as_batch("", "", torch.ones(2))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_two_threads_leave_everything_as_it_was(name):
    # What is set for the whole process: nobody else's setting is restored in place of one's own.
    block = BLOCKS[name]

    def settings():
        fast = torch.backends.mha.get_fastpath_enabled()
        stance = eval_frame._stance.stance
        return stance, list(warnings.filters), torch.is_anomaly_enabled(), fast, torch.get_rng_state()

    def first():
        with block():
            torch.rand(1)
            inside.set()
            entered.wait(0.5)  # the other one must not get so far
        left.set()

    def second():
        inside.wait()
        with block():
            entered.set()
            left.wait()

    before, inside, entered, left = settings(), threading.Event(), threading.Event(), threading.Event()
    with torch.autograd.set_detect_anomaly(True):
        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.is_anomaly_enabled()
    after = settings()
    assert after[:-1] == before[:-1]
    assert torch.equal(after[-1], before[-1])


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ROOT = math.sqrt(2 / math.pi)
SPELLINGS = {
    "nn.GELU": (nn.GELU(), ActivationForm("gelu", approximate_name="approximate")),
    "nn.GELU tanh": (nn.GELU("tanh"), ActivationForm("gelu", "tanh", approximate_name="approximate")),
    "nn.SiLU": (nn.SiLU(), ActivationForm("silu", inplace_name="inplace")),
    "nn.SiLU inplace": (nn.SiLU(inplace=True), ActivationForm("silu", inplace=True, inplace_name="inplace")),
    "F.silu inplace": (Function(lambda x: F.silu(x, inplace=True)), ActivationForm("silu", inplace=True)),
    "erf": (
        Function(lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ActivationForm("gelu", torch_op=False),
    ),
    "tanh": (
        Function(lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3))))),
        ActivationForm("gelu", "tanh", torch_op=False),
    ),
    "tanh, factored": (
        Function(lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))),
        ActivationForm("gelu", "tanh", torch_op=False),
    ),
    "quick": (
        Function(lambda x: x * torch.sigmoid(1.702 * x)),
        ActivationForm("silu", scale=1.702, torch_op=False),
    ),
    "swish": (Function(lambda x: x * x.sigmoid()), ActivationForm("silu", torch_op=False)),
    "called": (Function(F.silu), ActivationForm("silu")),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_activations_are_recognized_in_every_spelling(name):
    module, form = SPELLINGS[name]
    found = recognize_activation(module)
    if name == "swish":  # whether it equals torch's op bit for bit depends on torch's vectorization
        found = replace(found, torch_op=False)
    assert found == form


@pytest.mark.parametrize(
    "module",
    [
        *(plain for _, plain in MODULES.values() if not isinstance(plain, (nn.GELU, nn.SiLU))),
        nn.Identity(),
        nn.Softmax(-1),
        nn.Dropout(),
        nn.Linear(1, 1),
        nn.PReLU(),
        Function(lambda x: F.gelu(x).clamp(-10, 10)),
        Function(lambda x: x * 0.5),
        Function(lambda x: F.gelu(x) + 1e-3),
        Function(lambda x: F.silu(x)[..., :1]),
        Function(lambda x: (x, x)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_is_no_such_activation_is_none(module):
    assert isinstance(recognize_activation(module), NotRecognized)


def test_linear_layers_are_recognized():
    class Conv1D(nn.Module):  # as in GPT-2
        def __init__(self, inner, outer):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(inner, outer)), nn.Parameter(torch.zeros(outer))

        def forward(self, x):
            return torch.addmm(self.b, x.view(-1, x.size(-1)), self.w).view(*x.shape[:-1], -1)

    form = recognize_linear(Conv1D(6, 4))
    assert (form.weight, form.bias, form.transposed) == ("w", "b", False)
    form = recognize_linear(nn.Linear(6, 6, bias=False))
    assert (form.weight, form.bias, form.transposed) == ("weight", None, True)
    for module in (nn.Embedding(6, 4), nn.Conv2d(3, 3, 1), nn.Bilinear(2, 2, 2), nn.LayerNorm(6), nn.ReLU()):
        assert recognize_linear(module) is None

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert recognize_linear(Scaled(6, 4)) is None
