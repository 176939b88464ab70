"""What lomem.memory reports, against bytes that are counted by hand."""

import builtins
import contextlib
import copy
import gc
import json
import random
import re
from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from lomem import memory
from lomem._units import size
from lomem.memory import _measured
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Tiny(nn.Module):
    """Two linear layers, whose bytes can be counted: 212 float32 parameters."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


PARAMETERS = (8 * 16 + 16 + 16 * 4 + 4) * 4
X = 4 * 8 * 4  # the input: 4 rows
H = 4 * 16 * 4  # between the layers


def tiny_input(**kwargs):
    return torch.randn(4, 8, **kwargs)


# profile


def test_a_profile_counts_a_storage_once():
    report = memory.profile(Tiny(), tiny_input())
    # fc1 keeps its input; act its result, which fc2 keeps too. Weights are there anyway.
    assert (report.saved_bytes, report.activation_bytes, report.weight_copy_bytes) == (H, H, 0)
    assert report.input_bytes == X
    assert report.unaccounted_bytes == 0
    assert [(s.nbytes, s.modules) for s in report.shared] == [(H, ["act", "fc2"])]
    assert {name: (m.own, m.subtree) for name, m in report.modules.items() if m.subtree} == {
        "act": (H, H),
        "(model)": (0, H),
    }
    assert report.classes == {"ReLU": H}
    assert report.dtypes == {torch.float32: H}


def test_totals_of_subtrees_and_the_loss():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU()), nn.Sequential(nn.Sequential(nn.Tanh())))
    report = memory.profile(model, tiny_input(), loss=lambda y: y.square().sum())
    # GELU keeps its input, Tanh its result, the square in the loss that result too.
    own = {name: m.own for name, m in report.modules.items() if m.own}
    assert own == {"0.1": H, "1.0.0": H}
    assert {name: report.modules[name].subtree for name in ("(model)", "0", "1", "1.0")} == {
        "(model)": 2 * H,
        "0": H,
        "1": H,
        "1.0": H,
    }
    assert [s.modules for s in report.shared] == [["1.0.0", "(loss)"]]


def test_autocast_copies_of_weights_have_a_line_of_their_own():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = memory.profile(Tiny(), tiny_input())
    # bf16: fc1's cast input and act's result. Of the weights fc2's is kept, for the gradient of its input.
    assert report.activation_bytes == X // 2 + H // 2
    assert report.weight_copy_bytes == 16 * 4 * 2
    assert report.saved_bytes == report.activation_bytes + report.weight_copy_bytes
    assert report.unaccounted_bytes == 0
    assert report.autocast == torch.bfloat16
    assert report.dtypes == {torch.bfloat16: report.activation_bytes}


class Stashes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x * 2
        return x + 1

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.kept


class OnContext(nn.Module):
    def forward(self, x):
        return Stashes.apply(x)


class OnModule(nn.Module):
    def forward(self, x):
        self.kept = x * 2
        return x + 1


@pytest.mark.parametrize("stash", [OnContext, OnModule])
def test_what_lives_without_having_been_saved_is_unaccounted(stash):
    model = nn.Sequential(nn.Linear(8, 16), stash())
    report = memory.profile(model, tiny_input())
    assert (report.saved_bytes, report.unaccounted_bytes) == (0, H)
    (unaccounted,) = report.unaccounted
    assert (unaccounted.nbytes, unaccounted.op, unaccounted.module) == (H, "aten.mul.Tensor", "1")
    assert (unaccounted.shape, unaccounted.dtype) == ((4, 16), torch.float32)


def test_a_stash_does_not_stay_on_the_module():
    model = OnModule()
    memory.profile(model, tiny_input(requires_grad=True))
    assert not hasattr(model, "kept")


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x + 1, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_region_keeps_its_inputs(use_reentrant):
    x = tiny_input(requires_grad=True)
    report = memory.profile(Checkpointed(use_reentrant), x)
    assert (report.saved_bytes, report.unaccounted_bytes) == (X, 0)
    step = memory.step_peak(Checkpointed(use_reentrant), x)
    assert step.saved_bytes == X


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_makes_again_is_told_apart(use_reentrant):
    step = memory.step_peak(Checkpointed(use_reentrant), torch.randn(256, 8, requires_grad=True))
    # When GELU's gradient is made there is at least GELU's input, made again; the gradients come to it from outside.
    assert step.peak.phase == "backward"
    assert step.peak.categories["recomputed"] >= 256 * 16 * 4
    assert step.peak.categories["activations"] == 256 * 8 * 4  # the region's input


def test_batch_norm_and_dropout():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
    report = memory.profile(model, tiny_input())
    # BatchNorm: its input, mean and 1/std of 16 channels. Dropout on the CPU: a float mask.
    assert {name: m.own for name, m in report.modules.items() if m.own} == {"1": H + 2 * 16 * 4, "2": H}


# norms


class NormThen(nn.Module):
    def __init__(self, norm, then):
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.norm = norm
        self.then = then

    def forward(self, x):
        return self.then(self.norm(self.stem(x)))


class CastsTo32(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 4)

    def forward(self, x):
        return self.a(x.to(self.a.weight.dtype))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(F.dropout(x, 0.5))


class Copies(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(x.clone())


class Gate(nn.Module):
    def forward(self, x):
        return x + x.tanh()


NORM_CASES = {
    # name: what follows the norm, dtype of the norm's side, autocast, reasons; no reason where it is shared
    "shared": (lambda: nn.Linear(16, 4), None, False, []),
    "shared under autocast": (lambda: nn.Linear(16, 4), None, True, []),
    "a cast": (CastsTo32, torch.bfloat16, False, ["`then.a` keeps a float32 copy of it"]),
    "a copy": (Copies, None, False, ["`then.fc` keeps a copy of it"]),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 4)),
        None,
        False,
        ["the dropout `then.0` is between"],
    ),
    "functional dropout": (FunctionalDropout, None, False, ["a dropout in `then` is between"]),
    "frozen": (
        lambda: nn.Linear(16, 4).requires_grad_(False),
        None,
        False,
        ["the weight of `then` is frozen: it keeps no input"],
    ),
    "no product": (Gate, None, False, ["no matrix product takes it: it goes to tanh in `then`, add in `then`"]),
}


@pytest.mark.parametrize("name", NORM_CASES)
@pytest.mark.parametrize("make", [lomem.nn.MSLayerNorm, lomem.nn.MSRMSNorm])
def test_why_a_norm_is_not_shared(make, name):
    then, dtype, autocast, reasons = NORM_CASES[name]
    model = NormThen(make(16), then())
    model.stem.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        report = memory.profile(model, torch.randn(4, 16, dtype=dtype))
    (norm,) = report.norms
    assert (norm.module, norm.kind) == ("norm", make.__name__)
    assert norm.reasons == reasons
    assert norm.shared == (not reasons)
    assert norm.shared_with == ([] if reasons else ["then"])
    assert norm.kept_by_norm
    assert norm.nbytes == 4 * 16 * (2 if autocast or dtype else 4)


def test_torch_norms_and_marked_modules_are_looked_at():
    class Marked(nn.Identity):
        lomem_norm = "rms"

    class Unmarked(nn.Identity):
        lomem_norm = None

    for norm, count in ((nn.LayerNorm(16), 1), (nn.RMSNorm(16), 1), (Marked(), 1), (Unmarked(), 0)):
        report = memory.profile(NormThen(norm, nn.Linear(16, 4)), torch.randn(4, 16))
        assert len(report.norms) == count
        assert all(norm.shared_with == ["then"] for norm in report.norms)
    # A torch norm under autocast gives float32 on the CPU too, and each linear layer keeps a copy of its own.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = memory.profile(NormThen(nn.LayerNorm(16), nn.Linear(16, 4)), torch.randn(4, 16))
    assert report.norms[0].kept_by_norm is False


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_norm_says_so(use_reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = NormThen(lomem.nn.MSLayerNorm(16), nn.Linear(16, 4))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    (norm,) = memory.profile(Model(), torch.randn(4, 16, requires_grad=True)).norms
    assert not norm.shared
    assert norm.reasons == ["`inner.then` keeps no input: its weight needs no gradient there, or it is checkpointed"]


# step_peak


def test_a_step_whose_peak_is_counted():
    model, x = Tiny(), tiny_input()
    report = memory.step_peak(model, x, torch.optim.SGD(model.parameters(), momentum=0.9))
    # The last op of the backward pass sums fc1's gradient of the bias. By then there are: the gradients of all
    # parameters, the gradient of act's input (H), and two scalars: the loss and the gradient that it began with.
    # act's result is not needed any more.
    assert report.peak.categories == {
        "parameters": PARAMETERS,
        "optimizer state": PARAMETERS,
        "gradients": PARAMETERS,
        "weight copies": 0,
        "recomputed": 0,
        "activations": 0,
        "inputs": X,
        "temporaries": H + 2 * 4,
    }
    assert report.peak.nbytes == sum(report.peak.categories.values()) == 3 * PARAMETERS + X + H + 8
    peak = report.peak
    assert (peak.phase, peak.op, peak.node) == ("backward", "aten.sum.dim_IntList", "AddmmBackward0")
    assert report.forward_backward == report.peak
    assert report.saved_bytes == H
    assert report.timeline[peak.index] == max(report.timeline) == peak.nbytes
    assert list(report.phases) == ["forward", "backward", "optimizer"]
    assert (report.source, report.device, report.autocast) == ("measured", "cpu", None)


def test_the_peak_can_be_in_the_optimizer():
    model = nn.Linear(64, 64, bias=False)
    report = memory.step_peak(model, torch.randn(1, 64), torch.optim.AdamW(model.parameters()))
    weight = 64 * 64 * 4
    # weight, gradient, two averages and two temporaries of Adam; the count of steps is one more float
    assert report.peak.phase == "optimizer"
    assert report.peak.categories["optimizer state"] == 2 * weight + 4
    assert report.peak.categories["temporaries"] == 2 * weight + 4  # and the loss
    assert report.peak.categories["gradients"] == report.peak.categories["parameters"] == weight
    assert report.forward_backward.phase != "optimizer"
    assert report.forward_backward.nbytes < report.peak.nbytes


def test_the_first_step_has_no_optimizer_state_yet():
    model, x = Tiny(), tiny_input()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    first, second = (memory.step_peak(model, x, optimizer, steps=steps) for steps in (1, 2))
    assert second.forward_backward.nbytes - first.forward_backward.nbytes == PARAMETERS


def test_frozen_and_tied_parameters():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    report = memory.step_peak(model, tiny_input())
    assert report.peak.categories["parameters"] == (2 * 64 + 8) * 4
    assert max(report.peak.categories["gradients"], 256) == 256  # one gradient for the tied weight


def test_autocast_covers_the_forward_pass_only():
    class Sees(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class Model(nn.Linear):
        def forward(self, x):
            return Sees.apply(super().forward(x))

    seen = []
    model = Model(8, 8)
    keyword = memory.step_peak(model, tiny_input(), autocast=torch.bfloat16, steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tiny_input())  # whose weight copies are in the cache
        seen.clear()
        around = memory.step_peak(model, tiny_input(), steps=1)
    assert seen == [True, False]
    assert around == keyword
    assert around.autocast == torch.bfloat16


def test_gradients_of_inputs_and_targets_of_the_loss():
    target = torch.randn(4, 4)
    x = tiny_input(requires_grad=True)
    report = memory.step_peak(Tiny(), [x], loss=lambda y: F.mse_loss(y, target))
    assert report.peak.categories["inputs"] == X + 4 * 4 * 4
    assert x.grad is None


# Nothing is left behind.


class Stateful(nn.Module):
    """Everything that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 16)
        self.bn = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.fails = False
        self.register_buffer("replaced", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.cache = x * 2
        self.replaced = self.replaced + random.random()
        y = self.drop(self.frozen(self.bn(self.fc(x))))
        if self.fails:
            raise ArithmeticError("on purpose")
        return y


def state_of(model, optimizer):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tensors = dict(model.state_dict())
    for i, parameter in enumerate(model.parameters()):
        tensors |= {f"{i}.{name}": value for name, value in optimizer.state.get(parameter, {}).items()}
    tensors |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors["rng"] = torch.get_rng_state()
    identities = [id(t) for t in [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]]
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    groups = (
        [] if optimizer is None else [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    )
    return {name: t.clone() for name, t in tensors.items()}, (
        hooks,
        identities,
        attributes,
        copy.deepcopy(groups),
        random.getstate(),
    )


def same_state(a, b):
    return a[0].keys() == b[0].keys() and all(same_bits(a[0][n], b[0][n]) for n in a[0]) and a[1] == b[1]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "in training"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("measure", ["profile", "step_peak", "step_peak without optimizer"])
def test_all_is_left_as_it_was(measure, training, used, fails):
    model = Stateful().train(training)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = tiny_input()
    if used:
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
    model.fails = fails
    before = state_of(model, optimizer)
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        if measure == "profile":
            memory.profile(model, x)
        else:
            memory.step_peak(model, x, optimizer if measure == "step_peak" else None)
    assert same_state(state_of(model, optimizer), before)
    assert gc.isenabled()
    assert not torch.is_autocast_enabled("cpu")


def test_an_exception_in_a_later_step_leaves_all_as_it_was():
    model, x = Tiny(), tiny_input()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    before = state_of(model, optimizer)
    calls = []

    def loss(y):
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("on purpose")
        return y.sum()

    with pytest.raises(ArithmeticError):
        memory.step_peak(model, x, optimizer, loss=loss)
    assert same_state(state_of(model, optimizer), before)


def test_inputs_are_left_as_they_were():
    x = tiny_input()
    before = x.clone()
    memory.step_peak(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), x)
    memory.profile(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), x)
    assert same_bits(x, before)


