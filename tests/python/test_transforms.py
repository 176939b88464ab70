"""The ops under what torch does to ops: opcheck, compile, export, checkpointing, hooks, transforms."""

import copy
import io
import pickle

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import EMULATED, PUBLISHED
from torch import nn
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

LF = lomem.functional
ops = torch.ops.lomem
GELU2, SILU2 = PUBLISHED
gelu2, silu2 = (entry.op for entry in PUBLISHED.values())
of_published = pytest.mark.parametrize("op", [gelu2, silu2], ids=PUBLISHED)


def tensors(device, requires_grad=True):
    x = torch.randn(4, 6, device=device)
    image = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    weight = torch.rand(6, device=device) + 0.5
    bias = torch.randn(6, device=device)
    return [t.requires_grad_(requires_grad) for t in (x, image, weight, bias)]


def samples(device):
    """Arguments of every op of the library, by the op's name; leaves require grad."""
    x, image, weight, bias = tensors(device)
    x0, image0, weight0, bias0 = tensors(device, requires_grad=False)
    codes = torch.randint(0, 8, (5, 7), dtype=torch.uint8, device=device)
    output, rstd = ops.ms_layer_norm_forward(x0, [6], weight0, bias0)
    rms_output, rms_rstd = ops.ms_rms_norm_forward(x0, [6], weight0)
    f32 = torch.float32
    linear = torch.randn(5, 6, device=device)
    seed = torch.tensor(3, device=device)
    _, rows, picked, _ = ops.randomized_linear_forward(x0, linear, None, seed, 2, matmul="crs")
    return {
        GELU2: [((x,), {}), ((image,), {"approximate": "tanh"}), ((x0,), {})],
        SILU2: [((x,), {}), ((image,), {}), ((x0,), {})],
        "step_activation": [
            ((x, "gelu", [], 3), {}),
            ((image, "elu", [2.0], 8), {"criterion": "derivative"}),
            ((x, "tanh", [], 2), {"boundaries": [-1.0, 0.0, 1.0], "levels": [0.0, 0.1, 0.2, 1.0]}),
            ((x, "silu", [], 2), {"criterion": "paper"}),
            ((x0, "elu", [0.5], 1), {}),
        ],
        "step_activation_forward": [((x0, "gelu_tanh", [], 3), {}), ((image0, "sigmoid", [], 5), {})],
        "hard_activation": [((x, "relu", []), {}), ((image, "hardtanh", [-0.5, 0.5]), {}), ((x0, "relu6", []), {})],
        "hard_activation_forward": [((x0, "hardshrink", [0.3]), {}), ((image0, "leaky_relu", [0.2]), {})],
        "fused_activation_forward": [((x0, "gelu", [-1.0, 0.5], 2), {}), ((image0, "silu", [0.0], 1), {"fast": False})],
        "step_codes": [((x0, [-1.0, 0.5], 2), {}), ((image0, [0.0], 7), {})],
        "band_codes": [((x0, -1.0, 0.5), {}), ((image0, 0.0, 9.0), {})],
        "step_activation_backward": [((x, ops.step_codes(x0, [-6.0, 0.0, 6.0], 2), [0.0, -0.1, 1.1, 1.0], 2), {})],
        "drawn_activation": [
            ((x, "gelu", [], 3, seed), {}),
            ((image, "elu", [2.0], 8, seed), {"offset": 2}),
        ],
        "drawn_activation_forward": [((x0, "gelu_tanh", [], 3, seed), {}), ((image0, "tanh", [], 5, seed), {})],
        "drawn_activation_backward": [
            ((x, ops.drawn_codes(x0, "gelu", [], 2, seed), seed, -0.1, 0.4, 2), {}),
            ((x0, ops.drawn_codes(x0, "mish", [], 8, seed), seed, -0.1, 0.4, 8), {"offset": 1}),
        ],
        "drawn_codes": [((x0, "softsign", [], 2, seed), {}), ((image0, "silu", [], 7, seed), {"offset": 3})],
        # (Of those that draw, the results of two calls are compared: only nothing is the same.)
        "dropout": [((x, 0.0), {}), ((image, 0.0), {}), ((x0, 0.0), {})],
        "dropout_forward": [((x0, 0.0), {}), ((image0, 0.0), {})],
        "dropout_apply": [
            ((x, ops.dropout_forward(x0, 0.4)[1], 0.4), {}),
            ((image, ops.dropout_forward(image0, 0.4)[1], 0.4), {}),
            ((x0, ops.dropout_forward(x0, 0.4)[1], 0.1), {}),
        ],
        "seeded_dropout_forward": [((x0, 0.0), {}), ((image0, 0.0), {})],
        "seeded_dropout_apply": [((x, seed, 0.4), {}), ((image, seed, 0.1), {}), ((x0, seed, 0.1), {})],
        "gated": [
            ((x, x0, "silu"), {}),
            ((x, None, "gelu_tanh"), {"layout": "interleaved"}),
            ((x0, x, "gelu"), {}),
            ((image, image0, "relu"), {}),
            ((image[..., 1:], None, "sigmoid"), {"layout": "up_gate"}),
            ((x0, x0, "silu"), {}),
        ],
        "gated_backward": [
            ((x0, x0, x0, "silu"), {"output_mask": [True, True, True]}),
            ((x0[:, 3:], x0, None, "gelu"), {"layout": "interleaved", "output_mask": [True, True, True]}),
            ((x, x, x, "gelu_tanh"), {"output_mask": [True, False, False]}),
            ((image0, image0, image0, "sigmoid"), {}),
        ],
        "gated_linear": [
            ((x, x0, linear.clone().requires_grad_(), bias[:5], "silu"), {}),
            ((image0[..., 1:], None, linear[:, :2].clone().requires_grad_(), None, "gelu"), {}),
            ((x0, x, linear.clone(), None, "relu"), {}),
        ],
        # (p = 0: each call would drop others.)
        "lora": [
            ((x, linear[:2].clone().requires_grad_(), linear[:, :2].clone().requires_grad_(), 0.5), {}),
            ((image[..., :2], linear[:3, :2].clone().requires_grad_(), linear[:, :3].clone()), {"bias": bias[:5]}),
            ((x0, linear[:2].clone(), linear[:, :2].clone().requires_grad_(), 2.0), {"dtype": torch.bfloat16}),
            ((x, linear[:2].bfloat16(), linear[:, :2].bfloat16()), {}),
            ((x0, linear[:2].clone(), linear[:, :2].clone()), {}),
        ],
        "lora_weight_grad": [
            ((x0[:, :2], x0.bfloat16(), None, 0.0, torch.float32), {}),
            ((x[:, :2], x, torch.full((3,), 77, dtype=torch.uint8, device=device), 0.5, torch.bfloat16), {}),
            ((image0, image0, None, 0.0, torch.float32), {}),
        ],
        "ms_layer_norm": [
            ((x, [6], weight, bias), {}),
            ((x, [4, 6]), {"eps": 1e-3}),
            ((x, [6], weight0), {"dtype": torch.bfloat16}),
            ((x0, [6], weight0, bias), {}),
        ],
        "ms_layer_norm_forward": [((x0, [6], weight0, bias0), {}), ((x0, [6]), {"dtype": torch.float16})],
        "ms_layer_norm_backward": [
            ((x0, output, rstd, [6], weight0, bias0, f32, [True, True, True]), {}),
            ((x0, output, rstd, [6], weight0, bias0, f32, [True, False, True]), {}),
            ((x0, output, rstd, [6], None, None, f32, [True, True, True]), {}),
        ],
        "ms_rms_norm": [
            ((x, [6], weight), {}),
            ((x, [4, 6]), {"eps": 1e-3}),
            ((x, [6]), {"dtype": torch.bfloat16}),
        ],
        "ms_rms_norm_forward": [((x0, [6], weight0), {}), ((x0, [6]), {"eps": 1e-3})],
        "ms_rms_norm_backward": [
            ((x0, rms_output, rms_rstd, [6], weight0, f32, [True, True]), {}),
            ((x0, rms_output, rms_rstd, [6], weight0, f32, [False, True]), {}),
        ],
        # With seeds: without, every call draws another one.
        "randomized_linear": [
            ((x, linear.requires_grad_(), bias[:5]), {"proj_dim_ratio": 0.4, "seed": seed}),
            ((image0[..., :1].expand(2, 3, 4, 6), linear), {"proj_dim": 3, "matmul": "wta-crs", "seed": seed}),
            ((x, linear.detach()), {"proj_dim": 1}),
            ((x0, linear), {"proj_dim_ratio": 1.0}),
        ],
        "randomized_linear_forward": [
            ((x0, linear.detach(), bias0[:5], seed, 2), {"matmul": matmul})
            for matmul in ("gaussian", "rademacher", "dct", "dft", "crs", "wta-crs")
        ],
        "randomized_linear_weight_grad": [
            ((x0, rows, None, seed), {"matmul": "dct"}),
            ((x0, rows, picked, seed), {"matmul": "crs"}),
        ],
        "pack_bits": [((codes, 3), {}), ((codes, 8), {})],
        "unpack_bits": [((LF.pack_bits(codes, 3), 3, 35), {})],
        "quantize_groups": [((x0, 4), {}), ((image0, 8, seed), {"offset": 2}), ((x0[:, 1:], 8), {"group_size": 16})],
        "dequantize_groups": [
            ((*ops.quantize_groups(x0), x0.shape, None, f32), {}),
            ((*ops.quantize_groups(image0, 4), image0.shape, image0.stride(), torch.float16, 4), {}),
            ((*ops.quantize_groups(x0, 8, seed), x0.shape, None, f32, 8, seed), {"offset": 2}),
        ],
    }


