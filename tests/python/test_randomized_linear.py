"""RandomizedLinear: everything but the weight gradient is exact; that is unbiased, with the theoretical variance."""

import itertools
import math
from fractions import Fraction

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EPS
from lomem.memory import saved_for_backward
from randomized_helpers import INDEX_BYTES, LF, PICKS, SEED_BYTES, compress, estimate, matmuls, ops, projection
from torch import nn


def layer_gradients(f, *tensors, grad):
    """A layer's result and gradients. All tensors are made to require gradients."""
    inputs = [t if t.requires_grad else t.clone().requires_grad_() for t in tensors]
    y = f(*inputs)
    return y, torch.autograd.grad(y, inputs, grad)


# name -> shape of what is there, and how it is looked at
INPUTS = {
    "matrix": ((10, 6), lambda x: x),
    "3-D": ((3, 5, 6), lambda x: x),
    "4-D": ((2, 3, 2, 6), lambda x: x),
    "transposed": ((6, 10), lambda x: x.t()),
    "permuted": ((5, 3, 6), lambda x: x.transpose(0, 1)),
    "last dimension first": ((6, 3, 5), lambda x: x.permute(1, 2, 0)),
    "sliced": ((20, 12), lambda x: x[::2, 3:9]),
    "expanded": ((5, 1, 6), lambda x: x.expand(5, 4, 6)),
    "one row": ((1, 6), lambda x: x),
    "one dimension": ((6,), lambda x: x),
    "no rows": ((0, 6), lambda x: x),
    "no rows, 3-D": ((4, 0, 6), lambda x: x),
}


@matmuls
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_all_but_the_gradient_of_the_weight_is_torchs(matmul, kind, dtype, bias, device):
    shape, view = INPUTS[kind]
    x = view(torch.randn(shape, device=device).to(dtype).requires_grad_())
    parameters = [torch.randn(4, 6, device=device).to(dtype), torch.randn(4, device=device).to(dtype)][: 1 + bias]
    grad = torch.randn(*x.shape[:-1], 4, device=device).to(dtype)
    got, got_gradients = layer_gradients(
        lambda *a: LF.randomized_linear(*a, matmul=matmul, proj_dim_ratio=0.3), x, *parameters, grad=grad
    )
    want, want_gradients = layer_gradients(F.linear, x, *parameters, grad=grad)
    assert got.dtype == dtype
    assert got.stride() == want.stride()
    assert torch.equal(got, want)
    assert torch.equal(got_gradients[0], want_gradients[0])
    assert not bias or torch.equal(got_gradients[2], want_gradients[2])
    assert got_gradients[1].dtype == dtype
    assert got_gradients[1].isfinite().all()
    rows = x.shape[:-1].numel()
    if rows <= 1:
        # Nothing to compress: exact, and zeros for empty inputs.
        assert torch.equal(got_gradients[1], want_gradients[1])
        assert rows or not got_gradients[1].any()
    else:
        assert not torch.equal(got_gradients[1], want_gradients[1])


