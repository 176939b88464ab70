"""RandomizedLinear under function transforms and compilers, and its errors."""

import copy
import io
import itertools
import math
import pickle
import re
from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from randomized_helpers import (
    LF,
    MATMULS,
    WAYS,
    Net,
    compress,
    gradient,
    gradients,
    matmuls,
    ops,
    states,
)
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx


def test_forward_mode_and_functorch(device):
    x, weight = torch.randn(9, 6, device=device), torch.randn(4, 6, device=device)

    def op(x, weight):
        return LF.randomized_linear(x, weight, proj_dim=3)

    # Gradients that are not estimated equal those of F.linear.
    torch.testing.assert_close(torch.func.jvp(op, (x, weight), (x, weight))[1], 2 * F.linear(x, weight))
    got = torch.func.grad(lambda x: op(x, weight).sum())(x)
    torch.testing.assert_close(got, weight.sum(0).expand_as(x))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda weight: op(x, weight).sum())(weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        match = "lomem::randomized_linear: input has a forward-mode tangent"
        with pytest.raises(NotImplementedError, match=match):
            op(dual, weight.clone().requires_grad_())
        match = "lomem::randomized_linear: weight has a forward-mode tangent"
        with pytest.raises(NotImplementedError, match=match):
            op(x, forward_ad.make_dual(weight.clone().requires_grad_(), weight))


@matmuls
def test_compiled_as_one_graph(matmul, device):
    net = Net(matmul, device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 5, 9, 20):
        x = torch.randn(2, rows, 6, device=device)
        for got, want in zip(gradients(net, compiled, x), gradients(net, net, x), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_passes_use_the_same_numbers(dynamic, device):
    # For a single row, the estimate by signs is exact for any seed, if both passes use the same one.
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul="rademacher", device=device)

    def f(x):
        return torch.relu(layer(x)).sum(1)[2]

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for rows in (5, 7, 12):
        x = torch.zeros(rows, 6, device=device)
        x[2] = torch.randn(6, device=device)
        for _ in range(3):
            (got,) = torch.autograd.grad(compiled(x), layer.weight)
            for module in (layer.train(), layer.eval()):
                module(x)
            (want,) = torch.autograd.grad(f(x), layer.weight)
            layer.train()
            torch.testing.assert_close(got, want)


def test_compiled_with_sizes_that_depend_on_data(device):
    weight = torch.randn(4, 6, device=device, requires_grad=True)

    def f(x, mask, weight):
        return LF.randomized_linear(x[mask], weight, proj_dim_ratio=0.5, matmul="rademacher").sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for count in (5, 2, 8):
            x = torch.randn(8, 6, device=device)
            mask = torch.arange(8, device=device) < count
            lomem.random.manual_seed(0)
            (got,) = torch.autograd.grad(compiled(x, mask, weight), weight)
            lomem.random.manual_seed(0)
            (want,) = torch.autograd.grad(f(x, mask, weight), weight)
            torch.testing.assert_close(got, want)


def test_compiled_autograd(device):
    net = Net(device=device)
    x = torch.randn(9, 6, device=device)
    want = gradients(net, net, x)

    def step(x):
        for parameter in net.parameters():
            parameter.grad = None
        net(x).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    with torch._dynamo.config.patch(compiled_autograd=True):
        lomem.random.manual_seed(5)
        got = torch.compile(step, backend="aot_eager")(x)
    for a, b in zip(got, want[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", ["none", "non-reentrant", "ours kept", "inputs kept", "none kept"])
def test_compiled_checkpoints_use_the_same_numbers(way, backend, device):
    # As above: exact if what the backward pass recomputes matches what was saved.
    torch._dynamo.reset()
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul="rademacher", device=device)

    def f(x):
        return WAYS[way](lambda x: torch.relu(layer(torch.tanh(x))), x).sum(1)[2]

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    x = torch.zeros(9, 6, device=device)
    x[2] = torch.randn(6, device=device)
    for _ in range(3):
        before = states()
        (got,) = torch.autograd.grad(compiled(x.requires_grad_()), layer.weight)
        assert torch.equal(states(), before)
        rows = torch.tanh(x.detach())
        (want,) = torch.autograd.grad(torch.relu(F.linear(rows, layer.weight, layer.bias)).sum(1)[2], layer.weight)
        torch.testing.assert_close(got, want)


@matmuls
@pytest.mark.parametrize("how", ["make_fx", "aot_eager", "inductor", "export"])
def test_replays_draw_anew(matmul, how, device):
    torch._dynamo.reset()  # its limit of recompilations would stop compiling this many layers
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul=matmul, device=device)
    x = torch.randn(9, 6, device=device)
    if how == "make_fx":
        traced = make_fx(partial(gradient, layer))(x)
        replay = partial(traced, x)
    elif how == "export":
        replay = partial(gradient, torch.export.export(layer, (x,)).module(), x)
    else:
        compiled = torch.compile(layer, fullgraph=True, backend=how)
        replay = partial(gradient, compiled, x)
    before = states()
    lomem.random.manual_seed(1)
    seen = [replay() for _ in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert torch.equal(states(), before)
    # The seeds that the layer draws itself.
    lomem.random.manual_seed(1)
    for got in seen:
        torch.testing.assert_close(got, gradient(layer, x))


@pytest.mark.parametrize("training", [True, False])
def test_export(training, device):
    net = Net(device=device).train(training)
    x = torch.randn(9, 6, device=device)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    names = [str(node.target) for node in program.graph.nodes if "linear" in str(node.target)]
    assert names == (["lomem.randomized_linear.default"] if training else ["aten.linear.default"]) * 2
    other = torch.randn(7, 6, device=device)
    torch.testing.assert_close(program.module()(other), net(other))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), net(other))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_symbolic_trace_vmap_and_subclasses(device):
    class Marked(torch.Tensor):
        pass

    weight = torch.randn(4, 6, device=device)

    def op(x):
        return LF.randomized_linear(x, weight, proj_dim=3)

    x = torch.randn(3, 9, 6, device=device)
    assert torch.equal(torch.fx.symbolic_trace(op)(x), op(x))
    torch.testing.assert_close(torch.func.vmap(op)(x), op(x))
    assert type(op(x.as_subclass(Marked))) is Marked


