"""lomem.checkpoint: what a selective checkpoint saves of every op, and what it runs again."""

import collections
import functools

import lomem
import pytest
import torch
import torch.nn.functional as F
from activations_helpers import HARD, SMOOTH
from test_transforms import OPS, samples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

LF = lomem.functional
ops = torch.ops.lomem
aten = torch.ops.aten


class Count(TorchDispatchMode):
    """Counts the ops that run, by overload."""

    def __init__(self):
        super().__init__()
        self.runs = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func] += 1
        return func(*args, **(kwargs or {}))

    def of_lomem(self):
        return collections.Counter({op: count for op, count in self.runs.items() if op.namespace == "lomem"})


def run(f, x, save, parameters=()):
    """Gradients of f(x) in a region that saves some ops (None: without one), and what ran forward and backward."""
    torch.manual_seed(3)
    lomem.random.manual_seed(5)
    leaves = [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    leaves += parameters
    with Count() as forward:
        if save is None:
            y = f(x)
        else:
            contexts = functools.partial(create_selective_checkpoint_contexts, lomem.checkpoint.policy(save=save))
            y = checkpoint(f, x, use_reentrant=False, context_fn=contexts)
    with Count() as backward:
        gradients = torch.autograd.grad(y, leaves, allow_unused=True)
    return gradients, forward, backward


def same(one, other):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def all_of(op):
    """A region that needs every result of an op again in its backward pass."""

    def f(arguments):
        anchor, args, kwargs = arguments
        results = [leaf for leaf in tree_leaves(op(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        return sum((anchor.exp() * result.double().sum()).sum() for result in results)

    return f


#: Ops that a policy refuses: gradients, and what is made of other ops.
REFUSED = {name for name in OPS if name.endswith(("_backward", "_weight_grad"))} | {"lora"}
#: Where the samples of test_transforms drop nothing.
DROPPING = {
    "dropout": [((0.4,), {"saves": "mask"}), ((0.4,), {"saves": "seed"})],
    "dropout_forward": [((0.4,), {})],
    "seeded_dropout_forward": [((0.4,), {})],
}


def calls(name):
    x = torch.randn(4, 6)
    if name in DROPPING:
        leaf = name == "dropout"
        yield from (((x.clone().requires_grad_(leaf), *args), kwargs) for args, kwargs in DROPPING[name])
    yield from samples("cpu")[name]


@pytest.mark.parametrize("form", ["packet", "overload"])
@pytest.mark.parametrize("name", [name for name in OPS if name not in REFUSED])
def test_a_saved_op_does_not_run_again(name, form):
    packet = getattr(ops, name)
    op = packet if form == "packet" else packet.default
    counted = 0
    for args, kwargs in calls(name):
        x = (torch.randn(3, dtype=torch.float64).requires_grad_(), args, kwargs)
        want, forward, plain = run(all_of(packet.default), x, None)
        ours = forward.of_lomem()
        counted += sum(ours.values())
        saved, _, once = run(all_of(packet.default), x, [op])
        assert same(saved, want)
        assert once.of_lomem() == plain.of_lomem()
        again, _, twice = run(all_of(packet.default), x, [])
        assert same(again, want)
        assert twice.of_lomem() == plain.of_lomem() + ours
    assert counted > 0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_match_nothing_is_refused(name):
    with pytest.raises(ValueError, match=rf"^lomem\.checkpoint\.policy: save has lomem::{name}, which .*, expected "):
        lomem.checkpoint.policy(save=[getattr(ops, name)])


OPERANDS = {
    "dropout": lambda f, x: f(x, 0.3),
    "dequantize_groups": lambda f, x: f(*ops.quantize_groups(x.detach()), x.shape, dtype=torch.float32),
    "quantize_groups": lambda f, x: f(x.detach())[0],
    "gated": lambda f, x: f(x, x.sin()),
    "gated_linear": lambda f, x: f(x, x.sin(), torch.ones(5, 6)),
    "randomized_linear": lambda f, x: f(x, torch.ones(5, 6, requires_grad=True), proj_dim=2),
    "pack_bits": lambda f, x: f((x.detach() > 0).to(torch.uint8), 1),
    "unpack_bits": lambda f, x: f((x.detach() > 0).flatten().to(torch.uint8), 1, 192),
    **dict.fromkeys(["ms_layer_norm", "ms_rms_norm", "layer_norm", "rms_norm"], lambda f, x: f(x, (6,))),
    "threshold": lambda f, x: f(x, 0.1, -0.7),
}
#: Functions that run no op of their own: they describe steps, call a function of the user's, or make bits of bools.
WITHOUT_OP = {"drawn_levels", "step_function", "step_activation", "pack_bool_to_uint8", "unpack_uint8_to_bool"}


@pytest.mark.parametrize("name", [name for name in LF.__all__ if name not in WITHOUT_OP | {"lora"}])
def test_a_saved_function_does_not_run_again(name):
    function = getattr(LF, name)
    call = functools.partial(OPERANDS.get(name, lambda f, x: f(x)), function)
    f = lambda x: (call(x).double().sum() * x.exp()).sum()  # noqa: E731
    x = torch.randn(4, 6).requires_grad_()
    want, forward, plain = run(f, x, None)
    ours = forward.of_lomem()
    assert ours
    saved, _, once = run(f, x, [function])
    assert same(saved, want)
    # (What makes the argument of dequantize_groups is another op.)
    others = collections.Counter({ops.quantize_groups.default: 1} if name == "dequantize_groups" else {})
    assert once.of_lomem() == plain.of_lomem() + others
    again, _, twice = run(f, x, [])
    assert twice.of_lomem() == plain.of_lomem() + ours
    # (Without a seed, the codes of the second run have another dither.)
    assert same(again, want) == (name != "quantize_groups")


@pytest.mark.parametrize("name", sorted(WITHOUT_OP))
def test_functions_without_an_op_are_refused(name):
    with pytest.raises(ValueError, match=rf"save has lomem\.functional\.{name}, which runs no op of its own, expected"):
        lomem.checkpoint.policy(save=[getattr(LF, name)])


FORMS = [
    *({"bits": bits, "rounding": rounding} for bits in (1, 4, 8) for rounding in ("nearest", "stochastic")),
    {"bits": 2, "criterion": "paper"},
    {"steps": lomem.StepFunction([0.0], [0.0, 1.0])},
]


@pytest.mark.parametrize("name", [*SMOOTH, *HARD])
def test_an_activation_is_saved_in_all_its_forms_and_no_other_one_is(name):
    function = (SMOOTH[name] if name in SMOOTH else HARD[name])[0]
    named = getattr(function, "func", function)
    others = (LF.mish if named is not LF.mish else LF.silu, LF.relu if named is not LF.relu else LF.relu6)
    for options in FORMS if name in SMOOTH else [{}]:
        if options.get("criterion") == "paper" and name not in ("gelu", "gelu-tanh", "silu"):
            continue
        call = functools.partial(function, **options)
        f = lambda x: (others[0](others[1](call(x).sin())).sum() * x.exp()).sum()  # noqa: B023, E731
        x = torch.randn(4, 6).requires_grad_()
        want, forward, plain = run(f, x, None)
        saved, _, backward = run(f, x, [named])
        assert same(saved, want)
        assert sum(forward.of_lomem().values()) == 3
        assert sum(backward.of_lomem().values()) == sum(plain.of_lomem().values()) + 2


def test_a_published_step_function_is_not_any_of_its_activation():
    for function, other in ((LF.regelu2, LF.gelu), (LF.resilu2, LF.silu), (LF.regelu2, LF.resilu2)):
        f = lambda x: (function(x).sin() + other(x).sin() + other(x.detach()) * x).sum()  # noqa: B023, E731
        x = torch.randn(4, 6).requires_grad_()
        want, _, plain = run(f, x, None)
        saved, _, backward = run(f, x, [function])
        assert same(saved, want)
        assert sum(backward.of_lomem().values()) == sum(plain.of_lomem().values()) + 2


def test_ops_of_torch():
    w = torch.randn(6, 6, requires_grad=True)
    f = lambda x: (torch.mm(LF.ms_rms_norm(x, (6,)), w).sin() * torch.addmm(x, x, w).exp()).sum()  # noqa: E731
    x = torch.randn(4, 6).requires_grad_()
    want, _, plain = run(f, x, None)
    norm = ops.ms_rms_norm_forward.default
    cases = [
        ([aten.mm], (0, 1, 1)),
        ([aten.mm.default, aten.addmm], (0, 0, 1)),
        ((op for op in (aten.mm, LF.ms_rms_norm)), (0, 1, 0)),
        ([], (1, 1, 1)),
    ]
    for save, more in cases:
        got, _, backward = run(f, x, save)
        assert same(got, want)
        counts = [backward.runs[op] - plain.runs[op] for op in (aten.mm.default, aten.addmm.default, norm)]
        assert tuple(counts) == more


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        (aten.mm, TypeError, r"save is <OpOverloadPacket\(op='aten.mm'\)>, expected a list of ops"),
        (None, TypeError, "save is None, expected a list of ops"),
        ("mm", TypeError, "save is 'mm', expected a list of ops"),
        ([torch.mm], ValueError, "save has <built-in method mm .*>, expected ops of torch.ops and functions of"),
        ([F.gelu], ValueError, "save has <built-in function gelu>, expected ops of torch.ops and functions of"),
        ([aten.matmul], ValueError, "save has aten::matmul, which is made of other ops, expected ops that autograd"),
        ([aten.linear.default], ValueError, "save has aten::linear, which is made of other ops, expected ops that"),
        ([aten.mul_], ValueError, "save has aten::mul_, which writes to its arguments, expected ops that"),
        ([aten.mul.out], ValueError, "save has aten::mul, which writes to its arguments, expected ops that"),
    ],
)
def test_errors(save, error, message):
    with pytest.raises(error, match=rf"^lomem\.checkpoint\.policy: {message}"):
        lomem.checkpoint.policy(save=save)


def test_higher_order_ops_are_taken_as_they_are():
    flex = torch.ops.higher_order.flex_attention
    chosen = lomem.checkpoint.policy(save=[flex])
    assert chosen(None, flex, 1) == CheckpointPolicy.MUST_SAVE
    assert chosen(None, aten.mm.default, 1, 2) == CheckpointPolicy.PREFER_RECOMPUTE


# Random numbers. A saved op draws none when the region runs again, so the next op would draw those.


def drops(x):
    y = LF.dropout(x * 2, 0.5)
    y = torch.native_dropout(y, 0.5, True)[0].sin()
    return (LF.dropout(y, 0.5, saves="seed") * torch.rand_like(y)).sin().sum()


def test_torch_itself_goes_wrong():
    """What is prevented here. If this fails, the policy need not save more than it is told."""
    x = torch.randn(40, 40).requires_grad_()
    want, *_ = run(drops, x, None)
    contexts = functools.partial(create_selective_checkpoint_contexts, [ops.dropout_forward.default])
    torch.manual_seed(3)
    y = checkpoint(drops, x, use_reentrant=False, context_fn=contexts)
    assert not same(torch.autograd.grad(y, x), want)


@pytest.mark.parametrize(
    "save", [[], [LF.dropout], [ops.dropout_forward], [aten.native_dropout], [aten.rand_like], [aten.sin]]
)
def test_ops_that_draw_are_saved_together(save):
    x = torch.randn(40, 40).requires_grad_()
    want, forward, plain = run(drops, x, None)
    got, _, backward = run(drops, x, save)
    assert same(got, want)
    random = [op for op in forward.runs if torch.Tag.nondeterministic_seeded in op.tags]
    assert len(random) == 4
    again = [backward.runs[op] - plain.runs[op] for op in random]
    assert again == [int(save in ([], [aten.sin]))] * 4


def test_attention_without_dropout_draws_nothing():
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    q = torch.randn(1, 2, 8, 4).requires_grad_()
    f = lambda q: LF.dropout(F.dropout(F.scaled_dot_product_attention(q, q, q), 0.3), 0.3).sin().sum()  # noqa: E731
    want, _, plain = run(f, q, None)
    got, _, backward = run(f, q, [flash])
    assert same(got, want)
    for op, more in ((flash.default, 0), (ops.dropout_forward.default, 1), (aten.bernoulli_.float, 1)):
        assert backward.runs[op] - plain.runs[op] == more


def test_attention_with_dropout_draws():
    """By its arguments alone: on the CPU, attention with dropout runs as other ops."""
    attention = aten._scaled_dot_product_efficient_attention
    chosen = lomem.checkpoint.policy(save=[attention])
    q = torch.randn(1, 2, 8, 4)
    plain, dropping = (
        (None, attention.default, q, q, q, None, True),
        (None, attention.default, q, q, q, None, True, 0.3),
    )
    drop = (None, ops.dropout_forward.default, q, 0.3)
    assert chosen(*plain) == CheckpointPolicy.MUST_SAVE
    assert chosen(*drop) == CheckpointPolicy.PREFER_RECOMPUTE
    assert chosen(*dropping) == CheckpointPolicy.MUST_SAVE
    assert chosen(*drop) == CheckpointPolicy.MUST_SAVE
    beside = lomem.checkpoint.policy(save=[LF.dropout])
    assert beside(*plain) == CheckpointPolicy.PREFER_RECOMPUTE
    assert beside(*dropping) == CheckpointPolicy.MUST_SAVE


def test_an_op_that_draws_in_place_is_refused():
    f = lambda x: F.dropout(LF.dropout(x, 0.5), 0.5).sin().sum()  # noqa: E731
    x = torch.randn(4, 6).requires_grad_()
    want, *_ = run(f, x, None)
    assert same(run(f, x, [aten.sin])[0], want)
    with pytest.raises(
        RuntimeError,
        match=r"save has lomem::dropout_forward, and the region also runs aten::bernoulli_\.float, expected no op that",
    ):
        run(f, x, [ops.dropout_forward])


def test_lomems_own_stream_is_another_one():
    f = lambda x: LF.gelu(F.dropout(x, 0.5), bits=3, rounding="stochastic").sin().sum()  # noqa: E731
    x = torch.randn(4, 6).requires_grad_()
    want, _, plain = run(f, x, None)
    got, _, backward = run(f, x, [LF.gelu])
    assert same(got, want)
    assert backward.runs[aten.bernoulli_.float] - plain.runs[aten.bernoulli_.float] == 1


def test_codes_in_groups_keep_their_seed():
    """Dither of another seed would not be that of the codes, and nearly double the noise of gradients."""
    layers = [torch.nn.LayerNorm(256), torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)]
    net = torch.nn.Sequential(*layers)
    assert len(lomem.convert(net, torch.randn(4, 256), bits=8).converted) == 2
    f = lambda x: net(x).sin().sum()  # noqa: E731
    x = torch.randn(8, 256).requires_grad_()
    want, forward, _ = run(f, x, None, net.parameters())
    assert forward.runs[ops.quantize_groups.default] == 2
    got, _, backward = run(f, x, [LF.quantize_groups], net.parameters())
    assert same(got, want)
    assert backward.runs[ops.quantize_groups.default] == 0


# Compilers.


def test_compiled():
    """The backward graph holds what is not saved, and nothing that is."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    w = torch.randn(6, 6, requires_grad=True)

    def block(x):
        return LF.gelu(torch.mm(LF.ms_rms_norm(x, (6,)), w)).sin()

    def backward_ops(save):
        graphs = []

        def keep(graph, inputs):
            graphs.append({str(node.target) for node in graph.graph.nodes})
            return make_boxed_func(graph)

        backend = aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph),
            bw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
        )
        contexts = functools.partial(create_selective_checkpoint_contexts, lomem.checkpoint.policy(save=save))
        f = lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # noqa: E731
        torch._dynamo.reset()
        x = torch.randn(4, 6).requires_grad_()
        got = torch.autograd.grad(torch.compile(f, backend=backend, fullgraph=True)(x).sum(), (x, w))
        assert same(got, torch.autograd.grad(block(x).sum(), (x, w)))
        return graphs[0]

    names = {LF.gelu: "lomem.fused_activation_forward.default", LF.ms_rms_norm: "lomem.ms_rms_norm_forward.default"}
    for save in ([], [LF.gelu], [LF.ms_rms_norm], [LF.gelu, LF.ms_rms_norm, aten.mm]):
        found = backward_ops(save)
        assert {name for name in names.values() if name in found} == {
            name for function, name in names.items() if function not in save
        }
