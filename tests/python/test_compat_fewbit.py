"""lomem.compat.fewbit: every name of FewBit, its arguments, results and gradients."""

import copy
import importlib
import inspect
import math
import pickle
import subprocess
import sys

import lomem
import lomem.compat.fewbit as fewbit
import pytest
import torch
import torch.nn.functional as F
from fewbit_cases import ACTIVATIONS, CONTINUOUS, FUNCTIONS, MODULES, PIECEWISE, TOP_LEVEL
from torch import nn

LF = lomem.functional
FF = fewbit.functional
activations = FF.activations
store = activations.store


@pytest.fixture(autouse=True)
def _as_it_was():
    """What a test adds to the store is gone after it."""
    before = copy.copy(vars(store))
    vars(store).update({name: copy.copy(value) for name, value in before.items()})
    yield
    vars(store).update(before)


def gradient(function, x, **arguments):
    x = x.detach().clone().requires_grad_()
    y = function(x, **arguments)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


def levels_at(x, inner, levels):
    """The level at each x: of the number of borders below it."""
    return levels[(x[..., None] > inner).sum(-1)]


# Names


def test_every_name_is_there():
    assert set(fewbit.__all__) == TOP_LEVEL | {"functional", "modules", "util"}
    assert {name for name in dir(fewbit) if not name.startswith("_")} == set(fewbit.__all__)
    assert set(FF.__all__) == FUNCTIONS
    assert {name for name in dir(FF) if not name.startswith("_")} == FUNCTIONS | {"activations", "linear", "variance"}
    assert set(fewbit.util.__all__) == {"convert_linear", "estimate_memory_usage", "map_module", "teniter", "traverse"}
    assert (*PIECEWISE, "stepwise") == activations.STEPWISE
    assert tuple(CONTINUOUS) == activations.CONTINOUS
    assert (*(MODULES[name] for name in PIECEWISE), "Stepwise") == fewbit.modules.activations.STEPWISE
    assert set(fewbit.modules.activations.CONTINOUS) == {MODULES[name] for name in CONTINUOUS}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("functional.activations", ["store", "StepwiseStore", "stepwise", *ACTIVATIONS]),
        ("functional.linear", ["linear_crs", "linear_grp", "linear_randomized"]),
        ("functional.variance", ["GradientStorage", "catch_gradients"]),
        ("modules.activations", ["Stepwise", *MODULES.values()]),
        ("modules.linear", ["LinearCRS", "LinearGRP", "RandomizedLinear"]),
        (
            "modules.variance",
            ["VarianceEstimator", "estimate_correlation", "estimate_variance_rmm", "estimate_variance_sgd"],
        ),
        ("util", ["map_module", "convert_linear", "traverse", "teniter", "estimate_memory_usage"]),
    ],
)
def test_names_by_the_path_of_their_module(path, names):
    module = importlib.import_module(f"lomem.compat.fewbit.{path}")
    for name in names:
        found = getattr(module, name)
        package = path.partition(".")[0]
        assert getattr(getattr(fewbit, package), name, found) is found
        if name in TOP_LEVEL:
            assert getattr(fewbit, name) is found
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        module.missing  # noqa: B018


def test_one_function_has_two_names():
    assert FF.linear_grp is FF.linear_randomized
    assert fewbit.LinearGRP is fewbit.RandomizedLinear
    assert fewbit.convert_linear is lomem.convert_linear


