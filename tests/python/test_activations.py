"""The family of activations with few-bit derivatives: forward bit for bit torch's, codes and gradients from the
definition, for every function, number of bits and dtype; those of straight pieces equal torch's gradient."""

import math
import re
from functools import partial

import lomem
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import (
    ALL,
    BITS,
    HARD,
    LF,
    SMOOTH,
    assert_same_outcome,
    expected_gradient,
    jagged,
    outcome,
    saved_by,
)
from helpers import DTYPES, LAYOUTS, SIXTEEN_BIT, all_patterns, in_memory_order, make_input, same_bits
from lomem import reference
from torch import nn

ops = torch.ops.lomem


def some_values(dtype, device, step=None):
    """Random numbers, numbers that are special, and boundaries with their neighbours."""
    values = [(torch.randn(701, dtype=torch.float64) * 3).to(dtype)]
    special = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 300.0, -300.0], dtype=torch.float64
    )
    values.append(special.to(dtype))
    if step is not None:
        at = torch.tensor(step.boundaries, dtype=torch.float64).to(dtype)
        inf = torch.tensor(math.inf, dtype=dtype)
        values += [at, torch.nextafter(at, inf), torch.nextafter(at, -inf)]
    return torch.cat(values).to(device)


@pytest.mark.parametrize("criterion", ["primitive", "derivative"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMOOTH)
def test_every_number_of_bits(name, dtype, criterion, device):
    op, torch_op, function, parameters = SMOOTH[name]
    for bits in BITS:
        step = LF.step_function(function, bits, criterion=criterion, parameters=parameters)
        x = some_values(dtype, device, step)
        codes = reference.pack_bits(reference.step_codes(x, step), bits)
        y, saved = saved_by(partial(op, bits=bits, criterion=criterion), x.clone().requires_grad_())
        assert same_bits(y.detach(), torch_op(x))
        assert len(saved) == 1
        assert torch.equal(saved[0], codes), bits
        assert saved[0].nbytes == math.ceil(bits * x.numel() / 8)

        forward = ops.step_activation_forward(x, function, parameters, bits, criterion=criterion)
        assert same_bits(forward[0], torch_op(x))
        assert torch.equal(forward[1], codes)

        leaf = x.clone().requires_grad_()
        grad = torch.randn(x.shape, dtype=torch.float64, device=device).to(dtype)
        (got,) = torch.autograd.grad(op(leaf, bits=bits, criterion=criterion), leaf, grad)
        want = expected_gradient(x, grad, step)
        # For any levels, the float32 product rounded again may differ from the exact one rounded once, at ties: by the
        # spacing of the 16-bit type.
        tolerance = 0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
        assert same_bits(got, reference.step_activation_backward(grad, codes, step.levels, bits))
        assert same_bits(op(x, bits=bits), torch_op(x))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("name", ALL)
def test_forward_every_pattern(name, dtype, device):
    op, torch_op = ALL[name]
    x = all_patterns(dtype, device)
    assert same_bits(op(x), torch_op(x))
    assert same_bits(op(x.clone().requires_grad_()).detach(), torch_op(x))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_every_pattern(bits, dtype, device):
    step = LF.step_function("silu", bits)
    x = all_patterns(dtype, device)
    want = reference.pack_bits(reference.step_codes(x, step), bits)
    assert torch.equal(ops.step_codes(x, step.boundaries, bits), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gelu", "silu", "softplus-parameters", "hardswish", "relu6", "leaky_relu"])
def test_every_layout(name, layout, dtype, device):
    op, torch_op = ALL[name]
    x = make_input(layout, dtype, device)
    leaf = x.detach().requires_grad_()
    y, saved = saved_by(op, leaf)
    assert same_bits(y.detach(), torch_op(x))
    if name in SMOOTH:
        _, _, function, parameters = SMOOTH[name]
        step = LF.step_function(function, 3, parameters=parameters)
        dense = torch.empty_like(y).copy_(x)
        assert torch.equal(saved[0], reference.pack_bits(reference.step_codes(in_memory_order(dense), step), 3))
    grad = torch.randn(x.shape, dtype=torch.float64, device=device).to(dtype)
    (got,) = torch.autograd.grad(y, leaf, grad)
    flat = x.reshape(-1).clone().requires_grad_()
    (want,) = torch.autograd.grad(op(flat), flat, grad.reshape(-1))
    assert torch.equal(got.reshape(-1), want)


def test_across_threads(device):
    x = torch.randn(1_000_003, device=device) * 3
    for bits in (1, 3, 8):
        step = LF.step_function("gelu", bits)
        codes = ops.step_codes(x, step.boundaries, bits)
        assert torch.equal(codes, reference.pack_bits(reference.step_codes(x, step), bits))
    assert torch.equal(ops.band_codes(x, -1.0, 0.5), reference.pack_bits(((x >= -1) & (x <= 0.5)).to(torch.uint8), 1))


def at_the_kinks(dtype, device):
    kinks = torch.tensor([0.0, -0.0, 0.1, 0.3, -0.3, 0.5, -0.5, 0.7, 1, -1, 3, -3, 6, -2.3], dtype=torch.float64)
    kinks = kinks.to(dtype)
    inf = torch.tensor(math.inf, dtype=dtype)
    tiny = torch.tensor([torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny, math.inf, -math.inf], dtype=dtype)
    values = [kinks, torch.nextafter(kinks, inf), torch.nextafter(kinks, -inf), tiny, torch.randn(500).to(dtype) * 4]
    return torch.cat(values).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
def test_exact_gradient(name, dtype, device):
    op, torch_op = HARD[name]
    inputs = [at_the_kinks(dtype, device)]
    if dtype in SIXTEEN_BIT:
        patterns = all_patterns(dtype, device)
        # torch's own kernels do not agree what the derivative at NaN is.
        inputs.append(patterns[~patterns.isnan()])
    for x in inputs:
        grads = [torch.ones_like(x), torch.randn_like(x)]
        if name != "leaky_relu-zero":  # where torch multiplies by the slope of 0
            grads += [torch.full_like(x, math.inf), torch.full_like(x, math.nan)]
        for grad in grads:
            results = []
            for f in (op, torch_op):
                leaf = x.clone().requires_grad_()
                results.append(torch.autograd.grad(f(leaf), leaf, grad)[0])
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


# Where the derivative jumps: of which piece is it, at the kink itself?
# name -> (function, torch's, the op's name for it, its parameters, places)
KINKS = {
    "hardswish": (LF.hardswish, F.hardswish, "hardswish", (), (-3.0, 3.0)),
    "selu": (LF.selu, F.selu, "selu", (), (0.0,)),
    **{
        f"elu-{alpha}": (partial(LF.elu, alpha=alpha), partial(F.elu, alpha=alpha), "elu", (alpha,), (0.0,))
        for alpha in (-1.0, 0.0, 0.5, 1.0, 1.3, 4.0)
    },
    **{
        f"celu-{alpha}": (partial(LF.celu, alpha=alpha), partial(F.celu, alpha=alpha), "celu", (alpha,), (0.0,))
        for alpha in (0.3, 1.0, 2.0)
    },
    # (Of beta x > threshold: where neither the product nor the quotient is rounded.)
    **{
        f"softplus-{beta}-{threshold}": (
            partial(LF.softplus, beta=beta, threshold=threshold),
            partial(F.softplus, beta=beta, threshold=threshold),
            "softplus",
            (beta, threshold),
            (threshold / beta,),
        )
        for beta in (0.5, 1.0, 2.0)
        for threshold in (-1.0, 0.5, 1.0, 3.0, 20.0)
    },
    "softplus-1.0-0.0": (
        partial(LF.softplus, threshold=0.0),
        partial(F.softplus, threshold=0.0),
        "softplus",
        (1.0, 0.0),
        (0.0,),
    ),
}


# Those whose derivative is continuous, or very nearly.
SMOOTH_KINKS = {"elu-1.0", "celu-0.3", "celu-1.0", "celu-2.0", *(f"softplus-{beta}-20.0" for beta in (0.5, 1.0, 2.0))}


def around(place, dtype, device):
    """The place, between its neighbours."""
    at = torch.tensor([place], dtype=dtype)
    inf = torch.tensor([math.inf], dtype=dtype)
    return torch.cat([torch.nextafter(at, -inf), at, torch.nextafter(at, inf)]).to(device)


def gradient_of_ones(op, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(op(leaf).sum(), leaf)[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINKS)
def test_ties_where_the_derivative_jumps(name, dtype, device):
    """Where a boundary is at a jump, an input that is there has the level of the piece that torch takes it for."""
    op, torch_op, function, parameters, places = KINKS[name]
    ties = 0
    for place in places:
        x = around(place, dtype, device)
        below, at, above = gradient_of_ones(torch_op, x)
        # A smooth derivative changes less between neighbours, of bfloat16 too.
        assert (abs(above - below) > 0.01) == (name not in SMOOTH_KINKS)
        for bits in BITS if name not in SMOOTH_KINKS else ():
            step = LF.step_function(function, bits, parameters=parameters)
            left, tie, right = gradient_of_ones(partial(op, bits=bits), x)
            # (With few bits the best boundaries are elsewhere.)
            if min(abs(boundary - place) for boundary in step.boundaries) < 1e-6:
                # (hardswish's boundary is below 3 by what float32 inputs are apart: some of float64 lie between.)
                assert left != right or (dtype == torch.float64 and name == "hardswish")
                assert tie == (left if abs(at - below) < abs(at - above) else right), bits
                ties += 1
    assert ties >= (0 if name in SMOOTH_KINKS else 5 * len(places))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_ties_of_given_steps_are_on_the_left(bits, dtype, device):
    """A boundary of the caller's is compared as it is: ``x > 3``."""
    count = 2**bits
    step = lomem.StepFunction((3.0,) * (count - 1), tuple(range(count)))
    left, tie, right = gradient_of_ones(partial(LF.hardswish, steps=step), around(3.0, dtype, device))
    assert left == tie == 0
    assert right == count - 1


KINKS_OF_PIECES = {
    "relu": (LF.relu, F.relu, (0.0, -0.0)),
    "relu6": (LF.relu6, F.relu6, (0.0, 6.0)),
    "hardsigmoid": (LF.hardsigmoid, F.hardsigmoid, (-3.0, 3.0)),
    **{
        f"leaky_relu-{slope}": (
            partial(LF.leaky_relu, negative_slope=slope),
            partial(F.leaky_relu, negative_slope=slope),
            (0.0, -0.0),
        )
        for slope in (0.0, 0.01, 0.3, 1.0, 2.0)
    },
    **{
        f"hardtanh-{low}-{high}": (
            partial(LF.hardtanh, min_val=low, max_val=high),
            partial(F.hardtanh, min_val=low, max_val=high),
            (low, high),
        )
        for low, high in ((-1.0, 1.0), (0.0, 6.0), (-2.0, 0.5), (-0.1, 0.1), (0.25, 0.25))
    },
    **{
        f"{kind}-{lambd}": (
            partial(getattr(LF, kind), lambd=lambd),
            partial(getattr(F, kind), lambd=lambd),
            (-lambd, lambd),
        )
        for kind in ("hardshrink", "softshrink")
        for lambd in (0.0, 0.1, 0.3, 0.5, 1.0)
    },
    **{
        f"threshold-{place}": (
            partial(LF.threshold, threshold=place, value=7.0),
            partial(F.threshold, threshold=place, value=7.0),
            (place,),
        )
        for place in (-2.3, -1.0, 0.0, 0.1, 0.5, 20.0)
    },
}


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINKS_OF_PIECES)
def test_kinks_of_straight_pieces(name, dtype, device):
    op, torch_op, places = KINKS_OF_PIECES[name]
    for place in places:
        x = around(place, dtype, device)
        # In vectors and in what is left over: torch's kernels have a formula for each.
        for repeats in (1, 11, 64):
            assert gradient_of_ones(op, x.repeat(repeats)) == gradient_of_ones(torch_op, x.repeat(repeats)), place


def test_all_kinks_are_tried():
    kinked = {name.split("-")[0] for name in (*KINKS, *KINKS_OF_PIECES)}
    assert kinked == {name.split("-")[0] for name in HARD} | {"elu", "celu", "selu", "softplus", "hardswish"}


@pytest.mark.parametrize("name", HARD)
def test_one_bit(name, device):
    for n in range(1, 40):
        _, saved = saved_by(HARD[name][0], torch.randn(n, device=device, requires_grad=True))
        assert [t.nbytes for t in saved] == [math.ceil(n / 8)]


def test_step_activation(device):
    step = lomem.StepFunction((-1.0, 0.0, 2.0), (0.0, 0.25, 0.5, 1.0))
    for dtype in DTYPES:
        x = some_values(dtype, device, step)
        leaf = x.clone().requires_grad_()
        y, saved = saved_by(lambda t: LF.step_activation(t, torch.sin, step.boundaries, step.levels), leaf)
        assert same_bits(y.detach(), torch.sin(x))
        assert [t.nbytes for t in saved] == [math.ceil(2 * x.numel() / 8)]
        grad = torch.randn_like(x)
        (got,) = torch.autograd.grad(y, leaf, grad)
        assert torch.equal(got, expected_gradient(x, grad, step))
        assert same_bits(LF.step_activation(x, torch.sin, step.boundaries, step.levels), torch.sin(x))
        assert same_bits(reference.step_activation(leaf, torch.sin, step).detach(), torch.sin(x))
    image = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last).requires_grad_()
    (got,) = torch.autograd.grad(LF.step_activation(image, torch.sin, step.boundaries, step.levels).sum(), image)
    assert torch.equal(got, expected_gradient(image.detach(), torch.ones_like(image), step))


@pytest.mark.parametrize("fn", [lambda x: x, lambda x: x.view_as(x), lambda x: x.t().t()])
def test_step_activation_of_functions_that_return_their_input(fn, device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    y = LF.step_activation(x, fn, (0.0,), (0.5, 2.0))
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.where(x > 0, 2.0, 0.5))


def test_step_activation_that_changes_the_shape():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"^lomem.functional.step_activation: fn returns shape \(2,\), expected that"):
        LF.step_activation(x, lambda t: t[:2], (0.0,), (0.0, 1.0))


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (lambda t: t.sum(), "fn returns shape (), expected that of its argument, (4,)"),
        (lambda t: (t, t), "fn returns tuple, expected a floating-point tensor"),
        (lambda t: t > 0, "fn returns torch.bool, expected a floating-point tensor"),
        (lambda t: t.mul_(2), "fn modifies its argument, expected a function that does not"),
        (nn.PReLU(), "fn, a PReLU, has parameters that require gradients, expected none: they would get no gradient"),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_functions_that_are_no_activations(fn, sentence, requires_grad):
    x = torch.randn(4, requires_grad=requires_grad)
    with pytest.raises(ValueError, match="^" + re.escape(f"lomem.functional.step_activation: {sentence}")):
        LF.step_activation(x, fn, (0.0,), (0.0, 1.0))


