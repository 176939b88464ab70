"""Converting architectures from transformers."""

import json
from pathlib import Path

import lomem
import pytest
import torch
from lomem.memory import saved_for_backward
from torch import nn
from zoo import DTYPES as CONVERTED_IN
from zoo import ZOO, adapted, build, conversion, converted, error, gradient_error, gradients, outputs

pytestmark = pytest.mark.usefixtures("one_thread")

#: Dtypes of weights and activations; None for float32 under bfloat16 autocast.
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": None}


def exact(name, model, batch):
    """Results of the same weights in float64."""
    reference, _ = build(name, torch.float64)
    reference.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    return outputs(reference, batch), gradients(reference, batch)


#: Kinds of decisions.
ACTIVATIONS = ("activation", "call")


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
        # Norms that always compute in float32 limit the accuracy: 2e-7 each, several in a row.
        assert error(after, before) < 1e-6
        assert gradient_error(grads_after, grads_before) < 1e-6
        return
    # No less accurate, apart from chance: a norm's output is off by half a unit, the original's by at least that, and
    # the rest of the model rounds different numbers, of which small models have few.
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
        assert sum(d.kind in ACTIVATIONS for d in planned.converted) == ZOO[name].activations + ZOO[name].behind
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
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    norms = [n for n, m in leaves if "norm" in type(m).__name__.lower() and "parametrizations" not in n]
    assert set(norms) <= decided.keys()
    assert sum(d.kind == "norm" for d in report.converted) == ZOO[name].norms
    assert sum(d.kind in ACTIVATIONS for d in report.converted) == ZOO[name].activations
    assert all(d.reason for d in report.decisions)
    assert list(model.state_dict()) == keys
    fresh, _ = build(name)
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())
    assert isinstance(model, nn.Module)
    assert report.saved_after < report.saved_before


TABLE = json.loads((Path(__file__).parent / "zoo_conversions.json").read_text(encoding="utf-8"))


def test_the_table_has_the_whole_zoo():
    assert list(TABLE) == [f"{name}/{dtype}" for name in ZOO for dtype in CONVERTED_IN]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", CONVERTED_IN)
def test_conversions_are_those_of_the_table(name, dtype):
    # Written by `python tools/zoo_conversions.py`. Byte counts must not grow without a reason.
    _, _, report = converted(name, dtype)
    assert conversion(report) == TABLE[f"{name}/{dtype}"]
    assert sum(d.saved_bytes for d in report.decisions) == report.saved_before - report.saved_after


def spoil(model, name):
    """Gives norms a channel that cannot be inverted."""
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1 and ("norm" in path.lower() or "ln_" in path):
            with torch.no_grad():
                parameter[1] = 300 if path.endswith("bias") else -1 if name.startswith("gemma") else 0


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", CONVERTED_IN)
def test_rows_sum_to_what_the_converted_model_keeps_less(name, dtype):
    for options in ({"activations": "keep"}, {"norms": "keep"}, {"ill": True}, {"lora": True}):
        model, batch = build(name, CONVERTED_IN[dtype] or torch.float32)
        if options == {"ill": True}:
            spoil(model, name)
        if options == {"lora": True}:
            if name in ("gpt2", "mamba"):
                continue  # peft supports none of their layers
            model = adapted(model)
        options = {key: value for key, value in options.items() if value == "keep"}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            plan = lomem.convert(model, batch, dry_run=True, **options)
            if plan.converted:
                report = lomem.convert(model, batch, check=False, **options)
                assert report.decisions == plan.decisions
                saved = report.saved_before - report.saved_after
                assert sum(d.saved_bytes for d in report.decisions) == saved > 0, options


@pytest.mark.parametrize("name", ["gpt_neox", "clip", "wav2vec2"])
def test_the_bytes_are_those_that_are_saved(name):
    for dtype in ("float32", "bfloat16"):  # there, autocast's weight copies count too
        model, batch, report = converted(name, dtype)
        model.train()
        torch.manual_seed(0)
        inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        with saved_for_backward([*model.parameters(), *model.buffers(), *inputs]) as saved:
            model(**batch)
        assert saved.nbytes == report.saved_after


@pytest.mark.parametrize("name", ["gpt_neox", "clip", "wav2vec2"])
@pytest.mark.parametrize("dtype", CONVERTED_IN)
def test_no_conversion_could_be_left_out(name, dtype):
    _, _, report = converted(name, dtype)
    for left_out in [d.name for d in report.converted][:8]:
        _, _, other = converted(name, dtype, exclude=[left_out])
        assert other.saved_after >= report.saved_after, left_out


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt_neox", "bert", "vit"])
@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("first", ["peft", "convert"])
def test_low_rank_adapters(name, ill, first):
    def build_ill():
        model, batch = build(name)
        for path, parameter in model.named_parameters():
            if ill and parameter.dim() == 1 and "norm" in path.lower():
                with torch.no_grad():
                    parameter[1] = 300 if path.endswith("bias") else -1 if name == "gemma" else 0
        return model, batch

    plain, batch = build_ill()
    plain = adapted(plain)
    before, grads = outputs(plain, batch), gradients(plain, batch)
    model, _ = build_ill()
    if first == "peft":
        model = adapted(model)
        report = lomem.convert(model, batch, activations="keep")
    else:
        report = lomem.convert(model, batch, activations="keep")
        model = adapted(model)
    actions = {d.action for d in report.converted}
    assert ("normalized" if ill else "inverted") in actions
    # Rounding in float32.
    assert error(outputs(model, batch), [t.double() for t in before]) < 1e-5
    assert gradient_error(gradients(model, batch), grads) < 1e-5
    merged = model.merge_and_unload()
    assert error(outputs(merged, batch), [t.double() for t in before]) < 1e-4
