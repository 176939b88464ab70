"""Step activations: forward bit for bit torch's, codes and gradients from the definition."""

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, SIXTEEN_BIT, all_patterns, in_memory_order, make_input, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from lomem import reference

pytestmark = pytest.mark.parametrize("name", ACTIVATIONS)


def levels_of(step, dtype):
    """Levels summed in double, rounded once to the type that gradients are computed in."""
    return torch.tensor(step.levels, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)


def expected_gradient(x, grad, step):
    """grad * level[code], computed in float64 and rounded once."""
    level = levels_of(step, x.dtype)[reference.step_codes(x, step).long().cpu()].to(x.device)
    return (grad.double() * level.double()).to(x.dtype)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_every_size(name, dtype, requires_grad, device):
    op, torch_op, _, _, *_ = ACTIVATIONS[name]
    for n in range(131):
        x = (torch.randn(n, device=device) * 4).to(dtype)
        assert same_bits(op(x.clone().requires_grad_(requires_grad)).detach(), torch_op(x)), n


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_every_layout(name, dtype, layout, requires_grad, device):
    op, torch_op, _, _, *_ = ACTIVATIONS[name]
    x = make_input(layout, dtype, device)
    assert same_bits(op(x.detach().requires_grad_(requires_grad)).detach(), torch_op(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_output(name, layout, device):
    _, torch_op, _, forward, *_ = ACTIVATIONS[name]
    x = make_input(layout, torch.float32, device)
    assert forward(x)[0].stride() == torch_op(x).stride()
    if x.dim() == 3 and x.is_contiguous() and x.numel() > 1:
        # The stride of a dimension of size 1 says nothing; torch makes it regular.
        odd = x[:1].as_strided((1, *x.shape[1:]), (1000, *x.stride()[1:]))
        assert forward(odd)[0].stride() == torch_op(odd).stride()


def odd_strides(shape):
    """Strides that a tensor of the shape can have, any of dimensions of at most one element among them."""
    plain = torch.empty(shape, device="meta")
    dense = [plain.stride()]
    if len(shape) > 1:
        dense.append(tuple(reversed(torch.empty(tuple(reversed(shape)), device="meta").stride())))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if len(shape) in formats:
        dense.append(torch.empty(shape, device="meta", memory_format=formats[len(shape)]).stride())
    for strides in dense:
        yield strides
        for odd in (0, 1, 5, 1000):
            yield tuple(odd if size <= 1 else usual for size, usual in zip(shape, strides, strict=True))


SHAPES = [
    *[(), (0,), (1,), (7,), (0, 3), (3, 0), (1, 1), (1, 7), (7, 1), (2, 3), (1, 0, 1), (1, 1, 1), (1, 4, 1), (3, 1, 5)],
    *[(1, 1, 1, 1), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 4, 1), (2, 0, 4, 5), (1, 3, 1, 1), (2, 3, 4, 5)],
    *[(1, 1, 1, 1, 1), (1, 3, 2, 4, 5), (2, 3, 1, 1, 1), (2, 1, 2, 3, 1), (0, 1, 2, 3, 1)],
]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_of_every_shape(name, shape, fast, device):
    """Those of torch's op, whatever the input's are: with a gradient and without, of codes, and of shapes alone."""
    op, torch_op, _, forward, *_ = ACTIVATIONS[name]
    for strides in odd_strides(shape):
        for place in (device, torch.device("meta")):
            storage = torch.zeros(5000, device=place)
            x = storage.as_strided(shape, strides)
            want = torch_op(x).stride()
            assert op(x, fast=fast).stride() == want, strides
            assert op(x.detach().requires_grad_(), fast=fast).stride() == want, strides
            assert forward(x, fast=fast)[0].stride() == want, strides
        # What is not dense: a hole behind each element.
        gaps = torch.zeros(10_000, device=device).as_strided(shape, [2 * stride for stride in strides])
        assert op(gaps, fast=fast).stride() == torch_op(gaps).stride(), strides


@pytest.mark.parametrize("fast", [False, True])
def test_strides_of_large_inputs(name, fast, device):
    """Those that are computed in tiles too."""
    op, torch_op, *_ = ACTIVATIONS[name]
    n = (1 << 23) + 5
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(n, dtype=dtype, device=device).as_strided((1, n, 1), (3, 1, 7))
        assert op(x.detach().requires_grad_(), fast=fast).stride() == torch_op(x).stride()


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_every_pattern(name, dtype, requires_grad, device):
    op, torch_op, _, _, *_ = ACTIVATIONS[name]
    x = all_patterns(dtype, device)
    assert same_bits(op(x.clone().requires_grad_(requires_grad)).detach(), torch_op(x))


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_codes_across_threads(name, dtype, device):
    # torch's float16 GELU depends on how the range is split over threads: the split must be torch's.
    op, torch_op, step, forward, *_ = ACTIVATIONS[name]
    x = (torch.randn(1_000_003, device=device) * 4).to(dtype)
    assert same_bits(op(x.clone().requires_grad_()).detach(), torch_op(x))
    output, codes = forward(x)
    assert same_bits(output, torch_op(x))
    assert torch.equal(codes, reference.pack_bits(reference.step_codes(x, step), 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_follow_the_memory_order_of_the_output(name, dtype, layout, device):
    _, _, step, forward, *_ = ACTIVATIONS[name]
    x = make_input(layout, dtype, device)
    output, codes = forward(x)
    dense = torch.empty_like(output).copy_(x)
    assert dense.stride() == output.stride()
    assert codes.dtype == torch.uint8
    assert codes.shape == ((x.numel() + 3) // 4,)
    assert torch.equal(codes, reference.pack_bits(reference.step_codes(in_memory_order(dense), step), 2))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_codes_of_every_pattern(name, dtype, device):
    _, _, step, forward, *_ = ACTIVATIONS[name]
    x = all_patterns(dtype, device)
    assert torch.equal(forward(x)[1], reference.pack_bits(reference.step_codes(x, step), 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(name, dtype, device):
    _, _, step, forward, *_ = ACTIVATIONS[name]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inf = torch.tensor(float("inf"))
    values, want = [float("nan"), float("inf"), -float("inf")], [0, 3, 0]
    if dtype == compute:
        for i, c in enumerate(step.boundaries):
            boundary = torch.tensor(c, dtype=dtype)
            values += [boundary, torch.nextafter(boundary, inf.to(dtype)), torch.nextafter(boundary, -inf.to(dtype))]
            want += [i, i + 1, i]  # a tie is not greater
    x = torch.tensor([float(v) for v in values], dtype=dtype, device=device)
    got = lomem.functional.unpack_bits(forward(x)[1], 2, x.numel())
    assert got.tolist() == want


def test_padding_bits_are_zero(name, device):
    _, _, _, forward, *_ = ACTIVATIONS[name]
    for n in range(1, 40):
        x = torch.full((n,), 100.0, device=device)  # code 3 everywhere
        codes = forward(x)[1]
        assert codes[-1].item() == (1 << 2 * ((n - 1) % 4 + 1)) - 1
        assert (codes[:-1] == 0xFF).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_every_layout(name, dtype, layout, device):
    op, _, step, _, *_ = ACTIVATIONS[name]
    x = make_input(layout, dtype, device)
    grads = {
        "row-major": torch.randn(x.shape, dtype=torch.float64, device=device).to(dtype),
        "expanded": torch.ones((), dtype=dtype, device=device).expand(x.shape),
        "like the input": torch.empty_like(x).copy_(torch.randn(x.shape, device=device)),
    }
    if x.dim() > 1:
        reversed_shape = tuple(reversed(x.shape))
        grads["transposed"] = torch.randn(reversed_shape, device=device).to(dtype).permute(*reversed(range(x.dim())))
    if x.dim() > 0:
        grads["strided"] = torch.randn((*x.shape[:-1], 2 * x.shape[-1]), device=device).to(dtype)[..., ::2]
    for kind, grad in grads.items():
        leaf = x.detach().requires_grad_()
        (got,) = torch.autograd.grad(op(leaf), leaf, grad)
        assert torch.equal(got, expected_gradient(x, grad, step)), kind


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_gradient_every_pattern(name, dtype, device):
    op, _, step, _, *_ = ACTIVATIONS[name]
    x = all_patterns(dtype, device)
    grad = x.flip(0)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(op(leaf), leaf, grad)
    assert torch.equal(got.isnan(), grad.isnan() | (grad.isinf() & (reference.step_codes(x, step) == 0)))
    keep = ~got.isnan()
    assert torch.equal(got[keep], expected_gradient(x, grad, step)[keep])


def test_gradient_is_that_of_the_sum_of_relus(name, device):
    op, _, step, _, *_ = ACTIVATIONS[name]
    x = (torch.randn(10_000, dtype=torch.float64, device=device) * 4).requires_grad_()
    grad = torch.randn_like(x)
    (got,) = torch.autograd.grad(op(x), x, grad)
    slopes = [b - a for a, b in zip(step.levels, step.levels[1:], strict=False)]
    primitive = sum(a * F.relu(x - c) for a, c in zip(slopes, step.boundaries, strict=True))
    (want,) = torch.autograd.grad(primitive, x, grad)
    # autograd adds the slopes in another order: sums of three terms of size about 1.
    torch.testing.assert_close(got, want, rtol=4e-16, atol=4e-16)


def test_gradient_approximates_the_exact_one(name, device):
    # What the approximation is worth: on a uniform grid it correlates with the exact derivative.
    op, torch_op, _, _, *_ = ACTIVATIONS[name]
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64, device=device).requires_grad_()
    (approximate,) = torch.autograd.grad(op(x).sum(), x)
    (exact,) = torch.autograd.grad(torch_op(x).sum(), x)
    assert F.cosine_similarity(approximate, exact, dim=0) > 0.98


@pytest.mark.cpu_kernels
@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=5),
    seed=st.integers(0, 2**31),
    steps=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_random_views(name, shape, seed, steps, dtype):
    op, torch_op, step, _, *_ = ACTIVATIONS[name]
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn([2 * s for s in shape], generator=generator) * 4).to(dtype)
    order = torch.randperm(len(shape), generator=generator).tolist()
    view = base[tuple(slice(None, None, k) for k in steps[: len(shape)])].permute(order)
    x = view.detach().requires_grad_()
    y = op(x)
    assert same_bits(y.detach(), torch_op(view))
    grad = torch.randn(view.shape, generator=generator).to(dtype)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(got, expected_gradient(view, grad, step))


def test_modules(name, device):
    module = ACTIVATIONS[name].module()
    x = torch.randn(4, 5, device=device)
    assert same_bits(module(x), ACTIVATIONS[name].op(x))
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.cpu_kernels
def test_reference_agrees(name, device):
    for dtype in DTYPES:
        x = (torch.randn(777, device=device) * 4).to(dtype)
        results = []
        for f in (ACTIVATIONS[name].op, ACTIVATIONS[name].reference):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), leaf.grad))
        assert same_bits(results[0][0], results[1][0])
        assert same_bits(results[0][1], results[1][1])


def test_wrong_dtypes(name):
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64):
        x = torch.ones(4, dtype=dtype)
        for op in (ACTIVATIONS[name].op, ACTIVATIONS[name].forward):
            with pytest.raises(RuntimeError, match=r"^lomem::\w+: input has dtype \w+, expected float64, float32"):
                op(x)
