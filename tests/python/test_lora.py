"""Low-rank adapters: bit for bit those of torch's ops and of peft's layer, and what is saved."""

import copy
import io
import itertools
import re

import lomem
import pytest
import torch
import torch.nn.functional as F
from helpers import EPS
from lomem import reference
from lomem.memory import saved_for_backward
from torch import nn
from torch.utils.checkpoint import checkpoint

LF = lomem.functional
ops = torch.ops.lomem
BASE_DTYPES = [torch.float32, torch.bfloat16]
ADAPTER_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
of_bases = pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
of_adapters = pytest.mark.parametrize("adapter_dtype", ADAPTER_DTYPES, ids=str)
of_p = pytest.mark.parametrize("p", [0.0, 0.1])
of_autocast = pytest.mark.parametrize("autocast", [False, True])
#: Which of input, lora_a and lora_b are frozen.
FROZEN = [(), ("x",), ("a",), ("b",), ("x", "a"), ("x", "b"), ("a", "b")]
of_frozen = pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: "-".join(names) or "none")
ROWS, IN, RANK, OUT = 24, 40, 8, 32


def raises(message, kind=RuntimeError):
    return pytest.raises(kind, match="^" + re.escape(message))


def operands(shape, dtype, adapter_dtype, device, frozen=(), bias=False):
    """Input and weights by name; leaves that require grad, but for those that are frozen."""
    made = {
        "x": torch.randn(shape, device=device).to(dtype),
        "a": torch.randn(RANK, shape[-1], device=device).mul_(0.3).to(adapter_dtype),
        "b": torch.randn(OUT, RANK, device=device).mul_(0.3).to(adapter_dtype),
    }
    if bias:
        made["bias"] = torch.randn(OUT, device=device).to(adapter_dtype)
    return {name: t.requires_grad_(name not in frozen) for name, t in made.items()}


def run(function, tensors, autocast=False, seed=5, **options):
    """The result and the gradients of the tensors that require one, by the same random numbers."""
    torch.manual_seed(seed)
    x, *weights = (tensors[name] for name in "xab")
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = function(x, *weights, 1.75, bias=tensors.get("bias"), **options)
    leaves = [t for t in tensors.values() if t.requires_grad]
    grad = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_same(got, want):
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs), (mine - theirs).abs().max()


@of_frozen
@of_autocast
@of_p
@of_adapters
@of_bases
def test_torchs_bits(dtype, adapter_dtype, p, autocast, frozen, device):
    """Results and gradients: they are computed by the same ops."""
    for shape, bias in itertools.product([(IN,), (ROWS, IN), (2, 3, IN), (0, IN), (2, 3, 4, IN)], [False, True]):
        tensors = operands(shape, dtype, adapter_dtype, device, frozen, bias)
        got = run(LF.lora, tensors, autocast, p=p)
        assert_same(got, run(reference.lora, tensors, autocast, p=p))


@of_p
@pytest.mark.parametrize("frozen", [(), ("a",), ("x",)], ids=str)
def test_torchs_bits_in_other_layouts(frozen, p, device):
    for make in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat(1, 1, 2)[..., ::2],
        lambda x: x[:1].expand_as(x),
        lambda x: x.mT.contiguous().mT,
    ):
        tensors = operands((4, 6, IN), torch.float32, torch.float32, device, frozen)
        tensors["x"] = make(tensors["x"].detach()).requires_grad_("x" not in frozen)
        got, want = run(LF.lora, tensors, p=p), run(reference.lora, tensors, p=p)
        assert torch.equal(got[0], want[0])
        # Products of matrices in another order of memory: sums of up to 40 terms, in another order.
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=40 * EPS[torch.float32])


