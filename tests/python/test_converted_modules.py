"""A converted module looks and behaves like the original when it is inspected, called, changed and restored."""

import abc
import copy
import gc
import inspect
import pickle
import threading
import types
import weakref

import lomem
import pytest
import torch
import torch.nn.functional as F
import transformers
from lomem.conversion import exchange
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

D = 16


class Block(nn.Module):
    """A block with a docstring."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU()
        self.gate, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, hidden_states, scale: float = 1.0, *, labels=None) -> torch.Tensor:
        """Runs it."""
        h = self.norm(hidden_states)
        return hidden_states + self.down(self.act(self.up(h)) + F.silu(self.gate(h))) * scale


def converted(ill=False):
    """Blocks in which a call, a norm, linear layers and an activation are converted."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    if ill:
        with torch.no_grad():
            for block in model:
                block.norm.weight[0] = 0
    plain = copy.deepcopy(model)
    lomem.convert(model, torch.randn(2, 3, D))
    return model, plain


def test_classes_are_looked_at():
    model, plain = converted(ill=True)
    kinds = set()
    for (name, module), before in zip(model.named_modules(), plain.modules(), strict=True):
        kind, original = type(module), type(before)
        if kind is original:
            continue
        kinds.add(original)
        assert (kind.__name__, kind.__qualname__, kind.__module__) == (
            original.__name__,
            original.__qualname__,
            original.__module__,
        )
        assert kind.__doc__ == original.__doc__, name
        assert isinstance(module, original)
        assert issubclass(kind, original)
        assert inspect.signature(module.forward) == inspect.signature(before.forward)
        assert inspect.signature(kind.forward) == inspect.signature(original.forward)
        assert inspect.getfullargspec(module.forward) == inspect.getfullargspec(before.forward)
        assert module.forward.__doc__ == before.forward.__doc__
        assert module.forward.__name__ == "forward"
        assert repr(module) != repr(before)  # the only place where it shows
    assert kinds == {Block, nn.LayerNorm, nn.Linear, nn.GELU}


def test_modules_are_found_by_the_name_of_their_class():
    # As FSDP's wrapping by class name does: it takes the class of the first module of that name, then its instances.
    for exclude in ("0", "1"):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        lomem.convert(model, torch.randn(2, 3, D), exclude=[exclude])
        assert type(model[0]) is not type(model[1])
        for name in ("Block", "LayerNorm", "GELU", "Linear"):
            kind = next(type(m) for m in model.modules() if type(m).__name__ == name)
            of_name = [m for m in model.modules() if type(m).__name__ == name]
            assert all(isinstance(m, kind) for m in of_name)
            assert not any(isinstance(m, kind) for m in model.modules() if m not in of_name)


def test_a_trainer_sees_the_arguments(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.a = nn.Embedding(9, D), nn.LayerNorm(D), nn.Linear(D, D)
            self.b = nn.Linear(D, 3)

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.b(F.gelu(self.a(self.norm(self.embed(input_ids)))).mean(1))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Net()
    lomem.convert(model, {"input_ids": torch.randint(0, 9, (2, 5)), "labels": torch.tensor([0, 1])})
    options = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[], save_strategy="no")
    trainer = transformers.Trainer(model, options)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
    assert trainer.label_names == ["labels"]


def test_a_saved_configuration_names_the_architecture(tmp_path):
    class Config(transformers.PretrainedConfig):
        model_type = "lomem_test"

    class Net(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
            self.post_init()

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    model = Net(Config())
    lomem.convert(model, torch.randn(2, D))
    model.save_pretrained(tmp_path)
    assert Config.from_pretrained(tmp_path).architectures == ["Net"]
    x = torch.randn(2, D)
    assert torch.equal(Net.from_pretrained(tmp_path)(x), model(x))


def _add(y):
    y += 1.0
    return y


def _multiply(y):
    y *= 0.5
    return y


def _assign(y):
    y[..., 0] = 0
    return y


#: In-place changes of a linear layer's result.
IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "elu": nn.ELU(inplace=True),
    "dropout": nn.Dropout(0.1, inplace=True),
    "add": _add,
    "multiply": _multiply,
    "assign": _assign,
    "view": lambda y: y.view(-1).relu_().view_as(y),
}


