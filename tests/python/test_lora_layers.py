"""LoRA layers of peft in converted models: gradients and bytes, with all their options, and however they are used."""

import copy

import lomem
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from lomem.commands import presets
from small_pairs import DTYPES, Gated, Ungated, autocast, batch, distance, gradients, living_bytes, saved_bytes, seed
from small_pairs import D as WIDTH
from test_handover import WAYS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = DTYPES["float32"][1]


class Attention(nn.Module):
    """Three layers take one tensor, which a norm makes; a fourth takes what no norm and no activation makes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(a.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(), nn.RMSNorm(WIDTH, eps=1e-6), Gated()

    def forward(self, x):
        x = self.attention(x)
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Two layers, so that the second one's norms have an input that needs a gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, x):
        return self.layers(x)


TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]


def adapted(model, adapters=("default",), dtype=None, **options):
    options = {"r": 4, "target_modules": TARGETS, "lora_alpha": 8, "lora_dropout": 0.0} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options), adapters[0], autocast_adapter_dtype=False)
    for name in adapters[1:]:
        model.add_adapter(name, peft.LoraConfig(**options | {"r": 3}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_A" in path or "lora_B" in path:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
                p.data = p.data.to(dtype or p.dtype)
    model.register_forward_pre_hook(seed)  # every pass drops the same
    return model.train()


def pair_of(kind, dtype=torch.float32, adapters=("default",), adapter_dtype=None, **options):
    """The same model twice, and a batch."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(adapted(kind().to(dtype), adapters, adapter_dtype or dtype, **options))
    return (*models, batch(dtype))


def assert_same(plain, model, x, dtype=torch.float32, tolerance=TOLERANCE, bitwise=True):
    before, expected = gradients(plain, x, dtype=dtype)
    after, grads = gradients(model, x, dtype=dtype)
    if bitwise:
        assert torch.equal(after, before)
    assert distance(grads, expected) < tolerance
    assert saved_bytes(model, x, dtype=dtype) <= saved_bytes(plain, x, dtype=dtype)
    assert living_bytes(model, x, dtype=dtype) <= living_bytes(plain, x, dtype=dtype)


#: Dtypes of the model and of its adapters, and whether autocast to bfloat16 is on.
MIXES = {
    "float32": (torch.float32, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "bfloat16 with float32": (torch.bfloat16, torch.float32, False),
    "float32 autocast": (torch.float32, torch.float32, True),
    "bfloat16 autocast": (torch.bfloat16, torch.bfloat16, True),
    "bfloat16 with float32 autocast": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", [Gated, Ungated, Stack])
def test_adapters_of_every_dtype(kind, mix, p):
    dtype, adapter_dtype, mixed = MIXES[mix]
    plain, model, x = pair_of(kind, dtype, adapter_dtype=adapter_dtype, lora_dropout=p)
    with autocast(None if mixed else dtype):
        lomem.convert(model, x, bits=16)
    low = mixed or dtype == torch.bfloat16
    # The norms of the stack round otherwise than torch's, in a few places.
    assert_same(plain, model, x, None if mixed else dtype, 2e-2 if low else 1e-5, bitwise=kind is not Stack)


def bytes_of_a_stack(dtype, adapter_dtype, p):
    """What a row of the stack cannot do without, by hand, besides rstd."""
    wide, d, h, r = dtype.itemsize, WIDTH, 3 * WIDTH, 4
    # The norms' outputs; queries, keys, values and the result of attention; gate and up.
    activations = 2 * d * wide + 4 * d * wide + 2 * h * wide
    low_rank = len(TARGETS) * r * adapter_dtype.itemsize
    masks = (6 * d + h) // 8 if p else 0
    return activations + low_rank + masks


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mix", ["float32", "bfloat16", "bfloat16 with float32"])
def test_bytes_of_a_stack(mix, p):
    dtype, adapter_dtype, _ = MIXES[mix]
    _, model, x = pair_of(Stack, dtype, adapter_dtype=adapter_dtype, lora_dropout=p)
    lomem.convert(model, x)
    rows = x[..., 0].numel()
    # x is the model's input, so the first norm saves nothing of it; rstd of four norms, the logsumexp of each of the
    # two heads and attention's two numbers of state of its random numbers, a few bytes each.
    small = rows * (4 * 4 + 2 * 2 * 4) + 64
    expected = 2 * rows * bytes_of_a_stack(dtype, adapter_dtype, p) + x.nbytes  # the result
    assert expected <= living_bytes(model, x, dtype=dtype) <= expected + small


#: Options of peft.LoraConfig.
OPTIONS = {
    "rank-stabilized": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "some": {"target_modules": ["q", "down"]},
    "saved": {"target_modules": ["q", "v"], "modules_to_save": ["o"]},
    "ranks": {"rank_pattern": {"q": 2, "gate": 7}},
}


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, p, wide):
    adapter_dtype = torch.float64 if wide else None
    plain, model, x = pair_of(Stack, lora_dropout=p, adapter_dtype=adapter_dtype, **OPTIONS[option])
    lomem.convert(model, x, bits=16)
    assert_same(plain, model, x, tolerance=1e-5, bitwise=False)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_matrices(frozen, p):
    plain, model, x = pair_of(Stack, lora_dropout=p)
    for m in (plain, model):
        for path, parameter in m.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in path)
    lomem.convert(model, x, bits=16)
    assert_same(plain, model, x, tolerance=1e-5, bitwise=False)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", [Gated, Ungated])
