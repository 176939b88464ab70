"""Library models in torch's wrappers for several processes: training is that of the plain model on a single one."""

import copy

import dtensor_helpers
import lomem
import pytest
import torch
import torch.distributed as dist
from small_models import Block, batch, distance, make
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from zoo import build

WORLD = 2
STEPS = 3
#: Of each model, where its blocks are.
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer", "vit": "vit.layers"}


def blocks(name, model):
    return model.get_submodule(BLOCKS[name])


def mine(batch):
    """This process's row."""
    rank = dist.get_rank()
    return {key: value[rank : rank + 1] for key, value in batch.items()}


def full(grads):
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g.clone()
        for name, g in grads.items()
    }


def gradients(model):
    return full({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def trained(model, rows, accumulated=None, grads=gradients):
    """Losses of some steps of SGD, and the gradients of the first. `accumulated` calls a function of a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, first = [], None
    for _ in range(STEPS):
        optimizer.zero_grad()

        def step(rows):
            loss = model(**rows).loss
            loss.backward()
            return loss.detach()

        losses.append(accumulated(step) if accumulated else step(rows))
        first = first or grads(model)
        optimizer.step()
    return torch.stack(losses), first


def converted(name):
    """A converted model, with its batch, and how a plain one is trained on a single process."""
    (plain, whole), (model, _) = build(name), build(name)
    expected = trained(copy.deepcopy(plain), whole)
    report = lomem.convert(model, whole, bits=16)
    assert report.saved_after < report.saved_before
    return model, mine(whole), plain, expected


def assert_trained(found, expected, limit=1e-5):
    """With what other orders of sums change in float32, or `limit`, relative."""
    losses, grads = found
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / WORLD, expected[0], rtol=limit, atol=0)
    if grads is not None:
        assert distance(grads, expected[1]) < limit


def nbytes(model, batch):
    # Sharded parameters are collected in tensors of their own, in plain models too.
    with lomem.memory.saved_for_backward([*model.parameters(), *batch.values()]) as saved:
        model(**batch)
    return saved.nbytes


# DistributedDataParallel ---------------------------------------------------------------------------------------------


def of_data_parallel(mesh, name, options):
    model, rows, plain, expected = converted(name)
    model = DistributedDataParallel(model, **options)
    assert_trained(trained(model, rows), expected)
    assert nbytes(model, rows) < nbytes(DistributedDataParallel(plain, **options), rows)


def of_checkpointed_data_parallel(mesh, name):
    model, rows, _, expected = converted(name)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_trained(trained(DistributedDataParallel(model, static_graph=True), rows), expected)


def of_accumulation(mesh, name):
    """Two batches per step, of which the first is not synchronized."""
    model, rows, _, _ = converted(name)
    plain, whole = build(name)
    other = {key: value.roll(1, 0) for key, value in whole.items()}
    model = DistributedDataParallel(model)

    def local(step):
        with model.no_sync():
            loss = step(rows)
        return loss + step(mine(other))

    expected = trained(plain, whole, lambda step: step(whole) + step(other))
    assert_trained(trained(model, rows, local), expected)


class Branches(torch.nn.Module):
    """Each process leaves out another block."""

    def __init__(self):
        super().__init__()
        self.blocks = make(Block)

    def forward(self, x, left_out):
        for number, block in enumerate(self.blocks):
            x = x if number == 1 + left_out else block(x)
        return x


def of_unused_parameters(mesh):
    plain, x = Branches(), batch()
    model = copy.deepcopy(plain)
    lomem.convert(model, (x, -1), bits=16)
    parts = x.chunk(WORLD)
    sum(plain(part, rank).square().mean() / WORLD for rank, part in enumerate(parts)).backward()
    model = DistributedDataParallel(model, find_unused_parameters=True)
    model(parts[dist.get_rank()], dist.get_rank()).square().mean().backward()
    assert distance(gradients(model), gradients(plain)) < 1e-6  # the order of sums


# FSDP ----------------------------------------------------------------------------------------------------------------


def fsdp1(name, model, *, original=True, **options):
    policy = ModuleWrapPolicy({type(blocks(name, model)[0])})
    options = {"auto_wrap_policy": policy, "use_orig_params": original, "device_id": torch.device("cpu"), **options}
    return FullyShardedDataParallel(model, **options)


def gradients_of_fsdp1(model):
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return {
            name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }


def of_fsdp1(mesh, name, original):
    model, rows, plain, expected = converted(name)
    model, plain = (fsdp1(name, m, original=original) for m in (model, plain))
    # (Without the original parameters there are no gradients by name; the losses of later steps depend on them.)
    grads = gradients_of_fsdp1 if original else lambda model: None
    assert_trained(trained(model, rows, grads=grads), expected)
    assert nbytes(model, rows) < nbytes(plain, rows)


def of_fsdp1_in_bfloat16(mesh, name):
    mixed = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _compare_in_bfloat16(name, lambda model: fsdp1(name, model, mixed_precision=mixed), gradients_of_fsdp1)


def _compare_in_bfloat16(name, wrapped, grads=gradients):
    """The converted model is as near to float32 as the plain one in the same wrapper."""
    model, rows, plain, expected = converted(name)
    found, theirs = (trained(wrapped(m), rows, grads=grads) for m in (model, plain))
    for losses in (found[0], theirs[0]):
        dist.all_reduce(losses)
    torch.testing.assert_close(found[0], theirs[0], rtol=2**-6, atol=0)  # each loss has the last place of bfloat16
    # Norms round elsewhere, as often.
    assert distance(found[1], expected[1]) < 1.5 * distance(theirs[1], expected[1])


def sharded(name, model, **options):
    for block in blocks(name, model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def of_fsdp2(mesh, name):
    model, rows, plain, expected = converted(name)
    model, plain = sharded(name, model), sharded(name, plain)
    assert_trained(trained(model, rows), expected)
    assert nbytes(model, rows) < nbytes(plain, rows)


def of_fsdp2_in_bfloat16(mesh, name):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _compare_in_bfloat16(name, lambda model: sharded(name, model, mp_policy=policy))


def of_checkpointed_fsdp2(mesh, name):
    model, rows, _, expected = converted(name)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_trained(trained(sharded(name, model), rows), expected)


def of_compiled_fsdp2(mesh, name):
    model, rows, _, expected = converted(name)
    for block in blocks(name, model):
        block.compile(backend="aot_eager")
    assert_trained(trained(sharded(name, model), rows), expected)


# Pipelines -----------------------------------------------------------------------------------------------------------


def of_pipeline(mesh, ill):
    """Each process has half of the layers, and the batch goes through them in two parts."""
    plain, x = make(Block, ill=ill, depth=4), batch()
    model = copy.deepcopy(plain)
    lomem.convert(model, x[:2], bits=16)
    rank, half = dist.get_rank(), len(model) // WORLD
    stage = model[:half] if rank == 0 else model[half:]
    y = plain(x)
    y.square().mean().backward()
    schedule = ScheduleGPipe(
        PipelineStage(stage, rank, WORLD, torch.device("cpu")),
        n_microbatches=2,
        loss_fn=lambda found, target: (found - target).square().mean(),
    )
    if rank == 0:
        schedule.step(x)
    else:
        torch.testing.assert_close(schedule.step(target=torch.zeros_like(y)), y.detach())
    found, grads = gradients(stage), gradients(plain)
    assert found
    assert distance(found, {name: grads[name] for name in found}) < 1e-6  # the order of sums


CASES = {
    "data parallel": [
        *((of_data_parallel, (name, options)) for name in BLOCKS for options in ({}, {"static_graph": True})),
        *((of_data_parallel, (name, {"find_unused_parameters": True})) for name in ("llama", "bert")),
        *((of_accumulation, (name,)) for name in BLOCKS),
        (of_checkpointed_data_parallel, ("llama",)),
        (of_unused_parameters, ()),
    ],
    "fsdp1": [
        *((of_fsdp1, (name, original)) for name in BLOCKS for original in (True, False)),
        *((of_fsdp1_in_bfloat16, (name,)) for name in BLOCKS),
    ],
    "fsdp2": [
        *((case, (name,)) for case in (of_fsdp2, of_fsdp2_in_bfloat16) for name in BLOCKS),
        *((case, ("llama",)) for case in (of_checkpointed_fsdp2, of_compiled_fsdp2)),
    ],
    "pipelines": [(of_pipeline, (ill,)) for ill in (False, True)],
}


@pytest.mark.parametrize("what", CASES)
def test_two_processes(what, tmp_path):
    dtensor_helpers.run(tmp_path, CASES[what], WORLD)
