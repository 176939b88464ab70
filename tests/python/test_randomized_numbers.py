"""Random numbers and seeds of RandomizedLinear."""

import copy
import itertools
import math
import pickle
import subprocess
import sys

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import EPS
from lomem.memory import saved_for_backward
from randomized_helpers import (
    LF,
    MATMULS,
    Recorder,
    compress,
    estimate,
    gradient,
    matmuls,
    projection,
    signs,
    states,
)
from torch import nn

MASK = 2**64 - 1


def mixed(word):
    """The finalizer of SplitMix64, in Python integers."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word = (word ^ (word >> shift)) * multiplier & MASK
    return word


def words(seed, count):
    """The words that all random numbers are made from."""
    key, step = (mixed(seed + i * 0x9E3779B97F4A7C15 & MASK) for i in (1, 2))
    return [mixed(key + i * (step | 1) & MASK) for i in range(1, count + 1)]


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
    # In float32 the angle, up to pi, is rounded to a few EPS times pi, and the logarithm of numbers next to 1 to EPS,
    # so its root is off by at most sqrt(EPS).
    tolerance = {torch.float64: 1e-12, torch.float32: math.sqrt(2 * EPS[torch.float32])}[dtype]
    torch.testing.assert_close(got, torch.tensor(want[: rows * k], dtype=torch.float64), rtol=0, atol=tolerance)


def test_bits_are_independent(device):
    """Every bit of the words, and every pair of bits in one word or in successive words, for a few seeds."""
    count = 2**16
    for seed in (0, 1, 2**40, -3):
        bits = signs(seed, 2048, 2048, device)[: 64 * count].double().view(count, 64)
        # Each mean and each correlation is over count signs, with standard deviation 1 / sqrt(count). The chance that
        # one of 64 * 64 exceeds 6 standard deviations is 8e-6.
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
    # No two streams share a word, at any position: among 75 * 254 random words of 64 bits, two are equal with a
    # probability of 1e-11.
    seen = (rows[:, : 64 * (rows.shape[1] // 64)].view(-1, 64) > 0).long() << torch.arange(64)
    assert len(seen.sum(1).unique()) == len(seen)


def test_normal_numbers_are_normal(device):
    count = 2**20
    x = projection(1025, 1024, 9, "gaussian", torch.float32, device).double().flatten().cpu()[:count] * 32
    ordered = x.sort().values
    distance = (torch.special.ndtr(ordered) - (torch.arange(count) + 0.5) / count).abs().max()
    # Kolmogorov's test: sqrt(count) times the distance exceeds 3 with a probability of 2 exp(-2 * 3^2), 3e-8.
    assert distance * math.sqrt(count) < 3
    for power, moment, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        assert abs(x.pow(power).mean() - moment) < 5 * math.sqrt((square - moment**2) / count), power
    # The tails.
    for limit in (3.0, 4.0, 4.5):
        expected = count * math.erfc(limit / math.sqrt(2))
        assert abs((x.abs() > limit).sum() - expected) < 5 * math.sqrt(expected), limit
    # The two numbers from one word are uncorrelated, as are their squares and neighbours.
    for a, b in ((x[::2], x[1::2]), (x[1:-1:2], x[2::2])):
        for f in (lambda t: t, lambda t: t.square() - 1):
            assert abs((f(a) * f(b)).mean()) < 5 * f(a).square().mean() / math.sqrt(len(a))


def test_rows_of_equal_norms_are_picked_evenly(device):
    x = torch.ones(50, 1, device=device)
    counts = sum(torch.bincount(compress(x, seed, 40, "crs")[1], minlength=50) for seed in range(1000)).cpu()
    # Chi-square with 49 degrees of freedom, within 5 standard deviations.
    chi = ((counts - 800.0) ** 2 / 800).sum()
    assert abs(chi - 49) < 5 * math.sqrt(2 * 49)


def drawn():
    """Number of seeds drawn since the stream began."""
    return lomem.random.get_state()[1]


def test_others_random_numbers_do_not_change(device):
    weight = torch.randn(4, 6, device=device, requires_grad=True)
    torch.randn(3, device=device)
    for matmul, rows, ratio in itertools.product(MATMULS, [0, 1, 2, 50], [0.01, 0.5, 1.0]):
        x = torch.randn(rows, 6, device=device)
        before, count = states(), drawn()
        LF.randomized_linear(x, weight, matmul=matmul, proj_dim_ratio=ratio).sum().backward()
        assert torch.equal(states(), before)
        # One seed if rows are compressed, none if all are kept.
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
    # Frozen: only the weight is saved, for the input's gradient; nothing if that is not needed either.
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
    # Either seed changes the stream: ranks with different seeds draw different numbers.
    for seeds in ((1, 2), (2, 1), (1 + 2**32, 1), (1, -1)):
        assert not torch.equal(first, with_seeds(*seeds)), seeds
    assert torch.equal(with_seeds(1, -1), with_seeds(1, 2**64 - 1))
    # The position of torch's generator does not affect a stream that has begun.
    torch.manual_seed(1)
    torch.randn(5)
    lomem.random.manual_seed(1)
    assert torch.equal(first, gradient(layer, x))
    # A restored state continues the stream.
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
            seed.add_(1)  # no longer read
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
    """Seeding, building and training twice in one process gives the same model, whatever ran in between."""

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
    # Ranks that build the same model and continue with their own seeds.
    assert ran[0] != ran[2]


def test_no_two_calls_share_a_seed(device):
    model = nn.Sequential(*[lomem.nn.RandomizedLinear(6, 6, proj_dim=3, device=device) for _ in range(3)])
    model.append(copy.deepcopy(model[0])).append(pickle.loads(pickle.dumps(model[0]))).append(model[0])
    with Recorder() as recorder:
        for _ in range(200):
            model(torch.randn(9, 6, device=device))
            LF.randomized_linear(torch.randn(9, 6, device=device), model[0].weight, proj_dim=3)
    seeds = torch.stack([result[3] for *_, result in recorder.forwards])
    assert len(seeds) == 200 * 7 == len(seeds.unique())
    # Bits of successive seeds behave as if independent.
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
            # S itself, and the picked rows or their transforms.
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
