"""What lomem.convert and lomem.fit.report leave as it was when they compare gradients."""

import copy
import random

import lomem
import lomem.fit
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fidelity_helpers import by_layer, check_figures, conv, convert, figures, mlp, projection, run, seeded, step
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::lomem.GradientWarning"),
]


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
    # (A conversion that draws codes starts lomem's stream of seeds anew, as it should.)
    report = convert(model, batch, loss=loss, rounding="nearest")
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


def test_hooks_of_modules_take_no_step():
    model, batch = conv()
    fired, handles = [], []

    def stepped(module, *grads):
        fired.append(module)
        for p in module.parameters(recurse=False):
            p.data.fill_(torch.nan)

    for module in model:
        if not isinstance(module, nn.SiLU):  # hooks would keep it from being converted
            handles.append(module.register_full_backward_hook(stepped))
            handles.append(module.register_full_backward_pre_hook(stepped))
    state = copy.deepcopy(model.state_dict())
    assert convert(model, batch).gradient is not None
    assert fired == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(*batch).sum().backward()
    assert len(fired) == len(handles)
    for handle in handles:
        handle.remove()
    model(*batch).sum().backward()
    assert len(fired) == len(handles)


def test_gradients_in_a_buffer_that_is_used_again():
    buffer = torch.zeros(6, 6, 1, 1)

    class Reused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.conv2d(x, weight)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad)
            return torch.nn.grad.conv2d_input(x.shape, weight, grad), buffer.copy_(grad_weight)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.body = nn.Parameter(torch.randn(6, 6, 1, 1)), conv(1)[0]

        def forward(self, x):
            return self.body(Reused.apply(x, self.weight))

    plain, model, batch = seeded(Net), seeded(Net), conv()[1]
    report = convert(model, batch)
    grads = [{name: g.clone() for name, g in step(m, batch, projection).items()} for m in (plain, model)]
    check_figures(report.layers[""], by_layer(*grads)[""])


@pytest.mark.parametrize("measure", ["convert", "fit.report"])
def test_devices_of_other_models_are_not_seeded(measure, monkeypatch):
    # Nobody restores them.
    seeded_all = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_all.append)
    monkeypatch.setattr(torch, "manual_seed", seeded_all.append)
    (model, batch), before = conv(), torch.get_rng_state()
    convert(model, batch)
    if measure == "fit.report":
        lomem.fit.report(model, [batch], loss=projection)
    assert seeded_all == []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_from_a_graph_keeps_it():
    # Also if the graph leads to parameters of the model.
    model, (x,) = conv()
    scale = nn.Parameter(torch.ones(()))
    model.scale = scale
    scaled = x * scale
    assert convert(model, scaled).gradient is not None
    model(scaled).sum().backward()
    assert scale.grad is not None


def test_a_loss_that_is_a_module_is_left_as_it_was():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, output):
            return self.norm(output).square().mean() + (output * self.norm.running_var[:, None, None]).mean()

    loss = Loss()
    state = copy.deepcopy(loss.state_dict())
    plain, model, batch = conv()[0], conv()[0], conv()[1]
    model.load_state_dict(plain.state_dict())
    report = convert(model, batch, loss=loss)
    assert all(torch.equal(value, state[name]) for name, value in loss.state_dict().items())
    exact, approximate = (step(m, batch, copy.deepcopy(loss)) for m in (plain, model))
    check_figures(report.gradient, figures(exact.values(), approximate.values()))


def test_the_gradient_that_training_gets_is_not_shifted():
    # lomem's own stream starts at the same place with and without the comparison.
    grads = []
    for gradients in (True, False):
        torch.manual_seed(0)
        model, batch = mlp()
        lomem.convert(model, batch, bits=8, gradients=gradients)
        grads.append(step(model, batch, projection))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
