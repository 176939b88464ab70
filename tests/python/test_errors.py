"""Bad input: one sentence that names op, argument, the value got and the value wanted; never a crash."""

import math
import re
from functools import partial

import lomem
import pytest
import torch
from helpers import PUBLISHED
from torch._subclasses.fake_tensor import FakeTensorMode

LF = lomem.functional
ops = torch.ops.lomem
X = torch.ones(4, 8)
GELU2 = next(iter(PUBLISHED))
gelu2 = PUBLISHED[GELU2].op
# How many parameters each function of step_activation and of hard_activation has.
FEW_BIT = {name: len(parameters) for name, parameters, exact, _ in lomem._C.activations() if not exact}
EXACT = {name: len(parameters) for name, parameters, exact, _ in lomem._C.activations() if exact}
WRONG_DTYPES = {
    "int32": torch.ones(4, 8, dtype=torch.int32),
    "uint8": torch.ones(4, 8, dtype=torch.uint8),
    "bool": torch.ones(4, 8, dtype=torch.bool),
    "complex64": torch.ones(4, 8, dtype=torch.complex64),
}
FLOATS = "expected float64, float32, bfloat16 or float16"


def raises(message, kinds=(RuntimeError, ValueError)):
    return pytest.raises(kinds, match="^" + re.escape(message))


@pytest.mark.parametrize("name", WRONG_DTYPES)
def test_wrong_dtype_of_input(name):
    bad = WRONG_DTYPES[name]
    for op, call in {
        **{name: partial(getattr(ops, name), bad) for name in PUBLISHED},
        "step_activation": lambda: LF.gelu(bad),
        "fused_activation_forward": lambda: ops.fused_activation_forward(bad, "silu", [0.0], 1),
        "ms_layer_norm": lambda: LF.ms_layer_norm(bad, (8,)),
        "ms_rms_norm": lambda: LF.ms_rms_norm(bad, (8,)),
    }.items():
        with raises(f"lomem::{op}: input has dtype {name}, {FLOATS}"):
            call()
    for op in (LF.ms_layer_norm, LF.ms_rms_norm):
        with raises(f"lomem::{op.__name__}: weight has dtype {name}, {FLOATS}"):
            op(X, (8,), bad[0])
    if name != "uint8":
        with raises(f"lomem::pack_bits: codes has dtype {name}, expected uint8"):
            LF.pack_bits(bad, 2)
        with raises(f"lomem::unpack_bits: packed has dtype {name}, expected uint8"):
            LF.unpack_bits(bad, 2, 4)
        with raises(f"lomem::step_activation_backward: codes has dtype {name}, expected uint8"):
            ops.step_activation_backward(X, bad, [0.0, 1.0, 2.0, 3.0], 2)
    with raises(f"lomem::step_activation_backward: grad_output has dtype {name}, {FLOATS}"):
        ops.step_activation_backward(bad, torch.zeros(8, dtype=torch.uint8), [0.0, 1.0, 2.0, 3.0], 2)


def test_complex_input_with_gradient():
    with raises(f"lomem::step_activation: input has dtype complex64, {FLOATS}"):
        gelu2(WRONG_DTYPES["complex64"].clone().requires_grad_())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_other_layouts(requires_grad):
    sparse = torch.eye(4).to_sparse().requires_grad_(requires_grad)
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)]).requires_grad_(requires_grad)
    for op, call in {
        "step_activation": gelu2,
        "hard_activation": LF.relu,
        **{name: getattr(ops, name) for name in PUBLISHED},
        "ms_layer_norm": lambda x: LF.ms_layer_norm(x, (4,)),
        "ms_rms_norm": lambda x: LF.ms_rms_norm(x, (4,)),
    }.items():
        with raises(f"lomem::{op}: input has layout Sparse, expected a dense (torch.strided) tensor"):
            call(sparse)
        with raises(f"lomem::{op}: input is a nested tensor, expected a dense one"):
            call(nested)
    with raises("lomem::ms_layer_norm: weight has layout Sparse, expected a dense (torch.strided) tensor"):
        LF.ms_layer_norm(torch.ones(4), (4,), torch.ones(4).to_sparse())