def test_step_activation_and_transforms():
    def f(t):
        return LF.step_activation(t, torch.sin, (0.0,), (0.0, 1.0))

    x = torch.randn(3, requires_grad=True)
    for transform in (torch.func.vmap(f), torch.func.grad(lambda t: f(t).sum())):
        with pytest.raises(NotImplementedError, match=r"^lomem.functional.step_activation: called under torch.func or"):
            transform(x)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(f, (x.detach(),), (torch.ones(3),))


def test_no_gradient_of_a_closure():
    weight = torch.ones((), requires_grad=True)
    for x in (torch.randn(3), torch.randn(3, requires_grad=True)):
        y = LF.step_activation(x, lambda t: t * weight, (0.0,), (0.5, 1.0))
        assert y.requires_grad == x.requires_grad
        if y.requires_grad:
            y.sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize(
    "call",
    [
        lambda x, p: LF.leaky_relu(x, p),
        lambda x, p: LF.softplus(x, p),
        lambda x, p: LF.elu(x, p),
        lambda x, p: lomem.nn.LeakyReLU(p)(x),
    ],
)
def test_parameters_that_are_tensors(call):
    with pytest.raises(TypeError, match=r"got a tensor as parameter, expected a number: a tensor gets no gradient"):
        call(torch.randn(3), nn.Parameter(torch.tensor(0.2)))


