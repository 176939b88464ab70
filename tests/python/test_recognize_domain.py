"""A module is what it is recognized as on its whole domain: unusual weights, inputs, dtypes and modes too."""

import functools
import math

import lomem
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from lomem.conversion import recognize_activation as activations
from lomem.conversion import recognize_norm as norms
from lomem.conversion.recognize import (
    ActivationForm,
    LinearForm,
    NormForm,
    NotRecognized,
    recognize_activation,
    recognize_linear,
    recognize_norm,
    signature,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

D = 24
SHAPES = [(2, 5, D)]


class Norm(nn.Module):
    """A module whose forward is a given function of its parameters and input."""

    def __init__(self, function, *, bias=False, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        if bias:
            self.bias = nn.Parameter(torch.zeros(D))
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


class Function(nn.Module):
    """The same without parameters."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def rms(x, weight=None):
    return F.rms_norm(x, (D,), weight, 1e-6)


def layer(x, weight, bias=None):
    return F.layer_norm(x, (D,), weight, bias)


def gradient_through(function):
    """The identity with a different gradient."""

    class Hook(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return function(grad)

    return Hook.apply


def only_where(condition, function):
    """A function that applies in some settings only."""
    return lambda m, x: function(rms(x, m.weight)) if condition(m, x) else rms(x, m.weight)


def limited(x):
    return x.clamp(-100, 100)


# Each computes a norm for ordinary weights and inputs. The second entry says what gives it away: values, ops, or both.
ALMOST_NORMS = {
    "weight.abs()": (Norm(lambda m, x: rms(x, m.weight.abs())), "values ops", "abs"),
    "weight.relu()": (Norm(lambda m, x: rms(x, m.weight.relu())), "values ops", "relu"),
    "sqrt(weight ** 2)": (Norm(lambda m, x: rms(x, (m.weight * m.weight).sqrt())), "values", ""),
    "weight at least": (Norm(lambda m, x: layer(x, m.weight.clamp(min=0.1))), "values ops", "clamp"),
    "weight at most": (Norm(lambda m, x: layer(x, m.weight.clamp(max=4.0))), "values ops", "clamp"),
    "maximum of weights": (Norm(lambda m, x: rms(x, torch.maximum(m.weight, -m.weight))), "values ops", "maximum"),
    "bias at most": (Norm(lambda m, x: layer(x, m.weight, m.bias.clamp(-5, 5)), bias=True), "values ops", "clamp"),
    "nan_to_num of the result": (Norm(lambda m, x: rms(x, m.weight).nan_to_num()), "values ops", "nan_to_num"),
    "nan_to_num of the input": (Norm(lambda m, x: rms(x.nan_to_num(), m.weight)), "values ops", "nan_to_num"),
    "where": (Norm(lambda m, x: torch.where(x.isnan(), 0.0, rms(x, m.weight))), "values ops", "isnan"),
    "masked_fill": (Norm(lambda m, x: rms(x, m.weight).masked_fill(x != x, 0.0)), "values ops", "ne"),
    "large inputs clamped": (Norm(lambda m, x: rms(x.clamp(-1e5, 1e5), m.weight)), "values ops", "clamp"),
    "larger than 1000 clamped": (Norm(lambda m, x: rms(x.clamp(-1e3, 1e3), m.weight)), "values ops", "clamp"),
    "result clamped": (Norm(lambda m, x: rms(x, m.weight).clamp(-1e4, 1e4)), "values ops", "clamp"),
    "in float16 alone": (Norm(only_where(lambda m, x: x.dtype == torch.float16, limited)), "values ops", "clamp"),
    "in bfloat16 alone": (Norm(only_where(lambda m, x: x.dtype == torch.bfloat16, limited)), "values ops", "clamp"),
    "in float32 alone": (Norm(only_where(lambda m, x: x.dtype == torch.float32, limited)), "values ops", "clamp"),
    "in training alone": (Norm(only_where(lambda m, x: m.training, limited)), "values ops", "clamp"),
    "in evaluation alone": (Norm(only_where(lambda m, x: not m.training, limited)), "values ops", "clamp"),
    "with gradients alone": (Norm(only_where(lambda m, x: torch.is_grad_enabled(), limited)), "values ops", "clamp"),
    "without alone": (Norm(only_where(lambda m, x: not torch.is_grad_enabled(), limited)), "values ops", "clamp"),
    "under autocast alone": (
        Norm(only_where(lambda m, x: torch.is_autocast_enabled("cpu"), limited)),
        "values ops",
        "clamp",
    ),
    "asks for values": (Norm(lambda m, x: rms(x, m.weight) if x.sum() < 1e9 else x), "values ops", "lt"),
    "item": (Norm(lambda m, x: rms(x, m.weight) * (1 if x.sum().item() < 1e9 else 2)), "values ops", "item"),
    "integers": (Norm(lambda m, x: rms(x, m.weight) + x.int() * 0), "ops", "int32"),
    "random": (Norm(lambda m, x: rms(x, m.weight) + 0 * torch.rand(())), "ops", "rand"),
    "normalize": (Norm(lambda m, x: F.normalize(x, dim=-1) * math.sqrt(D) * m.weight), "ops", "clamp_min"),
    "variance at least": (
        Norm(lambda m, x: x * x.pow(2).mean(-1, keepdim=True).clamp_min(1e-6).rsqrt() * m.weight),
        "values ops",
        "clamp_min",
    ),
    "eps outside of the root": (
        Norm(lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6) * m.weight),
        "values",
        "",
    ),
    "eps of each dtype": (Norm(lambda m, x: F.rms_norm(x, (D,), m.weight, torch.finfo(x.dtype).eps)), "values", ""),
}


def blind_to_ops(monkeypatch):
    for module in (norms, activations):
        monkeypatch.setattr(module, "unexplained", lambda ops, explained: None)


def blind_to_values(monkeypatch):
    monkeypatch.setattr(norms, "_sweep", lambda *_: None)
    monkeypatch.setattr(activations, "_check_values", lambda *_: None)


@pytest.mark.parametrize("name", ALMOST_NORMS)
def test_what_is_a_norm_on_ordinary_inputs_alone_is_none(name):
    module, _, op = ALMOST_NORMS[name]
    found = recognize_norm(module, SHAPES)
    assert isinstance(found, NotRecognized)
    assert found.near
    assert found.kind == "norm"
    assert not op or op in found.reason, found.reason


@pytest.mark.parametrize("name", [name for name, (_, witnesses, _) in ALMOST_NORMS.items() if "values" in witnesses])
def test_the_values_alone_show_it(name, monkeypatch):
    blind_to_ops(monkeypatch)
    assert isinstance(recognize_norm(ALMOST_NORMS[name][0], SHAPES), NotRecognized)


@pytest.mark.parametrize("name", [name for name, (_, witnesses, _) in ALMOST_NORMS.items() if "ops" in witnesses])
def test_the_ops_alone_show_it(name, monkeypatch):
    blind_to_values(monkeypatch)
    assert isinstance(recognize_norm(ALMOST_NORMS[name][0], SHAPES), NotRecognized)


GRADIENTS = {
    "clamped": limited,
    "without NaN": torch.nan_to_num,
    "small ones dropped": lambda grad: grad * (grad.abs() > 1e-6),
    "doubled": lambda grad: 2 * grad,
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("training", [False, True])
def test_another_gradient_is_seen(name, training):
    hook = gradient_through(GRADIENTS[name])

    def through(m, x):
        return hook(x) if m.training == training else x

    for module in (
        Norm(lambda m, x: rms(through(m, x), m.weight)),
        Norm(lambda m, x: through(m, layer(x, m.weight))),
    ):
        found = recognize_norm(module, SHAPES)
        assert isinstance(found, NotRecognized)
        assert "gradient" in found.reason
    found = recognize_activation(Function(lambda m, x: F.gelu(through(m, x))))
    assert isinstance(found, NotRecognized)
    assert "gradient" in found.reason


def writing(condition):
    def forward(m, x):
        y = x.float() if x.dtype != torch.float64 else x
        y = y if condition(m) else y.clone()
        return y.mul_((y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * m.weight

    return Norm(forward)


@pytest.mark.parametrize(
    "condition",
    [
        lambda m: True,
        lambda m: m.training,
        lambda m: not m.training,
        lambda m: torch.is_grad_enabled(),
        lambda m: not torch.is_grad_enabled(),
    ],
    ids=["always", "training", "evaluation", "gradients", "no gradients"],
)
def test_a_norm_that_writes_to_its_input_is_none(condition):
    found = recognize_norm(writing(condition), SHAPES)
    assert isinstance(found, NotRecognized)
    assert found.near
    assert found.reason == "it writes to its input"


def test_a_norm_that_writes_to_its_input_in_one_dtype_is_none():
    # x.float() is x itself if that is float32, and a copy otherwise.
    def forward(m, x):
        y = x.float()
        return y.mul_((y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * m.weight

    assert recognize_norm(Norm(forward), SHAPES).reason == "it writes to its input"


HIDDEN = torch.ones((), requires_grad=True)
HIDDEN_TENSORS = {
    "attribute that requires grad": (lambda m: m.gain, {"gain": torch.ones((), requires_grad=True)}, "gain"),
    "attribute": (lambda m: m.gain, {"gain": torch.ones(())}, "gain"),
    "in a list": (lambda m: m.gains[0], {"gains": [torch.ones((), requires_grad=True)]}, "gains"),
    "in a closure": (lambda m: HIDDEN, {}, "requires grad"),
}


@pytest.mark.parametrize("name", HIDDEN_TENSORS)
def test_a_tensor_that_is_no_parameter_is_a_part_of_the_function(name):
    get, attributes, match = HIDDEN_TENSORS[name]
    norm = recognize_norm(Norm(lambda m, x: rms(x, m.weight) * get(m), **attributes), SHAPES)
    swish = recognize_activation(Function(lambda m, x: x * torch.sigmoid(get(m) * x), **attributes))
    for found in (norm, swish):
        assert isinstance(found, NotRecognized)
        assert found.near
        assert match in found.reason


class ClipLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.type(torch.float32)).type(x.dtype)


class LayerNormFp32(nn.LayerNorm):
    def forward(self, x):
        y = F.layer_norm(x.to(torch.float32), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class RMSNormFp32(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


CASTING = {
    "CLIP": (ClipLayerNorm, (True, 1e-5, "eps")),
    "open_clip": (LayerNormFp32, (True, 1e-5, "eps")),
    "RMS": (functools.partial(RMSNormFp32, eps=1e-6), (False, 1e-6, "eps")),
    # The machine epsilon of float32, in float64 too: a fixed number, not torch's rule.
    "RMS, no eps": (RMSNormFp32, (False, torch.finfo(torch.float32).eps, None)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASTING)
def test_norms_that_cast_their_input_alone_are_recognized_in_every_dtype(name, dtype):
    make, expected = CASTING[name]
    form = recognize_norm(make(D).to(dtype), SHAPES)
    assert isinstance(form, NormForm), form
    assert (form.centred, form.eps, form.eps_name) == expected
    assert form.dtype == "input"


SPELLED = {
    "mean of squares minus square of mean": (
        lambda m, x: (
            (x - x.mean(-1, keepdim=True))
            * (x.pow(2).mean(-1, keepdim=True) - x.mean(-1, keepdim=True).pow(2) + 1e-5).rsqrt()
            * m.weight
        ),
        1e-5,
    ),
    "std": (
        lambda m, x: (
            m.weight * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.std(-1, keepdim=True, correction=0) ** 2 + 1e-6)
        ),
        1e-6,
    ),
    "var, no eps": (
        lambda m, x: (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True, unbiased=False).sqrt() * m.weight,
        0.0,
    ),
    "norm, no eps": (lambda m, x: m.weight * x / (x.norm(2, -1, keepdim=True) * D**-0.5), 0.0),
    "16 bits throughout": (lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)), 1e-8),
    "float64 inside": (lambda m, x: F.layer_norm(x.double(), (D,)).to(x.dtype) * m.weight, 1e-5),
    "1 + weight, multiplied out": (lambda m, x: rms(x) + rms(x) * m.weight, 1e-6),
    "reciprocal": (lambda m, x: x * m.weight * (x.square().sum(-1, keepdim=True) / D + 1e-5).sqrt().reciprocal(), 1e-5),
    "addcmul": (lambda m, x: torch.addcmul(torch.zeros((), dtype=x.dtype), rms(x), m.weight), 1e-6),
    "in place on its own": (lambda m, x: (x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt_()).mul_(m.weight), 1e-6),
}


@pytest.mark.parametrize("name", SPELLED)
def test_norms_that_lose_digits_or_overflow_on_their_way_are_recognized(name):
    function, eps = SPELLED[name]
    form = recognize_norm(Norm(function), SHAPES)
    assert isinstance(form, NormForm), form
    assert form.eps == eps


# Attributes that are read at each call, attributes of the class, and attributes that are not read.


class ClassEps(nn.Module):
    epsilon = 1e-5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return F.rms_norm(x, (D,), self.weight, self.epsilon)


LIVE_EPS = {
    "LayerNorm": (nn.LayerNorm(D), 1e-5, "eps"),
    "RMSNorm": (nn.RMSNorm(D, eps=1e-6), 1e-6, "eps"),
    "RMSNorm, none": (nn.RMSNorm(D), None, "eps"),
    "other name": (Norm(lambda m, x: F.rms_norm(x, (D,), m.weight, m.tiny), tiny=1e-6), 1e-6, "tiny"),
    "of the class": (ClassEps(), 1e-5, "epsilon"),
    "literal": (Norm(lambda m, x: rms(x, m.weight)), 1e-6, None),
    "literal beside an attribute": (Norm(lambda m, x: rms(x, m.weight), eps=1e-6), 1e-6, None),
    "two of one value": (
        Norm(lambda m, x: F.rms_norm(x, (D,), m.weight, m.eps), layer_norm_eps=1e-6, eps=1e-6),
        1e-6,
        "eps",
    ),
    "bound before": (Norm(lambda m, x, eps=1e-6: F.rms_norm(x, (D,), m.weight, eps), eps=1e-6), 1e-6, None),
    "an integer": (Norm(lambda m, x: F.rms_norm(x, (D,), m.weight, m.eps), eps=1), 1.0, "eps"),
}


@pytest.mark.parametrize("name", LIVE_EPS)
def test_the_attribute_that_eps_is_read_from_is_known(name):
    module, eps, attribute = LIVE_EPS[name]
    before = dict(vars(module))
    form = recognize_norm(module, SHAPES)
    assert isinstance(form, NormForm), form
    assert (form.eps, form.eps_name) == (eps, attribute)
    assert vars(module) == before


LIVE = {
    "GELU": (nn.GELU(), (None, "approximate", None)),
    "SiLU": (nn.SiLU(), (None, None, "inplace")),
    "swish": (Function(lambda m, x: x * torch.sigmoid(m.beta * x), beta=1.3), ("beta", None, None)),
    "swish with 1": (Function(lambda m, x: x * torch.sigmoid(m.beta * x), beta=1.0), ("beta", None, None)),
    "swish with an integer": (Function(lambda m, x: x * torch.sigmoid(m.beta * x), beta=2), ("beta", None, None)),
    "swish, not read": (Function(lambda m, x: x * torch.sigmoid(1.3 * x), beta=1.3), (None, None, None)),
    "mode": (Function(lambda m, x: F.gelu(x, approximate=m.mode), mode="tanh"), (None, "mode", None)),
    "mode, not read": (Function(lambda m, x: F.gelu(x, approximate="tanh"), mode="tanh"), (None, None, None)),
    "other flag": (Function(lambda m, x: F.silu(x), training_only=True), (None, None, None)),
}


@pytest.mark.parametrize("name", LIVE)
def test_the_attributes_that_an_activation_reads_are_known(name):
    module, expected = LIVE[name]
    form = recognize_activation(module)
    assert isinstance(form, ActivationForm), form
    assert (form.scale_name, form.approximate_name, form.inplace_name) == expected
    if form.scale_name is not None:
        # The module's own forward has to run, since the attribute may change.
        assert form.scale == module.beta
        assert not form.torch_op


ALMOST_ACTIVATIONS = {
    "result at most 50": (lambda x: F.gelu(x).clamp(max=50.0), "values ops", "clamp"),
    "result at most 1000": (lambda x: F.gelu(x).clamp(max=1000.0), "values ops", "clamp"),
    "result of float16": (lambda x: F.gelu(x).clamp(-65504.0, 65504.0), "values ops", "clamp"),
    "input clamped": (lambda x: F.gelu(x.clamp(-100, 100)), "values ops", "clamp"),
    "nan_to_num": (lambda x: torch.nan_to_num(F.silu(x)), "values ops", "nan_to_num"),
    "identity far out": (lambda x: torch.where(x > 50, 1.0001 * x, F.gelu(x)), "values ops", "gt"),
    "0 far out": (lambda x: F.silu(x) * (x > -1e4), "ops", "gt"),
    "in float16 alone": (lambda x: F.gelu(x).clamp(max=9) if x.dtype == torch.float16 else F.gelu(x), "values ops", ""),
    "in float32 alone": (lambda x: F.gelu(x).clamp(max=9) if x.dtype == torch.float32 else F.gelu(x), "values ops", ""),
    "without gradients alone": (
        lambda x: F.gelu(x) if torch.is_grad_enabled() else F.gelu(x).clamp(max=99),
        "values ops",
        "clamp",
    ),
    "item": (lambda x: F.silu(x) if float(x.view(-1)[0]) < 1e9 else x, "ops", "item"),
    "integers": (lambda x: F.silu(x) + 0 * x.int(), "ops", "int32"),
    "a tiny offset": (lambda x: F.gelu(x) + 1e-7, "values", ""),
}


@pytest.mark.parametrize("name", ALMOST_ACTIVATIONS)
def test_what_is_an_activation_on_ordinary_inputs_alone_is_none(name):
    function, _, op = ALMOST_ACTIVATIONS[name]
    found = recognize_activation(Function(lambda m, x: function(x)))
    assert isinstance(found, NotRecognized)
    assert found.near
    assert found.kind == "activation"
    assert not op or op in found.reason


@pytest.mark.parametrize("name", [n for n, (_, witnesses, _) in ALMOST_ACTIVATIONS.items() if "values" in witnesses])
def test_the_values_alone_show_it_of_activations(name, monkeypatch):
    blind_to_ops(monkeypatch)
    found = recognize_activation(Function(lambda m, x: ALMOST_ACTIVATIONS[name][0](x)))
    assert isinstance(found, NotRecognized)


@pytest.mark.parametrize("name", [n for n, (_, witnesses, _) in ALMOST_ACTIVATIONS.items() if "ops" in witnesses])
def test_the_ops_alone_show_it_of_activations(name, monkeypatch):
    blind_to_values(monkeypatch)
    found = recognize_activation(Function(lambda m, x: ALMOST_ACTIVATIONS[name][0](x)))
    assert isinstance(found, NotRecognized)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mul_(x.sigmoid()),
        lambda x: F.silu(x) if torch.is_grad_enabled() else F.silu(x, inplace=True),
        lambda x: F.silu(x, inplace=x.dtype == torch.float32),
    ],
    ids=["composite", "without gradients", "in float32"],
)
def test_an_activation_that_writes_to_its_input_in_a_way_of_its_own_is_none(function):
    found = recognize_activation(Function(lambda m, x: function(x)))
    assert isinstance(found, NotRecognized)
    assert "it writes to its input" in found.reason


ALMOST_LINEAR = {
    "input clamped": lambda m, x: F.linear(x.clamp(-100, 100), m.weight, m.bias),
    "weight clamped": lambda m, x: F.linear(x, m.weight.clamp(-1e4, 1e4), m.bias),
    "NaN hidden": lambda m, x: F.linear(x, m.weight, m.bias).nan_to_num(),
    "in training": lambda m, x: F.linear(x.clamp(-1e30, 1e30) if m.training else x, m.weight, m.bias),
    "without gradients": lambda m, x: F.linear(x if torch.is_grad_enabled() else x.relu(), m.weight, m.bias),
    "written input": lambda m, x: F.linear(x.mul_(1), m.weight, m.bias),
    "hidden factor": lambda m, x: F.linear(x, m.weight, m.bias) * HIDDEN,
}


@pytest.mark.parametrize("name", ALMOST_LINEAR)
def test_what_is_linear_on_ordinary_inputs_alone_is_none(name):
    class Layer(nn.Linear):
        def forward(self, x):
            return ALMOST_LINEAR[name](self, x)

    assert recognize_linear(Layer(6, 4)) is None


def test_a_linear_layer_that_takes_float32_alone_is_recognized():
    class Casting(nn.Linear):
        def forward(self, x):
            return F.linear(x.float(), self.weight, self.bias).to(x.dtype)

    assert recognize_linear(Casting(6, 4)) == LinearForm("weight", "bias", transposed=True)


# Recognition never raises, whatever the module.


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(8))

    def forward(self, n: int):
        return torch.outer(torch.arange(n), self.inv_freq)


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(D)), error

    def forward(self, x):
        raise self.error


class Guarded(nn.LayerNorm):
    """Refuses changes of its attributes."""

    def __setattr__(self, name, value):
        if name == "eps" and hasattr(self, "eps"):
            raise AttributeError("eps is fixed")
        super().__setattr__(name, value)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return {}["missing"]


class Unprintable(nn.Module):
    """Raises on access to its attributes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    @property
    def normalized_shape(self):
        raise KeyError("normalized_shape")

    def forward(self, x):
        return x


@torch.library.custom_op("lomem_test::scale", mutates_args=())
def scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight


ODD = {
    "loss with weights": nn.CrossEntropyLoss(weight=torch.rand(4)),
    "loss with a weight": nn.BCEWithLogitsLoss(pos_weight=torch.rand(4)),
    "loss": nn.CosineEmbeddingLoss(),
    "rotary": Rotary(),
    "layer scale": Norm(lambda m, x: x * m.weight),
    "custom op": Norm(lambda m, x: scale(x, m.weight)),
    "PReLU": nn.PReLU(D),
    "PReLU of one": nn.PReLU(),
    "BatchNorm": nn.BatchNorm1d(D),
    "InstanceNorm": nn.InstanceNorm1d(D),
    "list": nn.ParameterList([torch.rand(D)]),
    "dict": nn.ParameterDict({"a": nn.Parameter(torch.rand(4))}),
    "module list": nn.ModuleList(),
    "embedding": nn.Embedding(8, 4),
    "bilinear": nn.Bilinear(2, 2, 2, bias=False),
    "linear": nn.Linear(8, 1, bias=False),
    "lazy linear": nn.LazyLinear(4),
    "lazy batch norm": nn.LazyBatchNorm1d(),
    "lazy conv": nn.LazyConv2d(3, 1),
    "multi-head attention": nn.MultiheadAttention(8, 2),
    "lstm": nn.LSTM(4, 4),
    "scripted norm": torch.jit.script(nn.LayerNorm(D)),
    "scripted activation": torch.jit.script(nn.GELU()),
    "scripted linear": torch.jit.script(nn.Linear(4, 4)),
    "traced": torch.jit.trace(nn.SiLU(), torch.randn(2, 3)),
    "RuntimeError": Raising(RuntimeError("no")),
    "AttributeError": Raising(AttributeError("no")),
    "KeyError": Keyed(),
    "StopIteration": Raising(StopIteration()),
    "NotImplementedError": Raising(NotImplementedError()),
    "AssertionError": Raising(AssertionError()),
    "bare module": nn.Module(),
    "property that raises": Unprintable(),
    "complex": Norm(lambda m, x: torch.view_as_complex(x.unflatten(-1, (-1, 2)))),
    "nothing": Norm(lambda m, x: None),
    "integers": Norm(lambda m, x: x.long()),
    "sparse": Norm(lambda m, x: x.to_sparse()),
    "empty parameter": nn.ParameterList([torch.rand(0)]),
}


SCRIPTED = {"norm": ("scripted norm",), "activation": ("scripted activation", "traced")}


@pytest.mark.parametrize("shapes", [(), SHAPES, [(5, D)], [()], [(0, D)], [(2, D, 4, 4)]], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_nothing_is_raised(name, shapes):
    module = ODD[name]
    for found in (recognize_norm(module, shapes), recognize_activation(module)):
        assert isinstance(found, NotRecognized)
        assert found.reason
        runs = found.kind == "activation" or all(shape and shape[-1] == D for shape in shapes)
        assert found.near == (name in SCRIPTED[found.kind] and runs)
    assert isinstance(recognize_linear(module), LinearForm) == (name == "linear")
    hash(signature(module))


def test_a_norm_that_guards_its_attributes_is_a_norm_whose_eps_cannot_change():
    form = recognize_norm(Guarded(D), SHAPES)
    assert isinstance(form, NormForm)
    assert (form.eps, form.eps_name) == (1e-5, None)


def test_uninitialized_modules_say_so():
    for module in (nn.LazyLinear(4), nn.LazyBatchNorm1d()):
        assert recognize_norm(module).reason == "its parameters are not initialized yet"
        assert recognize_activation(module).reason == "its parameters are not initialized yet"


class ChannelsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


OTHER_NORMS = {
    "channels first": (ChannelsFirst(), [(2, D, 4, 4)], "laid out channels first"),
    "channels first, never run": (ChannelsFirst(), [], "does not run|not a layer norm|channels first"),
    "one group": (nn.GroupNorm(1, D), [(2, D, 4, 4)], "channels and positions together"),
    "one group, no weight": (nn.GroupNorm(1, D, affine=False), [(2, D, 4, 4)], "channels and positions together"),
    "one group of sequences": (nn.GroupNorm(1, D), [(2, D, 7)], "channels and positions together"),
}


@pytest.mark.parametrize("name", [n for n in OTHER_NORMS if "never" not in n])
def test_other_norms_get_a_true_reason(name):
    module, shapes, match = OTHER_NORMS[name]
    found = recognize_norm(module, shapes)
    assert isinstance(found, NotRecognized)
    assert found.near
    assert match in found.reason


def parametrization(make):
    layer = make(nn.Linear(D, D))
    return layer.parametrizations.weight[0]


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.BatchNorm1d(D), [(5, D)]),
        (nn.BatchNorm1d(D, affine=False, track_running_stats=False), [(5, D)]),
        (nn.BatchNorm2d(D), [(2, D, 4, 4)]),
        (nn.InstanceNorm1d(D), [(2, D, D)]),
        (nn.InstanceNorm2d(D, affine=True), [(2, D, 4, 4)]),
        (parametrization(parametrizations.weight_norm), [(D, 1)]),
        (parametrization(parametrizations.spectral_norm), [(D, D)]),
        (nn.LocalResponseNorm(2), [(2, D, 4, 4)]),
        (nn.CrossMapLRN2d(2), [(2, D, 4, 4)]),
        (nn.GroupNorm(4, D), [(2, D, 4, 4)]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_of_other_kinds_deserve_no_verdict(module, shapes):
    found = recognize_norm(module, shapes)
    assert isinstance(found, NotRecognized)
    assert not found.near


class _Objects(TorchDispatchMode):
    """A foreign mode in which nothing may be computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is called")


@pytest.mark.parametrize("around", ["memory.fake", "a mode"])
def test_modes_around_are_not_asked(around):
    expected = recognize_norm(nn.LayerNorm(D), ((2, D),)), recognize_activation(nn.GELU())
    kind = recognize_linear(nn.Linear(D, 3))
    build = lambda: nn.Sequential(nn.LayerNorm(D), nn.GELU(), nn.Linear(D, 3))  # noqa: E731
    if around == "a mode":
        model, block = build(), _Objects()
    else:
        block = lomem.memory.fake(build)
    with block as made:
        norm, activation, linear = model if around == "a mode" else made
        assert (recognize_norm(norm, ((2, D),)), recognize_activation(activation)) == expected
        assert recognize_linear(linear) == kind


def test_a_fake_norm_is_recognized():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        norm = nn.LayerNorm(D)
        inside = recognize_norm(norm, SHAPES)
        activation = recognize_activation(nn.GELU())
    with torch.device("meta"):
        meta = recognize_norm(nn.LayerNorm(D), SHAPES)
    assert inside == recognize_norm(norm, SHAPES) == meta == recognize_norm(nn.LayerNorm(D), SHAPES)
    assert activation == recognize_activation(nn.GELU())


def test_recognition_does_not_depend_on_what_is_set_around_it():
    expected = recognize_norm(nn.LayerNorm(D), SHAPES), recognize_activation(nn.SiLU())

    def found():
        return recognize_norm(nn.LayerNorm(D), SHAPES), recognize_activation(nn.SiLU())

    with torch.autocast("cpu", torch.bfloat16):
        assert found() == expected
    with torch.inference_mode():
        assert found() == expected
    with torch.no_grad():
        assert found() == expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert found() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_functions_inside_are_run_as_they_are_written():
    compiled = torch.compile(lambda x: F.gelu(x), backend=lambda graph, inputs: pytest.fail("it is compiled"))
    assert isinstance(recognize_activation(Function(lambda m, x: compiled(x))), ActivationForm)
    clamped = torch.compile(lambda x: F.gelu(x).clamp(max=99), backend=lambda graph, inputs: pytest.fail("so is it"))
    assert "clamp" in recognize_activation(Function(lambda m, x: clamped(x))).reason


WIDTHS = {
    "layer norm": lambda width: nn.LayerNorm(width),
    "layer norm, tiny eps": lambda width: nn.LayerNorm(width, eps=1e-12),
    "layer norm, no eps": lambda width: nn.LayerNorm(width, eps=0.0),
    "RMS norm": lambda width: nn.RMSNorm(width),
    "RMS norm, no eps": lambda width: nn.RMSNorm(width, eps=0.0),
    "casting": lambda width: LayerNormFp32(width),
    "several dimensions": lambda width: nn.LayerNorm((3, width)),
}


@pytest.mark.parametrize("width", [2, 3, 5, 8, 33, 257, 2000])
@pytest.mark.parametrize("name", WIDTHS)
def test_a_norm_of_every_width_is_recognized(name, width):
    # For two elements, a layer norm leaves only signs, and almost no gradient.
    module = WIDTHS[name](width)
    inner = module.normalized_shape
    for shapes in ([(4, *inner)], [(2, 3, *inner)], [inner, (2, 2, *inner)]):
        form = recognize_norm(module, shapes)
        assert isinstance(form, NormForm), form
        assert form.shape == inner
        assert form.ranks == tuple(len(shape) for shape in shapes)
