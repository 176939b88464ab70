"""RandomizedLinear: exact but for the weight's gradient, which is right on average, with the variance of theory."""

import copy
import io
import itertools
import math
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, EPS
from lomem.memory import saved_for_backward
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LF = lomem.functional
ops = torch.ops.lomem
MATMULS = ["gaussian", "rademacher", "dct", "dft", "crs", "wta-crs"]
PICKS = ["crs", "wta-crs"]
SEED_BYTES, INDEX_BYTES = 8, 8

matmuls = pytest.mark.parametrize("matmul", MATMULS)


def compress(x, seed, proj_dim, matmul):
    """What is kept of x: rows, and indices of those that are picked."""
    weight = x.new_empty(0, x.shape[-1])
    seed = torch.as_tensor(seed, device=x.device)
    return ops.randomized_linear_forward(x, weight, None, seed, proj_dim, matmul=matmul)[1:3]


def estimate(x, y, seed, proj_dim, matmul):
    """The estimate of y^T x with a seed, by the ops."""
    seed = torch.tensor(seed, device=x.device)
    compressed, indices = compress(x, seed, proj_dim, matmul)
    return ops.randomized_linear_weight_grad(y, compressed, indices, seed, matmul=matmul)


def projection(rows, proj_dim, seed, matmul, dtype=torch.float64, device="cpu"):
    """S itself, of what mixes rows: S times the identity."""
    eye = torch.eye(rows, dtype=dtype, device=device)
    return compress(eye, seed, proj_dim, matmul)[0]


def layer_gradients(f, *tensors, grad):
    """A layer's result, and its gradients; tensors that require none are made to."""
    inputs = [t if t.requires_grad else t.clone().requires_grad_() for t in tensors]
    y = f(*inputs)
    return y, torch.autograd.grad(y, inputs, grad)


# --- What is exact ----------------------------------------------------------------------------------------------------

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
        # Nothing to compress: exact, and zeros where there is nothing at all.
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
    # And by the ops themselves.
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
                # The rows in the autocast dtype, and the cast of the weight.
                want = 3 * 6 * 2 + SEED_BYTES + 3 * INDEX_BYTES * (matmul in PICKS) + 4 * 6 * 2
                assert saved.nbytes == want
            y.sum().backward()
            results.append((y.detach(), leaf.grad, module.bias.grad))
            assert module.weight.grad.dtype == torch.float32
            module.zero_grad()
        assert results[0][0].dtype == dtype
        assert all(map(torch.equal, *results))
    # float64 is left alone, and does not go with float32.
    for module in (layer, plain):
        with torch.autocast(device.type, dtype=dtype), pytest.raises(RuntimeError, match="dtype"):
            module(torch.randn(10, 6, device=device, dtype=torch.float64))


# --- The estimate -----------------------------------------------------------------------------------------------------