def test_importing_lomem_imports_none_of_it():
    script = (
        "import sys, lomem; print([name for name in sys.modules if name.startswith('lomem.compat')]); "
        "print(lomem.compat.__name__); import lomem.compat.fewbit; print(lomem.compat.fewbit.GELU.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    assert result.stdout.split() == ["[]", "lomem.compat", "GELU"]


# Activations


def described(signature):
    """Names, kinds and defaults."""
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


KEYWORD, EITHER = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


@pytest.mark.parametrize("name", CONTINUOUS)
def test_signatures_of_functions(name):
    expected = [("input", EITHER, inspect.Parameter.empty)]
    expected += [(parameter, EITHER, default) for parameter, default in CONTINUOUS[name].items()]
    expected += [("bits", EITHER if name == "gelu" else KEYWORD, None)]
    expected += [(other, KEYWORD, None) for other in ("borders", "values")]
    function = getattr(FF, name)
    assert described(inspect.signature(function)) == expected
    assert (function.__name__, function.__qualname__) == (name, name)
    assert name in function.__doc__


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_signatures_of_modules(name):
    kind = MODULES[name]
    # torch's, but for what FewBit leaves out. (LogSigmoid and others have no constructor of their own.)
    expected = [
        (p.name, p.kind, p.default)
        for p in inspect.signature(getattr(nn, kind)).parameters.values()
        if p.name not in ("approximate", "inplace", "args", "kwargs")
    ]
    assert described(inspect.signature(getattr(fewbit, kind))) == [*expected, ("bits", KEYWORD, None)]


@pytest.mark.parametrize("bits", [None, *range(1, 9)])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_results_and_gradients(name, bits):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    y, grad = gradient(getattr(FF, name), x, **({} if bits is None else {"bits": bits}))
    assert torch.equal(y, getattr(F, name)(x))
    width = 3 if bits is None else bits
    borders, levels = store.get(name, width, dtype=torch.float64)
    assert (borders.numel(), levels.numel()) == (2**width + 1, 2**width)
    assert torch.equal(grad, levels_at(x, borders[1:-1], levels))
    # What FewBit minimizes, the mean square error of the derivative, is least if each level is the mean of the
    # derivative on its piece, that is, the slope of the function over it. (Not of the outer pieces, which go to
    # infinity. torch's logsigmoid and the like are good to 1e-16, divided by a width of at least 1e-2.)
    inner = borders[1:-1]
    slopes = getattr(F, name)(inner).diff() / inner.diff()
    assert torch.allclose(slopes, levels[1:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear_functions_are_exact(name):
    function = getattr(FF, name)
    assert function is getattr(LF, name)
    arguments = {"threshold": 0.5, "value": -1.0} if name == "threshold" else {}
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    ours, theirs = gradient(function, x, **arguments), gradient(getattr(F, name), x, **arguments)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("celu", {"alpha": 0.5}),
        ("elu", {"alpha": 2.0}),
        ("softplus", {"beta": 2.0}),
        ("softplus", {"beta": 0.5, "threshold": 30.0}),
    ],
)
def test_parameters(name, arguments):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    y, grad = gradient(getattr(FF, name), x, **arguments, bits=4)
    assert torch.equal(y, getattr(F, name)(x, **arguments))
    assert torch.equal(grad, gradient(getattr(LF, name), x, **arguments, bits=4)[1])
    positional = getattr(FF, name)(x.clone().requires_grad_(), *arguments.values(), bits=4)
    assert torch.equal(positional, y)
    module = getattr(fewbit, MODULES[name])(**arguments, bits=4)
    assert all(map(torch.equal, gradient(module, x), (y, grad)))


def test_bits_of_gelu_by_position():
    x = torch.linspace(-8, 8, 1001)
    assert torch.equal(gradient(lambda x: FF.gelu(x, 2), x)[1], gradient(LF.gelu, x, bits=2)[1])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_modules(name):
    required = {"threshold": 0.5, "value": -1.0} if name == "threshold" else {}
    kind = getattr(fewbit, MODULES[name])
    assert issubclass(kind, getattr(lomem.nn, MODULES[name]))
    assert issubclass(kind, getattr(nn, MODULES[name]))
    x = torch.linspace(-8, 8, 1001)
    for bits in (None, 1, 5):
        module = kind(**required, bits=bits)
        if name in CONTINUOUS:
            assert module.bits == (3 if bits is None else bits)
            expected = gradient(getattr(FF, name), x, bits=bits)
        else:
            expected = gradient(getattr(F, name), x, **required)
        for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(copied) is kind
            assert all(map(torch.equal, gradient(copied, x), expected))
    assert repr(module).startswith(f"{MODULES[name]}(")
    assert not list(module.state_dict())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_own_step_functions(count, dtype):
    inner = torch.randn(count - 1, dtype=torch.float64).sort().values
    levels = torch.randn(count, dtype=torch.float64)
    ends = torch.tensor([-math.inf]), inner, torch.tensor([math.inf])
    x = torch.randn(500).to(dtype)
    y, grad = gradient(FF.silu, x, borders=torch.cat(ends), values=levels)
    assert torch.equal(y, F.silu(x))
    # Below float64, inputs are compared with the float32 roundings of the borders, and levels are rounded once.
    compared = inner if dtype == torch.float64 else inner.float().double()
    assert torch.equal(grad, levels_at(x.double(), compared, levels).to(dtype))
    # The identity with the same derivative, with the ends or without them, as function and as module.
    for borders in (inner, torch.cat(ends)):
        module = fewbit.Stepwise(borders, levels)
        for step in (lambda x, b=borders: FF.stepwise(x, b, levels), module):
            assert all(map(torch.equal, gradient(step, x), (x, grad)))
        assert torch.equal(module.borders, inner)
    assert list(module.state_dict()) == ["borders", "levels"]
    copied = pickle.loads(pickle.dumps(module))
    assert torch.equal(gradient(copied, x)[1], grad)


def test_stepwise_returns_a_copy():
    x = torch.randn(9, requires_grad=True)
    y = fewbit.Stepwise(torch.zeros(1), torch.tensor([0.0, 1.0]))(x)
    y.add_(1)
    assert torch.equal(y, x + 1)


STEP = {"borders": torch.tensor([-9.0, 0.0, 9.0]), "values": torch.tensor([0.0, 1.0])}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: FF.gelu(x, bits=9), ValueError, "lomem::step_activation: bits is 9, expected 1 to 8"),
        (lambda x: FF.silu(x, True), TypeError, "lomem.compat.fewbit.functional.silu: too many positional arguments"),
        (lambda x: FF.elu(x, inplace=True), TypeError, "lomem.compat.fewbit.functional.elu: got an unexpected keyword"),
        (lambda x: FF.mish(), TypeError, "lomem.compat.fewbit.functional.mish: missing a required argument: 'input'"),
        (
            lambda x: FF.gelu(x, bits=3, **STEP),
            ValueError,
            "lomem.compat.fewbit.functional.gelu: bits is 3, expected None with borders and values",
        ),
        (
            lambda x: FF.gelu(x, borders=STEP["borders"]),
            ValueError,
            "lomem.compat.fewbit.functional.gelu: borders is given and values is None, expected both or neither",
        ),
        (
            lambda x: FF.gelu(x, values=STEP["values"]),
            ValueError,
            "lomem.compat.fewbit.functional.gelu: values is given and borders is None, expected both or neither",
        ),
        (
            lambda x: FF.gelu(x, borders=[0.0], values=STEP["values"]),
            TypeError,
            "lomem.compat.fewbit.functional.gelu: borders is of type list, expected a 1-D tensor",
        ),
        (
            lambda x: FF.stepwise(x, torch.zeros(1, 1), STEP["values"]),
            ValueError,
            "lomem.compat.fewbit.functional.stepwise: borders has shape (1, 1), expected a 1-D tensor",
        ),
        (
            lambda x: fewbit.Stepwise(torch.zeros(5), torch.zeros(2)),
            ValueError,
            "lomem.compat.fewbit.Stepwise: borders has 5 elements, expected 3 with both ends or 1 without, for 2",
        ),
        (
            lambda x: fewbit.Stepwise(torch.arange(256.0), torch.zeros(257)),
            ValueError,
            "lomem.compat.fewbit.Stepwise: values has 257 elements, expected 1 to 256",
        ),
        (
            lambda x: fewbit.Stepwise(torch.tensor([1.0, 0.0]), torch.zeros(3)),
            ValueError,
            "lomem.compat.fewbit.Stepwise: borders and values are no step function: lomem.StepFunction: boundaries[1]",
        ),
        (
            lambda x: fewbit.Stepwise(torch.zeros(1), torch.zeros(2), parity=True),
            ValueError,
            "lomem.compat.fewbit.Stepwise: parity is True, expected None and the whole step function",
        ),
        (
            lambda x: FF.stepwise(x, torch.zeros(1), torch.zeros(2), None, (0.0, 1.0)),
            ValueError,
            "lomem.compat.fewbit.functional.stepwise: shift is (0.0, 1.0), expected None and the whole step function",
        ),
        (lambda x: fewbit.GELU("tanh"), TypeError, "lomem.compat.fewbit.GELU: too many positional arguments"),
        (lambda x: fewbit.ReLU(inplace=True), TypeError, "lomem.compat.fewbit.ReLU: got an unexpected keyword"),
        (lambda x: fewbit.GELU(bits=0), ValueError, "lomem.nn.GELU: bits is 0, expected 1 to 8"),
    ],
)
def test_errors_of_activations(call, kind, message):
    with pytest.raises(kind) as error:
        call(torch.ones(3, requires_grad=True))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# The store


