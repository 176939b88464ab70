"""Converted models that keep what pairs and norms start from in groups: gradients, bytes, random numbers."""

import copy
import functools

import lomem
import pytest
import torch
import torch.nn.functional as F
from lomem._trace import groups
from small_pairs import (
    DTYPES,
    PAIRS,
    D,
    Gated,
    H,
    Modulated,
    QuickGELU,
    Ungated,
    distance,
    gradients,
    living_bytes,
    make,
)
from test_pairs import AROUND, INSIDE, TWICE, second_derivatives
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

#: Largest relative error of all gradients together. A number that is brought back has an error of at most half a step,
#: and a step is the largest number of its group / 127: for normal numbers, a standard deviation of 0.007. Small models
#: have few numbers to average over.
ERROR = 0.02


@functools.cache
def _built(name, dtype, bits):
    return make(PAIRS[name].make, dtype, bits=bits)[:2]


def made(name, dtype=torch.float32, bits=8):
    plain, model = copy.deepcopy(_built(name, dtype, bits))
    return plain, model, make(name, dtype)[2]


def in_groups(model):
    """Numbers of bits of the modules that keep something in groups."""
    found = [getattr(module, "lomem_storage", None) for module in model.modules()]
    found += [getattr(getattr(module, "lomem_norm", None), "storage", None) for module in model.modules()]
    return {bits for bits in found if bits is not None}


#: Those that have nothing to keep in groups: no pair of an activation, and no norm.
WITHOUT = {"residual dropout", "adapters of a result", "wide adapters of a result"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_results_are_unchanged_and_gradients_close(name, dtype):
    dtype, tolerance = DTYPES[dtype]
    plain, model, x = made(name, dtype)
    assert in_groups(model) == (set() if name in WITHOUT else {8})
    before, expected = gradients(plain, x, dtype=dtype)
    after, grads = gradients(model, x, dtype=dtype)
    assert after.dtype == before.dtype
    if not PAIRS[name].rounds:
        assert torch.equal(after, before)
    assert {n: (g.dtype, g.shape) for n, g in grads.items()} == {n: (g.dtype, g.shape) for n, g in expected.items()}
    assert distance(grads, expected) < ERROR + tolerance


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [name for name in PAIRS if name not in WITHOUT])
def test_the_mean_of_gradients_is_exact(name, bits):
    # What a wrong formula gets wrong does not average out. The bias of second order is below the error of a mean.
    plain, model, x = made(name, torch.float64, bits)
    _, expected = gradients(plain, x, dtype=torch.float64)
    draws = 100
    errors, mean = [], {n: torch.zeros_like(g) for n, g in expected.items()}
    for _ in range(draws):
        _, grads = gradients(model, x, dtype=torch.float64)
        errors.append(distance(grads, expected))
        mean = {n: g + grads[n] / draws for n, g in mean.items()}
    one = sum(errors) / draws
    assert 0 < one < ERROR * (18 if bits == 4 else 1)
    # A tenth, were there no bias, with a deviation of a few percent of it. At 4 bits, steps are 18 times as large, and
    # the bias, which grows with their square, is up to 1 %.
    assert distance(mean, expected) < 0.15 * one + (0.01 if bits == 4 else 0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gelu", "gated silu", "fused", "called gelu", "gated call", "QuickGELU", "reused"])
@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_alive(name, dtype, bits):
    dtype, _ = DTYPES[dtype]
    _, model, x = made(name, dtype, bits)
    rows, saved = x[..., 0].numel(), PAIRS[name].saved
    inputs = saved // H  # of activations and products, of rows * H numbers each
    numel = rows * H
    each = (numel * bits + 7) // 8 + 2 * -(-numel // 128) + 8  # and a seed
    result = rows * D * dtype.itemsize
    others = rows * (saved % H) * dtype.itemsize
    # The model's result is alive too.
    assert living_bytes(model, x, dtype=dtype) == inputs * each + others + result


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("name", PAIRS)
def test_whatever_is_around(name, way, dtype):
    dtype, tolerance = DTYPES[dtype]
    run = AROUND[way]
    plain, model, x = made(name, dtype)
    before, expected = gradients(plain, x, run, dtype)
    after, grads = gradients(model, x, run, dtype)
    if not PAIRS[name].rounds:
        assert torch.equal(after, before)
    assert distance(grads, expected) < ERROR + tolerance
    if way != "cloning":
        assert living_bytes(model, x, run, dtype) <= living_bytes(plain, x, run, dtype)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("region", INSIDE)
def test_checkpointed_regions_inside(region, reentrant):
    class Model(INSIDE[region]):
        c = staticmethod(lambda function, *args: function(*args))

    plain, model, x = make(Model, bits=8)
    Model.c = staticmethod(lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant))
    before, expected = gradients(plain, x)
    after, grads = gradients(model, x)
    assert torch.equal(after, before)
    assert distance(grads, expected) < ERROR
    assert living_bytes(model, x) <= living_bytes(plain, x)