OPS = sorted(samples("cpu"))


def test_every_op_has_samples():
    registered = {name.removeprefix("lomem::") for name in torch._C._dispatch_get_all_op_names() if "lomem::" in name}
    assert registered == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    for args, kwargs in samples(device)[name]:
        opcheck(getattr(ops, name).default, args, kwargs)


@pytest.mark.parametrize("name", OPS)
def test_has_a_cpp_kernel_for_shapes(name):
    # In C++, so that LibTorch users have it too.
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"lomem::{name}", "Meta")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = lomem.nn.MSLayerNorm(6, elementwise_affine=True)
        self.up = nn.Linear(6, 8)
        self.act = PUBLISHED[GELU2].module()
        self.rms = lomem.nn.MSRMSNorm(8, elementwise_affine=True)
        self.silu = PUBLISHED[SILU2].module()

    def forward(self, x):
        return self.silu(self.rms(self.act(self.up(self.norm(x)))))


def gradients(net, f, x):
    x = x.clone().requires_grad_()
    for parameter in net.parameters():
        parameter.grad = None
    f(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in net.parameters())]


def assert_gradients_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_dynamic(backend, device):
    net = Net().to(device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 5, 9):
        x = torch.randn(rows, 6, device=device)
        assert_gradients_close(gradients(net, compiled, x), gradients(net, net, x))


