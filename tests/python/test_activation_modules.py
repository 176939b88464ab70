"""The family of activations with few-bit derivatives: forward bit for bit torch's, codes and gradients from the
definition, for every function, number of bits and dtype; those of straight pieces equal torch's gradient."""

import copy
import io
import math
import pickle
from functools import partial

import lomem
import pytest
import torch
from activations_helpers import (
    ALL,
    BITS,
    LF,
    MODULES,
    MODULES_OF_LOMEM_ALONE,
    assert_same_outcome,
    expected_gradient,
    jagged,
    outcome,
    saved_by,
)
from helpers import PUBLISHED, same_bits
from torch import nn


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, device):
    make, plain = MODULES[name]
    module = make()
    assert isinstance(module, type(plain))
    assert not module.state_dict()
    x = torch.randn(4, 33, device=device)
    y, saved = saved_by(module, x.clone().requires_grad_())
    assert same_bits(y.detach(), plain(x))
    assert len(saved) == 1
    assert saved[0].nbytes == math.ceil(getattr(module, "bits", 1) * x.numel() / 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        assert torch.equal(twin(x), y)


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_jagged_tensors(name):
    make, plain = MODULES[name]
    x = jagged(2, 5)
    assert_same_outcome(outcome(make(), x), outcome(plain, x))


def test_modules_cover_the_family():
    names = {type(make()).__name__ for make, _ in MODULES.values()}
    assert {type(make()).__module__ for make, _ in MODULES.values()} == {"lomem.nn"}
    others = {"FewBitActivation", "StepActivation", *(entry.module.__name__ for entry in PUBLISHED.values())}
    assert names | others | MODULES_OF_LOMEM_ALONE == set(lomem.nn.activations.__all__)
    torch_names = {name.split("-")[0] for name in ALL}
    others = {*PUBLISHED, "step_activation", "step_function", "drawn_levels"}
    assert torch_names | others == set(lomem.functional.activations.__all__)


@pytest.mark.parametrize("bits", BITS)
def test_bits_of_modules(bits):
    module = lomem.nn.GELU(bits=bits)
    _, saved = saved_by(module, torch.randn(40, requires_grad=True))
    assert saved[0].nbytes == 5 * bits
    assert f"bits={bits}" in repr(module)


def test_steps_that_no_longer_fit_are_dropped():
    step = LF.step_function("elu", 2, parameters=(1.0,))
    module = lomem.nn.ELU(steps=step)
    module.inplace = False
    assert module.steps == step
    module.bits = 2
    assert module.steps == step
    module.bits = 5
    assert module.steps is None
    assert module.step_function() == LF.step_function("elu", 5, parameters=(1.0,))
    for name, value in (("alpha", 4.0), ("criterion", "primitive")):
        module.steps = step
        assert module.bits == 2
        setattr(module, name, value)
        assert module.steps is None
    with pytest.raises(ValueError, match=r"^lomem.nn.ELU: bits is 0, expected 1 to 8"):
        module.bits = 0
    with pytest.raises(ValueError, match=r"^lomem.nn.ELU: steps is a list, expected a lomem.StepFunction"):
        module.steps = []


def test_modules_with_steps(device):
    step = LF.step_function("gelu", 5, criterion="derivative")
    module = lomem.nn.GELU(steps=step)
    assert module.bits == 5
    x = torch.randn(50, device=device, requires_grad=True)
    module(x).sum().backward()
    assert torch.equal(x.grad, expected_gradient(x.detach(), torch.ones_like(x), step))
    user = lomem.nn.StepActivation(torch.sin, step.boundaries, step.levels)
    assert "sin, bits=5" in repr(user)
    x.grad = None
    user(x).sum().backward()
    assert torch.equal(x.grad, expected_gradient(x.detach(), torch.ones_like(x), step))


@pytest.mark.parametrize(
    "module",
    [make(inplace=True) for make, plain in MODULES.values() if hasattr(plain, "inplace")],
    ids=lambda module: type(module).__name__,
)
def test_inplace(module, device):
    plain = copy.deepcopy(module)
    plain.inplace = False
    x = torch.randn(30, device=device, requires_grad=True)
    (want,) = torch.autograd.grad(plain(x).sum(), x)
    inner = x * 1
    y = module(inner)
    assert y.data_ptr() == inner.data_ptr()
    assert torch.equal(y, plain(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)
    # What others keep of the input is missed, not silently wrong.
    square = (inner := x * 1).square()
    module(inner)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            lomem.nn.GELU(bits=3),
            nn.Linear(8, 8),
            lomem.nn.Sigmoid(bits=5),
            nn.Linear(8, 8),
            lomem.nn.Threshold(-0.5, 0.2),
            lomem.nn.ELU(0.5, bits=8),
        )

    def forward(self, x):
        return self.layers(x)


def gradients(net, f, x):
    x = x.clone().requires_grad_()
    net.zero_grad()
    f(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    net = Net().to(device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 5, 9):
        x = torch.randn(rows, 6, device=device)
        torch.testing.assert_close(gradients(net, compiled, x), gradients(net, net, x))


def test_compile_step_activation(device):
    def f(x):
        return LF.step_activation(x, torch.sin, (-1.0, 0.0, 1.0), (0.1, 0.2, 0.3, 0.4))

    x = torch.randn(4, 6, device=device, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    (want,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.equal(got, want)


def test_export(device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (4, 7):
        x = torch.randn(rows, 6, device=device)
        assert torch.equal(loaded(x), net(x))
    torch.testing.assert_close(gradients(loaded, loaded, x), gradients(net, net, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, device):
    net = Net().to(device)
    x = torch.randn(4, 6, device=device)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, net, use_reentrant=use_reentrant)
    for got, want in zip(gradients(net, checkpointed, x), gradients(net, net, x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ALL)
def test_autocast_keeps_dtypes(name):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = ALL[name][0](x)
        assert y.dtype == dtype
        assert same_bits(y.detach(), ALL[name][1](x.detach()))


@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "threshold"])
def test_gradients_of_gradients(name, device):
    x = torch.randn(9, dtype=torch.float64, device=device, requires_grad=True)
    grad = torch.randn(9, dtype=torch.float64, device=device, requires_grad=True)
    # The gradient is linear in grad_output.
    assert torch.autograd.gradcheck(lambda g: torch.autograd.grad(ALL[name][0](x), x, g, create_graph=True)[0], grad)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_no_tangents(name):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(3), torch.randn(3))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ALL[name][0](dual)