class InPlace(nn.Module):
    def __init__(self, change, bias):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(D), nn.Linear(D, 2 * D, bias=bias), nn.Linear(2 * D, D)
        self.change = [change]  # in a list, so that it is not a submodule

    def forward(self, x):
        h = self.norm(x + 1)
        return x + h + self.b(self.change[0](self.a(h)))


def run(model, x, autocast=False):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(grads, expected):
    a, b = (torch.cat([g.double().flatten() for g in gs.values()]) for gs in (grads, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(D,), (4, D), (4, 5, D), (2, 4, 5, D), (2, 1, 3, 2, D)], ids=lambda s: f"{len(s)}-D")
@pytest.mark.parametrize("action", ["inverted", "normalized", "two outputs"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_in_place_behind_a_linear_layer(change, action, shape, bias):
    torch.manual_seed(0)
    model, x = InPlace(IN_PLACE[change], bias), torch.randn(shape)
    if action == "normalized":
        model.norm.weight.data[0] = 0
        if len(shape) == 1:
            # Nothing is shared with linear layers of one row, so there is nothing to change.
            with pytest.raises(lomem.NothingToConvertError, match="no linear layer takes its output directly"):
                lomem.convert(model, x, activations="keep")
            return
    plain, autocast = copy.deepcopy(model), action == "two outputs"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # First as in the example run, then in a run that differs from it.
        report = lomem.convert(model, x, activations="keep")
        other = InPlace(torch.tanh, bias)
        other.load_state_dict(model.state_dict())
        lomem.convert(other, x, activations="keep")
        other.change = [IN_PLACE[change]]
    assert [d.action for d in report.converted] == [action]
    y, expected = run(plain, x, autocast)
    for m in (model, other):
        z, grads = run(m, x, autocast)
        # Rounding in float32; in bfloat16 under autocast.
        assert (z - y).norm() <= (1e-2 if autocast else 1e-6) * y.norm()
        assert distance(grads, expected) < (2e-2 if autocast else 1e-5)


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = 1.3

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Configured(nn.Module):
    """A norm that reads its settings from another object."""

    def __init__(self, config):
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.ones(D)), config

    def eps(self):
        config = self.config[0] if isinstance(self.config, list) else self.config
        return config["eps"] if isinstance(config, dict) else config.eps

    def forward(self, x):
        return F.rms_norm(x, (D,), self.weight, self.eps())


def _set(name, value):
    return lambda m: setattr(m, name, value() if callable(value) else value)


def _all(*changes):
    def change(m):
        for c in changes:
            c(m)

    return change


#: Changes to a module after its conversion.
CHANGES = {
    "eps": (lambda: nn.LayerNorm(D), _set("eps", 1.0)),
    "eps 0": (lambda: nn.LayerNorm(D), _set("eps", 0.0)),
    "eps of rms norm": (lambda: nn.RMSNorm(D), _set("eps", 0.5)),
    "eps becomes None": (lambda: nn.RMSNorm(D, eps=0.5), _set("eps", None)),
    "approximate": (nn.GELU, _set("approximate", "tanh")),
    "inplace": (nn.SiLU, _set("inplace", True)),
    "beta": (Swish, _set("beta", 2.6)),
    "beta 0": (Swish, _set("beta", 0.0)),
    "beta negative": (Swish, _set("beta", -1.0)),
    "another weight": (lambda: nn.LayerNorm(D), _set("weight", lambda: nn.Parameter(torch.randn(D)))),
    "no weight": (lambda: nn.LayerNorm(D), _set("weight", None)),
    "no bias": (lambda: nn.LayerNorm(D), _set("bias", None)),
    "a bias": (lambda: nn.LayerNorm(D, bias=False), _set("bias", lambda: nn.Parameter(torch.randn(D)))),
    "a weight": (
        lambda: nn.LayerNorm(D, elementwise_affine=False),
        _set("weight", lambda: nn.Parameter(torch.randn(D))),
    ),
    "a configuration": (
        lambda: Configured(types.SimpleNamespace(eps=1e-5)),
        lambda m: setattr(m.config, "eps", 0.5),
    ),
    "a dict": (lambda: Configured({"eps": 1e-5}), lambda m: m.config.update(eps=0.5)),
    "a dict in a list": (lambda: Configured([{"eps": 1e-5}]), lambda m: m.config[0].update(eps=0.5)),
    "normalized_shape": (
        lambda: nn.LayerNorm(D),
        _all(
            _set("weight", lambda: nn.Parameter(torch.randn(5, D))),
            _set("bias", None),
            _set("normalized_shape", (5, D)),
        ),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_conversion_is_seen(change):
    make, edit = CHANGES[change]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), make(), nn.Linear(D, D)), torch.randn(4, 5, D)
    report = lomem.convert(model, x, activations="8bit")
    assert len(report.converted) == 1
    torch.manual_seed(2)
    edit(model[1])
    plain = copy.deepcopy(model)
    lomem.restore(plain)
    y, expected = run(plain, x)
    z, grads = run(model, x)
    if report.converted[0].kind == "activation":
        assert torch.equal(z, y)
        # The largest error of 8-bit steps. An unnoticed change would be off by at least 0.1.
        assert distance(grads, expected) < 0.02
    else:
        # Rounding in float32.
        assert (z - y).norm() <= 1e-6 * y.norm()
        assert distance(grads, expected) < 1e-5


def test_a_forward_that_the_class_gets_later_is_run():
    class Own(nn.LayerNorm):
        pass

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), Own(D), nn.Linear(D, D)), torch.randn(4, D)
    lomem.convert(model, x)
    Own.forward = lambda self, x: 2 * x
    assert torch.equal(model(x), model[2](2 * model[0](x)))
    lomem.restore(model)
    Own.forward = nn.LayerNorm.forward
    assert len(lomem.convert(model, x).converted) == 1
    assert torch.equal(model(x), model[2](model[1](model[0](x))))
    assert not torch.equal(model(x), model[2](2 * model[0](x)))


