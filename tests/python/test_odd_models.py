"""Models that are not made of plain tensors and modules: they are measured like others, or rejected in one sentence."""

import copy

import lomem
import pytest
import torch
from lomem import memory
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

WIDTH = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from torch.jit
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch's prototypes: nested, quantized, sparse tensors
]


def linear():
    return nn.Linear(WIDTH, WIDTH)


def layers(*inside):
    return nn.Sequential(linear(), nn.LayerNorm(WIDTH), linear(), *inside, nn.GELU(), linear())


def plain_input(rows=5):
    return torch.randn(rows, WIDTH)


class Runs(nn.Module):
    """A model whose forward is a given function of the model and its input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


class Unflattened(torch.Tensor):
    """A wrapper subclass without __tensor_flatten__."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, requires_grad=inside.requires_grad)

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = torch.utils._pytree.tree_map_only
        result = func(*unwrap(cls, lambda t: t.inside, args), **unwrap(cls, lambda t: t.inside, kwargs or {}))
        return unwrap(torch.Tensor, cls, result)


class Subclass(torch.Tensor):
    pass


def two(tensor):
    return TwoTensor(tensor, tensor.clone())


def with_two_weights():
    model = layers()
    for module in model:
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, nn.Parameter(two(parameter.detach())))
    return model


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)], layout=layout)


def activations():
    return nn.Sequential(linear(), nn.GELU(), linear())


def with_buffer(buffer):
    model = layers()
    model.register_buffer("odd", buffer)
    return model


#: Name: model, input, an equivalent of plain modules and tensors that saves as much, and the factor between the two.
MEASURED = {
    "scripted activation": (lambda: layers(torch.jit.script(nn.ReLU())), plain_input, lambda: layers(nn.ReLU()), 1),
    "scripted linear": (lambda: layers(torch.jit.script(linear())), plain_input, lambda: layers(linear()), 1),
    "scripted modules": (
        lambda: layers(torch.jit.script(nn.Sequential(linear(), nn.Tanh()))),
        plain_input,
        lambda: layers(nn.Sequential(linear(), nn.Tanh())),
        1,
    ),
    "traced": (lambda: layers(torch.jit.trace(linear(), plain_input())), plain_input, lambda: layers(linear()), 1),
    "scripted whole": (lambda: torch.jit.script(activations()), plain_input, activations, 1),
    "vmap of a module": (
        lambda: Runs(lambda m, x: m.last(torch.vmap(m.inside)(x)), inside=activations(), last=linear()),
        plain_input,
        lambda: Runs(lambda m, x: m.last(m.inside(x)), inside=activations(), last=linear()),
        1,
    ),
    "vmap in vmap": (
        lambda: Runs(lambda m, x: m.inside(torch.vmap(torch.vmap(torch.tanh))(x)), inside=activations()),
        plain_input,
        lambda: Runs(lambda m, x: m.inside(torch.tanh(x)), inside=activations()),
        1,
    ),
    "functionalize": (
        lambda: Runs(lambda m, x: torch.func.functionalize(lambda z: m.inside(z))(x), inside=activations()),
        plain_input,
        lambda: Runs(lambda m, x: m.inside(x), inside=activations()),
        1,
    ),
    "functional_call": (
        lambda: Runs(
            lambda m, x: torch.func.functional_call(m.inside, dict(m.inside.named_parameters()), x),
            inside=activations(),
        ),
        plain_input,
        lambda: Runs(lambda m, x: m.inside(x), inside=activations()),
        1,
    ),
    "strided nested input": (activations, lambda: nested(torch.strided), activations, 1),
    "jagged input": (activations, lambda: nested(torch.jagged), activations, 1),
    "two tensors in one": (layers, lambda: two(plain_input()), layers, 2),
    "two tensors in one weight": (with_two_weights, plain_input, layers, 2),
    "a wrapper that hides its tensor": (layers, lambda: Unflattened(plain_input()), layers, 1),
    "a subclass": (layers, lambda: plain_input().as_subclass(Subclass), layers, 1),
    "sparse input": (
        lambda: Runs(lambda m, x: m.inside(torch.sparse.mm(x, m.first.weight)), inside=activations(), first=linear()),
        lambda: torch.eye(WIDTH).to_sparse(),
        lambda: Runs(lambda m, x: m.inside(x.to_dense() @ m.first.weight), inside=activations(), first=linear()),
        1,
    ),
    "sparse buffer": (lambda: with_buffer(torch.eye(WIDTH).to_sparse_csr()), plain_input, layers, 1),
    "quantized buffer": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)),
        plain_input,
        layers,
        1,
    ),
    "meta": (lambda: layers().to("meta"), lambda: plain_input().to("meta"), layers, 1),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_odd_models_keep(name):
    make, make_input, make_plain, times = MEASURED[name]
    plain = memory.profile(make_plain(), plain_input(16 if name == "sparse input" else 5))
    assert plain.saved_bytes > 0
    profiled = memory.profile(make(), make_input())
    # The sum of a nested tensor saves it.
    assert profiled.saved_bytes - profiled.modules["(loss)"].own == times * plain.saved_bytes
    # Strided nested tensors also save their sizes.
    assert all(u.op == "aten._nested_tensor_size.default" for u in profiled.unaccounted)
    assert memory.step_peak(make(), make_input()).saved_bytes == profiled.saved_bytes
    str(profiled)
    profiled.to_json()


