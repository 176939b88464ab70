"""Converting transformers' architectures."""

import lomem
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO, build

#: Weights and activations; None for float32 under bfloat16 autocast.
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": None}


def outputs(model, batch):
    with torch.no_grad():
        leaves = tree_leaves(model(**batch))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(model, batch):
    model.zero_grad()
    result = model(**batch)
    result.loss.backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def error(values, expected):
    """Relative error of the outputs, in the quadratic mean."""
    squares = [((a.double() - b).norm() / b.norm()) ** 2 for a, b in zip(values, expected, strict=True)]
    return torch.stack(squares).mean().sqrt().item()


def gradient_error(grads, expected):
    """Of all gradients together: single ones, of biases that softmax does not see, vanish but for rounding."""
    assert grads.keys() == expected.keys()
    squares = [((grads[n] - g).norm() ** 2, g.norm() ** 2) for n, g in expected.items()]
    return (sum(s for s, _ in squares) / sum(s for _, s in squares)).sqrt().item()


def exact(name, model, batch):
    """What the same weights give in float64."""
    reference, _ = build(name, torch.float64)
    reference.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    return outputs(reference, batch), gradients(reference, batch)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_change_nothing_but_rounding(name, dtype):
    model, batch = build(name, DTYPES[dtype] or torch.float32)
    expected, expected_grads = exact(name, model, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        before, grads_before = outputs(model, batch), gradients(model, batch)
        report = lomem.convert(model, batch, activations="keep")
        after, grads_after = outputs(model, batch), gradients(model, batch)
        lomem.restore(model)
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, batch), strict=True))
    assert report.saved_after < report.saved_before
    if dtype == "float64":
        # Norms that compute in float32 whatever they get are the less exact ones: 2e-7 of them, some in a row.
        assert error(after, before) < 1e-6
        assert gradient_error(grads_after, grads_before) < 1e-6
        return
    # Never less accurate, but for luck: a norm's output has half a unit of error, the original's at least that, and the
    # rest of the model rounds other numbers; small models draw few of them.
    eps = torch.finfo(torch.float32 if dtype == "float32" else torch.bfloat16).eps
    assert error(after, expected) <= max(2 * error(before, expected), 4 * eps)
    assert gradient_error(grads_after, expected_grads) <= max(2 * gradient_error(grads_before, expected_grads), 4 * eps)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_change_no_bit(name, dtype):
    model, batch = build(name, DTYPES[dtype] or torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        before = outputs(model, batch)
        planned = lomem.convert(model, batch, norms="keep", dry_run=True)
        assert len(planned.converted) == ZOO[name].activations
        if not planned.converted:
            return
        report = lomem.convert(model, batch, norms="keep")
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, batch), strict=True))
    assert report.difference == 0  # in training mode too
    assert report.saved_after < report.saved_before


@pytest.mark.parametrize("name", ZOO)
def test_every_norm_and_activation_has_a_verdict(name):
    model, batch = build(name)
    keys = list(model.state_dict())
    report = lomem.convert(model, batch)
    decided = {d.name: d for d in report.decisions}
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    assert set(norms) <= decided.keys()
    assert sum(d.kind == "norm" for d in report.converted) == ZOO[name].norms
    assert sum(d.kind != "norm" for d in report.converted) == ZOO[name].activations
    assert all(d.reason for d in report.decisions)
    assert list(model.state_dict()) == keys
    fresh, _ = build(name)
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())
    assert isinstance(model, nn.Module)
    assert report.saved_after < report.saved_before
