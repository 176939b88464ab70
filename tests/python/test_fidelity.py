"""Gradients that lomem.convert and lomem.fit.report compare, against training steps done by hand."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import pickle
import random
import re
import warnings

import lomem
import lomem.fit
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lomem.conversion import GradientFidelity, advice, fidelity
from lomem.conversion.kinds import Action, Criterion, Function
from small_models import classes
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::lomem.GradientWarning"),
]

WIDTH = 16


# --- Models -----------------------------------------------------------------------------------------------------------


def x_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


class Gated(nn.Module):
    """A residual gated unit whose gate and up projections share an input."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        z = self.norm(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


def mlp():
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3)), (x_of(6, WIDTH),)


def gated():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Gated(), Gated()), (x_of(2, 5, WIDTH),)


def conv(depth=2, channels=6, size=8, activation=nn.SiLU):
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), activation()]
    return nn.Sequential(*layers), (x_of(4, channels, size, size),)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}


def llama(lora=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=50, max_position_embeddings=32, use_cache=False, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of the rest
                nn.init.normal_(parameter)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


MODELS = {
    "mlp": mlp,
    "gated": gated,
    "conv": conv,
    "bert": bert,
    "llama": llama,
    "lora": lambda: llama(lora=True),
}
SETTINGS = {
    "default": {},
    "16": {"bits": 16},
    "8": {"bits": 8},
    "4": {"bits": 4},
    "2": {"bits": 2},
    "paper": {"criterion": "paper"},
    "codes": {"pairs": "keep"},
}


def built(name):
    torch.manual_seed(3)
    model, batch = MODELS[name]()
    return model.train(), batch


# --- By hand ----------------------------------------------------------------------------------------------------------


def run(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def projection(output):
    """The documented loss of an output that is a tensor."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output.float() * noise).sum()


def step(model, batch, loss):
    """The gradients of a training step, by name, in float64."""
    model.zero_grad()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    loss(run(model, batch)).backward()
    torch.set_rng_state(state)
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def figures(exact, approximate):
    e, a = (torch.cat([g.flatten() for g in grads]) for grads in (exact, approximate))
    return ((e @ a) / e.norm() / a.norm()).item(), (a.norm() / e.norm()).item(), ((a - e).norm() / e.norm()).item()


def by_layer(exact, approximate):
    layers = {}
    for name in exact:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        layer: figures([exact[n] for n in names], [approximate[n] for n in names])
        for layer, names in layers.items()
        if any(exact[n].norm() > 0 for n in names)
    }


def check_figures(got, expected):
    # float64 of the same numbers: cosine and ratio to rounding, small errors to that of the difference.
    assert (got.cosine, got.ratio, got.error) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def convert(model, batch, **options):
    """Without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lomem.GradientWarning)
        return lomem.convert(model, batch, **options)


def approximate_actions(report):
    return {d.action for d in report.converted if re.fullmatch(r"\dbit( groups)?", d.action)}


def loss_of(name):
    return projection if name in ("mlp", "gated", "conv") else lambda output: output.loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_figures_are_those_of_a_step_by_hand(name, setting):
    plain, batch = built(name)
    model, _ = built(name)
    if (name, setting) == ("conv", "16"):
        pytest.skip("a conv net has nothing that is converted exactly")
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
    assert actions["mlp"]["codes"] == {"2bit"}
    assert actions["conv"]["4"] == {"4bit"}
    assert actions["conv"]["default"] == actions["conv"]["paper"] == {"2bit"}


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


def test_two_passes_and_no_more():
    calls = []
    for gradients in (False, True):
        model, batch = conv()
        model.register_forward_hook(lambda *_: calls.append(gradients))  # noqa: B023
        convert(model, batch, gradients=gradients)
    assert calls.count(True) == calls.count(False) + 2


# --- Nothing is left changed ------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Draws random numbers of every kind, counts, and has buffers that change."""

    def __init__(self):
        super().__init__()
        self.body = conv(3)[0]
        self.dropout = nn.Dropout(0.3)
        self.calls = 0
        self.generator = torch.Generator().manual_seed(5)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.total += 1
        noise = random.random() + np.random.rand() + torch.rand((), generator=self.generator)  # noqa: NPY002
        return self.dropout(self.body(x)) * noise


def states(model):
    numpy = np.random.get_state()  # noqa: NPY002
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numpy[0], numpy[1].tolist(), *numpy[2:]),
        lomem.random.get_state(),
        model.generator.get_state().tolist(),
        model.calls,
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    ]