def test_float64_is_the_formula(device):
    """With an oracle that has no linear layers and no autograd."""
    tensors = operands((2, 3, IN), torch.float64, torch.float64, device, bias=True)
    y, *gradients = run(LF.lora, tensors)
    x, a, b, bias = (t.detach() for t in tensors.values())
    rows = x.reshape(-1, IN)
    grad = torch.linspace(-1, 1, y.numel(), device=device).double().view(-1, OUT)
    want = [
        ((rows @ a.T @ b.T + bias) * 1.75).view(2, 3, OUT),
        (1.75 * grad @ b @ a).view(2, 3, IN),
        1.75 * (grad @ b).T @ rows,
        1.75 * grad.T @ (rows @ a.T),
        1.75 * grad.sum(0),
    ]
    for mine, theirs in zip((y, *gradients), want, strict=True):
        # Sums of at most 40 terms of size 1 or so.
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@of_adapters
def test_nothing_is_dropped_without_training(adapter_dtype, device):
    tensors = operands((ROWS, IN), torch.bfloat16, adapter_dtype, device)
    assert_same(run(LF.lora, tensors, p=0.5, training=False), run(LF.lora, tensors))
    with torch.no_grad():
        want = reference.lora(*tensors.values(), 0.5)
        assert torch.equal(LF.lora(*tensors.values(), 0.5, p=0.9, training=False), want)


@of_p
@of_adapters
def test_without_gradients(p, adapter_dtype, device):
    tensors = operands((2, 3, IN), torch.bfloat16, adapter_dtype, device, bias=True).values()
    *arguments, bias = tensors
    for mode in (torch.no_grad(), torch.inference_mode()):
        results = []
        for function in (LF.lora, reference.lora):
            torch.manual_seed(3)
            with mode:
                results.append(function(*arguments, 2.0, bias=bias, p=p))
        assert torch.equal(*results)


@of_p
@of_frozen
def test_gradients_of_gradients(frozen, p, device):
    if "x" in frozen and "a" in frozen and "b" in frozen:
        return
    made = {
        "x": torch.randn(3, 4, dtype=torch.float64, device=device),
        "a": torch.randn(2, 4, dtype=torch.float64, device=device),
        "b": torch.randn(5, 2, dtype=torch.float64, device=device),
        "bias": torch.randn(5, dtype=torch.float64, device=device),
    }
    inputs = [t.requires_grad_(name not in frozen) for name, t in made.items()]

    def function(x, a, b, bias):
        torch.manual_seed(1)
        return LF.lora(x, a, b, 1.5, bias=bias, p=p)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# What is saved. ----------------------------------------------------------------------------------------------------


@of_frozen
@of_autocast
@of_p
@of_adapters
@of_bases
def test_saved_bytes(dtype, adapter_dtype, p, autocast, frozen, device):
    tensors = operands((3, 7, IN), dtype, adapter_dtype, device, frozen)
    computed = torch.bfloat16 if autocast else adapter_dtype
    weights = [tensors["a"], tensors["b"]]
    with (
        saved_for_backward(weights) as saved,
        torch.autocast(device.type, torch.bfloat16, enabled=autocast),
    ):
        LF.lora(*tensors.values(), p=p)
    x, a, b = (name not in frozen for name in "xab")
    parts = {
        "input": a * tensors["x"].nbytes,
        "product": b * 21 * RANK * computed.itemsize,
        "mask": (p > 0 and (x or a)) * (21 * IN + 7) // 8,
        # Casts of weights, as torch's linear layers save them.
        "casts": (computed != adapter_dtype) * computed.itemsize * RANK * (x * IN + (x or a) * OUT),
    }
    assert saved.nbytes == sum(parts.values()), parts


def test_less_is_saved_than_by_torch(device):
    """For bfloat16 inputs and float32 adapters with dropout, 2 + 1/8 bytes per element instead of 4 and a mask of 1 or
    4 bytes."""
    tensors = operands((256, 512), torch.bfloat16, torch.float32, device)
    saved = {}
    for function in (LF.lora, reference.lora):
        with saved_for_backward([tensors["a"], tensors["b"]]) as of_function:
            function(*tensors.values(), p=0.1)
        saved[function] = of_function.nbytes - 256 * RANK * 4
    assert saved[LF.lora] == 256 * 512 * 17 // 8
    # On the CPU dropout's mask has the dtype of its input; elsewhere it is bool. Then scaling saves nothing.
    assert saved[reference.lora] == 256 * 512 * (8 if device.type == "cpu" else 5)


