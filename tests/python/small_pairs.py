"""Small models whose linear layers can rebuild their input, and what is compared of them."""

import contextlib
import copy
import functools
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import lomem
import torch
import torch.nn.functional as F
from test_handover import Living
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

D, H = 16, 48


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


class HandWritten(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class Swish(nn.Module):
    """Reads its scale at each call."""

    def __init__(self):
        super().__init__()
        self.scale = 1.25

    def forward(self, x):
        return x * torch.sigmoid(self.scale * x)


class Ungated(nn.Module):
    def __init__(self, act=nn.GELU, linear=nn.Linear):
        super().__init__()
        self.up, self.act, self.down = linear(D, H), act(), linear(H, D)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Called(Ungated):
    def __init__(self, function):
        super().__init__(nn.Identity)
        self.function = function

    def forward(self, x):
        return self.down(self.function(self.up(x)))


class Scaled(Ungated):
    """The activation's result times a weight per channel."""

    def __init__(self, act=nn.GELU):
        super().__init__(act)
        self.scale = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x):
        return self.down(self.act(self.up(x)) * self.scale)


class Shifted(Scaled):
    def forward(self, x):
        return self.down(self.act(self.up(x)) + self.scale)


class Fork(Ungated):
    """Three linear layers take the result."""

    def __init__(self, act=nn.GELU):
        super().__init__(act)
        self.second, self.third = nn.Linear(H, D), nn.Linear(H, D, bias=False)

    def hidden(self, x):
        return self.act(self.up(x))

    def forward(self, x):
        h = self.hidden(x)
        return self.down(h) + self.second(h) * self.third(h)


class Gated(nn.Module):
    def __init__(self, act=nn.SiLU, linear=nn.Linear):
        super().__init__()
        self.gate, self.up, self.down = linear(D, H), linear(D, H), linear(H, D)
        self.act = act()

    def parts(self, x):
        return self.gate(x), self.up(x)

    def product(self, gate, up):
        return self.act(gate) * up

    def forward(self, x):
        return self.down(self.product(*self.parts(x)))


class UpFirst(Gated):
    def product(self, gate, up):
        return up * self.act(gate)


class GatedCalled(Gated):
    def product(self, gate, up):
        return torch.mul(F.silu(gate), up)


class GatedFork(Gated):
    def __init__(self, act=nn.SiLU):
        super().__init__(act)
        self.second, self.third = nn.Linear(H, D), nn.Linear(H, D, bias=False)

    def forward(self, x):
        h = self.product(*self.parts(x))
        return self.down(h) + self.second(h) * self.third(h)


class GatedScaled(Gated):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(H) + 0.5)

    def product(self, gate, up):
        return super().product(gate, up) * self.scale


class ThreeFactors(Gated):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(D, H)

    def forward(self, x):
        return self.down(self.product(*self.parts(x)) * self.other(x))


class PlusOne(Gated):
    """The other factor is a sum, which is saved in place of the result of `up`."""

    def product(self, gate, up):
        return self.act(gate) * (up + 1)


class Wide(Gated):
    """The gate is computed in higher precision."""

    def product(self, gate, up):
        wide = gate.float() if gate.dtype.itemsize == 2 else gate
        return self.act(wide).to(up.dtype) * up


class Fused(Gated):
    """Gate and up are the halves of one result."""

    def __init__(self, act=nn.SiLU):
        nn.Module.__init__(self)
        self.gate_up, self.down, self.act = nn.Linear(D, 2 * H), nn.Linear(H, D), act()

    def parts(self, x):
        return self.gate_up(x).chunk(2, dim=-1)


class Swapped(Fused):
    def parts(self, x):
        up, gate = self.gate_up(x).chunk(2, dim=-1)
        return gate, up


class Interleaved(Fused):
    def parts(self, x):
        both = self.gate_up(x)
        return both[..., ::2], both[..., 1::2]


class Stacked(Fused):
    def parts(self, x):
        return self.gate_up(x).view(*x.shape[:-1], 2, H).unbind(-2)


class Transposed(Gated):
    """The product's operands are not contiguous."""

    def forward(self, x):
        gate, up = (t.transpose(0, 1) for t in self.parts(x))
        return self.down(self.product(gate, up)).transpose(0, 1)


