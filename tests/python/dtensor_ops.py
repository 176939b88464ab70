"""Cases of ops with DTensors: functions of a mesh, which all ranks run."""

import math
from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import ALL
from dtensor_helpers import P, R, all_placements, compare, distributed, full, pairs_of
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

LF = lomem.functional
ops = torch.ops.lomem

EVEN, UNEVEN = (4, 6, 8), (3, 5, 7)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_it_is(function):
    return function


def transposed(function):
    """An input and a gradient that are not in row-major order."""
    return lambda x: function(x.transpose(0, 2)).transpose(0, 2)


def activation(mesh, name):
    # Neither codes nor levels are rounded anywhere, so gradients are the same bits. (Some of torch's activations have
    # no rule, so that the collectives are compared to those of GELU.)
    compare(mesh, ALL[name][0], [randn(*UNEVEN)], [Shard(1)], Shard(2), equal=True, plain=F.gelu)


def layouts_of_activation(mesh, name, shape, wrap):
    function, plain = map(wrap, ALL[name])
    for placement, grad in pairs_of(all_placements(3), all_placements(3)):
        compare(mesh, function, [randn(*shape)], [placement], grad, equal=True, plain=plain)


def steps_of_the_user(mesh):
    steps = LF.step_function("gelu", 2)
    for placement in all_placements(2):
        compare(
            mesh,
            lambda x: LF.step_activation(x, F.gelu, steps.boundaries, steps.levels),
            [randn(3, 5)],
            [placement],
            equal=True,
        )
        compare(mesh, partial(LF.gelu, steps=steps), [randn(3, 5)], [placement], equal=True)


def inplace_activation(mesh):
    x = randn(3, 5)
    given = distributed(x, mesh, Shard(0)).clone()
    assert LF.silu(given, inplace=True) is given
    torch.testing.assert_close(full(given), F.silu(x))


def second_derivative(mesh):
    # grad_output * levels is linear in grad_output, and the derivative with respect to that is exact.
    x, grad = randn(3, 5).requires_grad_(), randn(3, 5, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(LF.gelu(x), x, grad, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), grad)
    given = [distributed(t, mesh, Shard(0)) for t in (x, grad)]
    (first,) = torch.autograd.grad(LF.gelu(given[0]), given[0], given[1], create_graph=True)
    (actual,) = torch.autograd.grad(first.square().sum(), given[1])
    torch.testing.assert_close(full(actual), expected)


# Random numbers ------------------------------------------------------------------------------------------------------


def all_equal(mesh, tensor):
    """Whether all ranks have the same tensor."""
    shards = DTensor.from_local(tensor.detach().flatten(), mesh, [Shard(0)], run_check=False)
    parts = shards.full_tensor().reshape(mesh.size(), -1)
    return all(torch.equal(part, parts[0]) for part in parts)


def drawn_codes(mesh):
    n = 4096

    def draws(x):
        x = x.detach().requires_grad_()
        LF.gelu(x, bits=2, rounding="stochastic").sum().backward()
        return x.grad

    same = torch.full((mesh.size(), n), 0.3)
    assert all_equal(mesh, draws(distributed(same, mesh, R)).to_local())
    x = distributed(same, mesh, Shard(0))
    shards = draws(x)
    assert shards.placements == (Shard(0),)
    assert not all_equal(mesh, shards.to_local())
    assert not all_equal(mesh, draws(x).to_local() - shards.to_local())  # nor is the next seed's
    # The mean is the derivative: five standard deviations.
    exact = torch.func.grad(lambda x: F.gelu(x))(torch.tensor(0.3))
    levels = LF.drawn_levels("gelu", 2)
    assert abs(full(shards).mean() - exact) < 5 * levels.step / 2 / math.sqrt(mesh.size() * n)
    # A given seed: a replica draws what a single process draws, and a shard the same again.
    seed = torch.tensor(7)
    compare(mesh, partial(LF.gelu, bits=3, rounding="stochastic", seed=seed), [randn(3, 5)], [R], equal=True)
    compare(mesh, partial(LF.gelu, bits=3, rounding="stochastic", seed=seed), [randn(3, 5)], [P], Shard(0), equal=True)
    first, second = (draws_with(x, seed) for _ in range(2))
    assert torch.equal(first.to_local(), second.to_local())


def draws_with(x, seed):
    x = x.detach().requires_grad_()
    LF.tanh(x, bits=1, rounding="stochastic", seed=seed).sum().backward()
    return x.grad


