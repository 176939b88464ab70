"""RandomizedLinear in training: checkpointing, devices and second derivatives."""

import itertools
from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES
from lomem.memory import saved_for_backward
from randomized_helpers import (
    INDEX_BYTES,
    LF,
    OURS,
    PICKS,
    SEED_BYTES,
    WAYS,
    Net,
    Recorder,
    compress,
    gradients,
    matmuls,
    ops,
    states,
)
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


class Block(nn.Module):
    """Two layers, with dropouts before or after them that expose their masks."""

    def __init__(self, matmul, dropouts, linear):
        super().__init__()
        kinds = {"plain": nn.Linear, "randomized": partial(lomem.nn.RandomizedLinear, proj_dim=3, matmul=matmul)}
        self.up, self.down = kinds[linear](6, 8), kinds[linear](8, 6, bias=False)
        self.dropouts = dropouts
        self.masks = []

    def dropout(self, x, where):
        if where not in self.dropouts:
            return x
        y = F.dropout(x, 0.5)
        self.masks.append((y != 0).detach().clone())
        return y

    def forward(self, x):
        x = self.up(self.dropout(x, "front"))
        return self.down(torch.tanh(self.dropout(x, "behind")))


def run_block(block, way, x):
    """Output, gradients, masks and final states of the generators, starting from given states."""
    torch.manual_seed(7)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = way(block, leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad, block.up.bias.grad, block.masks, states()


@matmuls
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropouts", [(), ("front",), ("behind",), ("front", "behind")], ids=str)
@pytest.mark.parametrize("shape", ["3-D", "permuted"])
def test_checkpointing(matmul, way, dropouts, shape):
    """All but the weight gradients equals torch's, and those are estimated from matching inputs and seeds."""
    plain, block = Block(matmul, dropouts, "plain"), Block(matmul, dropouts, "randomized")
    block.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 6) if shape == "3-D" else torch.randn(5, 3, 6).transpose(0, 1)
    want = run_block(plain, WAYS[way], x)
    with Recorder() as recorder:
        got = run_block(block, WAYS[way], x)
    assert len(got[3]) == len(want[3])
    for a, b in zip([*got[:3], *got[3], got[4]], [*want[:3], *want[3], want[4]], strict=True):
        assert torch.equal(a, b)
    # The first pass and the recomputation have the same masks.
    assert all(torch.equal(mask, got[3][i % len(dropouts)]) for i, mask in enumerate(got[3]))
    # The gradient comes from rows compressed with the seed saved beside them, from the input of the exact gradient.
    assert len(recorder.estimates) == 2
    for layer, (args, result) in zip((block.down, block.up), recorder.estimates, strict=True):
        _, compressed, indices, seed = args
        made = [f for f in recorder.forwards if torch.equal(f[2][3], seed)]
        assert made
        for rows, proj_dim, _ in made:
            again, picked = compress(rows, seed, proj_dim, matmul)
            assert torch.equal(again, compressed)
            assert indices is None or torch.equal(picked, indices)
        assert torch.equal(layer.weight.grad, result)


def test_accumulated_gradients_are_of_seeds_of_their_own(device):
    x = torch.randn(3, 5, 6, device=device)
    for way in ("none", "reentrant", "non-reentrant", "ours kept"):
        layer = lomem.nn.RandomizedLinear(6, 6, proj_dim=3, device=device)
        seen = []
        for _ in range(3):
            layer.weight.grad = None
            WAYS[way](layer, x.clone().requires_grad_()).square().sum().backward()
            seen.append(layer.weight.grad)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2)), way