class Modulated(nn.Module):
    """As diffusion transformers have it: a norm's output is scaled and shifted by a function of a condition."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.stem, self.norm, self.modulation = nn.Linear(D, D), norm(D), nn.Linear(D, 2 * D)
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        shift, scale = self.modulation(x[:, :1]).chunk(2, dim=-1)
        h = self.norm(self.stem(x)) * (1 + scale) + shift
        return self.q(h) + self.k(h)


class LowRank(Gated):
    """All linear layers are frozen and have adapters, written by hand."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        sizes = {"gate": (D, H), "up": (D, H), "down": (H, D)}
        self.a = nn.ModuleDict({n: nn.Linear(i, 4, bias=False) for n, (i, o) in sizes.items()})
        self.b = nn.ModuleDict({n: nn.Linear(4, o, bias=False) for n, (i, o) in sizes.items()})

    def adapted(self, name, x):
        return getattr(self, name)(x) + 0.5 * self.b[name](self.a[name](x))

    def forward(self, x):
        return self.adapted("down", self.product(self.adapted("gate", x), self.adapted("up", x)))


class Experts(nn.Module):
    """A mixture of gated experts, each of which gets some of the rows."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), nn.ModuleList(Gated() for _ in range(3))

    def forward(self, x):
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).max(-1)
        result = torch.zeros_like(rows @ self.router.weight.new_zeros(D, D))
        for i, expert in enumerate(self.experts):
            (mine,) = torch.where(chosen == i)
            result = result.index_add(0, mine, (expert(rows[mine]) * weights[mine, None]).to(result.dtype))
        return result.view_as(x)


class Reused(nn.Module):
    """One MLP, called several times."""

    def __init__(self, mlp=Gated):
        super().__init__()
        self.mlp = mlp()

    def forward(self, x):
        for _ in range(3):
            x = x + self.mlp(x)
        return x


class SharedActivation(nn.Module):
    """One activation module, in a gated MLP and in another one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Gated(), Ungated(nn.SiLU)
        self.second.act = self.first.act

    def forward(self, x):
        return self.second(self.first(x))


class Dropped(Ungated):
    """Dropout with probability 0 returns its input itself."""

    def __init__(self, p=0.0):
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.down(self.dropout(self.act(self.up(x))))


class DroppedByCall(Ungated):
    def forward(self, x):
        return self.down(F.dropout(self.act(self.up(x)), 0.25, self.training))


class DroppedGated(Gated):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.25)

    def product(self, gate, up):
        return self.dropout(super().product(gate, up))


class Residual(nn.Module):
    """Dropout whose result no linear layer takes."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(D, D), nn.Dropout(0.25)

    def forward(self, x):
        return x + self.dropout(self.linear(x))


class WideAdapters(LowRank):
    """Adapters in a wider dtype than the model's, each with a copy of its input, which may be dropped out."""

    def __init__(self, p=0.0, wide=True):
        super().__init__()
        self.dropout, self.wide = nn.ModuleDict({name: nn.Dropout(p) for name in self.a}), wide

    def to(self, dtype):
        super().to(dtype)
        wide = {2: torch.float32, 4: torch.float64}.get(dtype.itemsize, dtype) if self.wide else dtype
        self.a.to(wide)
        self.b.to(wide)
        return self

    def adapted(self, name, x):
        copy = self.dropout[name](x.to(self.a[name].weight.dtype))
        result = getattr(self, name)(x)
        return (result + 0.5 * self.b[name](self.a[name](copy))).to(result.dtype)


class AdaptersOfResult(WideAdapters):
    """The adapters take what another op saves."""

    def __init__(self, p=0.0, wide=True):
        super().__init__(p, wide)
        del self.a["down"], self.b["down"]

    def forward(self, x):
        h = torch.tanh(x)
        return self.adapted("gate", h) + self.adapted("up", h)


class AdaptersOfNorm(WideAdapters):
    def __init__(self, p=0.0, wide=True):
        super().__init__(p, wide)
        self.stem, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x):
        return super().forward(self.norm(self.stem(x)))


