"""Cases of models with DTensors: functions of a mesh, which all ranks run."""

import copy

import lomem
import pytest
import torch
import torch.nn.functional as F
from dtensor_helpers import all_placements, distributed, full
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

D, BATCH, LENGTH = 16, 4, 6


class Mlp(nn.Module):
    def __init__(self, norm=nn.RMSNorm, activation=nn.GELU):
        super().__init__()
        self.norm, self.act = norm(D), activation()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Ill(Mlp):
    """With a weight of 0, so that linear layers share the normalized input."""

    def __init__(self):
        super().__init__(nn.LayerNorm)
        with torch.no_grad():
            self.norm.weight[3] = 0


class Gated(Mlp):
    def __init__(self):
        super().__init__(activation=nn.SiLU)
        self.gate = nn.Linear(D, 4 * D)

    def forward(self, x):
        x2 = self.norm(x)
        return x + self.down(self.act(self.gate(x2)) * self.up(x2))


class Functional(Gated):
    def forward(self, x):
        x2 = self.norm(x)
        return x + self.down(F.silu(self.gate(x2)) * self.up(x2))


class Dropped(Mlp):
    """With a dropout that drops nothing in evaluation: a converted one passes offers on."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.down(self.drop(self.act(self.up(self.norm(x)))))


class OfLomem(Mlp):
    def __init__(self):
        super().__init__(lambda d: lomem.nn.MSRMSNorm(d, elementwise_affine=True), lomem.nn.ReGELU2)


BLOCKS = {block.__name__: block for block in (Mlp, Ill, Gated, Functional, Dropped, OfLomem)}


def make(name):
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[name](), BLOCKS[name]())
    return model, torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, LENGTH, D)


def parallelize(model, mesh, sequence, local):
    for block in model:
        first = ColwiseParallel(input_layouts=Shard(1) if sequence else Replicate(), use_local_output=local)
        plan = {"up": first, "down": RowwiseParallel(output_layouts=Shard(1) if sequence else Replicate())}
        if hasattr(block, "gate"):
            plan["gate"] = ColwiseParallel(input_layouts=first.input_layouts[0], use_local_output=local)
        if sequence:
            plan["norm"] = SequenceParallel(use_local_output=local)
        parallelize_module(block, mesh, plan)


def step(model, x, target, share=1.0):
    """Loss and gradients, and the number of collectives."""
    with CommDebugMode() as counts:
        loss = (model(x) - target).square().sum() / (BATCH * LENGTH * D)
        loss.backward()
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    return loss.detach(), gradients, counts.get_total_counts()


def close(gradients, expected):
    for name, one in expected.items():
        # float32, with sums in another order.
        torch.testing.assert_close(gradients[name], one, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def tensor_parallel(mesh, name, order, sequence, local):
    """A converted model, before or after it is parallelized, against one process and against torch's collectives."""
    model, x, target = make(name)
    if name == "Dropped":
        model.eval()
    convertible = name != "OfLomem"
    # A conversion that comes afterwards sees no pairs where results are local, or a dropout of DTensors is between: it
    # would draw codes, of which the gradient is random.
    options = {"activations": "keep"} if order == "after" and (local or name == "Dropped") else {}
    single = copy.deepcopy(model)
    if convertible:
        plain_loss, plain_gradients, _ = step(copy.deepcopy(model), x, target)
        lomem.convert(single, x, **options)
    loss, gradients, _ = step(single, x, target)
    if convertible:
        torch.testing.assert_close(loss, plain_loss)
        close(gradients, plain_gradients)
    share = [t.chunk(mesh.size(), 1)[mesh.get_local_rank()].contiguous() if sequence else t for t in (x, target)]
    plain = make(name)[0].train(model.training)
    parallelize(plain, mesh, sequence, local)
    *_, theirs = step(plain, *share)
    if convertible and order == "first":
        lomem.convert(model, x, **options)
    parallelize(model, mesh, sequence, local)
    if convertible and order == "after":
        try:
            lomem.convert(model, share[0], **options)
        except lomem.NothingToConvertError:
            # What is behind a norm takes what has been gathered, or wrapped.
            assert options
            assert sequence or name == "Ill"
    own_loss, own_gradients, counts = step(model, *share)
    with lomem.memory.saved_for_backward(model.parameters()) as saved:
        model(share[0])
    with lomem.memory.saved_for_backward(plain.parameters()) as saved_by_plain:
        plain(share[0])
    total = own_loss.clone()
    if sequence:
        torch.distributed.all_reduce(total)
    torch.testing.assert_close(total, loss)
    close(own_gradients, gradients)
    assert counts <= theirs, f"{counts} collectives, torch {theirs}"
    assert saved.nbytes <= saved_by_plain.nbytes
    if order == "first" and convertible and not sequence:
        # Pairs are served as without DTensors: neither the activation's result nor a product is saved.
        assert saved.nbytes < 0.7 * saved_by_plain.nbytes, f"{saved.nbytes}, torch {saved_by_plain.nbytes}"


