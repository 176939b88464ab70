"""Layers of lomem.nn.LoRALinear in converted models: they rebuild their input as peft's layers do."""

import copy
import pickle
import sys
from pathlib import Path

import lomem
import pytest
import torch
from small_pairs import DTYPES, Gated, Ungated, autocast, batch, distance, gradients, living_bytes, saved_bytes, seed
from small_pairs import D as WIDTH
from test_handover import WAYS
from test_lora_layers import MIXES, TARGETS, Stack, adapted, assert_same
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from bytes_alive import bytes_alive

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = DTYPES["float32"][1]
#: Rank, as `adapted` has it.
R = 4


def with_layers(model, adapter_dtype, p=0.0):
    """The model with lomem's layers in place of its linear ones, frozen."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if attribute in TARGETS:
            layer = lomem.nn.LoRALinear(module, R, alpha=8, dropout=p, dtype=adapter_dtype)
            setattr(model.get_submodule(parent), attribute, layer)
    return model


def in_order(model):
    """The matrices of the adapters: peft's names have more parts than those of lomem's layers."""
    return [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]


def build(kind, mix="float32", p=0.0):
    """The model with lomem's layers, the same with peft's, and a batch. Dtypes are those of a mix."""
    dtype, adapter_dtype, _ = MIXES[mix]
    torch.manual_seed(0)
    plain = kind().to(dtype)
    theirs = adapted(copy.deepcopy(plain), dtype=adapter_dtype, lora_dropout=p)
    layers = with_layers(plain, adapter_dtype, p)
    for mine, other in zip(in_order(layers), in_order(theirs), strict=True):
        mine.data.copy_(other.data)
    layers.register_forward_pre_hook(seed)
    return layers.train(), theirs, batch(dtype)


def converted(model, x, mixed=False, **options):
    with autocast(None if mixed else x.dtype):
        return lomem.convert(model, x, **{"bits": 16} | options)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", [Gated, Ungated, Stack])
def test_as_few_bytes_as_with_pefts_layers(kind, mix, p):
    dtype, _, mixed = MIXES[mix]
    plain, theirs, x = build(kind, mix, p)
    model = copy.deepcopy(plain)
    report = converted(model, x, mixed)
    of_theirs = converted(theirs, x, mixed)
    low = mixed or dtype == torch.bfloat16
    # The norms of the stack round otherwise than torch's, in a few places.
    assert_same(plain, model, x, None if mixed else dtype, 2e-2 if low else 1e-5, bitwise=kind is not Stack)

    # Of many rows, beside which copies of weights do not count.
    many = batch(dtype, 4, 256, WIDTH)

    def alive(m):
        def forward():
            with autocast(None if mixed else dtype):
                return m(many)

        return bytes_alive(forward)[0]

    assert alive(model) <= 1.02 * alive(theirs)
    assert report.saved_after <= 1.02 * of_theirs.saved_after
    if not mixed:  # the report leaves out copies of weights
        assert report.saved_before == saved_bytes(plain, x, dtype=dtype)
        assert report.saved_after == saved_bytes(model, x, dtype=dtype)


class Ill(Stack):
    """Norms that cannot be inverted: they save their normalized input, which the adapters rebuild theirs from."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for layer in self.layers:
                layer.norm.weight[3] = layer.attention.norm.weight[3] = 0


class Behind(nn.Module):
    """The adapters take a dropped-out copy of what another op saves."""

    def __init__(self):
        super().__init__()
        self.dropout, self.q, self.k = nn.Dropout(0.25), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.dropout(torch.tanh(x))
        return self.q(h) * self.k(h)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mix", ["float32", "bfloat16", "bfloat16 with float32", "float32 autocast"])
