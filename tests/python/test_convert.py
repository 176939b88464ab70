"""Converting hand-made models: arguments, reports, and what does not change."""

import copy
import io
import json
import pickle

import lomem
import pytest
import torch
import torch.nn.functional as F
from lomem.memory import saved_for_backward
from small_models import Block, D, PostNorm, actions, batch, classes, distance, make, results
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def test_saved_bytes_are_those_counted_by_hand():
    model, x = make(), batch()
    n = x.numel()
    first, last = 4 * n, 4 * n  # inputs of the outer linear layers; the first is the model's input, not counted
    rows = n // D
    # A block: x and its mean and rstd; z; the activation's input; the product's two factors; their product. Converted,
    # it saves neither the activation's result nor the product.
    plain = 4 * n + 2 * 4 * rows + 4 * n + 4 * (4 * n) * 4
    converted = 4 * rows + 4 * n + 4 * (4 * n) * 2
    report = lomem.convert(model, x)
    assert first == 4 * x.numel()
    # The second block's x is the first's output; the last linear layer's input is the second's.
    assert report.saved_before == 2 * plain + last
    assert report.saved_after == 2 * converted + last
    with saved_for_backward([*model.parameters(), x]) as saved:
        model(x)
    assert saved.nbytes == report.saved_after
    assert sum(d.saved_bytes for d in report.decisions) == report.saved_before - report.saved_after


def test_the_profile_sees_what_converted_norms_share():
    for ill, block in ((False, Block), (False, PostNorm), (True, Block), (True, PostNorm)):
        model, x = make(block, ill=ill), batch()
        with torch.autocast("cpu", torch.bfloat16):
            report = lomem.convert(model, x)
            profile = lomem.memory.profile(model, x)
        linears = ["up", "gate"] if block is Block else ["q", "k"]
        for i, norm in enumerate(profile.norms, start=1):
            assert (norm.module, norm.kept_by_norm) == (f"{i}.norm", True)
            assert norm.shared_with == [f"{i}.{linear}" for linear in linears]
        assert profile.activation_bytes == report.saved_after
        assert profile.unaccounted_bytes == 0


def test_a_norm_that_did_not_run_or_is_excluded_is_left():
    class Unused(Block):
        def __init__(self):
            super().__init__()
            self.spare = nn.LayerNorm(D)

    model, x = make(Unused), batch()
    report = lomem.convert(model, x, exclude=["1.*"])
    reasons = {d.name: d.reason for d in report.left}
    assert reasons["2.spare"] == "it did not run on the example inputs"
    assert reasons["1.norm"] == reasons["1.activation"] == "it is excluded"
    assert {d.name for d in report.converted} == {"2.norm", "2.activation"}


def test_the_same_model_goes_on():
    model, x = make(), batch()
    ids = [id(p) for p in model.parameters()]
    keys = list(model.state_dict())
    seen = []
    model[1].norm.register_forward_hook(lambda *_: seen.append(1))
    modules = list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = classes(model)
    lomem.convert(model, x)
    del seen[:]
    assert [id(p) for p in model.parameters()] == ids
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(isinstance(m, c) for m, c in zip(modules, before, strict=True))
    model(x).sum().backward()
    optimizer.step()
    assert seen == [1]
    learnt = copy.deepcopy(model.state_dict())
    assert lomem.restore(model) == 8  # of each block: norm, activation, the product in the block, linear layer
    assert classes(model) == before
    assert all(not hasattr(m, "lomem_norm") and not hasattr(m, "lomem_activation") for m in modules)
    for name, value in model.state_dict().items():
        assert torch.equal(value, learnt[name])


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_state_dicts_go_both_ways(ill):
    plain, other, x = make(ill=ill), make(ill=ill), batch()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    lomem.convert(other, x)
    plain.load_state_dict(other.state_dict())
    y = plain(x)
    torch.testing.assert_close(y, other(x), rtol=0, atol=1e-6 * y.abs().max().item())  # a few roundings of float32
    again = make(ill=ill)
    other.load_state_dict(again.state_dict())
    torch.testing.assert_close(again(x), other(x), rtol=0, atol=1e-6 * y.abs().max().item())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_converted_model_is_copied_and_pickled(how):
    model, x = make(PostNorm, ill=True), batch()
    lomem.convert(model, x)
    y, grads = results(model, x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert classes(other) == classes(model)
    y2, grads2 = results(other, x)
    assert torch.equal(y, y2)
    assert distance(grads2, grads) == 0
    lomem.restore(other)
    assert classes(other) == classes(make(PostNorm))
    assert "MSLayerNorm" in str(model)


def test_the_trace_leaves_no_trace():
    class Busy(Block):
        def __init__(self):
            super().__init__()
            self.dropout, self.batch_norm = nn.Dropout(0.3), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.batch_norm(self.dropout(super().forward(x)))

    model, x = make(Busy), batch()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        lomem.convert(model, x)
        # Weight copies that autocast made without gradient must not be reused in runs with gradient.
        results(model, x)
        _, grads = results(model, x)
    assert all(grads[name].norm() > 0 for name in ("0.weight", "1.up.weight"))
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    fresh = make(Busy)
    fresh[2].eval()
    torch.set_rng_state(random)
    lomem.convert(fresh, x)
    assert torch.equal(random, torch.get_rng_state())
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in fresh.parameters())


