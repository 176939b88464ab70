"""Converting activations and calls of activation functions in hand-made models."""

import copy
import itertools
import math
import pickle
from functools import partial

import lomem
import lomem.functional as LF
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import STRETCHED_SILU
from helpers import PUBLISHED
from lomem.memory import saved_for_backward
from small_models import D, batch, make, results
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

CRITERIA = ["derivative", "primitive", "paper"]


def steps_of(function, bits, criterion):
    if criterion == "paper":
        gelu, silu = PUBLISHED.values()
        return (silu if function == "silu" else gelu).step
    return LF.step_function(function, bits, criterion=criterion)


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, lambda: nn.GELU("tanh")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_change_no_bit_of_the_output(activation, dtype, device):
    model, x = make(activation=activation, dtype=dtype).to(device), batch(dtype).to(device)
    y = model(x)
    report = lomem.convert(model, x, norms="keep", pairs="keep")
    assert [d.action for d in report.decisions if d.kind == "activation"] == ["4bit"] * 2
    assert report.difference == 0
    assert torch.equal(model(x), y)
    assert model(x).requires_grad
    with torch.no_grad():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_composite_activation_keeps_its_forward_and_gets_the_step_function_of_its_kind(criterion):
    class Quick(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None].requires_grad_()
    model = nn.Sequential(Quick())
    y = model(x)
    lomem.convert(model, x, activations="2bit", criterion=criterion)
    with saved_for_backward() as saved:
        z = model(x)
    assert torch.equal(y, z)
    assert saved.nbytes == (x.numel() + 3) // 4
    (gradient,) = torch.autograd.grad(z.sum(), x)
    # h(x) = silu(1.702 x) / 1.702, so h'(x) = silu'(1.702 x).
    expected = steps_of("silu", 2, criterion)
    codes = sum((1.702 * x.detach() > c).long() for c in expected.boundaries)
    assert torch.equal(gradient, torch.tensor(expected.levels, dtype=torch.float64)[codes])


def test_an_activation_whose_input_is_kept_anyway_is_left():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.act, self.down = nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(D, D)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, dim=-1)  # one storage; the product saves the other half
            return self.down(self.act(gate) * up)

    with pytest.raises(ValueError, match=r"SiLU \(its input is also saved by 1\)"):
        lomem.convert(make(Packed, depth=1), batch(), pairs="keep")


class Spelled(nn.Module):
    """An activation that is not a single torch op."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * torch.sigmoid(self.scale * x)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


FEW_BIT = {
    "GELU": (nn.GELU, LF.gelu),
    "GELU tanh": (lambda: nn.GELU("tanh"), partial(LF.gelu, approximate="tanh")),
    "SiLU": (nn.SiLU, LF.silu),
    "SiLU in place": (lambda: nn.Sequential(nn.Linear(D, D), nn.SiLU(inplace=True)), LF.silu),
    "stretched": (partial(Spelled, 1.702), getattr(LF, STRETCHED_SILU)),
    "mirrored": (partial(Spelled, -1.0), lambda x, bits: -LF.silu(-x, bits=bits)),
    "called GELU": (partial(Called, F.gelu), LF.gelu),
    "called SiLU": (partial(Called, F.silu), LF.silu),
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", FEW_BIT)
def test_activations_of_more_and_fewer_bits(name, bits, device):
    make_module, few_bit = FEW_BIT[name]
    model, x = nn.Sequential(nn.Linear(D, D), make_module()).to(device), batch().to(device)
    y = model(x)
    report = lomem.convert(model, x, activations=f"{bits}bit", rounding="nearest")
    converted = [d for d in report.decisions if d.kind != "norm"]
    assert [d.action for d in converted] == [f"{bits}bit"]
    tensors = 2 if isinstance(model[1], Spelled) else 1  # x and the sigmoid
    assert [d.saved_bytes for d in converted] == [4 * tensors * y.numel() - y.numel() * bits // 8]
    assert report.saved_before - report.saved_after == converted[0].saved_bytes
    z = model(x)
    assert torch.equal(y, z)
    weight = model[0].weight
    (gradient,) = torch.autograd.grad(z.square().sum(), weight)

    inner = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hidden = x
    for linear in inner:
        hidden = linear(hidden)
    (expected,) = torch.autograd.grad(few_bit(hidden, bits=bits).square().sum(), weight)
    # The GEMM adds in the same order; gradients differ only where a boundary was divided by a scale.
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(torch.autograd.grad(again(x).square().sum(), again[0].weight)[0], gradient)
    lomem.restore(model)
    assert not any(k.startswith("lomem") for m in model.modules() for k in vars(m))


class Before(nn.Module):
    """Produces the activation's input, so that it is not an input of the model."""

    def forward(self, x):
        return x * 1.0


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x * 1.0)


