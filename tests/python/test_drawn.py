"""Codes drawn at random: right in the mean, with the noise that is stated, from numbers that have nothing in common."""

import copy
import itertools
import math

import lomem
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import SMOOTH
from helpers import DTYPES, LAYOUTS, all_patterns, make_input, same_bits
from lomem import reference
from torch import nn
from torch.utils.checkpoint import checkpoint

LF = lomem.functional
ops = torch.ops.lomem
of_functions = pytest.mark.parametrize("name", SMOOTH)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_bits = pytest.mark.parametrize("bits", range(1, 9))
#: How far polynomials are from derivatives, relative to the range of these: interpolation, float32, and what is left of
#: a tail where pieces end are less than 4e-6 together. Those of mish are longer than its poles allow, and so are those
#: of softplus with a threshold that cuts off its tail at 15.
FIT = 4e-6
FIT_LONG = {"mish": 5e-6, "softplus-parameters": 3e-5}
INF, NAN = float("inf"), float("nan")


def uniform(seed, n, offset=0):
    """The random numbers of n elements, in (0, 1)."""
    words = reference.philox_words(seed, (n + 1) // 2, offset, rounds=7)
    halves = torch.stack([words & 0xFFFF, words >> 16], 1).flatten()[:n]
    return (halves.double() + 0.5) / 65536


def slope(name, x):
    """torch's derivative in float64, at elements rounded to float32."""
    # (Of numbers that overflow, torch's derivative is NaN. All limits are reached long before.)
    leaf = x.detach().cpu().float().double().clamp(-1e15, 1e15).requires_grad_()
    (result,) = torch.autograd.grad(SMOOTH[name][1](leaf).sum(), leaf)
    return result


def levels_of(name, bits):
    return LF.drawn_levels(SMOOTH[name][2], bits, parameters=SMOOTH[name][3])


def fit_of(name):
    return FIT_LONG.get(name, FIT)


def special_values(dtype, device):
    """Elements at which derivatives jump or have kinks, near them, and beyond all pieces."""
    # (Not softplus's threshold itself: whether that is exceeded depends on how torch rounds a product.)
    at = [0.0, 3.0, 6.0, 8.5, 16.0, 18.0, 1.17647, 1.17648]
    near = [math.nextafter(v, toward) for v in at for toward in (-INF, INF)]
    tiny = [1e-6, 1e-10, 2.0**-133, torch.finfo(dtype).tiny, torch.finfo(dtype).max, INF]
    values = torch.tensor([*at, *near, *tiny], dtype=torch.float64)
    return torch.cat([values, -values]).to(dtype).to(device)


@of_functions
@of_dtypes
@of_bits
def test_codes_are_those_of_the_derivative(bits, dtype, name, device):
    """For every element: the code plus its random number is at most 1 above the derivative, in units of a step."""
    if dtype.itemsize == 2:
        x = all_patterns(dtype, device)
        x = x[x.isfinite()]
    else:
        x = torch.cat([torch.linspace(-30, 30, 20011, dtype=dtype, device=device), special_values(dtype, device)])
    _, _, function, parameters = SMOOTH[name]
    seed, offset = 0x123456789ABCDEF, 5
    number = torch.tensor(seed, device=device)
    codes = ops.drawn_codes(x, function, parameters, bits, number, offset=offset)
    assert codes.shape == ((bits * x.numel() + 7) // 8,)
    code = LF.unpack_bits(codes, bits, x.numel()).cpu().double()
    levels = levels_of(name, bits)
    t = (slope(name, x) - levels.low) / levels.step
    above = code + uniform(seed, x.numel(), offset) - t
    # And half a unit of the random numbers, to which t is rounded.
    slack = fit_of(name) * (2**bits - 1) + 2.0**-16
    wrong = (above < -slack) | (above > 1 + slack)
    assert not bool(wrong.any()), (x.cpu()[wrong][:5], above[wrong][:5])


@of_functions
def test_levels_span_the_derivative(name):
    """The first and the last level are the least and the largest value of the derivative."""
    exact = slope(name, torch.cat([torch.linspace(-40, 40, 400001), special_values(torch.float32, "cpu")]))
    for bits in range(1, 9):
        levels = levels_of(name, bits)
        assert levels.bits == bits
        high = levels.low + levels.step * (2**bits - 1)
        # The grid has a distance of 2e-4, which is squared at a smooth extremum, but not at hardswish's jumps. The tail
        # of softsign ends at 6e-4.
        room = {"softsign": 1e-3, "hardswish": 1e-4}.get(name, 1e-6)
        assert levels.low == pytest.approx(float(exact.min()), abs=room)
        assert high == pytest.approx(float(exact.max()), abs=room)
        assert levels.deviation == pytest.approx(levels.step / 12**0.5)


POINTS = torch.tensor([-INF, -20.0, -6.5, -3.0, -2.1, -1.3, -0.7, -0.2, 0.0, 0.1, 0.6, 1.1, 1.9, 2.9, 3.5, 7.0, 19.0])
DRAWS = 1 << 14


@of_functions
@of_dtypes
@of_bits
def test_mean_and_variance(bits, dtype, name, device):
    """Over many draws: the mean is the derivative, the variance that of a uniform number within a step."""
    x = POINTS.to(dtype).to(device)
    many = x.repeat(DRAWS, 1).requires_grad_()
    seed = torch.tensor(77 + bits, device=device)
    SMOOTH[name][0](many, bits=bits, rounding="stochastic", seed=seed).sum().backward()
    grad, exact, levels = many.grad.double().cpu(), slope(name, x), levels_of(name, bits)
    scale = levels.step * (2**bits - 1)
    # Five standard errors, half a unit in the last place, and the polynomial.
    ulp = torch.finfo(dtype).eps * max(abs(levels.low), abs(levels.low + scale)) / 2
    assert bool(((grad.mean(0) - exact).abs() <= 5 * levels.deviation / DRAWS**0.5 + ulp + fit_of(name) * scale).all())
    if dtype.itemsize > 2:  # otherwise rounding to the dtype adds to it
        # A uniform number's fourth moment is 1.8 times its squared variance: five standard errors of the variance.
        ratio = (grad - exact).square().mean(0) / levels.deviation**2
        assert bool(((ratio - 1).abs() <= 5 * (0.8 / DRAWS) ** 0.5 + 1e-3).all()), ratio


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


def noise(x, seed, device, bits=2, offset=0):
    """Errors of a draw, in steps."""
    codes = ops.drawn_codes(x, "gelu", (), bits, torch.tensor(seed, device=device), offset=offset)
    levels = LF.drawn_levels("gelu", bits)
    grad = ops.drawn_activation_backward(
        torch.ones_like(x), codes, torch.tensor(seed, device=device), levels.low, levels.step, bits, offset=offset
    )
    return (grad.double().cpu() - slope("gelu", x)) / levels.step


def test_draws_have_nothing_in_common(device):
    """Neighbours, other seeds, other streams of one seed: five standard errors of a correlation of nothing."""
    n = 1 << 17
    x = torch.randn(n, device=device)
    first = noise(x, 1, device)
    limit = 5 / n**0.5
    for lag in (1, 2, 7, 8, 9, 64, 1024):
        assert abs(correlation(first[:-lag], first[lag:])) < limit
    for seed, offset in ((2, 0), (-1, 0), (1 << 32, 0), (1, 1), (1, 1 << 32), (1, 1 << 40)):
        assert abs(correlation(first, noise(x, seed, device, offset=offset))) < limit
    # Nor is there anything of the element itself in the noise (subtracted dither).
    assert abs(correlation(first, x.double().cpu())) < limit
    assert abs(correlation(first.square(), x.double().cpu().square())) < limit


def test_numbers_are_uniform():
    """Chi-square of the bits by value, over 256 classes, upper and lower half: within six standard deviations."""
    n = 1 << 20
    halves = (uniform(42, n) * 65536).floor().long()
    for byte in (halves >> 8, halves & 0xFF):
        seen = torch.bincount(byte, minlength=256).double()
        chi = float(((seen - n / 256).square() / (n / 256)).sum())
        assert abs(chi - 255) < 6 * (2 * 255) ** 0.5


def network(width=12, depth=6):
    torch.manual_seed(3)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), lomem.nn.GELU(bits=4, rounding="stochastic"))]
    return nn.Sequential(*layers, nn.Linear(width, 1)).double()