def modules(mesh):
    """Modules of lomem.nn, distributed."""
    made = {
        "MSLayerNorm": lomem.nn.MSLayerNorm(D, elementwise_affine=True),
        "MSRMSNorm": lomem.nn.MSRMSNorm(D, elementwise_affine=True),
        "MSLayerNorm plain": lomem.nn.MSLayerNorm(D),
        "Dropout": lomem.nn.Dropout(0.0),
        "SwiGLU": lomem.nn.SwiGLU(),
        "ReGELU2": lomem.nn.ReGELU2(),
        "LoRALinear": lomem.nn.LoRALinear(nn.Linear(D, 3), 2),
        "Linear": lomem.nn.RandomizedLinear(D, 3, proj_dim=BATCH * LENGTH),
    }
    for name in lomem.nn.__all__:
        cls = getattr(lomem.nn, name)
        if issubclass(cls, lomem.nn.FewBitActivation) and cls is not lomem.nn.FewBitActivation:
            made[name] = cls()
    for name, module in made.items():
        for placement in all_placements(3):
            x = torch.randn(BATCH, LENGTH, D).requires_grad_()
            y = module(x)
            y.square().sum().backward()
            expected = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
            several = distribute_module(copy.deepcopy(module), mesh)
            several.zero_grad()
            given = distributed(x, mesh, placement)
            result = several(given)
            assert isinstance(result, DTensor), name
            torch.testing.assert_close(full(result), y, rtol=1e-5, atol=1e-5)
            result.square().sum().backward()
            torch.testing.assert_close(full(given.grad), x.grad, rtol=1e-4, atol=1e-4)
            for of, p in several.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(full(p.grad), expected[of], rtol=1e-4, atol=1e-4)
            module.zero_grad()


def sharded_in_two_dimensions(mesh, sequence):
    """fully_shard with tensor parallelism, on 2 x 2 processes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, x, target = make("Gated")
    lomem.convert(model, x)
    loss, gradients, _ = step(copy.deepcopy(model), x, target)
    parallelize(model, mesh["tensor"], sequence, True)
    for block in model:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    for dim, of in ((0, "data"), (1, "tensor")):
        if of == "data" or sequence:
            x, target = (t.chunk(2, dim)[mesh[of].get_local_rank()].contiguous() for t in (x, target))
    # (Gradients are averaged over the batches.)
    own, own_gradients, _ = step(model, x, target)
    torch.distributed.all_reduce(own)
    torch.testing.assert_close(own / (1 if sequence else 2), loss)
    close({name: 2 * g for name, g in own_gradients.items()}, gradients)


def llama(mesh, sequence):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 50, (2, 8))
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(8)[None]}
    lomem.convert(model, batch)
    single = copy.deepcopy(model)
    for layer in model.model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        layout = Shard(1) if sequence else Replicate()
        plan |= {name: RowwiseParallel(output_layouts=layout) for name in ("self_attn.o_proj", "mlp.down_proj")}
        if sequence:
            plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
            plan["mlp"] = PrepareModuleInput(input_layouts=(layout,), desired_input_layouts=(Replicate(),))
            plan["self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": layout},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            )
        parallelize_module(layer, mesh, plan)
    if sequence:
        outer = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, outer)
    losses = []
    for one in (single, model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, foreach=False)
        found = []
        for number in range(2):
            optimizer.zero_grad()
            loss = one(**batch).loss
            loss.backward()
            if number == 0:
                gradients = {name: full(p.grad) for name, p in one.named_parameters()}
            optimizer.step()
            found.append(loss.item())
        losses.append((found, gradients))
    (expected, of_single), (found, of_several) = losses
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    close(of_several, of_single)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(D), nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def context(mesh):
    """torch's context parallelism has no attention for CPUs: plain and converted models raise its error."""
    for converted in (False, True):
        model, x = Attention(), torch.randn(2, 8, D)
        if converted:
            lomem.convert(model, x)
        with (
            context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]),
            pytest.raises(
                NotImplementedError, match=r"flash_attention_for_cpu\.default does not have a sharding strategy"
            ),
        ):
            model(x)