FLOAT_VALUES = torch.tensor([[1.0, -2.0, 0.0, 4.0], [0.5, 1.0, 3.0, 1.0], [0.0, 1.0, 2.0, 1.0], [1.0, 1.0, 0.0, 5.0]])
BYTE_VALUES = (FLOAT_VALUES > 0).to(torch.uint8)
NESTED = "is a nested tensor, expected a dense one"
JAGGED = {"layout": torch.jagged}
DENSE = "expected a dense (torch.strided) tensor"

# kind -> the tensor, made of dense values; what is said of it
ODD_TENSORS = {
    "coo": (lambda t: t.to_sparse(), f"has layout Sparse, {DENSE}"),
    "coo of meta": (lambda t: t.to_sparse().to("meta"), f"has layout Sparse, {DENSE}"),
    "hybrid coo": (lambda t: t.to_sparse(1), f"has layout Sparse, {DENSE}"),
    "csr": (lambda t: t.to_sparse_csr(), f"has layout SparseCsr, {DENSE}"),
    "csc": (lambda t: t.to_sparse_csc(), f"has layout SparseCsc, {DENSE}"),
    "bsr": (lambda t: t.to_sparse_bsr((2, 2)), f"has layout SparseBsr, {DENSE}"),
    "bsc": (lambda t: t.to_sparse_bsc((2, 2)), f"has layout SparseBsc, {DENSE}"),
    "nested": (lambda t: torch.nested.nested_tensor([t[:1], t[1:]]), NESTED),
    "jagged": (lambda t: torch.nested.nested_tensor([t[:1], t[1:]], **JAGGED), NESTED),
    "jagged with holes": (lambda t: torch.nested.narrow(t, 1, 0, torch.arange(1, 5), torch.jagged), NESTED),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 10, torch.quint8), "has dtype quint8, expected "),
    "quantized by channel": (
        lambda t: torch.quantize_per_channel(t.float(), torch.ones(4), torch.zeros(4), 0, torch.qint8),
        "has dtype qint8, expected ",
    ),
    "onednn": (lambda t: t.float().to_mkldnn(), f"has layout Mkldnn, {DENSE}"),
    "too many": (lambda t: t[0, 0].expand(2**59), "has 576460752303423488 elements, expected at most 5764607523034"),
    "far too many": (lambda t: t[0, 0].expand(2**62, 1), "has 4611686018427387904 elements, expected at most 57646"),
    "too many of meta": (lambda t: t[0, 0].to("meta").expand(2**60), "has 1152921504606846976 elements, expected at m"),
}
ROWS = FLOAT_VALUES[:, :1]
# op -> arguments that it takes; tensors of them are exchanged one by one
GOOD_ARGUMENTS = {
    **dict.fromkeys(PUBLISHED, (FLOAT_VALUES,)),
    "step_activation": (FLOAT_VALUES, "gelu", [], 3),
    "step_activation_forward": (FLOAT_VALUES, "gelu", [], 3),
    "hard_activation": (FLOAT_VALUES, "relu", []),
    "hard_activation_forward": (FLOAT_VALUES, "relu", []),
    "fused_activation_forward": (FLOAT_VALUES, "gelu", [0.0], 1),
    "step_codes": (FLOAT_VALUES, [0.0], 1),
    "band_codes": (FLOAT_VALUES, 0.0, 1.0),
    "step_activation_backward": (FLOAT_VALUES, BYTE_VALUES[0], [0.0] * 4, 2),
    "drawn_activation": (FLOAT_VALUES, "gelu", [], 3),
    "drawn_activation_forward": (FLOAT_VALUES, "gelu", [], 3),
    "drawn_activation_backward": (FLOAT_VALUES, BYTE_VALUES[0], torch.tensor(3), 0.0, 0.4, 2),
    "drawn_codes": (FLOAT_VALUES, "gelu", [], 3, torch.tensor(3)),
    "dropout": (FLOAT_VALUES, 0.5),
    "dropout_forward": (FLOAT_VALUES, 0.5),
    "dropout_apply": (FLOAT_VALUES, BYTE_VALUES[0, :2], 0.5),
    "seeded_dropout_forward": (FLOAT_VALUES, 0.5),
    "seeded_dropout_apply": (FLOAT_VALUES, torch.tensor(3), 0.5),
    "gated": (FLOAT_VALUES, FLOAT_VALUES, "silu"),
    "gated_backward": (FLOAT_VALUES, FLOAT_VALUES, FLOAT_VALUES, "silu"),
    "gated_linear": (FLOAT_VALUES, FLOAT_VALUES, FLOAT_VALUES, FLOAT_VALUES[1], "silu"),
    "lora": (FLOAT_VALUES, FLOAT_VALUES, FLOAT_VALUES),
    "lora_weight_grad": (FLOAT_VALUES, FLOAT_VALUES, BYTE_VALUES.flatten()[:2], 0.5, torch.float32),
    "ms_layer_norm": (FLOAT_VALUES, [4], FLOAT_VALUES[1], FLOAT_VALUES[1]),
    "ms_layer_norm_forward": (FLOAT_VALUES, [4], FLOAT_VALUES[1], FLOAT_VALUES[1]),
    "ms_layer_norm_backward": (
        *(FLOAT_VALUES, FLOAT_VALUES, ROWS, [4], FLOAT_VALUES[1], FLOAT_VALUES[1]),
        *(torch.float32, [True, True, True]),
    ),
    "ms_rms_norm": (FLOAT_VALUES, [4], FLOAT_VALUES[1]),
    "ms_rms_norm_forward": (FLOAT_VALUES, [4], FLOAT_VALUES[1]),
    "ms_rms_norm_backward": (
        *(FLOAT_VALUES, FLOAT_VALUES, ROWS, [4], FLOAT_VALUES[1]),
        *(torch.float32, [True, True]),
    ),
    "pack_bits": (BYTE_VALUES, 1),
    "unpack_bits": (BYTE_VALUES[0], 2, 16),
    "quantize_groups": (FLOAT_VALUES,),
    "dequantize_groups": (BYTE_VALUES[0], FLOAT_VALUES[0, :1].bfloat16(), [4], None, torch.float32),
}
TENSOR_ARGUMENTS = [
    (name, i)
    for name, values in GOOD_ARGUMENTS.items()
    for i, value in enumerate(values)
    if torch.is_tensor(value) and value.dtype != torch.int64  # (A seed's errors are others.)
]
REGISTERED = {name.removeprefix("lomem::") for name in torch._C._dispatch_get_all_op_names() if "lomem::" in name}