#: The converted module, its step function, and the scale of the latter.
EXACT = {
    "GELU": (nn.GELU, "gelu", 1.0),
    "GELU tanh": (lambda: nn.GELU("tanh"), "gelu_tanh", 1.0),
    "SiLU": (nn.SiLU, "silu", 1.0),
    "stretched": (partial(Spelled, 1.702), "silu", 1.702),
    "mirrored": (partial(Spelled, -1.0), "silu", -1.0),
    "F.gelu": (partial(Applied, F.gelu), "gelu", 1.0),
    "F.gelu tanh": (partial(Applied, partial(F.gelu, approximate="tanh")), "gelu_tanh", 1.0),
    "F.silu": (partial(Applied, F.silu), "silu", 1.0),
}


def places(steps, scale):
    """Numbers at and next to all boundaries, and many others."""
    c = torch.tensor(steps.boundaries, dtype=torch.float64) / scale
    beside = [torch.nextafter(c, torch.full_like(c, end)) for end in (-math.inf, math.inf)]
    return torch.cat([c, *beside, torch.linspace(-9, 9, 2001, dtype=torch.float64)])


def levels_at(x, steps, scale):
    """The derivative, by torch's own search. Ties belong to the interval below."""
    boundaries = torch.tensor(steps.boundaries, dtype=torch.float64) / scale
    levels = torch.tensor(steps.levels, dtype=torch.float64)
    if scale < 0:
        boundaries, levels = boundaries.flip(0), levels.flip(0)
    return levels[torch.bucketize(x, boundaries)]


def gradient_of(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x)[0]


@pytest.mark.parametrize(
    ("bits", "criterion"),
    [*itertools.product(range(1, 9), ["derivative", "primitive"]), (2, "paper")],
)
@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_is_that_of_the_step_function(name, bits, criterion):
    make_module, function, scale = EXACT[name]
    model = nn.Sequential(Before(), make_module())
    options = {"activations": f"{bits}bit", "criterion": criterion}
    x = torch.randn(5, dtype=torch.float64)
    steps = steps_of(function, bits, criterion)
    report = lomem.convert(model, x.requires_grad_(), **options)
    assert [d.action for d in report.converted] == [f"{bits}bit"]
    x = places(steps, scale)
    assert torch.equal(gradient_of(model, x), levels_at(x, steps, scale))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(gradient_of(again, x), levels_at(x, steps, scale))


@pytest.mark.parametrize("make_module", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU])
def test_more_bits_are_nearer_to_the_derivative(make_module):
    # Relative error in the 2-norm, for inputs from the standard normal distribution.
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    exact = gradient_of(make_module(), x)
    errors = []
    for bits in range(1, 9):
        model = nn.Sequential(make_module())
        lomem.convert(model, activations=f"{bits}bit", rounding="nearest")
        difference = gradient_of(model, x) - exact
        errors.append(((weight * difference.square()).sum() / (weight * exact.square()).sum()).sqrt().item())
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))
    if isinstance(make_module(), nn.GELU):
        assert errors[:2] == pytest.approx([0.3201, 0.1411], abs=1e-4)


