"""Models and training settings of the paper, to estimate their memory without downloading weights.

Yang et al., Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation, ICML 2024.

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
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@dataclass(frozen=True, eq=False)
class Preset:
    """A model and how the paper trains it.

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


def _llama(name: str, width: int, depth: int, heads: int, inner: int) -> Preset:
    return Preset(
        name=f"llama-{name}",
        description=f"LLaMA {name.upper()} (the first), 512 tokens",
        family=_LLAMA,
        options={
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
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            # The key-value cache is for generation; in training it would only copy keys and values.
            "use_cache": False,
            "attn_implementation": "sdpa",
        },
        small_options={
            "vocab_size": 128,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 32,
        },
        batch_size=4,
        seq_len=512,
        dtype=torch.bfloat16,
        autocast=None,
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


# --- Frozen 4-bit weights ---------------------------------------------------------------------------------------------

# NormalFloat4: Dettmers et al., QLoRA, NeurIPS 2023, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: Elements that share a scale.
BLOCK = 64


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    # Element 2*i is in the upper four bits of byte i, element 2*i + 1 in the lower four. Blocks are consecutive
    # elements of the flattened weight; the last one is padded with zeros.
    count = weight.numel()
    blocks = F.pad(weight.detach().float().flatten(), (0, -count % BLOCK)).unflatten(0, (-1, BLOCK))
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4, device=weight.device)
    # A block of zeros has scale 0; any other divisor gives the code of 0.
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
    packed = codes[0::2] << 4 | codes[1::2]
    return packed[: (count + 1) // 2].clone(), absmax


# A single op, as in bitsandbytes, so that its temporaries do not count as memory of the model.
@torch.library.custom_op("lomem_presets::dequantize_4bit", mutates_args=())
def _dequantize(packed: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    count = rows * columns
    table = torch.tensor(NF4, device=packed.device)
    values = table[torch.stack([packed >> 4, packed & 15], dim=1).int()].flatten()[:count]
    scales = absmax.repeat_interleave(BLOCK)[:count]
    return (values * scales).to(dtype).view(rows, columns)


@_dequantize.register_fake
def _(packed: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


class _Linear4bitFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        # The weight is frozen, so its gradient is not needed and the input is not saved.
        ctx.save_for_backward(packed, absmax)
        ctx.columns = input.shape[-1]
        weight = _dequantize(packed, absmax, rows, input.shape[-1], input.dtype)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, absmax = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ _dequantize(packed, absmax, grad.shape[-1], ctx.columns, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_input, None, None, grad_bias, None


class Linear4bit(nn.Linear):
    """A linear layer with a frozen 4-bit weight: a stand-in for bitsandbytes' ``Linear4bit`` in memory estimates only.

    It needs the same memory: 4 bits per element and a float32 scale per 64 elements; it does not save its input. Both
    passes dequantize the weight to ``compute_dtype``. The weight has NF4 codes, rounded to nearest. There is no double
    quantization (which would take 0.516 instead of 0.5625 bytes per element) and there are no fast kernels: for
    training, use bitsandbytes.

    Args:
        in_features: As in :class:`torch.nn.Linear`.
        out_features: As in :class:`torch.nn.Linear`.
        bias: As in :class:`torch.nn.Linear`.
        compute_dtype: Dtype of the multiplication.
        device: As in :class:`torch.nn.Linear`.

    Attributes:
        weight: Packed codes: uint8, ``(out_features * in_features + 1) // 2`` bytes.
        absmax: Scales: float32, one per 64 elements.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        # Subclasses Linear because peft accepts that as a LoRA target; only the shape of the weight differs.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        count = in_features * out_features
        packed = torch.zeros((count + 1) // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax: Tensor
        self.register_buffer("absmax", torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device))
        start = torch.zeros(out_features, dtype=compute_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(start) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> Linear4bit:
        """Quantizes the weight of a layer and freezes weight and bias.

        Args:
            linear: The layer to quantize; not modified.
            compute_dtype: Dtype of the multiplication. By default the dtype of the weight.
        """
        dtype = compute_dtype or linear.weight.dtype
        bias = linear.bias is not None
        device = linear.weight.device
        self = cls(linear.in_features, linear.out_features, bias, compute_dtype=dtype, device=device)
        packed, self.absmax = _quantize(linear.weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantized weight, of shape ``(out_features, in_features)``."""
        dtype = dtype or self.compute_dtype
        return _dequantize(self.weight, self.absmax, self.out_features, self.in_features, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies in ``compute_dtype``; the result has the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        result = _Linear4bitFunction.apply(
            input.to(self.compute_dtype), self.weight, self.absmax, bias, self.out_features
        )
        return cast(Tensor, result).to(input.dtype)


def quantize_linears(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Replaces the linear layers whose qualified names end with one of ``names`` with :class:`Linear4bit`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{suffix}" for suffix in names)):
            model.set_submodule(name, Linear4bit.from_linear(module))
    return model


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