def odd_tensor(kind, dtype):
    make, message = ODD_TENSORS[kind]
    return make(FLOAT_VALUES if dtype.is_floating_point else BYTE_VALUES), message


class TestOddTensors:
    """Every op refuses every kind of tensor that it has no kernel for, at every place, by a sentence of its own."""

    def test_every_op_is_here(self):
        assert set(GOOD_ARGUMENTS) == {name for name in REGISTERED if not name.startswith("randomized_linear")}
        for name, arguments in GOOD_ARGUMENTS.items():
            getattr(ops, name)(*arguments)

    @pytest.mark.parametrize("kind", ODD_TENSORS)
    @pytest.mark.parametrize(("name", "position"), TENSOR_ARGUMENTS)
    def test_op(self, name, position, kind):
        for mode in ("grad", "leaf", "no_grad", "inference"):
            self.refuses(name, position, kind, mode)

    @staticmethod
    def refuses(name, position, kind, mode):
        arguments = list(GOOD_ARGUMENTS[name])
        bad, message = odd_tensor(kind, arguments[position].dtype)
        if mode == "leaf" and bad.is_floating_point() and not bad.is_quantized:
            bad = bad.detach().requires_grad_()
        arguments[position] = bad
        op = getattr(ops, name).default
        argument = op._schema.arguments[position].name
        # In inference mode a jagged tensor goes to its class, which knows only torch's ops and those made of others.
        made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(f"lomem::{name}", "CompositeImplicitAutograd")
        python = mode == "inference" and "jagged" in kind and not made_of_others
        expected = f"lomem.{name}.default" if python else f"lomem::{name}: {argument} {message}"
        kinds = NotImplementedError if python else (RuntimeError, ValueError)
        grad = mode in ("grad", "leaf")
        with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(grad), raises(expected, kinds):
            op(*arguments)

    FUNCTIONS = {  # noqa: RUF012
        **{name: entry.op for name, entry in PUBLISHED.items()},
        f"{GELU2}-fast": lambda x: gelu2(x, fast=True),
        "gelu": LF.gelu,
        "elu": LF.elu,
        "relu": LF.relu,
        "threshold": lambda x: LF.threshold(x, 0.1, 0.2),
        "step_activation": lambda x: LF.step_activation(x, torch.sigmoid, [0.0], [0.0, 1.0]),
        "dropout": LF.dropout,
        "gated": lambda x: LF.gated(x, FLOAT_VALUES),
        "gated_linear": lambda x: LF.gated_linear(x, FLOAT_VALUES, FLOAT_VALUES),
        "lora": lambda x: LF.lora(x, FLOAT_VALUES, FLOAT_VALUES),
        "ms_layer_norm": lambda x: LF.ms_layer_norm(x, (4,)),
        "ms_rms_norm": lambda x: LF.ms_rms_norm(x, (4,)),
        "pack_bits": lambda x: LF.pack_bits(x, 1),
        "unpack_bits": lambda x: LF.unpack_bits(x, 2, 16),
        "quantize_groups": LF.quantize_groups,
        "pack_bool_to_uint8": LF.pack_bool_to_uint8,
        "unpack_uint8_to_bool": lambda x: LF.unpack_uint8_to_bool(x, (8,)),
    }

    @pytest.mark.parametrize("kind", [kind for kind in ODD_TENSORS if "jagged" not in kind])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_function(self, name, kind):
        bad, message = odd_tensor(kind, torch.uint8 if "pack" in name else torch.float32)
        if name == "pack_bool_to_uint8":  # of which there are neither quantized ones nor oneDNN's
            bad = bad if bad.is_quantized or kind == "onednn" else ODD_TENSORS[kind][0](BYTE_VALUES.bool())
            message = message if bad.dtype == torch.bool else "has dtype "
        # (Python's names of layouts are others.)
        said = re.sub(r"layout \w+", r"layout [\\w.]+", re.escape(message).replace("\\ ", " "))
        pattern = rf"^lomem(::|\.functional\.)\w+: \w+ {said}"
        leaves = bad.is_floating_point() and not bad.is_quantized
        for x in (bad, bad.detach().requires_grad_()) if leaves else (bad,):
            with pytest.raises((RuntimeError, ValueError), match=pattern):
                self.FUNCTIONS[name](x)

    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if "pack" in name])
    def test_packing_of_jagged_tensors(self, name, inference):
        # (Of these, activations and norms are torch's.)
        with torch.inference_mode(inference):
            bad, message = odd_tensor("jagged", torch.uint8)
            bad = bad.bool() if name == "pack_bool_to_uint8" else bad
            with pytest.raises(ValueError, match=rf"^lomem(::|\.functional\.)\w+: \w+ {message}"):
                self.FUNCTIONS[name](bad)

    @pytest.mark.parametrize("numel", [-(2**70), -(2**63), -1, 2**59, 2**60, 2**62, 2**63 - 1, 2**63, 2**70])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_numel(self, numel, device):
        packed = BYTE_VALUES[0].to(device)
        with raises(f"lomem::unpack_bits: numel is {numel}, expected 0 to 576460752303423487", ValueError):
            LF.unpack_bits(packed, 1, numel)

    @pytest.mark.parametrize("shape", [(2**32, 2**32), (2**31, 2**31), (2**62,), (2**40, 2**40, 3)])
    def test_shape_of_bools(self, shape):
        # (2**64 elements are not none.)
        with raises(f"lomem::unpack_bits: numel is {math.prod(shape)}, expected 0 to 576460752303423487", ValueError):
            LF.unpack_uint8_to_bool(BYTE_VALUES[0], shape)

    @pytest.mark.parametrize("shape", [(-1,), (4, -8), (-4, -8), (0, -1)])
    def test_negative_sizes_of_bools(self, shape):
        message = f"lomem.functional.unpack_uint8_to_bool: shape is {shape}, expected no negative size"
        with raises(message, ValueError):
            LF.unpack_uint8_to_bool(BYTE_VALUES[0], shape)