def test_one_criterion_is_the_default_of_every_width():
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    for bits in range(1, 9):
        models = [nn.Sequential(nn.GELU()) for _ in range(3)]
        lomem.convert(models[0], activations=f"{bits}bit", rounding="nearest")
        lomem.convert(models[1], activations=f"{bits}bit", criterion="derivative")
        lomem.convert(models[2], activations=f"{bits}bit", criterion="derivative", rounding="nearest")
        first, *others = (gradient_of(model, x) for model in models)
        assert all(torch.equal(first, other) for other in others)


def drawn_as(options, bits):
    """Whether an activation draws codes of this many bits after a conversion with these options."""
    model, x = nn.Sequential(nn.GELU()), torch.linspace(-9, 9, 2001, dtype=torch.float64)
    lomem.convert(model, **options)
    lomem.random.manual_seed(7)
    gradient = gradient_of(model, x)
    lomem.random.manual_seed(7)
    return torch.equal(gradient, gradient_of(partial(LF.gelu, bits=bits, rounding="stochastic"), x))


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 4),
        ({"rounding": "stochastic"}, 4),
        ({"bits": 8}, 8),
        ({"bits": 4}, 4),
        ({"bits": 2}, 2),
        *(({"activations": f"{bits}bit"}, bits) for bits in range(1, 9)),
        ({"bits": 8, "activations": "3bit"}, 3),
    ],
    ids=str,
)
def test_codes_are_drawn_unless_a_step_function_is_asked_for(options, bits):
    assert drawn_as(options, bits)


@pytest.mark.parametrize(
    ("options", "bits", "criterion"),
    [
        ({"rounding": "nearest"}, 4, "derivative"),
        ({"criterion": "derivative"}, 4, "derivative"),
        ({"criterion": "primitive"}, 4, "primitive"),
        ({"criterion": "primitive", "rounding": "nearest"}, 4, "primitive"),
        ({"criterion": "paper"}, 2, "paper"),
        ({"criterion": "paper", "rounding": "nearest"}, 2, "paper"),
        ({"bits": 2, "criterion": "paper"}, 2, "paper"),
        ({"bits": 8, "rounding": "nearest"}, 8, "derivative"),
        ({"activations": "3bit", "criterion": "primitive"}, 3, "primitive"),
    ],
    ids=str,
)
def test_step_functions_are_asked_for(options, bits, criterion):
    model = nn.Sequential(nn.GELU())
    lomem.convert(model, **options)
    steps = steps_of("gelu", bits, criterion)
    x = places(steps, 1.0)
    assert torch.equal(gradient_of(model, x), levels_at(x, steps, 1.0))


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 6, 7, 8])
def test_the_paper_has_step_functions_of_2_bits_alone(bits):
    model = nn.Sequential(nn.GELU())
    with pytest.raises(ValueError, match=f"activations is '{bits}bit', expected '2bit' with criterion='paper'"):
        lomem.convert(model, activations=f"{bits}bit", criterion="paper")
    assert type(model[0]) is nn.GELU


def test_the_paper_is_asked_for_by_name():
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    model = nn.Sequential(nn.GELU(), nn.SiLU())
    lomem.convert(model, criterion="paper")
    for module, published in zip(model, PUBLISHED.values(), strict=True):
        assert torch.equal(gradient_of(module, x), gradient_of(published.op, x))
    with pytest.raises(ValueError, match="found nothing to convert"):  # and does not mention norms
        lomem.convert(nn.Sequential(nn.LayerNorm(D)), activations="keep", criterion="paper")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_step_functions_are_looked_up_once_and_follow_the_scale(criterion, monkeypatch):
    model = nn.Sequential(Before(), Spelled(1.702))
    lomem.convert(model, activations="2bit", criterion=criterion)
    steps = steps_of("silu", 2, criterion)

    def refuse(*args, **kwargs):
        raise AssertionError("looked up again")

    monkeypatch.setattr(LF, "step_function", refuse)
    resolved = model[1].lomem_steps
    for scale in (1.702, 2.5, -0.75, 1.0):
        model[1].scale = scale
        x = places(steps, scale)
        assert torch.equal(gradient_of(model, x), levels_at(x, steps, scale))
        first = model[1].lomem_steps
        gradient_of(model, x)
        assert model[1].lomem_steps is first
        assert (first is resolved) == (scale == 1.702)


