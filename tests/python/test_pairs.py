"""Linear layers that rebuild their input: results, gradients and bytes, whatever is around and inside them."""

import contextlib
import functools
import re
import types

import lomem
import pytest
import torch
import torch.nn.functional as F
from small_pairs import (
    DTYPES,
    PAIRS,
    D,
    Encoder,
    Fork,
    Fused,
    Gated,
    GatedFork,
    GatedScaled,
    H,
    Modulated,
    Shifted,
    Swish,
    Ungated,
    batch,
    distance,
    gradients,
    living_bytes,
    make,
    saved_bytes,
    seed,
)
from test_handover import WAYS
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def in_double(make_model, model, x):
    """The result and the gradients of the same weights in float64."""
    torch.manual_seed(0)
    reference = make_model().double()
    reference.register_forward_pre_hook(seed)
    reference.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    return gradients(reference, x.detach().double(), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_results_are_unchanged_and_gradients_exact(name, dtype):
    dtype, tolerance = DTYPES[dtype]
    plain, model, x = make(name, dtype)
    before, expected = gradients(plain, x, dtype=dtype)
    after, grads = gradients(model, x, dtype=dtype)
    assert after.dtype == before.dtype
    if not PAIRS[name].rounds:
        assert torch.equal(after, before)
    assert {n: (g.dtype, g.shape) for n, g in grads.items()} == {n: (g.dtype, g.shape) for n, g in expected.items()}
    _, exact = in_double(PAIRS[name].make, plain, x)
    if dtype == torch.float64:
        assert distance(grads, exact) < tolerance
        return
    # No less accurate than the plain model, apart from chance: other roundings happen in a few places.
    error = distance(expected, exact)
    assert distance(grads, exact) <= 1.25 * error
    # The derivative of an activation of several ops rounds often, and in float16 to subnormal numbers: what two models
    # as accurate as these may differ by.
    several = name == "Conv1D" and dtype == torch.float16
    assert distance(grads, expected) < (2.25 * error if several else tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name, entry in PAIRS.items() if entry.saved is not None])
def test_bytes_saved(name, dtype):
    dtype, _ = DTYPES[dtype]
    plain, model, x = make(name, dtype)
    rows, entry = x[..., 0].numel(), PAIRS[name]
    # Gates of 32 bits, in a 16-bit model, are saved as such.
    if name == "wide gate" and dtype == torch.bfloat16:
        assert saved_bytes(model, x) == rows * H * (4 + 2)
    else:
        assert saved_bytes(model, x) == rows * entry.saved * dtype.itemsize + rows * entry.bits // 8
    assert saved_bytes(model, x) < saved_bytes(plain, x)


def cloning(block, x):
    """Copies everything saved, as offloading to another device does."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        return block(x)


def detaching(block, x):
    """Saves the same memory, but other tensors."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
        return block(x)


def restarted(block, x):
    """The second half of the rows after the first, with checkpointing of another kind."""
    first = checkpoint(block, x[:1], use_reentrant=False)
    return torch.cat([first, checkpoint(block, x[1:], use_reentrant=True)])