def test_mixed_devices():
    # Shapes only, so that no GPU is needed.
    with FakeTensorMode():
        cpu, cuda = torch.empty(4, 8), torch.empty(4, 8, device="cuda")
        weight = {tensor: torch.empty(8, device=tensor.device) for tensor in (cpu, cuda)}
        for op, name in ((LF.ms_layer_norm, "ms_layer_norm"), (LF.ms_rms_norm, "ms_rms_norm")):
            with raises(f"lomem::{name}: weight is on cpu, expected cuda:0, the device of input"):
                op(cuda, (8,), weight[cpu])
            with raises(f"lomem::{name}: weight is on cuda:0, expected cpu, the device of input"):
                op(cpu, (8,), weight[cuda])
        with raises("lomem::ms_layer_norm: bias is on cpu, expected cuda:0, the device of input"):
            LF.ms_layer_norm(cuda, (8,), None, weight[cpu])


def test_cuda_in_a_build_without_cuda():
    calls = {
        "step_activation_forward": (X, "gelu", [], 3),
        "fused_activation_forward": (X, "gelu", [0.0], 1),
        "hard_activation_forward": (X, "relu", []),
        "step_codes": (X, [0.0], 1),
        "band_codes": (X, 0.0, 1.0),
        "drawn_activation_forward": (X, "gelu", [], 3),
        "drawn_activation_backward": (X, X.to(torch.uint8), torch.tensor(3), 0.0, 0.4, 2),
        "drawn_codes": (X, "gelu", [], 3, torch.tensor(3)),
        "step_activation_backward": (X, torch.zeros(8, dtype=torch.uint8), [0.0] * 4, 2),
        "dropout_forward": (X, 0.5),
        "dropout_apply": (X, torch.zeros(4, dtype=torch.uint8), 0.5),
        "seeded_dropout_forward": (X, 0.5),
        "seeded_dropout_apply": (X, torch.tensor(3), 0.5),
        "gated": (X, X, "silu"),
        "gated_backward": (X, X, X, "silu"),
        "ms_layer_norm": (X, [8]),
        "ms_layer_norm_forward": (X, [8]),
        "ms_layer_norm_backward": (X, X, X[:, :1], [8], None, None, torch.float32, [True, False, False]),
        "ms_rms_norm": (X, [8]),
        "ms_rms_norm_forward": (X, [8]),
        "ms_rms_norm_backward": (X, X, X[:, :1], [8], None, torch.float32, [True, False]),
        "pack_bits": (X.to(torch.uint8), 2),
        "unpack_bits": (X.to(torch.uint8), 2, 128),
        "quantize_groups": (X,),
        "dequantize_groups": (X.to(torch.uint8), X[0, :1].bfloat16(), [32], None, torch.float32),
    }
    # Of torch's ops, which have kernels of their own.
    composite = {
        *PUBLISHED,
        "step_activation",
        "drawn_activation",
        "hard_activation",
        "dropout",
        "gated_linear",
        "lora",
        "lora_weight_grad",
    }
    composite.update(name for name in REGISTERED if name.startswith("randomized_linear"))
    assert {f"lomem::{name}" for name in composite.union(calls)} == {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lomem::")
    }
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, args in calls.items():
        # As dispatched for tensors on a GPU, which this machine may not have.
        if lomem._C.cuda_archs():
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lomem::{name}", "CUDA") == bool(torch.version.cuda)
        else:
            message = f"lomem::{name}: got a tensor on cuda, expected cpu: this lomem was built without CUDA kernels"
            with raises(message, NotImplementedError):
                getattr(ops, name).default.redispatch(cuda, *args)


