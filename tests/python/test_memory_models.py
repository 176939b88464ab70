"""lomem.memory on models from transformers, built from configurations, with peft, autocast and checkpointing."""

import contextlib
from functools import partial

import lomem
import peft
import pytest
import torch
import transformers
from lomem import memory
from torch import nn

transformers.logging.set_verbosity_error()
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).train()


def roberta():
    config = transformers.RobertaConfig(**SMALL, vocab_size=64, max_position_embeddings=40, num_labels=2)
    return transformers.RobertaForSequenceClassification(config).train()


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config).train()


def lora(build):
    model = build()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "." in name]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=linears, lora_dropout=0.1)).train()


def checkpointing(build, use_reentrant):
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    return model


CHANGES = {
    "plain": lambda build: build(),
    "lora": lora,
    "checkpointing": partial(checkpointing, use_reentrant=False),
    "reentrant checkpointing": partial(checkpointing, use_reentrant=True),
}


def batch_of(build):
    if build is vit:
        return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, 64, (2, 16))
    return {"input_ids": ids, "labels": ids if build is llama else torch.tensor([0, 1])}


def padded(batch):
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    return {**batch, "attention_mask": mask}


def without_source(report):
    return {**report.to_dict(), "source": None}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", [llama, roberta, vit])
def test_estimate_step_and_profile_agree_to_the_byte(build, change, autocast):
    make = partial(CHANGES[change], build)
    batch = batch_of(build)
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = None if autocast else torch.optim.AdamW
    real = memory.step_peak(model, batch, optimizer and optimizer(trained), autocast=autocast)
    fake = memory.estimate(make, batch, optimizer, device="cpu", autocast=autocast)
    assert without_source(fake) == without_source(real)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        report = memory.profile(model, **batch)
    assert report.saved_bytes == real.saved_bytes
    assert report.weight_copy_bytes == real.weight_copy_bytes
    if "checkpointing" not in change:
        assert report.unaccounted_bytes == 0


@pytest.mark.parametrize("build", [llama, roberta])
def test_a_padding_mask_is_looked_at(build):
    batch = batch_of(build)
    unpadded = {**batch, "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    reports = []
    for inputs in (unpadded, padded(batch)):
        fake = memory.estimate(build, inputs, device="cpu")
        assert without_source(fake) == without_source(memory.step_peak(build(), inputs))
        reports.append(fake)
    assert reports[0] != reports[1]


def test_checkpointing_keeps_more_than_autograd_saves():
    report = memory.profile(checkpointing(llama, False), **batch_of(llama))
    # The closures that recompute a block hold, for 16 tokens: position ids, and 8 float32 cosines and sines.
    assert report.unaccounted_bytes == 16 * 8 + 2 * 16 * 8 * 4
    assert {u.module for u in report.unaccounted} == {"model", "model.rotary_emb"}


def test_why_the_norms_of_a_model_are_not_shared():
    def replace(model):
        for layer in model.model.layers:
            layer.input_layernorm = lomem.nn.MSRMSNorm(32)
            layer.post_attention_layernorm = lomem.nn.MSRMSNorm(32)
        return model

    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(replace(llama()).to(torch.bfloat16), config).train()
    norms = {n.module: n for n in memory.profile(model, **batch_of(llama)).norms}
    layer = "base_model.model.model.layers.1"
    assert norms[f"{layer}.input_layernorm"].reasons == [
        f"the weight of `{layer}.self_attn.q_proj.base_layer` is frozen: it saves no input",
        f"`{layer}.self_attn.q_proj.lora_A.default` saves a float32 copy of it",
        f"the weight of `{layer}.self_attn.k_proj` is frozen: it saves no input",
        f"the weight of `{layer}.self_attn.v_proj` is frozen: it saves no input",
    ]
    full = {n.module: n for n in memory.profile(replace(llama()), **batch_of(llama)).norms}
    assert full["model.layers.0.input_layernorm"].shared_with == [
        f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")
    ]
    assert full["model.layers.0.post_attention_layernorm"].shared_with == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")
    ]


def test_a_model_of_seven_billion_parameters():
    def build():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(use_cache=False))
        finally:
            torch.set_default_dtype(default)
        return peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=["q_proj", "v_proj"])).train()

    ids = torch.zeros(4, 512, dtype=torch.long)
    report = memory.estimate(build, {"input_ids": ids, "labels": ids}, torch.optim.AdamW)
    base = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    adapters = 32 * 2 * 2 * 64 * 4096  # float32
    inverse_frequencies = 2 * 128 // 2 * 4  # and their initial values
    assert report.peak.categories["parameters"] == base * 2 + adapters * 4 + inverse_frequencies
    # Two averages, and the step count for each of 128 matrices.
    assert report.peak.categories["optimizer state"] == adapters * 8 + 128 * 4
    assert report.forward_backward.nbytes > report.saved_bytes + report.peak.categories["parameters"]
