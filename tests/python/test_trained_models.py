"""Library models in the rest of a training loop: scaled losses, averaged weights, files to resume from, adapters."""

import copy

import lomem
import peft
import pytest
import torch
from small_models import distance
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from zoo import build

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("llama", "gpt2", "bert", "vit")
STEPS = 3


def pair(name):
    """A plain model, a converted one, and their batch."""
    plain, batch = build(name)
    model = copy.deepcopy(plain)
    report = lomem.convert(model, batch, bits=16)
    assert report.saved_after < report.saved_before
    return plain, model, batch


def weights(model):
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


def optimizer(model):
    # With a state, and not Adam, which makes large steps of the smallest differences.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(model, batch, optimizer, steps=STEPS, after=lambda model: None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        after(model)


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_scaler(name):
    """The scale grows, and falls where a loss overflows, whose step is skipped, as with the plain model."""
    plain, model, batch = pair(name)
    found = []
    for trained in (plain, model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        sgd, scales = optimizer(trained), []
        for step in range(6):
            sgd.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = trained(**batch).loss
            scaler.scale(loss * float("inf") if step == 3 else loss).backward()
            scaler.step(sgd)
            scaler.update()
            scales.append(scaler.get_scale())
        found.append((scales, weights(trained)))
    assert found[0][0] == found[1][0] == [2.0**e for e in (8, 9, 9, 8, 8, 9)]
    assert distance(found[1][1], found[0][1]) < 1e-3  # roundings to float16, in gradients times 0.05


@pytest.mark.parametrize("name", MODELS)
def test_averaged_weights(name):
    plain, model, batch = pair(name)
    averages = []
    for trained in (plain, model):
        average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        train(trained, batch, optimizer(trained), after=average.update_parameters)
        averages.append(average)
    assert distance(weights(averages[1]), weights(averages[0])) < 1e-6
    # The average is a converted model of its own: it saves as little, and is restored by itself.
    grads, expected = gradients(averages[1], batch), gradients(averages[0], batch)
    assert distance(grads, expected) < 1e-5
    saved = []
    for trained in (model, averages[1]):
        with lomem.memory.saved_for_backward([*trained.parameters(), *batch.values()]) as record:
            trained(**batch)
        saved.append(record.nbytes)
    assert saved[0] == saved[1]
    lomem.restore(averages[1])
    assert distance(gradients(averages[1], batch), expected) < 1e-5
    assert type(averages[1].module) is type(plain)
    assert type(model) is type(plain)
    with pytest.raises(ValueError, match="converted"):
        lomem.convert(model, batch)


@pytest.mark.parametrize("name", MODELS)
def test_training_resumes_from_files(name, tmp_path):
    """Bit for bit; and the plain model takes the files as well."""
    plain, model, batch = pair(name)
    sgd = optimizer(model)
    train(model, batch, sgd)
    torch.save({"model": model.state_dict(), "optimizer": sgd.state_dict()}, tmp_path / "at.pt")
    train(model, batch, sgd)
    again, _ = build(name)
    lomem.convert(again, batch, bits=16)
    found = torch.load(tmp_path / "at.pt")
    for resumed in (again, plain):
        sgd = optimizer(resumed)
        resumed.load_state_dict(found["model"])
        sgd.load_state_dict(copy.deepcopy(found["optimizer"]))
        train(resumed, batch, sgd)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert distance(weights(plain), weights(model)) < 1e-6  # norms round elsewhere in float32


ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "modules to save": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "input_layernorm"]
    ),
}


@pytest.mark.parametrize("first", [False, True], ids=["adapters first", "converted first"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, first):
    def adapted(model):
        torch.manual_seed(2)
        model = peft.get_peft_model(model, ADAPTERS[adapter]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # so that nothing of them is 0 or 1
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    base, batch = build("llama")
    plain, model = adapted(copy.deepcopy(base)), base
    if first:
        lomem.convert(model, batch, bits=16)
        model = adapted(model)
    else:
        model = adapted(model)
        lomem.convert(model, batch, bits=16)
    assert distance(gradients(model, batch), gradients(plain, batch)) < 1e-6
    saved = []
    for trained in (model, plain):
        with lomem.memory.saved_for_backward([*trained.parameters(), *batch.values()]) as record:
            trained(**batch)
        saved.append(record.nbytes)
    assert saved[0] < saved[1]
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    for trained in (model, plain):
        train(trained, batch, optimizer(trained))
    assert distance(weights(model), weights(plain)) < 1e-6
