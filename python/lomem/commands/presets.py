"""Models and training settings, to estimate their memory without downloading weights.

The settings are those of Yang et al., Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing
Backpropagation, ICML 2024. The models are theirs and, under the same settings, later ones with grouped-query attention.

    >>> setting = presets.SETTINGS[0]
    >>> with torch.device("meta"):
    ...     model = presets.build(setting)
    ...     batch = presets.get(setting.preset).batch()

Everything is created on torch's default device; on the meta device, even the largest model takes no memory. Requires
the optional packages of ``pip install 'lomem[models]'``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .linear4bit import Linear4bit, quantize_linears

__all__ = [
    "PRESETS",
    "SETTINGS",
    "Linear4bit",
    "Lora",
    "Preset",
    "Setting",
    "add_lora",
    "build",
    "from_config",
    "get",
    "quantize_linears",
    "without_peft_cast",
]

Targets = Literal["qv", "all"]


def _import(package: str) -> Any:
    # Imported on demand: lomem requires only torch, and these packages take seconds to import.
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lomem.commands.presets needs the package {error.name}: pip install 'lomem[models]'"
        ) from error


# --- Models -----------------------------------------------------------------------------------------------------------


def _images(config: Any, batch_size: int, seq_len: int | None) -> dict[str, Tensor]:
    if seq_len is not None:
        raise ValueError(f"seq_len is {seq_len}, expected None: images have the config's size, {config.image_size}")
    size = config.image_size
    pixels = torch.zeros(batch_size, config.num_channels, size, size)
    return {"pixel_values": pixels, "labels": torch.zeros(batch_size, dtype=torch.long)}


def _tokens(batch_size: int, seq_len: int | None) -> Tensor:
    if seq_len is None:
        raise ValueError("seq_len is None, expected a number of tokens for a batch of text")
    # 5 is an ordinary token in every vocabulary here, never padding.
    return torch.full((batch_size, seq_len), 5)


def _padded(config: Any, batch_size: int, seq_len: int | None) -> dict[str, Tensor]:
    # Real sentences differ in length. The last column is padding, so that attention saves a mask.
    tokens = _tokens(batch_size, seq_len)
    tokens[:, -1] = config.pad_token_id
    mask = torch.ones_like(tokens)
    mask[:, -1] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _sentences(config: Any, batch_size: int, seq_len: int | None) -> dict[str, Tensor]:
    return {**_padded(config, batch_size, seq_len), "labels": torch.zeros(batch_size, dtype=torch.long)}


def _questions(config: Any, batch_size: int, seq_len: int | None) -> dict[str, Tensor]:
    answer = {name: torch.zeros(batch_size, dtype=torch.long) for name in ("start_positions", "end_positions")}
    return {**_padded(config, batch_size, seq_len), **answer}


def _text(config: Any, batch_size: int, seq_len: int | None) -> dict[str, Tensor]:
    tokens = _tokens(batch_size, seq_len)
    return {"input_ids": tokens, "labels": tokens.clone()}


@dataclass(frozen=True)
class Family:
    """What all sizes of a model have in common.

    Attributes:
        model_class: Name of the model class in transformers, including the head.
        config_class: Name of the config class in transformers.
        make_batch: Function that makes a batch from a config, a batch size and a sequence length.
        qv: Query and value projections, as in peft's ``target_modules``.
        linears: All linear layers except the head.
        head: Layer that is fully trained alongside LoRA; None if there is none.
    """

    model_class: str
    config_class: str
    make_batch: Callable[[Any, int, int | None], dict[str, Tensor]]
    qv: tuple[str, ...]
    linears: tuple[str, ...]
    head: str | None


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_BERT_LINEARS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")

_VIT = Family(
    "ViTForImageClassification",
    "ViTConfig",
    _images,
    qv=("q_proj", "v_proj"),
    linears=(*_PROJECTIONS, "fc1", "fc2"),
    head="classifier",
)
_SWIN = dataclasses.replace(
    _VIT,
    model_class="SwinForImageClassification",
    config_class="SwinConfig",
    linears=(*_PROJECTIONS, "fc1", "fc2", "reduction"),
)
_ROBERTA = Family(
    "RobertaForSequenceClassification",
    "RobertaConfig",
    _sentences,
    qv=("query", "value"),
    linears=_BERT_LINEARS,
    head="classifier",
)
_BERT = dataclasses.replace(
    _ROBERTA,
    model_class="BertForQuestionAnswering",
    config_class="BertConfig",
    make_batch=_questions,
    head="qa_outputs",
)
_LLAMA = Family(
    "LlamaForCausalLM",
    "LlamaConfig",
    _text,
    qv=("q_proj", "v_proj"),
    linears=(*_PROJECTIONS, "gate_proj", "up_proj", "down_proj"),
    head=None,
)
_QWEN3 = dataclasses.replace(_LLAMA, model_class="Qwen3ForCausalLM", config_class="Qwen3Config")
_GEMMA3 = dataclasses.replace(_LLAMA, model_class="Gemma3ForCausalLM", config_class="Gemma3TextConfig")


@dataclass(frozen=True, eq=False)
class Preset:
    """A model and how it is trained.

    Attributes:
        name: Key in :data:`PRESETS`.
        description: Description in one line.
        family: Classes and layer names.
        options: Options of the config: sizes, dropout and attention.
        small_options: Options that :meth:`small` overrides.
        batch_size: Batch size per step.
        seq_len: Number of tokens per sequence; None for images.
        dtype: Dtype of the weights.
        autocast: Dtype of automatic mixed precision, None for none.
    """

    name: str
    description: str
    family: Family = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)
    small_options: Mapping[str, Any] = field(repr=False)
    batch_size: int
    seq_len: int | None
    dtype: torch.dtype
    autocast: torch.dtype | None

    def config(self) -> Any:
        """Makes the transformers config."""
        return getattr(_import("transformers"), self.family.config_class)(**self.options)

    def build(self) -> Any:
        """Makes the model, including the head, with random weights, in training mode, on the default device."""
        model = getattr(_import("transformers"), self.family.model_class)(self.config())
        return model.to(self.dtype).train()

    def batch(self, batch_size: int | None = None, seq_len: int | None = None) -> dict[str, Tensor]:
        """Makes a batch with labels, on the default device: constants of the right shapes.

        Args:
            batch_size: Batch size. By default the preset's.
            seq_len: Number of tokens per sequence. By default the preset's; not allowed for images.
        """
        size = self.batch_size if batch_size is None else batch_size
        return self.family.make_batch(self.config(), size, self.seq_len if seq_len is None else seq_len)

    def small(self) -> Preset:
        """A tiny version of this preset, for tests."""
        options = {**self.options, **self.small_options}
        seq_len = None if self.seq_len is None else 16
        return dataclasses.replace(self, name=f"{self.name}-small", options=options, batch_size=2, seq_len=seq_len)


def _vit(name: str, width: int, depth: int, heads: int) -> Preset:
    return Preset(
        name=f"vit-{name}",
        description=f"Vision Transformer {name.upper()}/16, 224 px, 1000 classes",
        family=_VIT,
        options={
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "layer_norm_eps": 1e-12,
            "qkv_bias": True,
            "num_labels": 1000,
            "attn_implementation": "sdpa",
        },
        small_options={
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "num_labels": 10,
        },
        batch_size=64,
        seq_len=None,
        dtype=torch.float32,
        autocast=torch.bfloat16,
    )


def _swin(name: str, width: int, depths: list[int], heads: list[int]) -> Preset:
    return Preset(
        name=f"swin-{name}",
        description=f"Swin Transformer {name.upper()}, 224 px, 1000 classes",
        family=_SWIN,
        options={
            "image_size": 224,
            "patch_size": 4,
            "num_channels": 3,
            "embed_dim": width,
            "depths": depths,
            "num_heads": heads,
            "window_size": 7,
            "mlp_ratio": 4.0,
            "qkv_bias": True,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.1,
            "use_absolute_embeddings": False,
            "layer_norm_eps": 1e-5,
            "num_labels": 1000,
            "attn_implementation": "sdpa",
        },
        small_options={
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 10,
        },
        batch_size=64,
        seq_len=None,
        dtype=torch.float32,
        autocast=torch.bfloat16,
    )


_BERT_OPTIONS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "num_labels": 2,
    "attn_implementation": "sdpa",
}
_SMALL_BERT: Mapping[str, Any] = {
    "vocab_size": 128,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


#: Of all decoders.
_DECODER_OPTIONS: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    # The key-value cache is for generation; in training it would only copy keys and values.
    "use_cache": False,
    "attn_implementation": "sdpa",
}


def _decoder(name: str, description: str, family: Family, options: Mapping[str, Any], **small: Any) -> Preset:
    """A decoder, trained with the batch size and sequence length of the paper's LLaMA."""
    return Preset(
        name=name,
        description=f"{description}, 512 tokens",
        family=family,
        options={**_DECODER_OPTIONS, **options},
        small_options={
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 32,
            **small,
        },
        batch_size=4,
        seq_len=512,
        dtype=torch.bfloat16,
        autocast=None,
    )