@pytest.mark.parametrize("name", MEASURED)
def test_saved_for_backward_of_odd_models(name):
    make, make_input, *_ = MEASURED[name]
    model, x = make(), make_input()
    saved = memory.saved_for_backward([*model.parameters(), *model.buffers(), x])
    with saved:
        model(x)
    profiled = memory.profile(model, x)
    assert saved.nbytes == profiled.saved_bytes - profiled.modules["(loss)"].own


ESTIMATED = ("scripted", "vmap", "functional", "two tensors", "a subclass", "meta")


@pytest.mark.parametrize("name", [n for n in MEASURED if n.startswith(ESTIMATED)])
def test_an_estimate_of_an_odd_model_is_exact(name):
    make, make_input, *_ = MEASURED[name]
    model, x = make(), make_input()
    memory.step_peak(model, x)  # TorchScript rewrites a graph after its first run
    before = [type(p) for p in model.parameters()]
    estimated = memory.estimate(lambda: model, x, device="cpu")
    measured = memory.step_peak(model, x)
    assert estimated.timeline == measured.timeline
    assert estimated.saved_bytes == measured.saved_bytes
    assert [type(p) for p in model.parameters()] == before
    assert not any(isinstance(p, memory._fake.FakeTensor) for p in model.parameters())


class Counts(nn.Module):
    """A module whose state TorchScript holds."""

    count: int

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(WIDTH))
        self.scale = torch.ones(WIDTH)
        self.count = 0
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        self.total = self.total + x.detach().sum(0)
        self.scale *= 2
        self.count += 1
        return self.norm(x) * self.scale


@pytest.mark.parametrize("measure", [memory.profile, memory.step_peak])
def test_a_scripted_module_is_left_as_it_was(measure):
    model = nn.Sequential(linear(), torch.jit.script(Counts()))
    model(plain_input())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    measure(model, plain_input())
    assert model[1].count == 1
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_scripted_module_has_a_name():
    report = memory.profile(layers(torch.jit.script(linear())), plain_input())
    assert report.modules["3"].own == report.modules["2"].own > 0


def test_hooks_on_scripted_modules_are_removed():
    scripted = torch.jit.script(linear())
    memory.profile(layers(scripted), plain_input())
    assert not scripted._forward_hooks
    assert not scripted._forward_pre_hooks


def transformed(transform):
    return Runs(lambda m, x: m.last(transform(m, x)), inside=linear(), last=linear()), plain_input()


def saved_for_backward(model, x):
    with memory.saved_for_backward():
        model(x)


