"""Gradients of whole models whose linear layers rebuild their input."""

import functools

import lomem
import pytest
import torch
from pair_models import MODELS, NAMES, build_pairs
from zoo import gradient_error

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(5)
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
    """Other weights, the same for every model of a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_whole_models_are_as_accurate(name, dtype):
    dtype = DTYPES[dtype]
    plain, model, batch, _ = converted(name, dtype)
    reference, wide = build_pairs(name, torch.float64)
    ratios = []
    for seed in SEEDS:
        perturb(plain, seed)
        model.load_state_dict(plain.state_dict())
        reference.load_state_dict(plain.state_dict())
        exact = gradients(reference, wide)
        error = functools.partial(gradient_error, expected=exact)
        ratios.append(error(gradients(model, batch, dtype)) / error(gradients(plain, batch, dtype)))
    # What is rebuilt is what was computed, bit for bit; other roundings happen in the norms, as many as before.
    assert sorted(ratios)[len(ratios) // 2] <= 1.05
    assert max(ratios) <= 1.5


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_pairs_of_whole_models_are_exact(name):
    plain, model, batch, _ = converted(name, torch.float64, norms="keep")
    # Some modules compute in float32 whatever the dtype; what they round is the same in both models.
    assert gradient_error(gradients(model, batch), gradients(plain, batch)) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_pairs_are_found_in_whole_models(name):
    plain, model, batch, report = converted(name, torch.float32)
    assert sum(d.action == "exact" for d in report.converted) == MODELS[name].pairs
    assert report.saved_after < report.saved_before
    with torch.no_grad():
        lomem.restore(model)
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
