"""Gradients that lomem.convert compares, against training steps done by hand."""

import contextlib
import copy
import dataclasses
import json
import pickle
import re

import lomem
import lomem.fit
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fidelity_helpers import (
    MODELS,
    SETTINGS,
    WIDTH,
    Complex,
    approximate_actions,
    built,
    by_layer,
    check_figures,
    conv,
    convert,
    figures,
    loss_of,
    mlp,
    projection,
    seeded,
    step,
    x_of,
)
from lomem.conversion import GradientFidelity, fidelity
from lomem.conversion.kinds import Action
from small_models import classes
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::lomem.GradientWarning"),
]


# --- The figures ------------------------------------------------------------------------------------------------------


#: A conv net has nothing that is converted exactly.
CASES = [(name, setting) for setting in SETTINGS for name in MODELS if (name, setting) != ("conv", "16")]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_the_figures_are_those_of_a_step_by_hand(name, setting):
    plain, batch = built(name)
    model, _ = built(name)
    report = convert(model, batch, **SETTINGS[setting])
    if not approximate_actions(report):
        assert report.gradient is None
        assert report.layers == {}
        assert report.notes == ()
        assert "gradient on the example batch" not in str(report)
        assert setting in ("default", "16", "paper", "codes")
        return
    assert setting != "16"
    exact, approximate = step(plain, batch, loss_of(name)), step(model, batch, loss_of(name))
    assert exact.keys() == approximate.keys()
    check_figures(report.gradient, figures(exact.values(), approximate.values()))
    expected = by_layer(exact, approximate)
    assert report.layers.keys() == expected.keys()
    for layer, want in expected.items():
        check_figures(report.layers[layer], want)
    assert 0 < report.gradient.error < 2


def test_models_and_settings_meet_step_functions_and_groups():
    actions = {"mlp": {}, "conv": {}}
    for name, found in actions.items():
        for setting, options in SETTINGS.items():
            model, batch = built(name)
            with contextlib.suppress(lomem.NothingToConvertError):
                found[setting] = approximate_actions(convert(model, batch, dry_run=True, **options))
    assert actions["mlp"]["8"] == {"8bit groups"}
    assert actions["mlp"]["codes"] == {"4bit"}
    assert actions["conv"]["4"] == {"4bit"}
    assert (actions["conv"]["default"], actions["conv"]["paper"]) == ({"4bit"}, {"2bit"})


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_report_says_it_in_one_line():
    model, batch = conv()
    report = convert(model, batch)
    line = f"gradient on the example batch: cosine {report.gradient.cosine:.3f}, "
    line += f"{report.gradient.ratio:.3g} times the norm, relative error {report.gradient.error:.2g}"
    assert line in str(report).splitlines()[0]
    assert line in report.table().caption.splitlines()
    written = json.loads(report.to_json())
    assert written["gradient"] == dataclasses.asdict(report.gradient)
    assert written["layers"]["0"] == dataclasses.asdict(report.layers["0"])
    assert pickle.loads(pickle.dumps(report)) == report
    assert str(GradientFidelity(0.9984, 1.012, 0.0563)) == "cosine 0.998, 1.01 times the norm, relative error 0.056"


def test_reports_of_earlier_versions_have_none():
    model, batch = conv()
    report = convert(model, batch)
    state = {name: value for name, value in vars(report).items() if name not in ("gradient", "layers")}
    old = object.__new__(type(report))
    old.__setstate__(state)
    assert old.gradient is None
    assert old.layers == {}
    assert "cosine" not in str(old)
    assert old.to_dict()["gradient"] is None


@pytest.mark.parametrize("action", Action)
def test_actions_know_their_bits(action):
    codes, groups = re.fullmatch(r"(\d)bit", action), re.fullmatch(r"(\d)bit groups", action)
    assert action.code_bits == (int(codes[1]) if codes else None)
    assert action.group_bits == (int(groups[1]) if groups else None)
    assert action.exact == (codes is groups is None)


@pytest.mark.parametrize("options", [{"dry_run": True}, {"gradients": False}, None])
def test_nothing_is_measured_if_it_is_not_asked_for(options, monkeypatch):
    monkeypatch.setattr(fidelity.ExactGradient, "_run", lambda self: pytest.fail("it ran"))
    model, batch = conv()
    report = lomem.convert(model) if options is None else lomem.convert(model, batch, **options)
    assert report.gradient is None
    assert report.notes == ()