def test_the_store_has_every_function_and_number_of_bits():
    keys = {(name, bits) for name in CONTINUOUS for bits in range(1, 9)}
    assert len(store) == len(keys)
    assert {key for key, _ in store.items()} == keys
    before = dict(store.items(cached=True))
    borders, values = store.get("selu", 2, "cpu", torch.float16)
    assert (borders.dtype, values.dtype, borders.device.type) == (torch.float16, torch.float16, "cpu")
    assert store.get("selu", 2, "cpu", torch.float16)[0] is borders
    added = dict(store.items(cached=True)).keys() - before.keys()
    assert added <= {("selu", 2, torch.device("cpu"), torch.float16)}
    assert repr(store) == f"StepwiseStore(stored={len(keys)}, cached={len(before) + len(added)})"
    assert store.get("selu", 2)[0].dtype == torch.float32


def test_what_is_added_is_used():
    x = torch.linspace(-8, 8, 1001)
    module, other = fewbit.GELU(bits=2), fewbit.GELU(bits=3)
    before = gradient(module, x)[1], gradient(other, x)[1]
    inner, values = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 0.25, 0.75, 1.0])
    store.add("gelu", 2, (torch.cat([torch.tensor([-99.0]), inner, torch.tensor([99.0])]), values))
    expected = levels_at(x, inner, values)
    assert torch.equal(gradient(FF.gelu, x, bits=2)[1], expected)
    assert torch.equal(gradient(module, x)[1], expected)
    assert module.step_function() == lomem.StepFunction(tuple(inner.tolist()), tuple(values.tolist()))
    assert torch.equal(store.get("gelu", 2)[1], values)
    assert len(store) == 8 * len(CONTINUOUS)
    # Nothing else changes, and what is set on a module goes before the store.
    assert torch.equal(gradient(other, x)[1], before[1])
    module.steps = lomem.functional.step_function("gelu", 2)
    assert torch.equal(gradient(module, x)[1], before[0])
    # A name that is no activation is kept.
    store.add("own", 1, (torch.tensor([-9.0, 0.5, 9.0]), torch.tensor([0.0, 2.0])))
    assert torch.equal(store.get("own", 1)[0], torch.tensor([-9.0, 0.5, 9.0]))
    assert ("own", 1) in dict(store.items())