def test_without_example_inputs_activations_are_converted():
    model = make()
    report = lomem.convert(model)
    assert actions(report) == {"1.norm": "left", "1.activation": "4bit", "2.norm": "left", "2.activation": "4bit"}
    assert report.saved_before is report.saved_after is report.difference is None
    assert "example_inputs" in str(report)


def test_a_dry_run_decides_and_changes_nothing():
    model, x = make(), batch()
    before = classes(model)
    report = lomem.convert(model, x, dry_run=True)
    assert classes(model) == before
    assert actions(report) == actions(lomem.convert(model, x))
    assert report.saved_after is None


def test_the_report_says_it_all():
    report = lomem.convert(make(), batch())
    text = str(report)
    assert "4 converted, 0 left" in text
    assert "inverted: 1.norm and 1 more [LayerNorm, layer norm (weight, bias)]: its consumers save its output" in text
    assert report.to_dict()["decisions"][0]["name"] == "1.norm"
    assert '"saved_before"' in report.to_json()
    assert report.table().row_count == 2
    assert report.table(every=True).row_count == 4


def test_words_of_a_report_are_those_that_they_print():
    model, x = make(), batch()
    report = lomem.convert(model, x, exclude=["1.norm"])
    norm = report.decisions[0]
    assert repr(norm).startswith("Decision(name='1.norm', kind='norm', module='LayerNorm'")
    assert f"{norm.action} {norm.kind}" == "left norm"
    assert norm.action == "left"
    assert norm.action != "inverted"
    assert {norm.action: 1}["left"] == 1
    plain = report.to_dict()
    assert {type(plain["decisions"][0][key]) for key in ("action", "kind")} == {str}
    assert json.loads(report.to_json())["decisions"][1]["action"] == "exact"
    assert pickle.loads(pickle.dumps(report)) == report


def test_inputs_come_as_a_tensor_a_tuple_or_a_dict():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make()

        def forward(self, x, scale=1.0):
            return {"logits": self.body(x * scale)}

    for inputs in (batch(), (batch(), 2.0), {"x": batch(), "scale": 0.5}):
        assert len(lomem.convert(Keywords(), inputs).converted) == 4


KEEP_ALL = dict.fromkeys(["activations", "norms", "pairs", "dropouts"], "keep")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model, x: lomem.convert(3, x), "model is a int, expected a torch.nn.Module"),
        (lambda model, x: lomem.convert(model, 3), "example_inputs is of type int, expected a dict"),
        (
            lambda model, x: lomem.convert(model, x, activations="9bit"),
            "activations is '9bit', expected '1bit', '2bit', ... '8bit' or 'keep'",
        ),
        (
            lambda model, x: lomem.convert(model, x, norms=True),
            "norms is True, expected 'auto', '8bit', '4bit' or 'keep'",
        ),
        (
            lambda model, x: lomem.convert(model, x, norms="2bit"),
            "norms is '2bit', expected 'auto', '8bit', '4bit' or 'keep'",
        ),
        (lambda model, x: lomem.convert(model, x, pairs=8), "pairs is 8, expected 'auto', '8bit', '4bit' or 'keep'"),
        (lambda model, x: lomem.convert(model, x, dropouts="8bit"), "dropouts is '8bit', expected 'auto' or 'keep'"),
        (lambda model, x: lomem.convert(model, x, bits=6), "bits is 6, expected 16, 8, 4, 2 or None"),
        (lambda model, x: lomem.convert(model, x, bits=True), "bits is True, expected 16, 8, 4, 2 or None"),
        (lambda model, x: lomem.convert(model, x, bits="8"), "bits is '8', expected 16, 8, 4, 2 or None"),
        (
            lambda model, x: lomem.convert(model, x, bits=16, pairs="8bit"),
            "pairs is '8bit', expected 'auto' or 'keep' with bits=16",
        ),
        (
            lambda model, x: lomem.convert(model, x, bits=4, criterion="paper"),
            "activations is '4bit', expected '2bit' with criterion='paper'",
        ),
        (
            lambda model, x: lomem.convert(model, x, criterion="best"),
            "criterion is 'best', expected 'derivative', 'primitive', 'paper' or None",
        ),
        (
            lambda model, x: lomem.convert(model, x, activations="3bit", criterion="paper"),
            "activations is '3bit', expected '2bit' with criterion='paper'",
        ),
        (lambda model, x: lomem.convert(model, x, **KEEP_ALL), "expected something to convert"),
        (
            lambda model, x: lomem.convert(model[0], x),
            "found nothing to convert in Linear: no norms, activations or dropouts",
        ),
        (lambda model, x: lomem.convert(model, x[..., :3]), "run on example_inputs in training mode: RuntimeError"),
        (lambda model, x: lomem.convert(model, {"y": x}), "run on example_inputs in training mode: TypeError"),
        (lambda model, x: lomem.convert(model, x, exclude=5), "exclude has 5, expected names of modules"),
        (lambda model, x: lomem.convert(model, x, exclude=["9.*"]), "exclude has '9.*', expected names of modules"),
        (lambda model, x: lomem.convert(model, x, tolerance=-1), "tolerance is -1, expected a number of at least 0"),
        (lambda model, x: lomem.convert(model, x, tolerance="a"), "tolerance is 'a', expected a number"),
        (lambda model, x: lomem.convert(model, x, tolerance=0.0), "differs by .*the model is unchanged"),
        (lambda model, x: lomem.restore(model), "no module of Sequential is converted, expected a converted model"),
        (lambda model, x: lomem.restore(3), "model is a int, expected a torch.nn.Module"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, match):
    model, x = make(), batch()
    before = classes(model)
    with pytest.raises((ValueError, RuntimeError), match=match):
        change(model, x)
    assert classes(model) == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_converted_model_is_not_converted_again():
    model, x = make(), batch()
    lomem.convert(model, x)
    before = classes(model)
    with pytest.raises(ValueError, match="8 modules of Sequential are already converted, expected a plain model"):
        lomem.convert(model, x)
    assert classes(model) == before


