"""Programs exported from lomem's layers that run without lomem."""

import lomem
import pytest
import torch
import without_lomem
from lomem import _C
from test_transforms import MODULES
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_every_layer(name, training):
    torch.manual_seed(0)
    module = MODULES[name]().train(training)
    x = torch.randn(4, 6)
    inputs = (x, torch.randn(4, 6)) if isinstance(module, lomem.nn.GatedUnit) else (x,)
    program = torch.export.export(module, inputs)
    plain = program.run_decompositions(lomem.decompositions())
    if isinstance(module, lomem.nn.Dropout) and not training:
        assert targets(program) == []  # its result is its input
        return
    assert targets(plain)
    assert not [target for target in targets(plain) if "lomem" in target]
    if getattr(module, "inplace", False):
        # torch cannot run programs whose input is overwritten, once they are decomposed: neither its own.
        own = torch.export.export(nn.SiLU(inplace=True), (x,)).run_decompositions({})
        for each in (own, plain):
            with pytest.raises(RuntimeError, match="Could not find input"):
                each.module()
        return
    torch.manual_seed(1)
    want = module(*inputs)
    torch.manual_seed(1)
    got = plain.module()(*inputs)
    assert got.dtype == want.dtype
    if training and getattr(module, "saves", None) == "seed":
        # Its random numbers are lomem's own: what is not dropped is the same.
        both = (got != 0) & (want != 0)
        got, want = got * both, want * both
        assert both.any()
    # Norms add in another order, in float32.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, *_ in _C.activations()])
def test_every_activation_of_the_table(name):
    """With parameters other than the default ones, where it has some."""
    parameters = next(parameters for other, parameters, *_ in _C.activations() if other == name)
    values = {"threshold": 0.3, "value": -0.7, "min_val": -0.4, "max_val": 0.6}
    arguments = [values.get(parameter, 0.7) for parameter, _ in parameters]
    exact = next(exact for other, _, exact, _ in _C.activations() if other == name)
    op = torch.ops.lomem.hard_activation if exact else torch.ops.lomem.step_activation
    x = torch.linspace(-5, 5, 401)
    table = lomem.decompositions()
    bits = () if exact else (3,)
    torch.testing.assert_close(
        table[op.default](x, name, arguments, *bits), op(x, name, arguments, *bits), rtol=0, atol=0
    )


def test_lora_in_another_dtype_and_with_a_bias():
    op, table = torch.ops.lomem.lora, lomem.decompositions()
    x, a, b = torch.randn(3, 8), torch.randn(2, 8), torch.randn(5, 2)
    for dtype in (None, torch.bfloat16):
        args, options = (x, a, b, 0.5), {"bias": torch.randn(5), "dtype": dtype}
        got, want = table[op.default](*args, **options), op(*args, **options)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_it_goes_with_torchs_own_table():
    net = nn.Sequential(lomem.nn.MSLayerNorm(6, elementwise_affine=True), nn.Linear(6, 6), lomem.nn.Mish(bits=4))
    x = torch.randn(4, 6)
    table = torch.export.default_decompositions()
    table.update(lomem.decompositions())
    program = torch.export.export(net, (x,)).run_decompositions(table)
    assert not [target for target in targets(program) if "lomem" in target]
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-6)
    assert lomem.decompositions() is not lomem.decompositions()  # the caller's to change


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("kind", ["torch.export", "torch.jit"])
def test_a_program_that_holds_the_ops_loads_behind_an_import(kind, tmp_path):
    """test_site.py has what torch says without it."""
    path = str(tmp_path / "model.pt2")
    without_lomem.save(kind, path, lomem.nn.GELU(), torch.randn(2, 3))
    assert without_lomem.load(kind, path, "import lomem")


def test_a_decomposed_program_loads_without_lomem(tmp_path):
    path = str(tmp_path / "model.pt2")
    module, x = nn.Sequential(lomem.nn.MSRMSNorm(3), lomem.nn.GELU()), torch.randn(2, 3)
    without_lomem.save("torch.export", path, module, x, decompositions=lomem.decompositions())
    assert not without_lomem.load("torch.export", path)