def test_functional_calls_are_replaced():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.c(F.silu(self.b(F.gelu(self.a(x), approximate="tanh"))))

    model, x = make(Functional, depth=1), batch()
    y = model(x)
    report = lomem.convert(model, x, pairs="keep")
    assert [(d.name, d.kind, d.action) for d in report.decisions] == [("1", "call", "4bit")]
    assert torch.equal(model(x), y)
    assert report.saved_before - report.saved_after == 2 * (4 * x.numel() - x.numel() // 2 - 8)


def test_a_functional_call_in_place_is_left_to_torch():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.b(F.silu(self.a(x), inplace=True)) + self.b(F.gelu(self.a(x)))

    model, x = make(InPlace, depth=1), batch()
    y, _ = results(model, x)
    lomem.convert(model, x)
    assert torch.equal(results(model, x)[0], y)


def test_an_activation_that_writes_to_its_input_goes_on_doing_so():
    class InPlace(nn.Module):
        def forward(self, x):
            return F.silu(x, inplace=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(D, D), InPlace(), nn.Linear(D, D)

        def forward(self, x):
            h = self.a(x)
            self.act(h)
            return self.b(h)

    model, x = Model(), batch()
    y = model(x)
    lomem.convert(model, x)
    assert torch.equal(model(x), y)


def test_torchs_own_encoder_is_converted():
    layer = nn.TransformerEncoderLayer(D, 2, 4 * D, dropout=0.0, activation="gelu", batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), batch()
    for mode in (True, False):
        model.train(mode)
        y = model(x)
        with torch.no_grad():
            fast = model(x)
        assert lomem.convert(model, x, norms="keep").difference == 0
        assert torch.equal(model(x), y)
        with torch.no_grad():
            assert torch.equal(model(x), fast)
        lomem.restore(model)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = True
    assert lomem.convert(model, {"src": x, "src_key_padding_mask": mask}).converted


def test_what_is_excluded_is_not_reached_by_a_call_outside_of_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Linear(D, D), nn.GELU()

        def forward(self, x):
            return self.act(F.gelu(input=self.a(x)))

    model, x = nn.Sequential(Outer(), nn.Linear(D, D)), batch()
    report = lomem.convert(model, x, exclude=["0.act"], dry_run=True)
    assert {d.name: d.reason for d in report.left} == {
        "0": "0.act inside it is not converted",
        "0.act": "it is excluded",
    }
    report = lomem.convert(model, x, pairs="keep")
    assert len(report.converted) == 2
    assert report.saved_before - report.saved_after == 2 * (4 * x.numel() - x.numel() // 2 - 8)


@pytest.mark.parametrize(
    "options",
    [
        {"pairs": "keep"},
        {"activations": "1bit"},
        {"activations": "2bit", "criterion": "derivative"},
        {"activations": "3bit", "criterion": "primitive"},
        {"criterion": "paper"},
    ],
    ids=str,
)
def test_converted_activations_compile(options):
    torch.compiler.reset()
    modules = [nn.GELU("tanh"), Spelled(1.702), nn.SiLU(), Called(F.gelu), Called(F.silu)]
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), module) for module in modules)), batch()
    report = lomem.convert(model, x, gradients=False, **{"pairs": "keep"} | options)
    assert len(report.converted) == len(modules)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (model, compiled):
        lomem.random.manual_seed(0)  # of the codes that are drawn
        gradients.append(gradient_of(function, x))
    gradient, in_a_graph = gradients
    # A matrix product may add in a different order.
    torch.testing.assert_close(in_a_graph, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
    torch.compiler.reset()
