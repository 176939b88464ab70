"""map_module and convert_linear, and the table of FewBit's that is made with them."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import lomem
import pytest
import torch
from activations_helpers import MODULES
from torch import nn
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parents[2]
Randomized = lomem.nn.RandomizedLinear
convert = partial(lomem.convert_linear, cls=Randomized, proj_dim_ratio=0.5)


class Block(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.shared = shared
        self.act = nn.GELU()
        self.absent = None
        self.register_module("none", None)

    def forward(self, x):
        return self.shared(self.act(self.first(x)))


def make_model():
    shared = nn.Linear(4, 4, bias=False)
    return nn.Sequential(Block(shared), nn.ModuleDict({"a": Block(shared), "b": shared}), shared)


def kinds(model, cls):
    return [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is cls]


def test_every_linear_layer_is_replaced_and_shared_ones_by_one():
    model = make_model()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = kinds(model, nn.Linear)
    assert lomem.map_module(model, convert) is model
    assert kinds(model, nn.Linear) == []
    assert kinds(model, Randomized) == names
    assert model[0].shared is model[1]["a"].shared is model[1]["b"] is model[2]
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    # Once more changes nothing.
    before = list(model.modules())
    lomem.map_module(model, convert)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize(
    ("pattern", "replaced"),
    [
        (r"first$", ["0.first", "1.a.first"]),
        (r"^0\.first", ["0.first"]),
        # Found under one of its names, a shared module is replaced under all.
        (r"^1\.b$", ["0.shared", "1.a.shared", "1.b", "2"]),
        # With a slash, in paths.
        ("/first$", ["0.first", "1.a.first"]),
        ("^/0/first", ["0.first"]),
        ("^/1/b$", ["0.shared", "1.a.shared", "1.b", "2"]),
        (r"^[^/]*first$", ["0.first", "1.a.first"]),
        (None, ["0.first", "0.shared", "1.a.first", "1.a.shared", "1.b", "2"]),
    ],
)
def test_patterns(pattern, replaced):
    model = make_model()
    lomem.map_module(model, convert, pattern)
    assert kinds(model, Randomized) == replaced


def test_a_pattern_without_a_match_warns():
    model = make_model()
    names = dict(model.named_modules())
    with pytest.warns(UserWarning, match="matches no module") as warned:
        assert lomem.map_module(model, convert, "nothing") is model
    assert [str(warning.message) for warning in warned] == [
        "lomem.map_module: pattern 'nothing' matches no module of the Sequential, whose modules have names such as "
        "'1.a.act', in paths '/1/a/act'"
    ]
    assert warned[0].filename == __file__
    assert dict(model.named_modules()) == names


def test_a_function_of_two_arguments_gets_the_path():
    model = make_model()
    seen = []

    def note(module, path):
        seen.append((path, module))
        return module

    assert lomem.map_module(model, note) is model
    assert seen[-1] == ("/", model)
    assert len(seen) == len(list(model.modules()))
    assert all(model.get_submodule(path[1:].replace("/", ".")) is module for path, module in seen)
    seen.clear()
    # A shared module comes under the first of its names that matches.
    lomem.map_module(model, note, r"^(1\.b|2)$")
    assert [path for path, _ in seen] == ["/1/b"]
    # Parameters with defaults and further ones are the function's own.
    for fn in (lambda module, bits=4: seen.append(bits) or module, lambda module, *rest: seen.append(rest) or module):
        seen.clear()
        lomem.map_module(nn.Sequential(nn.GELU()), fn)
        assert seen in ([4, 4], [(), ()])


def test_order_and_roots():
    seen = []
    model = make_model()
    names = {id(module): name for name, module in model.named_modules()}
    lomem.map_module(model, lambda m: seen.append(names[id(m)]) or m)
    assert len(seen) == len(set(seen)) == len(names)
    assert seen[-1] == ""
    assert seen.index("0.first") < seen.index("0")
    # The root itself, and what is put around a module, which is not looked at again.
    linear = nn.Linear(4, 4)
    assert type(lomem.map_module(linear, convert)) is Randomized
    wrapped = lomem.map_module(nn.Sequential(nn.GELU()), lambda m: nn.Sequential(m) if isinstance(m, nn.GELU) else m)
    assert isinstance(wrapped[0], nn.Sequential)
    assert isinstance(wrapped[0][0], nn.GELU)
    with pytest.raises(TypeError, match=r"^lomem\.map_module: fn returned NoneType for a GELU, expected a module$"):
        lomem.map_module(nn.Sequential(nn.GELU()), lambda m: None)


def test_a_converted_layer_keeps_what_the_layer_had(device):
    plain = nn.Linear(6, 4, device=device, dtype=torch.float64).eval()
    plain.weight.requires_grad_(False)
    calls = []
    handle = plain.register_forward_hook(lambda *args: calls.append("forward"))
    plain.register_forward_pre_hook(lambda *args: calls.append("before"))
    plain.note = "kept"
    before = torch.get_rng_state()
    layer = lomem.convert_linear(plain, Randomized, proj_dim_ratio=0.5, matmul="dct")
    assert torch.equal(torch.get_rng_state(), before)
    assert layer is not plain
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert (layer.training, layer.note, layer.matmul, layer.proj_dim_ratio) == (False, "kept", "dct", 0.5)
    assert repr(layer) == "RandomizedLinear(in_features=6, out_features=4, bias=True, matmul='dct', proj_dim_ratio=0.5)"
    x = torch.randn(5, 6, device=device, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    assert calls == ["before", "forward"] * 2
    # Hooks are shared, for the handles that remove them; what others noted is not.
    handle.remove()
    layer(x)
    assert calls == [*["before", "forward"] * 2, "before"]
    assert torch.equal(copy.deepcopy(layer)(x), plain(x))
    assert lomem.convert_linear(nn.Linear(6, 4, bias=False), Randomized, proj_dim=1).bias is None


def test_what_is_left_alone():
    def patched(x):
        return x

    overridden = nn.Linear(4, 4)
    overridden.forward = patched
    attention = nn.MultiheadAttention(4, 2)
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert parametrize.is_parametrized(weight_normed)
    left = [nn.GELU(), nn.Conv1d(4, 4, 1), overridden, attention.out_proj, weight_normed, nn.Bilinear(4, 4, 4)]
    left += [nn.LazyLinear(4), Randomized(4, 4, proj_dim=1), torch.ao.nn.qat.Linear, nn.Identity()]
    for module in left:
        if isinstance(module, nn.Module):
            assert convert(module) is module
    # An older weight norm, a hook that computes the weight, goes on.
    with pytest.warns(FutureWarning):
        hooked = nn.utils.weight_norm(nn.Linear(4, 4))
    layer = convert(hooked)
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), hooked(x))
    layer(x).sum().backward()
    assert hooked.weight_g.grad is not None


def test_errors_of_options():
    with pytest.raises(ValueError, match=r"^lomem::randomized_linear: proj_dim_ratio is 2, expected a number in"):
        lomem.convert_linear(nn.Linear(4, 4), Randomized, proj_dim_ratio=2.0)


SCRIPTED = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.GELU()))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, lambda m: m), TypeError, "root is of type int, expected a torch.nn.Module"),
        ((nn.GELU(), 3), TypeError, "fn is of type int, expected a function that takes a module"),
        ((nn.GELU(), lambda m: None), TypeError, "fn returned NoneType for a GELU, expected a module"),
        ((nn.GELU(), lambda m: m, 3), ValueError, "pattern is 3, expected a regular expression: "),
        ((nn.GELU(), lambda m: m, "("), ValueError, r"pattern is '\(', expected a regular expression: "),
        (
            (nn.Sequential(SCRIPTED), lambda m: m if isinstance(m, nn.Sequential) else nn.Identity()),
            ValueError,
            "fn returned a Identity for module '0' of a ScriptModule, whose modules cannot be replaced",
        ),
    ],
)
def test_errors_are_one_sentence(arguments, kind, message):
    with pytest.raises(kind, match=rf"^lomem.map_module: {message}") as error:
        lomem.map_module(*arguments)
    assert "\n" not in str(error.value)


def test_the_command_of_the_table(tmp_path):
    pytest.importorskip("transformers")
    files = [tmp_path / "table.json", tmp_path / "table.md"]
    command = [sys.executable, ROOT / "benchmarks/fewbit_table.py", "--small", "--json", files[0], "--table", files[1]]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    estimates = json.loads(files[0].read_text())["estimates"]
    for rows in estimates.values():
        names = ["plain", "3-bit GELU", "randomized linear", "both"] if hasattr(lomem.nn, "GELU") else None
        assert list(rows) == (names or ["plain", "randomized linear"])
        for name in list(rows)[1:]:
            assert rows[name]["saved_bytes"] < rows["plain"]["saved_bytes"], name
    committed = json.loads((ROOT / "benchmarks/results/fewbit-roberta.json").read_text())
    assert list(committed["estimates"]) == list(estimates)
    # To the byte. A layer's exact linears keep the inputs of q, k and v (once), of the first and of the second of the
    # MLP; that of the attention's last is kept by the attention. Randomized ones keep 20 % of six inputs, and a seed
    # each.
    fused = committed["estimates"]["sdpa"]
    rows, kept = 128 * 128, round(128 * 128 * 0.2)
    exact, randomized = rows * (768 + 768 + 3072) * 4, kept * (5 * 768 + 3072) * 4 + 6 * 8
    assert fused["plain"]["saved_bytes"] - fused["randomized linear"]["saved_bytes"] == 12 * (exact - randomized)


ACTIVATIONS = [
    nn.ReLU(inplace=True),
    *(plain for _, plain in MODULES.values()),
]


@pytest.mark.parametrize("plain", ACTIVATIONS, ids=lambda module: type(module).__name__)
def test_convert_activation(plain):
    plain = copy.deepcopy(plain).eval()
    calls = []
    handle = plain.register_forward_hook(lambda *args: calls.append(1))
    result = lomem.convert_activation(plain, bits=5, criterion="primitive")
    assert type(result) is getattr(lomem.nn, type(plain).__name__)
    assert not result.training
    x = torch.randn(50)
    assert torch.equal(result(x.clone()), plain(x.clone()))
    assert len(calls) == 2
    handle.remove()
    result(x.clone())
    assert len(calls) == 2
    if isinstance(result, lomem.nn.FewBitActivation):
        assert (result.bits, result.criterion, result.steps) == (5, "primitive", None)
    copy.deepcopy(result)(x.clone().requires_grad_() * 1).sum().backward()


def test_convert_activation_leaves_others():
    class Own(nn.GELU):
        pass

    replaced = nn.GELU()
    replaced.forward = torch.sin
    for module in (nn.Linear(2, 2), nn.PReLU(), Own(), lomem.nn.GELU(), replaced, nn.MultiheadAttention(4, 2)):
        assert lomem.convert_activation(module, bits=4) is module
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Sequential(nn.ReLU()))
    lomem.map_module(model, lambda m: lomem.convert_activation(m, bits=4))
    assert isinstance(model[1], lomem.nn.GELU)
    assert isinstance(model[2][0], lomem.nn.ReLU)
    with pytest.raises(ValueError, match=r"bits is 9, expected 1 to 8"):
        lomem.convert_activation(nn.GELU(), bits=9)
