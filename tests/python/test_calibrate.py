"""lomem.fit.calibrate and report: step functions for a model's own inputs, and how near their gradients are."""

import copy
import json
import math
import pickle

import lomem
import lomem.fit
import pytest
import torch
import torch.nn.functional as F
from lomem.commands import cli
from lomem.fit._calibrate import Histogram
from torch import nn

# What the conftest's fixture says: layers here are small.
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two activations, one of them in place and called twice; dropout and batch norm, which have state."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.norm = nn.BatchNorm1d(32)
        self.gelu = lomem.nn.GELU(bits=3)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.Linear(32, 32)
        self.silu = lomem.nn.SiLU(inplace=True, bits=2)
        self.last = nn.Linear(32, 3)

    def forward(self, x, scale=1.0):
        x = self.dropout(self.gelu(self.norm(self.first(x)) * scale))
        return self.last(self.silu(self.second(self.silu(self.second(x)))))


def batches(count=4):
    return [torch.randn(64, 6) * 2 for _ in range(count)]


def loss(output):
    return output.square().mean()


def inputs_of(model, layer, data):
    """What a layer is given, by a hook of our own."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat([x.flatten() for x in seen]).double()


def exact_derivative(function, x):
    with torch.enable_grad():  # also within a backward pass
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def squared_error(step, function, x, weights=None):
    wrong = (step.derivative(x) - exact_derivative(function, x)).square()
    return (wrong if weights is None else wrong * weights).sum().item()


def test_histogram():
    histogram = Histogram()
    parts = [torch.randn(3, 100) * 3, torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-30]), torch.empty(0)]
    for part in parts:
        histogram.add(part)
    values, weights = histogram.points()
    assert histogram.weights.numel() == 65536
    assert histogram.count == 306
    rounded = torch.cat([p.flatten() for p in parts]).bfloat16().double()
    # (-0 and 0 are two patterns of one value.)
    want, counts = rounded[rounded.isfinite()].unique(return_counts=True)
    merged = torch.stack([weights[values == v].sum() for v in want])
    assert torch.equal(values.unique(), want)
    torch.testing.assert_close(merged * counts.sum(), counts.double())
    assert (values.diff() >= 0).all()


def test_histogram_with_weights():
    histogram = Histogram()
    histogram.add(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 3.0]))
    values, weights = histogram.points()
    assert values.tolist() == [1.0]
    assert weights.tolist() == [1.0]


@pytest.mark.parametrize("bits", [None, 1, 4])
def test_the_error_falls_and_the_forward_pass_stays(bits):
    model, data = Net().eval(), batches()
    before = copy.deepcopy(model)
    result = lomem.fit.calibrate(model, data, bits)
    assert list(result.layers) == ["gelu", "silu"]
    assert result.batches == 4
    for name, function in (("gelu", F.gelu), ("silu", F.silu)):
        layer, old = getattr(model, name), getattr(before, name)
        report = result.layers[name]
        assert layer.steps == report.steps
        assert layer.bits == report.bits == (bits or old.bits)
        x = inputs_of(before, old, data)
        assert report.elements == x.numel()
        compared = lomem.functional.step_function(name, layer.bits)
        assert squared_error(layer.steps, function, x) < squared_error(compared, function, x)
        # What is told was measured on values rounded to bfloat16: relative to them within 2^-8.
        energy = exact_derivative(function, x).square().sum().item()
        assert report.error_after == pytest.approx((squared_error(layer.steps, function, x) / energy) ** 0.5, rel=0.05)
        told = (squared_error(old.step_function(), function, x) / energy) ** 0.5
        assert report.error_before == pytest.approx(told, rel=0.05)
    for batch in data:
        assert torch.equal(model(batch), before(batch))
    assert f"{result.layers['gelu'].error_after:.4f}" in str(result)
    assert json.loads(result.to_json())["layers"]["silu"]["bits"] == model.silu.bits


def test_the_fit_is_the_best_for_what_was_seen():
    # A histogram of three values of which two bits tell all: no error is left.
    model = nn.Sequential(lomem.nn.Tanh(bits=2))
    x = torch.tensor([-1.0, -0.5, 0.25, 2.0])
    result = lomem.fit.calibrate(model, [x.repeat(5)])
    assert result.layers["0"].error_after < 1e-12
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, 1 - torch.tanh(x) ** 2)


def test_weights_of_gradients():
    torch.manual_seed(1)
    data = batches(6)
    model = Net().eval()
    plain, weighted = copy.deepcopy(model), copy.deepcopy(model)
    lomem.fit.calibrate(plain, data, 2)
    lomem.fit.calibrate(weighted, data, 2, loss=loss)
    assert plain.gelu.steps != weighted.gelu.steps
    # By hand: the gradient that comes to the first activation, of the model that was calibrated.
    pairs = []

    def keep(module, args, output):
        output.register_hook(lambda grad: pairs.append((args[0].detach(), grad)))

    handle = model.gelu.register_forward_hook(keep)
    for batch in data:
        loss(model(batch)).backward()
    handle.remove()
    x = torch.cat([a.flatten() for a, _ in pairs]).double()
    squares = torch.cat([g.flatten() for _, g in pairs]).double().square()
    assert squared_error(weighted.gelu.steps, F.gelu, x, squares) < squared_error(plain.gelu.steps, F.gelu, x, squares)


def test_the_model_is_left_as_it_was():
    model, data = Net().train(), batches()
    model(data[0]).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    for call in (
        lambda: lomem.fit.calibrate(model, data, loss=loss),
        lambda: lomem.fit.calibrate(model, data),
        lambda: lomem.fit.report(model, data, loss=loss),
    ):
        call()
        assert torch.equal(torch.get_rng_state(), random_state)
        assert model.training
        assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not model.gelu._forward_hooks
        assert not model.gelu._forward_pre_hooks
        assert "forward" not in vars(model.gelu)


def test_kinds_of_batches():
    for batch in ({"x": torch.randn(64, 6), "scale": 2.0}, (torch.randn(64, 6), 2.0), [torch.randn(64, 6)]):
        assert lomem.fit.calibrate(Net(), iter([batch])).batches == 1


def test_apply():
    model, data = Net(), batches()
    result = lomem.fit.calibrate(model, data)
    loaded = Net()
    loaded.load_state_dict(model.state_dict())
    pickle.loads(pickle.dumps(result)).apply(loaded)
    assert loaded.gelu.steps == model.gelu.steps
    assert loaded.silu.steps == model.silu.steps
    swapped = Net()
    swapped.gelu = lomem.nn.Tanh()
    with pytest.raises(ValueError, match=r"^lomem.fit.Calibration.apply: 'gelu' of model is a Tanh, expected a GELU"):
        result.apply(swapped)
    assert swapped.silu.steps is None
    other = nn.ModuleDict({"gelu": lomem.nn.GELU()})
    with pytest.raises(ValueError, match=r"^lomem.fit.Calibration.apply: model has no activation .* called 'silu'"):
        result.apply(other)
    assert other["gelu"].steps is None


def test_steps_of_a_function_of_the_users():
    step = lomem.functional.step_function("gelu", 3)
    model = nn.Sequential(nn.Linear(6, 32), lomem.nn.StepActivation(F.gelu, step.boundaries, step.levels))
    result = lomem.fit.calibrate(model, batches())
    assert result.layers["1"].error_after < result.layers["1"].error_before
    assert model[1].steps == result.layers["1"].steps


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "sentence"),
    [
        (
            nn.Linear(6, 3),
            [torch.ones(2, 6)],
            {},
            ValueError,
            "lomem.fit.calibrate: model, a Linear, has no activation",
        ),
        (Net(), [], {}, ValueError, "lomem.fit.calibrate: batches is empty, expected at least one batch"),
        (
            Net(),
            torch.ones(2, 6),
            {},
            TypeError,
            "lomem.fit.calibrate: batches is of type Tensor, expected an iterable",
        ),
        (Net(), [3], {}, TypeError, "lomem.fit.calibrate: batch is of type int, expected a dict"),
        (Net(), [torch.ones(2, 6)], {"bits": 9}, ValueError, "lomem.fit.calibrate: bits is 9, expected 1 to 8"),
        ("net", [torch.ones(2, 6)], {}, TypeError, "lomem.fit.calibrate: model is of type str"),
    ],
)
def test_bad_input(model, data, options, error, sentence):
    with pytest.raises(error) as caught:
        lomem.fit.calibrate(model, data, **options)
    assert str(caught.value).startswith(sentence)


def test_layers_without_data_are_left():
    model = nn.Sequential(lomem.nn.GELU(bits=2), nn.Linear(4, 4), lomem.nn.GELU(bits=3))
    with torch.no_grad():
        model[1].weight.zero_()
    result = lomem.fit.calibrate(model, [torch.randn(50, 4)])
    assert model[0].steps is not None
    assert model[2].steps is None
    sentence = "saw 4 distinct bfloat16 values, expected at least 8 for 3 bits"
    assert result.skipped == {"2": sentence}
    assert "not calibrated" in str(result)

    # A frozen part gets no gradient.
    model = nn.Sequential(nn.Linear(4, 8), lomem.nn.GELU(), nn.Linear(8, 8), lomem.nn.SiLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    result = lomem.fit.calibrate(model, [torch.randn(50, 4)], loss=loss)
    assert result.skipped == {"1": "was not called, or got no gradient"}
    assert list(result.layers) == ["3"]
    with pytest.raises(ValueError, match=r"^lomem.fit.calibrate: no layer can be calibrated; '0' saw 1 distinct"):
        lomem.fit.calibrate(nn.Sequential(lomem.nn.GELU()), [torch.ones(50)])


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), lomem.nn.GELU(bits=2), nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class Overwrites(Plain):
    """Changes the input of its activation afterwards, which is allowed: lomem's keep none."""

    def forward(self, x):
        h = self.first(x)
        y = self.act(h)
        h.add_(10)
        return self.last(y)