def test_hardtanh_of_no_interval():
    with pytest.raises(ValueError, match=r"^lomem.functional.hardtanh: min_val is 1.0, expected at most max_val, -2.0"):
        LF.hardtanh(torch.ones(2), 1.0, -2.0)


def test_given_steps(device):
    step = lomem.StepFunction(tuple(torch.linspace(-3, 3, 31).tolist()), tuple(torch.randn(32).tolist()))
    x = some_values(torch.float32, device, step)
    for name in ("gelu", "elu-parameters", "softplus-parameters"):
        op, torch_op, *_ = SMOOTH[name]
        leaf = x.clone().requires_grad_()
        y, saved = saved_by(partial(op, steps=step), leaf)
        assert same_bits(y.detach(), torch_op(x))
        assert torch.equal(saved[0], reference.pack_bits(reference.step_codes(x, step), 5))
        (got,) = torch.autograd.grad(y, leaf, torch.ones_like(x))
        assert torch.equal(got, expected_gradient(x, torch.ones_like(x), step))


def test_fewer_boundaries_than_bits_allow(device):
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0, math.nan], device=device, requires_grad=True)
    y = ops.step_activation(x, "gelu", [], 3, boundaries=[-1.0, 1.0], levels=[1.0, 2.0, 3.0])
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [1, 2, 2, 3, 1]


