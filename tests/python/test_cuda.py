"""What only a GPU has: streams, graphs, several devices, sizes beyond 2^31, no waiting. Collected where there is one.

All other tests run on the GPU as well, through the fixture `device`.
"""

import gc
import subprocess
import sys

import lomem
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import ALL
from helpers import ACTIVATIONS, DTYPES, EPS, PUBLISHED, same_bits

LF = lomem.functional
ops = torch.ops.lomem
# A rehearsal without a GPU has smaller ones (cuda_stand_in.py).
EDGE = 2**31
BIG = EDGE + 13
STRIDE = 1
GELU2, SILU2 = PUBLISHED.values()


def make_net():
    """Every op of the library, forward and backward."""
    return torch.nn.Sequential(
        lomem.nn.MSLayerNorm(64, elementwise_affine=True),
        torch.nn.Linear(64, 256),
        GELU2.module(),
        torch.nn.Linear(256, 64),
        lomem.nn.MSRMSNorm(64, elementwise_affine=True),
        torch.nn.Linear(64, 256),
        SILU2.module(),
        torch.nn.Linear(256, 64),
    ).cuda()


def step(net, x):
    """Output and all gradients."""
    leaf = x.detach().requires_grad_()
    y = net(leaf)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])


@pytest.fixture
def memory():
    """Fails fast where the device is too small, and leaves it empty."""

    def need(gigabytes):
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} GB are free")

    yield need
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_is_torchs_bit_for_bit(name, dtype):
    _, torch_op, _, forward, *_ = ACTIVATIONS[name]
    magnitudes = torch.logspace(-45, 38, 3_000_001, dtype=torch.float64, device="cuda")
    for x in (
        torch.randn(10_000_001, device="cuda") * 4,
        torch.linspace(-20, 20, 4_000_003, device="cuda"),
        magnitudes,
        -magnitudes,
    ):
        x = x.to(dtype)
        assert same_bits(forward(x)[0], torch_op(x))
        assert same_bits(forward(x[1:])[0], torch_op(x[1:])), "a misaligned base"


