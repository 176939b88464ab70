"""Gated units: values bit for bit those of torch's ops, gradients against float64, and what is saved."""

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EPS, runs_cuda_kernels
from lomem import reference
from lomem.memory import saved_for_backward
from torch.utils.checkpoint import checkpoint

LF = lomem.functional
ops = torch.ops.lomem
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
LAYOUTS = ["gate_up", "up_gate", "interleaved"]
of_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e4, -1e4, 200.0, -200.0, 1e-7, -1e-7]


def halves(both, layout):
    if layout == "interleaved":
        return both[..., ::2], both[..., 1::2]
    first, second = both.chunk(2, -1)
    return (first, second) if layout == "gate_up" else (second, first)


def operands(shape, dtype, device, scale=3.0):
    return [torch.randn(shape, device=device).mul_(scale).to(dtype) for _ in range(2)]


def by_formulas_of_cuda(activation, gate):
    """The activation as torch's CUDA kernels compute it: in float32 for 16-bit dtypes, by these formulas."""
    x = gate if gate.dtype == torch.float64 else gate.float()
    formulas = {
        "silu": lambda: x / (1 + torch.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)),
        "gelu_tanh": lambda: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x))),
        "relu": lambda: torch.relu(x),
        "sigmoid": lambda: 1 / (1 + torch.exp(-x)),
    }
    return formulas[activation]().to(gate.dtype)


def assert_same_values(got, gate, up, activation):
    """Bit for bit torch's, but for the bits of a NaN. The emulator's exp, erf and tanh are others, nearly the same."""
    emulated = runs_cuda_kernels(got.device) and got.device.type == "cpu"
    want = (by_formulas_of_cuda(activation, gate) if emulated else ACTIVATIONS[activation](gate)) * up
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    if emulated:
        finite = want.isfinite()
        assert torch.equal(got[~finite & ~want.isnan()], want[~finite & ~want.isnan()])
        got, want, size = (t[finite].double() for t in (got, want, gate.double() * up.double()))
        # A few units of exp, erf or tanh, which are added to 1, and one of each rounding to the dtype.
        units = 8 * EPS[torch.promote_types(gate.dtype, torch.float32)]
        terms = torch.maximum(size.abs().nan_to_num(0), want.abs())
        bound = units * terms + 2 * EPS[gate.dtype] * want.abs() + torch.finfo(gate.dtype).smallest_normal
        wrong = (got - want).abs() > bound
        assert not wrong.any(), (got[wrong], want[wrong])
        return
    same = (got == want) & (torch.signbit(got) == torch.signbit(want))
    assert (same | torch.isnan(want)).all()
    assert got.stride() == want.stride()


STRIDED = {
    "contiguous": lambda gate, up: (gate, up),
    "transposed": lambda gate, up: (gate.mT.contiguous().mT, up.mT.contiguous().mT),
    "one transposed": lambda gate, up: (gate.mT.contiguous().mT, up),
    "the other transposed": lambda gate, up: (gate, up.mT.contiguous().mT),
    "halves": lambda gate, up: torch.cat([gate, up], -1).chunk(2, -1),
    "one half": lambda gate, up: (torch.cat([gate, up], -1).chunk(2, -1)[0], up),
    "halves of rows": lambda gate, up: torch.cat([gate, up], 0).chunk(2, 0),
    "every other": lambda gate, up: tuple(torch.stack([gate, up], -1).unbind(-1)),
    "misaligned": lambda gate, up: tuple(F.pad(t.flatten(), (1, 0))[1:].view(t.shape) for t in (gate, up)),
    "expanded": lambda gate, up: (gate[:1].expand_as(gate), up[..., :1].expand_as(up)),
}


@of_activations
@of_dtypes
@pytest.mark.parametrize("kind", STRIDED)
def test_values(kind, dtype, activation, device):
    for shape in ((0, 5), (3, 0), (1, 1), (2, 1), (1, 31), (3, 33), (4, 64), (2, 3, 40), (2, 3, 5, 7), (130, 257)):
        gate, up = STRIDED[kind](*operands(shape, dtype, device))
        with torch.no_grad():
            assert_same_values(LF.gated(gate, up, activation), gate, up, activation)
        assert_same_values(LF.gated(gate.detach().requires_grad_(), up, activation).detach(), gate, up, activation)


