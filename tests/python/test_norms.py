"""Memory-sharing norms against torch's in float64."""

import itertools

import lomem
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EPS, NORMS, make_norm_parameters, runs_cuda_kernels
from torch import nn

LF = lomem.functional


pytestmark = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())

COLS = [1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 511, 512, 513, 768, 1023, 1024, 1025, 2047, 2049, 4096, 65_537, 1_000_000]


def double(tensors):
    return tuple(t.double() for t in tensors)


def assert_rounded_once(got, want, mean=1, parameters=0):
    """Checks that `got` is `want`, given in float64, rounded once; float64 results may have float64's own errors.

    Other results are computed in float32 first. They are off by half a spacing of their dtype, and by a few float32
    roundings of the result and of weight and bias, whose magnitudes add up to at most `parameters`. The size of the
    mean does not matter: it is a sum of distances from one element, a few standard deviations each, of which at most 32
    are added in float32. This costs a few roundings in the unit of the results.
    """
    distance = (got.double() - want).abs()
    if got.dtype == torch.float64:
        # Sums of up to 1e6 terms, z = y * w + b, and a rounded mean.
        assert (distance <= 1e-12 * want.abs() + 1e-13 + 4 * EPS[torch.float64] * mean).all()
        return
    finite = got.isfinite()
    assert torch.equal(got[~finite], want.to(got.dtype)[~finite])
    rounding = EPS[torch.float32] / 2
    if runs_cuda_kernels(got.device):
        arithmetic = 8 * rounding * (want.abs() + 2)
    else:
        # Deviation, its part below the digits of float32, rstd, product; weight and bias.
        arithmetic = 4 * rounding * (want.abs() + parameters) + 4 * rounding
    subnormal = 2.0**-25 if got.dtype == torch.float16 else 0
    assert (distance <= EPS[got.dtype] / 2 * want.abs() + arithmetic + subnormal)[finite].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
def test_forward_every_row_length(norm, dtype, cols, device):
    x = (torch.randn(3 if cols < 100_000 else 2, cols, device=device) * 3 + 1).to(dtype)
    assert_rounded_once(norm.op(x, (cols,), eps=1e-5), norm.torch_op(x.double(), (cols,), eps=1e-5))
    for parameter_dtype in dict.fromkeys([dtype, torch.float32]):
        parameters = make_norm_parameters(norm, (cols,), parameter_dtype, device)
        got = norm.op(x, (cols,), *parameters, eps=1e-5)
        assert_rounded_once(got, norm.torch_op(x.double(), (cols,), *double(parameters), eps=1e-5), parameters=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (5, 2, 3, 4)])
def test_forward_multi_dimensional(norm, dtype, shape, device):
    x = torch.randn(shape, device=device).to(dtype)
    for k in range(1, len(shape) + 1):
        normalized_shape = shape[-k:]
        parameters = make_norm_parameters(norm, normalized_shape, dtype, device)
        got = norm.op(x, normalized_shape, *parameters, eps=1e-5)
        assert got.shape == x.shape
        want = norm.torch_op(x.double(), normalized_shape, *double(parameters), eps=1e-5)
        assert_rounded_once(got, want, parameters=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_strides_do_not_matter(norm, dtype, device):
    base = torch.randn(4, 6, 10, device=device).to(dtype)
    views = {
        "transposed": base.transpose(0, 1),
        "sliced": base[:, ::2, 1:9],
        "expanded": base[:, :1].expand(4, 5, 10),
        "channels_last": base[None].contiguous(memory_format=torch.channels_last)[0],
    }
    for kind, x in views.items():
        cols = x.shape[-1]
        got = norm.op(x, (cols,), eps=1e-5)
        assert got.is_contiguous(), kind
        assert torch.equal(got, norm.op(x.contiguous(), (cols,), eps=1e-5)), kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1e3, 3e4, 1e30])