@pytest.mark.parametrize("way", TWICE)
@pytest.mark.parametrize("name", PAIRS)
def test_a_second_backward_pass(name, way):
    # What is saved is the same in both.
    _, model, x = made(name)
    loss = AROUND[way](model, x).square().mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


@pytest.mark.parametrize("name", PAIRS)
def test_second_derivatives(name):
    plain, model, x = made(name, torch.float64)
    if name in WITHOUT:
        assert distance(second_derivatives(model, x), second_derivatives(plain, x)) < 1e-10
        return
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        second_derivatives(model, x)


# Random numbers.


class WithDropout(nn.Module):
    """Draws between what is kept in groups."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Gated(), Modulated(), Ungated()

    def forward(self, x):
        for block in (self.first, self.second, self.third):
            x = x + F.dropout(block(x), 0.3, self.training)
        return x


@pytest.mark.parametrize("way", ["none", *(way for way in AROUND if way != "none")])
def test_other_random_numbers_are_unchanged(way):
    plain, model, x = make(WithDropout, bits=8)
    assert in_groups(model) == {8}
    outcomes = []
    for m in (plain, model):
        torch.manual_seed(5)
        y, grads = gradients(m, x, AROUND[way])
        outcomes.append((y, grads, torch.rand(3)))
    (y, expected, after), (z, grads, after_too) = outcomes
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)  # a norm's roundings
    assert torch.equal(after, after_too)
    # Had dropout drawn other numbers when recomputed, the error would be about 1.
    assert distance(grads, expected) < ERROR


def test_each_pass_draws_anew_and_a_program_repeats():
    def passes():
        torch.manual_seed(7)
        _, model, x = make(Gated, bits=8)
        return [gradients(model, x)[1] for _ in range(3)]

    first, second = passes(), passes()
    for a, b in zip(first, second, strict=True):
        assert distance(a, b) == 0
    assert 0 < distance(first[0], first[1]) < ERROR
    assert 0 < distance(first[1], first[2]) < ERROR


def test_lomem_random_restarts_the_numbers():
    _, model, x = make(Gated, bits=8)
    results = []
    for _ in range(2):
        lomem.random.manual_seed(3)
        results.append(gradients(model, x)[1])
    assert distance(*results) == 0


# Bias: of second order where the function of what is brought back is not linear.


def phi(x):
    return torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


#: Functions that pairs compute, with their second derivatives by autograd.
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu's derivative": lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)) + x * phi(x),
    "silu": F.silu,
    "silu's derivative": lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))),
}


def second_derivative(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


def brought_back(x, bits, times):
    """Rows: what comes back of a tensor of whole groups, each time with other random numbers."""
    rows = x.float().repeat(times, 1)
    kept, load = groups.store(rows, bits)
    return load(*kept).double()


def variance(x, bits):
    """Of the noise: a twelfth of the square of the step, the largest number of the group / 127 or 7, as a bfloat16."""
    (_, scales, _), _ = groups.store(x.float(), bits)
    return (scales.view(torch.bfloat16).double() ** 2 / 12).repeat_interleave(128)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bias_of_functions(name, bits):
    f, draws = FUNCTIONS[name], 20_000
    x = torch.randn(1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float().double()
    lomem.random.manual_seed(0)
    total, squares = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(draws // 1000):
        values = f(brought_back(x, bits, 1000)) - f(x)
        total += values.sum(0)
        squares += values.square().sum(0)
    bias, error = total / draws, (squares / draws).sum().div(draws).sqrt()
    predicted = second_derivative(f, x) * variance(x, bits) / 2
    # Of 1024 elements together, the statistical error varies by a few percent. The fourth order is 1 % of the second
    # at 4 bits, and none at 8.
    assert (bias - predicted).norm() < 1.15 * error + (0.02 * predicted.norm() if bits == 4 else 0)
    assert predicted.norm() < {8: 1e-4, 4: 1e-2}[bits] * f(x).norm()
    # It is there: in its own direction, the mean shows it.
    along = (bias * predicted).sum() / predicted.square().sum()
    deviation = (squares / draws * predicted.square()).sum().div(draws).sqrt() / predicted.square().sum()
    assert abs(along - 1) < 5 * deviation + (0.02 if bits == 4 else 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bias_of_a_norm_s_own_gradient(bits):
    n, draws = 128, 20_000
    generator = torch.Generator().manual_seed(0)
    y, g = torch.randn(2, n, dtype=torch.float64, generator=generator).float().double()
    y = (y - y.mean()) / y.std(correction=0)

    def gradient(y):
        return g - g.mean() - y * (g * y).mean(-1, keepdim=True)

    lomem.random.manual_seed(0)
    values = torch.cat([gradient(brought_back(y.float(), bits, 1000)) for _ in range(draws // 1000)])
    values = values - gradient(y.float().double())
    bias, error = values.mean(0), values.square().mean(0).sum().div(draws).sqrt()
    predicted = -g * variance(y, bits) / n
    assert (bias - predicted).norm() < 1.3 * error  # 128 elements
    assert predicted.norm() < {8: 1e-6, 4: 3e-4}[bits] * gradient(y).norm()


def test_the_bias_of_a_linear_layer_is_none():
    # The weight gradient of a layer that takes a norm's output, over many draws: noise that averages out.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 64), nn.LayerNorm(64), nn.Linear(64, D)).double()
    x = torch.randn(2, 8, D, dtype=torch.float64)
    _, expected = gradients(model, x, dtype=torch.float64)
    lomem.convert(model, x, norms="8bit")
    assert in_groups(model) == {8}
    lomem.random.manual_seed(0)
    name, draws = "2.weight", 1000
    errors = torch.stack([gradients(model, x, dtype=torch.float64)[1][name] - expected[name] for _ in range(draws)])
    mean, deviation = errors.mean(0), errors.std(0) / draws**0.5
    assert (mean.abs() < 5 * deviation).all()
    # Chi-square of 1024 elements, which are correlated along 16 columns, has a deviation of about 10 %.
    assert (mean / deviation).square().mean() < 1.5


# The dial.


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, set()),
        ({"bits": 16}, set()),
        ({"bits": 8}, {8}),
        ({"bits": 4}, {4}),
        ({"bits": 2}, {4}),
        ({"pairs": "8bit"}, {8}),
        ({"norms": "4bit"}, {4}),
        ({"pairs": "8bit", "norms": "4bit"}, {8, 4}),
        ({"bits": 4, "pairs": "8bit", "norms": "auto"}, {8}),
        ({"bits": 8, "pairs": "keep", "norms": "keep", "activations": "2bit"}, set()),
    ],
)
def test_options(options, kept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), Ungated())
    lomem.convert(model, torch.randn(4, 8, D, requires_grad=True), **options)
    assert in_groups(model) == kept


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_activations_that_no_linear_layer_follows_have_codes(bits):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3))
    report = lomem.convert(model, torch.randn(2, 3, 8, 8), bits=bits)
    assert [str(d.action) for d in report.converted] == [f"{bits}bit"]


def test_fewer_bits_never_save_more():
    # Each option by itself, and the dial.
    def saved(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(D), Gated(), nn.LayerNorm(D), Ungated(), nn.Linear(D, D), nn.GELU())
        return lomem.convert(model, torch.randn(8, 16, D, requires_grad=True), **options).saved_after

    for name in ("pairs", "norms"):
        sizes = [saved(**{name: value}) for value in ("auto", "8bit", "4bit")]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > sizes[-1]
    sizes = [saved(bits=bits) for bits in (16, 8, 4, 2)]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == 4


def test_what_others_save_too_stays_as_it_is():
    class Both(nn.Module):
        """The activation's input is saved by another op."""

        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

        def forward(self, x):
            u = self.up(x)
            return self.down(self.act(u)) + u.tanh().mean() + (u * u).mean()

    plain, model, x = make(Both, bits=8)
    assert in_groups(model) == set()
    assert living_bytes(model, x) <= living_bytes(plain, x)


