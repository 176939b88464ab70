"""Converted pairs as objects and as functions: copies, compilers, transforms, threads, lifetimes."""

import copy
import io
import pickle
import threading
import weakref

import lomem
import pytest
import torch
from lomem._trace import handover
from lomem.conversion.exchange import is_converted
from small_pairs import (
    DTYPES,
    PAIRS,
    STEADY,
    D,
    Ungated,
    distance,
    gradients,
    living_bytes,
    make,
    no_garbage,
    saved_bytes,
    whole,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = [name for name, entry in PAIRS.items() if not entry.rounds]
#: One of each kind.
FEW = ["gelu", "QuickGELU", "called gelu", "gated silu", "gated NewGELU", "gated call", "fused", "modulated"]
TOLERANCE = DTYPES["float32"][1]


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def half_checkpointed(model, x):
    return model(checkpoint(model, x, use_reentrant=False))


RUNS = {"whole": whole, "checkpointed": checkpointed, "half checkpointed": half_checkpointed}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", [name for name in STEADY if name != "experts"])
def test_compiled_in_one_graph(name, run, mixed):
    dtype = None if mixed else torch.float32
    plain, model, x = make(name, dtype)
    figures = []
    for m in (plain, model):
        torch.compiler.reset()

        def step(x, m=m):
            return RUNS[run](m, x)

        compiled = torch.compile(step, backend="aot_eager_decomp_partition", fullgraph=True)
        result, grads = gradients(m, x, lambda _, x, compiled=compiled: compiled(x), dtype)
        figures.append((result, grads, saved_bytes(m, x, lambda _, x, compiled=compiled: compiled(x), dtype)))
    torch.compiler.reset()
    (before, expected, bytes_before), (after, grads, bytes_after) = figures
    if not PAIRS[name].rounds:
        assert torch.equal(after, before)
    assert distance(grads, expected) < (DTYPES["autocast"][1] if mixed else TOLERANCE)
    if not PAIRS[name].rounds:
        assert bytes_after <= bytes_before


@pytest.mark.parametrize("name", FEW)
def test_compiled_by_inductor(name):
    plain, model, x = make(name)
    _, expected = gradients(plain, x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    _, grads = gradients(model, x, lambda _, x: compiled(x))
    torch.compiler.reset()
    # Its own formulas for GELU and sigmoid.
    assert distance(grads, expected) < 1e-5


@pytest.mark.parametrize("part", ["act", "down", "up", "gate"])
@pytest.mark.parametrize("name", ["gelu", "QuickGELU", "gated silu", "gated NewGELU"])
def test_only_a_part_is_compiled(name, part):
    plain, model, x = make(name)
    if not hasattr(model, part):
        return
    _, expected = gradients(plain, x)
    torch.compiler.reset()
    setattr(model, part, torch.compile(getattr(model, part), backend="aot_eager_decomp_partition"))
    _, grads = gradients(model, x)
    torch.compiler.reset()
    assert distance(dict(zip(expected, grads.values(), strict=True)), expected) < TOLERANCE


@pytest.mark.parametrize("name", PAIRS)
def test_copies_and_pickles(name):
    plain, model, x = make(name)
    copies = [copy.deepcopy(model)]
    if name not in ("gelu tanh", "Conv1D") and not any(callable(v) for v in vars(model).values()):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies += [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    _, expected = gradients(plain, x)
    for m in copies:
        after, grads = gradients(m, x)
        assert distance(grads, expected) < TOLERANCE
        assert saved_bytes(m, x) == saved_bytes(model, x)
        m.load_state_dict(plain.state_dict())
        assert lomem.restore(m) == sum(is_converted(module) for module in model.modules())
        assert [type(a) for a in m.modules()] == [type(b) for b in plain.modules()]
        assert not any(key.startswith("lomem") for module in m.modules() for key in vars(module))
        after, grads = gradients(m, x)
        assert torch.equal(after, plain(x))
        assert all(torch.equal(g, expected[n]) for n, g in grads.items())
        assert saved_bytes(m, x) == saved_bytes(plain, x)


@pytest.mark.parametrize("name", FEW)
def test_restored_between_forward_and_backward(name):
    plain, model, x = make(name)
    y = model(x).square().mean()
    lomem.restore(model)
    y.backward()
    _, expected = gradients(plain, x)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"input": x.grad}
    assert distance(grads, expected) < TOLERANCE


@pytest.mark.parametrize("name", FEW)
def test_traced_and_exported(name):
    plain, model, x = make(name)
    y = plain(x)
    programs = [
        torch.jit.trace(model, x),
        torch.export.export(model, (x,)).module(),
        torch.export.export(model, (x,), strict=True).module(),
    ]
    if name not in ("fused", "modulated"):  # symbolic tensors cannot be unpacked
        programs.append(torch.fx.symbolic_trace(model))
    for program in programs:
        assert torch.allclose(program(x), y, rtol=0, atol=2e-6 if PAIRS[name].rounds else 0)


# Function transforms.


def of_parameters(model, x):
    parameters = dict(model.named_parameters())
    return lambda parameters: functional_call(model, parameters, (x,)).square().mean(), parameters


def reverse(model, x):
    function, parameters = of_parameters(model, x)
    return torch.func.grad(function)(parameters)


def per_sample(model, x):
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().mean()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach())


def forward_mode(model, x):
    _, tangent = torch.func.jvp(lambda x: model(x), (x.detach(),), (torch.ones_like(x),))
    return {"tangent": tangent}


def dual(model, x):
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        return {"tangent": torch.autograd.forward_ad.unpack_dual(y).tangent}


def dual_with_gradients(model, x):
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        torch.autograd.forward_ad.unpack_dual(y).tangent.square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def batched(model, x):
    y = model(x)
    directions = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2))
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(y, list(parameters.values()), directions, is_grads_batched=True)
    return dict(zip(parameters, grads, strict=True))