def test_huge_and_tiny_values(norm, dtype, scale, device):
    info = torch.finfo(dtype)
    if runs_cuda_kernels(device) and dtype != torch.float64:
        scale = min(scale, 1e18)  # float32 squares overflow above, as in torch
    x = (torch.rand(5, 100, dtype=torch.float64, device=device) - 0.5) * 2 * scale
    x = x.clamp(info.min, info.max).to(dtype)
    for eps in (1e-5, 1e-12):
        got = norm.op(x, (100,), eps=eps)
        assert got.isfinite().all()
        assert_rounded_once(got, norm.torch_op(x.double(), (100,), eps=eps))


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_beyond_the_range(norm, dtype):
    # Finite elements with infinite differences.
    limit = torch.finfo(dtype).max
    x = torch.tensor([limit, -limit, 0.5 * limit, -limit, 1.0, limit], dtype=dtype).repeat(3, 20)
    got = norm.op(x, (120,), eps=1e-5)
    assert_rounded_once(got, norm.torch_op(x.double(), (120,), eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_far_from_zero(norm, dtype, device):
    # Computed from a float32 mean, these would be wrong in the third digit.
    x = (torch.randn(7, 333, dtype=torch.float64, device=device) + 1e4).to(dtype)
    assert_rounded_once(norm.op(x, (333,), eps=1e-5), norm.torch_op(x.double(), (333,), eps=1e-5), mean=1e4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.5, 3.0, 30.0, 2e4])
def test_first_elements_unlike_the_others(norm, dtype, offset, device):
    # The mean is computed relative to the first elements, which are 0.5 to 20,000 standard deviations from the others.
    x = torch.randn(6, 700, dtype=torch.float64, device=device)
    for row, width in enumerate([1, 2, 31, 32, 33, 64]):
        x[row, :width] += offset
    x = x.to(dtype)
    assert_rounded_once(norm.op(x, (700,), eps=1e-5), norm.torch_op(x.double(), (700,), eps=1e-5), mean=offset)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_two_values_behind_zeros(norm, share):
    # Equal terms round in the same direction each time they are added, and cancellation amplifies that error.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 2048, generator=generator).lt(share) * torch.rand(50, 1, generator=generator)
    x[:, :40] = 0
    want = norm.torch_op(x.double(), (2048,), eps=0.0)
    # A sum of 32 equal terms is off by up to 16 units of 2^-24. So is the mean square, and rstd by half of that. If the
    # mean is one standard deviation away, cancellation doubles it.
    assert ((norm.op(x, (2048,), eps=0.0) - want).abs() <= 16 * 2**-24 * want.abs().clamp_min(1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.14159, 1000.1, 6e4])
@pytest.mark.parametrize("cols", [1, 5, 1000, 3001])
def test_constant_rows(norm, dtype, value, cols, device):
    x = torch.full((3, cols), value, device=device).to(dtype).requires_grad_()
    y = norm.op(x, (cols,), eps=1e-5)
    if norm is NORMS["layer"] and runs_cuda_kernels(device):
        # The mean has twice the digits of float32, apart from the rounding of sums; rstd is 316.
        unit = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
        assert (y.abs() <= 316 * 64 * unit**2 * abs(value)).all()
    elif norm is NORMS["layer"]:
        assert (y == 0).all()
    else:
        assert_rounded_once(y.detach(), norm.torch_op(x.detach().double(), (cols,), eps=1e-5))
    y.backward(torch.randn_like(y))
    assert x.grad.isfinite().all()


def test_zero_rows(norm, device):
    for shape, normalized_shape in [((0, 8), (8,)), ((3, 0, 8), (8,)), ((0, 2, 4), (2, 4))]:
        x = torch.randn(shape, device=device, requires_grad=True)
        parameters = [p.requires_grad_() for p in make_norm_parameters(norm, normalized_shape, torch.float32, device)]
        y = norm.op(x, normalized_shape, *parameters, eps=1e-5)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        for parameter in parameters:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_rows_of_zero_elements(norm, device):
    x = torch.randn(3, 0, device=device, requires_grad=True)
    y = norm.op(x, (0,), eps=1e-5)
    y.sum().backward()
    assert y.shape == x.grad.shape == (3, 0)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("shape", "dims"), [((3, 5), 1), ((2, 3, 4), 2), ((7,), 1), ((1, 1), 1), ((2, 1030), 1)])