@pytest.mark.parametrize("kind", [Ill, Behind])
def test_other_producers(kind, mix, p):
    dtype, _, mixed = MIXES[mix]
    plain, _, x = build(kind, mix, p)
    model = copy.deepcopy(plain)
    report = converted(model, x, mixed)
    assert {d.action for d in report.converted if d.kind == "norm"} == ({"normalized"} if kind is Ill else set())
    assert kind is Ill or "copy" in {d.kind for d in report.converted}
    low = mixed or dtype == torch.bfloat16
    assert_same(plain, model, x, None if mixed else dtype, 2e-2 if low else 1e-5, bitwise=kind is Behind)
    before, after = (living_bytes(m, x, dtype=None if mixed else dtype) for m in (plain, model))
    assert after < before


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", [Gated, Ill])
def test_groups(kind, p):
    plain, _, x = build(kind, "bfloat16 with float32", p)
    model = copy.deepcopy(plain)
    report = converted(model, x, bits=8)
    assert {d.action for d in report.converted if d.kind != "copy"} == {"8bit groups"}
    exact = copy.deepcopy(plain)
    converted(exact, x)
    assert living_bytes(model, x, dtype=x.dtype) < living_bytes(exact, x, dtype=x.dtype)
    _, expected = gradients(plain, x, dtype=x.dtype)
    _, grads = gradients(model, x, dtype=x.dtype)
    # 8 bits in groups: a relative error of 1/256 per element of the largest of its group.
    assert distance(grads, expected) < 3e-2


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_and_hooks_around(way, p):
    plain, theirs, x = build(Stack, "bfloat16 with float32", p)
    model = copy.deepcopy(plain)
    converted(model, x)
    _, expected = gradients(plain, x, WAYS[way], x.dtype)
    # torch compares what a region saves with what it saves when recomputed, and raises if they differ.
    _, grads = gradients(model, x, WAYS[way], x.dtype)
    assert distance(grads, expected) < 2e-2  # the norms' roundings in bfloat16
    # This policy saves every product that it sees. Of the op, which is one call, it does not see that with B.
    before = theirs if way == "selective" else plain
    assert living_bytes(model, x, WAYS[way], x.dtype) <= living_bytes(before, x, WAYS[way], x.dtype)


def test_states_of_the_adapters():
    plain, _, x = build(Gated, p=0.25)
    model = copy.deepcopy(plain)
    converted(model, x)

    def of(m):
        return [layer for layer in m.modules() if isinstance(layer, lomem.nn.LoRALinear)]

    def both(change):
        for layer in (*of(plain), *of(model)):
            change(layer)
        assert_same(plain, model, x)

    both(lambda layer: setattr(layer, "enabled", False))
    both(lambda layer: setattr(layer, "enabled", True))
    both(lambda layer: layer.merge())
    both(lambda layer: layer.unmerge())
    both(lambda layer: setattr(layer, "dropout", 0.5))
    both(lambda layer: setattr(layer, "scaling", 1.0))
    both(lambda layer: layer.lora_A.requires_grad_(False))
    both(lambda layer: layer.lora_A.requires_grad_(True))
    both(lambda layer: layer.lora_B.requires_grad_(False))
    both(lambda layer: layer.requires_grad_(True))
    both(lambda layer: layer.eval())
    both(lambda layer: setattr(layer, "dropout", 0.0))
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_matrices(frozen):
    plain, _, x = build(Stack, p=0.25)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    model = copy.deepcopy(plain)
    converted(model, x)
    assert_same(plain, model, x, tolerance=1e-5, bitwise=False)