AROUND = WAYS | {"cloning": cloning, "detaching": detaching, "both kinds": restarted}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("name", PAIRS)
def test_whatever_is_around_a_pair(name, way, dtype):
    dtype, tolerance = DTYPES[dtype]
    run = AROUND[way]
    plain, model, x = make(name, dtype)
    before, expected = gradients(plain, x, run, dtype)
    # torch compares what a region saves with what it saves when recomputed, and raises if they differ.
    after, grads = gradients(model, x, run, dtype)
    if not PAIRS[name].rounds:
        assert torch.equal(after, before)
    assert distance(grads, expected) < tolerance
    if way != "cloning":
        assert living_bytes(model, x, run, dtype) <= living_bytes(plain, x, run, dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_hooks_that_copy(name):
    # What is saved twice is copied twice.
    plain, model, x = make(name)
    assert living_bytes(model, x, cloning) <= living_bytes(plain, x, cloning)


def ungated(inside):
    class Inside(Ungated):
        def forward(self, x):
            return inside(self, x)

    return Inside


def gated(inside):
    class Inside(Gated):
        def forward(self, x):
            return inside(self, x)

    return Inside


#: Checkpointed regions that begin or end between the ops of a pair; c is checkpoint.
INSIDE = {
    "the activation": ungated(lambda m, x, c=None: m.down(m.c(m.act, m.up(x)))),
    "the first layer": ungated(lambda m, x: m.down(m.act(m.c(m.up, x)))),
    "the last layer": ungated(lambda m, x: m.c(m.down, m.act(m.up(x)))),
    "activation and last layer": ungated(lambda m, x: m.c(lambda u: m.down(m.act(u)), m.up(x))),
    "first layer and activation": ungated(lambda m, x: m.down(m.c(lambda x: m.act(m.up(x)), x))),
    "nested": ungated(lambda m, x: m.c(lambda x: m.down(m.c(m.act, m.up(x))), x)),
    "the gate": gated(lambda m, x: m.down(m.act(m.c(m.gate, x)) * m.up(x))),
    "the gate's activation": gated(lambda m, x: m.down(m.c(m.act, m.gate(x)) * m.up(x))),
    "gate and activation": gated(lambda m, x: m.down(m.c(lambda x: m.act(m.gate(x)), x) * m.up(x))),
    "the product": gated(lambda m, x: m.down(m.c(torch.mul, m.act(m.gate(x)), m.up(x)))),
    "activation and product": gated(lambda m, x: m.down(m.c(m.product, *m.parts(x)))),
    "all before the last layer": gated(lambda m, x: m.down(m.c(lambda x: m.product(*m.parts(x)), x))),
    "the last layer of a gated one": gated(lambda m, x: m.c(m.down, m.product(*m.parts(x)))),
    "product and last layer": gated(lambda m, x: m.c(lambda a, u: m.down(a * u), m.act(m.gate(x)), m.up(x))),
    "up": gated(lambda m, x: m.down(m.act(m.gate(x)) * m.c(m.up, x))),
    "twice": gated(lambda m, x: m.c(m.down, m.c(m.product, *m.parts(x)))),
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("converted_with", [False, True], ids=["added later", "there at conversion"])
@pytest.mark.parametrize("region", INSIDE)
def test_checkpointed_regions_inside(region, converted_with, reentrant):
    def through(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    class Model(INSIDE[region]):
        c = staticmethod(through if converted_with else lambda function, *args: function(*args))

    try:
        plain, model, x = make(Model)
    except lomem.conversion.NothingToConvertError:
        # What is called through a function of another name may run outside all modules.
        assert converted_with
        return
    Model.c = staticmethod(through)
    before, expected = gradients(plain, x)
    after, grads = gradients(model, x)
    assert torch.equal(after, before)
    assert distance(grads, expected) < DTYPES["float32"][1]
    assert living_bytes(model, x) <= living_bytes(plain, x)


#: Checkpointing of both kinds frees what it recomputed in the first backward pass, or raises in the second.
TWICE = ["none", "save_on_cpu", "cloning", "detaching"]


@pytest.mark.parametrize("way", TWICE)
@pytest.mark.parametrize("name", PAIRS)
def test_a_second_backward_pass(name, way):
    plain, model, x = make(name)
    y, z = (AROUND[way](m, x).square().mean() for m in (plain, model))
    for loss in (y, z):
        loss.backward(retain_graph=True)
        loss.backward()
    grads, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, plain))
    assert distance(grads, expected) < 2e-6


def second_derivatives(model, x):
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters, allow_unused=True)
    return {str(i): g for i, g in enumerate(second) if g is not None}


@pytest.mark.parametrize("name", PAIRS)
def test_second_derivatives(name):
    plain, model, x = make(name, torch.float64)
    expected = second_derivatives(plain, x)
    if PAIRS[name].rounds:
        with pytest.raises(RuntimeError, match=r"differentia|not implemented"):
            second_derivatives(model, x)
    else:
        # Formulas for derivatives of the second order may differ in the order of their operations.
        assert distance(second_derivatives(model, x), expected) < 1e-10


# Hooks on modules and tensors.


def read(log):
    def hook(module, args, result):
        log.append(result.detach().clone())

    return hook


HOOKED = {
    "gelu": ["up", "act", "down"],
    "QuickGELU": ["up", "act"],
    "gated silu": ["gate", "act", "up"],
    "gated NewGELU": ["gate", "act", "up"],
    "fused": ["gate_up", "act"],
    "modulated": ["norm", "modulation", "stem"],
}
WHERE = [(name, at) for name, modules in HOOKED.items() for at in modules]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "at"), WHERE)
def test_forward_hooks_read(name, at, when):
    logs = [], []
    plain, model, x = make(name)
    for m, log in zip((plain, model), logs, strict=True):
        m.get_submodule(at).register_forward_hook(read(log))
    if when == "before":
        lomem.restore(model)
        lomem.convert(model, x, bits=16)
        logs[1].clear()
    _, expected = gradients(plain, x)
    _, grads = gradients(model, x)
    assert distance(grads, expected) < 2e-6
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*logs, strict=True))