def primitive_error(function, step):
    """L2 distance of h' to the steps over [-30, 30], on a fine grid."""
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(function(x).sum(), x)
    return ((exact - step.derivative(x.detach())) ** 2).mean().sqrt().item()


@pytest.mark.parametrize("name", SMOOTH)
def test_more_bits_are_nearer(name):
    _, torch_op, function, parameters = SMOOTH[name]
    errors = [
        primitive_error(torch_op, LF.step_function(function, bits, criterion="derivative", parameters=parameters))
        for bits in BITS
    ]
    assert errors == sorted(errors, reverse=True)
    # Half the error a bit, with room for the first ones and for kinks.
    assert errors[7] < errors[2] / 16


def test_steps_do_not_pass_the_threshold_of_softplus():
    step = LF.step_function("softplus", 4, parameters=(2.0, 1.0))
    assert max(step.boundaries) == 0.5
    assert step.derivative(torch.tensor([0.51])) == 1
    smooth = LF.step_function("softplus", 4, criterion="primitive", parameters=(2.0, 1.0))
    base = LF.step_function("softplus", 4, criterion="primitive", parameters=(1.0, 20.0))
    assert smooth.boundaries == pytest.approx([c / 2 for c in base.boundaries])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_factors_that_do_not_stretch(value, place, requires_grad):
    x = torch.ones(4, 8, device=place, requires_grad=requires_grad)
    with pytest.raises(ValueError, match=r"^lomem::step_activation: beta is "):
        LF.softplus(x, value)
    with pytest.raises(ValueError, match=r"^lomem::step_activation: alpha is "):
        LF.celu(x, value)