@matmuls
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50,), (10, 5), (2, 5, 5)])
def test_what_is_kept_is_proj_dim_rows_and_a_seed(matmul, dtype, shape, device):
    layer = lomem.nn.RandomizedLinear(12, 7, proj_dim_ratio=0.2, matmul=matmul, device=device, dtype=dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    rows = 10 * 12 * size + INDEX_BYTES * 10 * (matmul in PICKS)
    for x in (
        torch.randn(*shape, 12, device=device).to(dtype),
        torch.randn(12, *shape, device=device).to(dtype).movedim(0, -1),
    ):
        with saved_for_backward(layer.parameters()) as saved:
            layer(x)
        assert saved.nbytes == rows + SEED_BYTES
        assert saved.tensors == 2 + (matmul in PICKS)
        assert x.untyped_storage()._cdata not in {s._cdata for s in saved.storages}
        with saved_for_backward() as saved:
            layer(x.clone().requires_grad_())
        # For the input's gradient, the weight.
        assert saved.nbytes == rows + SEED_BYTES + 12 * 7 * size


def test_the_seed_is_a_number_on_the_device(device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=2, device=device)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        layer(torch.randn(5, 6, device=device)).sum().backward()
    assert [t.shape for t in seen] == [(2, 6), ()]
    assert (seen[1].dtype, seen[1].device.type) == (torch.int64, device.type)


def halves(x, grad, seed, k, matmul):
    """Both halves as on a device other than the CPU: their kernels are called directly, whatever the tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    weight = x.new_empty(grad.shape[1], x.shape[1])
    _, compressed, indices, used = OURS.redispatch(keys, x, weight, None, seed, k, matmul=matmul)
    weight_grad = ops.randomized_linear_weight_grad.default
    estimated = weight_grad.redispatch(keys, grad, compressed, indices, used, matmul=matmul)
    return compressed, indices, used, estimated


@matmuls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_devices_compute_the_same_and_read_no_seed(matmul, dtype):
    """Records what a GPU would run, on tensors without values, then runs it here with other seeds, as a replay does."""
    rows, k = 50, 20
    with FakeTensorMode():
        x, grad = torch.empty(rows, 6, dtype=dtype, device="cuda"), torch.empty(rows, 4, dtype=dtype, device="cuda")
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        with pytest.raises(DataDependentOutputException):
            seed.item()
        graph = make_fx(partial(halves, k=k, matmul=matmul))(x, grad, seed)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    graph.recompile()
    # No op synchronizes with the device or copies to it.
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not names & {
        f"aten.{op}.default" for op in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")
    }
    x, grad = (torch.randn(rows, width).to(dtype) for width in (6, 4))
    for number in (0, -1, 2**62 + 12345):
        seed = torch.tensor(number)
        *got, got_estimate = graph(x, grad, seed)
        *want, want_estimate = halves(x, grad, seed, k, matmul)
        assert torch.equal(want[2], seed)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(got_estimate, want_estimate)


def test_hooks_that_move_what_is_kept(device):
    net = Net(device=device)
    x = torch.randn(9, 6, device=device)
    want = gradients(net, net, x)
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, gradients(net, net, x), want))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert all(map(torch.equal, gradients(net, net, x), want))


def test_changes_of_the_input_in_place_do_not_matter(device):
    layer = lomem.nn.RandomizedLinear(6, 4, proj_dim=3, device=device)
    x = torch.randn(9, 6, device=device)
    want = gradients(layer, layer, x)

    def changed(x):
        h = x.clone()
        y = layer(h)
        h.zero_()
        return y

    assert all(map(torch.equal, gradients(layer, changed, x), want))


@matmuls
def test_second_derivatives(matmul, device):
    """Derivatives of the input gradient are exact; those of the weight gradient, which has no input, are refused."""
    x = torch.randn(9, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)

    def penalty(linear):
        (grad,) = torch.autograd.grad(linear(x, weight).tanh().sum(), x, create_graph=True)
        return grad.square().sum()

    def randomized(x, weight):
        return LF.randomized_linear(x, weight, matmul=matmul, proj_dim=3)

    (got,) = torch.autograd.grad(penalty(randomized), x)
    (want,) = torch.autograd.grad(penalty(F.linear), x)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(randomized(x, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for lomem::randomized_linear_weight_grad is not implemented"):
        grad.sum().backward()
    # Nor do the halves have derivatives.
    compressed, _ = compress(x, 0, 3, matmul)
    with pytest.raises(RuntimeError, match="derivative for lomem::randomized_linear_forward is not implemented"):
        compressed.sum().backward()