def test_the_store_reads_files(tmp_path):
    np = pytest.importorskip("numpy")
    borders, levels = np.array([-100.0, -0.5, 100.0]), np.array([0.0, 1.0])
    np.savez(tmp_path / "steps.npz", **{"tanh01-borders": borders, "tanh01-levels": levels})
    assert store.load(tmp_path / "steps.npz") is store
    x = torch.linspace(-2, 2, 101)
    assert torch.equal(gradient(fewbit.Tanh(bits=1), x)[1], (x > -0.5).float())
    np.savez(tmp_path / "other.npz", **{"tanh-borders": borders})
    with pytest.raises(
        ValueError, match=r"functional\.store\.load: .* has arrays tanh-borders, expected pairs such as"
    ):
        store.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: store.get("relu", 1), KeyError, "no step function for 'relu' with 1 bits, expected 1 to 8 bits and"),
        (lambda: store.get("gelu", 9), KeyError, "no step function for 'gelu' with 9 bits, expected 1 to 8 bits and"),
        (lambda: store.add("gelu", 0, tuple(STEP.values())), ValueError, "store.add: bits is 0, expected 1 to 8"),
        (
            lambda: store.add("gelu", 1, (torch.zeros(1), STEP["values"])),
            ValueError,
            "store.add: borders has 1 elements, expected 3, with both ends",
        ),
        (
            lambda: store.add("gelu", 1, (torch.arange(4.0), torch.zeros(3))),
            ValueError,
            "store.add: values has 3 elements, expected at most 2 for 1 bits",
        ),
    ],
)
def test_errors_of_the_store(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert error.value.args[0].startswith("lomem.compat.fewbit.functional.store.")
    assert message in error.value.args[0]
    assert "\n" not in error.value.args[0]