@pytest.mark.parametrize("loss", [None, lambda output: output.square().mean() + 0 * random.random()])
def test_all_is_left_as_it_was(loss):
    model, batch = Busy(), conv(3)[1]
    model.body[1].eval()
    run(model, batch).sum().backward()
    fired = []
    handles = []
    for p in model.parameters():
        handles.append(p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated")))
        handles.append(p.register_hook(lambda g: fired.append("hook")))
    grads = {name: (p.grad, p.grad.clone(), p.grad._version) for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    before = states(model)
    report = convert(model, batch, loss=loss)
    assert report.gradient is not None
    assert states(model) == before
    assert fired == []
    assert [p._version for p in model.parameters()] == versions
    for name, p in model.named_parameters():
        grad, values, version = grads[name]
        assert p.grad is grad
        assert torch.equal(grad, values)
        assert grad._version == version
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    # The hooks are in place again, and go when they are told to.
    run(model, batch).sum().backward()
    assert fired.count("hook") == fired.count("accumulated") == len(versions)
    for handle in handles:
        handle.remove()
    run(model, batch).sum().backward()
    assert fired.count("hook") == len(versions)


def test_an_optimizer_in_the_backward_pass_takes_no_step():
    model, batch = conv()
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
        p.register_hook(lambda g, p=p: p.data.sub_(g))  # as some optimizers do
    state = copy.deepcopy(model.state_dict())
    assert convert(model, batch).gradient is not None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_gradient_that_training_gets_is_not_shifted():
    # lomem's own stream starts at the same place with and without the comparison.
    grads = []
    for gradients in (True, False):
        torch.manual_seed(0)
        model, batch = mlp()
        lomem.convert(model, batch, bits=8, gradients=gradients)
        grads.append(step(model, batch, projection))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


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


def seeded(make):
    torch.manual_seed(4)
    return make()


def of_several(*indices):
    """The documented loss of an output of several tensors."""

    def loss(parts):
        generator = torch.Generator().manual_seed(0)
        return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in (parts(i) for i in indices))

    return loss


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
        generator = torch.Generator().manual_seed(0)
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
    report = convert(model, batch)
    plain, approximate = seeded(conv)[0], seeded(conv)[0]
    convert(approximate, batch)
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


# --- Parameters -------------------------------------------------------------------------------------------------------


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
    assert approximate_actions(report) == {"2bit"}
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
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.body = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return F.silu(self.body(F.silu((x * self.turn).real)))

    plain, model, batch = seeded(Complex), seeded(Complex), (x_of(6, WIDTH),)
    report = convert(model, batch, pairs="keep")
    grads = []
    for m in (plain, model):
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


def test_too_little_memory_is_noted(monkeypatch):
    model, batch = conv()
    needed = 2 * sum(p.numel() * 4 for p in model.parameters())
    monkeypatch.setattr(fidelity, "_available", lambda device: needed - 1)
    monkeypatch.setattr(fidelity.ExactGradient, "_run", lambda self: pytest.fail("it ran"))
    (note,) = lomem.convert(model, batch).notes
    assert re.fullmatch(COMPARED + r"this takes 5\.\d+ KiB of memory \(cpu\), of which 5\.\d+ KiB are available", note)
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


# --- The warning ------------------------------------------------------------------------------------------------------


def warned(model, batch, **options):
    """The report, and the message of the warning if there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lomem.GradientWarning)
        report = lomem.convert(model, batch, **options)
    caught = [w for w in caught if issubclass(w.category, lomem.GradientWarning)]
    assert len(caught) <= 1
    if caught:
        assert caught[0].filename == __file__
        message = str(caught[0].message)
        assert message.removeprefix("lomem.convert: ") in report.notes
        return report, message
    return report, None


MESSAGE = re.compile(
    r"lomem\.convert: the gradient on the example batch has a cosine of (-?[\d.]+) to the exact one, furthest off in "
    r"(.+?)(?:, and (\d+) more below 0\.95)?: pass (.+) for a closer one"
)


def advised(message):
    """The options that a message advises."""
    options = re.findall(r'(\w+)=("?)(\w+)\2', MESSAGE.fullmatch(message)[4])
    return {name: value if quote else int(value) for name, quote, value in options}


def deep_mlp(activation, depth=24):
    layers = [m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), activation())]
    return nn.Sequential(*layers), (x_of(32, WIDTH),)


class InvertedResidual(nn.Module):
    """As in EfficientNet: 1x1, depthwise and 1x1 convolutions with BatchNorm, and a squeeze with SiLU."""

    def __init__(self, width):
        super().__init__()
        inner = 4 * width
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        self.deep = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.SiLU()
        )
        self.reduce, self.widen, self.act = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1), nn.SiLU()
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.deep(self.expand(x))
        gate = self.widen(self.act(self.reduce(y.mean((2, 3), keepdim=True))))
        return x + self.project(y * gate.sigmoid())


def efficient(depth=12):
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    return nn.Sequential(*stem, *(InvertedResidual(8) for _ in range(depth))), (x_of(4, 3, 16, 16),)


def vit(depth=4):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 256}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))
    return model, {"pixel_values": x_of(4, 3, 32, 32), "labels": torch.arange(4)}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=50, n_positions=32, use_cache=False)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


DESERVING = {
    "conv": (lambda: conv(10), {}),
    "deep conv": (lambda: conv(30), {}),
    "deep conv, 1 bit": (lambda: conv(20), {"activations": "1bit"}),
    "deep conv, paper": (lambda: conv(10), {"criterion": "paper"}),
    "shallow conv, paper": (lambda: conv(1), {"criterion": "paper"}),
    "very deep conv, paper": (lambda: conv(40), {"criterion": "paper"}),
    "deep conv, primitive": (lambda: conv(30), {"criterion": "primitive"}),
    "deep conv, primitive in 3 bits": (lambda: conv(40), {"criterion": "primitive", "activations": "3bit"}),
    "deep conv, bits=2": (lambda: conv(30), {"bits": 2}),
    "deep conv, bits=2, paper": (lambda: conv(10), {"bits": 2, "criterion": "paper"}),
    "GELU": (lambda: conv(30, activation=nn.GELU), {}),
    "MLP": (lambda: deep_mlp(nn.SiLU), {"pairs": "keep"}),
    "MLP of GELU, paper": (lambda: deep_mlp(nn.GELU, 10), {"pairs": "keep", "criterion": "paper"}),
    "MLP in 4 bits": (lambda: deep_mlp(nn.SiLU, 40), {"bits": 4}),
    "MLP in groups of 4 bits": (lambda: deep_mlp(nn.SiLU, 40), {"pairs": "4bit"}),
    "MLP in groups of 4 bits, norms too": (lambda: deep_mlp(nn.SiLU, 40), {"pairs": "4bit", "norms": "4bit"}),
    "EfficientNet": (lambda: efficient(40), {}),
    "EfficientNet, paper": (efficient, {"criterion": "paper"}),
    "ViT, paper": (vit, {"pairs": "keep", "criterion": "paper"}),
    "GPT-2, paper": (gpt2, {"pairs": "keep", "criterion": "paper"}),
}


@pytest.mark.parametrize("name", DESERVING)
def test_the_advised_setting_gives_no_warning(name):
    make, options = DESERVING[name]
    model, batch = seeded(make)
    report, message = warned(model, batch, **options)
    assert message is not None, report.gradient
    cosine, worst, more, _ = MESSAGE.fullmatch(message).groups()
    assert float(cosine) == pytest.approx(report.gradient.cosine, abs=6e-4)
    assert report.gradient.cosine < 0.95
    below = sorted((layer.cosine, name) for name, layer in report.layers.items())
    assert worst == ", ".join(f"{name} ({cosine:.3f})" for cosine, name in below[:3])
    assert int(more or 0) == sum(cosine < 0.95 for cosine, _ in below[3:])
    other, _ = seeded(make)
    try:
        better, again = warned(other, batch, **(options | advised(message)))
    except lomem.NothingToConvertError:
        assert advised(message) == {"bits": 16}
        return
    print(f"{name}: {report.gradient.cosine:.3f} {options}, {advised(message)}: {better.gradient}")
    assert again is None
    assert better.gradient is None or better.gradient.cosine >= 0.95


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["default", "8", "4"])
def test_no_warning_without_a_reason(name, setting):
    model, batch = built(name)
    report, message = warned(model, batch, **SETTINGS[setting])
    assert message is None
    assert report.gradient is None or report.gradient.cosine >= 0.95
    assert not report.notes


def test_a_warning_that_is_an_error_leaves_the_model_unconverted():
    model, batch = conv(20)
    before = classes(model)
    with pytest.raises(lomem.GradientWarning):
        lomem.convert(model, batch)
    assert classes(model) == before


def test_a_gradient_that_is_not_finite_is_warned_of(monkeypatch):
    right = lomem.functional.silu

    def wrong(x, **options):
        y = right(x, **options)
        y.register_hook(lambda grad: grad * torch.nan)
        return y

    monkeypatch.setattr(lomem.functional, "silu", wrong)
    model = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU())
    x = x_of(2, 6, 4, 4)
    with pytest.warns(lomem.GradientWarning, match="is not finite, as it was before the conversion: pass bits=16"):
        report = lomem.convert(model, x)
    assert report.gradient is None
    json.loads(report.to_json())


# --- The advice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "criterion", "errors"),
    [
        ("gelu", "derivative", (0.320, 0.141, 0.086, 0.042, 0.003)),
        ("gelu", "primitive", (0.320, 0.357, 0.112, 0.054, 0.004)),
        ("silu", "derivative", (0.421, 0.148, 0.103, 0.049, 0.003)),
        ("silu", "primitive", (0.421, 0.471, 0.184, 0.085, 0.005)),
    ],
)
def test_errors_of_step_functions_are_those_of_the_docs(function, criterion, errors):
    got = [advice.step_error(Function(function), bits, Criterion(criterion)) for bits in (1, 2, 3, 4, 8)]
    assert got == pytest.approx(errors, abs=5e-4)


def test_the_paper_is_first_advised_another_criterion():
    model, batch = seeded(lambda: conv(1))
    _, message = warned(model, batch, criterion="paper")
    assert advised(message) == {"criterion": "derivative"}


def test_groups_are_advised_more_bits():
    wanted = {"bits": 4}, {"pairs": "4bit"}, {"pairs": "4bit", "norms": "4bit"}
    for options in wanted:
        model, batch = seeded(lambda: deep_mlp(nn.SiLU, 40))
        _, message = warned(model, batch, **options)
        given = {name: "8bit" for name in options if name != "bits"}
        assert advised(message) == {"bits": 8} | given


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
