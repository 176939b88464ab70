"""TorchScript: modules refuse to be compiled by one sentence, and what that names works."""

import re

import lomem
import pytest
import torch
from test_transforms import MODULES
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
#: The base class of activations is not for use by itself, but a subclass of one's own is refused as well.
KINDS = {**MODULES, "FewBitActivation": type("Own", (lomem.nn.FewBitActivation,), {"_function": "gelu"})}


def test_every_module_is_here():
    assert {name.split("-")[0] for name in KINDS} == set(lomem.nn.__all__)


@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.ReLU(), nn.ModuleList([m]))])
@pytest.mark.parametrize("name", KINDS)
def test_scripting_is_refused(name, around):
    module = KINDS[name]()
    expected = (
        f"lomem.nn.{type(module).__name__}: got torch.jit.script, expected torch.compile, torch.export or "
        "torch.jit.trace: TorchScript cannot compile lomem's modules"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(expected)}$"):
        torch.jit.script(around(module))


@pytest.mark.parametrize("name", MODULES)
def test_what_the_sentence_names_works(name):
    module = MODULES[name]().eval()  # (in training mode, some draw)
    x = torch.randn(4, 6)
    inputs = (x, torch.randn(4, 6)) if isinstance(module, lomem.nn.GatedUnit) else (x,)
    want = module(*inputs)
    assert torch.equal(torch.jit.trace(module, inputs)(*inputs), want)
    assert torch.equal(torch.export.export(module, inputs).module()(*inputs), want)
    torch.compiler.reset()  # (of one forward method, it compiles only so many modules)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), want)