def _llama(name: str, width: int, depth: int, heads: int, inner: int) -> Preset:
    return _decoder(
        f"llama-{name}",
        f"LLaMA {name.upper()} (the first)",
        _LLAMA,
        {
            "vocab_size": 32000,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": inner,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
        num_key_value_heads=4,
    )


# Four or two query heads share a key-value head. The numbers are those of the published configurations.
_GROUPED = (
    _decoder(
        "llama-3.1-8b",
        "Llama 3.1 8B",
        _LLAMA,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    _decoder(
        "qwen3-8b",
        "Qwen3 8B",
        _QWEN3,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": False,
        },
        num_key_value_heads=2,
        head_dim=16,
    ),
    _decoder(
        "gemma-3-4b",
        "Gemma 3 4B without its vision tower",
        _GEMMA3,
        {
            "vocab_size": 262208,
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "intermediate_size": 10240,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131072,
            # Every sixth layer attends to all tokens, the others to the last 1024.
            "sliding_window": 1024,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
    ),
)


_ALL = (
    _vit("b", width=768, depth=12, heads=12),
    _vit("l", width=1024, depth=24, heads=16),
    _swin("t", width=96, depths=[2, 2, 6, 2], heads=[3, 6, 12, 24]),
    _swin("s", width=96, depths=[2, 2, 18, 2], heads=[3, 6, 12, 24]),
    _swin("b", width=128, depths=[2, 2, 18, 2], heads=[4, 8, 16, 32]),
    Preset(
        name="roberta-base",
        description="RoBERTa base, sentence classification (GLUE)",
        family=_ROBERTA,
        options={
            **_BERT_OPTIONS,
            "vocab_size": 50265,
            # Positions start after the padding index, so 512 tokens fit.
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
        },
        small_options=_SMALL_BERT,
        batch_size=32,
        seq_len=128,
        dtype=torch.float32,
        autocast=torch.bfloat16,
    ),
    Preset(
        name="bert-base",
        description="BERT base, question answering (SQuAD)",
        family=_BERT,
        options={
            **_BERT_OPTIONS,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        },
        small_options=_SMALL_BERT,
        batch_size=32,
        seq_len=384,
        dtype=torch.float32,
        autocast=torch.bfloat16,
    ),
    _llama("7b", width=4096, depth=32, heads=32, inner=11008),
    _llama("13b", width=5120, depth=40, heads=40, inner=13824),
    *_GROUPED,
)

#: All presets by name.
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def get(name: str) -> Preset:
    """Returns the preset with the given name.

    Raises:
        ValueError: If there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


#: Batches by the suffix of a class name in transformers; the first match counts.
_HEADS: Mapping[str, Callable[[Any, int, int | None], dict[str, Tensor]]] = {
    "ForImageClassification": _images,
    "ForSequenceClassification": _sentences,
    "ForQuestionAnswering": _questions,
    "ForCausalLM": _text,
    "LMHeadModel": _text,
}
_HEAD_LAYERS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")
_QV = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "qkv_proj", "query_key_value", "c_attn")


def from_config(path: str) -> Preset:
    """Makes a preset from a local transformers config, with weights in the config's dtype.

    Args:
        path: A folder with a ``config.json``, or such a file. Its ``architectures`` must name a class for image or
            sequence classification, question answering or causal language modelling.

    Raises:
        ValueError: If the file is not such a config.
    """
    transformers = _import("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises various errors for invalid configs
        raise ValueError(f"{path} is not a transformers config: {error}") from error
    architectures = list(getattr(config, "architectures", None) or [])
    head = next((head for head in _HEADS if architectures and architectures[0].endswith(head)), None)
    if head is None or not hasattr(transformers, architectures[0]):
        raise ValueError(
            f"{path}: architectures is {architectures}, expected a class of transformers that ends in one of "
            f"{', '.join(_HEADS)}"
        )
    with torch.device("meta"):
        model = getattr(transformers, architectures[0])(config)
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    heads = [name for name, _ in modules if name in _HEAD_LAYERS]
    linears = dict.fromkeys(n for n, m in modules if type(m).__name__ in ("Linear", "Conv1D") and n not in heads)
    positions = getattr(config, "max_position_embeddings", 512)
    return Preset(
        name=architectures[0],
        description=f"{architectures[0]} of {path}",
        family=Family(
            architectures[0],
            type(config).__name__,
            _HEADS[head],
            qv=tuple(name for name in linears if name in _QV),
            linears=tuple(linears),
            head=heads[0] if heads and _HEADS[head] is not _text else None,
        ),
        options=config.to_diff_dict() | {"architectures": architectures},
        small_options={},
        batch_size=8,
        seq_len=None if _HEADS[head] is _images else min(512, positions),
        dtype=config.dtype or torch.float32,
        autocast=None,
    )


# --- LoRA -------------------------------------------------------------------------------------------------------------


def add_lora(
    model: nn.Module,
    preset: Preset,
    r: int,
    targets: Targets = "qv",
    *,
    dropout: float = 0.0,
    alpha: float = 16.0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Freezes a model except for its head, and adds LoRA to its linear layers with peft.

    Args:
        model: Model of the preset; modified in place.
        preset: Preset with the names of the layers.
        r: Rank.
        targets: ``"qv"`` for the query and value projections, ``"all"`` for all linear layers except the head.
        dropout: Dropout probability on the input of LoRA.
        alpha: Scaling parameter; LoRA is scaled by ``alpha / r``.
        dtype: Dtype of the LoRA weights. peft's default is float32, whatever the model's dtype.

    Returns:
        The ``peft.PeftModel``.

    Raises:
        ValueError: If ``targets`` is neither ``"qv"`` nor ``"all"``.
    """
    names = {"qv": preset.family.qv, "all": preset.family.linears}
    if targets not in names:
        raise ValueError(f"targets is {targets!r}, expected one of {', '.join(map(repr, names))}")
    peft = _import("peft")
    head = preset.family.head
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(names[targets]),
        # Otherwise names such as "output.dense" would also match in the head.
        exclude_modules=None if head is None else rf"(.*\.)?{head}(\..*)?",
        modules_to_save=None if head is None else [head],
    )
    peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for layer in _lora_layers(peft_model):
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    return peft_model.train()


def _lora_layers(model: nn.Module) -> list[Any]:
    lora = _import("peft.tuners.lora")
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def without_peft_cast(model: nn.Module) -> nn.Module:
    """Stops peft from casting the input of LoRA layers to the dtype of the LoRA weights, in place.

    Under autocast this cast is useless: the multiplication casts back, and the copy is saved for the backward pass.
    Without autocast it is needed if the model and LoRA have different dtypes.

    Raises:
        ValueError: If the model has no LoRA layer.
    """
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("model has no LoRA layer, expected at least one")
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    return model


# --- Settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """LoRA options, as in :func:`add_lora`."""

    r: int
    targets: Targets
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        layers = {"qv": "q, v", "all": "all linears"}[self.targets]
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"LoRA {layers} r{self.r}{dropout} in {_short(self.dtype)}"


@dataclass(frozen=True)
class Setting:
    """One row of the tables: a preset and how it is trained.

    Attributes:
        preset: Name of the preset.
        lora: LoRA options; None for full fine-tuning.
        four_bit: Whether the frozen linear layers are :class:`Linear4bit`.
        peft_cast: Whether peft casts the input of LoRA layers; see :func:`without_peft_cast`.
    """

    preset: str
    lora: Lora | None = None
    four_bit: bool = False
    peft_cast: bool = True

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of automatic mixed precision, None for none."""
        return get(self.preset).autocast

    def __str__(self) -> str:
        autocast = f", AMP {_short(self.autocast)}" if self.autocast is not None else ""
        method = "full fine-tuning" if self.lora is None else str(self.lora)
        base = ", 4-bit base" if self.four_bit else ""
        cast = "" if self.peft_cast else ", no peft cast"
        return f"{self.preset}{base}, {method}{cast}{autocast}"


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def build(setting: Setting, preset: Preset | None = None) -> Any:
    """Builds the model of a setting on the default device, in training mode; trained parameters require gradients.

    Args:
        setting: The setting to build.
        preset: Preset to use instead of the one that the setting names, for example its :meth:`Preset.small`.

    Raises:
        ValueError: If the setting has a 4-bit base but no LoRA.
    """
    preset = preset or get(setting.preset)
    model = preset.build()
    if setting.four_bit:
        if setting.lora is None:
            raise ValueError("four_bit is True without lora, expected both: 4-bit weights are frozen")
        quantize_linears(model, preset.family.linears)
    if setting.lora is not None:
        lora = setting.lora
        model = add_lora(model, preset, lora.r, lora.targets, dropout=lora.dropout, dtype=lora.dtype)
        if not setting.peft_cast:
            without_peft_cast(model)
    return model


_VIT_SETTINGS = (None, Lora(4, "qv"), Lora(4, "all"))
_ROBERTA_SETTINGS = (None, Lora(64, "all"), Lora(64, "all", dropout=0.1))
_LLAMA_SETTINGS = (
    Lora(64, "all", dtype=torch.bfloat16),
    Lora(64, "all", dropout=0.1, dtype=torch.bfloat16),
    Lora(64, "all", dtype=torch.float32),
)

#: The rows of the tables. The paper's LLaMA script uses dropout 0.1 and bfloat16; the other rows show what those cost.
SETTINGS: tuple[Setting, ...] = (
    *(Setting(name, lora) for name in ("vit-b", "vit-l") for lora in _VIT_SETTINGS),
    Setting("swin-b"),
    *(Setting("roberta-base", lora) for lora in _ROBERTA_SETTINGS),
    Setting("bert-base"),
    *(Setting(name, lora, four_bit=True) for name in ("llama-7b", "llama-13b") for lora in _LLAMA_SETTINGS),
)