def test_inputs_that_are_overwritten_and_outputs_that_are_replaced():
    plain, overwrites = Plain(), Overwrites()
    overwrites.load_state_dict(plain.state_dict())
    data = batches()
    want = lomem.fit.calibrate(copy.deepcopy(plain), data, loss=loss).layers["act"]
    assert lomem.fit.calibrate(overwrites, data, loss=loss).layers["act"] == want
    # A hook of somebody else's, that returns another output: the layer's own gradient counts.
    factor = torch.linspace(0.1, 10, 32)
    hooked, written_out = copy.deepcopy(plain), copy.deepcopy(plain)
    hooked.act.register_forward_hook(lambda module, args, output: output * factor)
    with torch.no_grad():
        written_out.last.weight.mul_(factor)
    got = lomem.fit.calibrate(hooked, data, loss=loss).layers["act"].steps
    same = lomem.fit.calibrate(written_out, data, loss=loss).layers["act"].steps
    # (The weights are products of other roundings.)
    assert got.boundaries == pytest.approx(same.boundaries, rel=1e-3, abs=1e-3)


def test_inputs_that_require_gradients():
    model, batch = Net(), torch.randn(64, 6, requires_grad=True)
    lomem.fit.calibrate(model, [batch], loss=loss)
    lomem.fit.report(model, [batch], loss=loss)
    assert batch.grad is None
    with torch.no_grad():
        lomem.fit.calibrate(model, [batch], loss=loss)


