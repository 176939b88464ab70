"""Converting a model with 4-bit weights by bitsandbytes."""

import bitsandbytes
import lomem
import pytest
import torch
import transformers
from torch import nn
from zoo import adapted, gradient_error, gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_quantized_by_bitsandbytes():
    torch.manual_seed(0)
    # Not smaller: bitsandbytes' CPU kernels require whole blocks of weights.
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
            quantized = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, **options)
            quantized.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, quantized.to("cpu"))
    model = adapted(model)
    ids = torch.randint(5, 98, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    before = gradients(model, batch)
    assert {type(m).__name__ for m in model.modules()} >= {"Linear4bit", "LlamaRMSNorm"}
    report = lomem.convert(model, batch, activations="keep")
    # The first norm's input needs no gradient; the last one's consumer is frozen.
    assert [d.action for d in report.decisions if d.kind == "norm"].count("inverted") == 4
    assert report.saved_after < report.saved_before
    # Rounding in bfloat16, of which two runs of the same model show none; quantization itself is off by a tenth.
    assert gradient_error(gradients(model, batch), before) < 2**-6