class Encoder(nn.Module):
    """Its own calls have no linear layer behind them, those inside have one."""

    def __init__(self):
        super().__init__()
        self.conv, self.pair, self.called = nn.Conv1d(D, D, 1), Ungated(), Called(F.gelu)

    def forward(self, x):
        return self.called(self.pair(F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)))


class Entry(NamedTuple):
    """A model.

    Attributes:
        make: Function that makes it.
        saved: Numbers per row that it saves once converted, without its input and parameters; None if that depends.
        rounds: Whether a norm is converted, so that results differ by roundings.
        bits: Bits per row that it saves besides.
    """

    make: Callable[[], nn.Module]
    saved: int | None
    rounds: bool = False
    bits: int = 0


#: Numbers saved per row: an activation saves its input; a product its factors, or the inputs of those.
PAIRS = {
    "gelu": Entry(Ungated, H),
    "gelu tanh": Entry(lambda: Ungated(lambda: nn.GELU("tanh")), H),
    "silu": Entry(lambda: Ungated(nn.SiLU), H),
    "called gelu": Entry(lambda: Called(F.gelu), H),
    "called silu": Entry(lambda: Called(F.silu), H),
    "QuickGELU": Entry(lambda: Ungated(QuickGELU), H),
    "NewGELU": Entry(lambda: Ungated(NewGELU), H),
    "hand-written": Entry(lambda: Ungated(HandWritten), H),
    "Conv1D": Entry(lambda: Ungated(NewGELU, lambda i, o: Conv1D(o, i)), H),
    "scaled": Entry(Scaled, H),
    "shifted": Entry(Shifted, None),
    "fork": Entry(Fork, H + 2 * D),
    "dropout of nothing": Entry(Dropped, H),
    "dropout": Entry(lambda: Dropped(0.25), H, bits=H),
    "called dropout": Entry(DroppedByCall, H, bits=H),
    "gated dropout": Entry(DroppedGated, 2 * H, bits=H),
    "residual dropout": Entry(Residual, 0, bits=D),
    "gated silu": Entry(Gated, 2 * H),
    "gated gelu": Entry(lambda: Gated(nn.GELU), 2 * H),
    "gated gelu tanh": Entry(lambda: Gated(lambda: nn.GELU("tanh")), 2 * H),
    "gated NewGELU": Entry(lambda: Gated(NewGELU), 2 * H),
    "gated QuickGELU": Entry(lambda: Gated(QuickGELU), 2 * H),
    "up first": Entry(UpFirst, 2 * H),
    "gated call": Entry(GatedCalled, 2 * H),
    "gated fork": Entry(GatedFork, 2 * H + 2 * D),
    "gated scaled": Entry(GatedScaled, 2 * H),
    "three factors": Entry(ThreeFactors, 3 * H),
    "plus one": Entry(PlusOne, 2 * H),
    "wide gate": Entry(Wide, 2 * H),
    "fused": Entry(Fused, 2 * H),
    "swapped": Entry(Swapped, 2 * H),
    "interleaved": Entry(Interleaved, 2 * H),
    "stacked": Entry(Stacked, 2 * H),
    "transposed": Entry(Transposed, None),
    # The inputs of the outer matrices, of 4 numbers each.
    "adapters": Entry(LowRank, 2 * H + 12),
    "wide adapters": Entry(WideAdapters, None),
    # What is dropped out of the model's input is saved: the input may be changed before the backward pass.
    "adapters of a dropout": Entry(lambda: WideAdapters(0.25, wide=False), 2 * H + 12 + 2 * D, bits=2 * D + H),
    "wide adapters of a dropout": Entry(lambda: WideAdapters(0.25), None),
    "adapters of a result": Entry(lambda: AdaptersOfResult(0.25, wide=False), D + 8, bits=2 * D),
    "wide adapters of a result": Entry(lambda: AdaptersOfResult(0.25), None),
    "wide adapters of a norm": Entry(AdaptersOfNorm, None, True),
    "adapters of a norm and a dropout": Entry(lambda: AdaptersOfNorm(0.25, wide=False), None, True),
    "experts": Entry(Experts, None),
    "reused": Entry(Reused, 3 * 2 * H + 2 * D),
    "reused gelu": Entry(lambda: Reused(Ungated), 3 * H + 2 * D),
    "shared activation": Entry(SharedActivation, 3 * H + D),
    "modulated": Entry(Modulated, None, True),
    "modulated rms": Entry(lambda: Modulated(lambda d: nn.RMSNorm(d, eps=1e-6)), None, True),
}