def test_the_module_is_a_linear_layer(device):
    torch.manual_seed(1)
    plain = nn.Linear(6, 4, device=device)
    torch.manual_seed(1)
    layer = lomem.nn.RandomizedLinear(6, 4, True, device, proj_dim_ratio=0.3)
    assert isinstance(layer, nn.Linear)
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    layer.weight.data.normal_()
    plain.load_state_dict(layer.state_dict())
    other = lomem.nn.RandomizedLinear(6, 4, device=device, proj_dim=9, matmul="dct")
    other.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, device=device)
    assert torch.equal(other(x), layer(x))
    assert (
        repr(layer)
        == "RandomizedLinear(in_features=6, out_features=4, bias=True, matmul='gaussian', proj_dim_ratio=0.3)"
    )
    no_bias = lomem.nn.RandomizedLinear(6, 4, bias=False, proj_dim=3, proj_dim_min=1, proj_dim_max=5, matmul="crs")
    assert no_bias.bias is None
    assert repr(no_bias).endswith("bias=False, matmul='crs', proj_dim=3, proj_dim_min=1, proj_dim_max=5)")


def test_copies(device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim_ratio=0.3, proj_dim_max=7, matmul="dft", device=device)
    x = torch.randn(20, 6, device=device)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert repr(other) == repr(layer)
        assert all(map(torch.equal, gradients(other, other, x), gradients(layer, layer, x)))


