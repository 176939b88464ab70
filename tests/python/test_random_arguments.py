"""Random arguments: every call returns or raises one of torch's errors.

Reads out of bounds show under valgrind or AddressSanitizer, and through the tests of the kernels' sentinels.
"""

import math

import lomem
import pytest
import torch
from helpers import PUBLISHED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ops = torch.ops.lomem
# How many parameters each function of step_activation and of hard_activation has.
FEW_BIT = {name: len(parameters) for name, parameters, exact, _ in lomem._C.activations() if not exact}
EXACT = {name: len(parameters) for name, parameters, exact, _ in lomem._C.activations() if exact}
REGISTERED = {name.removeprefix("lomem::") for name in torch._C._dispatch_get_all_op_names() if "lomem::" in name}

FLOAT_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.uint8, torch.int64, torch.bool, torch.complex64]
small = st.one_of(st.integers(-2, 40), st.sampled_from([-(2**63), 2**31, 2**40, 2**62, 2**63 - 1]))
widths = st.one_of(st.integers(1, 8), small)
floats = st.one_of(st.floats(), st.floats(0, 1))
shapes = st.lists(st.integers(-1, 5), max_size=3)
dtypes = st.sampled_from([*FLOAT_DTYPES, torch.int32])


@st.composite
def tensors(draw, shape=None, dtype=None):
    """A tensor of any layout; of a given shape or dtype most of the time, where one is given."""
    if shape is None or draw(st.integers(0, 9)) == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
    if dtype is None or draw(st.integers(0, 9)) == 0:
        dtype = draw(st.sampled_from(FLOAT_DTYPES * 2 + OTHER_DTYPES))
    device = "meta" if draw(st.integers(0, 19)) == 0 else "cpu"
    step = draw(st.integers(1, 2))
    order = draw(st.permutations(range(len(shape))))
    base = torch.ones([shape[i] * step for i in order], dtype=dtype, device=device)
    view = base[tuple(slice(None, None, step) for _ in shape)]
    return view.permute([order.index(i) for i in range(len(shape))])


@st.composite
def norm_arguments(draw, parameters, eps, *, backward=False):
    # Each argument fits the others most of the time: of many that need not, hardly any call would be good.
    x = draw(tensors(dtype=draw(st.sampled_from(FLOAT_DTYPES))))
    k = draw(st.integers(min(1, x.dim()), x.dim()))
    shape = list(x.shape[x.dim() - k :]) if draw(st.integers(0, 9)) else draw(shapes)
    weights = tensors(shape=[abs(s) for s in shape], dtype=x.dtype)
    affine = [draw(st.one_of(st.none(), weights)) for _ in range(parameters)]
    if not backward:
        return (x, shape, *affine, draw(eps))
    output = draw(tensors(shape=x.shape, dtype=x.dtype))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = draw(tensors(shape=[*x.shape[: x.dim() - k], *[1] * k], dtype=wide))
    mask = draw(st.lists(st.booleans(), min_size=parameters + 1, max_size=parameters + 1))
    return (x, output, rstd, shape, *affine, draw(dtypes), mask)


