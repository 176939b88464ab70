"""The bytes that a conversion reports to free, and the choice based on them, against what converted models save."""

import itertools
import warnings

import lomem
import pytest
import torch
import torch.nn.functional as F
from lomem.memory import saved_for_backward
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

D = 16
DTYPES = ["float32", "bfloat16", "autocast"]
MODES = [{}, {"activations": "keep"}, {"norms": "keep"}, {"activations": "8bit"}, {"pairs": "keep"}, {"bits": 16}]


class RMSNorm(nn.Module):
    """A norm of several ops, which save several copies."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class ChannelsFirst(nn.LayerNorm):
    """A norm over channels, as in ConvNeXt's stem."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OfOneInput(nn.Module):
    """Several modules that take the same tensor."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Calls(nn.Module):
    """A function call between modules."""

    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(F.gelu(self.before(x)))


def linear():
    return nn.Linear(D, D)


def frozen():
    return nn.Linear(D, D).requires_grad_(False)


def norm():
    return nn.LayerNorm(D)


def mlp():
    return linear(), nn.GELU(), linear()


def stem():
    return nn.Sequential(
        nn.Conv2d(3, D, 2, 2), ChannelsFirst(D), nn.GELU(), nn.Conv2d(D, D, 2, 2), ChannelsFirst(D), nn.Conv2d(D, 4, 1)
    )


MODELS = {
    "norm, gelu": lambda: [linear(), norm(), nn.GELU(), linear()],
    "norm, gelu, three times": lambda: [m for _ in range(3) for m in (linear(), norm(), nn.GELU())] + [linear()],
    "norm, silu, norm, silu": lambda: [linear(), norm(), nn.SiLU(), norm(), nn.SiLU(), linear()],
    "norm, gelu, frozen": lambda: [linear(), norm(), nn.GELU(), frozen()],
    "gelu, norm": lambda: [linear(), nn.GELU(), norm(), linear()],
    "gelu, norm, gelu": lambda: [linear(), nn.GELU(), norm(), nn.GELU(), linear()],
    "two norms": lambda: [linear(), norm(), norm(), linear()],
    "five norms": lambda: [linear(), norm(), norm(), RMSNorm(D), norm(), norm(), linear()],
    "composite norms": lambda: [linear(), RMSNorm(D), RMSNorm(D), nn.GELU(), linear()],
    "norms of one input": lambda: [
        linear(),
        OfOneInput(
            nn.Sequential(norm(), linear()), nn.Sequential(norm(), linear()), nn.Sequential(RMSNorm(D), linear())
        ),
    ],
    "norms of one input, one for nobody": lambda: [
        linear(),
        OfOneInput(nn.Sequential(norm(), linear()), nn.Sequential(norm(), frozen())),
    ],
    "a norm and activations of one input": lambda: [
        linear(),
        OfOneInput(
            nn.Sequential(norm(), linear()), nn.Sequential(nn.GELU(), linear()), nn.Sequential(nn.SiLU(), linear())
        ),
    ],
    "activations of one output": lambda: [
        linear(),
        norm(),
        OfOneInput(nn.Sequential(nn.GELU(), linear()), nn.Sequential(nn.SiLU(), linear())),
    ],
    "an activation and a linear layer of one output": lambda: [
        linear(),
        norm(),
        OfOneInput(nn.Sequential(nn.GELU(), linear()), linear()),
    ],
    "pre-norm": lambda: [
        linear(),
        *(Residual(norm(), linear(), nn.GELU(), linear()) for _ in range(2)),
        norm(),
        linear(),
    ],
    "post-norm": lambda: [
        linear(),
        *(nn.Sequential(Residual(linear(), nn.GELU(), linear()), norm()) for _ in range(2)),
    ],
    "a norm before blocks": lambda: [
        linear(),
        norm(),
        Residual(norm(), linear(), nn.GELU(), linear()),
        norm(),
        linear(),
    ],
    "calls": lambda: [
        linear(),
        norm(),
        Calls(nn.Sequential(linear(), norm()), nn.Sequential(linear(), nn.GELU(), linear())),
    ],
    "stem": stem,
}


def build(name, dtype, *, ill=False):
    torch.manual_seed(1)
    model = MODELS[name]()
    model = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    for module in model.modules():
        if ill and isinstance(module, nn.LayerNorm | RMSNorm):
            with torch.no_grad():
                module.weight[3] = 0
    x = torch.randn(2, 3, 8, 8) if name == "stem" else torch.randn(4, 5, D)
    low = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return model.to(low), x.to(low), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")


def convert(model, x, **options):
    """The report; an empty one if there is nothing to convert."""
    try:
        return lomem.convert(model, x, check=False, **options)
    except lomem.conversion.NothingToConvertError:
        return lomem.convert(model, x, dry_run=True, **options)


def kept(model, x):
    """Bytes saved, counted independently of the recorder behind the decisions, without autocast's weight copies."""
    storages = {}
    weights = {p.shape for p in model.parameters()}
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        weight = tensor.is_floating_point() and {tensor.shape, tensor.shape[::-1]} & weights
        if storage.data_ptr() not in mine and not weight:
            storages[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = model(x)
    del result
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_rows_sum_to_what_the_converted_model_keeps_less(name, dtype, ill):
    for options in MODES:
        model, x, autocast = build(name, dtype, ill=ill)
        with autocast:
            before = kept(model, x)
            report = convert(model, x, **options)
            after = kept(model, x)
        assert report.saved_before == before, options
        assert report.saved_before - sum(d.saved_bytes for d in report.decisions) == after <= before, options
        assert report.saved_after in (after, None), options
        assert all((d.action == "left") <= (d.saved_bytes == 0) for d in report.decisions)


class Adapted(nn.Module):
    """A frozen layer with a float32 adapter, as peft's: the adapter takes a copy of the input in its own dtype."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = frozen(), nn.Linear(D, 2).float(), nn.Linear(2, D).float()

    def forward(self, x):
        return self.base(x) + self.b(self.a(x.to(self.a.weight.dtype))).to(x.dtype)


class Modulated(nn.Module):
    """A norm that is scaled and shifted, as in DiT."""

    def __init__(self):
        super().__init__()
        self.norm = norm()
        self.scale, self.shift = (nn.Parameter(torch.rand(D), requires_grad=False) for _ in range(2))

    def forward(self, x):
        return self.norm(x) * (1 + self.scale) + self.shift


IN_FRONT = {
    "norm": norm,
    "modulated norm": Modulated,
    "activation": nn.GELU,
    "modulated activation": lambda: nn.Sequential(nn.GELU(), Modulated()),
}


@pytest.mark.parametrize("name", IN_FRONT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_of_another_dtype_rebuild_their_copy(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(linear(), IN_FRONT[name](), Adapted()).to(dtype)
    model[2].a.float()
    model[2].b.float()
    x = torch.randn(4, 5, D, dtype=dtype)

    def saved():
        with saved_for_backward([*model.parameters(), x]) as block:
            model(x)
        return block.nbytes

    before = saved()
    report = lomem.convert(model, x)
    less = before - saved()
    assert sum(d.saved_bytes for d in report.decisions) == report.saved_before - report.saved_after == less
    # Neither is the norm's or activation's input saved in addition to what the copy is rebuilt from, nor the copy.
    assert less > 2 * x.numel()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_other_choice_keeps_fewer_bytes(name, dtype):
    # With few candidates, all subsets are excluded; with many, each one on its own.
    model, x, autocast = build(name, dtype)
    with autocast:
        report = convert(model, x)
        after = report.saved_before - sum(d.saved_bytes for d in report.decisions)
        names = [d.name for d in report.decisions]
        for count in range(1, 1 + (len(names) if len(names) < 5 else 1)):
            for excluded in itertools.combinations(names, count):
                other, _, _ = build(name, dtype)
                rest = convert(other, x, exclude=excluded, dry_run=True)
                assert rest.saved_before - sum(d.saved_bytes for d in rest.decisions) >= after, excluded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_no_conversion_could_be_left_out(name, dtype):
    # Measured by undoing one conversion at a time.
    model, x, autocast = build(name, dtype)
    with autocast:
        report = convert(model, x)
        after = kept(model, x)
        changed = [d.name for d in report.converted]
        for undone in changed:
            other, _, _ = build(name, dtype)
            convert(other, x)
            module = other.get_submodule(undone)
            lomem.restore(module)
            # The call in a restored GELU is one of the calls of the module around it.
            around = [d for d in report.converted if d.kind == "call" and undone.startswith(f"{d.name}.")]
            also = any(d.action == "exact" for d in around) and isinstance(module, nn.GELU)
            assert kept(other, x) == after if also else kept(other, x) > after


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_norms_before_activations_are_chosen_and_the_activations_left(count):
    model = nn.Sequential(*(m for _ in range(count) for m in (linear(), norm(), nn.GELU())), linear())
    report = lomem.convert(model, torch.randn(4, D), pairs="keep")
    assert {d.kind for d in report.converted} == {"norm"}
    assert len(report.converted) == len(report.left) == count
    assert [d.reason for d in report.left] == [f"its input is also saved by {3 * i + 1}" for i in range(count)]


def test_of_two_norms_in_a_row_one_is_chosen():
    model, x, _ = build("two norms", "float32")
    report = lomem.convert(model, x)
    (chosen,), (left,) = report.converted, report.left
    assert chosen.saved_bytes == 4 * x.numel() + 4 * x.numel() // D  # the input, and a mean per row
    assert (
        left.reason
        == {
            "1": "2 no longer saves its output",
            "2": "its input is also saved by 1",
        }[left.name]
    )


def test_norms_of_which_each_keeps_several_copies_are_all_chosen():
    model, x, _ = build("composite norms", "float32")
    report = lomem.convert(model, x, pairs="keep")
    assert {d.name for d in report.converted} == {"1", "2"}
    assert next(d.reason for d in report.converted) == "it saves less than before, though 2 no longer saves its output"


def test_what_two_conversions_let_go_together_is_split():
    model, x, _ = build("norms of one input", "float32")
    report = lomem.convert(model, x)
    first, second, third = report.converted
    assert first.saved_bytes == second.saved_bytes == 4 * x.numel() // 3 + 4 * x.numel() // D + (4 * x.numel() % 3 > 0)
    assert third.saved_bytes > first.saved_bytes


# Spellings of calls, and whether they can be replaced.


@torch.no_grad()
def out_of_place(h):
    return torch.ops.aten.gelu.out(h, out=torch.empty_like(h))


class Constant(torch.autograd.Function):
    """A custom backward pass that does not need its gradient."""

    @staticmethod
    def forward(ctx, h):
        return F.gelu(h)

    @staticmethod
    def backward(ctx, grad):
        return grad


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a deprecation

    @torch.jit.script
    def scripted(h):
        return torch.nn.functional.gelu(h)


def disabled(h):
    with torch._C.DisableTorchFunction():
        return F.gelu(h)


REPLACED = {
    "F.gelu": F.gelu,
    "F.gelu by name": lambda h: F.gelu(input=h),
    "F.gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "F.silu": F.silu,
    "F.silu by name": lambda h: F.silu(input=h, inplace=False),
    "F.silu in place": lambda h: F.silu(h, inplace=True),
    "F.silu in place by position": lambda h: F.silu(h, True),
    "_nn.gelu": lambda h: torch._C._nn.gelu(h, approximate="tanh"),
    "_nn.gelu_": lambda h: torch._C._nn.gelu_(h),
    "_nn.silu": torch._C._nn.silu,
    "_nn.silu_": torch._C._nn.silu_,
    "aten.gelu": torch.ops.aten.gelu,
    "aten.gelu by name": lambda h: torch.ops.aten.gelu(self=h, approximate="tanh"),
    "aten.gelu.default": torch.ops.aten.gelu.default,
    "aten.gelu_": torch.ops.aten.gelu_,
    "aten.gelu_.default": torch.ops.aten.gelu_.default,
    "aten.silu": torch.ops.aten.silu,
    "aten.silu.default": torch.ops.aten.silu.default,
    "aten.silu_": torch.ops.aten.silu_,
    "aten.silu_.default": torch.ops.aten.silu_.default,
    "a module made on the way": lambda h: nn.GELU()(h),
    "of a part": lambda h: F.gelu(h[1:]),
    "of a copy in another dtype": lambda h: F.gelu(h.double()).float(),
    "transposed": lambda h: F.silu(h.transpose(0, 1)).transpose(0, 1),
    "twice": lambda h: F.gelu(F.silu(h)),
    "of a constant too": lambda h: F.gelu(h) + F.gelu(h.detach()),
    "in place and not": lambda h: F.silu(F.gelu(h), inplace=True),
}
LEFT = {
    "out": lambda h: h + out_of_place(h.detach()),
    "without gradient": lambda h: h + F.gelu(h.detach()),
    "no_grad": lambda h: h + torch.no_grad()(F.gelu)(h),
    "in a function of its own": Constant.apply,
    "scripted": scripted,
    "vmap": torch.vmap(F.gelu),
    "disabled": disabled,
    "kept by another": lambda h: F.gelu(h.exp()),
    "kept by another, without gradient": lambda h: h.exp() + F.gelu(h.exp().detach()),
    "of one storage": lambda h: (lambda a, b: F.silu(a) * b)(*h.chunk(2, -1)).repeat(1, 1, 2),
}


class Spelled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.function, self.b = nn.Linear(D, D), function, nn.Linear(D, D)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("name", REPLACED)
def test_calls_are_counted_where_they_are_replaced(name, bits):
    model, x = nn.Sequential(Spelled(REPLACED[name])), torch.randn(4, 5, D)
    y, before = model(x), kept(model, x)
    report = lomem.convert(model, x, activations=f"{bits}bit")
    (call,) = report.converted
    assert (call.kind, call.name) == ("call", "0")
    assert call.saved_bytes == before - kept(model, x) == report.saved_before - report.saved_after > 0
    assert torch.equal(model(x), y)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    with torch.inference_mode():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", LEFT)
def test_calls_are_not_counted_where_they_are_not_replaced(name):
    model, x = nn.Sequential(Spelled(LEFT[name])), torch.randn(4, 5, D)
    (call,) = lomem.convert(model, x, pairs="keep", dry_run=True).decisions
    assert (call.kind, call.action, call.saved_bytes) == ("call", "left", 0)
    reason = {
        "scripted": "its calls cannot be intercepted",
        "vmap": "its calls cannot be intercepted",
        "disabled": "its calls cannot be intercepted",
        "out": "its calls cannot be intercepted",
        "kept by another": "its input is also saved by 0",
        "of one storage": "its input is also saved by 0",
    }
    assert reason.get(name, "it needs no gradient, so it saves nothing") in call.reason


@pytest.mark.parametrize("name", ["disabled", "kept by another", "without gradient", "vmap"])
def test_calls_that_are_not_replaced_beside_one_that_is(name):
    model, x = nn.Sequential(Spelled(lambda h: LEFT[name](h * 2) + F.gelu(h))), torch.randn(4, 5, D)
    before = kept(model, x)
    report = lomem.convert(model, x)
    assert before - kept(model, x) == sum(d.saved_bytes for d in report.decisions) > 0


def test_a_call_with_a_gradient_of_vmap_stays_torchs():
    model, x = nn.Sequential(Spelled(lambda h: torch.vmap(F.gelu)(h) + F.gelu(h * 2))), torch.randn(4, 5, D)
    y = model(x)
    lomem.convert(model, x)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda h: F.gelu(h, approximate="no"), RuntimeError),
        (lambda h: F.gelu(h, "tanh"), TypeError),
        (lambda h: F.gelu(h, bits=3), TypeError),
        (lambda h: F.gelu(h, out=torch.empty_like(h)), RuntimeError),
        (lambda h: F.silu(h.long()), RuntimeError),
        (lambda h: F.silu(), TypeError),
    ],
)
def test_wrong_calls_get_torchs_errors(call, error):
    # In a converted module that did not take this path before.
    model, x = nn.Sequential(Spelled(F.gelu)), torch.randn(4, 5, D)
    with pytest.raises(error) as plain:
        call(model[0].a(x))
    lomem.convert(model, x)
    model[0].function = call
    with pytest.raises(error) as converted:
        model(x)
    assert str(converted.value) == str(plain.value)


# Modules that never run.


class Around(nn.Module):
    """Calls a function, and has a submodule."""

    def __init__(self, inside, run=False):
        super().__init__()
        self.a, self.inside, self.b, self.run = nn.Linear(D, D), inside, nn.Linear(D, D), run

    def forward(self, x):
        h = F.gelu(self.a(x))
        return self.b(self.inside(h) if self.run else h)


class Quick(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


INSIDE = {
    "GELU": nn.GELU,
    "quick": Quick,
    "PReLU": nn.PReLU,
    "dropout": nn.Dropout,
    "norm": norm,
    "calls": lambda: Calls(linear(), linear()),
    "deeper": lambda: nn.Sequential(linear(), nn.Sequential(nn.SiLU())),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_module_that_never_ran_does_not_keep_calls_around_it_from_being_converted(name):
    model, x = nn.Sequential(Around(INSIDE[name]())), torch.randn(4, D)
    report = lomem.convert(model, x)
    assert [(d.name, d.kind) for d in report.converted] == [("0", "call")]
    for d in report.left:
        assert "did not run" in d.reason


@pytest.mark.parametrize("name", ["GELU", "quick", "calls", "deeper"])
@pytest.mark.parametrize("run", [False, True])
def test_one_that_is_excluded_does_where_it_may_be_reached(name, run):
    model, x = nn.Sequential(Around(INSIDE[name](), run)), torch.randn(4, D)
    patterns = ["0.inside.1.0"] if name == "deeper" else ["0.inside"]
    report = lomem.convert(model, x, exclude=patterns, dry_run=True)
    # If it ran, its ops were recorded: no call in it can be replaced along with those around it.
    free = name == "quick" and run
    call = next(d for d in report.decisions if d.name == "0")
    assert (call.action == "4bit") == free
    assert free or call.reason == f"{patterns[0]} inside it is not converted"


class Kept(nn.Module):
    """A call whose input is saved anyway."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def forward(self, x):
        return F.silu(x.repeat(self.copies, 1).exp())[: len(x)]


def test_calls_in_and_around_a_module_are_replaced_together_or_not():
    x = torch.randn(4, D)
    model = nn.Sequential(Around(Kept(1), True))
    before = kept(model, x)
    around, inside = lomem.convert(model, x).converted
    codes = x.numel() // 2 + 8  # and a seed
    assert (around.saved_bytes, inside.saved_bytes) == (4 * x.numel() - codes, -codes)
    assert before - kept(model, x) == around.saved_bytes + inside.saved_bytes
    assert inside.reason == "calls in 0 can only be replaced together with those in it"
    # The codes inside take more than is freed around it.
    report = lomem.convert(nn.Sequential(Around(Kept(16), True)), x, dry_run=True)
    assert {d.name: d.reason for d in report.left} == {
        "0": "0.inside inside it is not converted",
        "0.inside": "its input is also saved by 0.inside",
    }


def test_the_profile_agrees():
    model, x, _ = build("norm, gelu, three times", "float32")
    report = lomem.convert(model, x)
    with saved_for_backward([*model.parameters(), x]) as saved:
        model(x)
    assert saved.nbytes == report.saved_after
    assert lomem.memory.profile(model, x).activation_bytes == report.saved_after


class OfItself(nn.Module):
    """A linear layer behind a function of an activation."""

    def __init__(self, function):
        super().__init__()
        self.up, self.act, self.down, self.function = nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8), function

    def forward(self, x):
        return self.down(self.function(self.act(self.up(x))))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * h,
        lambda h: h * h.view(h.shape),
        lambda h: h * h.detach(),
        lambda h: h.detach() * h,
        lambda h: h * h * h,
        lambda h: h * (h + 1),
        lambda h: h * h[:, :1],
        lambda h: (h * h) + h,
    ],
)
def test_rows_sum_where_an_activation_is_multiplied_by_itself(function):
    # The product saves one factor for the other, whatever that is rebuilt from.
    model, x = OfItself(function), torch.randn(16, 8)
    before = kept(model, x)
    report = convert(model, x, bits=16)
    assert report.saved_before == before
    assert report.saved_before - sum(d.saved_bytes for d in report.decisions) == kept(model, x) <= before
