"""CPU kernels: the same bits whatever the threads, the tiles and the instruction set; the fast forward."""

import copy
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, DTYPES, NORMS, PUBLISHED, SIXTEEN_BIT, all_patterns, make_norm_parameters, same_bits
from lomem import reference

LF = lomem.functional
ops = torch.ops.lomem
gelu2, _ = (entry.op for entry in PUBLISHED.values())
pytestmark = pytest.mark.cpu_kernels

CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Instruction sets ---------------------------------------------------------------------------------------------------


@functools.cache
def chosen(wanted=None):
    """The instruction sets that lomem and torch choose."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    if wanted is not None:
        environment["ATEN_CPU_CAPABILITY"] = wanted
    command = [sys.executable, "-m", "lomem", "info"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    return rows["CPU kernels"].strip(), rows["CPU capability of torch"].strip()


def has(wanted):
    """Whether the CPU has an instruction set. (torch believes the environment.)"""
    names = list(CAPABILITIES.values())
    return chosen()[1] not in names or names.index(CAPABILITIES[wanted]) <= names.index(chosen()[1])


@pytest.mark.parametrize("wanted", [None, *CAPABILITIES])
def test_capability_follows_the_environment(wanted):
    ours, torchs = chosen(wanted)
    assert ours in ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16")
    if wanted is not None and not has(wanted):
        assert ours == chosen()[0]
    elif torchs in CAPABILITIES.values():
        # What torch runs, and where that is AVX-512 with its bfloat16 instructions, if there are.
        assert ours.removesuffix("_BF16") == torchs


# What a process prints of ops on fixed inputs: the bits of everything that the ops return.
DIGEST = """
import hashlib, torch, lomem
digest = hashlib.sha256()
def add(*tensors):
    for t in tensors:
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
g = torch.Generator().manual_seed(0)
def values(*shape):
    # (randn itself depends on the instruction set.)
    return torch.rand(shape, generator=g, dtype=torch.float64).mul(8).sub(4)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for n in (1, 31, 33, 4097):
        x = values(n).to(dtype)
        grad = values(n).to(dtype)
        for function in ("gelu", "silu"):
            codes = torch.ops.lomem.step_activation_forward(x, function, [], 2, criterion="paper")[1]
            add(codes, torch.ops.lomem.step_activation_backward(grad, codes, [0.0, -0.05, 1.05, 1.0], 2))
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (1001,), generator=g, dtype=torch.uint8)
        packed = lomem.functional.pack_bits(codes, bits)
        grad = values(1001).to(dtype)
        levels = values(2**bits).tolist()
        add(packed, torch.ops.lomem.step_activation_backward(grad, packed, levels, bits))
    for cols in (1, 17, 100, 768, 5000):
        x = values(7, cols).add(3).to(dtype).requires_grad_()
        w = (torch.rand(cols, generator=g) + 0.5).requires_grad_()
        b = torch.rand(cols, generator=g).requires_grad_()
        grad = values(7, cols).to(dtype)
        for y, inputs in (
            (lomem.functional.ms_layer_norm(x, (cols,)), (x,)),
            (lomem.functional.ms_layer_norm(x, (cols,), w, b), (x, w, b)),
            (lomem.functional.ms_rms_norm(x, (cols,), w), (x, w)),
        ):
            add(y, *torch.autograd.grad(y, inputs, grad.to(y.dtype)))