def test_adapters_are_switched(kind, p):
    plain, model, x = pair_of(kind, adapters=("one", "two"), lora_dropout=p)
    lomem.convert(model, x, bits=16)
    for choice in ("one", "two", ["one", "two"]):
        for m in (plain, model):
            m.base_model.set_adapter(choice)
        assert_same(plain, model, x)
    with plain.disable_adapter(), model.disable_adapter():
        assert torch.equal(plain(x), model(x))
    for m in (plain, model):
        m.base_model.set_adapter("one")
        m.requires_grad_(True)
    assert_same(plain, model, x)
    for m in (plain, model):
        m.merge_adapter()
    assert_same(plain, model, x)
    for m in (plain, model):
        m.unmerge_adapter()
    assert_same(plain, model, x)
    for m in (plain, model):
        m.eval()
    assert_same(plain, model, x)


@pytest.mark.parametrize("kind", [Gated, Ungated])
def test_adapters_are_added_after_conversion(kind):
    torch.manual_seed(0)
    plain, x = kind(), batch()
    model = copy.deepcopy(plain)
    lomem.convert(model, x, bits=16)
    models = []
    for m in (plain, model):
        torch.manual_seed(0)
        models.append(adapted(m, lora_dropout=0.25))
    assert_same(*models, x)


@pytest.mark.parametrize("kind", [Gated, Ungated])
def test_adapters_with_full_gradients_of_the_layers_below(kind):
    plain, model, x = pair_of(kind, lora_dropout=0.25)
    for m in (plain, model):
        m.requires_grad_(True)
    lomem.convert(model, x, bits=16)
    assert_same(plain, model, x)


@pytest.mark.parametrize("p", [0.0, 0.9, 0.5])
def test_the_probability_is_changed(p):
    plain, model, x = pair_of(Stack, lora_dropout=0.25)
    lomem.convert(model, x, bits=16)
    for m in (plain, model):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
    before, expected = gradients(plain, x)
    after, grads = gradients(model, x)
    assert torch.allclose(after, before, atol=1e-5)
    assert distance(grads, expected) < 1e-5


def test_saved_adapters_load_in_the_other_model(tmp_path):
    plain, model, x = pair_of(Stack, lora_dropout=0.25)
    lomem.convert(model, x)
    model.save_pretrained(tmp_path / "converted")
    plain.save_pretrained(tmp_path / "plain")
    for source in ("converted", "plain"):
        state = peft.load_peft_weights(str(tmp_path / source), device="cpu")
        for m in (plain, model):
            result = peft.set_peft_model_state_dict(m, state)
            assert not result.unexpected_keys
    torch.manual_seed(0)
    fresh = peft.PeftModel.from_pretrained(Stack(), str(tmp_path / "converted")).eval()
    assert torch.allclose(fresh(x), model.eval()(x), atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_trained_by_a_trainer(tmp_path, bf16):
    # As docs/convert.md says.
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    ids = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(0))
    options = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=bf16,
    )
    losses = []
    for converted in (False, True):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
        trainer = transformers.Trainer(model, options, train_dataset=[{"input_ids": i, "labels": i} for i in ids])
        if converted:
            batch = next(iter(trainer.get_train_dataloader()))
            with trainer.accelerator.autocast():
                report = lomem.convert(trainer.model, {name: value[:1] for name, value in batch.items()})
            assert report.saved_after < 0.6 * report.saved_before
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    # Roundings of norms, and under autocast those of products.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if bf16 else 1e-4)