TRANSFORMS = {
    "grad": lambda m, x: torch.func.grad(lambda z: m.inside(z).tanh().sum())(x),
    "grad in vmap": lambda m, x: torch.vmap(torch.func.grad(lambda z: m.inside(z).tanh().sum()))(x),
    "vjp": lambda m, x: torch.func.vjp(m.inside, x)[1](torch.ones_like(x))[0],
    "jacrev": lambda m, x: torch.func.jacrev(lambda z: m.inside(z).tanh().sum(0))(x).sum(0),
    "hessian": lambda m, x: torch.func.hessian(lambda z: m.inside(z).tanh().sum())(x[0]),
}
MEASURES = {
    "saved_for_backward": saved_for_backward,
    "profile": memory.profile,
    "step_peak": memory.step_peak,
    "estimate": lambda model, x: memory.estimate(lambda: model, x),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_reverse_mode_transforms_are_refused_in_one_sentence(name, measure):
    model, x = transformed(TRANSFORMS[name])
    model(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"^lomem.memory.{measure}: the model calls torch.func.grad, vjp,") as error:
        MEASURES[measure](model, x)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(x)  # and no hook is left


@pytest.mark.parametrize("name", ["jvp", "jacfwd"])
def test_forward_mode_transforms_are_measured(name):
    transforms = {
        "jvp": lambda m, x: torch.func.jvp(m.inside, (x,), (torch.ones_like(x),))[1],
        "jacfwd": lambda m, x: torch.func.jacfwd(lambda z: m.inside(z).sum(0))(x).sum(0),
    }
    model, x = transformed(transforms[name])
    report = memory.profile(model, x)
    # The last layer saves its input, which the transform made.
    assert report.modules["last"].own >= WIDTH * 4
    assert memory.step_peak(model, x).saved_bytes == report.saved_bytes


REFUSED = {
    "lazy": (lambda: layers(nn.LazyLinear(WIDTH)), plain_input, ValueError, "3.weight of model has no shape yet"),
    "jagged": (activations, lambda: nested(torch.jagged), ValueError, "of layout nested cannot be made fake"),
    "strided nested": (activations, lambda: nested(torch.strided), ValueError, "of layout nested cannot be made fake"),
    "sparse": (
        lambda: with_buffer(torch.eye(WIDTH, device="cpu").to_sparse()),
        plain_input,
        ValueError,
        "of layout torch.sparse_coo cannot be made fake",
    ),
    "a wrapper": (
        layers,
        lambda: Unflattened(plain_input()),
        ValueError,
        "a Unflattened of layout torch.strided cannot be made fake",
    ),
    "mkldnn": (
        lambda: Runs(lambda m, x: m.inside(x.to_mkldnn().to_dense()), inside=linear()),
        plain_input,
        RuntimeError,
        "does not run with fake tensors",
    ),
    "jagged inside": (
        lambda: Runs(lambda m, x: m.inside(torch.nested.as_nested_tensor([x], layout=torch.jagged)), inside=linear()),
        plain_input,
        RuntimeError,
        "makes tensors whose sizes are unknown with fake tensors",
    ),
    "no meta kernel": (
        lambda: with_buffer(torch.eye(WIDTH).to_sparse()),
        plain_input,
        RuntimeError,
        'build_fn does not run under torch.device\\("meta"\\)',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_estimates_that_are_refused_are_so_in_one_sentence(name):
    make, make_input, kind, message = REFUSED[name]
    model = make()
    build = make if name == "no meta kernel" else lambda: model
    with pytest.raises(kind, match=rf"^lomem.memory.estimate: .*{message}") as error:
        memory.estimate(build, make_input())
    assert "\n" not in str(error.value)


def test_meta_has_no_autocast():
    with pytest.raises(ValueError, match=r"autocast is torch.bfloat16, but the device meta has none, expected None"):
        memory.step_peak(layers().to("meta"), plain_input().to("meta"), autocast=torch.bfloat16)


def test_a_lazy_parameter_is_excluded_once_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.GELU(), nn.LazyLinear(WIDTH))
    x = plain_input()
    with memory.saved_for_backward([*model.parameters(), x]) as saved:
        model(x)
    assert saved.nbytes == memory.profile(model, x).saved_bytes == 2 * x.nbytes


@pytest.mark.parametrize("name", MEASURED)
def test_map_module_of_odd_models(name):
    """map_module needs no run, and leaves everything but plain torch modules alone."""
    make, *_ = MEASURED[name]
    model = make()
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    assert lomem.map_module(model, lomem.convert_activation) is model
    assert [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)] == scripted