def gradient(model, x):
    (loss,) = (model(x).square().mean(),)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.cpu_kernels  # thousands of backward passes
def test_mean_gradient_of_a_network():
    """Its error falls as one over the root of the number of draws, to 1e-3 of the gradient."""
    model, x = network(), torch.randn(8, 12, dtype=torch.float64)
    for layer in model:
        if isinstance(layer, lomem.nn.GELU):
            layer.forward = layer.exact
    exact = gradient(model, x)
    for layer in model:
        vars(layer).pop("forward", None)
    lomem.random.manual_seed(0)
    total, errors, draws = torch.zeros_like(exact), {}, 0
    single = 0.0
    for number in (16, 256, 4096):
        while draws < number:
            drawn = gradient(model, x)
            single += float((drawn - exact).square().sum())
            total += drawn
            draws += 1
        errors[number] = float((total / draws - exact).norm() / exact.norm())
    one = (single / draws) ** 0.5 / float(exact.norm())
    for number, error in errors.items():
        # Not exactly: most of the gradient is that of a few numbers, whose errors go together.
        assert one / number**0.5 / 3 < error < 2 * one / number**0.5, (errors, one)
    assert errors[4096] < 1e-3


def within_half_a_step(grad, grad_output, x, name, bits):
    """Whether every element of a gradient is within half a step of the exact one, and rounding."""
    levels, g = levels_of(name, bits), grad_output.double().cpu()
    off = (grad.double().cpu() - g * slope(name, x)).abs()
    scale = levels.step * (2**bits - 1) + abs(levels.low)
    room = levels.step * (0.5 + 2.0**-16) + scale * (fit_of(name) + torch.finfo(grad.dtype).eps)
    # (Products below the normal numbers lose digits.)
    return bool((off <= g.abs() * room + torch.finfo(grad.dtype).tiny).all())