@of_published
def test_compile_keeps_layouts(op, device):
    def f(x):
        return op(x * 2).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 4, 5), (3, 4, 5, 6)):
        for make in (lambda s: torch.randn(s).to(memory_format=torch.channels_last), lambda s: torch.randn(s).mT):
            x = make(shape).to(device)
            results = []
            for g in (f, compiled):
                leaf = x.detach().clone().requires_grad_()
                y = g(leaf)
                (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y).contiguous())
                results.append((y.detach(), grad))
            torch.testing.assert_close(results[0], results[1])


def test_compile_with_sizes_that_depend_on_data(device):
    def f(x, mask):
        rows = x[mask]
        return gelu2(rows.t()).sum() + LF.ms_layer_norm(rows, (16,)).square().sum() + silu2(rows).sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True)
        for count in (5, 2, 8):
            x = torch.randn(8, 16, device=device, requires_grad=True)
            mask = torch.arange(8, device=device) < count
            (got,) = torch.autograd.grad(compiled(x, mask), x)
            (want,) = torch.autograd.grad(f(x, mask), x)
            torch.testing.assert_close(got, want)


def test_compile_unpacked_mask(device):
    x = torch.randn(8, 16, device=device)
    packed = LF.pack_bool_to_uint8(x > 0)

    def f(x, packed):
        mask = LF.unpack_uint8_to_bool(packed, x.shape)
        return x * mask, torch.where(mask, x, 0.0)

    for got in torch.compile(f, fullgraph=True)(x, packed):
        assert torch.equal(got, F.relu(x))


