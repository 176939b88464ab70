"""A table of what modules of libraries are recognized as."""

import functools
import importlib
from typing import NamedTuple

import lomem
import pytest
import torch
from lomem.conversion.recognize import ActivationForm, NormForm, NotRecognized, recognize_activation, recognize_norm
from torch import nn
from transformers.activations import ACT2FN
from zoo import ZOO, build

D = 24

#: Kind, approximate and scale; modules not listed are not activations.
ACTIVATIONS = {
    "gelu": ("gelu", "none", 1.0),
    "gelu_fast": ("gelu", "tanh", 1.0),
    "gelu_new": ("gelu", "tanh", 1.0),
    "gelu_python": ("gelu", "none", 1.0),
    "gelu_pytorch_tanh": ("gelu", "tanh", 1.0),
    "gelu_python_tanh": ("gelu", "tanh", 1.0),
    "gelu_accurate": ("gelu", "tanh", 1.0),
    "quick_gelu": ("silu", "none", 1.702),
    "silu": ("silu", "none", 1.0),
    "swish": ("silu", "none", 1.0),
}


@pytest.mark.parametrize("name", list(ACT2FN))
def test_activations_of_transformers(name):
    found = recognize_activation(ACT2FN[name])
    if name not in ACTIVATIONS:
        assert isinstance(found, NotRecognized)
        return
    assert isinstance(found, ActivationForm), found
    assert (found.kind, found.approximate, found.scale) == ACTIVATIONS[name]


class Kind(NamedTuple):
    """The expected form of a norm.

    Attributes:
        centred: Whether the mean is subtracted.
        plus: Whether gamma is 1 + weight.
        gamma: Name of the weight.
        beta: Name of the bias.
        eps: Name of the attribute that eps is read from.
        dtype: Rule for the dtype of the result.
    """

    centred: bool
    plus: bool
    gamma: str | None
    beta: str | None
    eps: str | None
    dtype: str


LAYER = Kind(True, False, "weight", "bias", "eps", "input")
RMS = Kind(False, False, "weight", None, "variance_epsilon", "promote")

#: Classes in transformers.models whose constructor takes a width.
NORMS = {
    "llama.LlamaRMSNorm": RMS,
    "mistral.MistralRMSNorm": RMS,
    "qwen3.Qwen3RMSNorm": RMS,
    "phi3.Phi3RMSNorm": RMS,
    "olmoe.OlmoeRMSNorm": RMS,
    "deepseek_v3.DeepseekV3RMSNorm": RMS,
    "deepseek_v4.DeepseekV4RMSNorm": Kind(False, False, "weight", None, "variance_epsilon", "input"),
    "gemma.GemmaRMSNorm": Kind(False, True, "weight", None, "eps", "input"),
    "gemma2.Gemma2RMSNorm": Kind(False, True, "weight", None, "eps", "input"),
    "gemma3.Gemma3RMSNorm": Kind(False, True, "weight", None, "eps", "input"),
    "gemma3n.Gemma3nRMSNorm": Kind(False, False, "weight", None, "eps", "input"),
    "llama4.Llama4TextRMSNorm": Kind(False, False, "weight", None, "eps", "promote"),
    "xlstm.xLSTMRMSNorm": Kind(False, False, "weight", None, "eps", "promote"),
    "imagegpt.ImageGPTLayerNorm": Kind(False, False, "weight", None, "eps", "promote"),
    "t5.T5LayerNorm": Kind(False, False, "weight", None, "variance_epsilon", "weight"),
    "longt5.LongT5LayerNorm": Kind(False, False, "weight", None, "variance_epsilon", "weight"),
    "idefics.IdeficsRMSNorm": Kind(False, False, "weight", None, "variance_epsilon", "weight"),
    "cohere.CohereLayerNorm": Kind(True, False, "weight", None, "variance_epsilon", "input"),
    "nemotron.NemotronLayerNorm1P": Kind(True, True, "weight", "bias", "eps", "input"),
    "deberta.DebertaLayerNorm": Kind(True, False, "weight", "bias", "variance_epsilon", "promote"),
    "convnext.ConvNextLayerNorm": LAYER,
    "olmo.OlmoLayerNorm": Kind(True, False, None, None, None, "input"),
}