def dropout(mesh, saves):
    p, n = 0.3, 4096
    x = torch.ones(mesh.size() * 2 - 1, n)  # an uneven number of rows
    state = torch.get_rng_state()
    single = LF.dropout(x, p, saves=saves)
    torch.set_rng_state(state)
    replica = LF.dropout(distributed(x, mesh, R), p, saves=saves)
    assert torch.equal(replica.to_local(), single)
    for placement in (Shard(0), Shard(1), P):
        given = distributed(x.requires_grad_(), mesh, placement)
        y = LF.dropout(given, p, saves=saves)
        kept = full(y)
        # The same mask again, whatever the placement of the gradient.
        y.backward(distributed(torch.ones_like(x), mesh, R if placement != P else Shard(1)))
        assert torch.equal(full(given.grad), kept)
        scaled = torch.tensor(1 / (1 - p))
        assert set(kept.unique().tolist()) == {0.0, scaled.item()}
        share = (kept == 0).float().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
        halves = kept.chunk(2, placement.dim if placement != P else 0)
        size = min(h.shape[0] for h in halves)
        assert not torch.equal(halves[0][:size], halves[1][:size])
        # All ranks have drawn as much.
        assert all_equal(mesh, torch.rand(4))
    for given in (distributed(x, mesh, Shard(0)), distributed(x, mesh, R)):
        with torch.no_grad():
            assert (full(LF.dropout(given, p, saves=saves)) == 0).any()
        assert LF.dropout(given, p, training=False, saves=saves) is given


def groups(mesh):
    for shape, wrap in pairs_of([EVEN, UNEVEN], [lambda x: x, lambda x: x.transpose(0, 2)]):
        x = wrap(randn(*shape))
        for placement, bits in pairs_of(all_placements(3), [8, 4]):
            given = distributed(x, mesh, placement)
            for rounding, seed in (("nearest", None), ("stochastic", torch.tensor(3))):
                codes, scales = LF.quantize_groups(given, bits, rounding=rounding, seed=seed)
                back = LF.dequantize_groups(codes, scales, x.shape, x.dtype, bits, stride=given.stride(), seed=seed)
                assert back.stride() == given.stride()
                assert back.placements == (R if placement == P else placement,)
                # Off by less than one scale, which is at most this (7-bit significands, rounded up).
                largest = x.abs().max() / (127 if bits == 8 else 7) * (1 + 2**-6)
                assert (full(back) - x).abs().max() <= largest
    # Seeds of shards differ.
    x = randn(1, 4096).expand(mesh.size(), -1).contiguous()
    codes, _ = LF.quantize_groups(distributed(x, mesh, Shard(0)), 4, seed=torch.tensor(3))
    assert not all_equal(mesh, codes.to_local().int())


# Codes ---------------------------------------------------------------------------------------------------------------

MOVED = "lomem: codes of a tensor with placement .* got a redistribution, expected none: each rank has"


def codes_stay(mesh):
    x = distributed(randn(*UNEVEN), mesh, Shard(1))
    found = {
        "step_activation_forward": ops.step_activation_forward(x, "mish", (), 3)[1],
        "hard_activation_forward": ops.hard_activation_forward(x, "relu", ())[1],
        "fused_activation_forward": ops.fused_activation_forward(x, "gelu", LF.step_function("gelu", 2).boundaries, 2)[
            1
        ],
        "drawn_activation_forward": ops.drawn_activation_forward(x, "gelu", (), 2)[1],
        "drawn_codes": ops.drawn_codes(x, "gelu", (), 2, torch.tensor(1)),
        "step_codes": ops.step_codes(x, (0.0,), 1),
        "band_codes": ops.band_codes(x, 0.0, 1.0),
        "dropout_forward": ops.dropout_forward(x, 0.5)[1],
        "quantize_groups": ops.quantize_groups(x)[0],
        "scales": ops.quantize_groups(x)[1],
        "pack_bits": ops.pack_bits((x > 0).byte(), 1),
    }
    for codes in found.values():
        local = codes.to_local().clone()
        for how in (
            lambda codes: codes.redistribute(mesh, [R]),
            lambda codes: codes.redistribute(mesh, [Shard(0)]),
            lambda codes: codes.full_tensor(),
        ):
            with pytest.raises(RuntimeError, match=MOVED):
                how(codes)
        assert torch.equal(codes.detach().to_local(), local)
    with pytest.raises(RuntimeError, match=MOVED):
        ops.unpack_bits(found["pack_bits"], 1, x.numel())
    whole = DTensor.from_local((randn(3, 5) > 0).byte(), mesh, [R], run_check=False)
    assert torch.equal(full(LF.unpack_bits(LF.pack_bits(whole, 1), 1, 15)), full(whole).flatten())
    # Codes of a shard and a gradient that is elsewhere: the gradient comes.
    output, codes = ops.step_activation_forward(x, "mish", (), 3)
    levels = LF.step_function("mish", 3).levels
    grad = randn(*UNEVEN, seed=1)
    expected, of_whole = ops.step_activation_forward(full(x), "mish", (), 3)
    torch.testing.assert_close(full(output), expected)
    for placement in all_placements(3):
        result = ops.step_activation_backward(distributed(grad, mesh, placement), codes, levels, 3)
        assert result.placements == (Shard(1),)
        assert torch.equal(full(result), ops.step_activation_backward(grad, of_whole, levels, 3))