def test_no_tensor_is_kept_alive():
    model = Tiny()
    reports = [memory.profile(model, tiny_input()), memory.step_peak(model, tiny_input())]
    gc.collect()
    before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    reports += [memory.profile(model, tiny_input()), memory.step_peak(model, tiny_input())]
    gc.collect()
    assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) == before
    assert len(reports) == 4


# estimate


class Everything(nn.Module):
    """Ops of which fake tensors know what real ones keep, in both precisions."""

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
        self.act = lomem.nn.ReGELU2()
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
        model.act = lomem.nn.ReGELU2()

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


# The CUDA-like mode


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

    # float32, efficient kernel: q, k, v, output; one float a row, rows padded to 32; seed and offset, 8 bytes each.
    assert saved() == 4 * tensor * 4 + 4 * 2 * 32 * 4 + 16
    # With a bool mask a float one, of the rows' next multiple of 16, which heads and batch share.
    assert saved(mask=True) == saved() + 20 * 32 * 4
    # 16 bits, flash kernel: the same without padding; 24 bytes of state. And the input's bf16 copies.
    assert saved(torch.bfloat16) == 4 * tensor * 2 + 4 * 2 * 20 * 4 + 24 + 3 * tensor * 2
    # Its efficient one, for the mask.
    assert saved(torch.bfloat16, mask=True) == 7 * tensor * 2 + 4 * 2 * 32 * 4 + 16 + 20 * 32 * 2


