"""Converted models and lomem.integrations in DistributedDataParallel, on two processes: as on a single one."""

import copy
import os

import dtensor_helpers
import lomem
import pytest
import test_integrations
import torch
import torch.distributed as dist
from lomem.conversion.exchange import is_converted
from lomem.integrations import TrainerCallback
from small_models import batch, distance, make
from test_integrations import llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

pytestmark = pytest.mark.usefixtures("one_thread")
WORLD = 2


def gradients(model, x):
    """Of a mean over rows, so that the mean of ranks' gradients is the gradient of all rows."""
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def of_ranks(mesh, wrapped_first, ill):
    plain, whole = make(ill=ill), batch()
    expected, grads = gradients(copy.deepcopy(plain), whole)
    rank = dist.get_rank()
    mine = whole.chunk(WORLD)[rank]
    model = DistributedDataParallel(plain) if wrapped_first else plain
    report = lomem.convert(model, mine, bits=16)
    assert "norm" in {d.kind for d in report.converted}
    model = model if wrapped_first else DistributedDataParallel(model)
    for _ in range(2):
        y, found = gradients(model, mine)
        torch.testing.assert_close(y, expected.chunk(WORLD)[rank])
        assert distance(found, grads) < 1e-6  # roundings of norms and sums, in float32
    with lomem.memory.saved_for_backward([*model.parameters(), mine]) as saved:
        model(mine)
    assert saved.nbytes == report.saved_after


class Known(Dataset):
    """Rows that do not depend on who asks for them, or when."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, test_integrations.WORDS, (test_integrations.LENGTH,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def trained(make, callbacks, folder, rows, **options):
    options = {"data": Known, "per_device_train_batch_size": rows, **options}
    return test_integrations.trained(make, callbacks, folder, **options)


def of_trainers(mesh, folder):
    # What torchrun sets, and accelerate looks for. (The processes have found each other already.)
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "-", "MASTER_PORT": "0"}
    rows = 8 // WORLD
    plain = trained(llama, [], folder, rows)
    callback = TrainerCallback(bits=16, verbose=False)
    trainer = trained(llama, [callback], folder, rows)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert any(map(is_converted, trainer.model.modules()))
    assert callback.report.saved_after < callback.report.saved_before
    test_integrations.assert_the_same_training(trainer, plain, exact=True)
    # Both ranks have the same weights.
    weights = nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    other = weights.clone()
    dist.broadcast(other, 0)
    assert torch.equal(weights, other)
    torch.save({"losses": trainer.losses, "batches": trainer.batches, "weights": weights}, f"{folder}/{rank}.pt")


def test_two_processes(tmp_path):
    """As one on a single process, with batches as large as theirs together."""
    cases = [(of_ranks, (wrapped_first, ill)) for wrapped_first in (False, True) for ill in (False, True)]
    dtensor_helpers.run(tmp_path, [*cases, (of_trainers, (str(tmp_path),))], WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    trainer = trained(llama, [TrainerCallback(bits=16, verbose=False)], tmp_path, 8)
    assert all(
        torch.equal(x, torch.cat(xs)) for x, *xs in zip(trainer.batches, *(r["batches"] for r in ranks), strict=True)
    )
    losses = [sum(values) / WORLD for values in zip(*(r["losses"] for r in ranks), strict=True)]
    assert losses == pytest.approx(trainer.losses, rel=3e-5)  # as in assert_the_same_training
    weights = nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    assert distance({"": ranks[0]["weights"]}, {"": weights}) < 1e-4