def jacobian(model, x):
    return {"jacobian": torch.autograd.functional.jacobian(lambda x: model(x).sum(1), x.detach(), vectorize=True)}


def hessian(model, x):
    return {"hessian": torch.func.hessian(lambda x: model(x).square().sum())(x.detach()[:1, :2])}


def vmapped(model, x):
    return {"result": torch.vmap(model)(x[:, None])}


TRANSFORMS = [reverse, per_sample, forward_mode, dual, dual_with_gradients, batched, jacobian, hessian, vmapped]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [n for n in EXACT if n in STEADY and "adapters" not in n and n != "experts"])
def test_function_transforms(name, transform):
    plain, model, x = make(name)
    try:
        expected = transform(plain, x)
    except (NotImplementedError, IndexError) as error:
        # torch has no tangent of silu_backward, and a model may swap dimensions.
        assert transform in (dual_with_gradients, vmapped)
        with pytest.raises(type(error)):
            transform(model, x)
        return
    assert distance(transform(model, x), expected) < 1e-5


# Threads, exceptions and lifetimes.


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shared", [False, True], ids=["copies", "shared"])
@pytest.mark.parametrize("name", FEW)
def test_threads(name, shared, run):
    plain, model, x = make(name)
    expected = torch.autograd.grad(RUNS[run](plain, x).sum(), x)[0]
    models = [model if shared else copy.deepcopy(model) for _ in range(4)]
    wrong = []

    def work(m):
        try:
            for _ in range(5):
                given = x.detach().clone().requires_grad_()
                (grad,) = torch.autograd.grad(RUNS[run](m, given).sum(), given)
                if not torch.allclose(grad, expected, rtol=1e-4, atol=1e-5):
                    wrong.append((grad - expected).abs().max())
        except Exception as error:  # an assertion in a thread would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", FEW)
