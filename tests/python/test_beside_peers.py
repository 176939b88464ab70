"""Converted models beside what else saves memory: layers of fused kernels, and losses without all logits at once."""

import copy
import sys
from pathlib import Path

import lomem
import pytest
import torch
import torch.nn.functional as F
import transformers
from lomem.memory import saved_for_backward
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fused_stand_ins

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, TOKENS = 96, 32, 24


def plain_loss(rows, weight, labels):
    return F.cross_entropy(F.linear(rows, weight), labels)


def chunked_loss(rows, weight, labels):
    """As TRL's: logits of some rows at a time, computed again in the backward pass."""

    def part(rows, labels):
        return F.cross_entropy(F.linear(rows, weight), labels, reduction="sum")

    chunks = zip(rows.split(7), labels.split(7), strict=True)
    return sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks) / len(rows)


def torchs_loss(rows, weight, labels):
    return F.linear_cross_entropy(rows, weight, labels)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, labels):
        logits = F.linear(rows, weight)
        grad = (logits.softmax(1) - F.one_hot(labels, len(weight))) / len(rows)
        ctx.save_for_backward(grad @ weight, grad.T @ rows)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, grad):
        return *(grad * t for t in ctx.saved_tensors), None


def gradient_loss(rows, weight, labels):
    """As Liger-Kernel's and cut-cross-entropy's: the gradient is computed in the forward pass."""
    return _GradientInForward.apply(rows, weight, labels)


LOSSES = {"plain": plain_loss, "chunked": chunked_loss, "gradient": gradient_loss}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    LOSSES["torch's"] = torchs_loss


class Model(nn.Module):
    """A language model that returns its loss."""

    def __init__(self, loss, *, fused):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            use_cache=False,
        )
        self.model = transformers.LlamaModel(config)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.loss = LOSSES[loss]
        if fused:
            fused_stand_ins.fuse_norms_and_products(self.model)

    def forward(self, ids):
        rows = self.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        return self.loss(rows, self.head.weight, ids[:, 1:].flatten())


def run(model, ids):
    model.zero_grad(set_to_none=True)
    with saved_for_backward([*model.parameters(), *model.buffers(), ids]) as saved:
        loss = model(ids)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), saved.nbytes, grads


@pytest.mark.parametrize("bits", [16, 8, None])
@pytest.mark.parametrize("loss", LOSSES)
def test_beside_losses(loss, bits):
    model = Model(loss, fused=False)
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    exact = run(copy.deepcopy(model).double(), ids)
    before = run(model, ids)
    lomem.convert(model, ids, bits=bits)
    after = run(model, ids)
    assert after[1] < (0.6 if bits == 8 else 0.8) * before[1]
    assert after[0] == pytest.approx(before[0], rel=1e-6)  # norms are rounded otherwise
    assert after[2].keys() == before[2].keys()
    norm = sum(g.square().sum() for g in exact[2].values()).sqrt()
    off = sum((after[2][name].double() - g).square().sum() for name, g in exact[2].items()).sqrt() / norm
    # Rounding in float32; 8 bits err by half a percent per tensor kept in them, of which a few are behind each other.
    assert off < (2e-2 if bits == 8 else 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_layers_of_fused_kernels_are_left(loss):
    # They are put on the instances, as Liger-Kernel does to a model that exists.
    model = Model(loss, fused=True)
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    before = run(model, ids)
    with pytest.raises(lomem.NothingToConvertError, match="its forward is overridden on the instance"):
        lomem.convert(model, ids, bits=16)
    after = run(model, ids)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], grad) for name, grad in before[2].items())
