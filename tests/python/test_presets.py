import dataclasses
import importlib.util
import sys

import lomem
import pytest
import torch
import torch.nn.functional as F
from lomem.commands import linear4bit, presets
from lomem.commands.linear4bit import Linear4bit
from torch import nn
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.usefixtures("one_thread")

needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs the package transformers"
)
needs_peft = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("peft")), reason="needs the package peft"
)

BFLOAT16 = torch.bfloat16
LORAS = [presets.Lora(4, "qv"), presets.Lora(4, "all", dropout=0.1), presets.Lora(4, "all", dtype=BFLOAT16)]

# Published with the weights (torchvision's for images), heads included. RoBERTa and BERT have no pooler under their
# heads. LLaMA, Llama and Qwen3 have a projection of their own for the logits; Gemma has the embedding's. Of Gemma 3 4B,
# 4,300,079,472 parameters are published, 419,816,304 of them of the vision tower and its projection.
PARAMETERS = {
    "vit-b": 86_567_656,
    "vit-l": 304_326_632,
    "swin-t": 28_288_354,
    "swin-s": 49_606_258,
    "swin-b": 87_768_224,
    "roberta-base": 124_647_170,
    "bert-base": 108_893_186,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-4b": 4_300_079_472 - 419_816_304,
}


def train_step(model, preset):
    with torch.autocast("cpu", dtype=preset.autocast or BFLOAT16, enabled=preset.autocast is not None):
        loss = model(**preset.batch()).loss
    loss.backward()
    return loss


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_published_count_has_a_preset():
    assert list(PARAMETERS) == list(presets.PRESETS)


@needs_transformers
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = presets.get(name).build()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {p.dtype for p in model.parameters()} == {presets.get(name).dtype}
    assert model.training


@needs_transformers
@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_small_preset_trains(name):
    preset = presets.get(name).small()
    model = preset.build()
    loss = train_step(model, preset)
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@needs_transformers
@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_batch_has_the_size_that_is_asked_for(name):
    preset = presets.get(name)
    seq_len = None if preset.seq_len is None else 7
    with torch.device("meta"):
        batch = preset.batch()
        other = preset.batch(3, seq_len)
    assert all(tensor.is_meta and len(tensor) == preset.batch_size for tensor in batch.values())
    assert all(len(tensor) == 3 for tensor in other.values())
    if seq_len is not None:
        assert batch["input_ids"].shape[1] == preset.seq_len
        assert other["input_ids"].shape[1] == 7


@needs_transformers
def test_images_have_no_sequence_length():
    with pytest.raises(ValueError, match="seq_len is 196, expected None: images have the config's size, 224"):
        presets.get("vit-b").batch(seq_len=196)


def test_an_unknown_preset_is_told_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"name is 'x', expected one of vit-b, vit-l, .*, llama-13b, llama-3.1-8b, qwen3-8b, gemma-3-4b",
    ):
        presets.get("x")


@pytest.mark.parametrize(("package", "call"), [("transformers", "build"), ("transformers", "batch")])
def test_a_missing_package_is_named(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"lomem.commands.presets needs the package {package}: pip install 'lomem\[models\]'"
    ):
        getattr(presets.get("vit-b").small(), call)()


@needs_peft
@pytest.mark.parametrize("lora", LORAS, ids=str)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_lora_trains_itself_and_the_head(name, lora):
    preset = presets.get(name).small()
    model = presets.build(presets.Setting(name, lora), preset)
    head = preset.family.head
    parts = trained(model)
    assert parts
    assert all("lora_" in part or f"{head}.modules_to_save" in part for part in parts)
    assert any("modules_to_save" in part for part in parts) == (head is not None)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {lora.dtype}
    assert train_step(model, preset).isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@needs_peft
@pytest.mark.parametrize("name", presets.PRESETS)
def test_all_targets_are_all_linear_layers_but_the_head(name):
    preset = presets.get(name).small()
    plain = {n for n, m in preset.build().named_modules() if isinstance(m, nn.Linear)}
    head = {preset.family.head, "lm_head"}
    expected = {n for n in plain if n.split(".")[0] not in head}
    model = presets.add_lora(preset.build(), preset, 2, "all")
    found = {n.removesuffix(".lora_A") for n, _ in model.base_model.model.named_modules() if n.endswith(".lora_A")}
    assert found == expected


@needs_peft
def test_add_lora_names_the_targets():
    preset = presets.get("vit-b").small()
    with pytest.raises(ValueError, match="targets is 'mlp', expected one of 'qv', 'all'"):
        presets.add_lora(preset.build(), preset, 4, "mlp")


@needs_peft
def test_without_peft_cast_saves_the_fp32_copies():
    preset = presets.get("roberta-base").small()
    setting = presets.Setting("roberta-base", presets.Lora(4, "all"))
    nbytes, losses = [], []
    for peft_cast in (True, False):
        torch.manual_seed(0)
        model = presets.build(dataclasses.replace(setting, peft_cast=peft_cast), preset).eval()
        with lomem.memory.saved_for_backward(model.parameters()) as saved:
            losses.append(train_step(model, preset))
        nbytes.append(saved.nbytes)
    assert nbytes[1] < nbytes[0]
    torch.testing.assert_close(*losses)