def test_attention_inside_modules_of_torch_is_fused():
    def build():
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    x = torch.randn(4, 20, 16)
    cpu, cuda = (memory.estimate(build, x, device=device) for device in ("cpu", "cuda"))
    # On the CPU attention with dropout is a chain of ops, which keeps several matrices of 20 x 20 a head.
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

    # Its input and one float a row.
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


# measured_peak


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


# Reports


def reports():
    model = NormThen(lomem.nn.MSLayerNorm(16), OnModule())
    x = torch.randn(4, 16)
    return [memory.profile(model, x), memory.step_peak(model, x, torch.optim.AdamW(model.parameters()))]


SIZES = [0, 1, 7, 1000, 1023, 1024, 1025, 2000, 10**4, 10**5, 1048512, 2**20 - 1, 2**20, 2**20 + 1, 10**7, 10**8, 10**9]
SIZES += [2**30 - 1, 2**30, 10**10, 10**12, 2**40, 10**15]


@pytest.mark.parametrize("nbytes", SIZES)
def test_sizes_show_something(nbytes):
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for sign in (1, -1):
        text, unit = size(sign * nbytes).split(" ")
        value = float(text.replace(",", ""))
        # Three digits at least: half a unit of the last is 0.5 % of the smallest.
        assert abs(value * units[unit] - sign * nbytes) <= 0.005 * nbytes
        assert unit == "B" or abs(value) >= 1
        assert unit == "GiB" or abs(value) < 1024
        assert len(text.replace("-", "")) <= 7 or unit == "GiB"