@st.composite
def step_arguments(draw):
    grad = draw(tensors())
    bits = draw(widths)
    sane = bits if 1 <= bits <= 8 else 2
    codes = draw(tensors(shape=[(grad.numel() * sane + 7) // 8], dtype=torch.uint8))
    count = 2**sane if draw(st.integers(0, 4)) else draw(st.integers(0, 9))
    return (grad, codes, [draw(floats)] * count, bits)


@st.composite
def unpack_arguments(draw):
    bits, numel = draw(widths), draw(small)
    sane = (numel * bits + 7) // 8 if 1 <= bits <= 8 and 0 <= numel <= 40 else 3
    return (draw(tensors(shape=[sane], dtype=torch.uint8)), bits, numel)


@st.composite
def dropout_arguments(draw, kept=None):
    x = draw(tensors())
    p = draw(floats)
    if kept == "mask":
        return (x, draw(tensors(shape=[(x.numel() + 7) // 8], dtype=torch.uint8)), p)
    if kept == "seed":
        return (x, torch.tensor(draw(small)) if draw(st.integers(0, 9)) else draw(tensors()), p)
    return (x, p)


@st.composite
def family_arguments(draw):
    function, count = draw(st.sampled_from([*FEW_BIT.items(), ("relu", 0)]))
    parameters = [draw(floats) for _ in range(count if draw(st.integers(0, 9)) else 3)]
    return (draw(tensors()), function, parameters, draw(widths))


@st.composite
def hard_arguments(draw):
    function, count = draw(st.sampled_from([*EXACT.items()]))
    return (draw(tensors()), function, [draw(floats) for _ in range(count if draw(st.integers(0, 9)) else 3)])


@st.composite
def linear_arguments(draw, kind):
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    x = draw(tensors(shape=draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)), dtype=dtype))
    seed = torch.tensor(draw(small)) if draw(st.integers(0, 19)) else draw(tensors())
    matmul = {"matmul": draw(st.sampled_from(["gaussian", "rademacher", "dct", "dft", "crs", "wta-crs", "gauss"]))}
    kept = draw(st.integers(1, 6) if draw(st.integers(0, 9)) else small)
    if kind == "weight_grad":
        rows = min(max(kept, 0), x.shape[:-1].numel())
        compressed = draw(tensors(shape=[rows, draw(st.integers(0, 5))], dtype=dtype))
        # Indices out of bounds are torch's business, which asserts on a GPU.
        indices = torch.full((rows,), draw(st.integers(0, 2)))
        return (x, compressed, draw(st.one_of(st.none(), st.just(indices))), seed), matmul
    weight = draw(tensors(shape=[draw(st.integers(0, 5)), *x.shape[-1:]], dtype=dtype))
    bias = draw(st.one_of(st.none(), tensors(shape=weight.shape[:1], dtype=dtype)))
    seed = draw(st.one_of(st.none(), st.just(seed)))
    if kind == "forward":
        return (x, weight, bias, seed, kept), matmul
    ratio = draw(st.one_of(st.none(), floats))
    sizes = {"proj_dim": kept if ratio is None else None, "proj_dim_ratio": ratio}
    bounds = {name: draw(st.one_of(st.none(), st.integers(0, 9))) for name in ("proj_dim_min", "proj_dim_max")}
    return (x, weight, bias), {**matmul, **sizes, **bounds, "seed": seed}


@st.composite
def gated_arguments(draw, kind):
    """Operands of a gated unit that mostly match; in one tensor, or in two."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    sizes = [*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 8))]
    odd = st.one_of(st.none(), tensors()) if draw(st.integers(0, 9)) == 0 else st.nothing()
    gate = draw(st.one_of(st.just(torch.randn(sizes, dtype=dtype)), odd))
    up = draw(st.one_of(st.none(), st.just(torch.randn(sizes, dtype=dtype)), odd))
    gate = torch.randn(sizes, dtype=dtype) if gate is None else gate
    activation = draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh"]))
    options = {"layout": draw(st.sampled_from(["gate_up", "up_gate", "interleaved"]))}
    features = sizes[-1] if up is not None else sizes[-1] // 2
    if kind == "backward":
        grad = torch.randn([*sizes[:-1], features], dtype=dtype)
        options["output_mask"] = draw(st.lists(st.booleans(), min_size=3, max_size=3))
        return (grad, gate, up, activation), options
    if kind == "linear":
        weight = torch.randn(draw(st.integers(0, 4)), features, dtype=dtype)
        bias = draw(st.one_of(st.none(), st.just(torch.randn(weight.shape[0], dtype=dtype))))
        return (gate, up, weight, bias, activation), options
    return (gate, up, activation), options


@st.composite
def lora_arguments(draw):
    """An input and an adapter that mostly match."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = draw(tensors(shape=draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))))
    rank, out_features = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    a = draw(tensors(shape=[rank, x.shape[-1] if x.dim() else 1], dtype=dtype))
    b = draw(tensors(shape=[out_features, rank], dtype=dtype))
    bias = draw(st.one_of(st.none(), tensors(shape=[out_features], dtype=dtype)))
    p = draw(st.one_of(st.just(0.0), st.sampled_from([0.1, 0.9, -0.1, 1.0, math.nan])))
    return (x, a, b, draw(st.one_of(st.floats(0, 1), floats))), {"bias": bias, "p": p}


@st.composite
def drawn_arguments(draw, kind="forward"):
    """Functions, seeds and codes that mostly match."""
    x, bits = draw(tensors()), draw(widths)
    seed = draw(st.one_of(small.map(torch.tensor), st.just(torch.tensor(1.0)), st.just(torch.tensor([1]))))
    if kind == "backward":
        count = (x.numel() * min(max(bits, 1), 8) + 7) // 8 + draw(st.sampled_from([0, 0, 0, 1]))
        return (x, draw(tensors([count], torch.uint8)), seed, draw(floats), draw(floats), bits)
    function = draw(st.sampled_from(["gelu", "silu", "mish", "softsign", "relu", "elu"]))
    parameters = draw(st.sampled_from([[], [], [], [1.0]]))
    optional = seed if kind == "codes" else draw(st.one_of(st.none(), st.just(seed)))
    return (x, function, parameters, bits, optional)


@st.composite
def lora_weight_grad_arguments(draw):
    """Gradients, inputs and masks that mostly match."""
    x = draw(tensors(shape=draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))))
    grad = draw(tensors(shape=[*x.shape[:-1], draw(st.integers(0, 3))], dtype=torch.float32))
    mask = draw(st.one_of(st.none(), tensors(shape=[(x.numel() + 7) // 8], dtype=torch.uint8)))
    p = draw(st.sampled_from([0.0, 0.5, 0.5, 0.5, 1.0, math.nan]))
    return (grad, x, mask, p, draw(dtypes))


boundaries = st.one_of(st.lists(floats, max_size=300), st.lists(st.floats(allow_nan=False), max_size=9).map(sorted))
optional_floats = st.one_of(st.none(), floats)
ARGUMENTS = {
    **dict.fromkeys(PUBLISHED, st.tuples(tensors())),
    "step_activation": family_arguments(),
    "step_activation_forward": family_arguments(),
    "hard_activation": hard_arguments(),
    "hard_activation_forward": hard_arguments(),
    "fused_activation_forward": st.tuples(
        tensors(), st.sampled_from(["gelu", "gelu_tanh", "silu", "tanh"]), boundaries, widths
    ),
    "step_codes": st.tuples(tensors(), boundaries, widths),
    "band_codes": st.tuples(tensors(), floats, floats),
    "step_activation_backward": step_arguments(),
    "drawn_activation": drawn_arguments(),
    "drawn_activation_forward": drawn_arguments(),
    "drawn_activation_backward": drawn_arguments("backward"),
    "drawn_codes": drawn_arguments("codes"),
    "dropout": dropout_arguments(),
    "dropout_forward": dropout_arguments(),
    "dropout_apply": dropout_arguments("mask"),
    "seeded_dropout_forward": dropout_arguments(),
    "seeded_dropout_apply": dropout_arguments("seed"),
    "gated": gated_arguments("forward"),
    "gated_backward": gated_arguments("backward"),
    "gated_linear": gated_arguments("linear"),
    "lora": lora_arguments(),
    "lora_weight_grad": lora_weight_grad_arguments(),
    "ms_layer_norm": norm_arguments(2, floats),
    "ms_layer_norm_forward": norm_arguments(2, floats),
    "ms_layer_norm_backward": norm_arguments(2, floats, backward=True),
    "ms_rms_norm": norm_arguments(1, optional_floats),
    "ms_rms_norm_forward": norm_arguments(1, optional_floats),
    "ms_rms_norm_backward": norm_arguments(1, optional_floats, backward=True),
    "randomized_linear": linear_arguments("linear"),
    "randomized_linear_forward": linear_arguments("forward"),
    "randomized_linear_weight_grad": linear_arguments("weight_grad"),
    "pack_bits": st.tuples(tensors(dtype=torch.uint8), widths),
    "unpack_bits": unpack_arguments(),
    "quantize_groups": st.tuples(tensors(), st.sampled_from([8, 4, 5]), st.none() | small.map(torch.tensor)),
    "dequantize_groups": st.tuples(
        tensors([6], torch.uint8),
        tensors([1], torch.bfloat16),
        st.sampled_from([[6], [2, 3], [12], [-1], [2**62, 4]]),
        st.sampled_from([None, [1], [3, 1], [1, 2], [0, 1]]),
        dtypes,
        st.sampled_from([8, 8, 4, 3]),
    ),
}


def test_random_arguments_cover_every_op():
    assert set(ARGUMENTS) == REGISTERED


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_random_arguments(name, requires_grad):
    op = getattr(ops, name).default

    outcomes = {"returned": 0, "raised": 0}

    @settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(ARGUMENTS[name])
    def run(arguments):
        arguments, options = arguments if isinstance(arguments[-1], dict) else (arguments, {})
        arguments = [
            a.detach().requires_grad_() if requires_grad and torch.is_tensor(a) and a.is_floating_point() else a
            for a in arguments
        ]
        try:
            result = op(*arguments, **options)
        except (RuntimeError, ValueError, IndexError) as error:
            outcomes["raised"] += bool(str(error))
            return
        for output in result if isinstance(result, tuple) else (result,):
            assert output is None or torch.is_tensor(output)
        outcomes["returned"] += 1

    run()
    # Both sides were visited: the arguments are neither all good nor all bad.
    assert min(outcomes.values()) >= 5, outcomes


@settings(deadline=None, max_examples=200)
@given(
    n=st.integers(0, 300),
    bits=st.integers(1, 8),
    junk=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_codes_are_in_bounds(n, bits, junk, dtype):
    """Whatever the bytes hold, each code picks one of the levels."""
    generator = torch.Generator().manual_seed(junk)
    codes = torch.randint(0, 256, ((n * bits + 7) // 8,), dtype=torch.uint8, generator=generator)
    levels = [float(i) for i in range(2**bits)]
    got = ops.step_activation_backward(torch.ones(n, dtype=dtype), codes, levels, bits)
    assert got.double().tolist() == lomem.reference.unpack_bits(codes, bits, n).tolist()