def test_forward_in_one_thread_and_backward_in_another(name):
    plain, model, x = make(name)
    y = model(x).square().mean()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    _, expected = gradients(plain, x)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"input": x.grad}
    assert distance(grads, expected) < TOLERANCE


HOOKS = {
    "none": whole,
    "checkpointed": checkpointed,
    "hooks": lambda m, x: _in_hooks(m, x),
}


def _in_hooks(model, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
        return model(x)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("way", HOOKS)
@pytest.mark.parametrize("name", PAIRS)
def test_nothing_is_alive_afterwards(name, way, backward):
    _, model, x = make(name)
    results = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, result: results.append(weakref.ref(result)))
    before = len(handover._offers)
    with no_garbage():
        y = HOOKS[way](model, x)
        if backward:
            y.sum().backward()
        del y
        alive = [r for r in results if r() is not None]
        assert results
        assert not alive
        assert len(handover._offers) == before


@pytest.mark.parametrize("way", HOOKS)
@pytest.mark.parametrize("place", ["act", "down"])
@pytest.mark.parametrize("name", ["gelu", "QuickGELU", "gated silu", "gated NewGELU", "fused"])
def test_an_exception_in_the_forward_pass(name, place, way):
    plain, model, x = make(name)
    module = model.get_submodule(place)

    def fail(module, args):
        raise ArithmeticError

    handle = module.register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            HOOKS[way](model, x)
    handle.remove()
    assert torch.overrides._get_current_function_mode() is None
    _, expected = gradients(plain, x, HOOKS[way])
    _, grads = gradients(model, x, HOOKS[way])
    assert distance(grads, expected) < TOLERANCE


@pytest.mark.parametrize("name", PAIRS)
def test_trained_as_the_plain_model(name):
    plain, model, x = make(name, torch.float64)
    for m in (plain, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(x.detach()).square().mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        # Norms compute in double precision too; three steps.
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["gelu", "gated silu", "fused"])
def test_optimizers_in_the_backward_pass(name):
    plain, model, x = make(name)
    for m in (plain, model):
        for p in m.parameters():

            def update(p):
                p.data.sub_(0.1 * p.grad)
                p.grad = None

            p.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            m(x).square().mean().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_interleaved_passes(name):
    # Two forward passes before two backward passes in either order, with one checkpointed.
    plain, model, x = make(name)
    for first, second in ((whole, checkpointed), (checkpointed, whole), (whole, whole)):
        for order in (1, -1):
            found = []
            for m in (plain, model):
                m.zero_grad(set_to_none=True)
                losses = [first(m, x).square().mean(), second(m, 2 * x).square().mean()]
                for loss in losses[::order]:
                    loss.backward()
                found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
            assert distance(found[1], found[0]) < TOLERANCE


def test_data_parallel_replicas():
    plain, model, x = make("gated silu")
    # Replicas share the class and the attributes of the converted modules.
    replica = copy.copy(model)
    replica._modules = {n: copy.copy(m) for n, m in model._modules.items()}
    _, expected = gradients(plain, x)
    _, grads = gradients(replica, x)
    assert distance(grads, expected) < TOLERANCE


def test_parametrized_after_conversion():
    for name, part in (("gelu", "down"), ("gated silu", "down"), ("modulated", "q")):
        plain, model, x = make(name)
        for m in (plain, model):
            torch.manual_seed(3)
            nn.utils.parametrizations.weight_norm(m.get_submodule(part))
        _, expected = gradients(plain, x)
        _, grads = gradients(model, x)
        assert distance(grads, expected) < TOLERANCE


def test_a_tied_weight():
    class Tied(Ungated):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(D, self.up.out_features)
            self.again.weight = self.up.weight

        def forward(self, x):
            return self.down(self.act(self.again(self.down(self.act(self.up(x))))))

    plain, model, x = make(Tied)
    _, expected = gradients(plain, x)
    _, grads = gradients(model, x)
    assert distance(grads, expected) < TOLERANCE
    assert living_bytes(model, x) <= living_bytes(plain, x)