def test_compile_under_autocast(device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)

    def with_autocast(f):
        def g(x):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return f(x)

        return g

    compiled = torch.compile(with_autocast(net), fullgraph=True)
    assert compiled(x).dtype == with_autocast(net)(x).dtype
    for a, b in zip(gradients(net, compiled, x), gradients(net, with_autocast(net), x), strict=True):
        # bfloat16 products in another order.
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_compiled_autograd(device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    want = gradients(net, net, x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(lambda x: gradients(net, net, x), backend="aot_eager")
        assert_gradients_close(compiled(x), want)


@pytest.mark.parametrize("training", [True, False])
def test_export_keeps_the_public_ops(training, device):
    net = Net().to(device).train(training)
    x = torch.randn(4, 6, device=device)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    # Decomposed, the published ones are what they are made of.
    for exported, activations in (
        (program, (GELU2, SILU2)),
        (program.run_decompositions(), ("step_activation", "step_activation")),
    ):
        names = [str(node.target) for node in exported.graph.nodes if "lomem" in str(node.target)]
        assert names == [
            f"lomem.{op}.default" for op in ("ms_layer_norm", activations[0], "ms_rms_norm", activations[1])
        ]
    other = torch.randn(7, 6, device=device)
    torch.testing.assert_close(program.module()(other), net(other))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), net(other))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    got = gradients(net, lambda x: checkpoint(net, x, use_reentrant=use_reentrant), x)
    assert_gradients_close(got, gradients(net, net, x))


def test_saved_tensor_hooks(device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    with torch.autograd.graph.save_on_cpu():
        got = gradients(net, net, x)
    assert_gradients_close(got, gradients(net, net, x))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t.clone(), lambda t: t):
        got = gradients(net, net, x)
    assert torch.uint8 in seen
    assert_gradients_close(got, gradients(net, net, x))


def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        net = Net()
        x = torch.randn(3, 6, requires_grad=True)
        y = net(x)
        y.sum().backward()
        assert y.shape == (3, 8)
        assert x.grad.shape == (3, 6)


