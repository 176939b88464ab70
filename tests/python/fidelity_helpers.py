"""Models whose gradients lomem.convert and lomem.fit.report compare, and the same comparison by hand."""

import re
import warnings

import lomem
import pytest
import torch
import torch.nn.functional as F
from small_models import D as WIDTH
from torch import nn


def x_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


class Gated(nn.Module):
    """A residual gated unit whose gate and up projections share an input."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        z = self.norm(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


class Complex(nn.Module):
    """A model with complex parameters."""

    def __init__(self):
        super().__init__()
        self.turn, self.body = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.silu(self.body(F.silu((x * self.turn).real)))


def mlp():
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3)), (x_of(6, WIDTH),)


def gated():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Gated(), Gated()), (x_of(2, 5, WIDTH),)


def conv(depth=2, channels=6, size=8, activation=nn.SiLU):
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), activation()]
    return nn.Sequential(*layers), (x_of(4, channels, size, size),)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}


def llama(lora=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=50, max_position_embeddings=32, use_cache=False, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of the rest
                nn.init.normal_(parameter)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


def vit(depth=4):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 256}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))
    return model, {"pixel_values": x_of(4, 3, 32, 32), "labels": torch.arange(4)}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=50, n_positions=32, use_cache=False)
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


MODELS = {
    "mlp": mlp,
    "gated": gated,
    "conv": conv,
    "bert": bert,
    "llama": llama,
    "lora": lambda: llama(lora=True),
}
SETTINGS = {
    "default": {},
    "16": {"bits": 16},
    "8": {"bits": 8},
    "4": {"bits": 4},
    "2": {"bits": 2},
    "paper": {"criterion": "paper"},
    "codes": {"pairs": "keep"},
}


def built(name):
    torch.manual_seed(3)
    model, batch = MODELS[name]()
    return model.train(), batch


def seeded(make):
    torch.manual_seed(4)
    return make()


def run(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def projection(output):
    """The documented loss of an output that is a tensor."""
    generator = torch.Generator().manual_seed(0x6C6F6D656D)
    noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return (output.float() * noise).sum()


def step(model, batch, loss):
    """The gradients of a training step, by name, in float64."""
    model.zero_grad()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    loss(run(model, batch)).backward()
    torch.set_rng_state(state)
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def figures(exact, approximate):
    e, a = (torch.cat([g.flatten() for g in grads]) for grads in (exact, approximate))
    return ((e @ a) / e.norm() / a.norm()).item(), (a.norm() / e.norm()).item(), ((a - e).norm() / e.norm()).item()


def by_layer(exact, approximate):
    layers = {}
    for name in exact:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        layer: figures([exact[n] for n in names], [approximate[n] for n in names])
        for layer, names in layers.items()
        if any(exact[n].norm() > 0 for n in names)
    }


def check_figures(got, expected):
    # float64 of the same numbers: cosine and ratio to rounding, small errors to that of the difference.
    assert (got.cosine, got.ratio, got.error) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def convert(model, batch, **options):
    """Without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lomem.GradientWarning)
        return lomem.convert(model, batch, **options)


def approximate_actions(report):
    return {d.action for d in report.converted if re.fullmatch(r"\dbit( groups)?", d.action)}


def loss_of(name):
    return projection if name in ("mlp", "gated", "conv") else lambda output: output.loss
