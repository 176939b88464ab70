"""Small models of architectures in transformers, built from configurations, with random weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lomem
import peft
import torch
import transformers as tf
from torch import nn
from torch.utils._pytree import tree_leaves

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DECODER = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def tokens() -> torch.Tensor:
    return torch.randint(5, 98, (2, 12), generator=torch.Generator().manual_seed(1))


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


def language() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


def classes() -> dict[str, Any]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 12).long(), "labels": torch.tensor([0, 1])}


def images() -> dict[str, Any]:
    return {"pixel_values": pictures(3, 32, 32), "labels": torch.tensor([0, 1])}


class Entry(NamedTuple):
    """One architecture.

    Attributes:
        model: Function that makes the model.
        batch: Function that makes its arguments.
        activations: Number of activations and calls that are converted, in float32.
        norms: Number of norms that are converted.
        behind: Number of additional activations converted if the norms before them are not.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    activations: int
    norms: int
    behind: int = 0


ZOO = {
    "llama": Entry(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), language, 2, 5),
    "mistral": Entry(lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, head_dim=8)), language, 2, 5),
    "qwen2": Entry(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)), language, 2, 5),
    "qwen3": Entry(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=8)), language, 2, 9),
    "gemma": Entry(lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**DECODER, head_dim=8)), language, 2, 5),
    "gemma2": Entry(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8)), language, 2, 9),
    "phi3": Entry(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**DECODER)), language, 2, 5),
    "gpt2": Entry(
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        language,
        2,
        5,
    ),
    "opt": Entry(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=99,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
                activation_function="gelu",
            )
        ),
        language,
        2,
        5,
    ),
    "gpt_neox": Entry(lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT)), language, 2, 5),
    # The embeddings' norm is followed by a dropout, which saves no input.
    "bert": Entry(lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)), classes, 2, 5),
    # The classifier also comes after a dropout.
    "roberta": Entry(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT | {"max_position_embeddings": 80})),
        classes,
        2,
        4,
    ),
    "distilbert": Entry(
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
        ),
        classes,
        2,
        5,
    ),
    "vit": Entry(lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), images, 2, 5),
    "deit": Entry(lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**IMAGE)), images, 2, 5),
    # The last norm's output is averaged.
    "dinov2": Entry(
        lambda: tf.Dinov2ForImageClassification(
            tf.Dinov2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8
            )
        ),
        images,
        2,
        4,
    ),
    # The outputs of the norms before attention are split into windows, which copies; the last one's output is averaged.
    "swin": Entry(
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        images,
        4,
        6,
    ),
    # One row per sequence is taken from the output of the text model's last norm. The vision model's first block begins
    # with a norm that takes another norm's output and saves it.
    "clip": Entry(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(
                text_config=TEXT | {"eos_token_id": 98, "bos_token_id": 1, "pad_token_id": 0},
                vision_config=IMAGE,
                projection_dim=16,
            )
        ),
        lambda: {"input_ids": tokens(), "pixel_values": pictures(3, 32, 32), "return_loss": True},
        4,
        9,
    ),
    # The encoder calls F.gelu twice.
    "whisper": Entry(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=99,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=16,
                max_target_positions=32,
                num_mel_bins=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        lambda: {"input_features": pictures(8, 32), "labels": tokens()},
        5,
        12,
    ),
    # Norms and gated activations of several ops each, which save several copies. They are converted even if nothing
    # else saves the output, as before the last dropouts.
    "t5": Entry(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=99,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            )
        ),
        language,
        4,
        12,
    ),
    # Convolutions, each followed by a norm and a GELU: converting either one frees memory, and the norms free more.
    "wav2vec2": Entry(
        lambda: tf.Wav2Vec2ForSequenceClassification(
            tf.Wav2Vec2Config(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                conv_dim=[32] * 3,
                conv_stride=[5, 2, 2],
                conv_kernel=[10, 3, 3],
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
                classifier_proj_size=16,
                layerdrop=0.0,
                apply_spec_augment=False,
            )
        ),
        lambda: {"input_values": pictures(400), "labels": torch.tensor([0, 1])},
        3,
        9,
        3,
    ),
    # The mixers have modules that never run, and call F.silu directly.
    "mamba": Entry(
        lambda: tf.MambaForCausalLM(
            tf.MambaConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, use_cache=False
            )
        ),
        language,
        2,
        3,
    ),
    # Two norms with the same input, and a third one.
    "falcon": Entry(
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(
                vocab_size=99,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                new_decoder_architecture=True,
                ffn_hidden_size=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        language,
        2,
        5,
    ),
    "convnext": Entry(
        lambda: tf.ConvNextForImageClassification(
            tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, patch_size=4, image_size=32)
        ),
        images,
        4,
        7,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, with random weights and biases in its norms, and a batch."""
    torch.manual_seed(0)
    model = ZOO[name].model().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or "ln_" in path:
                one = path.endswith("weight") and not name.startswith("gemma")  # gemma's is 1 + weight
                parameter.copy_(0.2 * torch.randn_like(parameter) + one)
    batch = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in ZOO[name].batch().items()
    }
    return model.to(dtype), batch


#: Dtypes of weights and inputs; None for float32 under bfloat16 autocast.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": None}


def converted(name: str, dtype: str, **options: Any) -> tuple[nn.Module, dict[str, Any], lomem.conversion.Report]:
    """A model converted as far as possible, its batch, and the report."""
    model, batch = build(name, DTYPES[dtype] or torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        try:
            return model, batch, lomem.convert(model, batch, check=False, **options)
        except lomem.conversion.NothingToConvertError:
            return model, batch, lomem.convert(model, batch, dry_run=True, **options)


def conversion(report: lomem.conversion.Report) -> dict[str, int]:
    """What tools/zoo_conversions.py writes for a model: bytes, and numbers of decisions."""
    actions = sorted(f"{d.kind} {d.action}" for d in report.decisions)
    before = report.saved_before or 0
    after = before if report.saved_after is None else report.saved_after
    return {"before": before, "after": after} | {action: actions.count(action) for action in dict.fromkeys(actions)}


def outputs(model, batch):
    with torch.no_grad():
        leaves = tree_leaves(model(**batch))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(model, batch):
    model.zero_grad()
    result = model(**batch)
    result.loss.backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def error(values, expected):
    """Relative error of the outputs, as a root mean square."""
    squares = [((a.double() - b).norm() / b.norm()) ** 2 for a, b in zip(values, expected, strict=True)]
    return torch.stack(squares).mean().sqrt().item()


def gradient_error(grads, expected):
    """Relative error of all gradients together. Some, of biases that cancel in softmax, are 0 up to rounding."""
    assert grads.keys() == expected.keys()
    squares = [((grads[n] - g).norm() ** 2, g.norm() ** 2) for n, g in expected.items()]
    return (sum(s for s, _ in squares) / sum(s for _, s in squares)).sqrt().item()


def adapted(model, rank=4):
    """Adds LoRA with a nonzero second matrix to the linear layers of attention and MLP."""
    names = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    config = peft.LoraConfig(r=rank, target_modules=sorted(set(names)), lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
