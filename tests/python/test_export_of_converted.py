"""The way out: what converted models evaluate and export is the original model."""

import itertools

import lomem
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from small_models import D
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO, build

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "default": {},
    "codes": {"pairs": "keep"},
    "steps": {"pairs": "keep", "criterion": "derivative"},
    "8 bits": {"bits": 8},
}


def outputs(model, batch):
    leaves = tree_leaves(model(**batch) if isinstance(batch, dict) else model(batch))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def converted(name, setting):
    """A plain model and a converted one with the same weights, and a batch."""
    (plain, batch), (model, _) = build(name), build(name)
    lomem.convert(model, batch, check=False, gradients=False, **SETTINGS[setting])
    return plain, model, batch


def assert_equal(got, expected):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ZOO)
def test_evaluation_is_the_original_bit_for_bit(name, setting):
    plain, model, batch = converted(name, setting)
    for without_gradients, low in itertools.product((torch.no_grad, torch.inference_mode), (False, True)):
        with without_gradients(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            assert_equal(outputs(model, batch), outputs(plain, batch))


class Positional(nn.Module):
    """Calls a model with tensors alone, as torch.export passes them."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        return next(t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point())


def exported(model, batch, **options):
    names = [name for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"]
    return torch.export.export(Positional(model, names), tuple(batch[name] for name in names), strict=False, **options)


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


#: Architectures with every kind of conversion: norms of both kinds, activations, calls, products, dropouts.
EXPORTED = ("llama", "gpt2", "bert", "vit", "convnext", "phi3", "gemma")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_has_the_original_ops(name, setting, training):
    plain, model, batch = converted(name, setting)
    expected = targets(exported(plain.train(training), batch))
    assert expected
    for without_gradients in (False, True):
        with torch.set_grad_enabled(not without_gradients):
            found = targets(exported(model.train(training), batch))
        assert not [target for target in found if "lomem" in target]
        if not without_gradients:
            assert found == expected


class Everything(nn.Module):
    """A norm, an activation in front of a frozen layer, one in front of a trained one, a call and a dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU()
        self.down, self.silu, self.drop = nn.Linear(2 * D, D).requires_grad_(False), nn.SiLU(), nn.Dropout(0.1)
        self.last = nn.Linear(D, D)

    def forward(self, x):
        x = self.down(self.act(self.up(self.norm(x))))
        return self.last(self.drop(self.silu(x))) + nn.functional.gelu(x, approximate="tanh").mean(-1, keepdim=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_everything_that_is_converted(strict, training):
    torch.manual_seed(0)
    plain, x = Everything().train(training), torch.randn(3, 5, D)
    model = Everything().train(training)
    model.load_state_dict(plain.state_dict())
    report = lomem.convert(model, x)
    assert {d.action for d in report.converted} >= {"4bit", "inverted", "exact"}
    shapes = ({0: torch.export.Dim("batch", min=2, max=9)},)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
    assert not [target for target in targets(program) if "lomem" in target]
    other = torch.randn(7, 5, D)
    for function in (program.module(), program.run_decompositions().module()):
        torch.manual_seed(1)
        got = function(other)
        torch.manual_seed(1)
        # Decompositions may add in a different order.
        torch.testing.assert_close(got, plain(other), rtol=1e-5, atol=1e-6)
    # What was exported is trained as before.
    model(x).sum().backward()
    assert model.up.weight.grad is not None
    assert lomem.restore(model) > 0


@pytest.mark.parametrize("training", [False, True])
def test_onnx(training):
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(3, 5, D)
    model.drop.p = 0.0
    lomem.convert(model, x)
    model.train(training)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    onnx.checker.check_model(program.model_proto)
    (got,) = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        # The same formulas in float32, by NumPy.
        torch.testing.assert_close(torch.from_numpy(got), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_aot_inductor(tmp_path):
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(3, 5, D)
    lomem.convert(model, x)
    model.eval()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        # The generated code fuses operations and may add in another order, in float32.
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=1e-5, atol=1e-6)
