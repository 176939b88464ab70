"""What the estimates of lomem.memory say is alive after a forward pass, counted without lomem and autograd's hooks."""

import contextlib
import sys
from pathlib import Path

import lomem
import pytest
import torch
import torch.nn.functional as F
from lomem import memory
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from bytes_alive import bytes_alive  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def llama():
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def llama_lora(dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    model = peft.get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def vit():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).train()


class DiTBlock(nn.Module):
    """A block of a diffusion transformer: norms without weights, scaled, shifted and gated by a condition."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(32, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(32, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(128, 32)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(32, 6 * 32))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).unsqueeze(1).chunk(6, dim=-1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(y).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(y)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


def tokens():
    ids = torch.arange(2 * 16).view(2, 16)
    return {"input_ids": ids, "labels": ids}


def images():
    return {"pixel_values": torch.ones(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def patches():
    return {"x": torch.randn(2, 16, 32), "c": torch.randn(2, 32)}


#: How the model and its batch are made, and autocast's dtype.
CASES = {
    "llama": (llama, tokens, None),
    "llama, lora": (lambda: llama_lora(torch.bfloat16), tokens, None),
    "llama, float32 lora": (lambda: llama_lora(torch.float32), tokens, None),
    "vit": (vit, images, None),
    "vit, autocast": (vit, images, torch.bfloat16),
    "dit": (DiTBlock, patches, None),
    "dit, autocast": (DiTBlock, patches, torch.bfloat16),
}
METHODS = {
    "plain": None,
    "converted": {},
    "exact": {"bits": 16},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "activations": {"norms": "keep", "pairs": "keep"},
    "norms": {"activations": "keep", "pairs": "keep"},
}


def block(autocast):
    return torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()


def converted(model, batch, autocast, options):
    if options is not None:
        with block(autocast), contextlib.suppress(lomem.conversion.NothingToConvertError):
            lomem.convert(model, batch, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_is_alive(case, method):
    build, make_batch, autocast = CASES[case]
    if "llama" in case or "vit" in case:
        pytest.importorskip("transformers")
    options = METHODS[method]
    batch = make_batch()
    estimated = memory.estimate(
        build,
        batch,
        device="cpu",
        autocast=autocast,
        transform=lambda model: converted(model, make_batch(), autocast, options),
    )
    model = build()
    converted(model, batch, autocast, options)

    def forward():
        with block(autocast):
            output = model(**batch)
            return output.loss if hasattr(output, "loss") else output.sum()

    first, loss = bytes_alive(forward, batch.values())
    loss.backward()
    again, _ = bytes_alive(forward, batch.values())
    assert first == again == estimated.saved_bytes


class Hoarder(nn.Module):
    """Keeps a tensor that autograd does not save."""

    def forward(self, x):
        self.kept = x + 1
        return x.exp() * 2


def test_it_counts_what_is_held_by_anything():
    x = torch.ones(10, requires_grad=True)
    model = Hoarder()
    nbytes, result = bytes_alive(lambda: model(x))
    assert nbytes == 40 + 40  # what the module keeps, and exp's result, which exp saves
    del model.kept
    assert bytes_alive(lambda: x.exp(), [])[0] == 0  # what is returned does not count
    assert bytes_alive(lambda: x.exp() * x)[0] == 40
    y = x.exp()
    assert bytes_alive(lambda: y * y)[0] == 0  # it was there before
    assert bytes_alive(lambda: (y + 1).view(2, 5).sin())[0] == 40  # a view counts as its base
    del result


def test_nothing_is_alive_without_gradients():
    model, batch = llama(), tokens()
    with torch.no_grad():
        assert bytes_alive(lambda: model(**batch).loss)[0] == 0
