"""The contender of `lomem memory` whose gated MLPs save gate and up alone."""

import copy
import dataclasses
import functools

import lomem
import pytest
import torch
from lomem.commands import model as model_commands
from lomem.commands import presets
from lomem.commands.gated_mlp import rebuild_products
from torch import nn

pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]

BFLOAT16 = torch.bfloat16
NAMES = ["llama-7b", "llama-3.1-8b", "qwen3-8b", "gemma-3-4b"]
R = 4
LAYERS, TOKENS, INNER = 2, 2 * 16, 96  # of the small presets
WIDE, NARROW = LAYERS * TOKENS * INNER, LAYERS * TOKENS * R
#: Setting, and the bytes that are not saved any more in a model of a dtype: the activation's result; the product, or
#: its float32 copy; the results of LoRA's first layer.
WAYS = {
    "full": (None, False, lambda size: WIDE * size + WIDE * size),
    "lora": (presets.Lora(R, "all", dtype=BFLOAT16), False, lambda size: WIDE * size + WIDE * size + NARROW * size),
    "4bit": (presets.Lora(R, "all", dtype=BFLOAT16), True, lambda size: WIDE * size + WIDE * size + NARROW * size),
    "float32 lora": (presets.Lora(R, "all"), False, lambda size: WIDE * size + WIDE * 4 + NARROW * 4),
    # Nothing saves the product if the last layer is frozen and has no LoRA.
    "lora of q and v": (presets.Lora(R, "qv", dtype=BFLOAT16), False, lambda size: WIDE * size),
}


def make(name, way, dtype=BFLOAT16):
    lora, four_bit, _ = WAYS[way]
    preset = dataclasses.replace(presets.get(name).small(), dtype=dtype)
    if lora is not None and lora.dtype == BFLOAT16:
        lora = dataclasses.replace(lora, dtype=dtype)
    torch.manual_seed(0)
    model = presets.build(presets.Setting(name, lora, four_bit=four_bit), preset)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:  # zero at first, so that nothing would reach the first layer
                p.normal_(0, 0.1)
    ids = torch.randint(3, 128, (2, 16))
    return model, {"input_ids": ids, "labels": ids}


def step(model, batch):
    with lomem.memory.saved_for_backward([*model.parameters(), *model.buffers()]) as saved:
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, saved.nbytes


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_and_only_gate_and_up_are_saved(name, way, dtype):
    plain, batch = make(name, way, dtype)
    model = copy.deepcopy(plain)
    assert rebuild_products(model) == LAYERS
    loss, grads, nbytes = step(model, batch)
    expected_loss, expected, before = step(plain, batch)
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    # The same ops on the same values.
    assert all(grad.any() and torch.equal(grad, expected[n]) for n, grad in grads.items())
    assert before - nbytes == WAYS[way][2](dtype.itemsize)


def test_under_autocast():
    plain, batch = make("llama-7b", "full", torch.float32)
    model = copy.deepcopy(plain)
    rebuild_products(model)
    with torch.autocast("cpu", BFLOAT16):
        (loss, grads, nbytes), (expected_loss, expected, before) = step(model, batch), step(plain, batch)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(grad, expected[n]) for n, grad in grads.items())
    # The copies of the last layers' weights are made again too.
    assert before - nbytes == 2 * WIDE * 2 + LAYERS * 32 * INNER * 2


def test_float64_gradients_by_finite_differences():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(5, 2)
            self.act_fn = nn.SiLU()

    mlp = Mlp().double()
    rebuild_products(mlp)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        return mlp(x)

    assert torch.autograd.gradcheck(function, (x, *mlp.parameters()))


def test_what_it_cannot_do():
    with pytest.raises(ValueError, match="Linear has no gated MLP, expected modules with gate_proj, up_proj, act_fn"):
        rebuild_products(nn.Linear(2, 2))
    preset = presets.get("llama-7b").small()
    model = presets.build(presets.Setting("llama-7b", presets.Lora(R, "all", dropout=0.1)), preset)
    with pytest.raises(ValueError, match="LoRA has dropout, expected none"):
        rebuild_products(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_the_real_count(name):
    setting = presets.Setting(name, WAYS["4bit"][0], four_bit=True)
    preset = presets.get(name).small()
    build = functools.partial(presets.build, setting, preset)
    subject = model_commands.Subject("", build, preset.batch, True, None)
    estimated = lomem.memory.estimate(
        build,
        lambda: preset.batch(),
        torch.optim.AdamW,
        device="cpu",
        transform=lambda model: model_commands.apply("gated-mlp", model, subject) and None,
    )
    model = build()
    assert model_commands.apply("gated-mlp", model, subject) is None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    real = lomem.memory.step_peak(model, preset.batch(), optimizer)
    assert {**estimated.to_dict(), "source": None} == {**real.to_dict(), "source": None}