@needs_peft
def test_without_peft_cast_needs_lora():
    with pytest.raises(ValueError, match="model has no LoRA layer, expected at least one"):
        presets.without_peft_cast(nn.Linear(2, 2))


@needs_transformers
def test_a_4bit_base_needs_lora():
    with pytest.raises(ValueError, match="four_bit is True without lora, expected both"):
        presets.build(presets.Setting("llama-7b", four_bit=True), presets.get("llama-7b").small())


@needs_peft
@pytest.mark.parametrize("setting", presets.SETTINGS, ids=str)
def test_every_setting_builds_on_meta_and_trains_when_small(setting):
    with torch.device("meta"):
        model = presets.build(setting)
    assert all(p.is_meta for p in model.parameters())
    preset = presets.get(setting.preset).small()
    small = presets.build(setting, preset)
    assert small.training
    assert train_step(small, preset).isfinite()
    assert len(trained(small)) < len(list(small.parameters())) or setting.lora is None


def test_the_settings_differ():
    assert len({str(setting) for setting in presets.SETTINGS}) == len(presets.SETTINGS)


@needs_peft
def test_a_4bit_llama_keeps_half_a_byte_an_element():
    setting = presets.Setting("llama-7b", presets.Lora(64, "all", dtype=BFLOAT16), four_bit=True)
    with torch.device("meta"):
        model = presets.build(setting)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 7 * 32
    assert sum(layer.weight.nbytes for layer in layers) == 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 2


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (64, 64), (96, 32), (33, 130)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear4bit_is_linear_with_the_dequantized_weight(dtype, shape, bias):
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    layer = Linear4bit.from_linear(linear)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == (linear.weight.numel() + 1) // 2
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
    y = torch.randn(2, 3, shape[1], dtype=dtype).copy_(x.detach()).requires_grad_()
    expected = F.linear(y, layer.dequantize(), linear.bias)
    actual = layer(x)
    grad = torch.randn_like(expected)
    actual.backward(grad)
    expected.backward(grad)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(x.grad, y.grad)


def test_linear4bit_rounds_to_the_nearest_code():
    linear = nn.Linear(64, 16, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    weight = linear.weight.detach()
    absmax = weight.abs().amax(1, keepdim=True)
    table = torch.tensor(linear4bit.NF4)
    nearest = table[(torch.where(absmax == 0, 0.0, weight / absmax).unsqueeze(-1) - table).abs().argmin(-1)] * absmax
    layer = Linear4bit.from_linear(linear)
    torch.testing.assert_close(layer.dequantize(), nearest)
    assert torch.equal(layer.dequantize()[3], torch.zeros(64))
    # What is one of the 16 values is kept.
    again = nn.Linear(64, 16, bias=False)
    again.weight.data.copy_(layer.dequantize())
    assert torch.equal(Linear4bit.from_linear(again).dequantize(), layer.dequantize())


def test_linear4bit_keeps_only_its_weight():
    layer = Linear4bit.from_linear(nn.Linear(128, 64), BFLOAT16)
    x = torch.randn(8, 128, dtype=BFLOAT16, requires_grad=True)
    with lomem.memory.saved_for_backward([*layer.parameters(), *layer.buffers()]) as saved:
        y = layer(x)
    assert saved.nbytes == 0
    assert y.dtype == BFLOAT16


def test_linear4bit_multiplies_in_its_dtype_and_returns_the_inputs():
    layer = Linear4bit.from_linear(nn.Linear(16, 4), BFLOAT16)
    x = torch.randn(3, 16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, F.linear(x.bfloat16(), layer.dequantize(), layer.bias).float())


def test_linear4bit_runs_on_meta_and_fake_tensors():
    with torch.device("meta"):
        layer = Linear4bit.from_linear(nn.Linear(24, 10))
        fresh = Linear4bit(24, 10)
        x = torch.zeros(2, 24, requires_grad=True)
    assert layer.weight.shape == fresh.weight.shape == (120,)
    assert layer.absmax.shape == fresh.absmax.shape == (4,)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with FakeTensorMode(), torch.device("cpu"):
        layer = Linear4bit(24, 10)
        x = torch.zeros(2, 24, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_linear4bit_makes_one_op_of_the_dequantization():
    layer = Linear4bit(64, 64)
    x = torch.zeros(2, 64, dtype=BFLOAT16, requires_grad=True)
    with lomem._trace.recorder.Recorder() as recorder:
        layer(x).sum().backward()
    ops = [op for op in recorder.ops if op.func is torch.ops.lomem_presets.dequantize_4bit.default]
    assert len(ops) == 2
    assert not any(torch.uint8 == s.dtype for op in recorder.ops for s in op.outputs)
