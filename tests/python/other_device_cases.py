"""Every op on a device without kernels, against the CPU: run by test_other_devices.py, in a process of its own."""

import copy
import itertools

import lomem
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import HARD, SMOOTH
from helpers import DTYPES, same_bits
from other_device import DEVICE, NAME, NO_FLOAT64, calls, on_cpu
from test_transforms import OPS, Net, samples
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

LF = lomem.functional
ops = torch.ops.lomem
FLOATS = [dtype for dtype in DTYPES if not (NO_FLOAT64 and dtype == torch.float64)]
of_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)

#: Results that are not the CPU's bit for bit: those ops have arithmetic of their own there. Which of them, and the
#: spacings of float32 (of float64 for float64) that they may be apart, relative to the largest element.
UNITS = {
    # The CPU sums in float32 in blocks of rows, and rounds each step; the reference in float64, or in any order.
    "ms_layer_norm": 16,
    "ms_rms_norm": 16,
    # exp and erf are polynomials on the CPU: for 16 bits with an error of 1e-5, a fiftieth of the dtype's rounding.
    "gated": 8,
    # Logarithms and cosines of blocks of another size: torch's vector kernels treat the end of a block differently.
    "randomized_linear": 16,
}
#: Why an op does not run on a device without float64.
NEED_FLOAT64 = {
    "crs": "the sums of row norms that rows are picked by are float64",
    "wta-crs": "as for crs",
}


def to_device(value):
    def move(tensor):
        dense = tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)
        stride = tensor.stride() if dense else torch.empty_like(tensor).stride()
        result = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=DEVICE)
        with torch.no_grad():
            result.copy_(tensor)
        return result.requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, move, value)


