"""Models converted and pickled by an earlier version."""

import copy
import io
import pickle

import lomem
import pickled_model
import pytest
import torch
from helpers import PUBLISHED
from lomem.conversion.modules import ConvertedActivation, MSNorm, SharedInput, StepCalls
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def contents():
    # Written by `python tests/python/pickled_model.py` under version 0.1.0, before lomem.convert had a criterion.
    return torch.load(pickled_model.PATH, weights_only=False)


def check(contents, model):
    """Checks that outputs and gradients are the same as when pickled."""
    output, gradients = pickled_model.results(model, contents["input"])
    # torch may compute products in a different order on another machine; a few of them in a row, in bfloat16.
    norm = contents["output"].double().norm()
    assert (output.double() - contents["output"].double()).norm() <= 2**-7 * norm
    assert gradients.keys() == contents["gradients"].keys()
    scale = torch.stack([g.double().norm() for g in contents["gradients"].values()]).norm()
    for name, gradient in gradients.items():
        assert (gradient.double() - contents["gradients"][name].double()).norm() <= 2**-6 * scale, name


def test_it_loads_and_computes_what_it_did(contents):
    model = contents["model"]
    check(contents, model)
    modules = dict(model.named_modules())
    kinds = {
        "inverted": MSNorm,
        "two outputs": MSNorm,
        "normalized": MSNorm,
        "2bit": (ConvertedActivation, StepCalls),
    }
    assert all(isinstance(modules[name], kinds[action]) for name, action in pickled_model.ACTIONS.items())
    plans = [modules[f"{name}.norm"].lomem_norm for name in ("pre", "post", "ill")]
    assert [(plan.inverted, plan.shared) for plan in plans] == [(True, False), (True, True), (False, True)]
    assert all(isinstance(modules[name], SharedInput) for name in ("post.a", "post.b", "ill.up"))


def test_its_activations_have_the_papers_step_functions(contents):
    x = torch.linspace(-9, 9, 2001)
    modules = dict(contents["model"].named_modules())
    steps = dict(zip(("pre.gelu", "ill.silu"), (entry.step for entry in PUBLISHED.values()), strict=True))
    for name, function in steps.items():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(modules[name](leaf).sum(), leaf)
        boundaries = torch.tensor(function.boundaries, dtype=torch.float64).float()
        levels = torch.tensor(function.levels, dtype=torch.float64).float()
        assert torch.equal(gradient, levels[torch.bucketize(x, boundaries)])
    assert {m.lomem_criterion for m in modules.values() if "lomem_bits" in vars(m)} == {"paper"}


def test_it_is_copied_and_saved_anew(contents):
    check(contents, copy.deepcopy(contents["model"]))
    file = io.BytesIO()
    torch.save(contents["model"], file)
    file.seek(0)
    check(contents, torch.load(file, weights_only=False))
    assert b"lomem.conversion._" not in file.getvalue()


def test_it_is_restored_and_converted_again(contents):
    model = contents["model"]
    plain = pickled_model.Model()
    plain.load_state_dict(model.state_dict())
    assert lomem.restore(model) == len(pickled_model.ACTIONS) + 3  # and the linear layers after norms
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(name.startswith("lomem") for m in model.modules() for name in vars(m))
    assert torch.equal(model(contents["input"]), plain(contents["input"]))
    with torch.autocast("cpu", torch.bfloat16):
        report = lomem.convert(model, contents["input"], criterion="paper", pairs="keep")
    assert {d.name: d.action for d in report.decisions} == pickled_model.ACTIONS
    check(contents, model)


def test_the_default_is_another_one_now(contents):
    model = contents["model"]
    lomem.restore(model)
    with torch.autocast("cpu", torch.bfloat16):
        lomem.convert(model, contents["input"])
    assert isinstance(model.quick, nn.Module)
    _, gradients = pickled_model.results(model, contents["input"])
    name = "ill.up.weight"
    then = contents["gradients"][name]
    assert (gradients[name] - then).norm() > 0.02 * then.norm()


#: A report of version 0.1.0, written with `pickle.dumps(report, protocol=0)`.
REPORT = (
    b"ccopy_reg\n_reconstructor\np0\n(clomem.conversion._report\nReport\np1\nc__builtin__\nobject\np2\nNtp3\nRp4\n(dp5\n"
    b"Vdecisions\np6\n(g0\n(clomem.conversion._report\nDecision\np7\ng2\nNtp8\nRp9\n(dp10\nVname\np11\nVa\np12\nsVkind\n"
    b"p13\nVnorm\np14\nsVmodule\np15\nVLayerNorm\np16\nsVcomputes\np17\nVlayer norm (weight, bias)\np18\nsVaction\n"
    b"p19\nVinverted\np20\nsVreason\np21\nVits consumers keep its output\np22\nsVsaved_bytes\np23\nI96\nsbg0\n(g7\ng2\n"
    b"Ntp24\nRp25\n(dp26\ng11\nVb\np27\nsg13\nVactivation\np28\nsg15\nVGELU\np29\nsg17\ng29\nsg19\nVleft\np30\nsg21\n"
    b"Vit is excluded\np31\nsg23\nI0\nsbtp32\nsVsaved_before\np33\nI200\nsVsaved_after\np34\nI104\nsVdifference\np35\n"
    b"F0.0\nsVnotes\np36\n(tsb."
)


def test_a_report_loads():
    report = pickle.loads(REPORT)
    assert [d.name for d in report.converted] == ["a"]
    assert [d.name for d in report.left] == ["b"]
    assert [type(d.action).__name__ for d in report.decisions] == ["Action"] * 2
    assert report == lomem.conversion.Report(
        (
            lomem.conversion.Decision(
                "a", "norm", "LayerNorm", "layer norm (weight, bias)", "inverted", "its consumers keep its output", 96
            ),
            lomem.conversion.Decision("b", "activation", "GELU", "GELU", "left", "it is excluded"),
        ),
        200,
        104,
        0.0,
    )
