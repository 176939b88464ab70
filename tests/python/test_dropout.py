"""Dropout: values, gradients and random numbers bit for bit torch's, and what is saved."""

import copy
import pickle

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import CUDA_ON_HOST, DTYPES, LAYOUTS, make_input
from lomem import reference
from lomem.memory import saved_for_backward
from torch import nn
from torch.utils.checkpoint import checkpoint

LF = lomem.functional
ops = torch.ops.lomem
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)
PROBABILITIES = (0.05, 0.1, 0.3, 0.5, 0.9)


def generator_state(device):
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def seeded(f, *args, device, seed=5, **kwargs):
    """f's result, and the state of the generator afterwards."""
    torch.manual_seed(seed)
    result = f(*args, **kwargs)
    return result, generator_state(device)


def same(a, b):
    """Equal values, of which zeros have the same sign; NaN equals NaN."""
    signs = (torch.signbit(a) == torch.signbit(b)) | a.isnan()
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and bool(((a == b) & signs | a.isnan()).all())


def rounds_twice(dtype, device):
    """Whether the kernels of CUDA, which multiply by 1 / (1 - p) in float32, run where torch rounds it to 16 bits."""
    return bool(CUDA_ON_HOST) and device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def assert_torchs(x, p):
    """Result, strides, gradient and generator."""
    device = x.device
    leaf = x.detach().requires_grad_()
    want, want_state = seeded(F.dropout, leaf, p, device=device)
    for requires_grad in (False, True):
        mine = x.detach().requires_grad_(requires_grad)
        got, state = seeded(LF.dropout, mine, p, device=device)
        assert torch.equal(state, want_state)
        assert got.stride() == want.stride()
        if rounds_twice(x.dtype, device) and requires_grad:
            torch.testing.assert_close(got, want, equal_nan=True)
            continue
        assert same(got, want)
        if requires_grad:
            for grad in (torch.randn_like(want), torch.randn_like(want.mT.contiguous()).mT if x.dim() > 1 else want):
                (mine_grad,) = torch.autograd.grad(got, mine, grad.detach(), retain_graph=True)
                (their_grad,) = torch.autograd.grad(want, leaf, grad.detach(), retain_graph=True)
                # (On CUDA torch's backward pass rounds the factor otherwise than its forward pass.)
                assert same(mine_grad, their_grad) or device.type == "cuda"
                torch.testing.assert_close(mine_grad, their_grad, equal_nan=True)


@of_dtypes
@of_layouts
def test_layouts(layout, dtype, device):
    for p in PROBABILITIES:
        assert_torchs(make_input(layout, dtype, device), p)


@of_dtypes
def test_sizes(dtype, device):
    for n in (*range(101), 127, 128, 129, 255, 256, 257, 799, 800, 801, 1599, 1601, 4097):
        assert_torchs(torch.randn(n, device=device).to(dtype), 0.3)
        assert_torchs(torch.randn(n, 3, device=device).to(dtype).t(), 0.3)


@of_dtypes
def test_large_sizes(dtype, device):
    # (Several threads, each of which skips ahead in the stream.)
    for n in (32767, 32769, 1000003):
        assert_torchs(torch.randn(n, device=device).to(dtype), 0.1)