@pytest.mark.parametrize("name", ALL)
def test_forward_of_every_float32(name):
    op, torch_op = ALL[name]
    block = 2**28
    for begin in range(-(2**31), 2**31, block):
        x = torch.arange(begin, begin + block, STRIDE, device="cuda").to(torch.int32).view(torch.float32)
        want = torch_op(x)
        assert same_bits(op(x), want), begin
        assert same_bits(op(x.requires_grad_()).detach(), want), begin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes_are_those_of_the_cpu(name, dtype):
    forward = ACTIVATIONS[name].forward
    for n in (0, 1, 3, 8, 4095, 4096, 1_000_003):
        x = (torch.randn(n) * 4).to(dtype)
        assert torch.equal(forward(x.cuda())[1].cpu(), forward(x)[1])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_that_of_the_cpu(bits, dtype):
    levels = torch.randn(2**bits, dtype=torch.float64).tolist()
    n = 100_003
    codes = torch.randint(0, 256, ((n * bits + 7) // 8,), dtype=torch.uint8)
    grad = torch.randn(n).to(dtype)
    want = ops.step_activation_backward(grad, codes, levels, bits)
    assert same_bits(ops.step_activation_backward(grad.cuda(), codes.cuda(), levels, bits).cpu(), want)


def test_current_stream():
    # The side stream is busy when kernels are enqueued: on any other they would read their input
    # before it is there.
    net = make_net()
    source = torch.randn(4096, 64, device="cuda")
    want = step(net, source)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(3):
        x = torch.zeros_like(source)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            x.copy_(source)
            got = step(net, x)
        side.synchronize()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_nothing_waits_for_the_device():
    net = make_net()
    x = torch.randn(128, 64, device="cuda")
    codes = torch.randint(0, 8, (100,), dtype=torch.uint8, device="cuda")
    step(net, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(net, x)
        LF.unpack_bits(LF.pack_bits(codes, 3), 3, 100)
        # torch sees its own synchronisations alone: a launch must return while the device is busy.
        torch.cuda._sleep(2_000_000_000)
        busy = torch.cuda.Event()
        step(net, x)
        busy.record()
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs():
    net = make_net()
    static = torch.randn(128, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(net, static)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(128, 64, device="cuda")
        static.copy_(x)
        graph.replay()
        for got, want in zip(captured, step(net, x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(5000, 768), (300, 100), (64, 5000), (100_000, 64), (7, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    grad = torch.randn(shape, device="cuda").to(dtype)
    for norm in (lomem.nn.MSLayerNorm, lomem.nn.MSRMSNorm):
        module = norm(shape[1], elementwise_affine=True, device="cuda", dtype=dtype)
        runs = []
        for _ in range(5):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            runs.append((y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], grad)))
        for run in runs[1:]:
            for a, b in zip(run, runs[0], strict=True):
                assert same_bits(a, b)


def test_autocast_emits_its_dtype():
    x = torch.randn(4, 64, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            assert lomem.nn.MSLayerNorm(64).cuda()(x).dtype == dtype
            assert GELU2.op(x).dtype == torch.float32


def test_mixed_devices():
    x = torch.randn(4, 8)
    codes = torch.zeros(8, dtype=torch.uint8)
    weight = torch.ones(8)
    cases = {
        "lomem::ms_layer_norm: weight is on cpu, expected cuda:0, the device of input": lambda: LF.ms_layer_norm(
            x.cuda(), (8,), weight
        ),
        "lomem::ms_rms_norm: weight is on cuda:0, expected cpu, the device of input": lambda: LF.ms_rms_norm(
            x, (8,), weight.cuda()
        ),
        "lomem::step_activation_backward: codes is on cpu, expected cuda:0, the device of grad_output": (
            lambda: ops.step_activation_backward(x.cuda(), codes, [0.0] * 4, 2)
        ),
        "lomem::step_activation_backward: codes is on cuda:0, expected cpu, the device of grad_output": (
            lambda: ops.step_activation_backward(x, codes.cuda(), [0.0] * 4, 2)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()


@pytest.mark.parametrize("other", range(1, torch.cuda.device_count()))
def test_devices_that_are_not_current(other):
    assert torch.cuda.current_device() == 0
    net = make_net()
    x = torch.randn(64, 64, device="cuda")
    want = step(net, x)
    got = step(net.to(f"cuda:{other}"), x.to(f"cuda:{other}"))
    for a, b in zip(got, want, strict=True):
        assert a.device.index == other
        # Another device may be of another kind, with other matrix products.
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-2, atol=1e-2)
    codes = torch.randint(0, 8, (100,), dtype=torch.uint8, device=f"cuda:{other}")
    assert torch.equal(LF.unpack_bits(LF.pack_bits(codes, 3), 3, 100), codes)
    with pytest.raises(RuntimeError, match=f"codes is on cuda:0, expected cuda:{other}"):
        ops.step_activation_backward(x.to(f"cuda:{other}"), torch.zeros(1024, dtype=torch.uint8).cuda(), [0.0] * 4, 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_activations_beyond_2_to_31_elements(name, memory):
    memory(30)
    _, torch_op, _, forward, *_ = ACTIVATIONS[name]
    x = torch.empty(BIG, dtype=torch.float16, device="cuda").normal_(0, 4)
    y, codes = forward(x)
    assert codes.numel() == (BIG + 3) // 4
    # The start, the two sides of 2^31, and the end, computed by themselves.
    levels = [0.25, 0.5, 1.0, 2.0]
    grad = ops.step_activation_backward(x, codes, levels, 2)
    for begin in (0, EDGE - 4096, BIG - 5 - (BIG - 5) % 4):
        part = x[begin : begin + 8192].clone()
        part_y, part_codes = forward(part)
        assert torch.equal(y[begin : begin + 8192], part_y)
        assert torch.equal(part_y, torch_op(part))
        assert torch.equal(codes[begin // 4 : begin // 4 + part_codes.numel()], part_codes)
        assert torch.equal(grad[begin : begin + 8192], ops.step_activation_backward(part, part_codes, levels, 2))
    # All of it, by blocks that torch can index.
    for begin in range(0, BIG, 2**28):
        assert torch.equal(y[begin : begin + 2**28], torch_op(x[begin : begin + 2**28]))


@pytest.mark.parametrize(("function", "bits"), [(LF.gelu, 3), (LF.silu, 8), (LF.elu, 2), (LF.relu, 1)])
def test_few_bits_beyond_2_to_31_elements(function, bits, memory):
    memory(40)
    arguments = {} if bits == 1 else {"bits": bits}
    x = torch.empty(BIG, dtype=torch.float16, device="cuda").normal_(0, 4)
    grad = torch.empty_like(x).normal_()
    leaf = x.requires_grad_()
    y = function(leaf, **arguments)
    (got,) = torch.autograd.grad(y, leaf, grad)
    # The start, the two sides of the edge, and the end, computed by themselves, from a byte of codes on.
    for begin in (0, EDGE - 4096, BIG - 5 - (BIG - 5) % 8):
        part = x[begin : begin + 8192].detach().clone().requires_grad_()
        part_y = function(part, **arguments)
        assert torch.equal(y[begin : begin + 8192], part_y)
        assert torch.equal(got[begin : begin + 8192], torch.autograd.grad(part_y, part, grad[begin : begin + 8192])[0])


@pytest.mark.parametrize("cols", [1024, 3000, 20_000])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_beyond_2_to_31_elements(norm, cols, memory):
    memory(40)
    rows = BIG // cols + 1
    x = torch.empty(rows, cols, dtype=torch.float16, device="cuda").normal_()
    layer = norm == "layer"
    op = ops.ms_layer_norm_forward if layer else ops.ms_rms_norm_forward
    y, rstd = op(x, [cols])

    def backward(rows_of, weight=None, bias=None, wanted=(True, False, False)):
        saved = x[rows_of], y[rows_of], rstd[rows_of], [cols]
        if layer:
            return ops.ms_layer_norm_backward(*saved, weight, bias, torch.float16, wanted)
        return ops.ms_rms_norm_backward(*saved, weight, torch.float16, wanted[:2])

    grad = backward(slice(None))[0]
    for begin in (0, EDGE // cols - 2, rows - 4):
        rows_of = slice(begin, begin + 4)
        part, part_rstd = op(x[rows_of].clone(), [cols])
        assert torch.equal(y[rows_of], part)
        assert torch.equal(rstd[rows_of], part_rstd)
        assert torch.equal(grad[rows_of], backward(rows_of)[0])
    del grad
    # The sums over all rows, against torch's in blocks.
    ones, zeros = torch.ones(cols, device="cuda"), torch.zeros(cols, device="cuda")
    sums = backward(slice(None), ones, zeros, (False, True, True))[1:]
    wanted = torch.zeros(2, cols, dtype=torch.float64, device="cuda")
    for i in range(0, rows, 4096):
        part = x[i : i + 4096].double()
        wanted += torch.stack([(part * y[i : i + 4096].double()).sum(0), part.sum(0)])
    # Sums of `rows` terms of size 1 in float32, in strips.
    tolerance = 64 * EPS[torch.float32] * rows
    for got, want in zip(sums, wanted, strict=False):  # without a bias, the first alone
        assert (got.double() - want).abs().max() <= tolerance


def test_packing_beyond_2_to_31_codes(memory):
    memory(10)
    codes = torch.randint(0, 8, (BIG,), dtype=torch.uint8, device="cuda")
    packed = LF.pack_bits(codes, 3)
    assert packed.numel() == (3 * BIG + 7) // 8
    assert torch.equal(LF.unpack_bits(packed, 3, BIG), codes)
    begin = EDGE - 64
    assert torch.equal(packed[begin // 8 * 3 : begin // 8 * 3 + 24], LF.pack_bits(codes[begin : begin + 64], 3))


def test_codes_that_do_not_fit_stop_the_device():
    # In a process of its own: an assertion on the device ends the use of it.
    script = (
        "import torch, lomem; "
        "lomem.functional.pack_bits(torch.tensor([1, 2, 9], dtype=torch.uint8, device='cuda'), 2); "
        "torch.cuda.synchronize()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode != 0
    assert "every code fits in the given number of bits" in result.stderr


def test_memory_of_a_step():
    # What is measured is what is promised: one GELU and its surroundings keep 2 bits an element less 16.
    n = 64 * 2**20
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    held = {}
    for name, op in {"torch": F.gelu, "lomem": GELU2.op}.items():
        hidden = x * 1
        before = torch.cuda.memory_allocated()
        y = op(hidden)
        del hidden
        held[name] = torch.cuda.memory_allocated() - before
        del y
    assert held["torch"] == 2 * n  # y is new; the input stays
    assert held["lomem"] == n // 4  # y in place of the input, and the codes


def test_the_library_is_loaded():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lomem::fused_activation_forward", "CUDA")
    major, minor = torch.cuda.get_device_capability()
    assert any(int(arch.split(".")[0]) <= major for arch in lomem._C.cuda_archs()), (major, minor)