def test_a_stored_forward_works_after_restoring():
    # As stored by accelerate's hooks and by monkey patches, on the object or elsewhere.
    model, plain = converted(ill=True)
    x = torch.randn(2, 3, D)
    y = plain(x)
    stored = {name: module.forward for name, module in model.named_modules()}
    for module in model.modules():
        module._old_forward = module.forward

        def forward(*args, module=module, **kwargs):
            return module._old_forward(*args, **kwargs)

        module.forward = forward
    assert lomem.restore(model) == 10
    for module, before in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(before)
    z, grads = run(model, x)
    torch.testing.assert_close(z, y, rtol=0, atol=0)
    _, expected = run(plain, x)
    assert distance(grads, expected) == 0
    for module in model.modules():
        del module.forward
    assert torch.equal(stored["0"](x), plain[0](x))
    # After another conversion, it runs that one's forward.
    lomem.convert(model, x)
    assert torch.equal(stored["0"](x), model[0](x))


def test_a_stored_forward_is_found_by_convert():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    model[0].norm.forward = model[0].norm.forward
    report = lomem.convert(model, torch.randn(2, 3, D))
    actions = {d.name: (d.action, d.reason) for d in report.decisions}
    assert actions["0.norm"] == ("left", "its forward is overridden on the instance")
    assert actions["1.norm"][0] == "inverted"


class Registering(nn.LayerNorm):
    subclasses: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, *, tag="none", **kwargs):
        super().__init_subclass__(**kwargs)
        Registering.subclasses.append(cls)


class Demanding(nn.LayerNorm):
    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)


class Meta(type):
    def __new__(mcs, name, bases, names, **kwargs):
        return super().__new__(mcs, name, bases, names)


class WithMeta(nn.LayerNorm, metaclass=Meta):
    pass


class Abstract(nn.LayerNorm, abc.ABC):
    pass


class FinalMeta(type):
    def __new__(mcs, name, bases, names):
        if any(isinstance(base, FinalMeta) for base in bases):
            raise TypeError("no subclasses, please")
        return super().__new__(mcs, name, bases, names)