def test_the_report_says_what_is_made_again():
    _, model, x = pair_of(Stack, torch.bfloat16, adapter_dtype=torch.float32, lora_dropout=0.25)
    report = lomem.convert(model, x, dry_run=True)
    copies = [d for d in report.converted if d.kind == "copy"]
    assert any(d.name.endswith("attention.o") and "o.lora_A makes its copy" in d.reason for d in copies)
    assert all(d.computes == "copies by cast and dropout" and d.action == "exact" for d in copies)
    assert sum(d.kind == "dropout" and d.action == "exact" for d in report.decisions) == 2 * len(TARGETS)
    assert any("lora_A" in d.reason for d in report.converted if d.kind == "norm")
    report = lomem.convert(model, x)
    assert sum(report.holders.values()) == report.saved_after
    # Layers are counted together; what the adapters' B saves is of rank 4.
    rows = x[..., 0].numel()
    assert report.holders["base_model.model.layers.*.mlp.down.lora_B.default"] == 2 * rows * 4 * 4
    assert "base_model.model.layers.*.mlp.down.lora_B.default" in str(report)
    assert not any("lora_A" in name for name in report.holders)


@pytest.mark.parametrize("keep", [{"dropouts": "keep"}, {"pairs": "keep"}, {"exclude": ["*.lora_dropout.*"]}])
def test_what_is_kept(keep):
    plain, model, x = pair_of(Stack, lora_dropout=0.25)
    report = lomem.convert(model, x, bits=16, **keep)
    assert not any(d.kind == ("copy" if "pairs" in keep else "dropout") for d in report.converted)
    assert_same(plain, model, x, tolerance=1e-5, bitwise=False)


def test_dropouts_alone():
    plain, model, x = pair_of(Stack, lora_dropout=0.25)
    report = lomem.convert(model, x, norms="keep", activations="keep", pairs="keep")
    assert {d.kind for d in report.converted} == {"dropout"}
    assert_same(plain, model, x)
    with pytest.raises(ValueError, match=r"all 'keep', expected something to convert"):
        lomem.convert(plain, x, norms="keep", activations="keep", pairs="keep", dropouts="keep")


def test_an_input_changed_in_place_later_is_not_made_again():
    # It would no longer be what the adapter was given.
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.q, self.k = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            h = self.stem(x)
            y = self.q(h) + self.k(h)
            h.add_(1)
            return y

    plain, model, x = pair_of(InPlace, lora_dropout=0.25)
    lomem.convert(model, x)
    _, expected = gradients(plain, x)
    _, grads = gradients(model, x)
    assert distance(grads, expected) < TOLERANCE


def test_the_model_s_input_is_changed_before_the_backward_pass():
    # And so is the weight: neither is saved by the plain model.
    plain = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, 4), nn.GELU(), nn.Linear(4, 4))
    model = copy.deepcopy(plain)
    x = batch().detach()
    lomem.convert(model, x, bits=16)
    results = []
    for m in (plain, model):
        mine = x.clone()
        torch.manual_seed(0)
        first, second = m(mine).square().sum(), m(mine).square().sum()
        mine.zero_()
        first.backward()
        with torch.no_grad():
            m[1].weight.mul_(0.5)
        second.backward()
        results.append({n: p.grad for n, p in m.named_parameters()})
    assert distance(results[1], results[0]) < TOLERANCE


class Strange(nn.Module):
    """Casts that lead to no linear layer, beside a pair, because of which they are looked at."""

    def __init__(self):
        super().__init__()
        self.stem, self.pair = nn.Linear(WIDTH, WIDTH), Ungated()
        self.g = nn.Parameter(torch.rand(WIDTH, dtype=torch.float64))

    def strange(self, h):
        raise NotImplementedError

    def forward(self, x):
        y = self.strange(self.stem(x))
        return self.pair.down(nn.functional.gelu(self.pair.up(x))) + y.float()


class InPlaceLater(Strange):
    def strange(self, h):
        y = h.double() * self.g
        h.add_(1)  # not y's copy
        return y + h