@pytest.mark.cpu_kernels
@of_dtypes
def test_threads(dtype):
    before = torch.get_num_threads()
    x = torch.randn(200_003).to(dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_torchs(x, 0.2)
            torch.manual_seed(1)
            results.append(ops.dropout_forward(x, 0.2))
    finally:
        torch.set_num_threads(before)
    for output, mask in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(mask, results[0][1])


@of_dtypes
def test_special_values(dtype, device):
    """Zeros keep their sign, and what is not finite becomes NaN where it is dropped."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e4], device=device)
    x = values.to(dtype).repeat(50)
    assert_torchs(x, 0.5)
    assert_torchs(x.reshape(9, 50).t(), 0.5)
    torch.manual_seed(5)
    _, mask = ops.dropout_forward(torch.ones_like(x), 0.5)
    kept = reference.unpack_bits(mask, 1, x.numel()).bool()
    got = ops.dropout_apply(x, mask, 0.5)
    assert got[~kept & ~x.isfinite()].isnan().all()
    assert not (got[~kept & x.isfinite()]).any()


@of_dtypes
def test_many_probabilities(dtype, device):
    """The factor of torch, for any p."""
    x = torch.linspace(-3, 3, 301, device=device).to(dtype)
    for p in (*torch.rand(200).mul(0.999).tolist(), 1e-300, 1e-17, 1e-9, 1 - 2**-24, 1 - 2**-53, 0.9999):
        assert_torchs(x, p)


# The mask.


@of_dtypes
@of_layouts
def test_mask_is_in_row_major_order(layout, dtype, device):
    x = make_input(layout, dtype, device)
    for p in (0.2, 0.7):
        output, mask = ops.dropout_forward(x, p)
        assert (mask.dtype, mask.dim(), mask.numel()) == (torch.uint8, 1, (x.numel() + 7) // 8)
        kept = reference.unpack_bits(mask, 1, x.numel()).bool().reshape(x.shape)
        assert torch.equal(reference.pack_bits(kept.to(torch.uint8), 1), mask)  # (padding bits are 0)
        assert torch.equal(output == 0, ~kept | (x == 0))
        # It fits any tensor of the shape.
        for other in (x, x.contiguous(), x.mT.contiguous().mT if x.dim() > 1 else x, torch.ones_like(x)):
            got = ops.dropout_apply(other, mask, p)
            assert got.is_contiguous()
            if rounds_twice(dtype, device):
                torch.testing.assert_close(got, reference.dropout_apply(other, mask, p))
            elif device.type == "cpu":
                assert same(got, reference.dropout_apply(other, mask, p))
        if not rounds_twice(dtype, device):
            assert same(ops.dropout_apply(x, mask, p), output)


def test_rate(device):
    """The number of kept elements is within 6 standard deviations: a probability of 2e-9 each."""
    n = 1_000_000
    for p in PROBABILITIES:
        _, mask = ops.dropout_forward(torch.ones(n, device=device), p)
        kept = int(reference.unpack_bits(mask, 1, n).sum())
        assert abs(kept - n * (1 - p)) < 6 * (n * p * (1 - p)) ** 0.5


@of_dtypes
def test_zero_and_evaluation(dtype, device):
    x = make_input("transposed", dtype, device).requires_grad_()
    before = generator_state(device)
    assert LF.dropout(x, 0.0) is x
    assert LF.dropout(x, 0.4, False) is x
    with saved_for_backward() as saved:
        y = ops.dropout(x, 0.0)
    assert (saved.nbytes, saved.tensors) == (0, 0)
    assert y is not x
    assert torch.equal(y, x)
    assert torch.autograd.grad(y.sum(), x)[0].eq(1).all()
    output, mask = ops.dropout_forward(x.detach(), 0.0)
    assert torch.equal(output, x)
    assert reference.unpack_bits(mask, 1, x.numel()).all()
    assert torch.equal(generator_state(device), before)


# Gradients, and what is saved.


def test_saved_bytes(device):
    for dtype in DTYPES:
        for layout in LAYOUTS:
            x = make_input(layout, dtype, device).requires_grad_()
            with saved_for_backward() as saved:
                y = LF.dropout(x, 0.1)
            assert (saved.nbytes, saved.tensors) == ((x.numel() + 7) // 8, 1)
            with saved_for_backward() as saved:
                ops.dropout_apply(y.detach().requires_grad_(), ops.dropout_forward(y.detach(), 0.1)[1], 0.1)
            assert (saved.nbytes, saved.tensors) == ((x.numel() + 7) // 8, 1)
    with saved_for_backward() as saved, torch.no_grad():
        LF.dropout(x, 0.1)
    assert saved.tensors == 0


def test_gradients_of_gradients(device):
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    mask = ops.dropout_forward(x.detach(), 0.4)[1]

    def f(x):
        torch.manual_seed(3)
        return LF.dropout(x, 0.4) * x

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    assert torch.autograd.gradgradcheck(lambda x: ops.dropout_apply(x, mask, 0.4), x)


def test_no_gradient_comes_in(device):
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad_output):
            return None

    x = torch.randn(3, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(NoGradient.apply(LF.dropout(x)).sum(), x, allow_unused=True)
    assert grad is None or not grad.any()


# Modules, compilation, checkpointing, transforms.


def test_module(device):
    module = lomem.nn.Dropout(0.25)
    assert isinstance(module, nn.Dropout)
    assert repr(module) == "Dropout(p=0.25, saves='mask')"
    assert lomem.nn.Dropout().p == 0.5
    assert not module.state_dict()
    x = torch.randn(30, 40, device=device)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got, _ = seeded(other, x, device=device)
        want, _ = seeded(nn.Dropout(0.25), x, device=device)
        assert same(got, want)
        assert other.eval()(x) is x


def test_autocast(device):
    x = torch.randn(30, 40, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        assert LF.dropout(x).dtype == torch.float32
        assert LF.dropout(x.half()).dtype == torch.float16
        assert ops.dropout_forward(x.detach(), 0.5)[0].dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, device):
    x = torch.randn(30, 40, device=device, requires_grad=True)

    def f(x):
        return LF.dropout(x.sin(), 0.3).cos()

    want, _ = seeded(lambda: torch.autograd.grad(f(x).sum(), x)[0], device=device)
    seeded(lambda: checkpoint(f, x, use_reentrant=use_reentrant).sum().backward(), device=device)
    assert torch.equal(x.grad, want)


def assert_one_mask(y, grad, x):
    """y = 2 * dropout(x), and the gradient of its sum has the same elements dropped."""
    assert torch.equal(y != 0, grad != 0)
    torch.testing.assert_close(y, grad * x)
    assert 0.2 < (y == 0).double().mean() < 0.4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend, device):
    def f(x):
        return LF.dropout(x * 2, 0.3)

    torch._dynamo.reset()  # (Compilations of one function, here of all cases, are limited.)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (30, 50):
        for x in (torch.rand(rows, 40, device=device) + 1, (torch.rand(40, rows, device=device) + 1).t()):
            x.requires_grad_()
            results = []
            for g in (compiled, compiled, f):
                torch.manual_seed(2)
                y = g(x)
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert_one_mask(y, grad, x)
                results.append(y)
            assert torch.equal(results[0], results[1])
            if backend == "aot_eager":
                assert torch.equal(results[0], results[2])
            first, second = compiled(x), compiled(x)
            assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpoints_use_the_same_mask(backend, device):
    def block(x):
        return LF.dropout(x * 2, 0.3) * 1.0

    def f(x):
        return checkpoint(block, x, use_reentrant=False)

    compiled = torch.compile(f, backend=backend)
    x = (torch.rand(30, 40, device=device) + 1).requires_grad_()
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_one_mask(y, grad, x)


def test_export(device):
    x = torch.randn(4, 6, device=device)
    program = torch.export.export(lomem.nn.Dropout(0.3), (x,), dynamic_shapes={"input": {0: torch.export.Dim("rows")}})
    assert [str(node.target) for node in program.graph.nodes if "lomem" in str(node.target)] == [
        "lomem.dropout.default"
    ]
    other = torch.randn(9, 6, device=device)
    got, _ = seeded(program.module(), other, device=device)
    assert same(got, seeded(F.dropout, other, 0.3, device=device)[0])


def test_transforms_are_refused(device):
    x = torch.randn(3, 4, device=device)
    mask = ops.dropout_forward(x, 0.5)[1]
    for call in (lambda x: LF.dropout(x), lambda x: ops.dropout_forward(x, 0.5)[0]):
        for randomness in ("error", "same", "different"):
            with pytest.raises(NotImplementedError, match=r"^lomem::dropout\w*: got a call inside torch\.func\.vmap"):
                torch.func.vmap(call, randomness=randomness)(x)
    for call in (lambda x: LF.dropout(x), lambda x: ops.dropout_apply(x, mask, 0.5)):
        with pytest.raises(RuntimeError, match=r"functorch transforms|torch\.func"):
            torch.func.grad(lambda x, call=call: call(x).sum())(x)
        with pytest.raises(NotImplementedError, match="input has a forward-mode tangent"):
            torch.func.jvp(call, (x,), (x,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_with_a_given_mask(device):
    x = torch.randn(3, 40, device=device)
    mask = ops.dropout_forward(x[0], 0.5)[1]
    got = torch.func.vmap(lambda x: ops.dropout_apply(x, mask, 0.5))(x)
    assert torch.equal(got, torch.stack([ops.dropout_apply(row, mask, 0.5) for row in x]))


def test_jagged():
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(5, 8)], layout=torch.jagged)
    got, _ = seeded(LF.dropout, nested, 0.5, device=torch.device("cpu"))
    want, _ = seeded(F.dropout, nested, 0.5, device=torch.device("cpu"))
    assert torch.equal(got.values(), want.values())


# Errors.


def test_errors(device):
    x = torch.ones(4, 8, device=device)
    mask = torch.zeros(4, dtype=torch.uint8, device=device)
    numbers = "expected a number in [0, 1)"
    floats = "expected float64, float32, bfloat16 or float16"
    cases = [
        *((lambda p=p: LF.dropout(x, p), f"dropout: p is {p:g}, {numbers}") for p in (-0.1, 1.0, 1.5, float("nan"))),
        (lambda: LF.dropout(x, 1.0, training=False), f"dropout: p is 1, {numbers}"),
        (lambda: LF.dropout(x, saves="bits"), "dropout: saves is 'bits', expected "),
        (lambda: LF.dropout(x, training=False, saves=""), "dropout: saves is '', expected "),
        (lambda: LF.dropout(x.long()), f"dropout: input has dtype int64, {floats}"),
        (lambda: lomem.nn.Dropout(1.0), f"dropout: p is 1, {numbers}"),
        (lambda: lomem.nn.Dropout(saves="all"), "dropout: saves is 'all', expected "),
        (lambda: ops.dropout_forward(x, 2.0), f"dropout_forward: p is 2, {numbers}"),
        (lambda: ops.dropout_forward(x.bool(), 0.5), f"dropout_forward: input has dtype bool, {floats}"),
        (lambda: ops.dropout_apply(x, mask, -1.0), f"dropout_apply: p is -1, {numbers}"),
        (lambda: ops.dropout_apply(x, mask[1:], 0.5), "dropout_apply: mask has 3 bytes, expected 4 for 32 elements of"),
        (lambda: ops.dropout_apply(x, mask.float(), 0.5), "dropout_apply: mask has dtype float32, expected uint8"),
        (
            lambda: ops.dropout_apply(x, mask.to("meta"), 0.5),
            f"dropout_apply: mask is on meta, expected {x.device}, the",
        ),
    ]
    for call, message in cases:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call()
        assert str(raised.value).startswith(f"lomem::{message}")
    with pytest.raises(ValueError, match=r"^lomem\.nn\.Dropout: inplace is True, expected False"):
        lomem.nn.Dropout(0.1, True)