def test_a_module_that_cannot_be_exchanged_is_left():
    model, x = make(), batch()
    norm = model[1].norm
    norm.forward = norm.forward  # as accelerate's hooks do
    report = lomem.convert(model, x)
    assert {d.name: d.reason for d in report.left} == {"1.norm": "its forward is overridden on the instance"}


def test_quantized_weights_are_not_run_in_evaluation_mode():
    # In evaluation mode, bitsandbytes repacks such weights permanently.
    class Quantized(Block):
        def __init__(self):
            super().__init__()
            self.packed = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            if not self.training:
                self.packed.data = self.packed.data * 0
            return super().forward(x)

    model = make(Quantized).eval()
    assert len(lomem.convert(model, batch()).converted) == 4
    assert not model.training
    assert torch.equal(model[1].packed, torch.ones(4, dtype=torch.uint8))


def test_a_fake_model_is_planned_and_converted():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real, x = make(), batch()
    with FakeTensorMode():
        fake, y = nn.Sequential(nn.Linear(D, D), Block(), Block(), nn.Linear(D, 3)), torch.empty(4, 5, D)
        report = lomem.convert(fake, y)
    expected = lomem.convert(real, x)
    assert actions(report) == actions(expected)
    assert (report.saved_before, report.saved_after) == (expected.saved_before, expected.saved_after)
    assert report.difference is None


def test_the_bytes_are_checked(monkeypatch):
    # Whatever conversion missed, the model is left unchanged.
    model, x = make(), batch()
    before = classes(model)
    monkeypatch.setattr(lomem.conversion.plan, "settle", lambda *_: None)
    monkeypatch.setattr(lomem.conversion.ledger.Ledger, "nbytes", property(lambda self: next(sizes)))
    sizes = iter([10, 11])
    with pytest.raises(RuntimeError, match="saves 11 bytes, expected at most 10"):
        lomem.convert(model, x)
    assert classes(model) == before


@pytest.mark.parametrize("criterion", ["derivative", "paper"])
def test_the_check_runs_what_training_runs(criterion, monkeypatch):
    model, x = make(), batch()
    before = classes(model)
    # Wrong only with a gradient.
    right = lomem.functional.gelu
    monkeypatch.setattr(lomem.functional, "gelu", lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
    with pytest.raises(RuntimeError, match=r"an output of the converted model differs.*once 1.activation \(GELU\)"):
        lomem.convert(model, x, norms="keep", pairs="keep", criterion=criterion)
    assert classes(model) == before


def test_outputs_with_infinities_are_compared():
    class Masked(Block):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.eye(5, D).bool(), -torch.inf)

    model, x = nn.Sequential(nn.Linear(D, D), Masked()), batch()
    assert lomem.convert(model, x).difference < 1e-6


def test_another_object_of_a_converted_class_is_an_original():
    model, x = make(ill=True), batch()
    lomem.convert(model, x)
    norm = type(model[1].norm)(D)
    assert torch.equal(norm(x), nn.LayerNorm(D)(x))
    activation = type(model[1].activation)()
    assert torch.equal(activation(x), F.gelu(x))
    linear = type(model[1].up)(D, D)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_numpys_random_numbers_are_left_alone():
    import numpy as np

    class Random(Block):
        def forward(self, x):
            return super().forward(x) + np.random.rand() * 0  # noqa: NPY002

    model, x = make(Random), batch()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    lomem.convert(model, x)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
