"""lomem.compat.lowmemorybp, and pickles of LowMemoryBP's models: every name, with its results and gradients."""

import copy
import importlib
import inspect
import pickle
import pickletools
import subprocess
import sys

import lomem
import lomem.compat.lowmemorybp as lowmemorybp
import pytest
import torch
import torch.nn.functional as F
from helpers import EPS
from lomem import reference
from torch import nn

LF = lomem.functional

NAMES = {
    "activation": {"ReGELU2Function", "ReSiLU2Function", "regelu2", "resilu2"},
    "functional": {"layer_norm", "pack_bool_to_uint8", "regelu2", "resilu2", "rms_norm", "unpack_uint8_to_bool"},
    "nn": {"MSLayerNorm", "MSRMSNorm", "ReGELU2", "ReSiLU2"},
    "normalization": {"LayerNormFunction", "RMSNormFunction", "layer_norm", "rms_norm"},
    "packing": {"pack_bool_to_uint8", "unpack_uint8_to_bool"},
}
#: The modules that LowMemoryBP has and lomem would not.
ALIASES = ["activation", "normalization", "packing"]


def test_every_name_is_there():
    assert set(lowmemorybp.__all__) == set(NAMES)
    assert {name for name in dir(lowmemorybp) if not name.startswith("_")} == set(NAMES)
    for path, names in NAMES.items():
        module = importlib.import_module(f"lomem.compat.lowmemorybp.{path}")
        assert getattr(lowmemorybp, path) is module
        # Of lomem.nn, the namespace has everything.
        assert set(module.__all__) == (set(lomem.nn.__all__) if path == "nn" else names)
        assert names <= set(dir(module))


@pytest.mark.parametrize("path", [*ALIASES, "functional", "nn"])
def test_lomem_itself_has_the_names(path):
    module = importlib.import_module(f"lomem.{path}")
    for name in NAMES[path]:
        same = getattr(lowmemorybp, path)
        assert (getattr(module, name) is getattr(same, name)) == (name != "MSRMSNorm")
    if path in ALIASES:
        assert set(module.__all__) == NAMES[path]