@matmuls
@pytest.mark.parametrize(
    "size", [{"proj_dim_ratio": 1.0}, {"proj_dim": 10}, {"proj_dim": 99}, {"proj_dim_ratio": 0.99}]
)
def test_all_rows_are_exact(matmul, size, device):
    x, weight = torch.randn(10, 6, device=device), torch.randn(4, 6, device=device)
    grad = torch.randn(10, 4, device=device)
    _, got = layer_gradients(lambda *a: LF.randomized_linear(*a, matmul=matmul, **size), x, weight, grad=grad)
    _, want = layer_gradients(F.linear, x, weight, grad=grad)
    assert all(map(torch.equal, got, want))
    # The same by the ops themselves.
    torch.testing.assert_close(estimate(x, grad, 0, 10, matmul), grad.t() @ x)
    assert torch.equal(estimate(x[:0], grad[:0], 0, 3, matmul), torch.zeros(4, 6, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@matmuls
def test_autocast_is_that_of_linear_layers(matmul, dtype, device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul=matmul, device=device)
    plain = nn.Linear(6, 4, device=device)
    plain.load_state_dict(layer.state_dict())
    for x_dtype in (torch.float32, dtype):
        x = torch.randn(10, 6, device=device, dtype=x_dtype)
        results = []
        for module in (layer, plain):
            leaf = x.clone().requires_grad_()
            with saved_for_backward() as saved, torch.autocast(device.type, dtype=dtype):
                y = module(leaf)
            if module is layer:
                # The rows in the autocast dtype, and the cast weight.
                want = 3 * 6 * 2 + SEED_BYTES + 3 * INDEX_BYTES * (matmul in PICKS) + 4 * 6 * 2
                assert saved.nbytes == want
            y.sum().backward()
            results.append((y.detach(), leaf.grad, module.bias.grad))
            assert module.weight.grad.dtype == torch.float32
            module.zero_grad()
        assert results[0][0].dtype == dtype
        assert all(map(torch.equal, *results))
    # autocast leaves float64 alone, and it cannot be mixed with float32.
    for module in (layer, plain):
        with torch.autocast(device.type, dtype=dtype), pytest.raises(RuntimeError, match="dtype"):
            module(torch.randn(10, 6, device=device, dtype=torch.float64))


def transform(matmul, n):
    """The orthonormal matrices, by the textbook formulas, in float64."""
    j, i = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    if matmul == "dct":
        matrix = (math.pi * (2 * i + 1) * j / (2 * n)).cos() * math.sqrt(2 / n)
    else:
        angle = 2 * math.pi * i * j / n
        # Above n / 2: imaginary parts of the frequencies n - j.
        matrix = torch.where(j <= n // 2, angle.cos(), angle.sin()) * math.sqrt(2 / n)
        if n % 2 == 0:
            matrix[n // 2] /= math.sqrt(2)
    matrix[0] /= math.sqrt(2)
    return matrix


def variance(matmul, x, y, k):
    """Expected squared Frobenius error of the estimate of y^T x. docs/linear.md has the formulas."""
    n = len(x)
    squares_x, squares_y = x.square().sum(1), y.square().sum(1)
    product = (y.t() @ x).square().sum()
    if matmul == "gaussian":
        return (squares_x.sum() * squares_y.sum() + product) / k
    if matmul == "rademacher":
        return (squares_x.sum() * squares_y.sum() + product - 2 * (squares_x * squares_y).sum()) / k
    if matmul in ("dct", "dft"):
        # Variance of sampling without replacement, with the mean of the squares over the signs.
        f = transform(matmul, n).square()
        pairs = (x @ x.t()) * (y @ y.t())
        square = (f @ squares_x) * (f @ squares_y) + 2 * ((f @ pairs) * f).sum(1) - 2 * f.square() @ pairs.diag()
        return n / k * (n - k) / (n - 1) * (square.sum() - product / n)
    if matmul == "uniform":  # rows without replacement, the baseline for the others
        return n / k * (n - k) / (n - 1) * ((squares_x * squares_y).sum() - product / n)
    norms, order = squares_x.sqrt().sort(descending=True)
    kept = 0
    if matmul == "wta-crs":
        rest = norms.sum() - torch.cat([torch.zeros(1), norms.cumsum(0)])
        kept = min(range(k), key=lambda m: float(rest[m]) / (k - m))
    tail = order[kept:]
    p = squares_x[tail].sqrt() / squares_x[tail].sqrt().sum()
    terms = torch.where(p > 0, squares_x[tail] * squares_y[tail] / p, 0.0)
    return (terms.sum() - (y[tail].t() @ x[tail]).square().sum()) / (k - kept)


def rows_of_unequal_norms(rows=16, inputs=6, outputs=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, dtype=torch.float64, generator=generator)
    y = torch.randn(rows, outputs, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.1, 4, rows, dtype=torch.float64).square()[:, None], y


@matmuls
@pytest.mark.parametrize("rows", [16, 13])
def test_the_mean_converges_and_the_variance_is_that_of_theory(matmul, rows):
    x, y = rows_of_unequal_norms(rows)
    k, count = 5, 4096
    errors = torch.stack([estimate(x, y, seed, k, matmul) for seed in range(count)]) - y.t() @ x
    errors = errors.flatten(1)
    # Each element's mean is off by at most 5 standard errors: the chance of more is 6e-7 per element.
    z = errors.mean(0) / (errors.std(0) / math.sqrt(count))
    assert z.abs().max() < 5
    # The mean square is the theoretical variance, within 5 standard errors.
    squares = errors.square().sum(1)
    want = variance(matmul, x, y, k)
    assert (squares.mean() - want).abs() < 5 * squares.std() / math.sqrt(count)
    # The error of a mean over N falls as 1 / sqrt(N): N times its mean square is the variance, for N = 16 and N = 256.
    # With C the covariance of the elements, the estimate from count / N groups has the relative standard error
    # sqrt(2 tr C^2 / (tr C)^2 / groups), since means over 16 or more are approximately normal.
    covariance = errors.t().cov()
    spread = covariance.square().sum() / covariance.trace().square()
    for size in (16, 256):
        means = errors.unflatten(0, (-1, size)).mean(1)
        ratio = size * means.square().sum(1).mean() / want
        assert (ratio - 1).abs() < 5 * (2 * spread / len(means)).sqrt(), size


@pytest.mark.parametrize("matmul", ["gaussian", "rademacher", "dct", "dft"])
def test_the_module_is_unbiased(matmul, device):
    # The same with seeds from lomem's own stream, through autograd.
    x, y = (t.to(device) for t in rows_of_unequal_norms())
    layer = lomem.nn.RandomizedLinear(6, 5, dtype=x.dtype, proj_dim_ratio=0.3, matmul=matmul, device=device)
    gradients = [torch.autograd.grad(layer(x), layer.weight, y)[0] for _ in range(2000)]
    errors = torch.stack(gradients) - y.t() @ x
    assert (errors.mean(0) / (errors.std(0) / math.sqrt(len(errors)))).abs().max() < 5
    assert len({tuple(g.flatten().tolist()) for g in gradients}) == len(gradients)


@pytest.mark.parametrize("matmul", ["dct", "dft"])
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 9, 30, 31, 97])
def test_transforms(matmul, rows, device):
    k = rows - 1
    s = projection(rows, k, seed=3, matmul=matmul, device=device).cpu() / math.sqrt(rows / k)
    torch.testing.assert_close(s @ s.t(), torch.eye(k, dtype=s.dtype), rtol=0, atol=1e-13)
    # Rows of the matrix without repetition, with signs on its columns.
    matrix = transform(matmul, rows)
    which = [(matrix.abs() - row.abs()).abs().sum(1) for row in s]
    found = []
    signs = torch.zeros(rows)
    for distances in which:
        candidates = [c for c in range(rows) if distances[c] < 1e-10]
        assert candidates
        found.append(candidates)
    assert len({c for candidates in found for c in candidates}) >= k
    # A single set of signs explains all rows. It is read from a row without zeros.
    for row, candidates in zip(s, found, strict=True):
        if row.abs().min() > 1e-6 and len(candidates) == 1:
            signs = (row * matrix[candidates[0]]).sign()
    if signs.any():
        for row, candidates in zip(s, found, strict=True):
            assert any((row - matrix[c] * signs).abs().max() < 1e-10 for c in candidates)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements(dtype, device):
    rows, k = 333, 100
    s = projection(rows, k, 0, "rademacher", dtype, device).double() * math.sqrt(k)
    # A single rounding of the result.
    assert ((s.abs() - 1).abs() <= EPS[dtype]).all()
    assert abs(s.mean()) < 5 / math.sqrt(s.numel())
    s = projection(rows, k, 0, "gaussian", dtype, device).double() * math.sqrt(k)
    assert abs(s.mean()) < 5 / math.sqrt(s.numel())
    assert abs(s.square().mean() - 1) < 5 * math.sqrt(2 / s.numel())
    assert abs(s.pow(4).mean() - 3) < 5 * math.sqrt(96 / s.numel())
    # Rows and columns use different random numbers.
    assert len({tuple(row) for row in s.tolist()}) == k
    assert s.t().corrcoef().fill_diagonal_(0).abs().max() < 6 / math.sqrt(k)


@pytest.mark.parametrize("matmul", ["gaussian", "rademacher"])
def test_blocks_of_the_matrix(matmul):
    # More elements than are generated at a time (2^23): both passes see all of them.
    rows, k = 2**20 + 1, 20
    x = torch.zeros(rows, 1)
    x[::1000] = torch.randn(len(x[::1000]), 1)
    seed = torch.tensor(5)
    compressed, _ = compress(x, seed, k, matmul)
    assert len(set(compressed.flatten().tolist())) == k
    got = ops.randomized_linear_weight_grad(x, compressed, None, seed, matmul=matmul)
    torch.testing.assert_close(got, compressed.square().sum()[None, None])


@matmuls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(matmul, dtype, device):
    """The estimate in any dtype equals that in float64 with the same S, up to rounding."""
    rows, k = 500, 100
    x, y = (torch.randn(rows, width, device=device).to(dtype) for width in (12, 9))
    got = estimate(x, y, 7, k, matmul).double()
    if matmul == "gaussian":  # its numbers are drawn in float32
        s = projection(rows, k, 7, matmul, torch.float32, device).double()
        want = (s @ y.double()).t() @ (s @ x.double())
    else:
        want = estimate(x.double(), y.double(), 7, k, matmul)
    # S X, S Y and the result are rounded once each, and for gaussian S too; sums of 500 and 100 products use float32.
    if matmul in PICKS:
        compressed, indices = compress(x.double(), 7, k, matmul)
        factors = y.double()[indices], compressed
    else:
        factors = [compress(t.double(), 7, k, matmul)[0] for t in (y, x)]
    size = factors[0].abs().t() @ factors[1].abs()
    assert ((got - want).abs() <= (2 * EPS[dtype] + 20 * EPS[torch.float32]) * size).all()


@matmuls
def test_size_of_the_result(matmul, device):
    for rows, ratio in itertools.product(
        [2, 3, 5, 10, 127, 1000], [1e-9, 0.01, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.999]
    ):
        x = torch.ones(rows, 3, device=device)
        weight = torch.ones(2, 3, device=device, requires_grad=True)
        want = int(Fraction(ratio).limit_denominator(2**20) * rows + Fraction(1, 2))
        for low, high in ((None, None), (4, None), (None, 7), (4, 4), (2, 5000)):
            kept = max(want, low or 1)
            kept = min(kept, high or kept, rows)
            with saved_for_backward([x, weight]) as saved:
                LF.randomized_linear(
                    x, weight, matmul=matmul, proj_dim_ratio=ratio, proj_dim_min=low, proj_dim_max=high
                )
            picks = INDEX_BYTES * kept * (matmul in PICKS)
            # If all rows are kept, the input itself is saved, which is not counted here.
            assert saved.nbytes == (kept * 3 * 4 + SEED_BYTES + picks if kept < rows else 0), (rows, ratio, low, high)


def test_rows_in_proportion_to_their_norms_beat_rows_at_random():
    x, y = rows_of_unequal_norms(64)
    y /= y.norm(dim=1, keepdim=True)
    for k in (4, 8, 16):
        uniform, crs, wta = (float(variance(m, x, y, k)) for m in ("uniform", "crs", "wta-crs"))
        # The norms are uneven enough to make up for replacement, but not for many winners.
        assert crs < uniform, k
        assert wta < 1.02 * crs, k
        for matmul, want in (("crs", crs), ("wta-crs", wta)):
            errors = torch.stack([estimate(x, y, seed, k, matmul) for seed in range(1000)]) - y.t() @ x
            squares = errors.square().sum((1, 2))
            assert abs(squares.mean() - want) < 5 * squares.std() / math.sqrt(1000)


def test_concentrated_mass_is_for_winners():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 8, dtype=torch.float64, generator=generator)
    y = torch.randn(200, 8, dtype=torch.float64, generator=generator)
    x[torch.randperm(200, generator=generator)[:10]] *= 100
    crs, wta = (float(variance(m, x, y, 20)) for m in PICKS)
    assert wta < crs / 5
    for matmul, want in (("crs", crs), ("wta-crs", wta)):
        squares = torch.stack([(estimate(x, y, seed, 20, matmul) - y.t() @ x).square().sum() for seed in range(1000)])
        assert abs(squares.mean() - want) < 5 * squares.std() / math.sqrt(1000)


def test_equal_norms_gain_nothing_and_lose_nothing():
    x, y = rows_of_unequal_norms(50)
    x /= x.norm(dim=1, keepdim=True)
    assert variance("wta-crs", x, y, 10) == pytest.approx(float(variance("crs", x, y, 10)), rel=0.2)


@pytest.mark.parametrize("matmul", PICKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_picked(matmul, dtype, device):
    norms = torch.tensor([0.0, 3, 1, 0, 2, 100, 0, 1], dtype=torch.float64, device=device)
    x = torch.zeros(8, 4, dtype=torch.float64, device=device)
    x[:, 2] = norms
    x = x.to(dtype)
    for seed in range(200):
        compressed, indices = compress(x, seed, 4, matmul)
        assert (indices.dtype, indices.shape) == (torch.int64, (4,))
        # Never a row of zeros; each is an input row times its scale.
        p = norms / norms.sum()
        if matmul == "crs":
            scales = 1 / (4 * p[indices])
        else:
            assert indices[0] == 5
            kept = 1 + int(indices[1] == 1 and compressed[1, 2] == 3)
            rest = norms.sum() - norms.sort(descending=True).values[:kept].sum()
            scales = rest / ((4 - kept) * norms[indices])
            scales[:kept] = 1
        torch.testing.assert_close(
            compressed.double(), x[indices].double() * scales[:, None].double(), rtol=EPS[dtype], atol=0
        )
        assert x[indices].any(1).all()


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_few_rows_that_are_not_zero_are_exact(count, device):
    x, y = (
        torch.zeros(20, 6, dtype=torch.float64, device=device),
        torch.randn(20, 5, dtype=torch.float64, device=device),
    )
    x[3 : 3 + 4 * count : 4] = torch.randn(count, 6, dtype=torch.float64, device=device)
    for seed in range(50):
        torch.testing.assert_close(estimate(x, y, seed, 4, "wta-crs"), y.t() @ x)
        if count < 2:
            torch.testing.assert_close(estimate(x, y, seed, 4, "crs"), y.t() @ x)


@pytest.mark.parametrize("matmul", PICKS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_picks_are_in_bounds_whatever_the_rows_hold(matmul, value, device):
    x = torch.randn(50, 6, device=device)
    x[7] = value
    for seed in range(20):
        _, indices = compress(x, seed, 10, matmul)
        assert ((indices >= 0) & (indices < 50)).all()