def test_reports_of_small_models_show_their_bytes():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    # GELU's input and its output.
    assert "64 B" in str(memory.profile(model, x))
    assert re.search(r"saved for backward +64 B, 0 B of it weight copies", str(memory.step_peak(model, x)))
    # Two bits an element in place of 32.
    assert "saved for backward: 64 B -> 34 B (-46.9 %)" in str(lomem.convert(model, x))


def test_reports_as_json():
    for report in reports():
        contents = json.loads(report.to_json())
        assert contents == report.to_dict()
        assert contents["saved_bytes"] == report.saved_bytes
    assert contents["peak"]["categories"]["parameters"] == (16 * 16 + 16) * 4


def test_reports_as_tables():
    profile, step = map(str, reports())
    for text in ("norm", "MSLayerNorm", "no matrix product takes it", "aten.mul.Tensor in then"):
        assert text in profile
    for text in ("parameters", "optimizer state", "peak of the step", "(optimizer)"):
        assert text in step


def test_reports_without_rich(monkeypatch):
    shown = reports()
    real_import = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.startswith(("rich", "matplotlib")):
            raise ImportError("no", name=name.split(".")[0])
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    assert "no matrix product takes it" in str(shown[0])
    assert "parameters" in str(shown[1])
    with pytest.raises(ImportError, match=r"table\(\) needs the package rich: pip install 'lomem\[bench\]'"):
        shown[0].table()
    with pytest.raises(ImportError, match=r"lomem.memory.plot needs the package matplotlib"):
        shown[0].plot("memory.png")


