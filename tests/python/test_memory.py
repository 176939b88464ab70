"""Reports of lomem.memory, against bytes counted by hand."""

import contextlib
import copy
import gc
import random

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from lomem import memory
from memory_helpers import PARAMETERS, H, NormThen, OnModule, Tiny, tiny_input
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


X = 4 * 8 * 4  # the input: 4 rows


def test_a_profile_counts_a_storage_once():
    report = memory.profile(Tiny(), tiny_input())
    # fc1 saves its input, act its result, which fc2 saves too. Weights do not count.
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
    # GELU saves its input, Tanh its result, which the square in the loss saves too.
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
    # bf16: fc1's cast input and act's result. Of the weights only fc2's is saved, for the gradient of its input.
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
    # When GELU's gradient is computed, at least GELU's recomputed input is alive.
    assert step.peak.phase == "backward"
    assert step.peak.categories["recomputed"] >= 256 * 16 * 4
    assert step.peak.categories["activations"] == 256 * 8 * 4  # the region's input


def test_batch_norm_and_dropout():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
    report = memory.profile(model, tiny_input())
    # BatchNorm: its input, mean and 1/std of 16 channels. Dropout on the CPU: a float mask.
    assert {name: m.own for name, m in report.modules.items() if m.own} == {"1": H + 2 * 16 * 4, "2": H}


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
    # name: the module after the norm, dtype of the stem, autocast, reasons why the output is not shared
    "shared": (lambda: nn.Linear(16, 4), None, False, []),
    "shared under autocast": (lambda: nn.Linear(16, 4), None, True, []),
    "a cast": (CastsTo32, torch.bfloat16, False, ["`then.a` saves a float32 copy of it"]),
    "a copy": (Copies, None, False, ["`then.fc` saves a copy of it"]),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 4)),
        None,
        False,
        ["the dropout `then.0` is in between"],
    ),
    "functional dropout": (FunctionalDropout, None, False, ["a dropout in `then` is in between"]),
    "frozen": (
        lambda: nn.Linear(16, 4).requires_grad_(False),
        None,
        False,
        ["the weight of `then` is frozen: it saves no input"],
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
    # A torch norm under autocast returns float32 on the CPU too, and each linear layer saves its own copy.
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
    assert norm.reasons == ["`inner.then` saves no input: its weight needs no gradient there, or it is checkpointed"]


def test_a_step_whose_peak_is_counted():
    model, x = Tiny(), tiny_input()
    report = memory.step_peak(model, x, torch.optim.SGD(model.parameters(), momentum=0.9))
    # The last op of the backward pass sums the gradient of fc1's bias. At that point these are alive: the gradients of
    # all parameters, the gradient of act's input (H), the loss, and the gradient that backward started from. act's
    # result is no longer needed.
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
    assert report.holders == {"act": H}
    assert report.timeline[peak.index] == max(report.timeline) == peak.nbytes
    assert list(report.phases) == ["forward", "backward", "optimizer"]
    assert (report.source, report.device, report.autocast) == ("measured", "cpu", None)


def test_equal_layers_are_one_holder():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
    report = memory.step_peak(nn.Sequential(nn.Linear(8, 8), *layers), tiny_input())
    # Each Tanh saves its result, which the next linear layer saves too; the second layer saves the first one's.
    rows = tiny_input()[..., 0].numel()
    assert report.holders == {"*.*": 4 * rows * 8 * 4}
    assert sum(report.holders.values()) == report.saved_bytes


def test_the_peak_can_be_in_the_optimizer():
    model = nn.Linear(64, 64, bias=False)
    report = memory.step_peak(model, torch.randn(1, 64), torch.optim.AdamW(model.parameters()))
    weight = 64 * 64 * 4
    # weight, gradient, two averages and two temporaries of Adam; its step count is one more float
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
        model(tiny_input())  # fills the cache of weight copies
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


class Stateful(nn.Module):
    """A module whose forward pass changes everything it may."""

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