# Norms, gated units --------------------------------------------------------------------------------------------------


def norm(mesh, kind, shape, dims, affine):
    x = randn(*shape)
    size = shape[-dims:]
    weight, bias = 0.5 + randn(*size, seed=1).abs(), randn(*size, seed=2)
    parameters = [] if not affine else [weight] if kind == "rms" else [weight, bias]
    if kind == "rms":
        function, plain = partial(LF.ms_rms_norm, eps=1e-5), partial(F.rms_norm, eps=1e-5)
    else:
        function, plain = LF.ms_layer_norm, F.layer_norm
    for placement, grad in pairs_of(all_placements(3), [R, P, Shard(0)]):
        split = isinstance(placement, Shard) and placement.dim >= 3 - dims
        # torch's RMS norm, made of other ops, has no rule for a split row. A partial gradient stays partial in it, and
        # so does that of the weight: both are summed later.
        theirs = None if kind == "rms" and (split or grad == P) else plain
        compare(
            mesh,
            lambda x, *parameters, f=function: f(x, size, *parameters),
            [x, *parameters],
            [placement, *[R] * len(parameters)],
            grad,
            plain=theirs and (lambda x, *parameters, f=theirs: f(x, size, *parameters)),
        )


def sharded_weights_of_norms(mesh):
    x, weight = randn(*EVEN), 0.5 + randn(8, seed=1).abs()
    compare(mesh, lambda x, w: LF.ms_rms_norm(x, (8,), w, 1e-5), [x, weight], [Shard(0), Shard(0)])


def gated(mesh, shape):
    gate, up = randn(*shape), randn(*shape, seed=1)
    for a, b in pairs_of(all_placements(3), all_placements(3)):
        # (torch's product keeps a partial factor beside a replica.)
        plain = None if b == P else lambda a, b: F.silu(a) * b
        compare(mesh, LF.gated, [gate, up], [a, b], plain=plain)
    for wrap in (lambda x: x, lambda x: x.transpose(0, 1)):
        compare(
            mesh, lambda a, b, w=wrap: w(LF.gated(w(a), w(b), "gelu_tanh")), [gate, up], [Shard(0), Shard(0)], Shard(0)
        )


def gated_in_one(mesh):
    x = randn(3, 5, 8)
    for placement, layout in pairs_of(all_placements(3), ["gate_up", "up_gate", "interleaved"]):
        found = compare(mesh, partial(LF.gated, layout=layout), [x], [placement])
        # Rows are gathered, or terms are summed, once in each pass. (torch's split has no gradient for these.)
        moved = placement in (P, Shard(2))
        assert found.counts == (moved, moved)


# Linear layers -------------------------------------------------------------------------------------------------------

WEIGHTS = [R, Shard(0), Shard(1)]


def linear_layers(mesh, shape):
    gate, up = randn(*shape), randn(*shape, seed=1)
    features = shape[-1]
    weight, bias = randn(6, features, seed=2), randn(6, seed=3)
    a, b = randn(3, features, seed=4), randn(6, 3, seed=5)
    # torch's linear layer refuses uneven rows.
    even = all(size % mesh.size() == 0 for size in shape)
    for x, w in pairs_of([R, *map(Shard, range(len(shape)))], WEIGHTS):
        compare(
            mesh,
            LF.gated_linear,
            [gate, up, weight, bias],
            [x, x, w, R],
            plain=(lambda g, u, w, b: F.linear(F.silu(g) * u, w, b)) if even else None,
        )
        compare(
            mesh,
            LF.lora,
            [gate, a, b],
            [x, w, R],
            plain=(lambda x, a, b: F.linear(F.linear(x, a), b)) if even else None,
        )
        compare(mesh, partial(_lora_with_bias, scaling=0.5), [gate, a, b, bias], [x, R, w, R])