@pytest.mark.parametrize("call", [lomem.fit.calibrate, lomem.fit.report])
def test_losses_that_are_none(call):
    for value, got in ((3.0, "float"), (torch.ones(2, requires_grad=True), "shape (2,)"), (torch.ones(()), "shape ()")):
        with pytest.raises(ValueError, match="loss returned") as caught:
            call(Net(), batches(1), loss=lambda output, value=value: value)
        assert f"loss returned {got}, expected a tensor of one element that requires gradients" in str(caught.value)


def test_functions_of_the_library_are_fitted_as_what_they_compute():
    want = lomem.fit.fit("silu", 2).step
    for module in (lomem.functional.silu, lomem.nn.SiLU(), lomem.nn.StepActivation(F.silu, (0.0,), (0.0, 1.0))):
        got = lomem.fit.fit(module, 2).step
        assert got.boundaries == pytest.approx(want.boundaries, abs=1e-6)
    assert lomem.nn.SiLU(steps=lomem.fit.fit("silu", 4)).bits == 4


def test_a_density_of_tensors():
    x = torch.randn(1000) * 2 + 1
    assert lomem.fit.fit("gelu", 2, density=(x.mean(), x.std())).error > 0


# Fidelity


def fidelity_by_hand(a, e):
    return {
        "cosine": F.cosine_similarity(a, e, dim=0).item(),
        "error": ((a - e).norm() / e.norm()).item(),
        "bias": ((a - e).mean() / e.square().mean().sqrt()).item(),
        "deviation": ((a - e).std(correction=0) / e.square().mean().sqrt()).item(),
    }