def fresh(value):
    """The same leaves, without gradients."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), value)


def units_of(name):
    return next((units for family, units in UNITS.items() if name.startswith(family)), 0)


def assert_same(got, want, units, what=""):
    """Bit for bit; or within some spacings of float32 and one of the dtype."""
    assert (got is None) == (want is None), what
    if want is None:
        return
    assert got.device == DEVICE, what
    assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype), what
    got = on_cpu(got.detach())
    if units == 0 or not want.is_floating_point():
        assert same_bits(got, want.detach()), what
        return
    wide = torch.float64 if want.dtype == torch.float64 and not NO_FLOAT64 else torch.float32
    atol = units * torch.finfo(wide).eps * float(want.detach().double().abs().max() if want.numel() else 0)
    rtol = max(torch.finfo(want.dtype).eps, units * torch.finfo(wide).eps)
    torch.testing.assert_close(got.double(), want.detach().double(), rtol=rtol, atol=atol)


def saved_by(function):
    """The result of a function, what it saved for its backward pass, and the bytes of that."""
    kept = []
    with lomem.memory.saved_for_backward() as saved:
        function()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach().clone()) or t, lambda t: t)
    with hooks:
        result = function()
    return result, kept, saved.nbytes


def compare(function, arguments, units=0):
    """Results, what is saved, and gradients on both devices. ``function`` draws the same numbers at every call."""
    here, there = fresh(arguments), to_device(arguments)
    (want, want_kept, want_bytes), (got, got_kept, got_bytes) = (
        saved_by(lambda a=a: function(*a)) for a in (here, there)
    )
    wants, gots = map(tree_leaves, (want, got))
    for i, (a, b) in enumerate(zip(gots, wants, strict=True)):
        assert_same(a, b, units, f"result {i}")
    assert got_bytes == want_bytes
    for i, (a, b) in enumerate(zip(got_kept, want_kept, strict=True)):
        assert_same(a, b, units, f"saved tensor {i}")
    leaves = [t for t in tree_leaves(here) if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves_there = [t for t in tree_leaves(there) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves or not wants[0].requires_grad:
        return
    grad = torch.randn_like(wants[0])
    gradients = torch.autograd.grad(wants[0], leaves, grad, allow_unused=True)
    gradients_there = torch.autograd.grad(gots[0], leaves_there, to_device(grad), allow_unused=True)
    for i, (a, b) in enumerate(zip(gradients_there, gradients, strict=True)):
        assert_same(a, b, units, f"gradient {i}")


def test_no_op_is_left_out():
    assert set(OPS) == {n.removeprefix("lomem::") for n in torch._C._dispatch_get_all_op_names() if "lomem::" in n}


@pytest.mark.parametrize("name", OPS)
def test_every_op(name):
    op = getattr(ops, name)
    for args, kwargs in samples("cpu")[name]:
        if NO_FLOAT64 and kwargs.get("matmul") in NEED_FLOAT64 and name != "randomized_linear_weight_grad":
            with pytest.raises(TypeError, match=f"{NAME} has no float64"):
                op(*to_device(args), **to_device(kwargs))
            continue

        def call(args, kwargs):
            torch.manual_seed(5)
            lomem.random.manual_seed(7)
            return op(*args, **kwargs)

        # (A gradient of torch's linear layer; the rest of these ops is that of the ops that they are made of.)
        compare(call, (args, kwargs), units_of(name))


def make(dtype, *shape, layout="contiguous"):
    x = torch.randn(*shape).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.mT
    elif layout == "sliced":
        x = x[..., 1:]
    return x


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@of_dtypes
@pytest.mark.parametrize(("number", "name"), list(enumerate([*SMOOTH, *HARD])))
def test_activations(number, name, dtype):
    # (Every activation in every dtype; layouts are the same code for all of them.)
    layout = LAYOUTS[(number + DTYPES.index(dtype)) % len(LAYOUTS)]
    x = make(dtype, 2, 3, 4, 5, layout=layout).requires_grad_()
    if name in HARD:
        compare(HARD[name][0], (x,))
        return
    function = SMOOTH[name][0]
    for bits in (1, 3, 8):
        compare(lambda t, bits=bits: function(t, bits=bits), (x,))
        seed = torch.tensor(2**40 + bits)
        compare(lambda t, s, bits=bits: function(t, bits=bits, rounding="stochastic", seed=s), (x, seed))


@of_layouts
@of_dtypes
def test_dropout(dtype, layout):
    x = make(dtype, 2, 3, 5, 7, layout=layout)
    mask = torch.randint(0, 256, ((x.numel() + 7) // 8,), dtype=torch.uint8)
    for p in (0.1, 0.5):
        compare(lambda t, m, p=p: ops.dropout_apply(t, m, p), (x.clone().requires_grad_(), mask))
        compare(lambda t, s, p=p: ops.seeded_dropout_apply(t, s, p), (x.clone().requires_grad_(), torch.tensor(2**50)))

    # Numbers of torch's generator: those of torch's dropout on this device.
    there = to_device(x).requires_grad_()
    torch.manual_seed(3)
    got = LF.dropout(there, 0.3)
    torch.manual_seed(3)
    want = F.dropout(there, 0.3)
    assert same_bits(on_cpu(got.detach()), on_cpu(want.detach()))
    assert 0 < int((on_cpu(got.detach()) == 0).sum()) < x.numel()
    (gradient,) = torch.autograd.grad(got.sum(), there)
    assert torch.equal(on_cpu(gradient) == 0, on_cpu(got.detach()) == 0)


@of_dtypes
def test_dropout_with_a_seed_draws_it_from_torch(dtype):
    x = make(dtype, 6, 50).requires_grad_()

    def call(t):
        torch.manual_seed(11)
        return LF.dropout(t, 0.3, saves="seed")

    compare(call, (x,))


@of_dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_gated_units(activation, dtype):
    gate, up = make(dtype, 9, 16).requires_grad_(), make(dtype, 9, 16).requires_grad_()
    compare(lambda g, u: LF.gated(g, u, activation), (gate, up), UNITS["gated"])
    for layout in ("gate_up", "up_gate", "interleaved"):
        compare(lambda g, layout=layout: LF.gated(g, None, activation, layout=layout), (gate,), UNITS["gated"])
    for mask in itertools.product([False, True], repeat=3):
        args = (make(dtype, 9, 16), gate.detach(), up.detach())
        compare(lambda *t, m=mask: ops.gated_backward(*t, activation, output_mask=m), args, UNITS["gated"])


@of_dtypes
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms(norm, affine, dtype):
    x = make(dtype, 3, 5, 33).requires_grad_()
    weight = (torch.rand(33) + 0.5).requires_grad_() if affine else None
    bias = torch.randn(33).requires_grad_() if affine else None
    for output in (None, *FLOATS):
        if norm == "layer":
            compare(lambda t, w, b, d=output: LF.ms_layer_norm(t, (33,), w, b, dtype=d), (x, weight, bias), 16)
        else:
            compare(lambda t, w, d=output: LF.ms_rms_norm(t, (33,), w, dtype=d), (x, weight), 16)


@of_layouts
@of_dtypes
@pytest.mark.parametrize("bits", [4, 8])
def test_storage_in_groups(bits, dtype, layout):
    x = make(dtype, 2, 3, 5, 17, layout=layout)
    for seed in (None, torch.tensor(-(2**60))):
        rounding = "nearest" if seed is None else "stochastic"

        def there_and_back(t, s, rounding=rounding):
            codes, scales = LF.quantize_groups(t, bits, rounding=rounding, seed=s, offset=3)
            back = LF.dequantize_groups(codes, scales, t.shape, t.dtype, bits, seed=s, offset=3)
            return codes, scales, back

        compare(there_and_back, (x, seed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    codes = torch.randint(0, 2**bits, (5, 7), dtype=torch.uint8)
    compare(lambda c: LF.pack_bits(c, bits), (codes,))
    compare(lambda c: LF.unpack_bits(LF.pack_bits(c, bits), bits, 35), (codes,))


@of_dtypes
@pytest.mark.parametrize("matmul", ["gaussian", "rademacher", "dct", "dft", "crs", "wta-crs"])
def test_randomized_linear_draws_the_same_numbers(matmul, dtype):
    if dtype in (torch.bfloat16, torch.float16) and matmul in ("dct", "dft"):
        dtype = torch.float32  # (of torch's transforms, which know no others, the same)
    x, weight = make(dtype, 24, 12).requires_grad_(), make(dtype, 7, 12).requires_grad_()

    def call(x, w):
        torch.manual_seed(1)
        lomem.random.manual_seed(2)
        return LF.randomized_linear(x, w, matmul=matmul, proj_dim=5)

    if NO_FLOAT64 and matmul in NEED_FLOAT64:
        with pytest.raises(TypeError, match=f"{NAME} has no float64"):
            call(*to_device((x, weight)))
    else:
        compare(call, (x, weight), UNITS["randomized_linear"])


WRONG = {
    "codes too short": lambda d: ops.step_activation_backward(x(d), x(d)[:1, 1:].to(torch.uint8), [0.0] * 4, 2),
    "bits": lambda d: LF.pack_bits(x(d).to(torch.uint8), 9),
    "numel": lambda d: LF.unpack_bits(x(d).to(torch.uint8), 1, 2**60),
    "shape": lambda d: LF.ms_layer_norm(x(d), (3,)),
    "dtype": lambda d: ops.step_codes(x(d).to(torch.int64), [0.0], 1),
    "function": lambda d: ops.fused_activation_forward(x(d), "elu", [0.0], 1),
    "drawn function": lambda d: ops.drawn_codes(x(d), "nothing", [], 2, torch.tensor(1).to(d)),
    "activation": lambda d: ops.gated(x(d), x(d), "tanh"),
    "weight of layer norm": lambda d: LF.ms_layer_norm(x(d).requires_grad_(), (8,), torch.zeros(8).to(d)),
    "weight of rms norm": lambda d: LF.ms_rms_norm(x(d).requires_grad_(), (8,), torch.full((8,), 1e-38).to(d)),
    "group size": lambda d: LF.quantize_groups(x(d), group_size=17),
    "p": lambda d: ops.dropout_apply(x(d), x(d)[:1, :4].to(torch.uint8), 1.5),
}


def x(device):
    return torch.linspace(-2, 2, 32).reshape(4, 8).to(device)


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_the_same(name):
    with pytest.raises((RuntimeError, ValueError)) as want:
        WRONG[name]("cpu")
    with pytest.raises(want.type) as got:
        WRONG[name](DEVICE)
    assert str(got.value).splitlines()[0] == str(want.value).splitlines()[0]


def test_tensors_on_several_devices():
    with pytest.raises(
        RuntimeError, match=f"^lomem::ms_layer_norm: weight is on cpu, expected {NAME}:0, the device of"
    ):
        LF.ms_layer_norm(x(DEVICE), (8,), torch.ones(8))
    message = f"^lomem::step_activation_backward: codes is on cpu, expected {NAME}:0, the device of grad_output"
    with pytest.raises(RuntimeError, match=message):
        ops.step_activation_backward(x(DEVICE), torch.zeros(8, dtype=torch.uint8), [0.0] * 4, 2)
    with pytest.raises(RuntimeError, match=r"^lomem::pack_bits: codes has layout Sparse"):
        ops.pack_bits(x("cpu").to(torch.uint8).to_sparse(), 1)


def test_autocast_changes_nothing_inside():
    """As if autocast of the device rounded what the reference of the norms computes."""
    library = torch.library.Library("aten", "IMPL")

    def rounded(t):
        with torch.autocast(NAME, enabled=False):
            return torch.rsqrt(t).bfloat16()

    library.impl("rsqrt", rounded, "AutocastPrivateUse1")
    try:
        want = LF.ms_rms_norm(x(DEVICE), (8,))
        with torch.autocast(NAME, dtype=torch.bfloat16):
            assert torch.rsqrt(x(DEVICE)).dtype == torch.bfloat16
            got = LF.ms_rms_norm(x(DEVICE), (8,))
    finally:
        library._destroy()
    assert same_bits(got.cpu(), want.cpu())


def trained(model, inputs, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def test_training():
    here = Net()
    there = copy.deepcopy(here).to(DEVICE)
    batch = torch.randn(10, 6)
    for got, want in zip(trained(there, batch.to(DEVICE)), trained(here, batch), strict=True):
        # The norms' rounding, over three steps.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert "aten::gelu" in calls  # ran on the device


class Block(nn.Module):
    """Each kind of conversion: a pair, norms that share their output, a gated product."""

    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.gate, self.factor, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.down(self.act(self.up(self.norm(x))))
        h = self.rms(x)
        return x + self.out(F.silu(self.gate(h)) * self.factor(h))


def frozen():
    """Linear layers that save no input: codes are drawn for the activations in front of them."""
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.SiLU(), nn.Linear(16, 4))
    for layer in layers[2:]:
        layer.requires_grad_(False)
    return layers


@pytest.mark.parametrize("bits", [None, 16, 8, 4, 2])
@pytest.mark.parametrize("build", [Block, frozen])
def test_convert(build, bits):
    """The same conversions, bytes and gradients as on the CPU."""
    here = build()
    there = copy.deepcopy(here).to(DEVICE)
    batch = torch.randn(6, 16)
    if build is frozen and bits == 16:
        with pytest.raises(lomem.NothingToConvertError):
            lomem.convert(there, batch.to(DEVICE), bits=bits)
        return
    settings = {} if bits is None else {"bits": bits}
    reports = [lomem.convert(m, x, **settings) for m, x in ((here, batch), (there, batch.to(DEVICE)))]
    assert reports[1].converted == reports[0].converted != ()
    results = []
    for model, inputs in ((here, batch), (there, batch.to(DEVICE))):
        lomem.random.manual_seed(4)
        with lomem.memory.saved_for_backward(model.parameters()) as saved:
            output = model(inputs)
        output.square().mean().backward()
        gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.requires_grad]
        results.append((saved.nbytes, output.detach().cpu(), gradients))
    (nbytes, output, gradients), (nbytes_there, output_there, gradients_there) = results
    assert nbytes_there == nbytes
    torch.testing.assert_close(output_there, output, rtol=1e-5, atol=1e-6)  # the norms' rounding
    for got, want in zip(gradients_there, gradients, strict=True):
        # The norms' rounding; and where numbers of groups are rounded at random, one of many may go the other way.
        room = 1e-5 if bits in (None, 16) or build is frozen else 2.0**-bits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=room * float(want.abs().max()) + 1e-7)
    lomem.restore(there)
    assert not any("lomem" in type(module).__module__ for module in there.modules())
