"""lomem.fit.report of converted models, and the sums behind it and lomem.convert, against the same by hand."""

import copy
import io
import math

import lomem
import lomem.fit
import pytest
import torch
import torch.nn.functional as F
from fidelity_helpers import (
    SETTINGS,
    WIDTH,
    Complex,
    built,
    by_layer,
    check_figures,
    conv,
    convert,
    figures,
    projection,
    step,
    x_of,
)
from lomem.conversion import GradientFidelity, fidelity
from small_models import classes
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::lomem.GradientWarning"),
]


# --- The formula ------------------------------------------------------------------------------------------------------


def test_sums_in_parts(monkeypatch):
    torch.manual_seed(0)
    a, e = torch.randn(7, 5), torch.randn(7, 5)
    whole = fidelity.Sums()
    whole.add(a, e)
    monkeypatch.setattr(fidelity, "_PART", 4)
    parts = fidelity.Sums()
    parts.add(a, e)
    assert parts._values() == pytest.approx(whole._values(), rel=1e-12)
    weights = torch.rand(7, 5)
    weighted = fidelity.Sums()
    weighted.add(a, e, weights)
    w, a64, e64 = weights.double(), a.double(), e.double()
    d = a64 - e64
    expected = [w.sum(), (w * e64**2).sum(), (w * a64**2).sum(), (w * a64 * e64).sum(), (w * d**2).sum(), (w * d).sum()]
    assert weighted._values() == pytest.approx([float(v) for v in expected], rel=1e-12)
    both = fidelity.Sums()
    both.merge(whole)
    both.merge(weighted)
    assert both.exact == whole.exact + weighted.exact
    check_figures(whole.fidelity(), figures([e.double()], [a.double()]))
    zero = fidelity.Sums()
    zero.add(torch.zeros(3), e[0, :3])
    assert zero.fidelity() == GradientFidelity(0.0, 0.0, 1.0)
    nothing = fidelity.Sums()
    nothing.add(e[0, :3], torch.zeros(3))
    assert math.isnan(nothing.fidelity().cosine)


def test_small_errors_are_not_lost_in_rounding():
    e = torch.randn(1000, dtype=torch.float64)
    sums = fidelity.Sums()
    sums.add(e * (1 + 1e-12), e)
    assert sums.fidelity().error == pytest.approx(1e-12, rel=1e-3)


# --- lomem.fit.report -------------------------------------------------------------------------------------------------


def mean_square(output):
    return output.square().mean()


@pytest.mark.parametrize("setting", ["codes", "8", "4", "2"])
def test_fit_report_of_a_converted_model(setting):
    plain, first = built("mlp")
    model, _ = built("mlp")
    convert(model, first, **SETTINGS[setting], gradients=False)
    batches = [first, (x_of(3, WIDTH) + 1,)]
    before, state, drawn = classes(model), copy.deepcopy(model.state_dict()), lomem.random.get_state()
    attributes = [dict(vars(m)) for m in model.modules()]
    report = lomem.fit.report(model, batches, loss=mean_square)
    assert classes(model) == before
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert lomem.random.get_state() == drawn
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    def total(of):
        grads = [step(of, batch, mean_square) for batch in batches]
        return {name: sum(g[name] for g in grads) for name in grads[0]}

    exact, approximate = total(plain), total(model)
    assert list(report.rows) == ["0", "3", "6", "9", "all parameters"]
    for name, want in [
        *by_layer(exact, approximate).items(),
        ("all parameters", figures(exact.values(), approximate.values())),
    ]:
        check_figures(report.rows[name], want)
    row = report.rows["all parameters"]
    assert row.error**2 == pytest.approx(row.bias**2 + row.deviation**2, rel=1e-9)
    assert report.under == "2 batches"
    assert "0.99" in str(report)


def test_an_optimizer_in_the_backward_pass_takes_no_step():
    model, batch = built("mlp")
    convert(model, batch, pairs="keep", gradients=False)
    expected = lomem.fit.report(model, [batch], loss=mean_square)
    model.append(lomem.nn.GELU(bits=2))
    both = lomem.fit.report(model, [batch], loss=mean_square)
    fired = []

    def stepped(parameter):
        fired.append("accumulated")
        parameter.data.fill_(torch.nan)

    for p in model.parameters():
        p.register_hook(lambda g: fired.append("hook"))
        p.register_post_accumulate_grad_hook(stepped)
    assert lomem.fit.report(model, [batch], loss=mean_square).rows == both.rows
    del model[-1]
    assert lomem.fit.report(model, [batch], loss=mean_square).rows == expected.rows
    assert fired == []
    step(model, batch, mean_square)
    assert fired.count("hook") == fired.count("accumulated") == 8


def test_a_batch_that_the_model_writes_to():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.last = nn.Linear(WIDTH, WIDTH), lomem.nn.GELU(bits=3)

        def forward(self, x):
            return self.last(F.gelu(self.linear(x.mul_(2))))

    torch.manual_seed(3)
    model, x = Scaled(), x_of(6, WIDTH)
    plain = copy.deepcopy(model)
    plain.last = nn.GELU()
    convert(model, x.clone(), gradients=False, rounding="nearest")
    before = x.clone()
    report = lomem.fit.report(model, [x], loss=mean_square, draws=2)
    assert torch.equal(x, before)
    exact, approximate = (step(m, (x.clone(),), mean_square) for m in (plain, model))
    want = figures(exact.values(), approximate.values())
    check_figures(report.rows["all parameters"], want)