class Final(nn.LayerNorm, metaclass=FinalMeta):
    pass


class Slots(nn.LayerNorm):
    __slots__ = ("extra",)


@pytest.mark.parametrize("kind", [Registering, Demanding, WithMeta, Abstract, Final, Slots])
def test_peculiar_classes(kind):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(D, D), kind(D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)),
        torch.randn(4, D),
    )
    plain = copy.deepcopy(model)
    y, expected = run(plain, x)
    report = lomem.convert(model, x)
    verdicts = {d.name: d for d in report.decisions}
    assert verdicts["3"].action == "inverted"
    if kind is Final:
        assert verdicts["1"].action == "left"
        assert verdicts["1"].reason == "its class cannot be subclassed: TypeError: no subclasses, please"
    else:
        assert verdicts["1"].action == "inverted"
    assert Registering.subclasses == []
    z, grads = run(model, x)
    assert (z - y).norm() <= 1e-6 * y.norm()
    assert distance(grads, expected) < 1e-5
    again = copy.deepcopy(model)
    assert torch.equal(again(x), z)
    if kind in (Registering, Abstract):
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), z)
    lomem.restore(model)
    assert type(model[1]) is kind


def test_converted_classes_end_with_their_modules():
    class Own(nn.LayerNorm):
        pass

    def once():
        model = nn.Sequential(nn.Linear(D, D), Own(D), nn.Linear(D, D))
        lomem.convert(model, torch.randn(2, D))
        kind = weakref.ref(type(model[1]))
        assert kind() is not Own
        return kind

    kind = once()
    gc.collect()
    assert kind() is None
    assert not any(Own in key for key in exchange._classes)


class RetainsGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        h = self.norm(x)
        if self.training:
            h.retain_grad()
        return self.linear(h)


class Maps(RetainsGradient):
    def forward(self, x):
        weights = torch.vmap(lambda z: z.sum() * torch.ones(D))(x.flatten(0, -2)).view_as(x)
        return self.linear(self.norm(x)) * weights


class Scripted(RetainsGradient):
    def __init__(self):
        super().__init__()
        self.relu = torch.jit.script(nn.ReLU())

    def forward(self, x):
        return self.relu(self.linear(self.norm(x)))


class Lazy(RetainsGradient):
    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.LazyLinear(D), nn.LazyLinear(D)

    def forward(self, x):
        return self.linear(self.norm(x))


class Remembers(nn.Module):
    """A module whose forward has side effects."""

    def __init__(self, how):
        super().__init__()
        self.last, self.count, self.all, self.by_name, self.how = None, 0, [], {}, how

    def forward(self, x):
        y = F.gelu(x)
        if self.how == "attribute":
            self.last = y
        elif self.how == "counter":
            self.count += 1
        elif self.how == "list":
            self.all.append(y.detach())
        elif self.how == "dict":
            self.by_name["y"] = y.detach()
        else:
            self.new = y.shape
        return y


