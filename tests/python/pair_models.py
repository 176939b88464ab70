"""More small models of transformers, whose linear layers rebuild activations, gated products and modulated norms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn
from zoo import DECODER, IMAGE, TEXT, ZOO, build, classes, images, language, pictures, tokens

WIDE = TEXT | {"max_position_embeddings": 80}
SEQUENCES = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


class Model(NamedTuple):
    """One architecture.

    Attributes:
        model: Function that makes the model.
        batch: Function that makes its arguments.
        pairs: Number of activations and calls that linear layers or products rebuild.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    pairs: int = 2


def _text(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, name + head)(getattr(tf, name + "Config")(**options))


def sequences() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


MODELS = {
    "phi": Model(_text("Phi", "ForCausalLM", **TEXT), language),
    "gptj": Model(
        _text("GPTJ", "ForCausalLM", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
        language,
    ),
    "codegen": Model(
        _text("CodeGen", "ForCausalLM", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
        language,
    ),
    "gpt_bigcode": Model(
        _text("GPTBigCode", "ForCausalLM", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64), language
    ),
    "gpt_neo": Model(
        _text(
            "GPTNeo",
            "ForCausalLM",
            vocab_size=99,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global"], 2]],
        ),
        language,
    ),
    "bloom": Model(_text("Bloom", "ForCausalLM", vocab_size=99, hidden_size=32, n_layer=2, n_head=4), language),
    "starcoder2": Model(_text("Starcoder2", "ForCausalLM", **DECODER), language),
    "stablelm": Model(_text("StableLm", "ForCausalLM", **DECODER), language),
    "olmo": Model(_text("Olmo", "ForCausalLM", **DECODER), language),
    "olmo2": Model(_text("Olmo2", "ForCausalLM", **DECODER), language),
    "cohere": Model(_text("Cohere", "ForCausalLM", **DECODER), language),
    "granite": Model(_text("Granite", "ForCausalLM", **DECODER), language),
    # Gate and up are the halves of one linear layer's result.
    "glm": Model(_text("Glm", "ForCausalLM", **DECODER, head_dim=8, partial_rotary_factor=0.5), language),
    "gemma3": Model(lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**DECODER, head_dim=8)), language),
    # Experts are batches of weights, without linear layers. The default implementation knows no float64.
    "mixtral": Model(
        _text("Mixtral", "ForCausalLM", **DECODER, num_local_experts=4, experts_implementation="eager"), language
    ),
    "electra": Model(_text("Electra", "ForSequenceClassification", **TEXT, embedding_size=32), classes, 3),
    "albert": Model(_text("Albert", "ForSequenceClassification", **TEXT, embedding_size=16), classes, 1),
    "mpnet": Model(_text("MPNet", "ForSequenceClassification", **WIDE), classes),
    "roformer": Model(_text("RoFormer", "ForSequenceClassification", **TEXT, embedding_size=32), classes, 3),
    "convbert": Model(_text("ConvBert", "ForSequenceClassification", **TEXT, embedding_size=32), classes, 3),
    # Its GELU is not a single op, and of a wider dtype.
    "esm": Model(
        _text("Esm", "ForSequenceClassification", **WIDE, pad_token_id=0, mask_token_id=3, token_dropout=False),
        classes,
        0,
    ),
    # Dropout is between the activation and the linear layer.
    "xlnet": Model(
        _text("XLNet", "ForSequenceClassification", vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64),
        classes,
    ),
    "bart": Model(_text("Bart", "ForConditionalGeneration", **SEQUENCES), sequences),
    "blenderbot": Model(_text("Blenderbot", "ForConditionalGeneration", **SEQUENCES), sequences),
    "siglip": Model(
        lambda: tf.SiglipForImageClassification(tf.SiglipConfig(text_config=TEXT, vision_config=IMAGE, num_labels=2)),
        images,
        3,
    ),
    "beit": Model(_text("Beit", "ForImageClassification", **IMAGE), images),
    "videomae": Model(
        _text("VideoMAE", "ForVideoClassification", **IMAGE, num_frames=4, tubelet_size=2),
        lambda: {"pixel_values": pictures(4, 3, 32, 32), "labels": torch.tensor([0, 1])},
    ),
    "ast": Model(
        _text(
            "AST",
            "ForAudioClassification",
            **{k: v for k, v in IMAGE.items() if k != "image_size"} | {"num_mel_bins": 16, "max_length": 16},
        ),
        lambda: {"input_values": pictures(16, 16), "labels": torch.tensor([0, 1])},
    ),
}
#: All of them, with those of the zoo.
NAMES = [*ZOO, *MODELS]


def build_pairs(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, with random weights and biases in its norms, and a batch."""
    if name in ZOO:
        return build(name, dtype)
    torch.manual_seed(0)
    model = MODELS[name].model().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in path.lower() or "ln_" in path):
                parameter.add_(0.2 * torch.randn_like(parameter))
    batch = {
        key: value.to(dtype) if value.is_floating_point() and key != "attention_mask" else value
        for key, value in MODELS[name].batch().items()
    }
    return model.to(dtype), batch
