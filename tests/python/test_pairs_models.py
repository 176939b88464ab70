"""Gradients of whole models whose linear layers rebuild their input."""

import functools
import statistics

import lomem
import pytest
import torch
from pair_models import MODELS, NAMES, build_pairs
from zoo import gradient_error

pytestmark = pytest.mark.usefixtures("one_thread")

#: What is converted, and by how much the error of a gradient may grow: the median over the seeds, and any one. What
#: pairs rebuild is what was computed, bit for bit; only derivatives of activations of several ops round differently.
#: Norms round elsewhere than the originals, as often. Chance counts for more there: small models have few numbers.
WHAT = {"pairs": ({"norms": "keep"}, 15, 1.05, 1.5), "norms too": ({}, 9, 1.15, 3.0)}
#: Dtypes of weights and inputs; None for float32 under bfloat16 autocast.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": None}


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is None)


def gradients(model, batch, dtype=torch.float32):
    model.zero_grad(set_to_none=True)
    with autocast(dtype):
        loss = model(**batch).loss
    loss.backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def converted(name, dtype, **options):
    """The plain model, the converted one, its batch and its report."""
    (plain, batch), (model, _) = build_pairs(name, dtype or torch.float32), build_pairs(name, dtype or torch.float32)
    with autocast(dtype):
        try:
            report = lomem.convert(model, batch, bits=16, **options)
        except lomem.conversion.NothingToConvertError:
            report = lomem.convert(model, batch, bits=16, dry_run=True, **options)
    return plain, model, batch, report


def perturb(model, seed):
    """Other weights, the same for every model of a seed. None are 0: norms of zeros have no gradient in float16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.mul_(1 + 0.1 * noise).add_(0.02 * noise * (p == 0))


def error_ratios(name, dtype, options, seeds):
    """For each seed, the gradient's error in the converted model, relative to that in the plain one."""
    plain, model, batch, _ = converted(name, dtype, **options)
    reference, wide = build_pairs(name, torch.float64)
    for seed in range(seeds):
        perturb(plain, seed)
        model.load_state_dict(plain.state_dict())
        reference.load_state_dict(plain.state_dict())
        error = functools.partial(gradient_error, expected=gradients(reference, wide))
        yield error(gradients(model, batch, dtype)) / error(gradients(plain, batch, dtype))


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_whole_models_are_as_accurate(name, dtype, what):
    options, seeds, median, worst = WHAT[what]
    ratios = list(error_ratios(name, DTYPES[dtype], options, seeds))
    assert sorted(ratios)[seeds // 2] <= median
    assert max(ratios) <= worst


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_all_models_round_neither_more_nor_less(dtype):
    """What the error of one model gains by chance, that of another loses."""
    ratios = [ratio for name in NAMES for ratio in error_ratios(name, DTYPES[dtype], {}, 5)]
    assert statistics.median(ratios) <= 1.05
    assert statistics.geometric_mean(ratios) <= 1.05


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_pairs_of_whole_models_are_exact(name):
    plain, model, batch, _ = converted(name, torch.float64, norms="keep")
    # Some modules compute in float32 whatever the dtype; what they round is the same in both models.
    assert gradient_error(gradients(model, batch), gradients(plain, batch)) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_pairs_are_found_in_whole_models(name):
    plain, model, batch, report = converted(name, torch.float32)
    pairs = [d for d in report.converted if d.kind in ("activation", "call") and d.action == "exact"]
    assert len(pairs) == MODELS[name].pairs
    assert report.saved_after < report.saved_before
    with torch.no_grad():
        lomem.restore(model)
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