def test_exact_conversions_need_no_pass(monkeypatch):
    monkeypatch.setattr(fidelity.ExactGradient, "_run", lambda self: pytest.fail("it ran"))
    for options in ({}, {"bits": 16}):
        model, batch = mlp()
        assert lomem.convert(model, batch, **options).notes == ()


def test_the_check_of_the_outputs_makes_no_difference():
    reports = []
    for check in (True, False):
        model, batch = seeded(conv)
        reports.append(convert(model, batch, check=check))
    assert reports[1].difference is None
    assert (reports[0].gradient, reports[0].layers) == (reports[1].gradient, reports[1].layers)


def test_two_passes_and_no_more():
    calls = []
    for gradients in (False, True):
        model, batch = conv()
        model.register_forward_hook(lambda *_: calls.append(gradients))  # noqa: B023
        convert(model, batch, gradients=gradients)
    assert calls.count(True) == calls.count(False) + 2


# --- The loss ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    inside: tuple


class Wrapped(nn.Module):
    """A model with another kind of output."""

    def __init__(self, wrap, **options):
        super().__init__()
        self.body, self.wrap = conv(**options)[0], wrap

    def forward(self, x):
        return self.wrap(self.body(x))


OUTPUTS = {
    "a tuple": (lambda y: (y, 3, y.mean((2, 3)), y.detach(), None), lambda o: [o[0], o[2]]),
    "a dict": (lambda y: {"a": y, "ids": y.argmax(1), "b": [y.tanh()]}, lambda o: [o["a"], o["b"][0]]),
    "a dataclass": (lambda y: Output(y, (y.exp(), "text")), lambda o: [o.logits, o.inside[0]]),
    "bfloat16": (lambda y: y.bfloat16(), lambda o: [o]),
    "float64": (lambda y: y.double(), lambda o: [o]),
    "a detached loss": (lambda y: {"loss": y.detach().mean(), "y": y}, lambda o: [o["y"]]),
    "a loss per element": (lambda y: {"loss": y.mean((1, 2, 3)), "y": y}, lambda o: [o["loss"], o["y"]]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_any_form(name):
    wrap, parts = OUTPUTS[name]

    def loss(output):
        generator = torch.Generator().manual_seed(0x6C6F6D656D)
        return sum((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in parts(output))

    plain, model = seeded(lambda: Wrapped(wrap)), seeded(lambda: Wrapped(wrap))
    batch = conv()[1]
    report = convert(model, batch)
    expected = figures(step(plain, batch, loss).values(), step(model, batch, loss).values())
    check_figures(report.gradient, expected)


class WithLoss(dict):
    """As transformers' outputs: a mapping with attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"loss": y.square().mean(), "logits": y},
        lambda y: WithLoss(loss=y.square().mean(), logits=y),
        lambda y: y.square().mean(),
        lambda y: y.square().mean().reshape(1),
        lambda y: dataclasses.make_dataclass("Out", ["loss"])(y.square().mean()),
    ],
)
def test_a_loss_of_the_models_own(wrap):
    model, batch = seeded(lambda: Wrapped(wrap)), conv()[1]
    report = convert(model, batch, rounding="nearest")
    plain, approximate = seeded(conv)[0], seeded(conv)[0]
    convert(approximate, batch, rounding="nearest")
    expected = [step(m, batch, lambda y: y.square().mean()).values() for m in (plain, approximate)]
    check_figures(report.gradient, figures(*expected))


def test_a_loss_of_the_users():
    (plain, batch), (model, _) = seeded(conv), seeded(conv)
    target = torch.randint(0, 6, (4, 8, 8))
    report = convert(model, batch, loss=lambda y: F.cross_entropy(y, target))
    expected = [step(m, batch, lambda y: F.cross_entropy(y, target)).values() for m in (plain, model)]
    check_figures(report.gradient, figures(*expected))
    other, _ = seeded(conv)
    assert convert(other, batch).gradient != report.gradient


@pytest.mark.parametrize("setting", [{}, {"bits": 8}])
def test_under_autocast(setting):
    (plain, batch), (model, _) = seeded(lambda: conv(3)), seeded(lambda: conv(3))
    with torch.autocast("cpu", torch.bfloat16):
        report = convert(model, batch, **setting)
        grads = [step(m, batch, projection) for m in (plain, model)]
    check_figures(report.gradient, figures(*(g.values() for g in grads)))
    # Rounding in bfloat16 is in both.
    assert report.gradient.error < (0.5 if not setting else 0.1)


def test_without_gradients_around():
    model, batch = conv()
    with torch.no_grad():
        assert convert(model, batch).gradient is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_dtypes(dtype):
    (plain, batch), (model, _) = seeded(conv), seeded(conv)
    plain, model, batch = plain.to(dtype), model.to(dtype), (batch[0].to(dtype),)
    report = convert(model, batch)
    check_figures(report.gradient, figures(*(step(m, batch, projection).values() for m in (plain, model))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_projection_is_the_same_every_time(dtype):
    outputs = torch.ones(3, 5, requires_grad=True), torch.ones(4, requires_grad=True)
    expected = projection(outputs[0])
    try:
        torch.set_default_dtype(dtype)
        assert fidelity.default_loss(outputs[0]) == expected
        assert fidelity.default_loss(outputs).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_projection_is_not_the_batch():
    # Batches are drawn in the same way, from small seeds: the loss would be |x|^2 for a model that returns its input.
    for seed in range(100):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        assert abs(fidelity.default_loss(x).item()) < 6 * 1000**0.5


# --- Parameters -------------------------------------------------------------------------------------------------------


def test_layers_without_a_gradient_are_counted():
    # As LoRA's A at first, or all that a zero output layer hides.
    model, batch = conv(3)
    model.append(nn.Conv2d(6, 6, 1))
    nn.init.zeros_(model[-1].weight)
    report = convert(model, batch)
    assert list(report.layers) == ["9"]
    assert report.notes == ("6 of 7 layers with trained parameters have no gradient on the example batch yet",)
    nn.init.normal_(model[-1].weight)
    lomem.restore(model)
    report = convert(model, batch)
    assert len(report.layers) == 7
    assert report.notes == ()


def test_tied_weights_count_once_for_the_first_module():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
            self.last.weight = self.first.weight
            self.again = self.first

        def forward(self, x):
            return self.last(self.act(self.again(self.act(self.first(x)))))

    plain, model, batch = seeded(Tied), seeded(Tied), (x_of(6, WIDTH),)
    report = convert(model, batch, pairs="keep")
    exact, approximate = (step(m, batch, projection) for m in (plain, model))
    assert set(exact) == {"first.weight", "first.bias", "last.bias"}
    check_figures(report.gradient, figures(exact.values(), approximate.values()))
    assert list(report.layers) == ["first", "last"]
    check_figures(report.layers["first"], by_layer(exact, approximate)["first"])
    assert report.layers["last"].error == 0


def test_parameters_of_the_model_itself_frozen_unused_and_sparse_ones():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, WIDTH, sparse=True)
            self.scale = nn.Parameter(torch.ones(WIDTH))
            self.inside, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.unused = nn.Linear(WIDTH, WIDTH)
            self.off = nn.Parameter(torch.zeros(()))

        def forward(self, ids):
            x = self.table(ids)
            return self.last(F.gelu(self.inside(F.gelu(x) * self.scale))) + 0 * self.off

    plain, model = seeded(Odd), seeded(Odd)
    batch = (torch.arange(10),)
    report = convert(model, batch, pairs="keep")
    assert approximate_actions(report) == {"4bit"}
    grads = []
    for m in (plain, model):
        found = step(m, batch, projection)
        grads.append({name: g.to_dense() for name, g in found.items()})
    check_figures(report.gradient, figures(*(g.values() for g in grads)))
    expected = by_layer(*grads)
    assert set(report.layers) == {"", "table", "inside"} == set(expected)
    for layer, want in expected.items():
        check_figures(report.layers[layer], want)


def test_complex_parameters():
    plain, model, batch = seeded(Complex), seeded(Complex), (x_of(6, WIDTH),)
    report = convert(model, batch, pairs="keep")
    grads = []
    for m in (plain, model):
        torch.manual_seed(0)  # which the codes are drawn with
        projection(m(*batch)).backward()
        grads.append([torch.view_as_real(m.turn.grad).double(), *(p.grad.double() for p in m.body.parameters())])
    check_figures(report.gradient, figures(*grads))


# --- What is skipped --------------------------------------------------------------------------------------------------

COMPARED = "gradients were not compared: "


def raising(error, when):
    """A model that raises in its backward pass for the `when`-th time."""

    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.count = conv()[0], []

        def forward(self, x):
            y = self.body(x)
            if y.requires_grad:
                y.register_hook(self.hook)
            return y * 1

        def hook(self, grad):
            self.count.append(1)
            if len(self.count) == when:
                raise error

    return Raises()


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.body, self.reentrant = nn.Conv2d(6, 6, 1), conv(1)[0], reentrant

    def forward(self, x):
        return checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)


class Unrepeatable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.seen = conv()[0], []

    def forward(self, x):
        self.seen.append(1)
        return self.body(x) * len(self.seen)


def frozen():
    return conv()[0].requires_grad_(False)


def cut_off():
    """A trained parameter that the output does not depend on."""
    model = Wrapped(lambda y: y)
    model.requires_grad_(False)
    model.extra = nn.Parameter(torch.zeros(()))
    return model


def needs_input():
    x = conv()[1][0].requires_grad_()
    return (x,)


NO_OUTPUT = "no output of the model requires a gradient"
SKIPPED = {
    "frozen": (frozen, needs_input, "no parameter is trained"),
    "reaches none": (cut_off, needs_input, "the loss depends on no parameter that is trained"),
    "nothing differentiable": (
        lambda: Wrapped(lambda y: y.argmax(1)),
        None,
        "no output of the model requires a gradient",
    ),
    "text": (lambda: Wrapped(lambda y: "done"), None, NO_OUTPUT),
    "unrepeatable": (Unrepeatable, None, "the original model's outputs are not reproducible"),
    "zero": (lambda: Wrapped(lambda y: y * 0), None, "the exact gradient is 0"),
    "infinite": (lambda: Wrapped(lambda y: y * torch.inf), None, "the exact gradient is not finite"),
    "not a number": (lambda: Wrapped(lambda y: y * torch.nan), None, "the exact gradient is not finite"),
    "reentrant": (lambda: Checkpointed(True), None, "RuntimeError: .*use_reentrant"),
    "first pass": (lambda: raising(ZeroDivisionError("by\nzero"), 1), None, "ZeroDivisionError: by zero"),
    "second pass": (lambda: raising(ZeroDivisionError("by\nzero"), 2), None, "ZeroDivisionError: by zero"),
    "memory": (lambda: raising(MemoryError(), 1), None, "MemoryError: "),
    "memory of torch": (lambda: raising(torch.OutOfMemoryError("out of it"), 2), None, "OutOfMemoryError: out of it"),
    "a long message": (lambda: raising(ValueError("x" * 9999), 1), None, r"ValueError: x{200,}\.\.\."),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_compared_is_noted_and_converted(name):
    make, make_batch, reason = SKIPPED[name]
    model = make()
    batch = conv()[1] if make_batch is None else make_batch()
    state = copy.deepcopy(model.state_dict())
    report = lomem.convert(model, batch)
    assert report.gradient is None
    assert report.layers == {}
    notes = [note for note in report.notes if note.startswith(COMPARED)]
    assert len(notes) == 1
    assert re.fullmatch(COMPARED + reason + ".*", notes[0]), notes
    assert "\n" not in notes[0]
    assert len(notes[0]) < 400
    assert report.converted
    assert lomem.restore(model) > 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_checkpoints_that_are_not_reentrant_are_compared():
    (plain, batch), model = (seeded(lambda: Checkpointed(False)), conv()[1]), seeded(lambda: Checkpointed(False))
    report = convert(model, batch)
    check_figures(report.gradient, figures(*(step(m, batch, projection).values() for m in (plain, model))))


def test_models_without_data_are_skipped():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake, x = conv()[0], torch.empty(4, 6, 8, 8)
        report = lomem.convert(fake, x)
    assert report.notes == (f"{COMPARED}the model's tensors have no data",)
    report = lomem.convert(conv()[0].to("meta"), torch.empty(4, 6, 8, 8, device="meta"))
    assert report.notes == (f"{COMPARED}the model's tensors have no data",)


def test_distributed_tensors_are_skipped():
    model, batch = conv()
    model[0].weight.full_tensor = None  # as torch.distributed.tensor.DTensor has
    assert lomem.convert(model, batch).notes == (f"{COMPARED}parameters are distributed over several devices",)


def fused():
    """Parameters whose gradients are added elsewhere by the backward pass, as Megatron's are."""
    model = conv()[0]
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)
    return model


def test_gradients_that_are_added_elsewhere_are_skipped():
    (note,) = convert(fused(), conv()[1]).notes
    assert note == COMPARED + "parameters have a main_grad, to which a backward pass may add"


@pytest.mark.parametrize("name", ["DistributedDataParallel", "SyncBatchNorm", "FullyShardedDataParallel"])
def test_models_that_wait_for_other_processes_are_skipped(name, tmp_path, monkeypatch):
    # A process that cannot compare would leave the others waiting in their passes.
    model, _ = conv()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if name == "DistributedDataParallel":
            model = nn.parallel.DistributedDataParallel(model)
        elif name == "FullyShardedDataParallel":
            from torch.distributed.fsdp import FullyShardedDataParallel

            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            model.append(nn.SyncBatchNorm(6).eval())
        assert fidelity._others(model) is None  # there are no others
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        assert fidelity._others(model) == f"{name} communicates with other processes"
        assert fidelity._others(conv()[0]) is None
    finally:
        dist.destroy_process_group()


def test_too_little_memory_is_noted(monkeypatch):
    model, batch = conv()
    needed = 3 * sum(p.numel() * 4 for p in model.parameters())
    monkeypatch.setattr(fidelity, "_available", lambda device: needed - 1)
    monkeypatch.setattr(fidelity.ExactGradient, "_run", lambda self: pytest.fail("it ran"))
    (note,) = lomem.convert(model, batch).notes
    assert re.fullmatch(COMPARED + r"this takes 7\.\d+ KiB of memory \(cpu\), of which 7\.\d+ KiB are available", note)
    monkeypatch.undo()
    monkeypatch.setattr(fidelity, "_available", lambda device: needed)
    assert convert(conv()[0], batch).gradient is not None
    monkeypatch.setattr(fidelity, "_available", lambda device: None)  # unknown
    assert convert(conv()[0], batch).gradient is not None


def test_memory_of_other_systems(monkeypatch):
    here = fidelity._available(torch.device("cpu"))
    assert 2**20 < here < 2**50
    monkeypatch.setattr(fidelity.Path, "read_text", lambda *_, **__: "MemTotal: 3 kB\nMemAvailable:   12 kB\n")
    assert fidelity._available(torch.device("cpu")) == 12 * 1024
    monkeypatch.setattr(fidelity.Path, "read_text", lambda *_, **__: "nothing\n")
    assert 2**20 < fidelity._available(torch.device("cpu")) < 2**50
    monkeypatch.delattr(fidelity.os, "sysconf")
    assert fidelity._available(torch.device("cpu")) is None
    assert fidelity._available(torch.device("meta")) is None


def test_what_is_kept_between_the_passes_is_freed():
    model, batch = conv()
    exact = fidelity.ExactGradient(model, lomem._trace.batch.as_batch("", "", batch), None)
    assert exact.missing is None
    assert len(exact._gradients) == len(list(model.parameters()))
    whole, _ = exact.compare()
    assert exact._gradients == []
    assert (whole.cosine, whole.ratio, whole.error) == pytest.approx((1, 1, 0), abs=1e-12)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": 1}, "gradients is 1, expected True or False"),
        ({"gradients": None}, "gradients is None, expected True or False"),
        ({"loss": 3}, "loss is 3, expected None or a function that maps the model's output to a scalar"),
        ({"loss": "mean", "dry_run": True}, "loss is 'mean', expected None or a function that maps"),
        ({"loss": lambda y: y}, r"loss returned shape \(4, 6, 8, 8\), expected a tensor of one element that requires"),
        ({"loss": lambda y: y.detach().sum()}, r"loss returned shape \(\), expected a tensor of one element that req"),
        ({"loss": lambda y: y.sum().item()}, "loss returned float, expected a tensor of one element that requires"),
        ({"loss": lambda y: None}, "loss returned NoneType, expected a tensor of one element that requires gradients"),
    ],
)
def test_wrong_arguments_change_nothing(options, message):
    model, batch = conv()
    before, state = classes(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^lomem.convert: {message}"):
        lomem.convert(model, batch, **options)
    assert classes(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_loss_that_raises_is_noted():
    model, batch = conv()
    report = lomem.convert(model, batch, loss=lambda y: y.logits)
    assert report.notes == (f"{COMPARED}AttributeError: 'Tensor' object has no attribute 'logits'",)


def test_a_loss_that_is_a_scalar_once_is_noted():
    model, batch = conv()
    values = iter([torch.sum, torch.detach])
    report = lomem.convert(model, batch, loss=lambda y: next(values)(y))
    assert report.notes == (
        f"{COMPARED}loss returned shape (4, 6, 8, 8), expected a tensor of one element that requires gradients",
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("when", [1, 2])
def test_an_interrupt_leaves_the_model_unconverted(error, when):
    model, batch = raising(error(), when), conv()[1]
    before, state = classes(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        lomem.convert(model, batch)
    assert classes(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(model.count) == when