def test_report_of_a_function():
    step = lomem.functional.step_function("silu", 3)
    sample = torch.randn(1000, dtype=torch.float64)
    row = lomem.fit.report("silu", steps={"three": step}, density=sample).rows["three"]
    want = fidelity_by_hand(step.derivative(sample), exact_derivative(F.silu, sample))
    for name, value in want.items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert row.error**2 == pytest.approx(row.bias**2 + row.deviation**2)
    # The standard normal density: a mean of 100,000 is good to about 1 %.
    gaussian = lomem.fit.report("silu", steps={"three": step}).rows["three"]
    large = torch.randn(100_000, dtype=torch.float64)
    error = fidelity_by_hand(step.derivative(large), exact_derivative(F.silu, large))["error"]
    assert gaussian.error == pytest.approx(error, rel=0.02)
    called = lomem.fit.report(F.silu, steps={"three": step}).rows["three"]
    assert called.error == pytest.approx(gaussian.error, rel=1e-6)


def test_report_by_default():
    report = lomem.fit.report("sigmoid")
    # One bit cannot match two parallel asymptotes.
    steps = [f"{criterion}, {bits} bits" for criterion in ("primitive", "derivative") for bits in (2, 3, 4, 6, 8)]
    drawn = [f"drawn, {bits} bit{'s' * (bits > 1)}" for bits in (1, 2, 3, 4, 6, 8)]
    assert list(report.rows) == steps + drawn
    errors = [report.rows[f"derivative, {bits} bits"].error for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert json.loads(report.to_json()).keys() == {"subject", "under", "rows"}


def test_report_of_a_model():
    torch.manual_seed(3)
    model, data = Net().train(), batches(3)
    report = lomem.fit.report(model, data, loss=loss)
    assert list(report.rows) == ["gelu", "silu", "all parameters"]

    # By hand, on a copy: batch norm moves its statistics.
    by_hand = copy.deepcopy(model)
    approximate, exact = [], []

    def keep(module, args, output):
        x = args[0].detach().double()

        def gradient(grad):
            approximate.append(grad.double() * module.step_function().derivative(x))
            exact.append(grad.double() * exact_derivative(F.gelu, x))

        output.register_hook(gradient)

    by_hand.gelu.register_forward_hook(keep)
    for batch in data:
        loss(by_hand(batch)).backward()
    want = fidelity_by_hand(torch.cat(approximate).flatten(), torch.cat(exact).flatten())
    # Dropout differs: what is compared is a mean over 64 x 32 x 3 elements.
    assert report.rows["gelu"].error == pytest.approx(want["error"], rel=0.2)
    for row in report.rows.values():
        assert row.error**2 == pytest.approx(row.bias**2 + row.deviation**2)
        assert 0 < row.error < 0.5
        assert 0.8 < row.cosine < 1


def test_report_of_exact_layers():
    model = nn.Sequential(nn.Linear(4, 8), lomem.nn.GELU(bits=8), nn.Linear(8, 2))
    data = [torch.randn(16, 4)]
    parameters = lomem.fit.report(model, data, loss=loss).rows["all parameters"]

    def gradient(net):
        grads = torch.autograd.grad(loss(net(data[0])), list(net.parameters()))
        return torch.cat([g.flatten() for g in grads]).double()

    plain = nn.Sequential(model[0], nn.GELU(), model[2])
    want = fidelity_by_hand(gradient(model), gradient(plain))
    # Sums of squares differ from the norm of a difference by the rounding of float64 of a sum 1e4 times as large.
    assert parameters.error == pytest.approx(want["error"], rel=1e-6)
    assert parameters.bias == pytest.approx(want["bias"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((Net(), [torch.ones(2, 6)]), {}, "lomem.fit.report: loss is None, expected a function"),
        ((Net(),), {"loss": loss}, "lomem.fit.report: batches is None, expected an iterable"),
        (("gelu", [torch.ones(2)]), {}, "lomem.fit.report: batches are given with a function"),
        ((Net(), [torch.ones(2, 6)]), {"loss": loss, "steps": {}}, "lomem.fit.report: steps are given with a model"),
        ((nn.Linear(6, 2), [torch.ones(2, 6)]), {"loss": loss}, "lomem.fit.report: model, a Linear, has no activation"),
        (("jelu",), {"steps": {}}, "lomem.fit.fit: fn is 'jelu', expected a callable or one of "),
    ],
)
def test_bad_input_of_report(arguments, options, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lomem.fit.report(*arguments, **options)
    assert str(caught.value).startswith(sentence)


def test_pictures(tmp_path):
    step = lomem.functional.step_function("gelu", 3)
    lomem.fit.report("gelu", steps={"three": step}).plot(tmp_path / "function.png")
    lomem.fit.report(Net(), batches(1), loss=loss).plot(tmp_path / "model.png")
    for name in ("function.png", "model.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# The command


def test_command(capsys, tmp_path):
    options = ["--bits", "2,3", "--criterion", "primitive", "--json", str(tmp_path / "fit.json")]
    assert cli.main(["fit", "gelu", *options, "--plot", str(tmp_path / "fit.png")]) == 0
    printed = capsys.readouterr().out
    error = lomem.fit.fit("gelu", 2, criterion="primitive").error
    assert f"gelu, 2 bits, primitive: error {error:.6g}" in printed
    assert "primitive, 3 bits" in printed
    contents = json.loads((tmp_path / "fit.json").read_text(encoding="utf-8"))
    assert contents["fits"]["primitive, 2 bits"]["error"] == error
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["jelu"], "lomem fit: lomem.fit.fit: fn is 'jelu', expected a callable or one of "),
        (["gelu", "--bits", "9"], "lomem fit: --bits is 9, expected 1 to 8"),
        (["gelu", "--criterion", "best"], "lomem fit: --criterion is 'best', expected primitive or derivative"),
        (["gelu", "--plot", "a.xyz"], "lomem fit: --plot is a.xyz, expected a file name that ends in one of"),
        (["gelu", "--json", "no/such/f.json"], "lomem fit: --json is no/such/f.json, expected a file in a folder"),
        (["sigmoid", "--bits", "1"], "lomem fit: lomem.fit.fit: bits is 1, expected at least 2 on the real line"),
    ],
)
def test_bad_commands(options, sentence, capsys):
    assert cli.main(["fit", *options]) == 1
    assert capsys.readouterr().err.startswith(sentence)