#: Those that drop nothing at random, which function transforms and compilers do in their own ways.
STEADY = [
    name for name in PAIRS if "dropout" not in name.removesuffix("dropout of nothing") and "of a result" not in name
]

#: Dtypes of weights and inputs (None for float32 under bfloat16 autocast), with the largest relative difference of a
#: gradient from the plain model's, in the 2-norm: some roundings in that dtype, and in the norms' float32.
DTYPES = {
    "float64": (torch.float64, 1e-12),
    "float32": (torch.float32, 2e-6),
    "bfloat16": (torch.bfloat16, 2e-2),
    "float16": (torch.float16, 2e-3),
    "autocast": (None, 2e-2),
}


def batch(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(shape or (2, 9, D)), generator=generator, dtype=torch.float64)
    return x.to(dtype or torch.float32).requires_grad_()


def autocast(dtype):
    # Without the cache of weight copies, which lives as long as the block.
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is None, cache_enabled=False)


def randomized(model):
    """Random weights and biases in norms, instead of ones and zeros."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.2 * torch.randn_like(p))
    return model


def seed(*_: Any) -> None:
    """A hook with which a model drops the same in every forward pass."""
    torch.manual_seed(2)


def _build(maker: Callable[[], nn.Module], dtype, options) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(randomized(maker()).to(dtype or torch.float32))
        if any((isinstance(m, nn.Dropout) and m.p > 0) or isinstance(m, DroppedByCall) for m in models[-1].modules()):
            models[-1].register_forward_pre_hook(seed)
    plain, model = models
    with autocast(dtype):
        report = lomem.convert(model, batch(dtype), **options)
    assert report.converted
    return plain, model


@functools.cache
def _built(name: str, dtype) -> tuple[nn.Module, nn.Module]:
    return _build(PAIRS[name].make, dtype, {"bits": 16})


def make(name_or_maker: Any, dtype=torch.float32, **options: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The plain model, the converted one, and a batch."""
    if isinstance(name_or_maker, str):
        # A copy, since conversions take longer than the tests themselves.
        plain, model = copy.deepcopy(_built(name_or_maker, dtype))
    else:
        plain, model = _build(name_or_maker, dtype, {"bits": 16} | options)
    return plain, model, batch(dtype)


def whole(model, x):
    return model(x)


def gradients(model, x, run=whole, dtype=torch.float32):
    """The result, and the gradients of parameters and input."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    with autocast(dtype):
        y = run(model, x)
    (y.float() if y.dtype.itemsize == 2 else y).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {"input": x.grad}
    return y.detach(), {n: g for n, g in grads.items() if g is not None}


def distance(grads, expected):
    """Relative difference of all gradients together, in the 2-norm."""
    assert grads.keys() == expected.keys()
    a, b = (torch.cat([g.double().flatten() for g in gs.values()]) for gs in (grads, expected))
    return ((a - b).norm() / b.norm()).item()


def saved_bytes(model, x, run=whole, dtype=torch.float32):
    """Bytes saved for backward, without the input and the parameters."""
    with lomem.memory.saved_for_backward([*model.parameters(), x]) as saved, autocast(dtype):
        run(model, x)
    return saved.nbytes


@contextlib.contextmanager
def no_garbage():
    """Without garbage collection: what is freed must not be part of a cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def living_bytes(model, x, run=whole, dtype=torch.float32):
    """Bytes alive after the forward pass, without the input and the parameters."""
    known = {StorageWeakRef(t.untyped_storage()).cdata for t in (*model.parameters(), *model.buffers(), x)}
    with no_garbage():
        living = Living()
        with living, autocast(dtype):
            y = run(model, x)
        made = [(ref, nbytes) for cdata, (ref, nbytes) in living._made.items() if cdata not in known]
        alive = sum(nbytes for ref, nbytes in made if not ref.expired())
        del y
        return alive