def test_training_makes_progress(device):
    x, target = torch.randn(200, 10, device=device), torch.randn(10, 3, device=device)
    for matmul in MATMULS:
        layer = lomem.nn.RandomizedLinear(10, 3, proj_dim_ratio=0.2, matmul=matmul, device=device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        losses = []
        for _ in range(300):
            loss = (layer(x) - x @ target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 1e-2 * losses[0], matmul


SIZES = {
    "proj_dim and proj_dim_ratio are both missing, expected one of them": {},
    "proj_dim and proj_dim_ratio are both given, expected one of them": {"proj_dim": 3, "proj_dim_ratio": 0.1},
    "proj_dim is 0, expected at least 1": {"proj_dim": 0},
    "proj_dim is -3, expected at least 1": {"proj_dim": -3},
    "proj_dim_ratio is 0, expected a number in (0, 1]": {"proj_dim_ratio": 0.0},
    "proj_dim_ratio is 1.5, expected a number in (0, 1]": {"proj_dim_ratio": 1.5},
    "proj_dim_ratio is -0.1, expected a number in (0, 1]": {"proj_dim_ratio": -0.1},
    "proj_dim_ratio is nan, expected a number in (0, 1]": {"proj_dim_ratio": math.nan},
    "proj_dim_min is 0, expected at least 1": {"proj_dim_ratio": 0.1, "proj_dim_min": 0},
    "proj_dim_max is -1, expected at least 1": {"proj_dim_ratio": 0.1, "proj_dim_max": -1},
    "proj_dim_min is 5, expected at most proj_dim_max, 4": {
        "proj_dim_ratio": 0.1,
        "proj_dim_min": 5,
        "proj_dim_max": 4,
    },
    "matmul is 'normal', expected 'gaussian', 'rademacher', 'dct', 'dft', 'crs' or 'wta-crs'": {
        "proj_dim": 3,
        "matmul": "normal",
    },
}


def raises(message, kinds=(RuntimeError, ValueError)):
    return pytest.raises(kinds, match="^" + re.escape(f"lomem::{message}"))


@pytest.mark.parametrize("message", SIZES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_of_sizes(message, requires_grad):
    x, weight = torch.ones(5, 6), torch.ones(4, 6, requires_grad=requires_grad)
    with raises(f"randomized_linear: {message}", ValueError):
        LF.randomized_linear(x, weight, **SIZES[message])
    with raises(f"randomized_linear: {message}", ValueError):
        lomem.nn.RandomizedLinear(6, 4, **SIZES[message])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_of_tensors(requires_grad):
    x, weight, bias = torch.ones(5, 6), torch.ones(4, 6), torch.ones(4)

    def call(x=x, weight=weight, bias=bias):
        weight = weight.detach().requires_grad_(requires_grad and weight.is_floating_point())
        return LF.randomized_linear(x, weight, bias, proj_dim=3)

    floats = "expected float64, float32, bfloat16 or float16"
    for arguments, message in [
        ({"x": x.int()}, f"input has dtype int32, {floats}"),
        ({"weight": weight.int()}, f"weight has dtype int32, {floats}"),
        ({"weight": weight.double()}, "weight has dtype float64, expected float32, the dtype of input"),
        ({"bias": bias.half()}, "bias has dtype float16, expected float32, the dtype of input"),
        ({"weight": weight[0]}, "weight has shape [6], expected (out_features, in_features)"),
        ({"x": x[:, 1:]}, "input has shape [5, 5], expected a last dimension of 6, the in_features of weight"),
        ({"x": x[0, 0]}, "input has shape [], expected a last dimension of 6, the in_features of weight"),
        ({"bias": bias[1:]}, "bias has shape [3], expected [4], the out_features of weight"),
        ({"bias": bias[:, None]}, "bias has shape [4, 1], expected [4], the out_features of weight"),
        ({"weight": weight.to("meta")}, "weight is on meta, expected cpu, the device of input"),
        ({"bias": bias.to("meta")}, "bias is on meta, expected cpu, the device of input"),
        ({"x": torch.eye(6).to_sparse()}, "input has layout Sparse, expected a dense (torch.strided) tensor"),
    ]:
        with raises(f"randomized_linear: {message}"):
            call(**arguments)


def test_errors_of_the_halves():
    x, grad, seed = torch.ones(9, 6), torch.ones(9, 4), torch.tensor(1)
    weight_grad = ops.randomized_linear_weight_grad
    for device in ("cpu", "meta"):
        moved = x.to(device)
        for number in (0, -5):
            with raises(f"randomized_linear_forward: proj_dim is {number}, expected at least 1", ValueError):
                compress(moved, seed, number, "dct")
        with raises("randomized_linear_forward: seed is of dtype float32 and shape [], expected int64 and []"):
            compress(moved, torch.tensor(1.0), 3, "dct")
        with raises("randomized_linear_forward: seed is of dtype int64 and shape [2], expected int64 and []"):
            compress(moved, torch.tensor([1, 2]), 3, "dct")
        with raises("randomized_linear_forward: matmul is '', expected 'gaussian', "):
            compress(moved, seed, 3, "")
    with raises("randomized_linear_forward: seed is on meta, expected cpu, the device of input"):
        ops.randomized_linear_forward(x, x, None, seed.to("meta"), 3)
    with raises("randomized_linear: seed is on meta, expected cpu, the device of input"):
        LF.randomized_linear(x, x, proj_dim=3, seed=seed.to("meta"))
    with raises("randomized_linear: seed is of dtype int32 and shape [], expected int64 and []"):
        LF.randomized_linear(x, x, proj_dim=3, seed=seed.int())
    with raises("randomized_linear_forward: input has shape [9, 6], expected a last dimension of 5, "):
        ops.randomized_linear_forward(x, x[:, 1:], None, seed, 3)
    compressed, indices = compress(x, seed, 3, "crs")
    for arguments, message in [
        (
            (grad[:2], compressed, indices, seed),
            "compressed has 3 rows, expected 1 to 2, the number of rows of grad_output",
        ),
        (
            (grad, compressed[:0], indices[:0], seed),
            "compressed has 0 rows, expected 1 to 9, the number of rows of grad_output",
        ),
        ((grad, compressed[0], indices, seed), "compressed has shape [6], expected (proj_dim, in_features)"),
        (
            (grad, compressed.double(), indices, seed),
            "compressed has dtype float64, expected float32, the dtype of grad",
        ),
        ((grad, compressed, None, seed), "indices is missing, expected the indices of the rows of compressed"),
        ((grad, compressed, indices[:2], seed), "indices has shape [2], expected [3]"),
        ((grad, compressed, indices.int(), seed), "indices has dtype int32, expected int64"),
        ((grad, compressed, indices, seed[None]), "seed is of dtype int64 and shape [1], expected int64 and []"),
        ((grad, compressed, indices, seed.to("meta")), "seed is on meta, expected cpu, the device of grad_output"),
        (
            (grad, compressed.to("meta"), indices, seed),
            "compressed is on meta, expected cpu, the device of grad_output",
        ),
        ((grad[0, 0], compressed, indices, seed), "grad_output has no dimensions, expected at least 1"),
    ]:
        with raises(f"randomized_linear_weight_grad: {message}"):
            weight_grad(*arguments, matmul="crs")
    with pytest.raises((RuntimeError, IndexError), match="index"):
        weight_grad(grad, compressed, indices + 9, seed, matmul="crs")


def test_dtypes_of_shapes(device):
    meta = torch.empty(9, 6, dtype=torch.bfloat16, device="meta")
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul="crs", device="meta", dtype=torch.bfloat16)
    y = layer(meta)
    assert (y.shape, y.dtype) == ((9, 4), torch.bfloat16)
    y.sum().backward()
    assert (layer.weight.grad.shape, layer.weight.grad.dtype) == ((4, 6), torch.bfloat16)