def transform(matmul, n):
    """The orthonormal matrices, as the textbooks have them, in float64."""
    j, i = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    if matmul == "dct":
        matrix = (math.pi * (2 * i + 1) * j / (2 * n)).cos() * math.sqrt(2 / n)
    else:
        angle = 2 * math.pi * i * j / n
        # Above n / 2, imaginary parts of the frequencies n - j.
        matrix = torch.where(j <= n // 2, angle.cos(), angle.sin()) * math.sqrt(2 / n)
        if n % 2 == 0:
            matrix[n // 2] /= math.sqrt(2)
    matrix[0] /= math.sqrt(2)
    return matrix


def variance(matmul, x, y, k):
    """Expected squared Frobenius distance of the estimate of y^T x from it: docs/linear.md has the formulas."""
    n = len(x)
    squares_x, squares_y = x.square().sum(1), y.square().sum(1)
    product = (y.t() @ x).square().sum()
    if matmul == "gaussian":
        return (squares_x.sum() * squares_y.sum() + product) / k
    if matmul == "rademacher":
        return (squares_x.sum() * squares_y.sum() + product - 2 * (squares_x * squares_y).sum()) / k
    if matmul in ("dct", "dft"):
        # Of sampling without replacement; of the squares, the mean over the signs.
        f = transform(matmul, n).square()
        pairs = (x @ x.t()) * (y @ y.t())
        square = (f @ squares_x) * (f @ squares_y) + 2 * ((f @ pairs) * f).sum(1) - 2 * f.square() @ pairs.diag()
        return n / k * (n - k) / (n - 1) * (square.sum() - product / n)
    if matmul == "uniform":  # rows without replacement: what others are compared with
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
    # Each element's mean is off by 5 standard errors at most: the chance of more is 6e-7 an element.
    z = errors.mean(0) / (errors.std(0) / math.sqrt(count))
    assert z.abs().max() < 5
    # The mean square is the variance of theory, within 5 standard errors.
    squares = errors.square().sum(1)
    want = variance(matmul, x, y, k)
    assert (squares.mean() - want).abs() < 5 * squares.std() / math.sqrt(count)
    # The error of means of N goes as 1 / sqrt(N): N times its mean square is the variance, for N of 16 and of 256. With
    # C the covariance of the elements, that of count / N groups has the relative standard error
    # sqrt(2 tr C^2 / (tr C)^2 / groups), since means of 16 and more are about normal.
    covariance = errors.t().cov()
    spread = covariance.square().sum() / covariance.trace().square()
    for size in (16, 256):
        means = errors.unflatten(0, (-1, size)).mean(1)
        ratio = size * means.square().sum(1).mean() / want
        assert (ratio - 1).abs() < 5 * (2 * spread / len(means)).sqrt(), size


@pytest.mark.parametrize("matmul", ["gaussian", "rademacher", "dct", "dft"])
def test_the_module_is_unbiased(matmul, device):
    # The same with seeds of lomem's own stream, through autograd.
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
    # Rows of the matrix, each once, its columns times signs.
    matrix = transform(matmul, rows)
    which = [(matrix.abs() - row.abs()).abs().sum(1) for row in s]
    found = []
    signs = torch.zeros(rows)
    for distances in which:
        candidates = [c for c in range(rows) if distances[c] < 1e-10]
        assert candidates
        found.append(candidates)
    assert len({c for candidates in found for c in candidates}) >= k
    # One of the sets of signs explains all rows: those of a row without zeros.
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
    # One rounding of the result.
    assert ((s.abs() - 1).abs() <= EPS[dtype]).all()
    assert abs(s.mean()) < 5 / math.sqrt(s.numel())
    s = projection(rows, k, 0, "gaussian", dtype, device).double() * math.sqrt(k)
    assert abs(s.mean()) < 5 / math.sqrt(s.numel())
    assert abs(s.square().mean() - 1) < 5 * math.sqrt(2 / s.numel())
    assert abs(s.pow(4).mean() - 3) < 5 * math.sqrt(96 / s.numel())
    # Rows and columns are of different numbers.
    assert len({tuple(row) for row in s.tolist()}) == k
    assert s.t().corrcoef().fill_diagonal_(0).abs().max() < 6 / math.sqrt(k)


@pytest.mark.parametrize("matmul", ["gaussian", "rademacher"])
def test_blocks_of_the_matrix(matmul):
    # More elements than are made at a time, 2^23: seen whole, by both passes.
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
    """The estimate of a dtype is that of float64 with the same S, but for rounding."""
    rows, k = 500, 100
    x, y = (torch.randn(rows, width, device=device).to(dtype) for width in (12, 9))
    got = estimate(x, y, 7, k, matmul).double()
    if matmul == "gaussian":  # whose numbers are drawn in float32
        s = projection(rows, k, 7, matmul, torch.float32, device).double()
        want = (s @ y.double()).t() @ (s @ x.double())
    else:
        want = estimate(x.double(), y.double(), 7, k, matmul)
    # S X and S Y are rounded once each, S too of gaussian, and the result; sums of 500 and 100 products go by float32.
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
            # The input itself, not counted here, where all rows are kept.
            assert saved.nbytes == (kept * 3 * 4 + SEED_BYTES + picks if kept < rows else 0), (rows, ratio, low, high)


# --- Picking rows -----------------------------------------------------------------------------------------------------


def test_rows_in_proportion_to_their_norms_beat_rows_at_random():
    x, y = rows_of_unequal_norms(64)
    y /= y.norm(dim=1, keepdim=True)
    for k in (4, 8, 16):
        uniform, crs, wta = (float(variance(m, x, y, k)) for m in ("uniform", "crs", "wta-crs"))
        # The norms are uneven enough to make up for replacement; not uneven enough for many winners.
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
        # Never a row of zeros; each is one of the rows, times its scale.
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


# --- Random numbers ---------------------------------------------------------------------------------------------------

MASK = 2**64 - 1


def mixed(word):
    """The finalizer of SplitMix64, with integers of Python."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word = (word ^ (word >> shift)) * multiplier & MASK
    return word


def words(seed, count):
    """The words that everything random is made of."""
    key, step = (mixed(seed + i * 0x9E3779B97F4A7C15 & MASK) for i in (1, 2))
    return [mixed(key + i * (step | 1) & MASK) for i in range(1, count + 1)]


def signs(seed, rows, k, device="cpu"):
    """Of the matrix of signs: one bit each of the words."""
    return projection(rows, k, seed, "rademacher", device=device).sign().flatten().cpu()


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901234567, -(2**63), 2**63 - 1])
def test_signs_are_the_bits_of_the_words(seed, device):
    for rows, k in ((64, 63), (13, 5), (100, 1)):
        bits = [(word >> i) & 1 for word in words(seed & MASK, (rows * k + 63) // 64) for i in range(64)]
        assert signs(seed, rows, k, device).tolist() == [2.0 * b - 1 for b in bits[: rows * k]]


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901234567])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normal_numbers_are_those_of_box_and_muller(seed, dtype, device):
    rows, k = 51, 7
    got = projection(rows, k, seed, "gaussian", dtype, device).flatten().cpu().double() * math.sqrt(k)
    want = []
    for word in words(seed & MASK, (rows * k + 1) // 2):
        low, high = (half - 2**32 * (half >> 31) for half in (word & (2**32 - 1), word >> 32))
        radius = math.sqrt(-2 * math.log(max(abs(low), 0.5) / 2**31))
        want += [radius * math.cos(math.pi * high / 2**31), radius * math.sin(math.pi * high / 2**31)]
    # In float32 the angle, up to pi, is rounded to some EPS times pi, and the logarithm of what is next to 1 to EPS:
    # its root is off by sqrt(EPS) at most.
    tolerance = {torch.float64: 1e-12, torch.float32: math.sqrt(2 * EPS[torch.float32])}[dtype]
    torch.testing.assert_close(got, torch.tensor(want[: rows * k], dtype=torch.float64), rtol=0, atol=tolerance)


def test_bits_are_independent(device):
    """Every bit of the words, every pair of bits of a word and of words that follow, of a few seeds."""
    count = 2**16
    for seed in (0, 1, 2**40, -3):
        bits = signs(seed, 2048, 2048, device)[: 64 * count].double().view(count, 64)
        # Each mean and each correlation is of count signs, of standard deviation 1 / sqrt(count): of 64 * 64 numbers
        # the chance that one is over 6 of them is 8e-6.
        limit = 6 / math.sqrt(count)
        assert bits.mean(0).abs().max() < limit
        assert ((bits.t() @ bits / count).fill_diagonal_(0)).abs().max() < limit
        for lag in (1, 2, 64):
            assert (bits[lag:].t() @ bits[:-lag] / (count - lag)).abs().max() < limit * math.sqrt(count / (count - lag))


def test_seeds_next_to_each_other_share_nothing(device):
    numbers = [*range(-4, 5), *(2**i for i in range(4, 63)), *(3 * 2**i for i in range(10, 60, 10))]
    rows = torch.stack([signs(seed, 128, 127, device) for seed in numbers]).double()
    # As above: 75 * 75 / 2 correlations.
    limit = 6 / math.sqrt(rows.shape[1])
    assert (rows @ rows.t() / rows.shape[1]).fill_diagonal_(0).abs().max() < limit
    # No word of one is a word of another, at any position: 75 * 254 words, of which two of 2^64 are equal with a
    # probability of 1e-11.
    seen = (rows[:, : 64 * (rows.shape[1] // 64)].view(-1, 64) > 0).long() << torch.arange(64)
    assert len(seen.sum(1).unique()) == len(seen)


def test_normal_numbers_are_normal(device):
    count = 2**20
    x = projection(1025, 1024, 9, "gaussian", torch.float32, device).double().flatten().cpu()[:count] * 32
    ordered = x.sort().values
    distance = (torch.special.ndtr(ordered) - (torch.arange(count) + 0.5) / count).abs().max()
    # Kolmogorov's: sqrt(count) times the distance is over 3 with a probability of 2 exp(-2 * 3^2), 3e-8.
    assert distance * math.sqrt(count) < 3
    for power, moment, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        assert abs(x.pow(power).mean() - moment) < 5 * math.sqrt((square - moment**2) / count), power
    # Tails, as far as they go.
    for limit in (3.0, 4.0, 4.5):
        expected = count * math.erfc(limit / math.sqrt(2))
        assert abs((x.abs() > limit).sum() - expected) < 5 * math.sqrt(expected), limit
    # The two of one word, and their squares, are not correlated, nor are neighbours.
    for a, b in ((x[::2], x[1::2]), (x[1:-1:2], x[2::2])):
        for f in (lambda t: t, lambda t: t.square() - 1):
            assert abs((f(a) * f(b)).mean()) < 5 * f(a).square().mean() / math.sqrt(len(a))


def test_rows_of_equal_norms_are_picked_evenly(device):
    x = torch.ones(50, 1, device=device)
    counts = sum(torch.bincount(compress(x, seed, 40, "crs")[1], minlength=50) for seed in range(1000)).cpu()
    # Chi-square of 49 degrees of freedom, within 5 standard deviations.
    chi = ((counts - 800.0) ** 2 / 800).sum()
    assert abs(chi - 49) < 5 * math.sqrt(2 * 49)


def drawn():
    """How many seeds were drawn since the stream began."""
    return lomem.random.get_state()[1]


def states():
    """Of all generators that others draw from."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return torch.cat([torch.get_rng_state(), *devices])


def test_others_random_numbers_do_not_change(device):
    weight = torch.randn(4, 6, device=device, requires_grad=True)
    torch.randn(3, device=device)
    for matmul, rows, ratio in itertools.product(MATMULS, [0, 1, 2, 50], [0.01, 0.5, 1.0]):
        x = torch.randn(rows, 6, device=device)
        before, count = states(), drawn()
        LF.randomized_linear(x, weight, matmul=matmul, proj_dim_ratio=ratio).sum().backward()
        assert torch.equal(states(), before)
        # One seed where rows are compressed, none where all are kept.
        kept = max(1, int(ratio * rows + 0.5))
        assert drawn() - count == (kept < rows), (rows, ratio)
        lomem.nn.RandomizedLinear(6, 4, proj_dim=3, device="meta")
        assert torch.equal(states(), before)


@matmuls
def test_nothing_is_drawn_or_kept_where_the_weight_needs_no_gradient(matmul, device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim_ratio=0.2, matmul=matmul, device=device)
    x = torch.randn(20, 6, device=device, requires_grad=True)
    before, count = states(), drawn()
    with saved_for_backward() as saved:
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x)
    assert saved.tensors == 0
    # Frozen: the weight alone is kept, for the input's gradient, and nothing for a frozen input.
    layer.weight.requires_grad_(False)
    with saved_for_backward() as saved:
        layer(x).sum().backward()
        layer(x.detach()).sum().backward()
    assert {s._cdata for s in saved.storages} == {layer.weight.untyped_storage()._cdata}
    assert torch.equal(x.grad, layer.weight.sum(0).expand_as(x))
    # Evaluation: torch's layer, with an exact gradient.
    layer.weight.requires_grad_(True)
    layer.eval()
    with saved_for_backward() as saved:
        y = layer(x)
    assert saved.nbytes == (x.numel() + layer.weight.numel()) * 4
    (got,) = torch.autograd.grad(y.sum(), layer.weight)
    torch.testing.assert_close(got, x.detach().sum(0).expand(4, 6))
    assert torch.equal(states(), before)
    assert drawn() == count


def gradient(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]


@matmuls
def test_results_follow_from_the_seeds(matmul, device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim_ratio=0.2, matmul=matmul, device=device)
    x = torch.randn(50, 6, device=device)

    def with_seeds(torchs, lomems):
        torch.manual_seed(torchs)
        lomem.random.manual_seed(lomems)
        return gradient(layer, x)

    first = with_seeds(1, 1)
    assert torch.equal(first, with_seeds(1, 1))
    # Either makes others: ranks that are seeded differently draw differently.
    for seeds in ((1, 2), (2, 1), (1 + 2**32, 1), (1, -1)):
        assert not torch.equal(first, with_seeds(*seeds)), seeds
    assert torch.equal(with_seeds(1, -1), with_seeds(1, 2**64 - 1))
    # Where torch's generator stands is nothing to a stream that began.
    torch.manual_seed(1)
    torch.randn(5)
    lomem.random.manual_seed(1)
    assert torch.equal(first, gradient(layer, x))
    # And a state goes on.
    state = lomem.random.get_state()
    after = gradient(layer, x)
    assert not torch.equal(after, first)
    lomem.random.set_state(pickle.loads(pickle.dumps(state)))
    assert torch.equal(after, gradient(layer, x))


def test_a_seed_of_the_callers(device):
    x, weight = torch.randn(9, 6, device=device), torch.randn(4, 6, device=device, requires_grad=True)
    for matmul in MATMULS:
        for number in (0, 7, -(2**63), 2**63 - 1):
            count = drawn()
            seed = torch.tensor(number, device=device)
            y = LF.randomized_linear(x, weight, matmul=matmul, proj_dim=3, seed=seed)
            seed.add_(1)  # which is no longer looked at
            grad = torch.randn_like(y)
            (got,) = torch.autograd.grad(y, weight, grad)
            assert torch.equal(got, estimate(x, grad, number, 3, matmul))
            assert drawn() == count


def convert(model):
    return lomem.map_module(model, lambda m: lomem.convert_linear(m, lomem.nn.RandomizedLinear, proj_dim_ratio=0.3))


BUILDS = {
    "built": lambda: nn.Sequential(
        lomem.nn.RandomizedLinear(6, 6, proj_dim=3), nn.Tanh(), lomem.nn.RandomizedLinear(6, 6, proj_dim=3)
    ),
    "converted": lambda: convert(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))),
    "copied": lambda: nn.Sequential(*map(copy.deepcopy, [lomem.nn.RandomizedLinear(6, 6, proj_dim=3)] * 3)),
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_program_trains_the_same_model(build, dropout):
    """Seeded, built and trained: the same again in one process, whatever ran in between."""

    def train(seed=3):
        torch.manual_seed(seed)
        model = BUILDS[build]()
        x = torch.randn(20, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            F.dropout(model(x), dropout).square().sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = train()
    assert torch.equal(train(), first)
    lomem.nn.RandomizedLinear(6, 6, proj_dim=3)
    lomem.random.manual_seed(1)
    assert torch.equal(train(), first)
    assert not torch.equal(train(4), first)


def test_the_same_program_in_another_process():
    code = (
        "import torch, lomem; torch.manual_seed({}); layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3);"
        "torch.manual_seed({}); x = torch.ones(9, 6) * torch.arange(9)[:, None];"
        "[layer(x).sum().backward() for _ in range(2)];"
        "print(layer.weight.grad.flatten().tolist())"
    )
    ran = [
        subprocess.run([sys.executable, "-c", code.format(*seeds)], check=True, capture_output=True, text=True).stdout
        for seeds in ((0, 0), (0, 0), (0, 1))
    ]
    assert ran[0] == ran[1]
    # Ranks that build alike and go on with seeds of their own.
    assert ran[0] != ran[2]


class Recorder(TorchDispatchMode):
    """What randomized layers compressed, and what they estimated gradients from."""

    def __init__(self):
        super().__init__()
        self.forwards, self.estimates = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is ops.randomized_linear_forward.default:
            self.forwards.append((args[0].detach().clone(), args[4], result))
        elif func is ops.randomized_linear_weight_grad.default:
            self.estimates.append((args, result))
        return result


def test_no_two_calls_share_a_seed(device):
    model = nn.Sequential(*[lomem.nn.RandomizedLinear(6, 6, proj_dim=3, device=device) for _ in range(3)])
    model.append(copy.deepcopy(model[0])).append(pickle.loads(pickle.dumps(model[0]))).append(model[0])
    with Recorder() as recorder:
        for _ in range(200):
            model(torch.randn(9, 6, device=device))
            LF.randomized_linear(torch.randn(9, 6, device=device), model[0].weight, proj_dim=3)
    seeds = torch.stack([result[3] for *_, result in recorder.forwards])
    assert len(seeds) == 200 * 7 == len(seeds.unique())
    # Bits of seeds that follow one another are as good as independent.
    bits = (seeds.cpu()[:, None] >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(seeds))
    changed = (bits[1:] ^ bits[:-1]).double()
    assert (changed.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(changed))


@matmuls
def test_the_number_of_threads_does_not_matter(matmul):
    before = torch.get_num_threads()
    x = torch.randn(5000, 37)
    eye = torch.eye(3000)
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            seed = torch.tensor(11)
            # S itself; and the rows that are picked, or their transforms.
            results.append(
                [
                    *compress(eye, seed, 1000, matmul),
                    *(compress(x, seed, 1000, matmul) if matmul[0] in "dcw" else ()),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


class Net(nn.Module):
    def __init__(self, matmul="gaussian", device=None):
        super().__init__()
        self.up = lomem.nn.RandomizedLinear(6, 8, proj_dim_ratio=0.4, matmul=matmul, device=device)
        self.down = lomem.nn.RandomizedLinear(8, 6, proj_dim_min=2, proj_dim_ratio=0.2, matmul=matmul, device=device)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def gradients(net, f, x):
    lomem.random.manual_seed(5)
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(leaf).square().sum(), [leaf, *net.parameters()])


# --- Checkpointing ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two layers, and dropouts in front of them or behind them, whose masks are seen."""

    def __init__(self, matmul, dropouts, linear):
        super().__init__()
        kinds = {"plain": nn.Linear, "randomized": partial(lomem.nn.RandomizedLinear, proj_dim=3, matmul=matmul)}
        self.up, self.down = kinds[linear](6, 8), kinds[linear](8, 6, bias=False)
        self.dropouts = dropouts
        self.masks = []

    def dropout(self, x, where):
        if where not in self.dropouts:
            return x
        y = F.dropout(x, 0.5)
        self.masks.append((y != 0).detach().clone())
        return y

    def forward(self, x):
        x = self.up(self.dropout(x, "front"))
        return self.down(torch.tanh(self.dropout(x, "behind")))


def selective(policy):
    def way(block, x):
        contexts = partial(create_selective_checkpoint_contexts, lambda _, op, *args, **kwargs: policy(op))
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    return way


KEEP, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
OURS = ops.randomized_linear_forward.default
# Of which inputs are the results.
MAKE_INPUTS = [torch.ops.aten.mul.Tensor, torch.ops.aten.tanh.default]


def checkpointed(use_reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)


def nested(outer, inner):
    def way(block, x):
        return checkpoint(lambda x: torch.sin(checkpointed(inner)(block, x)), x, use_reentrant=outer)

    return way


def in_hooks(way):
    def hooked(block, x):
        with torch.autograd.graph.save_on_cpu():
            return way(block, x)

    return hooked


WAYS = {
    "none": lambda block, x: block(x),
    "reentrant": checkpointed(True),
    "non-reentrant": checkpointed(False),
    "reentrant in reentrant": nested(True, True),
    "non-reentrant in non-reentrant": nested(False, False),
    "non-reentrant in reentrant": nested(True, False),
    "non-reentrant in hooks": in_hooks(checkpointed(False)),
    "ours kept": selective(lambda op: KEEP if op is OURS else AGAIN),
    "inputs kept": selective(lambda op: KEEP if op in MAKE_INPUTS else AGAIN),
    "ours and inputs kept": selective(lambda op: KEEP if op in (OURS, *MAKE_INPUTS) else AGAIN),
    "none kept": selective(lambda op: AGAIN),
}


def run_block(block, way, x):
    """Output, gradients, masks, and where the generators stand, from a given state of them."""
    torch.manual_seed(7)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = way(block, leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad, block.up.bias.grad, block.masks, states()


@matmuls
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropouts", [(), ("front",), ("behind",), ("front", "behind")], ids=str)
@pytest.mark.parametrize("shape", ["3-D", "permuted"])
def test_checkpointing(matmul, way, dropouts, shape):
    """All but the weights' gradients is as of torch's layers, and these are estimated from what belongs together."""
    plain, block = Block(matmul, dropouts, "plain"), Block(matmul, dropouts, "randomized")
    block.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 6) if shape == "3-D" else torch.randn(5, 3, 6).transpose(0, 1)
    want = run_block(plain, WAYS[way], x)
    with Recorder() as recorder:
        got = run_block(block, WAYS[way], x)
    assert len(got[3]) == len(want[3])
    for a, b in zip([*got[:3], *got[3], got[4]], [*want[:3], *want[3], want[4]], strict=True):
        assert torch.equal(a, b)
    # The first pass and what is computed again have the same masks.
    assert all(torch.equal(mask, got[3][i % len(dropouts)]) for i, mask in enumerate(got[3]))
    # What gradients come from was compressed by the seed beside it; and of the input that the exact gradient is of.
    assert len(recorder.estimates) == 2
    for layer, (args, result) in zip((block.down, block.up), recorder.estimates, strict=True):
        _, compressed, indices, seed = args
        made = [f for f in recorder.forwards if torch.equal(f[2][3], seed)]
        assert made
        for rows, proj_dim, _ in made:
            again, picked = compress(rows, seed, proj_dim, matmul)
            assert torch.equal(again, compressed)
            assert indices is None or torch.equal(picked, indices)
        assert torch.equal(layer.weight.grad, result)


def test_accumulated_gradients_are_of_seeds_of_their_own(device):
    x = torch.randn(3, 5, 6, device=device)
    for way in ("none", "reentrant", "non-reentrant", "ours kept"):
        layer = lomem.nn.RandomizedLinear(6, 6, proj_dim=3, device=device)
        seen = []
        for _ in range(3):
            layer.weight.grad = None
            WAYS[way](layer, x.clone().requires_grad_()).square().sum().backward()
            seen.append(layer.weight.grad)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2)), way