@pytest.mark.parametrize("approximate", ["", "Tanh", "exact"])
def test_approximate(approximate):
    message = f"approximate is '{approximate}', expected 'none' or 'tanh'"
    for x in (X, X.clone().requires_grad_()):
        with raises(f"lomem.functional.{GELU2}: {message}", ValueError):
            gelu2(x, approximate)
        with raises(f"lomem::{GELU2}: {message}", ValueError):
            getattr(ops, GELU2)(x, approximate=approximate)
    module = PUBLISHED[GELU2].module
    with raises(f"lomem.nn.{module.__name__}: {message}", ValueError):
        module(approximate)


@pytest.mark.parametrize("bits", [-1, 0, 9, 64, 2**40])
def test_bits(bits):
    codes = torch.zeros(8, dtype=torch.uint8)
    with raises(f"lomem::pack_bits: bits is {bits}, expected 1 to 8", ValueError):
        LF.pack_bits(codes, bits)
    with raises(f"lomem::unpack_bits: bits is {bits}, expected 1 to 8", ValueError):
        LF.unpack_bits(codes, bits, 4)
    with raises(f"lomem::step_activation_backward: bits is {bits}, expected 1 to 8", ValueError):
        ops.step_activation_backward(X, codes, [0.0] * 4, bits)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 8])