def test_adapters_share_their_input(device):
    tensors = operands((ROWS, IN), torch.bfloat16, torch.float32, device)
    with saved_for_backward([tensors["a"], tensors["b"]]) as saved:
        for _ in range(3):
            LF.lora(*tensors.values(), p=0.5)
    assert saved.nbytes == tensors["x"].nbytes + 3 * (ROWS * RANK * 4 + ROWS * IN // 8)


def test_nothing_is_kept_after_backward(device):
    tensors = operands((ROWS, IN), torch.bfloat16, torch.float32, device)
    with saved_for_backward([tensors["a"], tensors["b"], tensors["x"]]) as saved:
        y = LF.lora(*tensors.values())
        y.sum().backward()
        product = next(iter(saved.storages))
    assert product.nbytes() == ROWS * RANK * 4
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


# Autocast, compilation, checkpointing, hooks. -----------------------------------------------------------------------


@of_p
def test_autocast_to_float16_and_of_float64(p, device):
    for dtypes in ((torch.float32, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float32)):
        tensors = operands((ROWS, IN), *dtypes, device)
        for autocast_dtype in (torch.bfloat16, torch.float16):
            results = []
            for function in (LF.lora, reference.lora):
                torch.manual_seed(0)
                with torch.autocast(device.type, autocast_dtype):
                    y = function(*tensors.values(), 0.25, p=p)
                results.append((y, *torch.autograd.grad(y.float().square().sum(), list(tensors.values()))))
            assert_same(*results)


def test_autocast_caches_differentiable_casts(device):
    """A cast of a weight made by an adapter serves torch's linear layer, and the other way round."""
    tensors = operands((ROWS, IN), torch.float32, torch.float32, device)
    for first in (True, False):
        with torch.autocast(device.type, torch.bfloat16):
            calls = [lambda: LF.lora(*tensors.values()), lambda: F.linear(tensors["x"], tensors["a"])]
            results = [call() for call in (calls if first else calls[::-1])]
        (got,) = torch.autograd.grad(sum(y.float().sum() for y in results), tensors["a"])
        with torch.autocast(device.type, torch.bfloat16):
            separate = [reference.lora(*tensors.values()), F.linear(tensors["x"], tensors["a"])]
        (want,) = torch.autograd.grad(sum(y.float().sum() for y in separate), tensors["a"])
        # Two gradients are added in bfloat16, in either order.
        torch.testing.assert_close(got, want, rtol=2 * EPS[torch.bfloat16], atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@of_autocast
def test_compile(autocast, dynamic, backend, device):
    def f(x, a, b, scaling, bias=None):
        return LF.lora(x * 2, a, b, scaling, bias=bias).cos()

    torch._dynamo.reset()  # else cases before count as versions of the same code
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (4, 5, 9):
        tensors = operands((rows, 3, IN), torch.bfloat16, torch.float32, device, bias=True)
        got, want = run(compiled, tensors, autocast), run(f, tensors, autocast)
        for mine, theirs in zip(got, want, strict=True):
            # A compiler may keep in float32 what eager code rounds to bfloat16: a few units of the largest terms.
            error = (mine.float() - theirs.float()).abs().max()
            assert error <= 8 * EPS[torch.bfloat16] * theirs.float().abs().max()


def test_compile_without_gradients(device):
    compiled = torch.compile(LF.lora, fullgraph=True, backend="aot_eager")
    tensors = operands((ROWS, IN), torch.bfloat16, torch.float32, device).values()
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), LF.lora(*tensors))


@of_p
def test_compiled_code_saves_no_more(p, device):
    tensors = operands((ROWS, 16 * IN), torch.bfloat16, torch.float32, device)
    x, a, b = tensors.values()
    saved = []
    # (With a partitioner, which decides what to save.)
    for f in (LF.lora, torch.compile(LF.lora, fullgraph=True, backend="aot_eager_decomp_partition")):
        with saved_for_backward([x, a, b]) as of_f:
            f(x, a, b, p=p)
        saved.append(of_f.nbytes)
    assert saved[1] <= saved[0]