class AsksForTheType(Strange):
    def strange(self, h):
        return h if h.type() == "torch.HalfTensor" else h * 2


class ToComplex(Strange):
    def strange(self, h):
        y = h.to(torch.complex128) * self.g
        return y.real + 2 * (y * 1j).real.tanh()


class ToIntegers(Strange):
    def strange(self, h):
        return h.to(torch.int32) * self.g + h


class Loop(Strange):
    def strange(self, h):
        total = h
        for _ in range(9):
            total = total + (h.bfloat16() * self.g.bfloat16()).float()
        return total


@pytest.mark.parametrize("kind", [InPlaceLater, AsksForTheType, ToComplex, ToIntegers, Loop])
def test_casts_that_lead_to_no_linear_layer(kind):
    torch.manual_seed(0)
    plain, x = kind(), batch()
    model = copy.deepcopy(plain)
    lomem.convert(model, x, bits=16)
    assert_same(plain, model, x)


class CopiesWithoutGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropouts = nn.ModuleList(nn.Dropout(0.25) for _ in range(2))

    def forward(self, x):
        with torch.no_grad():
            h = self.stem(x)
            d = self.dropouts[0](h)
        return self.first(d) + self.second(self.dropouts[1](h))


class OneLayerForTwo(nn.Module):
    """A layer takes dropped-out copies of two tensors; one of these nobody saves, and it is part of a larger one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.layer = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(0.25)

    def forward(self, x):
        y = self.layer(self.dropout(torch.tanh(self.first(x))))
        large = self.second(x.repeat(1, 20, 1))
        return y + self.layer(self.dropout(large[:, : x.shape[1]]))


class FirstRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Linear(WIDTH, WIDTH).bfloat16(), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.layer(self.stem(x.bfloat16())[:, 0].float())


@pytest.mark.parametrize("kind", [OneLayerForTwo, FirstRow])
def test_parts_of_tensors(kind):
    torch.manual_seed(0)
    plain, x = kind(), batch(torch.float32, 4, 9, WIDTH)
    model = copy.deepcopy(plain)
    for m in (plain, model):
        m.register_forward_pre_hook(seed)
    # The first row of one row is all of the tensor, so a copy of it is planned, but not made of 9 rows.
    lomem.convert(model, x[:, :1] if kind is FirstRow else x)
    assert_same(plain, model, x)


def test_copies_without_gradient_are_not_planned():
    # Nothing is passed on there, and to save the tensor for the other copy alone would gain nothing.
    with pytest.raises(lomem.conversion.NothingToConvertError):
        lomem.convert(CopiesWithoutGradient(), batch())


def test_a_dropout_keeps_the_norm_s_output_for_the_layer_behind_it():
    # The norm saves the storage of its output, but the tensor is gone when the linear layer runs.
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.25), nn.Linear(WIDTH, 4)),
        batch(),
    )
    report = lomem.convert(model, x)
    # The report does not count the result.
    assert living_bytes(model, x) == report.saved_after + x[..., 0].numel() * 4 * 4


def test_activations_are_kept_where_dropouts_are_converted():
    class Net(Ungated):
        def forward(self, x):
            return nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.25)

    torch.manual_seed(0)
    plain, x = Net(), batch(torch.bfloat16)
    plain.bfloat16().register_forward_pre_hook(seed)
    model = copy.deepcopy(plain)
    assert {d.kind for d in lomem.convert(model, x, activations="keep").converted} == {"dropout"}
    _, expected = gradients(plain, x, dtype=torch.bfloat16)
    _, grads = gradients(model, x, dtype=torch.bfloat16)
    assert all(torch.equal(g, expected[n]) for n, g in grads.items())


def test_a_layer_that_rebuilds_its_input_takes_an_unplanned_copy():
    # The layer is converted for the activation before it. The cast is not planned, since its source is changed later.
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.stem, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x):
            y = self.layer(nn.functional.gelu(self.up(x)))
            h = self.stem(x)
            y = y + self.layer(h.to(torch.float32, copy=True))
            h.add_(1)
            return y

    torch.manual_seed(0)
    plain, x = Net(), batch()
    model = copy.deepcopy(plain)
    assert lomem.convert(model, x, bits=16).converted
    assert_same(plain, model, x)


def test_hooks_that_a_first_run_adds_are_added_once():
    # As transformers' models do that return hidden states.
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.seen = Ungated(), []

        def forward(self, x):
            if not hasattr(self, "installed"):
                self.installed = True
                self.body.register_forward_hook(lambda module, args, result: self.seen.append(result.detach()))
            self.seen.clear()
            return self.body(x)

    model, x = Hooked(), batch()
    lomem.convert(model, x)
    assert not model.body._forward_hooks
    model(x)
    assert len(model.seen) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    class Checkpointed(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    plain, model, x = pair_of(Checkpointed, torch.bfloat16, adapter_dtype=torch.float32, lora_dropout=0.25)
    lomem.convert(model, x)
    _, expected = gradients(plain, x, dtype=torch.bfloat16)
    _, grads = gradients(model, x, dtype=torch.bfloat16)
    assert distance(grads, expected) < 2e-2
    assert living_bytes(model, x, dtype=torch.bfloat16) <= living_bytes(plain, x, dtype=torch.bfloat16)


def test_compiled():
    plain, model, x = pair_of(Stack, lora_dropout=0.25)
    lomem.convert(model, x)
    figures = []
    for m in (plain, model):
        layers = m.base_model.model  # without the hook, which no compiler can trace
        torch.compiler.reset()
        compiled = torch.compile(layers, backend="aot_eager_decomp_partition", fullgraph=True)

        def run(_, x, compiled=compiled):
            seed()
            return compiled(x)

        figures.append((gradients(layers, x, run)[1], saved_bytes(layers, x, run)))
    torch.compiler.reset()
    (expected, before), (grads, after) = figures
    assert distance(grads, expected) < 1e-5
    # The first norm saves its output in place of the model's input, which is not counted.
    assert after <= before + x.nbytes


# On bases in 4 bits, as QLoRA has them.


def of_four_bits():
    """Two models in bfloat16 whose linear layers have 4 bits, with adapters in float32 and dropout, and a batch."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = presets.quantize_linears(Stack().bfloat16(), TARGETS)
        models.append(adapted(model, dtype=torch.float32, lora_dropout=0.25))
    return (*models, batch(torch.bfloat16))


