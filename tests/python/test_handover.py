"""What a producer hands to the linear layers after it, under everything that autograd supports."""

import copy
import functools
import gc
import pickle

import lomem
import pytest
import torch
import torch.nn.functional as F
import transformers
from lomem._trace.handover import linear_of_offered, offer, offer_itself, offered, peek, take
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from zoo import build

pytestmark = pytest.mark.usefixtures("one_thread")

D = 16


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    # Objects from before are ignored, so that collections are quick.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class PreNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(D, 2 * D, bias=False)
        self.out = nn.Linear(2 * D, D)

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(torch.tanh(self.q(h)) * self.k(h))


class PostNorm(PreNorm):
    def forward(self, x):
        return self.norm(x + self.out(torch.tanh(self.q(x)) * self.k(x)))


def _whole(block, x):
    return block(x)


def _selective(block, x):
    # Matrix products are saved, the rest is recomputed.
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def _nested(block, x):
    inner = functools.partial(checkpoint, block, use_reentrant=False)
    return checkpoint(inner, x, use_reentrant=False)


def _in_hooks(block, x):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        return checkpoint(block, x, use_reentrant=False)


def _offloaded(block, x):
    with torch.autograd.graph.save_on_cpu():
        return block(x)


def _offloaded_checkpoint(block, x):
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(block, x, use_reentrant=False)


#: How blocks run: the wrappers that users put around them.
WAYS = {
    "none": _whole,
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "selective": _selective,
    "nested": _nested,
    "in hooks": _in_hooks,
    "save_on_cpu": _offloaded,
    "offloaded checkpoint": _offloaded_checkpoint,
}

#: Dtypes of weights (None for float32 under bfloat16 autocast), with the largest relative difference of a gradient in
#: the 2-norm: a few roundings in the narrowest dtype, through four blocks.
DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 4e-2), "autocast": (None, 4e-2)}


class Net(nn.Module):
    """Blocks, each of which runs in its own way."""

    def __init__(self, block, way):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.last = nn.Linear(D, D)
        self.way = way

    def forward(self, x):
        x = self.first(x).to(x.dtype)  # a residual stream of full precision under autocast
        for block in self.blocks:
            x = WAYS[self.way](block, x)
        return self.last(x)


def make(block, way, dtype, ill):
    torch.manual_seed(0)
    model = Net(block, way).to(dtype or torch.float32)
    with torch.no_grad():
        for b in model.blocks:
            b.norm.bias.normal_(0, 0.1)
            if ill:
                b.norm.weight[0] = 0
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1), dtype=dtype or torch.float32)
    return model, x.requires_grad_()


def autocast(dtype):
    # Without autocast's cache of weight copies, which lives as long as the block.
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is None, cache_enabled=False)