def test_levels(count):
    with raises(f"lomem::step_activation_backward: levels has {count} entries, expected 4 for 2 bits", ValueError):
        ops.step_activation_backward(X, torch.zeros(8, dtype=torch.uint8), [0.0] * count, 2)


class TestFamily:
    """Activations with few-bit derivatives. Bad arguments are refused whether or not a gradient is needed."""

    INPUTS = {"plain": X, "gradient": X.clone().requires_grad_(), "shape": X.to("meta")}  # noqa: RUF012

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    @pytest.mark.parametrize("bits", [-1, 0, 9, 2**40])
    def test_bits(self, bits, x):
        with raises(f"lomem::step_activation: bits is {bits}, expected 1 to 8", ValueError):
            LF.silu(x, bits=bits)
        with raises(f"lomem::step_codes: bits is {bits}, expected 1 to 8", ValueError):
            ops.step_codes(x.detach(), [0.0], bits)
        with raises(f"lomem.nn.SiLU: bits is {bits}, expected 1 to 8", ValueError):
            lomem.nn.SiLU(bits=bits)
        with raises(f"lomem::step_function: bits is {bits}, expected 1 to 8", ValueError):
            LF.step_function("silu", bits)

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    def test_names(self, x):
        with raises("lomem::step_activation: function is 'jelu', expected one of gelu, gelu_tanh, ", ValueError):
            ops.step_activation(x, "jelu", [], 3)
        with raises(f"lomem::hard_activation: function is 'gelu', expected one of {', '.join(EXACT)}", ValueError):
            ops.hard_activation(x, "gelu", [])
        with raises(
            "lomem::step_activation: criterion is 'best', expected 'derivative', 'primitive' or 'paper'", ValueError
        ):
            LF.silu(x, criterion="best")
        with raises("lomem.nn.SiLU: criterion is 'best', expected 'derivative', 'primitive' or 'paper'", ValueError):
            lomem.nn.SiLU(criterion="best")
        with raises("lomem.functional.gelu: approximate is 'Tanh', expected 'none' or 'tanh'", ValueError):
            LF.gelu(x, "Tanh")
        with raises("lomem.nn.GELU: approximate is 'Tanh', expected 'none' or 'tanh'", ValueError):
            lomem.nn.GELU("Tanh")

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    def test_parameters(self, x):
        with raises("lomem::step_activation: parameters has 2 entries, expected 1 (alpha) for elu", ValueError):
            ops.step_activation(x, "elu", [1.0, 2.0], 3)
        message = "lomem::hard_activation: parameters has 1 entries, expected 2 (threshold value) for threshold"
        with raises(message, ValueError):
            ops.hard_activation(x, "threshold", [1.0])
        with raises("lomem::hard_activation: parameters has 1 entries, expected 0 (none) for relu", ValueError):
            ops.hard_activation(x, "relu", [1.0])
        with raises("lomem::step_activation: alpha is nan, expected a finite number", ValueError):
            LF.elu(x, float("nan"))

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    def test_steps(self, x):
        def call(boundaries, levels, bits=2):
            return ops.step_activation(x, "gelu", [], bits, boundaries=boundaries, levels=levels)

        name = "lomem::step_activation: "
        with raises(name + "levels has 3 entries, expected 4, one more than boundaries", ValueError):
            call([0.0, 1.0, 2.0], [1.0] * 3)
        with raises(name + "boundaries has 4 entries, expected at most 3 for 2 bits", ValueError):
            call([0.0, 1.0, 2.0, 3.0], [1.0] * 5)
        with raises(name + "boundaries has 1 before 0 at index 2, expected ascending numbers", ValueError):
            call([0.0, 1.0, 0.0], [1.0] * 4)
        with raises(name + "boundaries has a NaN at index 1, expected ascending numbers", ValueError):
            call([0.0, float("nan"), 2.0], [1.0] * 4)
        with raises(name + "levels is None, expected both boundaries and levels, or neither", ValueError):
            call([0.0], None)
        with raises(name + "boundaries is None, expected both boundaries and levels, or neither", ValueError):
            call(None, [0.0])

    def test_steps_of_the_users(self):
        with raises("lomem.StepFunction: levels has 3 entries, expected 2, 4, 8, ... or 256", ValueError):
            LF.step_activation(X, torch.sin, (0.0, 1.0), (1.0, 2.0, 3.0))
        with raises("lomem.StepFunction: boundaries has 2 entries, expected 3 for 4 levels", ValueError):
            LF.step_activation(X, torch.sin, (0.0, 1.0), (1.0, 2.0, 3.0, 4.0))
        with raises("lomem.StepFunction: boundaries[0] is nan, expected a finite number", ValueError):
            LF.step_activation(X, torch.sin, (float("nan"),), (1.0, 2.0))
        with raises("lomem.StepFunction: boundaries[1] is 0.0, expected at least boundaries[0], 1.0", ValueError):
            LF.step_activation(X, torch.sin, (1.0, 0.0, 2.0), (1.0, 2.0, 3.0, 4.0))
        with raises("lomem.nn.Tanh: steps is a tuple, expected a lomem.StepFunction", ValueError):
            lomem.nn.Tanh(steps=((0.0,), (1.0, 2.0)))

    def test_bands(self):
        for arguments, name in (((float("nan"), 0.0), "low"), ((0.0, float("nan")), "high")):
            with raises(f"lomem::band_codes: {name} is NaN, expected a number", ValueError):
                ops.band_codes(X, *arguments)

    @pytest.mark.parametrize("name", WRONG_DTYPES)
    def test_dtypes(self, name):
        bad = WRONG_DTYPES[name]
        for op, call in {
            "step_activation": lambda: LF.gelu(bad),
            "step_activation_forward": lambda: ops.step_activation_forward(bad, "gelu", [], 3),
            "hard_activation": lambda: LF.relu(bad),
            "hard_activation_forward": lambda: ops.hard_activation_forward(bad, "relu", []),
            "step_codes": lambda: ops.step_codes(bad, [0.0], 1),
            "band_codes": lambda: ops.band_codes(bad, 0.0, 1.0),
        }.items():
            with raises(f"lomem::{op}: input has dtype {name}, {FLOATS}"):
                call()


