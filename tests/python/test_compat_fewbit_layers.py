"""lomem.compat.fewbit: linear layers with an estimated weight gradient, estimates of their noise, and util."""

import copy
import inspect
import math
import pickle
import warnings

import lomem
import lomem.compat.fewbit as fewbit
import pytest
import torch
import torch.nn.functional as F
from torch import nn

FF = fewbit.functional
util = fewbit.util
MATMULS = ["gaussian", "rademacher", "dct", "dft"]


def defaults(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}


def saved_bytes(function, *kept):
    """Bytes that a call saves for backward, without those of some tensors."""
    with lomem.memory.saved_for_backward(kept) as saved:
        function()
    return saved.nbytes


# Signatures


def test_signatures():
    layer = ["in_features", "out_features", "bias", "device", "dtype"]
    randomized = ["proj_dim_ratio", "proj_dim", "proj_dim_min", "proj_dim_max", "matmul", "generator"]
    none = dict.fromkeys(["device", "dtype", *randomized])
    assert list(inspect.signature(fewbit.RandomizedLinear).parameters) == layer + randomized
    assert defaults(fewbit.RandomizedLinear) == {**none, "bias": True, "matmul": "gaussian"}
    assert list(inspect.signature(fewbit.LinearCRS).parameters) == [*layer, "proj_dim"]
    assert defaults(fewbit.LinearCRS) == {"bias": True, "device": None, "dtype": None, "proj_dim": None}
    function = ["input", "weight", "bias", "proj_dim_ratio", "proj_dim", "proj_dim_max", "proj_dim_min", "matmul"]
    assert list(inspect.signature(FF.linear_grp).parameters) == [*function, "generator"]
    assert list(inspect.signature(FF.linear_crs).parameters) == ["input", "weight", "bias", "nopairs"]
    assert list(inspect.signature(util.map_module).parameters) == ["root", "func", "patt"]
    assert next(iter(inspect.signature(util.convert_linear).parameters)) == "module"
    assert list(inspect.signature(util.traverse).parameters) == ["variable", "callback"]
    assert defaults(util.teniter) == {"include_ordinary": True, "include_saved": False}
    assert defaults(util.estimate_memory_usage) == {"saved_only": False}
    assert defaults(fewbit.VarianceEstimator) == {"callback": None}