@pytest.mark.parametrize("threshold", [math.nan, -math.inf])
def test_thresholds_that_are_none(threshold):
    with pytest.raises(ValueError, match=r"lomem::.*: threshold is (nan|-inf), expected a number"):
        LF.softplus(torch.ones(2, requires_grad=True), threshold=threshold)


@pytest.mark.parametrize("name", ALL)
def test_jagged_tensors(name):
    op, torch_op = ALL[name]
    x = jagged(3, 0, 4)
    want = outcome(torch_op, x)
    # (torch has no gradient of some.)
    assert isinstance(want, tuple) or name.split("-")[0] in ("logsigmoid", "hardswish", "leaky_relu")
    assert_same_outcome(outcome(op, x), want)
    if isinstance(want, tuple):
        with torch.no_grad():
            assert torch.equal(op(x).values(), want[1])
    if name in ("logsigmoid", "hardswish"):  # (nor values of these)
        return
    with torch.inference_mode():
        x = jagged(3, 0, 4)
        assert torch.equal(op(x).values(), torch_op(x).values())


@pytest.mark.parametrize("name", ["gelu", "softplus-parameters", "relu", "hardtanh"])
def test_compile_with_jagged_tensors(name):
    op, torch_op = ALL[name]
    x = jagged(2, 5)
    want = outcome(torch_op, x)
    got = outcome(torch.compile(op, fullgraph=True, backend="aot_eager"), x)
    # What is kept is the compiler's affair.
    assert_same_outcome(got[:-1], want[:-1])


def test_step_activation_of_jagged_tensors():
    def swish(x):
        return x * torch.sigmoid(1.702 * x)

    x = jagged(2, 5)
    assert_same_outcome(outcome(lambda x: LF.step_activation(x, swish, [0.0], [0.0, 1.0]), x), outcome(swish, x))


def test_bad_arguments_with_jagged_tensors():
    x = jagged(2, 5)
    with pytest.raises(ValueError, match="bits is 9, expected 1 to 8"):
        LF.gelu(x, bits=9)
    with pytest.raises(ValueError, match="criterion is 'best', expected"):
        LF.silu(x, criterion="best")
    with pytest.raises(ValueError, match="beta is -1, expected a positive number"):
        LF.softplus(x, -1.0)
    with pytest.raises(ValueError, match="approximate is 'no', expected"):
        LF.gelu(x, "no")
    with pytest.raises(TypeError, match="got a tensor as parameter"):
        LF.leaky_relu(x, torch.tensor(0.1))