@of_activations
@of_dtypes
@of_layouts
def test_values_of_one_tensor(layout, dtype, activation, device):
    for shape in ((0,), (2,), (62,), (3, 66), (0, 4), (3, 0), (2, 3, 40), (130, 514), (64, 128)):
        both = operands(shape, dtype, device)[0]
        gate, up = halves(both, layout)
        assert_same_values(LF.gated(both, activation=activation, layout=layout), gate, up, activation)
        assert torch.equal(reference.gated(both, None, activation, layout=layout), ACTIVATIONS[activation](gate) * up)
    rows = operands((6, 80), dtype, device)[0]
    for both in (rows[::2], rows[:, :40], rows[:, 1:39], rows[:, ::2], rows.t()):
        assert_same_values(LF.gated(both, activation=activation, layout=layout), *halves(both, layout), activation)


@of_activations
@of_dtypes
def test_values_of_no_and_of_one_element(dtype, activation, device):
    for shape in ((), (1,), (1, 1, 1)):
        gate, up = operands(shape, dtype, device)
        assert_same_values(LF.gated(gate, up, activation), gate, up, activation)


@pytest.mark.cpu_kernels
@of_activations
@of_dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_values_in_tiles(threads, dtype, activation):
    """Large enough to be computed in tiles, with and without a remainder; contiguous and as rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (2**19 - 1, 2**19, 2**20 + 67):
            gate, up = operands((n,), dtype, "cpu")
            assert_same_values(LF.gated(gate, up, activation), gate, up, activation)
        for shape in ((700, 1537), (3, 2**19 - 40), (2**18, 4)):
            both = operands((*shape[:-1], 2 * shape[-1]), dtype, "cpu")[0]
            assert_same_values(LF.gated(both, activation=activation), *halves(both, "gate_up"), activation)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpu_kernels
@of_activations
def test_values_of_onednn_in_tiles(activation):
    gate, up = operands((2**23 + 12345,), torch.bfloat16, "cpu")
    assert_same_values(LF.gated(gate, up, activation), gate, up, activation)


@of_activations
@of_dtypes
def test_special_values(dtype, activation, device):
    values = torch.tensor(SPECIAL, device=device).to(dtype)
    gate, up = (t.contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    for _ in range(2):
        assert_same_values(LF.gated(gate, up, activation), gate, up, activation)
        gate, up = gate.repeat(1, 3), up.repeat(1, 3)


# Gradients.


def exact_gradients(grad, gate, up, activation):
    """In float64, by torch."""
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    return torch.autograd.grad(ACTIVATIONS[activation](gate) * up, (gate, up), grad.double())


def assert_gradients_close(got, grad, gate, up, activation):
    """One rounding, and errors of the arithmetic, of the size of the largest term."""
    want = exact_gradients(grad, gate, up, activation)
    dtype = gate.dtype
    scales = ((grad * up).double().abs(), (grad.double() * gate.double()).abs() + grad.double().abs())
    # The derivative takes a few operations of float32 (float64); terms are as large as the gate. Where results have 16
    # bits, polynomials have fewer terms.
    arithmetic = {torch.float64: 2e-14, torch.float32: 4e-7}.get(dtype, 2e-5)
    smallest = torch.finfo(dtype).smallest_normal
    for mine, exact, scale in zip(got, want, scales, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - exact).abs()
        bound = EPS[dtype] / 2 * exact.abs() + arithmetic * scale + smallest * EPS[dtype]
        assert (error <= bound).all(), (error / bound).max()


@of_activations
@of_dtypes
@pytest.mark.parametrize("kind", STRIDED)
def test_gradients(kind, dtype, activation, device):
    for shape in ((0, 5), (3, 0), (1, 1), (1, 31), (3, 33), (4, 64), (2, 3, 40), (2, 3, 5, 7), (130, 257)):
        gate, up = (t.detach().requires_grad_() for t in STRIDED[kind](*operands(shape, dtype, device)))
        grad = torch.randn(shape, device=device).to(dtype)
        got = torch.autograd.grad(LF.gated(gate, up, activation), (gate, up), grad)
        assert_gradients_close(got, grad, gate, up, activation)


@of_activations
@of_dtypes
@of_layouts
def test_gradients_of_one_tensor(layout, dtype, activation, device):
    for shape in ((2,), (62,), (3, 66), (0, 4), (2, 3, 40), (130, 514), (64, 128)):
        both = operands(shape, dtype, device)[0].requires_grad_()
        y = LF.gated(both, activation=activation, layout=layout)
        grad = torch.randn(y.shape, device=device).to(dtype)
        (got,) = torch.autograd.grad(y, both, grad)
        assert got.shape == both.shape
        assert got.is_contiguous()
        assert_gradients_close(halves(got, layout), grad, *halves(both, layout), activation)


@pytest.mark.cpu_kernels
@of_activations
def test_gradients_everywhere(activation):
    """All inputs of 16 bits, and many of 32."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for gate in (every.view(torch.bfloat16), every.view(torch.float16), torch.linspace(-30, 30, 400_001)):
        gate = gate[gate.abs() < 1e4].clone()
        up, grad = torch.ones_like(gate), torch.ones_like(gate)
        got = ops.gated_backward(grad, gate, up, activation)[:2]
        assert_gradients_close(got, grad, gate, up, activation)