# linear_grp


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"proj_dim_ratio": 0.5}, 11),
        ({"proj_dim_ratio": 0.21}, 4),  # 4.83, rounded down
        ({"proj_dim_ratio": 0.01}, 1),
        ({"proj_dim_ratio": 2.0}, 23),
        ({"proj_dim": 7}, 7),
        ({"proj_dim": 7, "proj_dim_ratio": 0.5}, 7),
        ({"proj_dim": 64}, 23),
        ({"proj_dim_ratio": 0.2, "proj_dim_min": 9}, 9),
        ({"proj_dim_ratio": 0.9, "proj_dim_max": 5}, 5),
        ({"proj_dim_ratio": 0.5, "proj_dim_min": 9, "proj_dim_max": 5}, 5),
        ({}, 23),
        ({"proj_dim_max": 6}, 6),
    ],
)
def test_number_of_rows(sizes, rows):
    x, layer = torch.randn(23, 6), fewbit.RandomizedLinear(6, 4, **sizes)
    function = lambda: FF.linear_grp(x, layer.weight, layer.bias, **sizes)  # noqa: E731
    for call in (function, lambda: layer(x)):
        # The rows in float32 and a seed of 8 bytes; with all rows, the input itself.
        assert saved_bytes(call, layer.weight) == rows * 6 * 4 + (8 if rows < 23 else 0)
        assert torch.equal(call(), F.linear(x, layer.weight, layer.bias))
    gradients = torch.autograd.grad(function().sum(), [layer.weight, layer.bias])
    assert torch.equal(gradients[1], torch.full((4,), 23.0))
    exact = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).sum(), layer.weight)[0]
    assert torch.equal(gradients[0], exact) == (rows == 23)


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("own_generator", [False, True])
def test_estimates_are_unbiased(matmul, own_generator):
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64)[0].reshape(12, 5), torch.randn(12, 3, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(5) if own_generator else None
    lomem.random.manual_seed(5)
    draws = 400

    def estimate():
        output = FF.linear_grp(x, weight, None, 0.5, None, None, None, matmul, generator)
        return torch.autograd.grad(output, weight, y)[0]

    errors = torch.stack([estimate() for _ in range(draws)]) - y.t() @ x
    # The squared error of the mean of independent draws is 1 / draws of that of one. Its own relative deviation is at
    # most sqrt(2), that of one degree of freedom: with 15 elements a factor of 3 is more than five deviations off.
    one, mean = errors.square().sum((1, 2)).mean(), errors.mean(0).square().sum()
    assert one > 0
    assert mean < 3 * one / draws


def test_a_generator_is_the_only_one_that_is_drawn_from():
    x, layer = torch.randn(16, 6), fewbit.RandomizedLinear(6, 4, True, None, None, 0.5)
    generator = torch.Generator()

    def gradient():
        return torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]

    layer.generator = generator.manual_seed(3)
    states = torch.get_rng_state(), lomem.random.get_state()
    first, second = gradient(), gradient()
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(gradient(), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert lomem.random.get_state() == states[1]
    # Nothing is drawn where nothing is estimated.
    before = generator.get_state()
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    layer.weight.requires_grad_(False)
    layer(x)
    assert torch.equal(generator.get_state(), before)
    # Without one, the seeds are lomem's.
    layer.weight.requires_grad_(True)
    layer.generator = None
    gradient()
    assert lomem.random.get_state() != states[1]


def test_a_layer_is_lomems_and_is_made_by_convert_linear():
    plain = nn.Linear(6, 4, dtype=torch.float64)
    layer = util.convert_linear(plain, fewbit.RandomizedLinear, proj_dim_ratio=0.5, matmul="dct")
    assert isinstance(layer, lomem.nn.RandomizedLinear)
    assert layer.weight is plain.weight
    assert repr(layer) == "RandomizedLinear(in_features=6, out_features=4, bias=True, matmul='dct', proj_dim_ratio=0.5)"
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    lomem.random.manual_seed(1)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        lomem.random.manual_seed(1)
        assert torch.equal(torch.autograd.grad(copied(x).square().sum(), copied.weight)[0], expected)
    # At 8 of 16 rows, the rules of lomem and FewBit give the same number, and so does lomem's layer.
    other = lomem.convert_linear(plain, lomem.nn.RandomizedLinear, proj_dim_ratio=0.5, matmul="dct")
    lomem.random.manual_seed(1)
    assert torch.equal(torch.autograd.grad(other(x).square().sum(), other.weight)[0], expected)
    crs = util.convert_linear(plain, fewbit.LinearCRS, proj_dim=3)
    assert crs.weight is plain.weight
    assert repr(crs) == "LinearCRS(in_features=6, out_features=4, bias=True, proj_dim=3)"


# linear_crs


def test_sampled_columns_are_unbiased():
    rows, features, pairs, draws = 6, 8, 4, 3000
    x, y = torch.randn(rows, features, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    weight = torch.randn(3, features, dtype=torch.float64, requires_grad=True)
    exact = y.t() @ x
    factors = torch.zeros(draws, features, dtype=torch.float64)
    for i in range(draws):
        estimate = torch.autograd.grad(FF.linear_crs(x, weight, None, pairs), weight, y)[0]
        ratio = estimate / exact
        # One factor for a column: the number of times that it was drawn, times features / pairs. To rounding.
        assert torch.allclose(ratio, ratio[0].expand(3, -1), rtol=0, atol=1e-9)
        factors[i] = ratio[0]
    counts = factors * pairs / features
    assert torch.allclose(counts, counts.round(), rtol=0, atol=1e-9)
    assert torch.equal(counts.round().sum(1), torch.full((draws,), float(pairs), dtype=torch.float64))
    # A factor has mean 1 and variance (features - 1) / pairs. The mean of 3000 is within five standard deviations.
    # So is the variance: counts have a kurtosis of 3.8, so the relative variance of theirs is below 3 / 3000.
    variance = (features - 1) / pairs
    assert (factors.mean(0) - 1).abs().max() < 5 * math.sqrt(variance / draws)
    assert (factors.var(0) / variance - 1).abs().max() < 5 * math.sqrt(3 / draws)


def test_sampled_columns_come_from_torchs_generator():
    x = torch.randn(6, 8)
    weight = torch.randn(3, 8, requires_grad=True)
    torch.manual_seed(4)
    drawn = torch.randint(8, (4,))
    after = torch.get_rng_state()
    torch.manual_seed(4)
    output = FF.linear_crs(x, weight, None, 4)
    assert torch.equal(torch.get_rng_state(), after)
    (grad,) = torch.autograd.grad(output, weight, torch.ones(6, 3))
    assert set(grad.abs().sum(0).nonzero().flatten().tolist()) == set(drawn.tolist())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_but_the_weight_is_exact(bias, dtype):
    layer = fewbit.LinearCRS(8, 6, bias, None, dtype, 4)
    plain = nn.Linear(8, 6, bias, dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 7, 8, dtype=dtype).transpose(0, 1)
    got, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(got), plain(expected)
    assert torch.equal(y, z)
    grad = torch.randn_like(z)
    y.backward(grad)
    z.backward(grad)
    assert torch.equal(got.grad, expected.grad)
    if bias:
        # Sums of 35 numbers in another order.
        assert torch.allclose(layer.bias.grad, plain.bias.grad, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_what_sampled_columns_save():
    layer = fewbit.LinearCRS(8, 12, proj_dim=4)
    x = torch.randn(9, 8)
    drawn = len(torch.randint(8, (4,), generator=torch.Generator().manual_seed(2)).unique())
    torch.manual_seed(2)
    # 4 bytes an element; per column an index of 8 bytes and a scale of 4.
    assert saved_bytes(lambda: layer(x)) == drawn * (9 * 4 + 8 + 4)
    torch.manual_seed(2)
    assert saved_bytes(lambda: layer(x.requires_grad_())) == drawn * (9 * 4 + 8 + 4) + layer.weight.nbytes
    # As many columns as there are: exact. The default is half of the outputs.
    assert fewbit.LinearCRS(8, 12).proj_dim == 6
    assert fewbit.LinearCRS(8, 1).proj_dim == 1
    for exact in (fewbit.LinearCRS(8, 16), fewbit.LinearCRS(8, 12, proj_dim=4).eval()):
        state = torch.get_rng_state()
        grad = torch.autograd.grad(exact(x).sum(), exact.weight)[0]
        assert torch.equal(grad, torch.autograd.grad(F.linear(x, exact.weight, exact.bias).sum(), exact.weight)[0])
        assert torch.equal(torch.get_rng_state(), state)


def test_sampled_columns_under_autocast():
    layer = fewbit.LinearCRS(8, 6, proj_dim=4)
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: fewbit.RandomizedLinear(4, 4, proj_dim=0),
            ValueError,
            "lomem::randomized_linear: proj_dim is 0, expected",
        ),
        (
            lambda: fewbit.RandomizedLinear(4, 4, proj_dim_ratio=0.5, matmul="fft"),
            ValueError,
            "lomem::randomized_linear: matmul is 'fft', expected 'gaussian'",
        ),
        (
            lambda: FF.linear_grp(torch.ones(2, 4), torch.ones(3, 4), None, -1.0),
            ValueError,
            "lomem.compat.fewbit.functional.linear_grp: proj_dim_ratio is -1.0, expected a positive number",
        ),
        (
            lambda: fewbit.RandomizedLinear(4, 4, proj_dim_ratio=0.0),
            ValueError,
            "lomem.compat.fewbit.functional.linear_grp: proj_dim_ratio is 0.0, expected a positive number",
        ),
        (
            lambda: fewbit.LinearCRS(4, 4, proj_dim=0),
            ValueError,
            "lomem.compat.fewbit.LinearCRS: proj_dim is 0, expected an integer of at least 1",
        ),
        (
            lambda: FF.linear_crs(torch.ones(2, 4), torch.ones(3, 4), None, 1.5),
            ValueError,
            "lomem.compat.fewbit.functional.linear_crs: nopairs is 1.5, expected an integer of at least 1",
        ),
        (
            lambda: fewbit.VarianceEstimator(nn.Linear(4, 4)),
            TypeError,
            "lomem.compat.fewbit.VarianceEstimator: model is of type Linear, expected a randomized linear layer, with",
        ),
        (
            lambda: fewbit.VarianceEstimator(fewbit.LinearGRP(4, 4), 3),
            TypeError,
            "lomem.compat.fewbit.VarianceEstimator: callback is of type int, expected a function of four arguments",
        ),
    ],
)
def test_errors_of_layers(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# What passes a point, and estimates of noise


def test_catching_gradients():
    calls = []

    class Storage(FF.GradientStorage):
        def postprocess(self):
            calls.append(self.grad_output)

    storage = Storage()
    assert (storage.input, storage.grad_output) == (None, None)
    x = torch.randn(5, requires_grad=True)
    storage.forward(x)
    assert torch.equal(storage.input, x)
    assert not storage.input.requires_grad
    assert storage.input.data_ptr() != x.data_ptr()
    y = FF.catch_gradients(x, storage)
    assert torch.equal(y, x)
    assert saved_bytes(lambda: FF.catch_gradients(x, storage)) == 0
    (y * torch.arange(5.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(5.0))
    assert torch.equal(storage.grad_output, torch.arange(5.0))
    assert len(calls) == 1
    plain = FF.GradientStorage()
    plain.backward(x)
    assert torch.equal(plain.grad_output, x)
    assert plain.postprocess() is None


def by_hand(x, y, projected):
    """The three estimates in float64, from the gradients of the rows."""
    x, y = x.double(), y.double()
    rows = len(x)
    gradients = torch.einsum("ki,kj->kij", x, y)
    whole = gradients.sum(0).square().sum()
    norms = torch.einsum("ki,lj->klij", x, y).square().sum()
    sgd = (gradients - gradients.mean(0)).square().sum() * rows / (rows - 1)
    return whole / norms, sgd, (norms - whole) / projected


@pytest.mark.parametrize("kind", [fewbit.LinearGRP, lomem.nn.RandomizedLinear])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_estimates_of_noise(kind, dtype):
    seen = []
    layer = kind(4, 3, dtype=dtype, proj_dim_ratio=0.5)
    estimator = fewbit.VarianceEstimator(layer, lambda *arguments: seen.append(arguments))
    assert estimator.variance is None
    for step, shape in enumerate([(12, 4), (3, 4, 4)]):
        x, grad = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 3, dtype=dtype)
        y = estimator(x)
        assert torch.equal(y, layer(x))
        y.backward(grad)
        assert seen[-1] == (*estimator.variance, step)
        expected = by_hand(x.reshape(12, 4), grad.reshape(12, 3), 6)
        # Sums of at most 576 products, with differences that are no smaller than a hundredth of their terms.
        tolerance = 576 * 100 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 10
        for got, value in zip(estimator.variance, expected, strict=True):
            assert got.dtype == torch.promote_types(dtype, torch.float32)
            assert abs(got.double() - value) <= tolerance * abs(value)
    assert len(seen) == 2
    assert torch.equal(estimator.state.input, x)
    assert torch.equal(estimator.state.grad_output, grad)


def test_estimates_of_noise_of_other_outputs():
    class Two(fewbit.LinearGRP):
        def forward(self, input, scale, *, shift):
            return super().forward(input) * scale + shift, "second"

    estimator = fewbit.VarianceEstimator(Two(4, 3, proj_dim=64, proj_dim_max=16))
    x = torch.randn(8, 4)
    y, second = estimator(x, 2.0, shift=1.0)
    assert second == "second"
    y.square().sum().backward()
    # More rows than there are cannot be saved.
    assert estimator.state.bs_proj == 8
    assert torch.allclose(estimator.variance[2].double(), by_hand(x, 2 * y.detach(), 8)[2])
    # The variance over one example is not defined.
    estimator(x[:1], 1.0, shift=0.0)[0].sum().backward()
    assert estimator.variance[1].isnan()
    assert estimator.variance[2].isfinite()


# Graphs


def test_traversing_a_graph():
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    h = x @ weight
    y = torch.cat([h.exp(), h.sigmoid()])
    found = []
    util.traverse(y, lambda node, tensor, saved: found.append((node.name(), tensor, saved)))
    names = [(name, saved) for name, _, saved in found]
    leaf = ("torch::autograd::AccumulateGrad", False)
    expected = [
        ("ExpBackward0", True),
        ("MmBackward0", True),
        ("MmBackward0", True),
        leaf,
        leaf,
        ("SigmoidBackward0", True),
    ]
    assert names == expected
    for tensor, expected in zip(
        [tensor for _, tensor, _ in found], [h.exp(), weight, x, x, weight, h.sigmoid()], strict=True
    ):
        assert torch.equal(tensor, expected)
    util.traverse(x, lambda *arguments: pytest.fail("a leaf has no graph"))
    assert list(util.teniter(x)) == []
    assert util.estimate_memory_usage(x.detach()) == 0


def test_traversing_a_deep_graph_and_functions_in_python():
    x = torch.randn(2, requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 2
    assert util.estimate_memory_usage(y) == x.nbytes
    layer = fewbit.LinearCRS(8, 6, proj_dim=4)
    torch.manual_seed(2)
    columns = len(torch.randint(8, (4,)).unique())
    torch.manual_seed(2)
    output = layer(torch.randn(9, 8, generator=torch.Generator().manual_seed(1)))
    assert util.estimate_memory_usage(output, saved_only=True) == columns * (9 * 4 + 8 + 4)


def test_memory_of_graphs():
    plain = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    with_relu = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(3, 8, requires_grad=True)
    first, second = plain(x), with_relu(x)
    assert util.estimate_memory_usage(first) == 4 * (x.numel() + 8 * 4 + 4 + 4 * 1 + 1)
    assert util.estimate_memory_usage(second) == util.estimate_memory_usage(first)
    # ReLU and the layer behind it save one tensor, which FewBit counts twice.
    difference = len(list(util.teniter(second, False, True))) - len(list(util.teniter(first, False, True)))
    assert difference == 1
    assert util.estimate_memory_usage(second, True) - util.estimate_memory_usage(first, True) == 4 * (3 * 4)
    leaves, saved = list(util.teniter(first)), list(util.teniter(first, False, True))
    assert len(leaves) == 5
    assert {id(tensor) for tensor in util.teniter(first, True, True)} >= {id(tensor) for tensor in saved if tensor is x}
    assert list(util.teniter(first, False, False)) == []


# map_module


def model():
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    return nn.ModuleDict({"enc": layers, "dec": nn.Linear(8, 8)})


ALL = ["/enc/0", "/enc/1", "/enc/2", "/enc", "/dec", "/"]


@pytest.mark.parametrize(
    ("patt", "paths"),
    [
        (None, ALL),
        ("/enc/.*", ALL[:3]),
        ("^/enc/.*", ALL[:3]),
        ("/enc", ALL[:4]),
        (".*dec", ["/dec"]),
        ("/$", ["/"]),
        (".*1$", ["/enc/1"]),
    ],
)
def test_functions_get_paths(patt, paths):
    seen = []
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = util.map_module(net, lambda module, path: seen.append((path, type(module))) or module, patt)
    assert result is net
    assert [path for path, _ in seen] == paths
    assert all(type(net.get_submodule(path[1:].replace("/", "."))) is kind for path, kind in seen)
    for several in (lambda module, *paths: seen.append(paths[0]) or module, lambda m, p="none": seen.append(p) or m):
        seen.clear()
        util.map_module(net, several, patt)
        assert seen == paths


def test_functions_of_one_argument():
    net = fewbit.map_module(
        model(), lambda m: fewbit.convert_linear(m, fewbit.RandomizedLinear, proj_dim_ratio=0.1), "/enc"
    )
    assert [type(net.enc[i]) if i != 1 else None for i in range(3)] == [fewbit.LinearGRP, None, fewbit.LinearGRP]
    assert type(net.dec) is nn.Linear


@pytest.mark.parametrize("patt", ["enc", "nothing", r"^enc\."])
def test_a_pattern_without_a_match_warns(patt):
    with pytest.warns(UserWarning, match=r"^lomem\.compat\.fewbit\.util\.map_module: patt .* matches no module of the"):
        util.map_module(model(), lambda m, path: nn.Identity(), patt)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, lambda m, p: m), TypeError, "root is of type int, expected a torch.nn.Module"),
        ((nn.GELU(), 3), TypeError, "func is of type int, expected a function that takes a module"),
        ((nn.GELU(), lambda m, p: None), TypeError, "func returned NoneType for a GELU, expected a module"),
        ((nn.GELU(), lambda m, p: m, "("), ValueError, "patt is '(', expected a regular expression: "),
    ],
)
def test_errors_of_map_module(arguments, kind, message):
    with pytest.raises(kind) as error:
        util.map_module(*arguments)
    assert str(error.value).startswith(f"lomem.compat.fewbit.util.map_module: {message}")