def test_modules_are_found_without_an_import_of_their_own():
    script = (
        f"import sys, lomem; names = {ALIASES}; print(*['lomem.' + name in sys.modules for name in names]); "
        "print(*[getattr(lomem, name).__name__ for name in names])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    assert result.stdout.split() == ["False"] * 3 + [f"lomem.{name}" for name in ALIASES]


def test_signatures():
    norm = ["normalized_shape", "eps"]
    for name in ("layer_norm", "rms_norm"):
        assert list(inspect.signature(getattr(lowmemorybp.functional, name)).parameters) == ["input", *norm]
    for name in ("regelu2", "resilu2"):
        assert next(iter(inspect.signature(getattr(lowmemorybp.functional, name)).parameters)) == "input"
    for name in ("MSLayerNorm", "MSRMSNorm"):
        parameters = inspect.signature(getattr(lowmemorybp.nn, name)).parameters
        assert list(parameters)[:2] == norm
        assert parameters["eps"].default == 1e-5
    assert list(inspect.signature(lowmemorybp.packing.pack_bool_to_uint8).parameters) == ["x"]
    assert list(inspect.signature(lowmemorybp.packing.unpack_uint8_to_bool).parameters) == ["x", "shape"]


def results(function, x, grad):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(grad)
    return y.detach(), x.grad


# name -> the ways to call it, torch's function, and the published step function
STEPS = {
    "regelu2": (
        [
            lowmemorybp.activation.ReGELU2Function.apply,
            lowmemorybp.activation.regelu2,
            lowmemorybp.functional.regelu2,
            lowmemorybp.nn.ReGELU2(),
            lambda x: lomem.activation.ReGELU2Function.apply(x),
        ],
        F.gelu,
        reference.REGELU2,
    ),
    "resilu2": (
        [
            lowmemorybp.activation.ReSiLU2Function.apply,
            lowmemorybp.activation.resilu2,
            lowmemorybp.functional.resilu2,
            lowmemorybp.nn.ReSiLU2(),
            lambda x: lomem.activation.ReSiLU2Function.apply(x),
        ],
        F.silu,
        reference.RESILU2,
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations(name, dtype):
    calls, of_torch, steps = STEPS[name]
    x, grad = (4 * torch.randn(300)).to(dtype), torch.randn(300, dtype=dtype)
    slopes = steps.derivative(x)
    for call in calls:
        y, got = results(call, x, grad)
        assert torch.equal(y, of_torch(x))
        # The level is rounded once to float32 (float64), the product once more to each dtype: two roundings.
        assert torch.allclose(got.double(), grad.double() * slopes, rtol=2 * EPS[dtype], atol=0)
        with lomem.memory.saved_for_backward() as saved:
            call(x.clone().requires_grad_())
        assert saved.nbytes == 300 // 4
    assert issubclass(lowmemorybp.activation.ReGELU2Function, torch.autograd.Function)


def norm_by_hand(x, shape, eps, centred):
    """In float64, with torch's ops."""
    dims = tuple(range(-len(shape), 0))
    x = x.double()
    if centred:
        x = x - x.mean(dims, keepdim=True)
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()


NORMS = {
    "layer": (
        lambda shape, eps: [
            lambda x: lowmemorybp.normalization.LayerNormFunction.apply(x, shape, eps),
            lambda x: lowmemorybp.normalization.layer_norm(x, shape, eps),
            lambda x: lowmemorybp.functional.layer_norm(x, normalized_shape=shape, eps=eps),
            lambda x: lomem.normalization.LayerNormFunction.apply(x, shape, eps),
            lowmemorybp.nn.MSLayerNorm(shape, eps),
        ],
        True,
    ),
    "rms": (
        lambda shape, eps: [
            lambda x: lowmemorybp.normalization.RMSNormFunction.apply(x, shape, eps),
            lambda x: lowmemorybp.normalization.rms_norm(x, shape, eps),
            lambda x: lowmemorybp.functional.rms_norm(x, normalized_shape=shape, eps=eps),
            lambda x: lomem.normalization.RMSNormFunction.apply(x, shape, eps),
            lowmemorybp.nn.MSRMSNorm(shape, eps),
        ],
        False,
    ),
}


def close_to(got, expected, dtype):
    # Twelve elements a row: sums lose a few roundings, and the result is of the size of 1.
    return torch.allclose(got.double(), expected, rtol=0, atol=24 * EPS[dtype])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(12,), (3, 4), [3, 4], torch.Size([12])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms(name, shape, dtype):
    make, centred = NORMS[name]
    x, grad = torch.randn(5, *shape, dtype=dtype), torch.randn(5, *shape, dtype=dtype)
    # An eps that makes a difference.
    expected = results(lambda x: norm_by_hand(x, shape, 0.5, centred), x.double(), grad.double())
    for call in make(shape, 0.5):
        got = results(call, x, grad)
        assert all(close_to(one, other, dtype) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["MSLayerNorm", "MSRMSNorm"])
@pytest.mark.parametrize(
    ("shape", "sizes"), [(768, (768,)), ((3, 4), (3, 4)), ([3, 4], (3, 4)), (torch.Size([2]), (2,))]
)
def test_attributes_of_norms(name, shape, sizes):
    for module in (getattr(lowmemorybp.nn, name)(shape), getattr(lomem.nn, name)(shape, 1e-5)):
        assert (module.normalized_shape, module.num_dims, module.eps) == (sizes, len(sizes), 1e-5)
        assert isinstance(module, getattr(lomem.nn, name))
        assert list(module.state_dict()) == []
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert (copied.normalized_shape, copied.num_dims, copied.eps) == (sizes, len(sizes), 1e-5)
            assert type(copied) is type(module)
    assert getattr(lowmemorybp.nn, name)(shape, 1e-3).eps == 1e-3
    assert getattr(lowmemorybp.nn, name)(shape, eps=1e-3).eps == 1e-3


def test_default_eps_of_the_rms_norm():
    x = torch.full((2, 8), 1e-4, dtype=torch.float64)
    assert torch.allclose(lowmemorybp.nn.MSRMSNorm(8)(x), norm_by_hand(x, (8,), 1e-5, False))
    # lomem's own is torch's, the machine epsilon.
    assert torch.allclose(lomem.nn.MSRMSNorm(8)(x), F.rms_norm(x, (8,)))
    affine = lowmemorybp.nn.MSRMSNorm(8, elementwise_affine=True)
    assert affine.eps == 1e-5
    assert torch.equal(pickle.loads(pickle.dumps(affine)).weight, torch.ones(8))


@pytest.mark.parametrize("shape", [(17,), (5, 3), (2, 3, 4), (0,), ()])
@pytest.mark.parametrize("module", [lowmemorybp.packing, lowmemorybp.functional, lomem.packing])
def test_packing(shape, module):
    np = pytest.importorskip("numpy")
    x = torch.rand(shape) > 0.5
    packed = module.pack_bool_to_uint8(x)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(x.flatten().numpy(), bitorder="little").tolist()
    assert torch.equal(module.unpack_uint8_to_bool(packed, shape), x)


# Pickles of LowMemoryBP's models.


def of_lowmemorybp(name, **attributes):
    """A module as LowMemoryBP pickles it: the class of that name in ``lomem.nn``, with these attributes alone."""
    kind = getattr(lomem.nn, name)
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    return module


def norm(name, shape, eps):
    return of_lowmemorybp(name, normalized_shape=shape, num_dims=len(shape), eps=eps)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_whole_models(protocol):
    linears = [nn.Linear(8, 8), nn.Linear(8, 8)]
    names = ["MSLayerNorm", "ReGELU2", "MSRMSNorm", "ReSiLU2"]
    contents = pickle.dumps(
        nn.Sequential(
            norm(names[0], (8,), 0.25),
            linears[0],
            of_lowmemorybp(names[1]),
            norm(names[2], [8], 0.5),
            linears[1],
            of_lowmemorybp(names[3]),
        ).eval(),
        protocol,
    )
    # It holds the names, and none of lomem's own attributes.
    strings = {text for _, value, _ in pickletools.genops(contents) if isinstance(value, str) for text in value.split()}
    assert {"lomem.nn", "num_dims", *names} <= strings
    assert not strings & {"elementwise_affine", "output_dtype", "approximate", "fast"}

    model = pickle.loads(contents)
    assert [type(model[i]) for i in (0, 2, 3, 5)] == [getattr(lomem.nn, name) for name in names]
    assert [(model[i].eps, model[i].normalized_shape, model[i].num_dims) for i in (0, 3)] == [
        (0.25, (8,), 1),
        (0.5, (8,), 1),
    ]
    assert not any(module.training for module in model.modules())
    assert list(model.state_dict()) == ["1.weight", "1.bias", "4.weight", "4.bias"]
    x = torch.randn(5, 8)
    with torch.no_grad():
        h = F.gelu(linears[0].double()(norm_by_hand(x, (8,), 0.25, True)))
        expected = F.silu(linears[1].double()(norm_by_hand(h, (8,), 0.5, False)))
    # A handful of float32 roundings of numbers of the size of 1.
    assert torch.allclose(model(x).double(), expected, rtol=0, atol=64 * EPS[torch.float32])
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        assert repr(copied) == repr(model)
    assert repr(model[0]) == "MSLayerNorm((8,), eps=0.25, elementwise_affine=False, bias=False)"
    assert repr(model[2]) == "ReGELU2(approximate='none')"
    assert repr(model[3]) == "MSRMSNorm((8,), eps=0.5, elementwise_affine=False)"
    assert repr(model[5]) == "ReSiLU2()"


def test_files_of_torch_save(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(norm("MSRMSNorm", (3, 4), 0.5)), path)
    (module,) = torch.load(path, weights_only=False)
    x = torch.randn(2, 3, 4)
    assert close_to(module(x), norm_by_hand(x, (3, 4), 0.5, False), torch.float32)
    assert module.num_dims == 2


def test_pickles_of_lomems_norms_keep_everything():
    for module in (lomem.nn.MSLayerNorm(4, 0.5, True), lomem.nn.MSRMSNorm(4, None, True, output_dtype=torch.float64)):
        copied = pickle.loads(pickle.dumps(module.requires_grad_(False)))
        assert vars(copied).keys() == vars(module).keys()
        assert (copied.eps, copied.elementwise_affine, copied.output_dtype) == (
            module.eps,
            True,
            module.output_dtype,
        )
        assert list(copied.state_dict()) == list(module.state_dict())
