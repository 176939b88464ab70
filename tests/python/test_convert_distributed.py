"""Converted models under checkpointing, compilers, DistributedDataParallel and fully_shard."""

import copy

import lomem
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_models import Block, D, PostNorm, actions, batch, classes, distance, make, results
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_converted_as_without(reentrant):
    class Checkpointed(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model, plain, x = make(Checkpointed), make(), batch()
    report, expected = lomem.convert(model, x), lomem.convert(plain, x)
    assert actions(report) == actions(expected)
    y, grads = results(model, x)
    y2, grads2 = results(plain, x)
    assert torch.equal(y, y2)
    assert distance(grads, grads2) < 1e-6  # sums in a different order


def test_a_converted_model_compiles():
    torch.compiler.reset()
    for ill in (False, True):
        model, x = make(ill=ill), batch()
        lomem.convert(model, x)
        y, grads = results(model, x)
        y2, grads2 = results(torch.compile(model, backend="aot_eager", fullgraph=True), x)
        torch.testing.assert_close(y, y2)
        grads2 = {name.removeprefix("_orig_mod."): g for name, g in grads2.items()}
        assert distance(grads2, grads) < 1e-6
    torch.compiler.reset()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_a_converted_model_is_distributed(process_group, ill):
    model, x = make(PostNorm, ill=ill), batch()
    lomem.convert(model, x)
    y, grads = results(model, x)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    y2, grads2 = results(wrapped, x)
    assert torch.equal(y, y2)
    assert distance({name.removeprefix("module."): g for name, g in grads2.items()}, grads) == 0


def test_a_distributed_model_is_converted(process_group):
    model, x = make(), batch()
    wrapped = nn.parallel.DistributedDataParallel(model)
    y, grads = results(wrapped, x)
    report = lomem.convert(wrapped, x, activations="keep")
    assert actions(report)["module.1.norm"] == "inverted"
    y2, grads2 = results(wrapped, x)
    torch.testing.assert_close(y, y2, rtol=0, atol=1e-5)
    assert distance(grads2, grads) < 1e-6


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_a_converted_model_is_sharded(process_group, ill):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = make(ill=ill), batch()
    lomem.convert(model, x)
    y, grads = results(model, x)
    mesh = init_device_mesh("cpu", (1,))
    for block in model[1:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    y2, grads2 = results(model, x)
    assert torch.equal(y, y2)
    grads2 = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads2.items()}
    assert distance(grads2, grads) < 1e-6


def test_a_sharded_model_is_not_restored(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    model, x = nn.Sequential(nn.Linear(D, D), Mlp()), batch()
    lomem.convert(model, x)
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    before = classes(model)
    with pytest.raises(ValueError, match="has become a FSDPMlp"):
        lomem.restore(model)
    assert classes(model) == before
