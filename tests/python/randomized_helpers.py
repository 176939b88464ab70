"""Helpers of the tests of randomized linear layers."""

from functools import partial

import lomem
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LF = lomem.functional


ops = torch.ops.lomem


MATMULS = ["gaussian", "rademacher", "dct", "dft", "crs", "wta-crs"]


PICKS = ["crs", "wta-crs"]


SEED_BYTES, INDEX_BYTES = 8, 8


matmuls = pytest.mark.parametrize("matmul", MATMULS)


def compress(x, seed, proj_dim, matmul):
    """The compressed x: rows, and their indices if they are picked."""
    weight = x.new_empty(0, x.shape[-1])
    seed = torch.as_tensor(seed, device=x.device)
    return ops.randomized_linear_forward(x, weight, None, seed, proj_dim, matmul=matmul)[1:3]


def estimate(x, y, seed, proj_dim, matmul):
    """The estimate of y^T x for a seed, by the ops."""
    seed = torch.tensor(seed, device=x.device)
    compressed, indices = compress(x, seed, proj_dim, matmul)
    return ops.randomized_linear_weight_grad(y, compressed, indices, seed, matmul=matmul)


def projection(rows, proj_dim, seed, matmul, dtype=torch.float64, device="cpu"):
    """S itself, for methods that mix rows: S times the identity."""
    eye = torch.eye(rows, dtype=dtype, device=device)
    return compress(eye, seed, proj_dim, matmul)[0]


def signs(seed, rows, k, device="cpu"):
    """The matrix of signs: one bit per sign from the random words."""
    return projection(rows, k, seed, "rademacher", device=device).sign().flatten().cpu()


def states():
    """The states of all generators that other code draws from."""
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return torch.cat([torch.get_rng_state(), *devices])


def gradient(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]


class Recorder(TorchDispatchMode):
    """Records what randomized layers compress, and what they estimate gradients from."""

    def __init__(self):
        super().__init__()
        self.forwards, self.estimates = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is ops.randomized_linear_forward.default:
            self.forwards.append((args[0].detach().clone(), args[4], result))
        elif func is ops.randomized_linear_weight_grad.default:
            self.estimates.append((args, result))
        return result


class Net(nn.Module):
    def __init__(self, matmul="gaussian", device=None):
        super().__init__()
        self.up = lomem.nn.RandomizedLinear(6, 8, proj_dim_ratio=0.4, matmul=matmul, device=device)
        self.down = lomem.nn.RandomizedLinear(8, 6, proj_dim_min=2, proj_dim_ratio=0.2, matmul=matmul, device=device)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def gradients(net, f, x):
    lomem.random.manual_seed(5)
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(leaf).square().sum(), [leaf, *net.parameters()])


def selective(policy):
    def way(block, x):
        contexts = partial(create_selective_checkpoint_contexts, lambda _, op, *args, **kwargs: policy(op))
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    return way


KEEP, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


OURS = ops.randomized_linear_forward.default


MAKE_INPUTS = [torch.ops.aten.mul.Tensor, torch.ops.aten.tanh.default]


def checkpointed(use_reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)


def nested(outer, inner):
    def way(block, x):
        return checkpoint(lambda x: torch.sin(checkpointed(inner)(block, x)), x, use_reentrant=outer)

    return way


def in_hooks(way):
    def hooked(block, x):
        with torch.autograd.graph.save_on_cpu():
            return way(block, x)

    return hooked


WAYS = {
    "none": lambda block, x: block(x),
    "reentrant": checkpointed(True),
    "non-reentrant": checkpointed(False),
    "reentrant in reentrant": nested(True, True),
    "non-reentrant in non-reentrant": nested(False, False),
    "non-reentrant in reentrant": nested(True, False),
    "non-reentrant in hooks": in_hooks(checkpointed(False)),
    "ours kept": selective(lambda op: KEEP if op is OURS else AGAIN),
    "inputs kept": selective(lambda op: KEEP if op in MAKE_INPUTS else AGAIN),
    "ours and inputs kept": selective(lambda op: KEEP if op in (OURS, *MAKE_INPUTS) else AGAIN),
    "none kept": selective(lambda op: AGAIN),
}