def test_export_keeps_the_op(device):
    layer = lomem.nn.LoRALinear(nn.Linear(IN, OUT), 4).to(device)
    x = torch.randn(5, IN, device=device)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("rows")}})
    assert "lomem.lora.default" in [str(node.target) for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(x[:3]), layer(x[:3]))


@pytest.mark.parametrize("use_reentrant", [False, True])
@of_p
@of_autocast
def test_checkpointing(autocast, p, use_reentrant, device):
    tensors = operands((ROWS, IN), torch.bfloat16, torch.float32, device)

    def f(x, a, b):
        return LF.lora(x, a, b, 0.5, p=p)

    results = []
    for call in (f, lambda *args: checkpoint(f, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = call(*tensors.values())
        y.float().square().sum().backward()
        results.append((y.detach(), *(t.grad for t in tensors.values())))
        for t in tensors.values():
            t.grad = None
    assert_same(*results)


@of_p
def test_saved_tensor_hooks(p, device):
    tensors = operands((ROWS, IN), torch.bfloat16, torch.float32, device)
    want = run(LF.lora, tensors, p=p)
    with torch.autograd.graph.save_on_cpu():
        assert_same(run(LF.lora, tensors, p=p), want)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t.clone(), lambda t: t):
        assert_same(run(LF.lora, tensors, p=p), want)
    assert (torch.uint8 in seen) == (p > 0)


def test_changes_in_place_are_noticed(device):
    tensors = operands((ROWS, IN), torch.float32, torch.float32, device, frozen=("x",))
    y = LF.lora(*tensors.values())
    tensors["x"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(device):
    x, a, b = (t.detach() for t in operands((3, ROWS, IN), torch.float32, torch.float32, device).values())
    torch.testing.assert_close(torch.func.vmap(lambda x: LF.lora(x, a, b))(x), LF.lora(x, a, b))
    with raises("lomem::lora: p is 0.1 inside torch.func.vmap, expected 0", NotImplementedError):
        torch.func.vmap(lambda x: LF.lora(x, a, b, p=0.1))(x)


def test_transforms_raise(device):
    x, a, b = (t.detach() for t in operands((ROWS, IN), torch.float32, torch.float32, device).values())
    with pytest.raises(RuntimeError, match=r"functorch transforms|torch\.func"):
        torch.func.grad(lambda a: LF.lora(x, a, b).sum())(a)
    for i, name in enumerate(("input", "lora_a", "lora_b")):

        def of_one(t, i=i):
            return LF.lora(*(t if i == j else other for j, other in enumerate((x, a, b))))

        with raises(f"lomem::lora: {name} has a forward-mode tangent, expected none", NotImplementedError):
            torch.func.jvp(of_one, ((x, a, b)[i],), ((x, a, b)[i],))


# Errors. -----------------------------------------------------------------------------------------------------------

X, A, B = torch.ones(4, 8), torch.ones(2, 8), torch.ones(5, 2)
ERRORS = {
    "lora_a has shape [8], expected (rank, in_features)": ((X, A[0], B), {}),
    "input has shape [4, 7], expected a last dimension of 8, the in_features of lora_a": ((X[:, 1:], A, B), {}),
    "input has shape [], expected a last dimension of 8, the in_features of lora_a": ((X[0, 0], A, B), {}),
    "lora_b has shape [5], expected (out_features, rank)": ((X, A, B[:, 0]), {}),
    "lora_b has shape [2, 5], expected rank 2, that of lora_a": ((X, A, B.t()), {}),
    "lora_b has dtype float16, expected float32, the dtype of lora_a": ((X, A, B.half()), {}),
    "lora_a has dtype int64, expected float64, float32, bfloat16 or float16": ((X, A.long(), B), {}),
    "lora_a is on meta, expected cpu, the device of input": ((X, A.to("meta"), B), {}),
    "lora_b is on meta, expected cpu, the device of input": ((X, A, B.to("meta")), {}),
    "bias has shape [2], expected [5], the out_features of lora_b": ((X, A, B), {"bias": A[:, 0]}),
    "bias has dtype bfloat16, expected float32, the dtype of lora_a": ((X, A, B), {"bias": B[:, 0].bfloat16()}),
    "bias is on meta, expected cpu, the device of input": ((X, A, B), {"bias": B[:, 0].to("meta")}),
}
VALUE_ERRORS = {
    "scaling is inf, expected a finite number": ((X, A, B, float("inf")), {}),
    "scaling is nan, expected a finite number": ((X, A, B, float("nan")), {}),
    "p is 1, expected a number in [0, 1)": ((X, A, B), {"p": 1.0}),
    "p is -0.5, expected a number in [0, 1)": ((X, A, B), {"p": -0.5}),
    "p is nan, expected a number in [0, 1)": ((X, A, B), {"p": float("nan")}),
}


@pytest.mark.parametrize("message", [*ERRORS, *VALUE_ERRORS])
def test_errors(message):
    arguments, options = {**ERRORS, **VALUE_ERRORS}[message]
    kind = ValueError if message in VALUE_ERRORS else RuntimeError
    for requires_grad in (False, True):
        x = arguments[0].detach().requires_grad_(requires_grad)
        with raises(f"lomem::lora: {message}", kind):
            LF.lora(x, *arguments[1:], **options)


def test_error_of_the_dtype():
    with raises("lomem::lora: dtype is int32, expected float64, float32, bfloat16 or float16"):
        ops.lora(X, A, B, dtype=torch.int32)


def test_errors_of_the_weight_gradient():
    mask = torch.zeros(4, dtype=torch.uint8)
    for message, arguments in {
        "input has shape [3, 8], expected 4 rows, as grad_product has": (A.new_ones(4, 2), X[1:], None, 0.0),
        "input is on meta, expected cpu, the device of grad_product": (A.new_ones(4, 2), X.to("meta"), None, 0.0),
        "grad_product has no dimensions, expected at least 1": (A[0, 0], X, None, 0.0),
        "mask has 3 bytes, expected 4 for 32 elements of 1 bits": (A.new_ones(4, 2), X, mask[1:], 0.5),
    }.items():
        with raises(f"lomem::lora_weight_grad: {message}"):
            ops.lora_weight_grad(*arguments, torch.float32)
    with raises("lomem::lora_weight_grad: p is 1, expected a number in [0, 1)", ValueError):
        ops.lora_weight_grad(A.new_ones(4, 2), X, mask, 1.0, torch.float32)
    with raises("lomem::lora_weight_grad: dtype is int32, expected float64, float32, bfloat16 or float16"):
        ops.lora_weight_grad(A.new_ones(4, 2), X, mask, 0.5, torch.int32)


# The module. -------------------------------------------------------------------------------------------------------


def layer_of(base, r=RANK, **options):
    """A layer whose adapter is not 0."""
    layer = lomem.nn.LoRALinear(base, r, **options)
    with torch.no_grad():
        for parameter in layer.lora_B.parameters():
            parameter.normal_(std=0.3)
    return layer


def peft_layer(base, r=RANK, *, adapter_dtype, bias=False, **options):
    """The same of peft."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear

    config = peft.LoraConfig(r=r, lora_bias=bias, **options)
    layer = Linear(base, "default", config=config, r=r, lora_alpha=config.lora_alpha)
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    return layer


def load_from_peft(layer, theirs):
    """Copies the weights of peft's layer: only the adapter's name is dropped."""
    state = {name.replace(".default.", "."): value for name, value in theirs.state_dict().items()}
    layer.load_state_dict(state)


def step(layer, x, autocast, frozen):
    """The result, and gradients of input and adapter."""
    torch.manual_seed(7)
    x = x.detach().requires_grad_("x" not in frozen)
    for name, parameter in layer.named_parameters():
        parameter.grad = None
        if "lora_" in name:
            parameter.requires_grad_(("a" if "lora_A" in name else "b") not in frozen)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        # (Not a leaf: autocast caches casts of those, for base and adapter together.)
        y = layer(x * 1)
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)


@of_frozen
@of_autocast
@of_p
@of_adapters
@of_bases
def test_pefts_bits(dtype, adapter_dtype, p, autocast, frozen, device):
    base = nn.Linear(IN, OUT, device=device, dtype=dtype)
    for bias in (False, True):
        theirs = peft_layer(copy.deepcopy(base), adapter_dtype=adapter_dtype, bias=bias, lora_dropout=p, lora_alpha=12)
        theirs.base_layer.requires_grad_(False)
        with torch.no_grad():
            theirs.lora_B.default.weight.normal_(std=0.3)
        mine = lomem.nn.LoRALinear(base, RANK, alpha=12, dropout=p, bias=bias, dtype=adapter_dtype)
        load_from_peft(mine, theirs)
        x = torch.randn(2, 5, IN, device=device).to(dtype)
        assert_same(step(mine, x, autocast, frozen), step(theirs, x, autocast, frozen))
        for layer in (mine, theirs):
            layer.eval()
        assert_same(step(mine, x, autocast, frozen), step(theirs, x, autocast, frozen))


def test_state_dicts_of_peft_models(device):
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, OUT)).to(device)

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], use_rslora=True)
    theirs = peft.get_peft_model(make(), config)
    mine = make()
    for name in ("0", "2"):
        mine[int(name)] = layer_of(mine[int(name)], 4, alpha=8, use_rslora=True)
    # From ours to peft's: with the prefix that its adapter files have.
    adapters = {f"base_model.model.{name}": value for name, value in mine.state_dict().items() if "lora_" in name}
    assert set(peft.get_peft_model_state_dict(theirs)) == set(adapters)
    peft.set_peft_model_state_dict(theirs, adapters)
    x = torch.randn(3, IN, device=device)
    assert torch.equal(theirs(x), mine(x))
    # And back.
    for layer in (mine[0], mine[2]):
        layer.reset_parameters()
    assert not torch.equal(theirs(x), mine(x))
    state = peft.get_peft_model_state_dict(theirs)
    missing = mine.load_state_dict({k.removeprefix("base_model.model."): v for k, v in state.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("base_layer" in name for name in missing.missing_keys)
    assert torch.equal(theirs(x), mine(x))


@of_p
@of_bases
def test_module(dtype, p, device):
    """Without peft: the formula written out."""
    base = nn.Linear(IN, OUT, device=device, dtype=dtype)
    layer = layer_of(base, alpha=3.0, dropout=p, bias=True)
    assert [name for name, t in layer.named_parameters() if t.requires_grad] == [
        *("lora_A.weight", "lora_B.weight", "lora_B.bias")
    ]
    assert {t.dtype for t in (layer.lora_A.weight, layer.lora_B.weight, layer.lora_B.bias)} == {torch.float32}
    x = torch.randn(2, 5, IN, device=device).to(dtype)
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    update = reference.lora(x, layer.lora_A.weight, layer.lora_B.weight, 3.0 / RANK, bias=layer.lora_B.bias, p=p)
    assert got.dtype == dtype
    assert torch.equal(got, (base(x) + update).to(dtype))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))
    assert repr(layer).startswith(f"LoRALinear(\n  r=8, alpha=3.0, dropout={p}, use_rslora=False\n  (base_layer): Lin")


@of_autocast
@pytest.mark.parametrize("make_norm", [None, lomem.nn.MSRMSNorm])
def test_saved_bytes_of_modules(make_norm, autocast, device):
    """Three adapted layers on one tensor save it once; behind a norm that saves its output, they save nothing of it."""
    base = [nn.Linear(IN, OUT, device=device, dtype=torch.bfloat16) for _ in range(3)]
    layers = [layer_of(linear, dropout=0.1) for linear in base]
    x = torch.randn(ROWS, IN, device=device, dtype=torch.bfloat16, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    norm = nn.Identity() if make_norm is None else make_norm(IN, device=device, dtype=torch.bfloat16)
    with saved_for_backward(parameters) as saved, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        h = norm(x)
        for layer in layers:
            layer(h)
    computed = 2 if autocast else 4
    casts = 3 * RANK * (IN + OUT) * 2 if autocast else 0
    rstd = 0 if make_norm is None else ROWS * 4
    assert saved.nbytes == h.nbytes + rstd + casts + 3 * (ROWS * RANK * computed + ROWS * IN // 8)


class Block(nn.Module):
    """A norm and three adapted layers behind it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(IN, dtype=torch.bfloat16).requires_grad_(False)
        base = [nn.Linear(IN, IN, dtype=torch.bfloat16) for _ in range(3)]
        self.layers = nn.ModuleList(layer_of(linear, dropout=0.1) for linear in base)

    def forward(self, x):
        h = self.norm(x)
        return x + sum(layer(h) for layer in self.layers)


def test_norms_before_adapters_are_converted():
    """Theirs is the one copy that is saved of the norm's output, so that the norm need not save its input."""
    model = nn.Sequential(nn.Linear(IN, IN, dtype=torch.bfloat16), Block(), Block())
    x = torch.randn(ROWS, IN, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    for convert in (False, True):
        if convert:
            lomem.convert(model, x)
        with saved_for_backward([x, *model.parameters()]) as of_model:
            model(x)
        saved.append(of_model.nbytes)
    # The inputs of two norms. (One float32 a row is as much as torch's two numbers in bfloat16.)
    assert saved[0] - saved[1] == 2 * x.nbytes


def test_initial_values(device):
    base = nn.Linear(IN, OUT, device=device)
    layer = lomem.nn.LoRALinear(base, RANK, bias=True)
    assert not layer.lora_B.weight.any()
    assert not layer.lora_B.bias.any()
    # As nn.Linear: uniform within 1 / sqrt(in_features).
    assert 0.8 * IN**-0.5 < layer.lora_A.weight.abs().max() <= IN**-0.5
    x = torch.randn(3, IN, device=device)
    assert torch.equal(layer(x), base(x))
    assert lomem.nn.LoRALinear(base, 4, alpha=8).scaling == 2
    assert lomem.nn.LoRALinear(base, 4, alpha=8, use_rslora=True).scaling == 4
    assert lomem.nn.LoRALinear(nn.Linear(3, 2).double(), 1).lora_A.weight.dtype == torch.float64
    assert lomem.nn.LoRALinear(base.bfloat16(), 1, dtype=torch.float16).lora_B.weight.dtype == torch.float16
    assert lomem.nn.LoRALinear(nn.Linear(3, 2, device="meta"), 1).lora_A.weight.is_meta


@of_bases
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging(kind, bias, dtype, device):
    if kind == "conv1d":
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(OUT, IN).to(device, dtype)
    else:
        base = nn.Linear(IN, OUT, device=device, dtype=dtype)
    layer = layer_of(base, alpha=2.0, bias=bias)
    x = torch.randn(5, IN, device=device).to(dtype)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    want = layer(x)
    layer.merge()
    assert layer.merged
    assert layer(x).dtype == dtype
    # The weight is rounded once more, and so is the result.
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer(x), base(x))
    layer.enabled = False
    with raises("lomem.nn.LoRALinear: the adapter is merged and not enabled, expected a call of unmerge before"):
        layer(x)
    layer.enabled = True
    with raises("lomem.nn.LoRALinear.merge: the adapter is merged already, expected one that is not"):
        layer.merge()
    layer.unmerge()
    for name, t in layer.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=tolerance, atol=tolerance)
    with raises("lomem.nn.LoRALinear.unmerge: the adapter is not merged, expected one that is"):
        layer.unmerge()


def test_what_cannot_be_merged():
    base = nn.Linear(4, 4, bias=False)
    with raises("lomem.nn.LoRALinear.merge: the base has no bias, expected one for the adapter's to be added to"):
        lomem.nn.LoRALinear(base, 1, bias=True).merge()
    packed = SimpleLinear(torch.ones(8, 1, dtype=torch.uint8))
    with raises("lomem.nn.LoRALinear.merge: the base has a weight of torch.uint8, expected a floating-point weight"):
        lomem.nn.LoRALinear(packed, 1).merge()
    packed.weight = torch.ones(8, 1)
    with raises("lomem.nn.LoRALinear.merge: the base has a weight of shape (8, 1), expected (4, 4)"):
        lomem.nn.LoRALinear(packed, 1).merge()
    del packed.weight
    with raises("lomem.nn.LoRALinear.merge: the base has no weight, expected a floating-point weight"):
        lomem.nn.LoRALinear(packed, 1).merge()


class SimpleLinear(nn.Module):
    """A layer of another kind: it has its sizes, takes another argument, and returns what it likes."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)
        self.in_features = self.out_features = 4

    def forward(self, x, factor=1):
        return x.half() * factor


def test_other_bases():
    layer = layer_of(SimpleLinear(torch.ones(8, 1, dtype=torch.uint8)), 2)
    x = torch.randn(3, 4)
    update = reference.lora(x, layer.lora_A.weight, layer.lora_B.weight, 0.5)
    got = layer(x, factor=3)
    assert got.dtype == torch.float16
    assert torch.equal(got, (x.half() * 3 + update).half())
    # An adapter on an adapted layer: the first one is frozen.
    second = layer_of(layer, 1)
    assert [name for name, t in second.named_parameters() if t.requires_grad] == ["lora_A.weight", "lora_B.weight"]
    assert second(x).dtype == torch.float16


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantized_bases(kind):
    bnb = pytest.importorskip("bitsandbytes")
    make = getattr(bnb.nn, kind)
    options = {"compute_dtype": torch.float32} if kind == "Linear4bit" else {"has_fp16_weights": False}
    base = make(64, 32, **options)
    base.load_state_dict(nn.Linear(64, 32).state_dict())
    base = base.to("cpu")
    layer = layer_of(base, 4)
    x = torch.randn(3, 64, requires_grad=True)
    update = reference.lora(x, layer.lora_A.weight, layer.lora_B.weight, 0.25)
    got = layer(x)
    # (The base may run in another dtype, and then another time with other rounding.)
    torch.testing.assert_close(got, base(x) + update)
    got.sum().backward()
    assert x.grad is not None
    assert layer.lora_A.weight.grad is not None
    with raises("lomem.nn.LoRALinear.merge: the base has a weight of "):
        layer.merge()


def test_modules_are_copied_saved_and_compiled(device):
    layer = layer_of(nn.Linear(IN, OUT, device=device, dtype=torch.bfloat16), 4)
    x = torch.randn(5, IN, device=device, dtype=torch.bfloat16)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert [t.requires_grad for t in other.parameters()] == [t.requires_grad for t in layer.parameters()]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # A compiler keeps in float32 what eager code rounds.
    torch.testing.assert_close(compiled(x), layer(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("message", "make"),
    {
        "lomem.nn.LoRALinear: r is 0, expected at least 1": lambda: lomem.nn.LoRALinear(nn.Linear(3, 2), 0),
        "lomem::lora: p is 1, expected a number in [0, 1)": lambda: lomem.nn.LoRALinear(
            nn.Linear(3, 2), 1, dropout=1.0
        ),
        "lomem::lora: scaling is inf, expected a finite number": lambda: lomem.nn.LoRALinear(
            nn.Linear(3, 2), 1, alpha=float("inf")
        ),
        "lomem.nn.LoRALinear: base is a ReLU, expected a module with in_features and out_features": lambda: (
            lomem.nn.LoRALinear(nn.ReLU(), 1)
        ),
    }.items(),
)
def test_errors_of_the_module(message, make):
    with raises(message, ValueError):
        make()


def test_error_of_the_modules_dtype():
    with raises("lomem::lora: input has dtype int32, expected float64, float32, bfloat16 or float16"):
        lomem.nn.LoRALinear(nn.Linear(3, 2), 1, dtype=torch.int32)