def _add_in_place(module, args, result):
    with torch.no_grad():
        result.add_(0.5)


#: What forward hooks do to a result.
CHANGES = {
    "another tensor": lambda module, args, result: result * 1.5 + 0.25,
    "a view": lambda module, args, result: result.view_as(result),
    "a copy": lambda module, args, result: result.clone(),
    "detached": lambda module, args, result: result.detach(),
    "in place": lambda module, args, result: result.mul_(1.5),
    "in place without gradient": _add_in_place,
    "one column": lambda module, args, result: torch.cat([result[..., :1] * 0, result[..., 1:]], -1),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "at"), [(name, at) for name, at in WHERE if at != "down"])
def test_forward_hooks_change_results(name, at, change, when):
    plain, model, x = make(name)
    for m in (plain, model):
        m.get_submodule(at).register_forward_hook(CHANGES[change])
    if when == "before":
        lomem.restore(model)
        try:
            lomem.convert(model, x, bits=16)
        except lomem.conversion.NothingToConvertError:
            return
    if at == "norm" and when == "after" and change.startswith("in place"):
        # A converted norm saves its result; at conversion, it would have been left.
        with pytest.raises(RuntimeError, match="inplace"):
            gradients(model, x)
        return
    assert_right_or_error(plain, model, x)
    assert saved_bytes(model, x) <= saved_bytes(plain, x)


def assert_right_or_error(plain, model, x, tolerance=2e-6):
    """The model must do what the plain one does. Where torch raises, it may instead be right about what it saved."""
    expected = _gradients_or_none(plain, x)
    if expected is None:
        grads = _gradients_or_none(model, x)
        if grads is not None and isinstance(plain, Changed):
            plain.copies = True
            assert distance(grads[1], gradients(plain, x)[1]) < tolerance
        return
    after, grads = gradients(model, x)
    assert torch.allclose(after, expected[0], rtol=1e-5, atol=1e-6)
    assert distance(grads, expected[1]) < tolerance


def _gradients_or_none(model, x):
    try:
        return gradients(model, x)
    except RuntimeError as error:
        if not re.search("in-?place", str(error)):
            raise
        return None


@pytest.mark.parametrize(("name", "at"), WHERE)
def test_full_backward_hooks(name, at):
    plain, model, x = make(name)
    logs = [], []

    def watch(module, grad_input, grad_output, log):
        log.extend(g.clone() for g in (*grad_input, *grad_output) if g is not None)
        return tuple(None if g is None else 2 * g for g in grad_input)

    for m, log in zip((plain, model), logs, strict=True):
        m.get_submodule(at).register_full_backward_hook(functools.partial(watch, log=log))
    assert_right_or_error(plain, model, x)
    assert logs[0]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*logs, strict=True))


class Kept(Gated):
    """Keeps its intermediate results for others to look at."""

    def forward(self, x):
        self.made = {"gate": self.gate(x), "up": self.up(x)}
        self.made["activated"] = self.act(self.made["gate"])
        self.between()
        self.made["product"] = self.made["activated"] * self.made["up"]
        self.between()
        return self.down(self.made["product"])

    def between(self):
        pass


class KeptActivation(Kept):
    def forward(self, x):
        self.made = {"gate": self.gate(x)}
        self.made["activated"] = self.act(self.made["gate"])
        self.between()
        return self.down(self.made["activated"])


class KeptCall(Kept):
    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.silu


KEPT = {"module": Kept, "call": KeptCall, "ungated": KeptActivation}
RESULTS = [(kind, r) for kind in ("module", "call") for r in ("gate", "up", "activated", "product")]
RESULTS += [("ungated", "gate"), ("ungated", "activated")]


#: When results are looked at: before the next op, after the forward pass, and so that only their nodes are left then.
LOOKS = [
    (when, what)
    for when in ("between", "afterwards", "let go")
    for what in ("hook", "changing hook", "node", "retain_grad", "grad", "edge")
    if when != "let go" or what not in ("retain_grad", "grad")
]