def test_gradcheck(norm, affine, shape, dims, device):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    normalized_shape = shape[-dims:]
    parameters = make_norm_parameters(norm, normalized_shape, torch.float64, device) if affine else ()
    for parameter in parameters:
        parameter.requires_grad_()
    fast = x.numel() > 100
    assert torch.autograd.gradcheck(
        lambda x, *p: norm.op(x, normalized_shape, *p, eps=1e-5), (x, *parameters), fast_mode=fast
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [None, "same", torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 3), (33, 64), (9, 768), (300, 100), (4, 2500), (2, 70_000)])
def test_gradients(norm, dtype, affine, rows, cols, device):
    x = (torch.randn(rows, cols, device=device) * 2 + 0.5).to(dtype).requires_grad_()
    parameters = ()
    if affine is not None:
        parameter_dtype = dtype if affine == "same" else affine
        parameters = [p.requires_grad_() for p in make_norm_parameters(norm, (cols,), parameter_dtype, device)]
    inputs = (x, *parameters)
    grad = torch.randn(rows, cols, device=device).to(dtype)
    got = torch.autograd.grad(norm.op(x, (cols,), *parameters, eps=1e-5), inputs, grad)

    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = norm.torch_op(exact_inputs[0], (cols,), *exact_inputs[1:], eps=1e-5)
    want = torch.autograd.grad(exact, exact_inputs, grad.double())
    for i, (g, w, t) in enumerate(zip(got, want, inputs, strict=True)):
        assert g.dtype == t.dtype
        if i == 0:
            # The saved output is rounded to dtype (eps / 2), and divided by weights >= 0.5 with
            # biases <= 0.5; then the result is rounded. Relative to the largest gradient of a row.
            scale = w.abs().amax(1, keepdim=True) + exact_rstd(norm, x, cols)
            arithmetic = 1e-12 if dtype == torch.float64 else 5e-7 if runs_cuda_kernels(device) else 1e-7
            bound = 4 * max(EPS[dtype], arithmetic) * scale
        else:
            # Sums over rows: each term is off by the rounding of y. For the bias, only the last rounding counts.
            bound = 2 * max(EPS[dtype], EPS[t.dtype]) * ((grad.double().abs() * 8).sum(0) + 1)
        assert ((g.double() - w).abs() <= bound).all(), i