class Keeps(nn.Module):
    """A base that saves its own input, and is no linear layer that could rebuild it."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features, self.base = base.in_features, base.out_features, base

    def forward(self, x):
        return self.base(x) + torch.sin(x).sum(-1, keepdim=True)


@pytest.mark.parametrize("base", ["trained", "keeps its input", "bias", "vector"])
def test_other_layers(base):
    plain, _, x = build(Gated, p=0.25)
    for layer in [layer for layer in plain.modules() if isinstance(layer, lomem.nn.LoRALinear)]:
        if base == "trained":
            layer.base_layer.requires_grad_(True)
        elif base == "keeps its input":
            layer.base_layer = Keeps(layer.base_layer)
        elif base == "bias":
            layer.lora_B.bias = nn.Parameter(torch.randn(layer.out_features))
    x = x[0, 0].detach().requires_grad_() if base == "vector" else x
    model = copy.deepcopy(plain)
    batched = x if x.dim() > 1 else x[None]
    report = converted(model, batched)
    assert any("down rebuild" in d.reason for d in report.converted)
    # A base that keeps its input is not counted as rebuilding it.
    (pair,) = (d for d in report.converted if d.name == "act")
    assert report.saved_before - pair.saved_bytes == report.saved_after == saved_bytes(model, batched)
    assert_same(plain, model, x)


class Mine(lomem.nn.LoRALinear):
    """With a forward of its own, so that it is not known what it saves."""

    def _update(self, input):
        return super()._update(input) * 2


def test_subclasses_are_left():
    plain, _, x = build(Gated)
    plain.down.__class__ = Mine
    model = copy.deepcopy(plain)
    report = converted(model, x, bits=None)
    assert not any("down" in d.reason for d in report.converted)
    assert type(model.down) is Mine
    assert_same(plain, model, x, tolerance=1)  # codes of few bits, drawn at random


def test_excluded_layers_are_left():
    plain, _, x = build(GatedTwice)
    model = copy.deepcopy(plain)
    report = converted(model, x, exclude=["first.down"])
    assert [d.name for d in report.converted if "down" in d.reason] == ["second.act"]
    assert type(model.first.down) is lomem.nn.LoRALinear
    assert_same(plain, model, x)


class GatedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Gated(), Gated()

    def forward(self, x):
        return self.second(self.first(x))


def test_converted_layers_look_and_travel_as_before(tmp_path):
    plain, _, x = build(Gated, p=0.25)
    model = copy.deepcopy(plain)
    report = converted(model, x)
    assert "down rebuilds it" in str(report)
    assert report.holders["down"] == x[..., 0].numel() * R * 4 + x[..., 0].numel() * 48 // 8  # u and the mask
    assert isinstance(model.down, lomem.nn.LoRALinear)
    assert repr(model.down).startswith("SharedInputLoRALinear(")
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.register_forward_pre_hook(seed)
        assert_same(plain, other, x)
        assert saved_bytes(other, x) == saved_bytes(model, x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh, *_ = build(Gated, p=0.25)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(fresh(x), model(x))
    lomem.restore(model)
    assert type(model.down) is lomem.nn.LoRALinear
    assert "lomem_copies" not in vars(model.down)
    assert saved_bytes(model, x) == saved_bytes(plain, x)


def test_second_derivatives():
    plain, _, x = build(Gated, p=0.25)
    model = copy.deepcopy(plain)
    converted(model, x)
    results = []
    for m in (plain, model):
        mine = x.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(m(mine).square().sum(), mine, create_graph=True)
        first.square().sum().backward()
        results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None} | {"x": mine.grad})
    assert distance(results[1], results[0]) < 1e-5  # sums of float32 in another order


def compiled_saved_bytes(model, x):
    """What a compiled forward pass leaves to the backward pass."""
    with lomem.memory.saved_for_backward([*model.parameters(), x]) as saved:
        y = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)(x)
    y.square().mean().backward()
    return saved.nbytes


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", [Gated, Stack, Ill])
def test_compiled(kind, p):
    plain, theirs, x = build(kind, p=p)
    model = copy.deepcopy(plain)
    for m in (plain, model, theirs):
        m._forward_pre_hooks.clear()  # a compiler does not trace the seed
    converted(model, x)
    torch.compiler.reset()
    nbytes = [compiled_saved_bytes(m, x) for m in (plain, model)]
    results = []
    for m in (plain, model):
        m.eval()  # so that nothing is dropped
        compiled = torch.compile(m, backend="aot_eager")
        results.append(gradients(m, x, lambda _, x, compiled=compiled: compiled(x)))
    torch.compiler.reset()
    assert torch.allclose(results[1][0], results[0][0], atol=1e-5)
    assert distance(results[1][1], results[0][1]) < 1e-5
    assert nbytes[1] < nbytes[0]


def test_exported_programs_are_those_of_the_original():
    plain, _, x = build(Gated)
    model = copy.deepcopy(plain)
    converted(model, x)
    programs = [torch.export.export(m.eval(), (x,)) for m in (plain, model)]
    assert programs[1].graph_module.code == programs[0].graph_module.code