@pytest.mark.parametrize(("when", "what"), LOOKS)
@pytest.mark.parametrize(("kind", "result"), RESULTS)
def test_gradients_of_intermediate_results(kind, result, when, what):
    seen = []
    plain, model, x = make(KEPT[kind])

    def watch(m, log):
        tensor = m.made.get(result)
        if tensor is None or log:
            return
        log.append(torch.autograd.graph.get_gradient_edge(tensor) if what == "edge" else None)
        if what == "retain_grad":
            tensor.retain_grad()
        elif what == "hook":
            tensor.register_hook(lambda g: log.append(g.clone()))
        elif what == "changing hook":
            tensor.register_hook(lambda g: g * 3)
        elif what == "node":
            tensor.grad_fn.register_hook(lambda inputs, outputs: log.append(outputs[0].clone()))

    for m in (plain, model):
        log = []
        if when == "between":
            m.between = functools.partial(watch, m, log)
        y = m(x).square().mean()
        watch(m, log)
        if when == "let go":
            m.made.clear()
        if what in ("grad", "edge"):
            log += torch.autograd.grad(y, log[0] if what == "edge" else m.made[result], retain_graph=True)
        m.zero_grad(set_to_none=True)
        y.backward()
        if what == "retain_grad":
            log.append(m.made[result].grad)
        seen.append((log[1:], {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    (expected, expected_grads), (got, grads) = seen
    assert len(got) == len(expected) == (0 if what == "changing hook" else 1)
    assert all(g is not None and torch.allclose(g, e, rtol=1e-5, atol=1e-8) for g, e in zip(got, expected, strict=True))
    assert distance(grads, expected_grads) < 2e-6


# What is changed in place, before or after it is used.

STEPS = ["made", "activated", "multiplied", "done"]
IN_PLACE = {
    "add_": lambda t: t.add_(1),
    "mul_": lambda t: t.mul_(0.5),
    "a column": lambda t: t[..., 0].zero_(),
    "through a view": lambda t: t.view(-1).mul_(2),
    "detached": lambda t: t.detach().add_(1),
}


class Changed(Gated):
    """Changes one of its intermediate results at a given step."""

    def __init__(self):
        super().__init__()
        self.change = None
        #: Whether all ops take copies, so that nothing saved is changed.
        self.copies = False

    def use(self, tensor):
        return tensor.clone() if self.copies else tensor

    def at(self, step, made):
        if self.change is not None:
            when, what, how = self.change
            if when == step and what in made:
                IN_PLACE[how](made[what])

    def forward(self, x):
        made = {"gate": self.gate(x), "up": self.up(x)}
        self.at("made", made)
        made["activated"] = self.act(self.use(made["gate"]))
        self.at("activated", made)
        made["product"] = self.use(made["activated"]) * self.use(made["up"])
        self.at("multiplied", made)
        y = self.down(self.use(made["product"]))
        self.at("done", made)
        return y


class ChangedCall(Changed):
    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.silu


class ChangedUngated(Changed):
    def forward(self, x):
        made = {"gate": self.gate(x)}
        self.at("made", made)
        made["activated"] = self.act(self.use(made["gate"]))
        self.at("activated", made)
        y = self.down(self.use(made["activated"]))
        self.at("done", made)
        return y


@pytest.mark.parametrize("converted_with", [False, True], ids=["later", "at conversion"])
@pytest.mark.parametrize("how", IN_PLACE)
@pytest.mark.parametrize("what", ["gate", "up", "activated", "product"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [Changed, ChangedCall, ChangedUngated])
def test_changes_in_place(kind, step, what, how, converted_with):
    change = step, what, how

    def build():
        model = kind()
        model.change = change if converted_with else None
        return model

    try:
        plain, model, x = make(build)
    except lomem.conversion.NothingToConvertError:
        assert converted_with
        return
    plain.change = model.change = change
    assert_right_or_error(plain, model, x)


@pytest.mark.parametrize("kind", [Shifted, GatedScaled])
def test_a_small_operand_is_updated_after_its_use(kind):
    # As statistics are, without gradients. A sum does not save it.
    class Updated(kind):
        def __init__(self):
            super().__init__()
            scale = self.scale.detach()
            del self.scale
            self.register_buffer("scale", scale)
            self.sum = kind is Shifted

        def forward(self, x):
            y = super().forward(x)
            with torch.no_grad():
                self.scale.mul_(0.9)
            return y

    plain, model, x = make(Updated)
    assert_right_or_error(plain, model, x)


def test_an_operand_from_inference_mode():
    class Given(Ungated):
        def forward(self, x, shift):
            return self.down(self.act(self.up(x)) + shift)

    with torch.inference_mode():
        shift = torch.randn(H)
    torch.manual_seed(0)
    plain, x = Given(), batch()
    model = Given()
    model.load_state_dict(plain.state_dict())
    lomem.convert(model, (x, shift.clone()), bits=16)
    _, expected = gradients(plain, x, lambda m, x: m(x, shift))
    _, grads = gradients(model, x, lambda m, x: m(x, shift))
    assert distance(grads, expected) < 2e-6


def test_an_activation_that_reads_an_attribute_is_no_pair():
    # It may be changed before the backward pass.
    with pytest.raises(lomem.conversion.NothingToConvertError):
        make(functools.partial(Ungated, Swish))


def test_training_mode_is_left_before_the_backward_pass():
    for name in ("QuickGELU", "gated NewGELU", "gelu"):
        plain, model, x = make(name)
        grads = []
        for m in (plain, model):
            y = m(x).square().mean()
            m.eval()
            y.backward()
            grads.append({n: p.grad for n, p in m.named_parameters()})
        assert distance(grads[1], grads[0]) < 2e-6


@pytest.mark.parametrize("bits", [None, 16])
def test_exact_pairs_inside_a_module_whose_own_calls_are_not(bits):
    torch.manual_seed(0)
    plain, x = Encoder(), batch()
    model = Encoder()
    model.load_state_dict(plain.state_dict())
    report = lomem.convert(model, x, bits=bits)
    actions = {d.name: d.action for d in report.converted}
    assert actions["pair.act"] == actions["called"] == "exact"
    assert actions.get("") == ("4bit" if bits is None else None)

    # From the gradient of its result, the gradient of the activation's input must follow exactly.
    seen = []
    for m in (model.pair.up, model.pair.act, model.called.up, model.called.down):
        m.register_forward_hook(lambda module, args, result: (seen.append(result), result.retain_grad())[0])
    model(x).square().mean().backward()
    up, activated, *_ = seen
    expected = torch.ops.aten.gelu_backward(activated.grad, up.detach())
    assert torch.allclose(up.grad, expected, rtol=1e-5, atol=1e-9)
    _, grads = gradients(model, x)
    _, expected = gradients(plain, x)
    # Weight gradients of the last layer depend on no derivative of an activation.
    assert torch.allclose(grads["called.down.weight"], expected["called.down.weight"], rtol=1e-4, atol=1e-7)
    assert torch.allclose(grads["called.up.weight"], expected["called.up.weight"], rtol=1e-4, atol=1e-7)
    assert torch.allclose(grads["pair.up.weight"], expected["pair.up.weight"], rtol=1e-4, atol=1e-7)


#: Shapes of inputs other than that at conversion.
SHAPES = [(0, 9, D), (2, 0, D), (1, 1, D), (7, D), (0, D), (D,), (2, 1, 3, 2, D)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [n for n in PAIRS if n not in ("experts", "transposed") and not PAIRS[n].rounds])
def test_another_shape(name, shape):
    plain, model, _ = make(name)
    x = batch(torch.float32, *shape)
    if name == "stacked" and 0 in shape:
        pytest.xfail("torch cannot infer a dimension")
    (_, expected), (_, grads) = (gradients_of_sum(m, x) for m in (plain, model))
    assert grads.keys() == expected.keys()
    assert all(torch.allclose(grads[n], g, rtol=1e-4, atol=1e-5) for n, g in expected.items())


def gradients_of_sum(model, x):
    y = model(x)
    y.sum().backward()
    return y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("part", ["gate", "up", "down", "q", "k", "modulation", "stem", "norm", "gate_up"])
@pytest.mark.parametrize(
    "name", ["gelu", "QuickGELU", "gated silu", "gated call", "gated NewGELU", "fused", "modulated"]
)
def test_frozen_parts(name, part, after):
    def freeze(model):
        for path, module in model.named_modules():
            if path == part:
                module.requires_grad_(False)

    torch.manual_seed(0)
    plain, x = PAIRS[name].make(), batch()
    if not hasattr(plain, part):
        return
    model = PAIRS[name].make()
    model.load_state_dict(plain.state_dict())
    freeze(plain)
    if not after:
        freeze(model)
    with contextlib.suppress(lomem.conversion.NothingToConvertError):  # of an MLP whose last layer is frozen
        lomem.convert(model, x, bits=16)
    freeze(model)
    for given in (x, x.detach()):
        _, expected = gradients(plain, given)
        _, grads = gradients(model, given)
        assert distance(grads, expected) < 2e-6
        assert saved_bytes(model, given) <= saved_bytes(plain, given)


@pytest.mark.parametrize("grad", ["no_grad", "inference_mode", "set_grad_enabled"])
@pytest.mark.parametrize("name", PAIRS)
def test_without_gradients(name, grad):
    plain, model, x = make(name)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(
        grad, functools.partial(torch.set_grad_enabled, False)
    )
    with context():
        a, b = plain(x), model(x)
        assert not b.requires_grad
        assert torch.allclose(a, b, rtol=0, atol=2e-6 if PAIRS[name].rounds else 0)
    plain.eval()
    model.eval()
    _, expected = gradients(plain, x)
    _, grads = gradients(model, x)
    assert distance(grads, expected) < 2e-6


@pytest.mark.parametrize(("gate", "up"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float32")])
@pytest.mark.parametrize("down", ["float32", "bfloat16", "float64"])
def test_mixed_dtypes(gate, up, down):
    dtypes = {n: getattr(torch, d) for n, d in {"gate": gate, "up": up, "down": down}.items()}

    class Mixed(Gated):
        def forward(self, x):
            gate, up = (m(x.to(m.weight.dtype)) for m in (self.gate, self.up))
            return self.down(self.product(gate, up).to(self.down.weight.dtype))

    def build():
        model = Mixed()
        for n, dtype in dtypes.items():
            getattr(model, n).to(dtype)
        return model

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build())
    plain, model = models
    x = batch()
    lomem.convert(model, x, bits=16)
    before, expected = gradients(plain, x)
    after, grads = gradients(model, x)
    assert torch.equal(after, before)
    assert {n: g.dtype for n, g in grads.items()} == {n: g.dtype for n, g in expected.items()}
    # The same products of the same numbers: rounded once in the narrowest dtype at most.
    assert distance(grads, expected) < (1e-2 if "bfloat16" in (gate, up, down) else 2e-6)
    assert saved_bytes(model, x) <= saved_bytes(plain, x)


@pytest.mark.parametrize("kind", [Fork, GatedFork, Modulated, Fused])
def test_results_used_elsewhere_too(kind):
    class Also(kind):
        def forward(self, x):
            seen = []
            layer = self.q if kind is Modulated else self.down
            handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            y = super().forward(x)
            handle.remove()
            return y + seen[0].square().mean(-1, keepdim=True)

    try:
        plain, model, x = make(Also)
    except lomem.conversion.NothingToConvertError:
        return
    before, expected = gradients(plain, x)
    after, grads = gradients(model, x)
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-6)
    assert distance(grads, expected) < 2e-6
    assert saved_bytes(model, x) <= saved_bytes(plain, x)
    assert living_bytes(model, x) <= living_bytes(plain, x)


def test_activations_in_place_are_no_pairs():
    for act in (functools.partial(nn.SiLU, inplace=True), functools.partial(nn.SiLU, True)):
        for kind in (Gated, Ungated):
            with pytest.raises(lomem.conversion.NothingToConvertError):
                make(functools.partial(kind, act))


def test_becomes_in_place_after_conversion():
    plain, model, x = make("gated silu")
    plain.act.inplace = model.act.inplace = True
    assert_right_or_error(plain, model, x)
    plain, model, x = make(functools.partial(Ungated, nn.SiLU))
    plain.act.inplace = model.act.inplace = True
    assert_right_or_error(plain, model, x)


def test_another_function_after_conversion():
    plain, model, x = make("called gelu")
    plain.function = model.function = F.silu
    assert_right_or_error(plain, model, x)
    plain.function = model.function = lambda t: F.gelu(t, approximate="tanh").relu()
    assert_right_or_error(plain, model, x)
    plain, model, x = make("gelu tanh")
    plain.act.approximate = model.act.approximate = "none"
    assert_right_or_error(plain, model, x)
    plain, model, x = make("gelu")
    plain.act.forward = model.act.forward = types.MethodType(lambda self, x: x.relu(), model.act)
    assert_right_or_error(plain, model, x)