class Living(TorchDispatchMode):
    """Counts the bytes of live storages that ops made, whatever holds them."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                ref = StorageWeakRef(leaf.untyped_storage())
                self._made.setdefault(ref.cdata, (ref, leaf.untyped_storage().nbytes()))
        return result

    @property
    def nbytes(self):
        return sum(nbytes for ref, nbytes in self._made.values() if not ref.expired())


def living_and_gradients(model, x, dtype, loss=None):
    """Bytes alive after the forward pass, and the gradients."""
    model.zero_grad(set_to_none=True)
    torch.clear_autocast_cache()
    torch.manual_seed(0)
    living = Living()
    with living, autocast(dtype):
        y = model(x).float().square().mean() if loss is None else loss(model)
    gc.collect()
    nbytes = living.nbytes
    y.backward()
    return nbytes, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(grads, expected):
    assert grads.keys() == expected.keys()
    a, b = (torch.cat([g.double().flatten() for g in gs.values()]) for gs in (grads, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [PreNorm, PostNorm])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_living_bytes(way, block, dtype, ill):
    dtype, tolerance = DTYPES[dtype]
    plain, x = make(block, way, dtype, ill)
    model = copy.deepcopy(plain)
    before, expected = living_and_gradients(plain, x, dtype)
    with autocast(dtype):
        report = lomem.convert(model, x, activations="keep")
    kinds = {d.action for d in report.converted if d.kind == "norm"}
    # The last norm's output goes to a single linear layer.
    two = block is PostNorm and dtype is None
    assert kinds == {"normalized"} if ill else kinds == ({"inverted", "two outputs"} if two else {"inverted"})
    # torch compares what a region saves with what it saves when recomputed, and raises if they differ.
    after, grads = living_and_gradients(model, x, dtype)
    assert distance(grads, expected) < tolerance
    assert after <= before
    if way == "none":
        assert after < before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_conversion_does_not_depend_on_what_is_around(way, block):
    model, x = make(block, "none", None, False)
    with autocast(None):
        expected = lomem.convert(model, x, dry_run=True)
        model.way = way
        report = lomem.convert(model, x, dry_run=True)
    assert [(d.name, d.action, d.reason, d.saved_bytes) for d in report.decisions] == [
        (d.name, d.action, d.reason, d.saved_bytes) for d in expected.decisions
    ]
    assert report.converted


HUGGING_FACE = {
    "none": None,
    "reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
    "offload": {"offload": True},
}


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("way", HUGGING_FACE)
def test_hugging_face_checkpointing(way, name, dtype, ill, monkeypatch):
    # It requests pinned memory, which a machine without an accelerator does not have.
    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", lambda **_: torch.autograd.graph.save_on_cpu())
    dtype, tolerance = DTYPES[dtype]
    plain, batch = build(name, dtype or torch.float32)
    with torch.no_grad():
        for path, p in plain.named_parameters():
            if ill and "norm" in path.lower() and path.endswith("weight"):
                p[0] = 0
    options = HUGGING_FACE[way]
    if options is not None:
        plain.activation_checkpointing_enable(**options)
    model = copy.deepcopy(plain)
    with autocast(dtype):
        lomem.convert(model, batch, activations="keep")

    def loss(m):
        return m(**batch).loss

    before, expected = living_and_gradients(plain.train(), None, dtype, loss)
    after, grads = living_and_gradients(model.train(), None, dtype, loss)
    assert distance(grads, expected) < tolerance
    assert after <= before


def test_an_offer_ends_with_its_region():
    # Nothing takes the offer of the region's last norm, since its linear layers are in the next region. Its result
    # stays alive, because that region is recomputed from it.
    model, x = make(PostNorm, "non-reentrant", None, False)
    results = []
    with autocast(None):
        lomem.convert(model, x)
        for block in model.blocks[:2]:
            block.norm.register_forward_hook(
                lambda module, args, result: results.append((result, bool(offered(result))))
            )
        y = model(x)
    assert [then for _, then in results] == [True, True]
    assert [offered(result) for result, _ in results] == [(), ()]
    y.sum().backward()


def test_a_result_is_pickled_as_any_tensor(tmp_path):
    model, x = make(PostNorm, "none", None, False)
    with autocast(None):
        lomem.convert(model, x)
        result = model.blocks[0].norm(model.first(x).float())
    assert offered(result)
    assert not vars(result)
    torch.save(result, tmp_path / "result.pt")
    assert torch.equal(torch.load(tmp_path / "result.pt", weights_only=True), result)
    assert torch.equal(pickle.loads(pickle.dumps(result.detach())), result)


def test_nothing_is_taken_of_a_result_that_was_changed():
    model, x = make(PostNorm, "none", None, False)
    with autocast(None):
        lomem.convert(model, x)
        for change in (lambda h: h.add_(1), lambda h: h[:, 0].zero_(), lambda h: h.view(-1, D).mul_(2)):
            h = model.blocks[0].norm(model.first(x).float())
            assert take(h) is not None
            with torch.no_grad():
                change(h)
            assert take(h) is None


# Producers other than norms, as a basis for future pairs. An activation saves its input, a gated unit gate and up; the
# linear layer after them saves the same tensors, and recomputes its input from them.


# Like lomem's ops, each is a single op. In a formula of ATen ops, a compiler would see that the rebuilding computes the
# same thing, and save the result instead.


@torch.library.custom_op("lomem_test::gelu", mutates_args=())
def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


@torch.library.custom_op("lomem_test::gated", mutates_args=())
def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _rebuilt(gate, up)


_gelu.register_fake(torch.empty_like)
_gated.register_fake(lambda gate, up: torch.empty_like(up))


def _rebuilt(gate, up):
    return F.silu(gate) * up


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class Linear(nn.Linear):
    """Takes what is offered."""

    def forward(self, input):
        taken = take(input)
        if taken is None:
            return super().forward(input)
        kept, made = taken
        return linear_of_offered(input, self.weight, self.bias, input.dtype, kept, made.rebuild)


class ActivationPair(nn.Module):
    def __init__(self, pair=True):
        super().__init__()
        self.up, self.down, self.pair = nn.Linear(D, 4 * D), (Linear if pair else nn.Linear)(4 * D, D), pair

    def forward(self, x):
        x = self.up(x)
        if not self.pair:
            return self.down(F.gelu(x))
        h = _Gelu.apply(x)
        offer(h, (x,), F.gelu, takers=1)
        return self.down(h)


class GatedPair(nn.Module):
    def __init__(self, pair=True):
        super().__init__()
        self.gate, self.up = nn.Linear(D, 4 * D), nn.Linear(D, 4 * D)
        self.down, self.pair = (Linear if pair else nn.Linear)(4 * D, D), pair

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        if not self.pair:
            return self.down(_rebuilt(gate, up))
        h = _Gated.apply(gate, up)
        offer(h, (gate, up), _rebuilt, takers=1)
        return self.down(h)


@pytest.mark.parametrize("pair", [ActivationPair, GatedPair])
@pytest.mark.parametrize("way", WAYS)
def test_other_producers(way, pair):
    torch.manual_seed(0)
    plain = Net(functools.partial(pair, pair=False), way)
    model = Net(pair, way)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, D).requires_grad_()
    before, expected = living_and_gradients(plain, x, torch.float32)
    after, grads = living_and_gradients(model, x, torch.float32)
    assert distance(grads, expected) < 1e-6
    assert after <= before
    if way == "none":
        # Three products of 6 rows are not saved; for the gated units, neither are three silu(gate).
        assert before - after == 3 * 6 * 4 * D * 4 * (2 if pair is GatedPair else 1)


def test_only_what_has_the_same_rounding_is_passed_on():
    x = torch.randn(3, D, requires_grad=True)
    copied, activated, saved = x * 2, F.gelu(x), x * 3
    offer(copied, (copied.bfloat16(),), lambda kept: kept, takers=1)
    offer(activated, (x,), F.gelu, takers=1, differentiable=True)
    offer_itself(saved)
    assert peek(copied) is None
    (kept,), _ = peek(activated)
    assert kept is x
    (kept,), _ = peek(saved)
    assert kept is saved
    assert take(saved) is None
    with torch.no_grad():
        activated.mul_(2)
    assert peek(activated) is None