@pytest.mark.parametrize("how", ["attribute", "counter", "list", "dict", "a new one"])
def test_a_module_whose_forward_does_more_is_left(how):
    model = nn.Sequential(nn.Linear(D, D), Remembers(how), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    report = lomem.convert(model, torch.randn(2, D))
    # Its call is replaced, and the rest of its forward runs.
    assert [(d.name, d.kind) for d in report.converted] == [("1", "call"), ("3", "activation")]
    model(torch.randn(2, D))
    after = vars(model[1])
    assert (after["last"], after["count"], after["all"], after["by_name"], "new" in after) != (None, 0, [], {}, False)


class CheckpointsItself(nn.Module):
    """Checkpointed regions that begin inside the forward: they are recomputed outside of it."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(D, 4 * D), nn.Linear(4 * D, D), way

    def body(self, x):
        return self.b(F.gelu(self.a(x)))

    def forward(self, x):
        x = x + self.body(x)
        if self.way == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return self.body(x)
        if self.way == "nested":
            return checkpoint(lambda x: checkpoint(self.body, x, use_reentrant=False), x, use_reentrant=False)
        if self.way == "function":
            return self.b(checkpoint(F.gelu, self.a(x), use_reentrant=False))
        return checkpoint(self.body, x, use_reentrant=self.way == "reentrant")


@pytest.mark.parametrize("around", [False, True], ids=["alone", "around"])
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant", "nested", "function", "save_on_cpu"])
def test_calls_in_regions_of_the_forward_itself(way, around):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), CheckpointsItself(way)), torch.randn(4, D)
    plain = copy.deepcopy(model)
    report = lomem.convert(model, x, activations="8bit")
    assert [d.kind for d in report.converted] == ["call"]
    results = []
    for m in (plain, model):
        whole = (lambda x, m=m: checkpoint(m, x, use_reentrant=False)) if around else m
        m.zero_grad()
        y = whole(x)
        y.square().mean().backward()
        results.append((y.detach(), {name: p.grad for name, p in m.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    # Of 8-bit steps.
    assert distance(results[1][1], results[0][1]) < 0.02


def test_threads_convert_side_by_side():
    # The patches for the run apply to one thread only, and are removed again.
    def patched():
        graph, regions = torch.autograd.graph.saved_tensors_hooks, torch.utils.checkpoint
        return (
            graph.__enter__,
            graph.__exit__,
            regions.CheckpointFunction,
            regions._checkpoint_without_reentrant_generator,
        )

    before, stop, wrong, sizes = patched(), threading.Event(), [], []
    expected = lomem.convert(nn.Sequential(Block(), Block()), torch.randn(2, 3, D), dry_run=True).saved_before

    def train():
        block, x = Block(), torch.randn(2, 3, D, requires_grad=True)
        while not stop.is_set():
            seen = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(0) or t, lambda t: t):
                block(x).sum()
            checkpoint(block, x, use_reentrant=False).sum().backward()
            if not seen:
                wrong.append("hooks were not called")

    def convert():
        for _ in range(3):
            model = nn.Sequential(Block(), Block())
            sizes.append(lomem.convert(model, torch.randn(2, 3, D)).saved_before)

    trainer, converters = threading.Thread(target=train), [threading.Thread(target=convert) for _ in range(3)]
    for thread in (trainer, *converters):
        thread.start()
    for thread in converters:
        thread.join()
    stop.set()
    trainer.join()
    assert wrong == []
    assert sizes == [expected] * 9
    assert patched() == before


def test_what_the_example_run_draws_and_counts_is_put_back():
    class Draws(nn.Module):
        def forward(self, weight):
            return weight + 0 * torch.randn_like(weight)

    class OwnGenerator(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x + 0 * torch.rand(x.shape, generator=self.generator)

    model = nn.Sequential(
        nn.LayerNorm(D), nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)), nn.GELU(), nn.Linear(D, D)
    )
    nn.utils.parametrize.register_parametrization(model[3], "weight", Draws())
    model.append(OwnGenerator())
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    own = model[4].generator.get_state()
    for dry in (True, False):
        lomem.convert(model, torch.randn(2, D, generator=torch.Generator()), dry_run=dry)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(model[4].generator.get_state(), own)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_anomaly_detection_and_hooks_around_are_no_matter():
    x = torch.randn(2, 3, D)
    expected = lomem.convert(Block(), x, dry_run=True)
    with torch.autograd.set_detect_anomaly(True):
        assert lomem.convert(Block(), x, dry_run=True) == expected
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        assert lomem.convert(Block(), x, dry_run=True) == expected


class MapsModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.linear = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.act, self.last = nn.GELU(), nn.LayerNorm(D)

    def forward(self, x):
        mapped = torch.vmap(lambda z: self.act(self.linear(self.norm(z))), randomness="same")(self.first(x))
        return self.linear(self.last(mapped))


def test_what_runs_inside_a_function_transform_is_left():
    torch.manual_seed(0)
    model, x = MapsModules(), torch.randn(2, 3, D)
    plain = copy.deepcopy(model)
    report = lomem.convert(model, x)
    assert {d.name: d.action for d in report.decisions} == {"norm": "left", "act": "left", "last": "inverted"}
    assert {d.reason for d in report.left} == {"it runs inside a function transform (torch.vmap and the like)"}
    y, expected = run(plain, x)
    z, grads = run(model, x)
    assert (z - y).norm() <= 1e-6 * y.norm()
    assert distance(grads, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("freeze", [False, True])
def test_a_scripted_model_has_verdicts(freeze):
    model = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.GELU()).eval())
    model = torch.jit.freeze(model) if freeze else model
    with pytest.raises(lomem.NothingToConvertError, match="found nothing to convert in"):
        lomem.convert(model, torch.randn(2, D))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", [RetainsGradient, Maps, Scripted, Lazy])
def test_what_a_model_holds_or_does_does_not_stop_the_rest(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 3, D)
    report = lomem.convert(model, x)
    assert {d.name: d.action for d in report.decisions} == {"norm": "inverted"}
    plain = copy.deepcopy(model) if kind is not Scripted else None
    if plain is not None:
        lomem.restore(plain)
        y = plain(x)
        assert (model(x) - y).norm() <= 1e-6 * y.norm()


class Forces(nn.Module):
    """Energies, and the forces that are their gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 1)
        self.act = nn.SiLU()

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(self.act(self.norm(self.a(x)))).sum()
            (forces,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, forces


def test_a_model_that_differentiates_itself_is_left():
    with pytest.raises(lomem.NothingToConvertError, match="the model computes gradients in its forward pass"):
        lomem.convert(Forces(), torch.randn(2, D))
    report = lomem.convert(Forces(), torch.randn(2, D), dry_run=True)
    assert {d.name: d.action for d in report.decisions} == {"norm": "left", "act": "left"}


@pytest.mark.parametrize("place", [1, 2, 4, 6])
def test_the_check_names_the_module_at_fault(place, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(7) for m in (nn.LayerNorm(D), nn.Linear(D, D))))
    before = copy.deepcopy(model)
    wrong = f"{2 * place}"
    honest = lomem.conversion.modules.MSNorm.forward

    def forward(self, x):
        result = honest(self, x)
        if self is model.get_submodule(wrong):
            result.data[..., 0] += 1
        return result

    monkeypatch.setattr(lomem.conversion.modules.MSNorm, "forward", forward)
    with pytest.raises(
        RuntimeError, match=rf"once {wrong} \(layer norm .*exclude=\['{wrong}'\] to skip it; the model is"
    ):
        lomem.convert(model, torch.randn(4, D))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_nested_tensors_go_the_original_way(ill, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
    model[1].weight.data[0] = 0 if ill else 1
    plain = copy.deepcopy(model)
    lomem.convert(model, torch.randn(2, 3, D))
    parts = [torch.randn(3, D), torch.randn(5, D)]
    results = []
    for m in (plain, model):
        y = m(torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)).to_padded_tensor(0.0)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in m.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_meta_and_tracing(ill):
    model, plain = converted(ill)
    x = torch.randn(2, 3, D, device="meta")
    assert copy.deepcopy(model).to("meta")(x).shape == plain.to("meta")(x).shape
    x = torch.randn(2, 3, D)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("place", [1, 2])
def test_a_parametrization_that_counts_its_uses(place, ill):
    # Spectral norm runs one step of its iteration at each access to the weight.
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)), torch.randn(4, D)
    model[1].weight.data[0] = 0 if ill else 1
    plain = copy.deepcopy(model)
    lomem.convert(model, x)
    uses = []

    class Counts(nn.Module):
        def forward(self, weight):
            uses.append(None)
            return weight * 2

    counted = []
    for m in (plain, model):
        nn.utils.parametrize.register_parametrization(m[place], "weight", Counts())
        uses.clear()
        y, grads = run(m, x)
        counted.append((len(uses), y, grads))
    assert counted[0][0] == counted[1][0]
    assert (counted[1][1] - counted[0][1]).norm() <= 1e-6 * counted[0][1].norm()
    assert distance(counted[1][2], counted[0][2]) < 1e-5