# --- What is kept -----------------------------------------------------------------------------------------------------


@matmuls
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50,), (10, 5), (2, 5, 5)])
def test_what_is_kept_is_proj_dim_rows_and_a_seed(matmul, dtype, shape, device):
    layer = lomem.nn.RandomizedLinear(12, 7, proj_dim_ratio=0.2, matmul=matmul, device=device, dtype=dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    rows = 10 * 12 * size + INDEX_BYTES * 10 * (matmul in PICKS)
    for x in (
        torch.randn(*shape, 12, device=device).to(dtype),
        torch.randn(12, *shape, device=device).to(dtype).movedim(0, -1),
    ):
        with saved_for_backward(layer.parameters()) as saved:
            layer(x)
        assert saved.nbytes == rows + SEED_BYTES
        assert saved.tensors == 2 + (matmul in PICKS)
        assert x.untyped_storage()._cdata not in {s._cdata for s in saved.storages}
        with saved_for_backward() as saved:
            layer(x.clone().requires_grad_())
        # For the input's gradient, the weight.
        assert saved.nbytes == rows + SEED_BYTES + 12 * 7 * size


def test_the_seed_is_a_number_on_the_device(device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=2, device=device)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        layer(torch.randn(5, 6, device=device)).sum().backward()
    assert [t.shape for t in seen] == [(2, 6), ()]
    assert (seen[1].dtype, seen[1].device.type) == (torch.int64, device.type)


def halves(x, grad, seed, k, matmul):
    """Both halves as a device other than the CPU runs them: their kernels themselves, whatever the tensors are."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    weight = x.new_empty(grad.shape[1], x.shape[1])
    _, compressed, indices, used = OURS.redispatch(keys, x, weight, None, seed, k, matmul=matmul)
    weight_grad = ops.randomized_linear_weight_grad.default
    estimated = weight_grad.redispatch(keys, grad, compressed, indices, used, matmul=matmul)
    return compressed, indices, used, estimated


@matmuls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_devices_compute_the_same_and_read_no_seed(matmul, dtype):
    """What a GPU would run, recorded on tensors without values, then run here: with seeds that a replay changes."""
    rows, k = 50, 20
    with FakeTensorMode():
        x, grad = torch.empty(rows, 6, dtype=dtype, device="cuda"), torch.empty(rows, 4, dtype=dtype, device="cuda")
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        with pytest.raises(DataDependentOutputException):
            seed.item()
        graph = make_fx(partial(halves, k=k, matmul=matmul))(x, grad, seed)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    graph.recompile()
    # No op that waits for the device, or copies to it.
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not names & {
        f"aten.{op}.default" for op in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")
    }
    x, grad = (torch.randn(rows, width).to(dtype) for width in (6, 4))
    for number in (0, -1, 2**62 + 12345):
        seed = torch.tensor(number)
        *got, got_estimate = graph(x, grad, seed)
        *want, want_estimate = halves(x, grad, seed, k, matmul)
        assert torch.equal(want[2], seed)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(got_estimate, want_estimate)


def test_hooks_that_move_what_is_kept(device):
    net = Net(device=device)
    x = torch.randn(9, 6, device=device)
    want = gradients(net, net, x)
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, gradients(net, net, x), want))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert all(map(torch.equal, gradients(net, net, x), want))


def test_changes_of_the_input_in_place_do_not_matter(device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, device=device)
    x = torch.randn(9, 6, device=device)
    want = gradients(layer, layer, x)

    def changed(x):
        h = x.clone()
        y = layer(h)
        h.zero_()
        return y

    assert all(map(torch.equal, gradients(layer, changed, x), want))


# --- Transforms of torch ----------------------------------------------------------------------------------------------


@matmuls
def test_second_derivatives(matmul, device):
    """Those of the input's gradient are exact; of the weight's, which knows of no input, refused."""
    x = torch.randn(9, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)

    def penalty(linear):
        (grad,) = torch.autograd.grad(linear(x, weight).tanh().sum(), x, create_graph=True)
        return grad.square().sum()

    def randomized(x, weight):
        return LF.randomized_linear(x, weight, matmul=matmul, proj_dim=3)

    (got,) = torch.autograd.grad(penalty(randomized), x)
    (want,) = torch.autograd.grad(penalty(F.linear), x)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(randomized(x, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for lomem::randomized_linear_weight_grad is not implemented"):
        grad.sum().backward()
    # Nor have the halves derivatives.
    compressed, _ = compress(x, 0, 3, matmul)
    with pytest.raises(RuntimeError, match="derivative for lomem::randomized_linear_forward is not implemented"):
        compressed.sum().backward()


def test_forward_mode_and_functorch(device):
    x, weight = torch.randn(9, 6, device=device), torch.randn(4, 6, device=device)

    def op(x, weight):
        return LF.randomized_linear(x, weight, proj_dim=3)

    # Where nothing is estimated, they are F.linear's.
    torch.testing.assert_close(torch.func.jvp(op, (x, weight), (x, weight))[1], 2 * F.linear(x, weight))
    got = torch.func.grad(lambda x: op(x, weight).sum())(x)
    torch.testing.assert_close(got, weight.sum(0).expand_as(x))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda weight: op(x, weight).sum())(weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        match = "lomem::randomized_linear: input has a forward-mode tangent"
        with pytest.raises(NotImplementedError, match=match):
            op(dual, weight.clone().requires_grad_())
        match = "lomem::randomized_linear: weight has a forward-mode tangent"
        with pytest.raises(NotImplementedError, match=match):
            op(x, forward_ad.make_dual(weight.clone().requires_grad_(), weight))


@matmuls
def test_compiled_as_one_graph(matmul, device):
    net = Net(matmul, device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 5, 9, 20):
        x = torch.randn(2, rows, 6, device=device)
        for got, want in zip(gradients(net, compiled, x), gradients(net, net, x), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_passes_use_the_same_numbers(dynamic, device):
    # Of one row, the estimate by signs is exact whatever the seeds are, if both passes have the same.
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul="rademacher", device=device)

    def f(x):
        return torch.relu(layer(x)).sum(1)[2]

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for rows in (5, 7, 12):
        x = torch.zeros(rows, 6, device=device)
        x[2] = torch.randn(6, device=device)
        for _ in range(3):
            (got,) = torch.autograd.grad(compiled(x), layer.weight)
            for module in (layer.train(), layer.eval()):
                module(x)
            (want,) = torch.autograd.grad(f(x), layer.weight)
            layer.train()
            torch.testing.assert_close(got, want)


def test_compiled_with_sizes_that_depend_on_data(device):
    weight = torch.randn(4, 6, device=device, requires_grad=True)

    def f(x, mask, weight):
        return LF.randomized_linear(x[mask], weight, proj_dim_ratio=0.5, matmul="rademacher").sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for count in (5, 2, 8):
            x = torch.randn(8, 6, device=device)
            mask = torch.arange(8, device=device) < count
            lomem.random.manual_seed(0)
            (got,) = torch.autograd.grad(compiled(x, mask, weight), weight)
            lomem.random.manual_seed(0)
            (want,) = torch.autograd.grad(f(x, mask, weight), weight)
            torch.testing.assert_close(got, want)


def test_compiled_autograd(device):
    net = Net(device=device)
    x = torch.randn(9, 6, device=device)
    want = gradients(net, net, x)

    def step(x):
        for parameter in net.parameters():
            parameter.grad = None
        net(x).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    with torch._dynamo.config.patch(compiled_autograd=True):
        lomem.random.manual_seed(5)
        got = torch.compile(step, backend="aot_eager")(x)
    for a, b in zip(got, want[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("way", ["none", "non-reentrant", "ours kept", "inputs kept", "none kept"])
def test_compiled_checkpoints_use_the_same_numbers(way, backend, device):
    # As above: exact, if what is computed again in the backward pass and what is not belong together.
    torch._dynamo.reset()
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul="rademacher", device=device)

    def f(x):
        return WAYS[way](lambda x: torch.relu(layer(torch.tanh(x))), x).sum(1)[2]

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    x = torch.zeros(9, 6, device=device)
    x[2] = torch.randn(6, device=device)
    for _ in range(3):
        before = states()
        (got,) = torch.autograd.grad(compiled(x.requires_grad_()), layer.weight)
        assert torch.equal(states(), before)
        rows = torch.tanh(x.detach())
        (want,) = torch.autograd.grad(torch.relu(F.linear(rows, layer.weight, layer.bias)).sum(1)[2], layer.weight)
        torch.testing.assert_close(got, want)


@matmuls
@pytest.mark.parametrize("how", ["make_fx", "aot_eager", "inductor", "export"])
def test_replays_draw_anew(matmul, how, device):
    torch._dynamo.reset()  # which compiles one code for so many layers alone
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul=matmul, device=device)
    x = torch.randn(9, 6, device=device)
    if how == "make_fx":
        traced = make_fx(partial(gradient, layer))(x)
        replay = partial(traced, x)
    elif how == "export":
        replay = partial(gradient, torch.export.export(layer, (x,)).module(), x)
    else:
        compiled = torch.compile(layer, fullgraph=True, backend=how)
        replay = partial(gradient, compiled, x)
    before = states()
    lomem.random.manual_seed(1)
    seen = [replay() for _ in range(4)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert torch.equal(states(), before)
    # The seeds that the layer itself draws.
    lomem.random.manual_seed(1)
    for got in seen:
        torch.testing.assert_close(got, gradient(layer, x))


@pytest.mark.parametrize("training", [True, False])
def test_export(training, device):
    net = Net(device=device).train(training)
    x = torch.randn(9, 6, device=device)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    names = [str(node.target) for node in program.graph.nodes if "linear" in str(node.target)]
    assert names == (["lomem.randomized_linear.default"] if training else ["aten.linear.default"]) * 2
    other = torch.randn(7, 6, device=device)
    torch.testing.assert_close(program.module()(other), net(other))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(other), net(other))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_symbolic_trace_vmap_and_subclasses(device):
    class Marked(torch.Tensor):
        pass

    weight = torch.randn(4, 6, device=device)

    def op(x):
        return LF.randomized_linear(x, weight, proj_dim=3)

    x = torch.randn(3, 9, 6, device=device)
    assert torch.equal(torch.fx.symbolic_trace(op)(x), op(x))
    torch.testing.assert_close(torch.func.vmap(op)(x), op(x))
    assert type(op(x.as_subclass(Marked))) is Marked


# --- The module -------------------------------------------------------------------------------------------------------


def test_the_module_is_a_linear_layer(device):
    torch.manual_seed(1)
    plain = nn.Linear(6, 4, device=device)
    torch.manual_seed(1)
    layer = lomem.nn.RandomizedLinear(6, 4, True, device, proj_dim_ratio=0.3)
    assert isinstance(layer, nn.Linear)
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    layer.weight.data.normal_()
    plain.load_state_dict(layer.state_dict())
    other = lomem.nn.RandomizedLinear(6, 4, device=device, proj_dim=9, matmul="dct")
    other.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, device=device)
    assert torch.equal(other(x), layer(x))
    assert (
        repr(layer)
        == "RandomizedLinear(in_features=6, out_features=4, bias=True, matmul='gaussian', proj_dim_ratio=0.3)"
    )
    no_bias = lomem.nn.RandomizedLinear(6, 4, bias=False, proj_dim=3, proj_dim_min=1, proj_dim_max=5, matmul="crs")
    assert no_bias.bias is None
    assert repr(no_bias).endswith("bias=False, matmul='crs', proj_dim=3, proj_dim_min=1, proj_dim_max=5)")


def test_copies(device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim_ratio=0.3, proj_dim_max=7, matmul="dft", device=device)
    x = torch.randn(20, 6, device=device)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert repr(other) == repr(layer)
        assert all(map(torch.equal, gradients(other, other, x), gradients(layer, layer, x)))


def test_training_makes_progress(device):
    x, target = torch.randn(200, 10, device=device), torch.randn(10, 3, device=device)
    for matmul in MATMULS:
        layer = lomem.nn.RandomizedLinear(10, 3, proj_dim_ratio=0.2, matmul=matmul, device=device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        losses = []
        for _ in range(300):
            loss = (layer(x) - x @ target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 1e-2 * losses[0], matmul


# --- Errors -----------------------------------------------------------------------------------------------------------

SIZES = {
    "proj_dim and proj_dim_ratio are both missing, expected one of them": {},
    "proj_dim and proj_dim_ratio are both given, expected one of them": {"proj_dim": 3, "proj_dim_ratio": 0.1},
    "proj_dim is 0, expected at least 1": {"proj_dim": 0},
    "proj_dim is -3, expected at least 1": {"proj_dim": -3},
    "proj_dim_ratio is 0, expected a number in (0, 1]": {"proj_dim_ratio": 0.0},
    "proj_dim_ratio is 1.5, expected a number in (0, 1]": {"proj_dim_ratio": 1.5},
    "proj_dim_ratio is -0.1, expected a number in (0, 1]": {"proj_dim_ratio": -0.1},
    "proj_dim_ratio is nan, expected a number in (0, 1]": {"proj_dim_ratio": math.nan},
    "proj_dim_min is 0, expected at least 1": {"proj_dim_ratio": 0.1, "proj_dim_min": 0},
    "proj_dim_max is -1, expected at least 1": {"proj_dim_ratio": 0.1, "proj_dim_max": -1},
    "proj_dim_min is 5, expected at most proj_dim_max, 4": {
        "proj_dim_ratio": 0.1,
        "proj_dim_min": 5,
        "proj_dim_max": 4,
    },
    "matmul is 'normal', expected 'gaussian', 'rademacher', 'dct', 'dft', 'crs' or 'wta-crs'": {
        "proj_dim": 3,
        "matmul": "normal",
    },
}


def raises(message, kinds=(RuntimeError, ValueError)):
    return pytest.raises(kinds, match="^" + re.escape(f"lomem::{message}"))


@pytest.mark.parametrize("message", SIZES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_of_sizes(message, requires_grad):
    x, weight = torch.ones(5, 6), torch.ones(4, 6, requires_grad=requires_grad)
    with raises(f"randomized_linear: {message}", ValueError):
        LF.randomized_linear(x, weight, **SIZES[message])
    with raises(f"randomized_linear: {message}", ValueError):
        lomem.nn.RandomizedLinear(6, 4, **SIZES[message])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors_of_tensors(requires_grad):
    x, weight, bias = torch.ones(5, 6), torch.ones(4, 6), torch.ones(4)

    def call(x=x, weight=weight, bias=bias):
        weight = weight.detach().requires_grad_(requires_grad and weight.is_floating_point())
        return LF.randomized_linear(x, weight, bias, proj_dim=3)

    floats = "expected float64, float32, bfloat16 or float16"
    for arguments, message in [
        ({"x": x.int()}, f"input has dtype int32, {floats}"),
        ({"weight": weight.int()}, f"weight has dtype int32, {floats}"),
        ({"weight": weight.double()}, "weight has dtype float64, expected float32, the dtype of input"),
        ({"bias": bias.half()}, "bias has dtype float16, expected float32, the dtype of input"),
        ({"weight": weight[0]}, "weight has shape [6], expected (out_features, in_features)"),
        ({"x": x[:, 1:]}, "input has shape [5, 5], expected a last dimension of 6, the in_features of weight"),
        ({"x": x[0, 0]}, "input has shape [], expected a last dimension of 6, the in_features of weight"),
        ({"bias": bias[1:]}, "bias has shape [3], expected [4], the out_features of weight"),
        ({"bias": bias[:, None]}, "bias has shape [4, 1], expected [4], the out_features of weight"),
        ({"weight": weight.to("meta")}, "weight is on meta, expected cpu, the device of input"),
        ({"bias": bias.to("meta")}, "bias is on meta, expected cpu, the device of input"),
        ({"x": torch.eye(6).to_sparse()}, "input has layout Sparse, expected a dense (torch.strided) tensor"),
    ]:
        with raises(f"randomized_linear: {message}"):
            call(**arguments)


def test_errors_of_the_halves():
    x, grad, seed = torch.ones(9, 6), torch.ones(9, 4), torch.tensor(1)
    weight_grad = ops.randomized_linear_weight_grad
    for device in ("cpu", "meta"):
        moved = x.to(device)
        for number in (0, -5):
            with raises(f"randomized_linear_forward: proj_dim is {number}, expected at least 1", ValueError):
                compress(moved, seed, number, "dct")
        with raises("randomized_linear_forward: seed is of dtype float32 and shape [], expected int64 and []"):
            compress(moved, torch.tensor(1.0), 3, "dct")
        with raises("randomized_linear_forward: seed is of dtype int64 and shape [2], expected int64 and []"):
            compress(moved, torch.tensor([1, 2]), 3, "dct")
        with raises("randomized_linear_forward: matmul is '', expected 'gaussian', "):
            compress(moved, seed, 3, "")
    with raises("randomized_linear_forward: seed is on meta, expected cpu, the device of input"):
        ops.randomized_linear_forward(x, x, None, seed.to("meta"), 3)
    with raises("randomized_linear: seed is on meta, expected cpu, the device of input"):
        LF.randomized_linear(x, x, proj_dim=3, seed=seed.to("meta"))
    with raises("randomized_linear: seed is of dtype int32 and shape [], expected int64 and []"):
        LF.randomized_linear(x, x, proj_dim=3, seed=seed.int())
    with raises("randomized_linear_forward: input has shape [9, 6], expected a last dimension of 5, "):
        ops.randomized_linear_forward(x, x[:, 1:], None, seed, 3)
    compressed, indices = compress(x, seed, 3, "crs")
    for arguments, message in [
        (
            (grad[:2], compressed, indices, seed),
            "compressed has 3 rows, expected 1 to 2, the number of rows of grad_output",
        ),
        (
            (grad, compressed[:0], indices[:0], seed),
            "compressed has 0 rows, expected 1 to 9, the number of rows of grad_output",
        ),
        ((grad, compressed[0], indices, seed), "compressed has shape [6], expected (proj_dim, in_features)"),
        (
            (grad, compressed.double(), indices, seed),
            "compressed has dtype float64, expected float32, the dtype of grad",
        ),
        ((grad, compressed, None, seed), "indices is missing, expected the indices of the rows of compressed"),
        ((grad, compressed, indices[:2], seed), "indices has shape [2], expected [3]"),
        ((grad, compressed, indices.int(), seed), "indices has dtype int32, expected int64"),
        ((grad, compressed, indices, seed[None]), "seed is of dtype int64 and shape [1], expected int64 and []"),
        ((grad, compressed, indices, seed.to("meta")), "seed is on meta, expected cpu, the device of grad_output"),
        (
            (grad, compressed.to("meta"), indices, seed),
            "compressed is on meta, expected cpu, the device of grad_output",
        ),
        ((grad[0, 0], compressed, indices, seed), "grad_output has no dimensions, expected at least 1"),
    ]:
        with raises(f"randomized_linear_weight_grad: {message}"):
            weight_grad(*arguments, matmul="crs")
    with pytest.raises((RuntimeError, IndexError), match="index"):
        weight_grad(grad, compressed, indices + 9, seed, matmul="crs")


def test_dtypes_of_shapes(device):
    meta = torch.empty(9, 6, dtype=torch.bfloat16, device="meta")
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, matmul="crs", device="meta", dtype=torch.bfloat16)
    y = layer(meta)
    assert (y.shape, y.dtype) == ((9, 4), torch.bfloat16)
    y.sum().backward()
    assert (layer.weight.grad.shape, layer.weight.grad.dtype) == ((4, 6), torch.bfloat16)