print(lomem._C.cpu_capability(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bytes():
    digests = {}
    for wanted in filter(has, CAPABILITIES):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": wanted}
        command = [sys.executable, "-c", DIGEST]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
        capability, digest = result.stdout.split()
        digests[capability] = digest
    assert "DEFAULT" in digests
    assert len(set(digests.values())) == 1, digests


# Threads and tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_do_not_depend_on_the_threads(dtype, threads):
    for norm in NORMS.values():
        x = (torch.randn(3000, 100) + 1).to(dtype).requires_grad_()
        parameters = [p.requires_grad_() for p in make_norm_parameters(norm, (100,), torch.float32)]
        grad = torch.randn(3000, 100).to(dtype)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            y = norm.op(x, (100,), *parameters, eps=1e-5)
            results.append((y, *torch.autograd.grad(y, (x, *parameters), grad)))
        for other in results[1:]:
            assert all(same_bits(a.detach(), b.detach()) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes_and_gradients_do_not_depend_on_the_threads(name, dtype, threads):
    activation = ACTIVATIONS[name]
    x = (torch.randn(300_001) * 4).to(dtype)
    grad = torch.randn(300_001).to(dtype)
    levels = list(activation.step.levels)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        codes = activation.forward(x)[1]
        results.append((codes, torch.ops.lomem.step_activation_backward(grad, codes, levels, 2)))
    for codes, gradient in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert same_bits(gradient, results[0][1])


def subnormals(dtype):
    """Subnormal numbers of both signs and their neighbours, in every place of a vector, more than a thread takes."""
    tiny, smallest = torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal
    least = torch.nextafter(torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype))
    values = torch.tensor(
        [0.0, tiny / 2, -tiny / 2, tiny / 3, smallest, -smallest, 1.0, -1.0, 0.3], dtype=torch.float64
    )
    values = torch.cat([values.to(dtype), least[None], -least[None]])
    return values.repeat(300_000 // len(values))


@pytest.fixture
def flushing():
    """Makes this thread take subnormal numbers for 0, as torch.set_flush_denormal makes the thread that calls it."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


# (Made here, where this thread does not flush.)
TINY = {dtype: [torch.finfo(dtype).tiny / 2**i for i in range(254)] for dtype in DTYPES}

# The boundaries of the shipped functions are far from subnormal numbers: kinks at 0 are not, nor are these.
CODES_OF_SUBNORMALS = {
    **{
        f"hard-{function}": lambda x, function=function, parameters=parameters: ops.hard_activation_forward(
            x, function, parameters
        )[1]
        for function, parameters in {
            "relu": [],
            "leaky_relu": [0.1],
            "relu6": [],
            "threshold": [0.0, 1.0],
            "hardtanh": [0.0, 1.0],
            "hardshrink": [0.0],
            "softshrink": [0.0],
        }.items()
    },
    **{
        f"elu-{bits}": lambda x, bits=bits: ops.step_activation_forward(x, "elu", [0.5], bits)[1]
        for bits in range(1, 9)
    },
    **{
        f"codes-{bits}": lambda x, bits=bits: ops.step_codes(x, [0.0, *reversed(TINY[x.dtype][: 2**bits - 2])], bits)
        for bits in range(2, 9)
    },
    "bands": lambda x: ops.band_codes(x, TINY[x.dtype][2], TINY[x.dtype][0]),
    **{
        f"{function}-{criterion}-{fast}": lambda x, function=function, criterion=criterion, fast=fast: (
            ops.step_activation_forward(x, function, [], 2, criterion=criterion, fast=fast)[1]
        )
        for function in ("gelu", "gelu_tanh", "silu")
        for criterion in ("paper", "derivative")
        for fast in (False, True)
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODES_OF_SUBNORMALS)
def test_codes_of_subnormals_do_not_depend_on_the_mode(name, dtype, threads, flushing):
    codes = CODES_OF_SUBNORMALS[name]
    x = subnormals(dtype)
    torch.set_flush_denormal(False)
    want = codes(x)
    torch.set_flush_denormal(True)
    for count in (1, 2, 4):
        threads(count)
        for n in (len(x), 32768 + 77, 1001, 63, 1):
            # (The last byte has codes of other elements too.)
            assert torch.equal(codes(x[:n])[:-1], want[: len(codes(x[:n])) - 1]), (count, n)


def test_codes_of_subnormals_are_what_they_are(flushing):
    x = subnormals(torch.float32)
    torch.set_flush_denormal(False)
    positive = reference.pack_bits((x > 0).to(torch.uint8), 1)
    torch.set_flush_denormal(True)
    assert torch.equal(ops.step_codes(x, [0.0], 1), positive)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_from_subnormals_do_not_depend_on_the_threads(dtype, threads, flushing):
    """Gradients and norms take them for 0 or not as the calling thread does, whoever computes them."""
    grad = subnormals(dtype)
    codes = LF.pack_bits(torch.ones(len(grad), dtype=torch.uint8), 2)
    rows = grad[: len(grad) // 100 * 100].view(-1, 100)

    def results(count):
        threads(count)
        leaf = rows.clone().requires_grad_()
        y = LF.ms_layer_norm(leaf, (100,), eps=0.0)
        gradient = ops.step_activation_backward(grad, codes, [0.0, 0.5, 1.0, 1.0], 2)
        return gradient, y.detach(), *torch.autograd.grad(y, leaf, rows.roll(1, 1))

    want = results(1)
    assert (want[0] == 0).sum() > (grad == 0).sum()  # the mode has an effect
    for count in (2, 4):
        assert all(same_bits(a, b) for a, b in zip(results(count), want, strict=True)), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_tiles_are_bit_for_bit_one_call(name, dtype, count, threads):
    # The forward may go in tiles: GELU's, where it is oneDNN's, from 2^23 elements on, others from 2^19.
    threads(count)
    activation = ACTIVATIONS[name]
    large = activation.torch_op is F.gelu and dtype in (torch.float32, torch.bfloat16)
    for n in (2**23, 2**23 + 65_537) if large else (2**19, 2**19 + 1, 3 * 2**19 + 65_537):
        x = (torch.randn(n) * 4).to(dtype)
        output, codes = activation.forward(x)
        assert same_bits(output, activation.torch_op(x)), n
        assert torch.equal(codes, reference.pack_bits(reference.step_codes(x, activation.step), 2))
        assert same_bits(activation.op(x.view(1, n).requires_grad_()).detach(), activation.torch_op(x).view(1, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mkldnn", [False, True])
def test_tiles_without_onednn(mkldnn, dtype, threads):
    # Without it, torch's GELU depends on where the threads' ranges end: some numbers have another result there.
    bits = torch.arange(65536, dtype=torch.int32)
    every = all_patterns(dtype) if dtype == torch.bfloat16 else (bits << 16 | 0x5A5A).view(torch.float32)
    every = every[every.isfinite()]
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        together = F.gelu(every)
        alone = torch.cat([F.gelu(every[i : i + 3]) for i in range(0, len(every), 3)])
    different = every[alone != together]
    threads(2)
    x = different[:1].expand(2**23 + 5).clone() if len(different) else torch.randn(2**23 + 5).to(dtype)
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        assert same_bits(gelu2(x.clone().requires_grad_()).detach(), F.gelu(x))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_why_silu_of_16_bits_may_go_in_tiles(dtype):
    # torch's two formulas, of vectors and of what is left over, agree for every input.
    x = all_patterns(dtype)
    alone = torch.cat([F.silu(x[i : i + 1]) for i in range(65536)])
    together = F.silu(x)
    nan = together.isnan()
    assert torch.equal(alone.isnan(), nan)
    assert same_bits(alone[~nan], together[~nan])


# oneDNN takes bfloat16 where the CPU has AVX-512.
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if has("avx512") else [])])
def test_why_gelu_by_onednn_may_go_in_tiles(dtype):
    # Every element alike, wherever it stands, but not one alone.
    bits = torch.arange(65536, dtype=torch.int32)
    x = all_patterns(dtype) if dtype == torch.bfloat16 else (bits << 16 | 0x5A5A).view(torch.float32)
    together = F.gelu(x)
    nan = together.isnan()
    for size in (2, 3, 17):
        parts = torch.cat([F.gelu(x[i : i + size]) for i in range(0, 65536 - size, size)])
        kept = ~nan[: parts.numel()]
        assert same_bits(parts[kept], together[: parts.numel()][kept]), size


BY_NAME = dict(zip(("gelu", "gelu_tanh", "silu"), ACTIVATIONS.values(), strict=True))


def scattered(torch_op, dtype, n):
    """All finite numbers in random order; at every fourth place, those whose value depends on the place."""
    every = all_patterns(dtype)
    every = every[every.isfinite()]
    together, alone = torch_op(every), torch_op(every.repeat_interleave(2)[::2])
    x = every[torch.randint(len(every), (n,))]
    different = every[together != alone]
    if len(different):
        x[::4] = different[torch.randint(len(different), x[::4].shape)]
    return x


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mkldnn", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "sigmoid"])
def test_values_by_table_are_bit_for_bit_torchs(name, dtype, mkldnn, count, threads):
    # From 65,536 elements on, values of 16 bits are looked up, but for those that torch computes by another formula.
    threads(count)
    activation = BY_NAME.get(name)
    torch_op = torch.sigmoid if activation is None else activation.torch_op
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        for shape in ((65_536,), (65_537,), (3, 43_777), (1_000_037,)):
            x = scattered(torch_op, dtype, torch.Size(shape).numel()).view(shape)
            want, other = torch_op(x), torch.randn(shape).to(dtype)
            last = torch.randn(shape[-1:]).to(dtype).expand(shape)
            wide = torch.stack((other, x), -2).flatten(-2)  # x is a half of its last dimension
            half = wide.tensor_split(2, -1)[1]
            got = [
                (ops.gated(x, other, name), want * other),
                (ops.gated(x, last, name), want * last),
                (ops.gated(half, other, name), torch_op(half) * other),
                (ops.gated(wide, None, name, layout="up_gate"), torch_op(half) * other),
            ]
            if activation is not None:
                values, codes = activation.forward(x)
                want_codes = reference.pack_bits(reference.step_codes(x, activation.step), 2)
                drawn = ops.drawn_activation_forward(x, name, [], 2)
                again = ops.drawn_codes(x, name, [], 2, drawn[2])
                got += [(values, want), (codes, want_codes), (drawn[0], want), (drawn[1], again)]
                got.append((ops.step_activation(x, name, [], 2), want))
            assert all(same_bits(a, b) for a, b in got), (shape, [same_bits(a, b) for a, b in got])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_by_table_of_special_numbers(name, dtype):
    x = all_patterns(dtype).repeat(2)
    want, got = ACTIVATIONS[name].torch_op(x), ACTIVATIONS[name].forward(x)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any()
    assert same_bits(got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_by_table_where_subnormals_are_flushed(name, dtype):
    # Before and after the table is made, in a process that has none.
    program = f"""
import torch
from helpers import ACTIVATIONS, all_patterns, same_bits
torch.set_num_threads(1)
activation, x = ACTIVATIONS["{name}"], all_patterns({dtype})
x = x[x.isfinite()].repeat(2)
kept = activation.torch_op(x)
torch.set_flush_denormal(True)
flushed = activation.torch_op(x)
assert same_bits(activation.forward(x)[0], flushed)
torch.set_flush_denormal(False)
assert same_bits(activation.forward(x)[0], kept)
torch.set_flush_denormal(True)
assert same_bits(activation.forward(x)[0], flushed)
"""
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", program], cwd=here, timeout=300, check=True)


# Fast forward -------------------------------------------------------------------------------------------------------

FAST = lomem._C.cpu_capability() != "DEFAULT"
# Else the strict forward runs, which test_fast_is_off_unless_asked_for then asserts.
needs_fast_kernels = pytest.mark.skipif(not FAST, reason="no kernels with fused multiply-add run")
EXACT_VALUES = (
    lambda x: 0.5 * x * torch.special.erfc(-x / 2**0.5),
    # erfc's counterpart of tanh: 1 + tanh(u) = 2 sigmoid(2u), without cancellation.
    lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    lambda x: x * torch.sigmoid(x),
)
EXACT = dict(zip(ACTIVATIONS, EXACT_VALUES, strict=True))
# name -> (lowest x that the bound in ulps holds for, ulps of float32, absolute error below it): what
# core/fast_forward_tables.h says, with a margin for the inputs that it did not try.
BOUNDS = dict(zip(ACTIVATIONS, ((-3.375, 2.0, 1.3e-10), (-3.375, 2.2, 2e-10), (-22.0, 4.0, 6e-9)), strict=True))


def ulp(values, dtype):
    """Spacing of `dtype` at float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp_min(info.smallest_normal)))
    return torch.exp2(exponent) * info.eps


@needs_fast_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fast_float32(name):
    lowest, ulps, absolute = BOUNDS[name]
    # Every 37th number, of both signs, from 2^-40 up to 64: 5 million.
    bits = torch.arange(0x2B800000, 0x42800000, 37, dtype=torch.int32)
    for x in (bits.view(torch.float32), -bits.view(torch.float32)):
        got = ACTIVATIONS[name].op(x, fast=True).double()
        want = EXACT[name](x.double())
        near = x > lowest
        assert ((got - want).abs()[near] / ulp(want, torch.float32)[near]).max() <= ulps
        assert not (~near).any() or (got - want).abs()[~near].max() <= absolute


@needs_fast_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fast_16_bits(name, dtype):
    x = all_patterns(dtype)
    x = x[x.isfinite()]
    got = ACTIVATIONS[name].op(x, fast=True)
    want = EXACT[name](x.double())
    near = x.double() > (-22 if ACTIVATIONS[name].torch_op is F.silu else -5.5)
    error = (got.double() - want).abs()
    # Rounded correctly, but for near-ties.
    assert (error[near] <= 0.5002 * ulp(want, dtype)[near]).all()
    assert (got == want.to(dtype))[near].float().mean() > 0.999
    assert error[~near].max() <= 1e-6


@needs_fast_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fast_special_values(name, dtype):
    inf = float("inf")
    got = ACTIVATIONS[name].op(torch.tensor([inf, -inf, float("nan"), 0.0, -0.0], dtype=dtype).repeat(40), fast=True)
    got = got.view(40, 5)
    assert (got[:, 0] == inf).all()
    assert (got[:, 1] == 0).all()
    assert got[:, 2].isnan().all()
    assert (got[:, 3:] == 0).all()
    assert torch.equal(got[:, 3:].signbit(), torch.tensor([False, True]).expand(40, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fast_keeps_codes_and_gradients(name, dtype):
    activation = ACTIVATIONS[name]
    for shape in ((5, 7), (70_001,), (2, 3, 4, 5)):
        x = (torch.randn(shape) * 4).to(dtype)
        strict, fast = activation.forward(x), activation.forward(x, fast=True)
        assert torch.equal(strict[1], fast[1])
        assert fast[0].stride() == strict[0].stride()
        results = []
        for flag in (False, True):
            leaf = x.clone().requires_grad_()
            y = activation.op(leaf, fast=flag)
            # With a gradient or without: the same values.
            assert same_bits(y.detach(), activation.op(x, fast=flag))
            results.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
        assert same_bits(*results)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fast_layouts(name):
    activation = ACTIVATIONS[name]
    base = torch.randn(4, 6, 5, 7)
    for x in (
        base.to(memory_format=torch.channels_last),
        base.transpose(1, 3),
        base[:, ::2],
        base[:, :1].expand(4, 6, 5, 7),
    ):
        got = activation.op(x, fast=True)
        assert got.stride() == activation.torch_op(x).stride()
        torch.testing.assert_close(got, activation.torch_op(x), rtol=1e-3, atol=1e-6)
        assert torch.equal(activation.forward(x, fast=True)[1], activation.forward(x)[1])


def test_fast_is_off_unless_asked_for():
    x = torch.randn(1000)
    for op, torch_op, *_ in PUBLISHED.values():
        assert same_bits(op(x), torch_op(x))
        assert same_bits(op(x.double(), fast=True), torch_op(x.double()))
        assert same_bits(op(x, fast=True), torch_op(x)) != FAST


@pytest.mark.parametrize("name", PUBLISHED)
def test_fast_modules(name):
    op, module = PUBLISHED[name].op, PUBLISHED[name].module
    x = torch.randn(100)
    fast = module(fast=True)
    assert repr(fast).endswith("fast=True)")
    for same in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert same_bits(same(x), op(x, fast=True))
    assert "fast" not in repr(module())


def test_fast_under_compile_and_opcheck():
    x = torch.randn(65, requires_grad=True)
    for op in (getattr(ops, name).default for name in PUBLISHED):
        torch.library.opcheck(op, (x,), {"fast": True})
        compiled = torch.compile(lambda x, op=op: op(x, fast=True) * 2, fullgraph=True)
        assert same_bits(compiled(x).detach(), (op(x, fast=True) * 2).detach())