@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_norms_with_small_weights(scale):
    # Their output is not what is kept: it would lose channels whose weight is small.
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.linear = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
            with torch.no_grad():
                self.norm.weight[::2] *= scale

        def forward(self, x):
            return self.linear(self.norm(self.stem(x)))

    plain, model, x = make(Small, bits=8)
    assert in_groups(model) == {8}
    _, expected = gradients(plain, x)
    _, grads = gradients(model, x)
    # The gradient of each weight by itself.
    for name, grad in grads.items():
        assert distance({name: grad}, {name: expected[name]}) < ERROR, name


def test_without_gradients_nothing_is_stored():
    _, model, x = made("gated silu")
    state = lomem.random.get_state()
    with torch.no_grad():
        model(x)
    assert lomem.random.get_state() == state


# Around and between.


def to_numpy(block, x):
    """Packs to what knows neither bfloat16 nor graphs."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy):
        return block(x)


@pytest.mark.parametrize("name", ["gelu", "gated silu", "modulated", "adapters of a norm and a dropout"])
def test_hooks_that_know_no_bfloat16(name):
    plain, model, x = made(name)
    _, expected = gradients(plain, x, to_numpy)
    _, grads = gradients(model, x, to_numpy)
    assert distance(grads, expected) < ERROR


@pytest.mark.parametrize("value", [-30.0, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("act", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, QuickGELU])
@pytest.mark.parametrize("block", [Ungated, Gated])
def test_fill_values_of_masks_do_no_harm(block, act, value):
    class Masked(block):
        def __init__(self):
            super().__init__(act)
            first = getattr(self, "gate", self.up)
            first.register_forward_hook(lambda module, args, result: result.masked_fill(self.mask, value))
            self.mask = torch.zeros(2, 9, 1, dtype=torch.bool)
            self.mask[:, 6:] = True

        def forward(self, x):
            return super().forward(x)[:, :6]

    plain, model, x = make(Masked, bits=8)
    assert in_groups(model) == {8}
    _, expected = gradients(plain, x)
    _, grads = gradients(model, x)
    assert distance(grads, expected) < 2 * ERROR  # a step is as large as 20 / 127 where SiLU's input is cut off there


@pytest.mark.parametrize("ill", [False, True])
def test_parameters_that_are_freed_between_forward_and_backward(ill):
    # As those of a module that FSDP shards: back again for the module's own backward pass, which comes after that of
    # the linear layers that take its result.
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.linear = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
            with torch.no_grad():
                self.norm.weight.uniform_(0.5, 1.5)
                self.norm.bias.uniform_(-1, 1)
                self.norm.weight[0] = 0 if ill else 1

        def forward(self, x):
            return self.linear(self.norm(self.stem(x)))

    _, model, x = make(Model, bits=8)
    lomem.random.manual_seed(0)
    _, expected = gradients(model, x)
    values = {p: p.detach().clone() for p in model.norm.parameters()}

    def gather(_):
        for p, value in values.items():
            p.data.copy_(value)

    def free(module, args, result):
        for p in values:
            p.data.fill_(torch.nan)
        result.register_hook(gather)

    model.norm.register_forward_hook(free)
    lomem.random.manual_seed(0)
    _, grads = gradients(model, x)
    assert distance(grads, expected) == 0


class Scaled(nn.Module):
    """What cheap ops make of results that are also used otherwise."""

    def __init__(self, forward):
        super().__init__()
        self.up, self.act, self.norm, self.linear = nn.Linear(D, H), nn.GELU(), nn.LayerNorm(H), nn.Linear(H, H)
        self.scale, self.function = nn.Parameter(torch.rand(H)), forward

    def forward(self, x):
        return self.function(self, self.up(x))


USES = {
    "no linear layer": lambda m, u: m.act(u) * m.scale,
    "product last": lambda m, u: (lambda h: m.linear(h) + h * m.scale)(m.act(u)),
    "product first": lambda m, u: (lambda h: h * m.scale + m.linear(h))(m.act(u)),
    "another factor": lambda m, u: (lambda h: m.linear(h) + h * u.sigmoid())(m.act(u)),
    "a norm": lambda m, u: (lambda n: m.linear(n) + n * m.scale)(m.norm(u)),
    "a norm, its input used": lambda m, u: (lambda n: m.linear(n) + n * m.scale + u * u)(m.norm(u)),
    "a norm, product first": lambda m, u: (lambda n: n * m.scale + m.linear(n * m.scale))(m.norm(u)),
}


@pytest.mark.parametrize("way", ["none", "detaching", "save_on_cpu"])
@pytest.mark.parametrize("bits", [None, 16, 8, 4])
@pytest.mark.parametrize("name", USES)
def test_results_that_are_also_used_otherwise(name, bits, way):
    torch.manual_seed(0)
    model, x = Scaled(USES[name]), torch.randn(2, 9, D)
    plain = copy.deepcopy(model)
    try:
        report = lomem.convert(model, x, bits=bits)
    except lomem.conversion.NothingToConvertError:
        return
    freed = report.saved_before - report.saved_after
    assert sum(d.saved_bytes for d in report.decisions) == freed > 0
    _, expected = gradients(plain, x, AROUND[way])
    _, grads = gradients(model, x, AROUND[way])
    assert distance(grads, expected) < (18 * ERROR if bits == 4 else ERROR if bits == 8 else 2e-6)
    before, after = (living_bytes(m, x, AROUND[way]) for m in (plain, model))
    assert after <= before
    if way != "save_on_cpu":  # which shares nothing
        # Besides, small operands, of a row each.
        assert before - after >= freed - 4 * H * x.element_size()