@of_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "softsign"])
def test_layouts(name, layout, dtype, device):
    """Values and strides are torch's; every gradient is at its element's place; saved are codes and a seed."""
    x = make_input(layout, dtype, device).detach().requires_grad_()
    want = SMOOTH[name][1](x.detach())
    for bits in (2, 3, 8):
        with lomem.memory.saved_for_backward() as saved:
            y = SMOOTH[name][0](x, bits=bits, rounding="stochastic")
        assert saved.nbytes == (bits * x.numel() + 7) // 8 + 8
        assert same_bits(y.detach(), want)
        assert y.stride() == want.stride()
        g = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, g)
        assert within_half_a_step(grad, g, x, name, bits)


@of_functions
@of_dtypes
def test_values_are_those_of_torch(dtype, name, device):
    x = all_patterns(dtype, device) if dtype.itemsize == 2 else special_values(dtype, device)
    want = SMOOTH[name][1](x)
    got = SMOOTH[name][0](x.clone().requires_grad_(), bits=3, rounding="stochastic")
    assert same_bits(got.detach(), want)
    assert same_bits(SMOOTH[name][0](x, bits=3, rounding="stochastic"), want)  # without a gradient


@of_functions
def test_infinities_and_nan(name, device):
    """The limits of the derivative, and no error; NaN counts as below all numbers."""
    x = torch.tensor([INF, -INF, NAN], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(SMOOTH[name][0](x, bits=8, rounding="stochastic").sum(), x)
    levels, limits = levels_of(name, 8), slope(name, torch.tensor([1e30, -1e30, -1e30]))
    assert bool(((grad.cpu() - limits).abs() <= levels.step * 0.51).all())


def test_seeds(device):
    """The same seed gives the same gradient; without one, each call draws the next one of lomem's stream."""
    x = torch.randn(300, device=device, requires_grad=True)

    def grad(seed=None):
        return torch.autograd.grad(LF.silu(x, bits=3, rounding="stochastic", seed=seed).sum(), x)[0]

    one = torch.tensor(1, device=device)
    assert torch.equal(grad(one), grad(one.clone()))
    assert not torch.equal(grad(one), grad(one + 1))
    lomem.random.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second = grad(), grad()
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's numbers are not drawn
    assert not torch.equal(first, second)
    lomem.random.manual_seed(5)
    assert torch.equal(grad(), first)
    assert torch.equal(grad(), second)
    # A change of the seed after the call changes nothing.
    y = LF.silu(x, bits=3, rounding="stochastic", seed=one)
    want = grad(one)
    one.add_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def test_evaluation_draws_nothing(device):
    x = torch.randn(300, device=device)
    state = lomem.random.get_state()
    LF.gelu(x, rounding="stochastic")
    with torch.no_grad():
        LF.gelu(x.clone().requires_grad_(), rounding="stochastic")
    assert lomem.random.get_state() == state


def test_ranges_of_threads(device):
    """As many threads as there are give the same bytes."""
    x, seed = torch.randn(1 << 16, device=device), torch.tensor(9, device=device)
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            codes = ops.drawn_codes(x, "mish", (), 5, seed)
            results.append((codes, ops.drawn_activation_backward(x, codes, seed, -0.1, 0.03, 5)))
    finally:
        torch.set_num_threads(threads)
    for codes, grad in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(grad, results[0][1])


@of_dtypes
@of_bits
def test_gradient_is_the_reference(bits, dtype, device):
    for n in (0, 1, 7, 8, 9, 63, 65, 1023, 1025, 4099):
        grad_output = torch.randn(n, device=device).to(dtype)
        codes = torch.randint(0, 256, ((bits * n + 7) // 8,), dtype=torch.uint8, device=device)
        number = torch.tensor(1234567 + n, device=device)
        arguments = (grad_output, codes, number, -0.13, 1.26 / (2**bits - 1), bits)
        got = ops.drawn_activation_backward(*arguments, offset=n)
        want = reference.drawn_activation_backward(*arguments, offset=n)
        assert same_bits(got, want)


def test_double_backward(device):
    """The gradient is linear in grad_output, with the draw of the forward pass; its own derivative by x is 0."""
    x = torch.randn(50, dtype=torch.float64, device=device, requires_grad=True)
    g = torch.randn(50, dtype=torch.float64, device=device, requires_grad=True)
    y = LF.gelu(x, bits=2, rounding="stochastic")
    (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
    v = torch.randn_like(x)
    (again,) = torch.autograd.grad(grad, g, v, create_graph=True)
    factor = (grad / g).detach()
    torch.testing.assert_close(again, factor * v)
    assert not again.requires_grad  # it does not depend on g or x


def test_in_place(device):
    for name, function in (("SiLU", F.silu), ("ELU", F.elu), ("Mish", F.mish), ("Hardswish", F.hardswish)):
        module = getattr(lomem.nn, name)(inplace=True, bits=4, rounding="stochastic")
        x = torch.randn(200, device=device, requires_grad=True)
        copied = x.clone()
        y = module(copied)
        assert y is copied
        assert same_bits(y.detach(), function(x.detach()))
        y.sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    """The recomputed forward pass draws another seed, with which its codes belong together."""
    x = torch.randn(400, device=device, requires_grad=True)
    y = checkpoint(lambda t: LF.gelu(t, bits=3, rounding="stochastic"), x, use_reentrant=reentrant)
    g = torch.randn_like(x)
    (y * g).sum().backward()
    assert within_half_a_step(x.grad, g, x, "gelu", 3)


def test_compile(device):
    """In one graph, in which every call draws."""
    x = torch.randn(400, device=device, requires_grad=True)

    @torch.compile(fullgraph=True)
    def f(t):
        return LF.gelu(t, bits=3, rounding="stochastic") * 2

    grads = [torch.autograd.grad(f(x).sum(), x)[0] for _ in range(2)]
    assert not torch.equal(*grads)
    for grad in grads:
        assert within_half_a_step(grad, torch.full_like(x, 2), x, "gelu", 3)
    module = torch.compile(nn.Sequential(nn.Linear(400, 64), lomem.nn.SiLU(bits=4, rounding="stochastic")).to(device))
    module(x).sum().backward()
    assert bool(x.grad.isfinite().all())


def test_export(device):
    """Inference needs neither codes nor seeds."""
    model = nn.Sequential(nn.Linear(8, 8), lomem.nn.GELU(bits=4, rounding="stochastic")).to(device)
    x = torch.randn(3, 8, device=device)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))


def test_autocast_and_grad_scaler(device):
    kind = torch.device(device).type
    model = nn.Sequential(nn.Linear(16, 16), lomem.nn.GELU(bits=4, rounding="stochastic"), nn.Linear(16, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(kind, enabled=True)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast(kind, torch.bfloat16):
        hidden = model[1](model[0](torch.randn(5, 16, device=device)))
        assert hidden.dtype == torch.bfloat16
        loss = model[2](hidden).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_deterministic_mode(device):
    x = torch.randn(400, device=device, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            lomem.random.manual_seed(4)
            grads.append(torch.autograd.grad(LF.mish(x, rounding="stochastic").sum(), x)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


@of_functions
def test_modules(name, device):
    """Every module draws; copies and pickles too; setting it back gives the step function again."""
    kinds = [getattr(lomem.nn, n) for n in lomem.nn.__all__ if isinstance(getattr(lomem.nn, n), type)]
    kinds = [k for k in kinds if issubclass(k, lomem.nn.FewBitActivation) and k is not lomem.nn.FewBitActivation]
    mine = [k for k in kinds if k(bits=3)._name() == SMOOTH[name][2].removesuffix("_tanh")]
    assert mine or name == "gelu-tanh"
    for kind in mine:
        module = kind(bits=3, rounding="stochastic").to(device)
        assert "rounding='stochastic'" in repr(module)
        for each in (module, copy.deepcopy(module)):
            x = torch.randn(500, device=device, requires_grad=True)
            grads = [torch.autograd.grad(each(x).sum(), x)[0] for _ in range(2)]
            assert not torch.equal(*grads)
        with pytest.raises(ValueError, match="expected 'nearest': it has no step function"):
            module.step_function()
        with pytest.raises(ValueError, match="steps are given, expected None with rounding='stochastic'"):
            module.steps = lomem.StepFunction((0.0,), (0.0, 1.0))
        assert module.drawn_levels() == LF.drawn_levels(module._name(), 3, parameters=module._parameter_values())
        module.rounding = "nearest"
        assert module.step_function() == kind(bits=3).step_function()


def converted(model, batch, **options):
    again = copy.deepcopy(model)
    report = lomem.convert(again, batch, pairs="keep", rounding="stochastic", gradients=False, **options)
    return again, report


class Scaled(nn.Module):
    """A SiLU of several ops, with a scale."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * torch.sigmoid(self.scale * x)


class Calls(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "GELU": (nn.GELU(), F.gelu),
    "GELU (tanh)": (nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "SiLU": (nn.SiLU(), F.silu),
    "scaled": (Scaled(1.702), lambda x: x * torch.sigmoid(1.702 * x)),
    "scaled, negative": (Scaled(-0.6), lambda x: x * torch.sigmoid(-0.6 * x)),
    "calls": (Calls(), lambda x: F.gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_convert(name, device):
    """Outputs are unchanged; the mean gradient is the exact one; restoring gives that back."""
    activation, function = ACTIVATIONS[name]
    torch.manual_seed(0)
    frozen = nn.Linear(6, 4).requires_grad_(False)
    model = nn.Sequential(nn.Linear(5, 6), copy.deepcopy(activation), frozen).to(device)
    x = torch.randn(7, 5, device=device)
    drawn, report = converted(model, x, activations="3bit")
    assert [d.action for d in report.decisions if d.action != "left"] == ["3bit"]
    assert "drawn at random" in str(report) or "replaced" in str(report)
    assert torch.equal(drawn(x), model(x))
    (exact,) = torch.autograd.grad(model(x).square().sum(), [model[0].weight])
    many = torch.stack([torch.autograd.grad(drawn(x).square().sum(), [drawn[0].weight])[0] for _ in range(400)])
    error = (many.mean(0) - exact).norm() / (many - exact).norm(dim=(1, 2)).mean()
    # 1 / 20 is expected, with a deviation of a few percent of it: correlated elements.
    assert 0.03 < float(error) < 0.08
    h = model[0](x).detach()
    assert torch.allclose(function(h), model[1](h))
    assert lomem.restore(drawn) == 1
    (again,) = torch.autograd.grad(drawn(x).square().sum(), [drawn[0].weight])
    assert torch.equal(again, exact)


def test_convert_starts_the_stream_of_seeds():
    """So that a program that sets torch's seed draws the same codes every time."""
    grads = []
    for _ in range(2):
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Flatten())
        x = torch.randn(7, 5)
        model, _ = converted(model, x, activations="2bit")
        grads.append(torch.autograd.grad(model(x).sum(), model[0].weight)[0])
    assert torch.equal(*grads)


def test_compiled_conversion():
    model = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), Scaled(1.702), nn.Flatten())
    x = torch.randn(7, 5)
    model, _ = converted(model, x, activations="4bit")
    plain = copy.deepcopy(model)
    lomem.restore(plain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(compiled(x).sum(), model[0].weight)[0] for _ in range(2)]
    assert not torch.equal(*grads)
    (exact,) = torch.autograd.grad(plain(x).sum(), plain[0].weight)
    for grad in grads:
        assert float((grad - exact).norm() / exact.norm()) < 0.2  # some 0.05 of noise, not another gradient


def test_advice_of_a_noisy_gradient():
    """One draw is called one; what is advised are more bits, still drawn."""
    torch.manual_seed(0)
    layers = [(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.SiLU()) for _ in range(8)]
    model = nn.Sequential(*itertools.chain.from_iterable(layers))
    with pytest.warns(lomem.GradientWarning, match="one draw of the gradient") as warned:
        lomem.convert(model, torch.randn(16, 8, 16), activations="1bit", rounding="stochastic")
    (message,) = {str(w.message) for w in warned}
    assert 'activations="' in message
    assert "criterion" not in message


def test_fit(device):
    """A report compares what was drawn; calibration has nothing to fit."""
    fit = pytest.importorskip("lomem.fit")
    model = nn.Sequential(nn.Linear(5, 64), lomem.nn.GELU(bits=3, rounding="stochastic"), nn.Linear(64, 2)).to(device)
    batches = [torch.randn(200, 5, device=device)]
    rows = fit.report(model, batches, loss=lambda y: y.square().sum()).rows
    assert 0.03 < rows["1"].error < 0.2
    assert abs(rows["1"].bias) < 0.02
    with pytest.raises(ValueError, match="'1' draws its codes at random"):
        fit.calibrate(model, batches)
    table = fit.report("gelu").rows
    deviation = LF.drawn_levels("gelu", 3).deviation
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    root = float((density @ slope("gelu", x).square() / density.sum()).sqrt())
    assert table["drawn, 3 bits"].error == pytest.approx(deviation / root, rel=1e-3)
    assert table["drawn, 3 bits"].bias == 0


X = torch.randn(4, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LF.gelu(X, rounding="up"),
            "functional.gelu: rounding is 'up', expected 'nearest' or 'stochastic'",
        ),
        (lambda: LF.gelu(X, seed=torch.tensor(1)), "gelu: seed is given, expected None with rounding='nearest'"),
        (lambda: LF.silu(X, rounding="stochastic", seed=5), "silu: seed is 5, expected a 0-d int64 tensor or None"),
        (lambda: LF.silu(X, rounding="stochastic", seed=torch.tensor(1.0)), "seed is of dtype float32"),
        (lambda: LF.silu(X, rounding="stochastic", seed=torch.tensor([1])), "and shape .1., expected int64 and ..$"),
        (lambda: LF.gelu(X, rounding="stochastic", criterion="paper"), "criterion is 'paper', expected 'derivative'"),
        (lambda: LF.gelu(X, rounding="stochastic", bits=9), "bits is 9, expected 1 to 8"),
        (lambda: LF.celu(X, -1.0, rounding="stochastic"), "alpha is -1, expected a positive number"),
        (lambda: LF.elu(X, torch.tensor(1.0), rounding="stochastic"), "got a tensor as parameter, expected a number"),
        (lambda: ops.drawn_activation(X, "relu", (), 2), "function is 'relu', expected one of gelu, "),
        (lambda: ops.drawn_activation(X, "gelu", (), 2, offset=-1), "offset is -1, expected at least 0"),
        (lambda: LF.drawn_levels("gelu", 0), "bits is 0, expected 1 to 8"),
        (lambda: lomem.nn.GELU(rounding="up"), "lomem.nn.GELU: rounding is 'up', expected 'nearest' or 'stochastic'"),
        (lambda: lomem.nn.SiLU(rounding="stochastic", criterion="primitive"), "criterion is 'primitive', expected"),
        (
            lambda: lomem.convert(nn.GELU(), rounding="up"),
            "lomem.convert: rounding is 'up', expected 'stochastic', 'nearest' or None",
        ),
        (
            lambda: lomem.convert(nn.GELU(), rounding="stochastic", criterion="paper"),
            "lomem.convert: criterion is 'paper', expected None with rounding='stochastic'",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as error:
        call()
    assert len(str(error.value).split("\n")[0]) < 300


def test_conversion_counts_the_seed():
    """An activation so small that a seed is more than what it would save is left."""
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Flatten())
    x = torch.randn(1, 2, requires_grad=True)
    with pytest.raises(lomem.NothingToConvertError):
        lomem.convert(model, x, pairs="keep")
    report = lomem.convert(model, torch.randn(8, 2), pairs="keep")
    assert report.saved_before - report.saved_after == 8 * 2 * 4 - (16 * 4 // 8 + 8)


def test_transforms_of_a_composed_activation_raise():
    model, _ = converted(nn.Sequential(nn.Linear(5, 6), Scaled(1.702)), torch.randn(3, 5), activations="2bit")
    with pytest.raises(NotImplementedError, match="called under torch"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(3, 5))


def test_building_a_module_starts_the_stream_of_seeds():
    grads = []
    for _ in range(2):
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(5, 6), lomem.nn.SiLU(bits=2, rounding="stochastic"))
        grads.append(torch.autograd.grad(model(torch.randn(7, 5)).sum(), model[0].weight)[0])
    assert torch.equal(*grads)


def test_composed_activations_in_16_bits():
    """What is drawn is the derivative at the scaled element, not at its rounding."""
    x = torch.randn(2000).bfloat16()
    model, _ = converted(nn.Sequential(Scaled(1.702), nn.Flatten(0)), x.clone().requires_grad_(), activations="8bit")
    grads = []
    for _ in range(50):
        leaf = x.clone().requires_grad_()
        model(leaf).float().sum().backward()
        grads.append(leaf.grad.double())
    error = torch.stack(grads).mean(0) - slope("quick_gelu", x)
    levels = LF.drawn_levels("silu", 8)
    # Five standard errors, and half a unit in the last place.
    assert float(error.abs().max()) < 5 * levels.deviation / 50**0.5 + 2.0**-9


def test_parameters_that_change():
    """More functions than the library keeps at a time: each still has its own derivative."""
    x = torch.tensor([-0.5])
    for i in [*range(1, 80), 1, 2]:
        leaf = x.clone().requires_grad_()
        LF.elu(leaf, i / 8, bits=8, rounding="stochastic").sum().backward()
        levels = LF.drawn_levels("elu", 8, parameters=(i / 8,))
        assert abs(float(leaf.grad) - i / 8 * math.exp(-0.5)) < levels.step * 0.51


def test_calibration_is_not_applied_to_what_draws():
    fit = pytest.importorskip("lomem.fit")
    torch.manual_seed(0)
    model = nn.Sequential(lomem.nn.GELU(bits=2), lomem.nn.SiLU(bits=2))
    calibration = fit.calibrate(model, [torch.randn(100, 4)])
    model[1].rounding = "stochastic"
    model[0].steps = None
    with pytest.raises(ValueError, match=r"'1' of model draws its codes at random, expected it to have"):
        calibration.apply(model)
    assert model[0].steps is None


def test_jagged(device):
    """torch's own functions, compiled too."""
    x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged, device=device)
    for f in (LF.gelu, torch.compile(LF.gelu, fullgraph=True, backend="eager")):
        y = f(x, bits=2, rounding="stochastic")
        assert torch.equal(y.values(), F.gelu(x.values()))