def exact_rstd(norm, x, cols):
    x = x.detach().double()
    if norm is NORMS["layer"]:
        x = x - x.mean(1, keepdim=True)
    return (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(norm, dtype, device):
    x = torch.randn(17, 500, device=device).to(dtype)
    parameters = make_norm_parameters(norm, (500,), torch.float32, device)
    grad = torch.randn(17, 500, device=device).to(dtype)
    results = []
    for op in (norm.op, norm.reference):
        inputs = [t.clone().requires_grad_() for t in (x, *parameters)]
        y = op(inputs[0], (500,), *inputs[1:], eps=1e-5)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    for got, want in zip(*results, strict=True):
        # float32 against float64: a few roundings of the largest values, and the last one.
        atol = 16 * EPS[torch.float32] * want.abs().max().item()
        torch.testing.assert_close(got.double(), want.double(), rtol=EPS[got.dtype], atol=atol)


def test_only_the_gradients_asked_for(norm, device):
    x = torch.randn(6, 10, device=device)
    tensors = [x, *make_norm_parameters(norm, (10,), torch.float32, device)]
    grad = torch.randn(6, 10, device=device)

    def run(mask):
        inputs = [t.clone().requires_grad_(m) for t, m in zip(tensors, mask, strict=True)]
        y = norm.op(inputs[0], (10,), *inputs[1:], eps=1e-5)
        assert y.requires_grad == any(mask)
        if any(mask):
            y.backward(grad)
        return [t.grad for t in inputs]

    want = run([True] * len(tensors))
    for mask in itertools.product([False, True], repeat=len(tensors)):
        for got, full, wanted in zip(run(mask), want, mask, strict=True):
            assert (got is not None) == wanted
            assert not wanted or torch.equal(got, full)


def test_bias_alone(norm, device):
    x = torch.randn(6, 10, device=device, requires_grad=True)
    bias = torch.randn(10, device=device, requires_grad=True)
    if norm is NORMS["rms"]:
        with pytest.raises(TypeError, match="bias"):
            LF.ms_rms_norm(x, (10,), bias=bias)
        return
    grad = torch.randn(6, 10, device=device)
    got = torch.autograd.grad(LF.ms_layer_norm(x, (10,), None, bias), (x, bias), grad)
    want = torch.autograd.grad(F.layer_norm(x, (10,), None, bias), (x, bias), grad)
    # Two float32 implementations: a few roundings of values of order 1.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("output_dtype", "weight", "smallest"),
    [
        (torch.float32, 0.0, "1.17549e-38"),
        (torch.float64, 0.0, "2.22507e-308"),
        (torch.bfloat16, 1e-39, "1.17549e-38"),
        (torch.float16, 6e-5, "6.10352e-05"),
        (torch.float16, -1e-7, "6.10352e-05"),
    ],
)
def test_weights_too_small_to_divide_by(norm, output_dtype, weight, smallest, device):
    x = torch.randn(4, 6, device=device)
    w = torch.ones(6, dtype=torch.float64, device=device)
    w[3] = weight
    # Without gradient there is nothing to recover.
    got = norm.op(x, (6,), w, eps=1e-5, dtype=output_dtype)
    assert_rounded_once(got, norm.torch_op(x.double(), (6,), w, eps=1e-5))
    if runs_cuda_kernels(device):
        # Checking the weights would synchronize with the device, so what cannot be recovered is NaN: all of the input's
        # gradient, since the sums of each row go over all columns, and the gradient of that weight alone.
        bias = {"bias": torch.zeros_like(w).requires_grad_()} if norm.parameters == 2 else {}
        norm.op(x.requires_grad_(), (6,), w.requires_grad_(), **bias, eps=1e-5, dtype=output_dtype).sum().backward()
        assert x.grad.isnan().all()
        assert w.grad.isnan().nonzero().tolist() == [[3]]
        if bias:
            torch.testing.assert_close(bias["bias"].grad, torch.full_like(w, 4.0))
    else:
        message = rf"lomem::ms_\w+_norm: weight is {weight:g} at element 3, expected magnitudes of at least {smallest}"
        with pytest.raises(ValueError, match=message.replace("+", r"\+").replace(r"\w\+", r"\w+")):
            norm.op(x.requires_grad_(), (6,), w, eps=1e-5, dtype=output_dtype)


@pytest.mark.cpu_kernels
def test_what_to_do_about_a_weight_of_zero_in_a_converted_model(norm):
    """The advice in the error message works."""
    plain = {"layer": nn.LayerNorm(16), "rms": nn.RMSNorm(16, eps=1e-6)}["layer" if norm.parameters == 2 else "rms"]
    model = nn.Sequential(nn.Linear(16, 16), plain, nn.Linear(16, 16))
    x = torch.randn(4, 16)
    assert [d.action for d in lomem.convert(model, x).decisions] == ["inverted"]
    with torch.no_grad():
        model[1].weight[3] = 0.0
    match = (
        r"^lomem::ms_\w+_norm: weight is 0 at element 3, .* call lomem\.restore and lomem\.convert again, which then"
    )
    with pytest.raises(ValueError, match=match):
        model(x)
    lomem.restore(model)
    want = torch.autograd.grad(model(x).square().sum(), model.parameters())
    assert [d.action for d in lomem.convert(model, x).decisions] == ["normalized"]
    got = torch.autograd.grad(model(x).square().sum(), model.parameters())
    torch.testing.assert_close(got, want)