def test_complex_parameters():
    torch.manual_seed(3)
    model, x = Complex(), x_of(6, WIDTH)
    plain = copy.deepcopy(model)
    convert(model, x, pairs="keep", gradients=False, rounding="nearest")
    report = lomem.fit.report(model, [x], loss=mean_square)
    grads = []
    for m in (plain, model):
        mean_square(m(x)).backward()
        grads.append([torch.view_as_real(m.turn.grad).double(), *(p.grad.double() for p in m.body.parameters())])
    check_figures(report.rows["all parameters"], figures(*grads))


def test_a_loss_that_is_a_module_is_left_as_it_was():
    loss = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.AvgPool1d(18))
    model, batch = built("mlp")
    convert(model, batch, pairs="keep", gradients=False)
    model.append(lomem.nn.GELU(bits=2))
    state = copy.deepcopy(loss.state_dict())
    report = lomem.fit.report(model, [batch], loss=loss)
    assert 0 < report.rows["all parameters"].error < 1
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())


def test_the_bias_falls_with_the_root_of_the_draws():
    model, batch = built("mlp")
    lomem.convert(model, batch, bits=4)
    drawn = lomem.random.get_state()
    rows = {}
    for draws in (1, 4, 16, 64):
        report = lomem.fit.report(model, [batch], loss=mean_square, draws=draws)
        rows[draws] = report.rows["all parameters"]
    assert lomem.random.get_state() == drawn
    assert report.under == "1 batches, 64 draws"
    for draws in (4, 16, 64):
        row = rows[draws]
        assert row.error**2 == pytest.approx(row.bias**2 + row.deviation**2, rel=1e-9)
        # The noise of the mean, and the bias of activations of rounded inputs, 0.6 % at most. Of ten thousand elements
        # with noise that is shared among them.
        assert row.bias * draws**0.5 == pytest.approx(row.error, rel=0.35)
    assert rows[64].bias < 0.2 * rows[1].error


def test_the_mean_over_draws_by_hand():
    plain, batch = built("mlp")
    model, _ = built("mlp")
    lomem.convert(model, batch, bits=4)
    drawn = lomem.random.get_state()
    exact = torch.cat([g.flatten() for g in step(plain, batch, mean_square).values()])
    draws = torch.stack([torch.cat([g.flatten() for g in step(model, batch, mean_square).values()]) for _ in range(5)])
    lomem.random.set_state(drawn)
    row = lomem.fit.report(model, [batch], loss=mean_square, draws=5).rows["all parameters"]
    bias = (draws.mean(0) - exact).norm() / exact.norm()
    deviation = ((draws - draws.mean(0)) ** 2).sum(1).mean().sqrt() / exact.norm()
    error = ((draws - exact) ** 2).sum(1).mean().sqrt() / exact.norm()
    assert (row.bias, row.deviation, row.error) == pytest.approx(
        (float(bias), float(deviation), float(error)), rel=1e-6
    )


def test_fit_report_of_a_model_with_both():
    def make():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(6, 6, 1), lomem.nn.GELU(bits=2), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.SiLU()
        )

    model, batch = make(), conv()[1]
    convert(model, batch)
    report = lomem.fit.report(model, [batch], loss=projection)
    assert list(report.rows) == ["1", "0", "2", "3", "all parameters"]
    plain = make()
    plain[1] = nn.GELU()
    exact, approximate = step(plain, batch, projection), step(model, batch, projection)
    check_figures(report.rows["all parameters"], figures(exact.values(), approximate.values()))


def test_fit_report_of_an_exact_conversion():
    model, batch = built("mlp")
    lomem.convert(model, batch)
    row = lomem.fit.report(model, [batch], loss=mean_square).rows["all parameters"]
    assert row.error < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws is 0, expected a whole number of at least 1"),
        ({"draws": True}, "draws is True, expected a whole number of at least 1"),
        ({"draws": 2.0}, r"draws is 2\.0, expected a whole number of at least 1"),
        ({"batches": []}, "batches is empty, expected at least one batch"),
    ],
)
def test_wrong_arguments_of_fit_report(options, message):
    model, batch = built("mlp")
    lomem.convert(model, batch)
    options = {"batches": [batch], "loss": mean_square} | options
    with pytest.raises(ValueError, match=f"^lomem.fit.report: {message}$"):
        lomem.fit.report(model, **options)
    with pytest.raises(ValueError, match=r"^lomem.fit.report: draws is 2 with a function, expected 1 or a model$"):
        lomem.fit.report("gelu", draws=2)


def test_a_converted_model_is_pickled_with_its_report():
    model, batch = conv()
    report = convert(model, batch)
    file = io.BytesIO()
    torch.save((model, report), file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[1] == report