def test_pictures(tmp_path):
    profile, step = reports()
    profile.plot(tmp_path / "profile.png")
    step.plot(tmp_path / "step.svg")
    memory.plot({"plain": step, "converted": step}, tmp_path / "both.png")
    assert all((tmp_path / name).stat().st_size for name in ("profile.png", "step.svg", "both.png"))
    with pytest.raises(ValueError, match=r"path is .*nowhere.both.png, expected a file in a folder that exists"):
        memory.plot({"plain": step}, tmp_path / "nowhere" / "both.png")
    with pytest.raises(ValueError, match=r"path is both.xyz, expected a file name that ends in one of"):
        memory.plot({"plain": step}, "both.xyz")
    with pytest.raises(TypeError, match=r"reports are of the types Profile, StepPeak, expected one type"):
        memory.plot({"a": profile, "b": step}, tmp_path / "both.png")
    with pytest.raises(TypeError, match=r"reports is .*, expected a dict of names and reports"):
        memory.plot(step, tmp_path / "both.png")


# Errors


class LooksAtFloats(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


BAD = {
    "excluded": (
        lambda: memory.saved_for_backward([3]),
        TypeError,
        "lomem.memory.saved_for_backward: exclude has a int, expected tensors alone",
    ),
    "model": (
        lambda: memory.profile(torch.zeros(1)),
        TypeError,
        "lomem.memory.profile: model is of type Tensor, expected a torch.nn.Module",
    ),
    "lazy": (
        lambda: memory.profile(nn.LazyLinear(3), tiny_input()),
        ValueError,
        "weight of model has no shape yet, expected a model that ran once",
    ),
    "batch": (
        lambda: memory.step_peak(Tiny(), 3),
        TypeError,
        "lomem.memory.step_peak: batch is of type int, expected a dict",
    ),
    "loss type": (
        lambda: memory.profile(Tiny(), tiny_input(), loss=3),
        TypeError,
        "loss is of type int, expected a callable",
    ),
    "loss result": (
        lambda: memory.profile(Tiny(), tiny_input(), loss=lambda y: 3),
        TypeError,
        "loss returned a int, expected a tensor of one element",
    ),
    "loss shape": (
        lambda: memory.step_peak(Tiny(), tiny_input(), loss=lambda y: y),
        ValueError,
        r"loss returned a tensor of shape \(4, 4\), expected one element",
    ),
    "loss without gradient": (
        lambda: memory.step_peak(Tiny(), tiny_input(), loss=lambda y: y.detach().sum()),
        ValueError,
        "the loss needs no gradients, expected one that",
    ),
    "nothing needs gradients": (
        lambda: memory.profile(Tiny().requires_grad_(False), tiny_input()),
        ValueError,
        "the output, of type Tensor, has no floating-point tensor that needs gradients",
    ),
    "optimizer": (
        lambda: memory.step_peak(Tiny(), tiny_input(), torch.optim.SGD),
        TypeError,
        "optimizer is of type type, expected a torch.optim.Optimizer or None",
    ),
    "another model's optimizer": (
        lambda: memory.step_peak(Tiny(), tiny_input(), torch.optim.SGD(Tiny().parameters())),
        ValueError,
        "optimizer holds 4 tensors that are not of model",
    ),
    "steps": (lambda: memory.step_peak(Tiny(), tiny_input(), steps=0), ValueError, "steps is 0, expected a positive"),
    "autocast": (
        lambda: memory.step_peak(Tiny(), tiny_input(), autocast="bf16"),
        TypeError,
        "autocast is 'bf16', expected a torch.dtype",
    ),
    "build_fn": (
        lambda: memory.estimate(Tiny(), tiny_input()),
        TypeError,
        "lomem.memory.estimate: build_fn is of type Tiny, expected a function that builds a model",
    ),
    "build_fn's result": (
        lambda: memory.estimate(lambda: 3, tiny_input()),
        TypeError,
        "lomem.memory.estimate: model is of type int, expected a torch.nn.Module",
    ),
    "device": (
        lambda: memory.estimate(Tiny, tiny_input(), device="tpu"),
        ValueError,
        "device is 'tpu', expected 'cuda' or 'cpu'",
    ),
    "estimated batch": (
        lambda: memory.estimate(Tiny, 3),
        TypeError,
        "lomem.memory.estimate: batch is of type int, expected a dict",
    ),
    "estimated optimizer": (
        lambda: memory.estimate(Tiny, tiny_input(), 3),
        TypeError,
        "lomem.memory.estimate: optimizer is of type int, expected a function",
    ),
    "values": (
        lambda: memory.estimate(lambda: LooksAtFloats(8, 8), tiny_input()),
        RuntimeError,
        "lomem.memory.estimate: the model calls aten._local_scalar_dense.default, which depends on the values of a "
        "tensor, and a fake one has a shape alone: measure a small real model with lomem.memory.step_peak",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_sentence(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as error:
        call()
    assert "\n" not in str(error.value)