@of_activations
@of_dtypes
def test_gradients_are_finite_where_torch_has_finite_ones(dtype, activation, device):
    values = torch.tensor([*SPECIAL, 3e38, -3e38, 88.0, -88.0], device=device).to(dtype)
    gate, up, grad = (t.flatten().requires_grad_() for t in torch.meshgrid(values, values, values, indexing="ij"))
    want = torch.autograd.grad(ACTIVATIONS[activation](gate) * up, (gate, up), grad.detach())
    got = torch.autograd.grad(LF.gated(gate, up, activation), (gate, up), grad.detach())
    for mine, theirs in zip(got, want, strict=True):
        assert not (theirs.isfinite() & ~mine.isfinite()).any()


@of_activations
@of_dtypes
def test_the_output_again(dtype, activation, device):
    for shape in ((1,), (3, 33), (4, 64)):
        gate, up = operands(shape, dtype, device)
        grad = torch.randn(shape, device=device).to(dtype)
        *grads, output = ops.gated_backward(grad, gate, up, activation, output_mask=[True, True, True])
        assert torch.equal(output, LF.gated(gate, up, activation))
        for mine, theirs in zip(grads, ops.gated_backward(grad, gate, up, activation)[:2], strict=True):
            assert torch.equal(mine, theirs)
        for layout in LAYOUTS:
            both = operands((*shape[:-1], 2 * shape[-1]), dtype, device)[0]
            _, none, output = ops.gated_backward(
                grad, both, None, activation, layout=layout, output_mask=[True, True, True]
            )
            assert none is None
            assert torch.equal(output, LF.gated(both, activation=activation, layout=layout))


def test_gradients_that_are_asked_for(device):
    gate, up = operands((3, 33), torch.bfloat16, device)
    grad = torch.randn_like(gate)
    every = ops.gated_backward(grad, gate, up, "silu", output_mask=[True] * 3)
    for mask in ([False] * 3, [True, False, False], [False, True, False], [False, False, True], [False, True, True]):
        some = ops.gated_backward(grad, gate, up, "silu", output_mask=mask)
        for wanted, mine, all_of_them in zip(mask, some, every, strict=True):
            assert (mine is None) if not wanted else torch.equal(mine, all_of_them)


@pytest.mark.cpu_kernels
@of_dtypes
def test_threads_do_not_matter(dtype):
    before = torch.get_num_threads()
    both = operands((300, 2 * 701), dtype, "cpu")[0]
    gate, up = operands((300, 701), dtype, "cpu")
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                (*ops.gated_backward(gate, gate, up, "gelu")[:2], ops.gated_backward(gate, both, None, "silu")[0])
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@of_activations
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_gradients_of_gradients(layout, activation, device):
    shape = (3, 4) if layout is None else (3, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2 if layout is None else 1)]
    # (ReLU has no second derivative at 0.)
    inputs = [torch.where(x.abs() < 0.1, x + 0.3, x).requires_grad_() for x in inputs]
    options = {} if layout is None else {"layout": layout}

    def unit(gate, up=None):
        return LF.gated(gate, up, activation, **options)

    # The emulator's double precision is a smaller part of the machine's.
    assert torch.autograd.gradcheck(unit, inputs)
    assert torch.autograd.gradgradcheck(unit, inputs)


def test_saved_bytes(device):
    for dtype in DTYPES:
        gate, up = (t.requires_grad_() for t in operands((5, 33), dtype, device))
        with saved_for_backward() as saved:
            LF.gated(gate, up)
        assert (saved.nbytes, saved.tensors) == (2 * gate.nbytes, 2)
        both = operands((5, 66), dtype, device)[0].requires_grad_()
        for layout in LAYOUTS:
            with saved_for_backward() as saved:
                LF.gated(both, layout=layout)
            assert (saved.nbytes, saved.tensors) == (both.nbytes, 1)
        with saved_for_backward() as saved:
            LF.gated(*both.chunk(2, -1))
        assert (saved.nbytes, len(saved.storages)) == (both.nbytes, 1)