#: Roundings in bfloat16, of norms above all.
SHORT = DTYPES["bfloat16"][1]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_around_bases_of_four_bits(way):
    plain, model, x = of_four_bits()
    report = lomem.convert(model, x)
    assert {d.kind for d in report.converted} == {"norm", "activation", "dropout", "copy"}
    _, expected = gradients(plain, x, WAYS[way], torch.bfloat16)
    _, grads = gradients(model, x, WAYS[way], torch.bfloat16)
    assert distance(grads, expected) < SHORT
    assert living_bytes(model, x, WAYS[way], torch.bfloat16) <= living_bytes(plain, x, WAYS[way], torch.bfloat16)


def test_bases_of_four_bits_are_compiled():
    plain, model, x = of_four_bits()
    lomem.convert(model, x)
    results = []
    for m in (plain, model):
        layers = m.base_model.model
        torch.compiler.reset()
        compiled = torch.compile(layers, backend="aot_eager")

        def run(_, x, compiled=compiled):
            seed()
            return compiled(x)

        results.append(gradients(layers, x, run, torch.bfloat16)[1])
    torch.compiler.reset()
    assert distance(results[1], results[0]) < SHORT


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_bases_of_four_bits_are_distributed(tmp_path, wrapper):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, model, x = of_four_bits()
        lomem.convert(model, x)
        _, expected = gradients(model, x, dtype=torch.bfloat16)
        if wrapper == "fully_shard":
            mesh = init_device_mesh("cpu", (1,))
            # Integers are not sharded, as in a QLoRA training.
            packed = {p for p in model.parameters() if not p.is_floating_point()}
            for layer in model.base_model.model.layers:
                fully_shard(layer, mesh=mesh, ignored_params=packed)
            wrapped = fully_shard(model, mesh=mesh, ignored_params=packed)
        else:
            wrapped = nn.parallel.DistributedDataParallel(model)
        _, grads = gradients(wrapped, x, dtype=torch.bfloat16)
        grads = {n.removeprefix("module."): g for n, g in grads.items()}
        grads = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
        assert distance(grads, expected) < 1e-6
        # Against the plain model, to roundings.
        assert distance(grads, gradients(plain, x, dtype=torch.bfloat16)[1]) < SHORT
    finally:
        dist.destroy_process_group()