def test_gradients_of_the_smallest_float16_weights(norm, device):
    # At the limit, about half of the outputs are subnormal, and still accurate to a percent.
    x = torch.randn(64, 64, device=device)
    results = []
    for op, dtype in ((norm.op, torch.float16), (norm.torch_op, None)):
        w = torch.full((64,), 2.0**-14, device=device, requires_grad=True)
        y = op(x, (64,), w, eps=1e-5, **({"dtype": dtype} if dtype else {}))
        results.append(torch.autograd.grad(y.double().sum(), w)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-2 * results[1].abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_output_dtype(norm, dtype, output_dtype, device):
    x = torch.randn(5, 40, device=device).to(dtype).requires_grad_()
    y = norm.op(x, (40,), eps=1e-5, dtype=output_dtype)
    assert y.dtype == output_dtype
    want = norm.torch_op(x.detach().double(), (40,), eps=1e-5)
    assert_rounded_once(y.detach(), want)
    y.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_eps_is_torchs(norm, dtype, device):
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    default = 1e-5 if norm is NORMS["layer"] else torch.finfo(computed_in).eps
    # So small that eps dominates.
    x = (torch.rand(3, 16, device=device) * default**0.5).to(dtype)
    assert torch.equal(norm.op(x, (16,)), norm.op(x, (16,), eps=default))
    torch.testing.assert_close(
        norm.op(x, (16,)).double(), norm.torch_op(x, (16,)).double(), rtol=4 * EPS[dtype], atol=4 * EPS[dtype]
    )


def test_modules(norm, device):
    layer = norm is NORMS["layer"]
    ours, theirs = (lomem.nn.MSLayerNorm, torch.nn.LayerNorm) if layer else (lomem.nn.MSRMSNorm, torch.nn.RMSNorm)
    x = torch.randn(4, 3, 8, device=device)
    assert not list(ours(8).parameters()), "no affine parameters by default, as in LowMemoryBP"
    for shape in (8, (3, 8), [8]):
        torch.testing.assert_close(ours(shape, eps=1e-4)(x), theirs(shape, eps=1e-4).to(device)(x))
    a, b = ours(8, 1e-4, True), theirs(8, 1e-4, True)
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.uniform_(0.5, 1)
    a.load_state_dict(b.state_dict())
    torch.testing.assert_close(a.to(device)(x), b.to(device)(x))
    a.reset_parameters()
    assert torch.equal(a.weight, torch.ones(8, device=device))
    meta = ours(8, elementwise_affine=True, device="meta", dtype=torch.bfloat16)
    assert (meta.weight.device.type, meta.weight.dtype) == ("meta", torch.bfloat16)
    assert ours(8, output_dtype=torch.float16)(x).dtype == torch.float16
    if layer:
        assert ours(8, elementwise_affine=True, bias=False).bias is None
    assert repr(ours(8)).startswith(f"{ours.__name__}((8,), eps=")
    assert "output_dtype=torch.float16" in repr(ours(8, output_dtype=torch.float16))
    assert ours(np.int64(8)).normalized_shape == (8,)


def test_names_of_lowmemorybp(norm, device):
    x = torch.randn(3, 8, device=device)
    alias = LF.layer_norm if norm is NORMS["layer"] else LF.rms_norm
    assert torch.equal(alias(x, (8,), 1e-3), norm.op(x, (8,), eps=1e-3))
    assert torch.equal(alias(x, (8,)), norm.op(x, (8,), eps=1e-5))


@pytest.mark.parametrize("parameters", [0, 1, 2])
@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("conditioned", [True, False])
def test_jagged_tensors(norm, parameters, output_dtype, conditioned):
    """For jagged nested tensors torch's own ops are called, whatever the weights."""
    parameters = [p.requires_grad_() for p in make_norm_parameters(norm, (6,), torch.float32)[:parameters]]
    if not conditioned and parameters:
        parameters[0].data[2] = 0.0
    x = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(5, 6)], layout=torch.jagged).requires_grad_()
    results = []
    compiled = torch.compile(norm.op, fullgraph=True, backend="aot_eager")
    for y in (
        norm.op(x, (6,), *parameters, eps=1e-5, dtype=output_dtype),
        compiled(x, (6,), *parameters, eps=1e-5, dtype=output_dtype),
        norm.torch_op(x, (6,), *parameters, eps=1e-5).to(output_dtype or torch.float32),
    ):
        gradients = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y) * 0.7)
        results.append([y.detach().values(), gradients[0].values(), *gradients[1:]])
    for got in results[:2]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[2], strict=True))
    assert results[0][0].dtype == (output_dtype or torch.float32)
    with torch.inference_mode():
        x = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(5, 6)], layout=torch.jagged)
        assert torch.equal(norm.op(x, (6,), eps=1e-5).values(), norm.torch_op(x, (6,), eps=1e-5).values())