@pytest.mark.cpu_kernels
def test_inference_mode(device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    with torch.inference_mode():
        y = net(x)
    assert y.is_inference()
    assert torch.equal(y, net(x))


@of_published
def test_double_backward_of_activations_is_exact(op, device):
    """The second derivative of a step function is 0; what flows through grad_output is linear."""
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    v = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(op(x), x, v, create_graph=True)
    u = torch.randn_like(x)
    gx, gv = torch.autograd.grad(first, (x, v), u, allow_unused=True)
    (want,) = torch.autograd.grad(op(x), x, u)
    assert torch.equal(gv, want)
    assert gx is None or not gx.any()
    # In another layout, and a third time.
    y = x.detach().t().requires_grad_()
    (first,) = torch.autograd.grad(op(y), y, v.t(), create_graph=True)
    (second,) = torch.autograd.grad(first, v, u.t(), create_graph=True)
    assert torch.equal(second, want)


@pytest.mark.parametrize("op", [LF.ms_layer_norm, LF.ms_rms_norm], ids=["layer", "rms"])
def test_double_backward_of_norms_is_refused(op, device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(op(x, (5,)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for lomem::ms_(layer|rms)_norm_backward is not implemented"):
        first.sum().backward()


# The op that refuses, and what calls it.
PUBLIC = {
    GELU2: gelu2,
    SILU2: silu2,
    "step_activation": lambda x: LF.tanh(x),
    "hard_activation": lambda x: LF.relu(x),
    "ms_layer_norm": lambda x: LF.ms_layer_norm(x, (6,)),
    "ms_rms_norm": lambda x: LF.ms_rms_norm(x, (6,)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_functorch_gradients_raise(name, device):
    x = torch.randn(4, 6, device=device)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.vjp(f, x)[1](x),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
    ):
        with pytest.raises(RuntimeError, match=r"functorch transforms|torch\.func"):
            transform(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_forward_mode_raises(name, device):
    x = torch.randn(4, 6, device=device)
    op = "step_activation" if name in PUBLISHED else name
    match = f"lomem::{op}: input has a forward-mode tangent"
    with pytest.raises(NotImplementedError, match=match):
        torch.func.jvp(PUBLIC[name], (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=match):
        PUBLIC[name](forward_ad.make_dual(x, x))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match=match):
        PUBLIC[name](forward_ad.make_dual(x, x))


def test_forward_mode_of_weights_and_halves_raises(device):
    x, _, weight, bias = tensors(device, requires_grad=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, weight)
        with pytest.raises(NotImplementedError, match="weight has a forward-mode tangent"):
            LF.ms_layer_norm(x, (6,), dual, bias)
        with pytest.raises(NotImplementedError, match="bias has a forward-mode tangent"):
            LF.ms_layer_norm(x, (6,), weight, dual)
        with pytest.raises(NotImplementedError, match="weight has a forward-mode tangent"):
            LF.ms_rms_norm(x, (6,), dual)
        with pytest.raises(NotImplementedError, match="forward AD"):
            ops.step_activation_forward(forward_ad.make_dual(x, x), "silu", [], 2)


class Marked(torch.Tensor):
    """A subclass as torch's documentation has it."""


class Calls(torch.overrides.TorchFunctionMode):
    def __init__(self):
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PUBLIC)
def test_torch_function(name, device):
    x = torch.randn(3, 6, device=device)
    want = PUBLIC[name](x)
    got = PUBLIC[name](x.as_subclass(Marked))
    assert type(got) is Marked
    assert torch.equal(got.as_subclass(torch.Tensor), want)
    with Calls() as calls:
        assert torch.equal(PUBLIC[name](x), want)
    assert any("lomem" in str(function) for function in calls.functions)


@pytest.mark.parametrize("name", PUBLIC)
def test_symbolic_trace(name, device):
    x = torch.randn(3, 6, device=device)
    traced = torch.fx.symbolic_trace(PUBLIC[name])
    assert any("lomem" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(x), PUBLIC[name](x))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


@pytest.mark.parametrize("name", PUBLIC)
def test_no_gradient_comes_in(name, device):
    x = torch.randn(3, 6, device=device, requires_grad=True)
    y = NoGradient.apply(PUBLIC[name](x))
    (grad,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    assert grad is None or not grad.any()


@pytest.mark.parametrize("name", PUBLIC)
def test_long_chains_are_freed(name, device):
    # Node by node: a destructor for each would overflow the stack.
    y = torch.randn(2, 6, device=device, requires_grad=True)
    for _ in range(20000):
        y = PUBLIC[name](y)
    del y


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", PUBLIC)
def test_vmap_without_gradient(name, device):
    x = torch.randn(3, 4, 6, device=device)
    torch.testing.assert_close(torch.func.vmap(PUBLIC[name])(x), PUBLIC[name](x))


@pytest.mark.parametrize("op", [LF.ms_layer_norm, LF.ms_rms_norm], ids=["layer", "rms"])
def test_changing_the_output_in_place_raises_at_backward(op, device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    y = op(x, (5,))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@of_published
def test_activations_do_not_mind_changes_in_place(op, device):
    # Neither input nor output is needed any more.
    x = torch.randn(3, 5, device=device, requires_grad=True)
    (want,) = torch.autograd.grad(op(x).sum(), x)
    h = x.clone()
    y = op(h)
    h.zero_()
    y.mul_(2)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, 2 * want)


def test_inplace_silu_module(device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    out = silu2(x)
    (want,) = torch.autograd.grad(out.sum(), x)
    h = x.clone()
    y = PUBLISHED[SILU2].module(inplace=True)(h)
    assert y.data_ptr() == h.data_ptr()
    assert torch.equal(h, out)
    assert EMULATED or torch.equal(h.detach(), F.silu(x.detach()))
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(autocast_dtype, device):
    x, _, weight, bias = tensors(device)
    with torch.autocast(device.type, dtype=autocast_dtype):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            h = x.to(dtype)
            assert gelu2(h).dtype == silu2(h).dtype == dtype
            want = torch.float64 if dtype == torch.float64 else autocast_dtype
            layer = LF.ms_layer_norm(h, (6,), weight, bias)
            rms = LF.ms_rms_norm(h, (6,), weight)
            assert layer.dtype == rms.dtype == want
            assert LF.ms_rms_norm(h, (6,), dtype=torch.float32).dtype == torch.float32
            assert LF.ms_layer_norm(h, (6,), dtype=torch.float32).dtype == torch.float32
            gradients = torch.autograd.grad(layer.sum() + rms.sum(), (x, weight, bias))
            assert [g.dtype for g in gradients] == [torch.float32] * 3
        with torch.autocast(device.type, enabled=False):
            assert LF.ms_rms_norm(x, (6,)).dtype == torch.float32


def test_autocast_emits_the_float32_result_rounded_once(device):
    x, _, weight, bias = tensors(device, requires_grad=False)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = LF.ms_layer_norm(x, (6,), weight, bias)
    assert torch.equal(got, LF.ms_layer_norm(x, (6,), weight, bias, dtype=torch.float32).bfloat16())


def test_modules_copy_and_pickle(device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        assert other.state_dict().keys() == net.state_dict().keys()


def test_many_threads(device):
    from concurrent.futures import ThreadPoolExecutor

    net = Net().to(device)
    inputs = [torch.randn(50, 6, device=device) for _ in range(16)]

    def grad(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(net(x).square().sum(), x)[0]

    want = [grad(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(grad, inputs * 4), want * 4, strict=True):
            assert torch.equal(got, expected)


# Tensors that are not plain ones. --------------------------------------------------------------------------------


def swish(x):
    return x * torch.sigmoid(1.702 * x)


def of_last(shape, x, values=(1.0, -2.0, 0.5)):
    """A parameter, of the kind that x is."""
    plain = torch.tensor(values).repeat(2)[: shape[0]].to(x.dtype)
    return TwoTensor(plain, plain.clone()) if isinstance(x, TwoTensor) else plain.to(x.device)


STEPS = ((-1.0, 0.0, 1.0), (0.0, 0.1, 0.9, 1.0))

# Not of tensors.
LEVELS = {"drawn_levels", "step_function"}

# Every function of a tensor of floating-point numbers, whose last dimension is of 6.
FUNCTIONS = {
    **{name: getattr(LF, name) for name in lomem.functional.activations.__all__ if name not in LEVELS},
    "gelu-tanh": lambda x: LF.gelu(x, "tanh", bits=8),
    "threshold": lambda x: LF.threshold(x, 0.1, 0.2),
    "step_activation": lambda x: LF.step_activation(x, swish, *STEPS),
    "step_activation-identity": lambda x: LF.step_activation(x, lambda x: x, *STEPS),
    "step_activation-view": lambda x: LF.step_activation(x, lambda x: x.view(x.shape), *STEPS),
    f"{GELU2}-tanh": lambda x: gelu2(x, "tanh"),
    f"{GELU2}-fast": lambda x: gelu2(x, fast=True),
    f"{SILU2}-fast": lambda x: silu2(x, fast=True),
    "dropout": lambda x: LF.dropout(x, 0.5),
    "dropout-seed": lambda x: LF.dropout(x, 0.5, saves="seed"),
    "gated": lambda x: LF.gated(x, of_last((6,), x).expand(4, 6)),
    "gated-fused": lambda x: LF.gated(x, activation="gelu", layout="interleaved"),
    "gated_linear": lambda x: LF.gated_linear(x, None, of_last((3,), x).expand(5, 3)),
    "lora": lambda x: LF.lora(x, of_last((6,), x).expand(2, 6), of_last((2,), x).expand(5, 2), 0.5),
    "ms_layer_norm": lambda x: LF.ms_layer_norm(x, (6,)),
    "ms_layer_norm-affine": lambda x: LF.ms_layer_norm(x, (6,), of_last((6,), x), of_last((6,), x, [3.0, 0.0, 9.0])),
    "ms_rms_norm": lambda x: LF.ms_rms_norm(x, (6,)),
    "ms_rms_norm-affine": lambda x: LF.ms_rms_norm(x, (6,), of_last((6,), x)),
    "layer_norm": lambda x: LF.layer_norm(x, (6,)),
    "rms_norm": lambda x: LF.rms_norm(x, (6,)),
    "randomized_linear": lambda x: LF.randomized_linear(x, of_last((6,), x).expand(3, 6), proj_dim=2),
}

MODULES = {
    **{
        name: getattr(lomem.nn, name)
        for name in lomem.nn.activations.__all__
        if name not in ("FewBitActivation", "StepActivation", "Threshold")
    },
    "Threshold": lambda: lomem.nn.Threshold(0.1, 0.2),
    "StepActivation": lambda: lomem.nn.StepActivation(swish, *STEPS),
    f"{PUBLISHED[GELU2].module.__name__}-fast": lambda: PUBLISHED[GELU2].module("tanh", fast=True),
    f"{PUBLISHED[SILU2].module.__name__}-inplace": lambda: PUBLISHED[SILU2].module(inplace=True),
    "Dropout": lomem.nn.Dropout,
    "Dropout-seed": lambda: lomem.nn.Dropout(saves="seed"),
    "GatedUnit": lomem.nn.GatedUnit,
    "GeGLU": lomem.nn.GeGLU,
    "SwiGLU": lomem.nn.SwiGLU,
    "GatedUnit-gelu": lambda: lomem.nn.GatedUnit("gelu", layout="up_gate"),
    "LoRALinear": lambda: lomem.nn.LoRALinear(nn.Linear(6, 5), 2, bias=True),
    "MSLayerNorm": lambda: lomem.nn.MSLayerNorm(6),
    "MSLayerNorm-affine": lambda: lomem.nn.MSLayerNorm(6, elementwise_affine=True),
    "MSLayerNorm-bfloat16": lambda: lomem.nn.MSLayerNorm(6, elementwise_affine=True, output_dtype=torch.bfloat16),
    "MSRMSNorm": lambda: lomem.nn.MSRMSNorm(6),
    "MSRMSNorm-affine": lambda: lomem.nn.MSRMSNorm(6, elementwise_affine=True),
    "RandomizedLinear": lambda: lomem.nn.RandomizedLinear(6, 5, proj_dim=2),
}


def test_every_function_and_module_is_here():
    packing = {"pack_bits", "pack_bool_to_uint8", "unpack_bits", "unpack_uint8_to_bool"}
    storage = {"quantize_groups", "dequantize_groups"}
    assert {name.split("-")[0] for name in FUNCTIONS} == set(LF.__all__) - packing - storage - LEVELS
    assert {name.split("-")[0] for name in MODULES} == set(lomem.nn.__all__) - {"FewBitActivation"}


def run_and_differentiate(f, x, *parameters):
    """f(x) and its gradients, of ones."""
    leaf = x.detach().requires_grad_()
    y = f(leaf * 1)
    wanted = [leaf, *(p for p in parameters if p.requires_grad)]
    return y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))


def described(tensors):
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_meta_tensors(name, dtype):
    x = torch.randn(4, 6, dtype=dtype)
    got = run_and_differentiate(FUNCTIONS[name], x.to("meta"))
    assert all(t.is_meta for t in got)
    assert described(got) == described(run_and_differentiate(FUNCTIONS[name], x))
    with torch.no_grad():
        assert described([FUNCTIONS[name](x.to("meta"))]) == described([FUNCTIONS[name](x)])


def test_packing_of_meta_tensors():
    for shape in ((), (0,), (5,), (3, 4)):
        codes = torch.zeros(shape, dtype=torch.uint8)
        for bits in range(1, 9):
            packed = LF.pack_bits(codes, bits)
            assert described([LF.pack_bits(codes.to("meta"), bits)]) == described([packed])
            unpacked = LF.unpack_bits(packed.to("meta"), bits, codes.numel())
            assert described([unpacked]) == described([codes.flatten()])
        packed = LF.pack_bool_to_uint8(codes.bool())
        assert described([LF.pack_bool_to_uint8(codes.bool().to("meta"))]) == described([packed])
        assert described([LF.unpack_uint8_to_bool(packed.to("meta"), shape)]) == described([codes.bool()])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules_on_meta(name, training):
    module = MODULES[name]().train(training)
    x = torch.randn(4, 6)
    want = run_and_differentiate(module, x, *module.parameters())
    for moved in (copy.deepcopy(module).to("meta"), *([MODULES[name]().to("meta").train(training)])):
        got = run_and_differentiate(moved, x.to("meta"), *moved.parameters())
        assert described(got) == described(want)
        assert all(t.is_meta for t in got)
    with torch.device("meta"):
        made = MODULES[name]()
    assert described(run_and_differentiate(made.train(training), x.to("meta"), *made.parameters())) == described(want)


@pytest.mark.cpu_kernels  # on CUDA nothing is refused for its values: that would wait for the device
@pytest.mark.parametrize("module", ["MSLayerNorm", "MSRMSNorm"])
def test_weights_on_meta_have_no_values(module):
    """What is refused for its values on a device is not on meta."""
    norm = getattr(lomem.nn, module)(6, elementwise_affine=True)
    with torch.no_grad():
        norm.weight.zero_()
    with pytest.raises(ValueError, match="weight is 0 at element 0"):
        norm(torch.randn(4, 6))
    norm.to("meta")(torch.empty(4, 6, device="meta")).sum().backward()
    assert norm.weight.grad.is_meta


# (The seed of randomized_linear is a plain tensor, which this subclass does not mix with its own; two calls of dropout
# differ.)
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"dropout", "dropout-seed", "randomized_linear"}))
def test_functions_of_wrapper_subclasses(name):
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    pairs = run_and_differentiate(FUNCTIONS[name], TwoTensor(a, b))
    for got, *want in zip(
        pairs, run_and_differentiate(FUNCTIONS[name], a), run_and_differentiate(FUNCTIONS[name], b), strict=True
    ):
        assert type(got) is TwoTensor
        assert torch.equal(got.a, want[0])
        assert torch.equal(got.b, want[1])
    with torch.no_grad():
        assert torch.equal(FUNCTIONS[name](TwoTensor(a, b)).b, FUNCTIONS[name](b))
    with torch.inference_mode():
        assert torch.equal(FUNCTIONS[name](TwoTensor(a, b)).b, FUNCTIONS[name](b))


@pytest.mark.parametrize("fn", [lambda x: x, lambda x: x.view(x.shape), lambda x: x.detach(), lambda x: x.t().t()])
def test_results_that_share_memory_with_a_wrapper_are_copied(fn):
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    x = TwoTensor(a, b).requires_grad_()
    y = LF.step_activation(x, fn, *STEPS)
    assert torch.equal(y.a, a)
    with torch.no_grad():
        y.mul_(2)
    assert torch.equal(x.a, a)
    assert not torch.equal(y.a, a)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def test_wrapper_subclasses_in_a_converted_model():
    model = nn.Sequential(nn.Linear(6, 6), Swish(), nn.Linear(6, 6))
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    lomem.convert(model, a)
    got = run_and_differentiate(model, TwoTensor(a, b))
    assert torch.equal(got[1].a, run_and_differentiate(model, a)[1])
    assert torch.equal(got[1].b, run_and_differentiate(model, b)[1])


# torch.jit.trace ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_trace(name, training, requires_grad):
    """With its checks, which run the module again without gradients and compare graphs."""
    model = nn.Sequential(nn.Linear(6, 6), MODULES[name]()).train(training)
    x = torch.randn(4, 6, requires_grad=requires_grad)
    check = (
        name not in ("Dropout", "Dropout-seed", "RandomizedLinear") or not training
    )  # random: no two calls are alike
    traced = torch.jit.trace(model, x, check_trace=check)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    # A graph keeps a function of Python's as the ops that it is of, with their gradients.
    like = nn.Sequential(model[0], Swish()) if name == "StepActivation" else model
    y = torch.randn(5, 6)
    want = run_and_differentiate(like, y, *like.parameters())
    for other in (traced, torch.jit.load(buffer)):
        results = []
        for f in (other, model):
            torch.manual_seed(1)
            results.append(f(y))
        assert torch.equal(*results)
        got = run_and_differentiate(other, y, *other.parameters())
        if check:
            torch.testing.assert_close(got, want)
        else:
            assert described(got) == described(want)