def _lora_with_bias(x, a, b, bias, scaling):
    return LF.lora(x, a, b, scaling, bias=bias)


def linear_layers_in_one(mesh):
    gate, weight = randn(4, 6, 8), randn(6, 4, seed=2)
    for x, w in pairs_of(all_placements(3), WEIGHTS):
        compare(mesh, lambda g, w: LF.gated_linear(g, None, w), [gate, weight], [x, w])


def lora_with_dropout(mesh):
    x, a, b = randn(4, 6, 8), randn(3, 8, seed=4), randn(6, 3, seed=5)
    for placement in (R, Shard(0), Shard(2)):
        given = [distributed(t.requires_grad_(), mesh, p) for t, p in ((x, placement), (a, R), (b, R))]
        state = torch.get_rng_state()
        y = LF.lora(*given, p=0.4)
        y.backward(distributed(torch.ones(y.shape), mesh, R))
        torch.set_rng_state(state)
        dropped = LF.dropout(distributed(x.detach().requires_grad_(), mesh, placement), 0.4)
        mask = full(dropped) / x.detach()
        xs = [t.detach().requires_grad_() for t in (x, a, b)]
        expected = F.linear(F.linear(xs[0] * mask, xs[1]), xs[2])
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(full(y), expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(given, xs, strict=True):
            torch.testing.assert_close(full(one.grad), other.grad, rtol=1e-5, atol=1e-5)


def randomized(mesh, matmul):
    x, weight, bias = randn(2, 4, 6), randn(5, 6, seed=1), randn(5, seed=2)
    seed = torch.tensor(11)
    function = partial(LF.randomized_linear, matmul=matmul, proj_dim=4)
    for placement in WEIGHTS:
        # Rows that are replicas: with one seed, the estimate of a single process. Of shards of columns, those that
        # pick rows by their norms pick others.
        if placement != Shard(1) or matmul not in ("crs", "wta-crs"):
            compare(mesh, partial(function, seed=seed), [x, weight, bias], [R, placement, R], plain=F.linear)
    weight.requires_grad_()
    expected = None
    # Rows that are shards: everything but the gradient of the weight is exact, and that is on average.
    draws = 100
    for placement in (Shard(1), Shard(2)):
        given = distributed(x, mesh, placement)
        estimates = []
        for number in range(draws):
            w = distributed(weight, mesh, R)
            y = function(given, w, seed=torch.tensor(number) if number % 2 else None)
            if number == 0:
                torch.testing.assert_close(full(y), F.linear(x, weight), rtol=1e-5, atol=1e-5)
            y.backward(torch.ones_like(y))
            estimates.append(full(w.grad))
        estimates = torch.stack(estimates)
        if expected is None:
            (expected,) = torch.autograd.grad(F.linear(x, weight).sum(), weight)
        # Five standard deviations of the mean, as found; nothing random remains where all rows are saved.
        bound = 5 * estimates.std(0) / math.sqrt(draws) + 1e-4
        assert ((estimates.mean(0) - expected).abs() <= bound).all()


def direct_calls(mesh):
    """The ops themselves, where functions do something else with DTensors."""
    x, up = randn(4, 6), randn(4, 6, seed=1)
    weight, a, b = randn(5, 6, seed=2), randn(2, 6, seed=3), randn(5, 2, seed=4)
    for placement in (R, Shard(0), Shard(1)):
        compare(mesh, _gated_linear_op, [x, up, weight], [placement, placement, R])
        compare(mesh, lambda x, a, b: ops.lora(x, a, b), [x, a, b], [placement, R, R])
        given = distributed(x, mesh, placement)
        with torch.inference_mode():
            for function in (
                ops.regelu2,
                ops.resilu2,
                lambda x: ops.randomized_linear(x, distributed(weight, mesh, R), proj_dim=1),
            ):
                result = function(given)
                assert isinstance(result, DTensor)
    for placement in (R, Shard(1)):
        function = partial(ops.randomized_linear, proj_dim=2, seed=torch.tensor(5))
        compare(mesh, lambda x, w, f=function: f(x, w), [x, weight], [placement, R])
    uneven = distributed(randn(3, 6).requires_grad_(), mesh, Shard(0))
    w = distributed(weight.requires_grad_(), mesh, R)
    ops.randomized_linear(uneven, w, proj_dim=2).sum().backward()
    torch.testing.assert_close(full(uneven.grad), weight.detach().sum(0).expand(3, 6), rtol=1e-5, atol=1e-5)
    for p in (0.0, 0.5):
        xs = [distributed(t.requires_grad_(), mesh, q) for t, q in ((x, Shard(0)), (a, R), (b, R))]
        state = torch.get_rng_state()
        y = ops.lora(*xs, p=p)
        y.sum().backward()
        torch.set_rng_state(state)
        mask = (
            full(ops.dropout(distributed(torch.ones(4, 6).requires_grad_(), mesh, Shard(0)), p))
            if p
            else torch.ones(4, 6)
        )
        ys = [t.detach().requires_grad_() for t in (x, a, b)]
        F.linear(F.linear(ys[0] * mask, ys[1]), ys[2]).sum().backward()
        for one, other in zip(xs, ys, strict=True):
            torch.testing.assert_close(full(one.grad), other.grad, rtol=1e-5, atol=1e-5)


def _gated_linear_op(gate, up, weight):
    return ops.gated_linear(gate, up, weight, None, "silu")


# What is around ------------------------------------------------------------------------------------------------------


def mixed(mesh):
    x, weight = distributed(randn(3, 8), mesh, R), torch.ones(8)
    message = "weight is a torch.Tensor and input a DTensor, expected DTensors alone"
    for function in (
        lambda: LF.ms_rms_norm(x, (8,), weight),
        lambda: LF.ms_layer_norm(x, (8,), weight, weight),
        lambda: LF.randomized_linear(x, weight[None], proj_dim=1),
    ):
        with pytest.raises(RuntimeError, match=message):
            function()
    with pytest.raises(RuntimeError, match=r"lomem::gated: up is a torch\.Tensor and gate a DTensor, expected"):
        LF.gated(x, torch.ones(3, 8))
    with pytest.raises(RuntimeError, match=r"lomem::gated_linear: up is a torch\.Tensor and gate a DTensor, expected"):
        LF.gated_linear(x, torch.ones(3, 8), distributed(torch.ones(2, 8), mesh, R))
    with implicit_replication():
        torch.testing.assert_close(full(LF.ms_rms_norm(x, (8,), weight)), F.rms_norm(full(x), (8,)))
    other = torch.distributed.device_mesh.init_device_mesh("cpu", (1, mesh.size()))
    with pytest.raises(
        RuntimeError, match=r"lomem::gated: up is on DeviceMesh.*, expected DeviceMesh.*the mesh of gate"
    ):
        LF.gated(x, distributed(randn(3, 8), other, R, R))


def around(mesh):
    """Checkpoints, saved-tensor hooks, autocast, compilers."""
    x, weight = randn(*UNEVEN), 0.5 + randn(7, seed=1).abs()

    def block(x, w):
        return LF.gelu(LF.ms_rms_norm(x, (7,), w), bits=4)

    contexts = partial(create_selective_checkpoint_contexts, lomem.checkpoint.policy(save=[LF.ms_rms_norm, LF.gelu]))
    for function in (
        block,
        lambda x, w: checkpoint(block, x, w, use_reentrant=False),
        lambda x, w: checkpoint(block, x, w, use_reentrant=False, context_fn=contexts),
        lambda x, w: _on_cpu(block, x, w),
    ):
        compare(mesh, function, [x, weight], [Shard(1), R])
        compare(mesh, function, [x, weight], [Shard(0), R], Shard(2))
    with torch.autocast("cpu", torch.bfloat16):
        y = LF.ms_rms_norm(distributed(x, mesh, Shard(1)), (7,), distributed(weight, mesh, R))
        assert y.dtype == torch.bfloat16
        assert LF.gelu(y).dtype == torch.bfloat16
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    grad = distributed(randn(*UNEVEN, seed=1), mesh, Shard(1))
    gradients = []
    for function in (block, compiled):
        given = [distributed(x.requires_grad_(), mesh, Shard(1)), distributed(weight.requires_grad_(), mesh, R)]
        function(*given).backward(grad)
        gradients.append([full(t.grad) for t in given])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


def _on_cpu(function, *args):
    with torch.autograd.graph.save_on_cpu():
        return function(*args)