def test_one_operand_needs_a_gradient(device):
    gate, up = operands((5, 33), torch.float32, device)
    want = ops.gated_backward(torch.ones_like(gate), gate, up, "gelu")
    for i in range(2):
        inputs = [gate.clone(), up.clone()]
        inputs[i].requires_grad_()
        LF.gated(*inputs, "gelu").sum().backward()
        assert torch.equal(inputs[i].grad, want[i])
        assert inputs[1 - i].grad is None


# The linear layer behind.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(33,), (5, 33), (2, 3, 33), (0, 33)])
def test_linear(shape, fused, bias, device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gate, up = operands(shape, dtype, device)
        inputs = (
            [torch.cat([gate, up], -1).requires_grad_(), None]
            if fused
            else [gate.requires_grad_(), up.requires_grad_()]
        )
        weight = torch.randn(7, 33, device=device).to(dtype).requires_grad_()
        b = torch.randn(7, device=device).to(dtype).requires_grad_() if bias else None
        leaves = [t for t in (*inputs, weight, b) if t is not None]
        with saved_for_backward([weight]) as saved:
            got = LF.gated_linear(*inputs, weight, b)
        assert saved.nbytes == sum(t.nbytes for t in inputs if t is not None)
        want = F.linear(LF.gated(*inputs), weight, b)
        assert torch.equal(got, want)
        grad = torch.randn_like(want)
        for mine, theirs in zip(
            torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        with torch.no_grad():
            assert torch.equal(LF.gated_linear(*inputs, weight, b), want)


def test_linear_of_frozen_operands(device):
    gate, up = operands((5, 33), torch.float32, device)
    weight = torch.randn(7, 33, device=device)
    tensors = {"gate": gate, "up": up, "weight": weight, "bias": torch.randn(7, device=device)}
    for name in tensors:
        leaves = {other: t.clone().requires_grad_(other == name) for other, t in tensors.items()}
        (got,) = torch.autograd.grad(LF.gated_linear(*leaves.values()).square().sum(), leaves[name])
        want = F.linear(LF.gated(leaves["gate"], leaves["up"]), leaves["weight"], leaves["bias"]).square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(want, leaves[name])[0])


def test_linear_gradients_of_gradients(device):
    inputs = [
        torch.randn(s, dtype=torch.float64, device=device).requires_grad_() for s in ((3, 4), (3, 4), (2, 4), (2,))
    ]
    assert torch.autograd.gradcheck(LF.gated_linear, inputs)
    assert torch.autograd.gradgradcheck(LF.gated_linear, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_under_autocast(dtype, device):
    gate, up = (t.requires_grad_() for t in operands((5, 33), dtype, device))
    weight = torch.randn(7, 33, device=device, requires_grad=True)
    bias = torch.randn(7, device=device, requires_grad=True)
    leaves = (gate, up, weight, bias)
    results = []
    for call in (LF.gated_linear, lambda gate, up, weight, bias: F.linear(LF.gated(gate, up), weight, bias)):
        with torch.autocast(device.type, torch.bfloat16):
            assert LF.gated(gate, up).dtype == dtype
            y = call(*leaves)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


# Modules, compilation, checkpointing.


@of_activations
@of_layouts
def test_module(layout, activation, device):
    unit = lomem.nn.GatedUnit(activation, layout=layout)
    both = operands((3, 66), torch.float32, device)[0]
    assert torch.equal(unit(both), LF.gated(both, activation=activation, layout=layout))
    gate, up = operands((3, 33), torch.float32, device)
    assert torch.equal(unit(gate, up), LF.gated(gate, up, activation))
    assert repr(unit) == f"GatedUnit('{activation}', layout='{layout}')"
    assert not unit.state_dict()
    assert not list(unit.parameters())


def test_modules_of_one_activation(device):
    both = operands((3, 66), torch.float32, device)[0]
    gate, up = both.chunk(2, -1)
    assert_same_values(lomem.nn.SwiGLU()(both), gate, up, "silu")
    assert_same_values(lomem.nn.GeGLU()(gate, up), gate, up, "gelu")
    assert_same_values(lomem.nn.GeGLU("tanh", layout="up_gate")(both), up, gate, "gelu_tanh")
    with pytest.raises(ValueError, match="GeGLU: approximate is 'erf', expected 'none' or 'tanh'"):
        lomem.nn.GeGLU("erf")
    assert repr(lomem.nn.GeGLU("tanh")) == "GeGLU('gelu_tanh', layout='gate_up')"


@pytest.mark.parametrize("up", ["a row", "a number"])
def test_backward_of_an_expanded_factor(up, device):
    # Rows that overlap: as the gradient of an activation alone is computed.
    gate, grad = operands((5, 33), torch.float32, device)
    factor = operands((1, 33 if up == "a row" else 1), torch.float32, device)[0].expand(5, 33)
    got = ops.gated_backward(grad, gate, factor, "gelu", output_mask=[True] * 3)
    want = ops.gated_backward(grad, gate, factor.contiguous(), "gelu", output_mask=[True] * 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_module_is_glu(device):
    both = operands((3, 66), torch.float32, device)[0]
    got = lomem.nn.GatedUnit("sigmoid", layout="up_gate")(both)
    torch.testing.assert_close(got, torch.nn.GLU()(both))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend, device):
    weight = torch.randn(6, 8, device=device, requires_grad=True)

    def f(both, gate, up):
        first = LF.gated(both, activation="gelu", layout="interleaved") + LF.gated(gate, up, "gelu_tanh")
        return LF.gated_linear(first, up, weight).square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (3, 5, 9):
        inputs = [torch.randn(rows, n, device=device, requires_grad=True) for n in (16, 8, 8)]
        leaves = (*inputs, weight)
        for mine, theirs in zip(
            torch.autograd.grad(compiled(*inputs), leaves), torch.autograd.grad(f(*inputs), leaves), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_checkpointing(device):
    gate, up = (t.requires_grad_() for t in operands((5, 33), torch.float32, device))
    want = torch.autograd.grad(LF.gated(gate, up).sum(), (gate, up))
    got = torch.autograd.grad(checkpoint(LF.gated, gate, up, use_reentrant=False).sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_jagged():
    parts = [torch.randn(n, 8) for n in (2, 5)]
    both = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for got, part in zip(LF.gated(both).unbind(), parts, strict=True):
        torch.testing.assert_close(got, LF.gated(part))


# Errors.


def test_errors(device):
    x, y = torch.ones(4, 8, device=device), torch.ones(4, 6, device=device)
    weight = torch.ones(5, 8, device=device)
    activations = "expected one of silu, gelu, gelu_tanh, relu, sigmoid"
    layouts = "expected one of gate_up, up_gate, interleaved"
    cases = [
        (lambda: LF.gated(x, y), "gated: up has shape [4, 6], expected [4, 8], the shape of gate"),
        (lambda: LF.gated(x, x.double()), "gated: up has dtype float64, expected float32, the dtype of gate"),
        (lambda: LF.gated(x, x.to("meta")), f"gated: up is on meta, expected {x.device}, the device of gate"),
        (lambda: LF.gated(x[:, 1:]), "gated: gate has shape [4, 7], expected an even last dimension, which holds gate"),
        (lambda: LF.gated(x[0, 0]), "gated: gate has shape [], expected an even last dimension, which holds gate"),
        (lambda: LF.gated(x, x, "tanh"), f"gated: activation is 'tanh', {activations}"),
        (lambda: LF.gated(x, x, layout="both"), f"gated: layout is 'both', {layouts}"),
        (lambda: lomem.nn.GatedUnit("tanh"), f"gated: activation is 'tanh', {activations}"),
        (lambda: lomem.nn.GatedUnit(layout=""), f"gated: layout is '', {layouts}"),
        (lambda: LF.gated(x.long(), x.long()), "gated: gate has dtype int64, expected float64, float32, bfloat16 or"),
        (lambda: LF.gated(x, x.to(torch.complex64)), "gated: up has dtype complex64, expected float64, float32, bflo"),
        (
            lambda: ops.gated_backward(y, x, x, "silu"),
            "gated_backward: grad_output has shape [4, 6], expected [4, 8], the shape of the unit's result",
        ),
        (
            lambda: ops.gated_backward(x.half(), x, x, "silu"),
            "gated_backward: grad_output has dtype float16, expected float32, the dtype of gate",
        ),
        (lambda: LF.gated_linear(x, y, weight), "gated_linear: up has shape [4, 6], expected [4, 8], the shape of"),
        (lambda: LF.gated_linear(x, x, weight[0]), "gated_linear: weight has shape [8], expected (out_features, in_f"),
        (
            lambda: LF.gated_linear(y, y, weight),
            "gated_linear: weight has shape [5, 8], expected in_features 6, the last dimension of the unit's result",
        ),
        (
            lambda: LF.gated_linear(x, x, weight, weight[0]),
            "gated_linear: bias has shape [8], expected [5], the out_features of weight",
        ),
        (
            lambda: LF.gated_linear(x, x, weight, weight[:, 0].half()),
            "gated_linear: bias has dtype float16, expected float32, the dtype of weight",
        ),
        (lambda: LF.gated_linear(x[0, 0], x[0, 0], weight), "gated_linear: gate has shape [], expected at least one"),
    ]
    for call, message in cases:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call()
        assert str(raised.value).startswith(f"lomem::{message}")
