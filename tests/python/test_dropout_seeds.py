"""Dropout that saves a seed: the mask is that of the reference, and statistically one of independent elements."""

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, make_input
from lomem import reference
from lomem.memory import saved_for_backward
from torch import nn
from torch.utils.checkpoint import checkpoint

LF = lomem.functional
ops = torch.ops.lomem
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)
PROBABILITIES = (0.05, 0.1, 0.3, 0.5, 0.9)


def seed_on(device, number=0x123456789ABCDEF):
    return torch.tensor(number, device=device)


def kept_by(seed, p, n, device="cpu"):
    """Which of n elements are kept, by the kernels: 1-D bool."""
    return ops.seeded_dropout_apply(torch.ones(n, device=device), seed.to(device), p) != 0


def same(a, b):
    """Equal values, of which zeros have the same sign; NaN equals NaN."""
    signs = (torch.signbit(a) == torch.signbit(b)) | a.isnan()
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and bool(((a == b) & signs | a.isnan()).all())


# The mask.


def test_known_answers():
    """The first words of counters 0, and of the key of Random123's third vector, whose counter is another."""
    assert reference.philox_words(0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.philox_words(0, 4, rounds=7).tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        assert reference.philox_words(seed, 11).tolist() == reference.philox_words(seed, 40)[:11].tolist()


@of_dtypes
@of_layouts
def test_is_the_reference(layout, dtype, device):
    for number, p in zip((0, 1, -1, 2**40 + 3, -(2**63)), PROBABILITIES, strict=True):
        x = make_input(layout, dtype, device)
        seed = seed_on(device, number)
        got = ops.seeded_dropout_apply(x, seed, p)
        assert got.is_contiguous()
        assert same(got, reference.seeded_dropout_apply(x, seed, p))


@of_dtypes
def test_sizes_and_special_values(dtype, device):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e4], device=device)
    for n in (*range(1, 140), 2047, 2048, 2049, 70001):
        x = values.repeat(n // 9 + 1)[:n].to(dtype)
        seed = seed_on(device, n)
        assert same(ops.seeded_dropout_apply(x, seed, 0.4), reference.seeded_dropout_apply(x, seed, 0.4))


@pytest.mark.cpu_kernels
def test_threads():
    before = torch.get_num_threads()
    x = torch.randn(200_003)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.seeded_dropout_apply(x, seed_on("cpu"), 0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@of_dtypes
@of_layouts
def test_forward(layout, dtype, device):
    x = make_input(layout, dtype, device)
    for p in (0.2, 0.7):
        output, seed = ops.seeded_dropout_forward(x, p)
        assert (seed.dtype, seed.shape) == (torch.int64, ())
        assert output.stride() == F.dropout(x, p).stride() if x.numel() else True
        assert same(output, ops.seeded_dropout_apply(x, seed, p))
    leaf = x.detach().requires_grad_()
    y = LF.dropout(leaf, 0.3, saves="seed")
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert torch.equal(grad == 0, y == 0)
    with torch.no_grad():
        assert LF.dropout(leaf, 0.3, saves="seed").shape == x.shape


def test_seeds_are_drawn_from_the_generator_of_torch(device):
    x = torch.ones(1000, device=device)

    def run(f=lambda: LF.dropout(x, 0.5, saves="seed")):
        torch.manual_seed(7)
        return torch.stack([f() for _ in range(3)])

    want = run()
    assert len({tuple(row.tolist()) for row in want}) == 3
    assert torch.equal(run(), want)
    module = lomem.nn.Dropout(0.5, saves="seed")
    assert torch.equal(run(lambda: module(x)), want)
    with torch.no_grad():
        assert torch.equal(run(), want)
    assert isinstance(module, nn.Dropout)
    assert repr(module) == "Dropout(p=0.5, saves='seed')"
    assert module.eval()(x) is x
    # The same numbers, whatever the size.
    torch.manual_seed(7)
    small = LF.dropout(x[:5], 0.5, saves="seed")
    assert torch.equal(small, want[0, :5])


# Statistics. A count of n independent events of probability q is 6 standard deviations away from q n with a probability
# of 2e-9 (of a normal distribution, on both sides). There are about 250 such comparisons on a device, all of which
# together fail with a probability of less than 1e-6. The seeds are fixed, so that a test that passes passes again.
DEVIATIONS = 6


def assert_frequency(events, q):
    n = events.numel()
    deviation = (n * q * (1 - q)) ** 0.5
    assert abs(int(events.sum()) - n * q) < DEVIATIONS * deviation + 1, (int(events.sum()), n * q, deviation)


def test_rates(device):
    for number in (0, 1, -5, 2**50):
        for p in (*PROBABILITIES, 0.001, 0.999):
            assert_frequency(kept_by(torch.tensor(number), p, 2**18, device), 1 - p)


def test_neighbors_are_independent(device):
    """Both kept, at every small distance, and within and between blocks of four."""
    for p in (0.1, 0.5):
        kept = kept_by(torch.tensor(12345), p, 2**18, device)
        for distance in (1, 2, 3, 4, 5, 8, 16, 64, 1024):
            assert_frequency((kept[distance:] & kept[:-distance])[:: distance + 1], (1 - p) ** 2)
        for first in range(4):
            for second in range(first):
                assert_frequency(kept[first::4] & kept[second::4], (1 - p) ** 2)


def test_seeds_are_independent(device):
    """Of neighboring seeds, and of seeds that are drawn."""
    p = 0.3
    drawn = [ops.seeded_dropout_forward(torch.ones(1, device=device), p)[1].cpu() for _ in range(6)]
    for seeds in (drawn, [torch.tensor(number) for number in (0, 1, 2, -1, 2**32, 2**32 + 1)]):
        masks = [kept_by(seed, p, 2**16, device) for seed in seeds]
        for i, first in enumerate(masks):
            for second in masks[:i]:
                assert_frequency(first & second, (1 - p) ** 2)
    # One element, of many seeds.
    kept = torch.stack([kept_by(torch.tensor(number), p, 8, device) for number in range(3000)])
    for column in kept.t():
        assert_frequency(column, 1 - p)


def test_the_mean_is_the_input(device):
    x = torch.full((2**20,), 3.0, device=device)
    for p in (0.1, 0.5, 0.9):
        y = ops.seeded_dropout_apply(x, seed_on(device), p).double()
        # Standard deviation of an element: 3 (p / (1 - p))^(1/2).
        assert abs(y.mean().item() - 3) < DEVIATIONS * 3 * (p / (1 - p)) ** 0.5 / 2**10


# Gradients, and what is saved.


def test_saved_bytes(device):
    for dtype in DTYPES:
        for layout in LAYOUTS:
            x = make_input(layout, dtype, device).requires_grad_()
            with saved_for_backward() as saved:
                LF.dropout(x, 0.1, saves="seed")
            assert (saved.nbytes, saved.tensors) == (8, 1)
    with saved_for_backward() as saved:
        assert LF.dropout(x, 0.0, saves="seed") is x
        ops.dropout(x, 0.0, saves="seed")
    assert saved.tensors == 0


def test_nothing_is_drawn_for_nothing(device):
    def state():
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    before = state()
    x = torch.ones(3, 4, device=device, requires_grad=True)
    ops.dropout(x, 0.0, saves="seed")
    ops.seeded_dropout_forward(x.detach(), 0.0)
    LF.dropout(x[:0], 0.5, saves="seed")
    assert torch.equal(state(), before)
    LF.dropout(x, 0.5, saves="seed")
    assert not torch.equal(state(), before)


def test_gradients_of_gradients(device):
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)

    def f(x):
        torch.manual_seed(3)
        return LF.dropout(x, 0.4, saves="seed") * x

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    assert torch.autograd.gradgradcheck(lambda x: ops.seeded_dropout_apply(x, seed_on(device), 0.4), x)


# Compilation, checkpointing, transforms.


def assert_one_mask(y, grad, x):
    """y is a multiple of x where it is kept, and the gradient of its sum has the same elements dropped."""
    assert torch.equal(y != 0, grad != 0)
    torch.testing.assert_close(y, grad * x)
    assert 0.2 < (y == 0).double().mean() < 0.4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, device):
    x = (torch.rand(30, 40, device=device) + 1).requires_grad_()
    y = checkpoint(lambda x: LF.dropout(x * 2, 0.3, saves="seed"), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert_one_mask(y, x.grad, x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend, device):
    def f(x):
        return LF.dropout(x * 2, 0.3, saves="seed")

    torch._dynamo.reset()  # (Compilations of one function, here of all cases, are limited.)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (30, 50):
        for x in (torch.rand(rows, 40, device=device) + 1, (torch.rand(40, rows, device=device) + 1).t()):
            x.requires_grad_()
            results = []
            for g in (compiled, f):
                torch.manual_seed(2)
                y = g(x)
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert_one_mask(y, grad, x)
                results.append(y)
            torch.testing.assert_close(*results)
            assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_checkpoints_use_the_same_mask(backend, device):
    def f(x):
        return checkpoint(lambda x: LF.dropout(x * 2, 0.3, saves="seed") * 1.0, x, use_reentrant=False)

    x = (torch.rand(30, 40, device=device) + 1).requires_grad_()
    y = torch.compile(f, backend=backend)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_one_mask(y, grad, x)


def test_transforms_are_refused(device):
    x = torch.randn(3, 4, device=device)
    for call in (lambda x: LF.dropout(x, saves="seed"), lambda x: ops.seeded_dropout_forward(x, 0.5)[0]):
        with pytest.raises(NotImplementedError, match=r"^lomem::\w*dropout\w*: got a call inside torch\.func\.vmap"):
            torch.func.vmap(call, randomness="different")(x)
    with pytest.raises(RuntimeError, match=r"functorch transforms|torch\.func"):
        torch.func.grad(lambda x: LF.dropout(x, saves="seed").sum())(x)


def test_errors(device):
    x = torch.ones(4, 8, device=device)
    seed = seed_on(device)
    cases = [
        (lambda: LF.dropout(x, 1.0, saves="seed"), "dropout: p is 1, expected a number in [0, 1)"),
        (lambda: LF.dropout(x, saves="seeds"), "dropout: saves is 'seeds', expected 'mask' or 'seed'"),
        (
            lambda: ops.seeded_dropout_forward(x.int(), 0.5),
            "seeded_dropout_forward: input has dtype int32, expected fl",
        ),
        (lambda: ops.seeded_dropout_apply(x, seed, -1.0), "seeded_dropout_apply: p is -1, expected a number in [0, 1)"),
        (
            lambda: ops.seeded_dropout_apply(x, seed[None], 0.5),
            "seeded_dropout_apply: seed is of dtype int64 and shape [1], expected int64 and []",
        ),
        (
            lambda: ops.seeded_dropout_apply(x, seed.to("meta"), 0.5),
            f"seeded_dropout_apply: seed is on meta, expected {x.device}, the device of input",
        ),
    ]
    for call, message in cases:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            call()
        assert str(raised.value).startswith(f"lomem::{message}")