def module_of(name):
    path, cls = name.split(".")
    return getattr(importlib.import_module(f"transformers.models.{path}.modeling_{path}"), cls)


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_transformers(name):
    form = recognize_norm(module_of(name)(D), [(2, 5, D)])
    assert isinstance(form, NormForm), form
    assert (form.centred, form.one_plus, form.gamma, form.beta, form.eps_name, form.dtype) == NORMS[name]
    assert (form.shape, form.axis, form.ranks) == ((D,), -1, (3,))


#: Those that take channels-first inputs, or the reason why they are not norms.
CHANNELS_FIRST = {
    "convnext.ConvNextLayerNorm": None,
    "eomt.EomtLayerNorm2d": None,
    "vitdet.VitDetLayerNorm": "channels first",
}


@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_norms_of_channels_of_transformers(name):
    cls = module_of(name)
    norm = cls(D, data_format="channels_first") if "convnext" in name else cls(D)
    found = recognize_norm(norm, [(2, D, 4, 4)])
    if CHANNELS_FIRST[name] is None:
        assert isinstance(found, NormForm), found
        assert (found.axis, found.centred, found.gamma, found.beta) == (1, True, "weight", "bias")
    else:
        assert isinstance(found, NotRecognized)
        assert found.near
        assert CHANNELS_FIRST[name] in found.reason


#: Classes of transformers that are not norms of a single input.
OTHERS = ("mobilebert.NoNorm", "conditional_detr.ConditionalDetrFrozenBatchNorm2d", "dac.Snake1d")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("shape", [(2, 5, D), (2, D, 4, 4)], ids=str)
def test_what_is_no_norm_of_transformers(name, shape):
    found = recognize_norm(module_of(name)(D), [shape])
    assert isinstance(found, NotRecognized)
    assert not found.near


TORCH = {
    "LayerNorm": (nn.LayerNorm, LAYER),
    "LayerNorm, no bias": (
        functools.partial(nn.LayerNorm, bias=False),
        Kind(True, False, "weight", None, "eps", "input"),
    ),
    "LayerNorm, no weight": (
        functools.partial(nn.LayerNorm, elementwise_affine=False),
        Kind(True, False, None, None, "eps", "input"),
    ),
    "RMSNorm": (nn.RMSNorm, Kind(False, False, "weight", None, "eps", "input")),
    "GroupNorm": (functools.partial(nn.GroupNorm, 1), LAYER),
    "MSLayerNorm": (lomem.nn.MSLayerNorm, Kind(True, False, None, None, "eps", "input")),
    "MSRMSNorm": (lomem.nn.MSRMSNorm, Kind(False, False, None, None, "eps", "input")),
}


@pytest.mark.parametrize("name", TORCH)
def test_norms_of_torch_and_of_this_library(name):
    make, kind = TORCH[name]
    form = recognize_norm(make(D), [(5, D)])
    assert isinstance(form, NormForm), form
    assert (form.centred, form.one_plus, form.gamma, form.beta, form.eps_name, form.dtype) == kind


@pytest.mark.parametrize("name", ZOO)
def test_every_norm_and_activation_of_the_zoo_is_recognized(name):
    model, _ = build(name)
    leaves = {n: m for n, m in model.named_modules() if next(m.children(), None) is None}
    leaves = {n: m for n, m in leaves.items() if not type(m).__module__.startswith("torch.nn.utils.")}
    norms = {n: m for n, m in leaves.items() if "norm" in type(m).__name__.lower()}
    assert norms
    seen = {}
    for path, module in norms.items():
        key = type(module), tuple(module.weight.shape)
        if key in seen:
            continue
        width = module.weight.shape[-1]
        shapes = [(2, width, 4, 4)] if getattr(module, "data_format", "") == "channels_first" else [(2, 5, width)]
        seen[key] = recognize_norm(module, shapes)
        assert isinstance(seen[key], NormForm), (path, seen[key])
    activations = [m for m in leaves.values() if any(part in type(m).__name__.lower() for part in ("gelu", "silu"))]
    for module in {type(m): m for m in activations}.values():
        assert isinstance(recognize_activation(module), ActivationForm)
        with torch.no_grad():
            assert module(torch.zeros(2)).shape == (2,)  # unchanged