@pytest.mark.parametrize("count", [0, 7, 9, 1000])
def test_size_of_codes(count):
    codes = torch.zeros(count, dtype=torch.uint8)
    message = f"codes has {count} bytes, expected 8 for 32 elements of 2 bits"
    with raises(f"lomem::step_activation_backward: {message}"):
        ops.step_activation_backward(X, codes, [0.0] * 4, 2)
    with raises(f"lomem::step_activation_backward: {message}"):
        ops.step_activation_backward(X.to("meta"), codes.to("meta"), [0.0] * 4, 2)


def test_numel():
    packed = torch.zeros(3, dtype=torch.uint8)
    with raises("lomem::unpack_bits: packed has 3 bytes, expected 4 for 9 elements of 3 bits"):
        LF.unpack_bits(packed, 3, 9)
    for numel in (-1, 2**62, 2**63 - 1):
        with raises(f"lomem::unpack_bits: numel is {numel}, expected 0 to ", ValueError):
            LF.unpack_bits(packed, 8, numel)


@pytest.mark.parametrize("op", [LF.ms_layer_norm, LF.ms_rms_norm])
class TestNorms:
    @pytest.mark.parametrize("shape", [(7,), (4,), (8, 4), (2, 4, 8), (1, 8)])
    def test_normalized_shape(self, op, shape):
        want = f"input has shape [4, 8], expected one that ends with normalized_shape {list(shape)}"
        for x in (X, X.to("meta"), X.clone().requires_grad_()):
            with raises(f"lomem::{op.__name__}: {want}"):
                op(x, shape)

    def test_empty_normalized_shape(self, op):
        with raises(f"lomem::{op.__name__}: normalized_shape is empty, expected at least one dimension", ValueError):
            op(X, ())

    @pytest.mark.parametrize("eps", [-1e-30, -1.0, float("nan"), float("inf"), -float("inf")])
    def test_eps(self, op, eps):
        with raises(f"lomem::{op.__name__}: eps is ", ValueError):
            op(X, (8,), eps=eps)

    def test_eps_zero_is_torchs_business_too(self, op):
        x = torch.randn(4, 8)
        assert op(x, (8,), eps=0.0).isfinite().all()

    @pytest.mark.parametrize("shape", [(7,), (), (1, 8), (8, 1), (4, 8)])
    def test_shape_of_weight(self, op, shape):
        with raises(f"lomem::{op.__name__}: weight has shape {list(shape)}, expected normalized_shape [8]"):
            op(X, (8,), torch.ones(shape))

    def test_mixed_devices(self, op):
        with raises(f"lomem::{op.__name__}: weight is on meta, expected cpu, the device of input"):
            op(X, (8,), torch.ones(8, device="meta"))
        with raises(f"lomem::{op.__name__}: weight is on cpu, expected meta, the device of input"):
            op(X.to("meta"), (8,), torch.ones(8))

    def test_dtype(self, op):
        with raises(f"lomem::{op.__name__}: dtype is int32, {FLOATS}"):
            op(X, (8,), dtype=torch.int32)

    def test_backward_op(self, op):
        backward = getattr(ops, f"{op.__name__}_backward")
        output, rstd = getattr(ops, f"{op.__name__}_forward")(X, [8])
        none, mask = ([None, None], [True] * 3) if op is LF.ms_layer_norm else ([None], [True] * 2)

        def call(grad=X, output=output, rstd=rstd, dtype=torch.float32):
            return backward(grad, output, rstd, [8], *none, dtype, mask)

        assert call()[0].shape == X.shape
        name = f"lomem::{op.__name__}_backward"
        with raises(f"{name}: grad_output has shape [3, 8], expected [4, 8], the shape of output"):
            call(grad=X[:3])
        with raises(f"{name}: rstd has 3 elements, expected 4, one per row"):
            call(rstd=rstd[:3])
        with raises(f"{name}: rstd has dtype float32, expected float64 for input_dtype float64"):
            call(dtype=torch.float64)
        with raises(f"{name}: rstd has dtype bfloat16, expected float32 for input_dtype float32"):
            call(rstd=rstd.bfloat16())
        with raises(f"{name}: input_dtype is int64, {FLOATS}"):
            call(dtype=torch.int64)
        with raises(f"{name}: grad_output is on meta, expected cpu, the device of output"):
            call(grad=X.to("meta"))
        with raises(f"{name}: rstd is on meta, expected cpu, the device of output"):
            call(rstd=rstd.to("meta"))


def test_shape_of_bias():
    with raises("lomem::ms_layer_norm: bias has shape [9], expected normalized_shape [8]"):
        LF.ms_layer_norm(X, (8,), None, torch.ones(9))


def test_mixed_devices_of_codes():
    codes = torch.zeros(8, dtype=torch.uint8)
    with raises("lomem::step_activation_backward: codes is on meta, expected cpu, the device of grad_output"):
        ops.step_activation_backward(X, codes.to("meta"), [0.0] * 4, 2)
