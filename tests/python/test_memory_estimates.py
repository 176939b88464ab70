"""Estimates of lomem.memory, against bytes counted by hand."""

from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from lomem import memory
from lomem.memory import _measured
from memory_helpers import PARAMETERS, H, Tiny, tiny_input
from torch import nn
from torch.utils.checkpoint import checkpoint


class Everything(nn.Module):
    """Ops that save the same with fake tensors as with real ones, in both precisions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norms = nn.ModuleList([nn.LayerNorm(16), lomem.nn.MSRMSNorm(16), nn.RMSNorm(16), nn.GroupNorm(2, 16)])
        self.bn = nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.act = lomem.nn.GELU(bits=2)
        self.register_buffer("scale", torch.ones(16), persistent=False)
        self.plain = torch.ones(16)

    def forward(self, ids):
        if ids.max() > 9:
            raise ValueError("looked at the ids")
        x = self.embedding(ids) * self.scale + self.plain + torch.tensor(0.5)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(self.norms[0](x), x, x, need_weights=False)[0]
        x = self.dropout(self.act(self.norms[1](x)))
        x = self.norms[2](x)
        x = self.norms[3](x.flatten(0, 1))
        return self.head(self.bn(x))


def ids(**kwargs):
    return torch.randint(0, 10, (3, 5), **kwargs)


def without_source(report):
    return {**report.to_dict(), "source": None}


OPTIMIZERS = {
    "none": None,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adamw foreach": partial(torch.optim.AdamW, foreach=True),
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_estimate_for_the_cpu_is_exact(dtype, autocast, optimizer):
    def build():
        return Everything().to(dtype)

    def loss(y):
        return F.cross_entropy(y.float(), torch.zeros(15, dtype=torch.long))

    make = OPTIMIZERS[optimizer]
    model = build()
    model.plain = model.plain.to(dtype)
    real = memory.step_peak(model, ids(), make and make(model.parameters()), loss=loss, autocast=autocast)

    def build_fake():
        made = build()
        made.plain = made.plain.to(dtype)
        return made

    fake = memory.estimate(build_fake, ids(), make, loss=loss, device="cpu", autocast=autocast)
    assert without_source(fake) == without_source(real)
    assert (fake.source, real.source) == ("estimated", "measured")


def test_a_batch_may_be_made_by_a_function():
    made = [
        memory.estimate(Tiny, batch, device="cpu") for batch in (tiny_input, tiny_input(), [tiny_input(device="meta")])
    ]
    assert made[0] == made[1] == made[2] == memory.estimate(Tiny, {"x": tiny_input()}, device="cpu")


def test_an_estimate_of_a_converted_model():
    def convert(model):
        model.act = lomem.nn.GELU(bits=2)

    assert memory.estimate(Tiny, tiny_input(), transform=convert).saved_bytes == H + H // 16
    wrapped = memory.estimate(Tiny, tiny_input(), transform=lambda model: nn.Sequential(model, nn.Linear(4, 4)))
    assert wrapped.peak.categories["parameters"] == PARAMETERS + 20 * 4


def test_an_estimate_takes_no_memory():
    def build():
        return nn.Linear(2**20, 2**20, bias=False)  # 4 TiB

    report = memory.estimate(build, partial(torch.zeros, 2, 2**20), torch.optim.AdamW)
    assert report.peak.categories["parameters"] == 2**42
    assert report.peak.categories["optimizer state"] == 2**43 + 4


def test_a_model_that_is_there_stays_real():
    model = Tiny()
    before = list(model.parameters())
    memory.estimate(lambda: model, tiny_input())
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_random_numbers_are_left_as_they_were():
    before = torch.get_rng_state()
    memory.estimate(Everything, ids)
    assert torch.equal(torch.get_rng_state(), before)


def test_fake_models_for_others():
    def build():
        model = Everything()
        model.conv.requires_grad_(False)
        return model

    with memory.fake(build) as model:
        assert model.head.weight is model.embedding.weight
        assert not model.conv.weight.requires_grad
        assert isinstance(model.conv.weight, nn.Parameter)
        assert model.scale.device.type == model.plain.device.type == "cpu"
        assert model(ids()).shape == (15, 10)
        profile = memory.profile(model, ids())
        step = memory.step_peak(model, ids(), torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    assert profile.saved_bytes == step.saved_bytes == memory.profile(build(), ids()).saved_bytes
    assert step.source == "estimated"


def test_dropout_on_cuda_keeps_a_byte_an_element():
    def build():
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5))

    assert memory.estimate(build, tiny_input(), device="cpu").saved_bytes == H
    assert memory.estimate(build, tiny_input(), device="cuda").saved_bytes == H // 4
    in_place = memory.estimate(lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5, inplace=True)), tiny_input())
    assert in_place.saved_bytes == H


class Attention(nn.Module):
    def __init__(self, mask=None, dropout=0.1):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.mask, self.dropout = mask, dropout

    def forward(self, x):
        q, k, v = (linear(x).unflatten(-1, (2, 8)).transpose(1, 2) for linear in self.qkv)
        mask = torch.ones(20, 20, dtype=torch.bool) if self.mask else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout)


def test_attention_on_cuda_is_fused():
    tensor = 4 * 20 * 16  # elements of each of q, k, v and the output
    x = torch.randn(4, 20, 16)

    def saved(autocast=None, **kwargs):
        return memory.estimate(partial(Attention, **kwargs), x, autocast=autocast).saved_bytes

    # float32, efficient kernel: q, k, v, output; one float per row, rows padded to 32; seed and offset, 8 bytes each.
    assert saved() == 4 * tensor * 4 + 4 * 2 * 32 * 4 + 16
    # With a bool mask: a float one, rows padded to a multiple of 16, shared by heads and batch.
    assert saved(mask=True) == saved() + 20 * 32 * 4
    # 16 bits, flash kernel: the same without padding; 24 bytes of state. And the input's bf16 copies.
    assert saved(torch.bfloat16) == 4 * tensor * 2 + 4 * 2 * 20 * 4 + 24 + 3 * tensor * 2
    # The efficient kernel, because of the mask.
    assert saved(torch.bfloat16, mask=True) == 7 * tensor * 2 + 4 * 2 * 32 * 4 + 16 + 20 * 32 * 2


def test_attention_inside_modules_of_torch_is_fused():
    def build():
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    x = torch.randn(4, 20, 16)
    cpu, cuda = (memory.estimate(build, x, device=device) for device in ("cpu", "cuda"))
    # On the CPU, attention with dropout is a chain of ops that saves several 20 x 20 matrices per head.
    assert cpu.saved_bytes - cuda.saved_bytes > 2 * 4 * 2 * 20 * 20 * 4


def test_autocast_on_cuda_runs_norms_in_float32():
    def build():
        return nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16, elementwise_affine=False))

    x = torch.randn(4, 16)
    rows = 4
    activation = rows * 16
    # bf16 copy of x; the norm's input, bf16 on the CPU and a float32 copy on CUDA; mean and 1/std.
    cpu = memory.estimate(build, x, device="cpu", autocast=torch.bfloat16)
    cuda = memory.estimate(build, x, device="cuda", autocast=torch.bfloat16)
    assert cpu.saved_bytes == activation * 2 + activation * 2 + 2 * rows * 2
    assert cuda.saved_bytes == activation * 2 + activation * 4 + 2 * rows * 4


def test_rms_norm_on_cuda_is_one_op():
    def build():
        return nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16))

    # Its input and one float per row.
    assert memory.estimate(build, torch.randn(4, 16)).saved_bytes == 4 * 16 * 4 + 4 * 4


def test_optimizers_on_cuda_run_over_all_parameters_at_once():
    def build():
        return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))

    weights = 8 * 64 * 64 * 4
    cpu, cuda = (memory.estimate(build, torch.randn(1, 64), torch.optim.AdamW, device=d) for d in ("cpu", "cuda"))
    assert cpu.peak.categories["temporaries"] < weights
    assert cuda.peak.categories["temporaries"] >= weights


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_recomputed_runs_as_on_cuda_too(use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    x = torch.randn(256, 16, requires_grad=True)
    cuda, cpu = (memory.estimate(Model, x, device=device) for device in ("cuda", "cpu"))
    assert cuda.peak.nbytes < cpu.peak.nbytes


def test_measured_peak_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"lomem.memory.measured_peak: no CUDA device is available, expected one"):
        memory.measured_peak(Tiny, tiny_input)


def test_measured_peak_wants_importable_functions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"measured_peak: batch_fn is <function .*, expected an importable function"):
        memory.measured_peak(Tiny, lambda: tiny_input())
    with pytest.raises(TypeError, match="measured_peak: build_fn is of type int, expected a function"):
        memory.measured_peak(3, tiny_input)


def test_what_measured_peak_runs(monkeypatch):
    calls = []

    class Memory:
        def reset_peak_memory_stats(self):
            calls.append("reset")

        def synchronize(self):
            calls.append("synchronize")

        def max_memory_allocated(self):
            return 1234

    monkeypatch.setattr(torch, "get_device_module", lambda device: Memory())
    result = _measured.train_and_read(Tiny, tiny_input, torch.optim.AdamW, None, torch.bfloat16, "cpu")
    assert result == 1234
    assert calls == ["reset", "reset", "synchronize"]
