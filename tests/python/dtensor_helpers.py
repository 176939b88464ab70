"""Runs cases on several processes, and compares DTensors with the tensors of a single one."""

import datetime
import itertools
import pathlib
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

R, P = Replicate(), Partial()


def _work(rank, world, folder, cases):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    # (Every failure of one rank alone leaves others waiting: not for long.)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    mesh = init_device_mesh("cpu", (world,))
    failures = pathlib.Path(folder, f"failures{rank}")
    failures.write_text("")
    for case, arguments in cases:
        torch.manual_seed(0)
        try:
            case(mesh, *arguments)
        except (Exception, pytest.fail.Exception):
            with failures.open("a") as file:
                file.write(f"{case.__name__}{arguments}, rank {rank}\n{traceback.format_exc()}\n")
    dist.destroy_process_group()


def run(folder, cases, world=2):
    """Runs functions of a mesh and other arguments, each a pair of both, on all processes."""
    cases = list(cases)
    assert cases
    mp.spawn(_work, (world, str(folder), cases), nprocs=world)
    failures = [pathlib.Path(folder, f"failures{rank}").read_text() for rank in range(world)]
    assert not any(failures), "\n".join(failures)


def all_placements(dims):
    return [R, P, *map(Shard, range(dims))]


def distributed(x, mesh, *placements):
    """A DTensor with these placements, also partial ones: every rank then has an equal term, without rounding."""
    terms = 1
    for dim, placement in enumerate(placements):
        terms *= mesh.size(dim) if placement.is_partial() else 1
    whole = distribute_tensor(x.detach() / terms, mesh, [R if p.is_partial() else p for p in placements])
    local = whole.to_local()
    made = DTensor.from_local(local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
    return made.detach().requires_grad_(x.requires_grad)


class Outcome:
    """What a function computes, forward and backward, and with how many collectives."""

    def __init__(self, function, inputs, grad):
        self.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with CommDebugMode() as forward:
            self.output = function(*self.inputs)
        with CommDebugMode() as backward:
            self.output.backward(grad)
        self.counts = forward.get_total_counts(), backward.get_total_counts()

    @property
    def gradients(self):
        return [x.grad for x in self.inputs if x.requires_grad]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(mesh, function, inputs, placements, grad_placement=R, *, plain=None, equal=False, atol=1e-5):
    """Compares a function of DTensors with the same function of tensors, in values, gradients and collectives.

    Args:
        mesh: One dimension.
        function: The function.
        inputs: Its tensors.
        placements: The placements of each.
        grad_placement: That of the incoming gradient.
        plain: What torch has in its place, which may not use fewer collectives. None for no comparison.
        equal: Whether gradients are the same bits.
        atol: Otherwise the largest difference: float32 sums in another order.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    # (torch's kernels take other instructions at the ends of a shard, which may round otherwise.)
    close = {"rtol": 1e-5, "atol": atol}
    output = function(*[x.detach() for x in inputs])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    single = Outcome(function, inputs, grad)
    given = [distributed(x, mesh, p) for x, p in zip(inputs, placements, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(full(function(*given)), output, **close)
    several = Outcome(function, given, distributed(grad, mesh, grad_placement))
    assert isinstance(several.output, DTensor)
    assert several.output.shape == output.shape
    assert several.output.stride() == output.stride()
    torch.testing.assert_close(full(several.output), output, **close)
    for one, other in zip(single.gradients, several.gradients, strict=True):
        assert one.shape == other.shape
        if equal:
            assert torch.equal(full(other), one)
        else:
            torch.testing.assert_close(full(other), one, **close)
    if plain is not None:
        theirs = Outcome(plain, given, distributed(grad, mesh, grad_placement))
        found = f"{several.counts} collectives, torch {theirs.counts}: {placements}, {grad_placement}"
        assert several.counts[0] <= theirs.counts[0], found
        assert sum(several.counts) <= sum(theirs.counts), found
    return several


def pairs_of(*choices):
    return list(itertools.product(*choices))
