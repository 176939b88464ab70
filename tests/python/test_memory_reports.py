"""Tables, plots, JSON and errors of lomem.memory."""

import builtins
import json
import re

import lomem
import pytest
import torch
from lomem import memory
from lomem._units import size
from memory_helpers import Tiny, reports, tiny_input
from torch import nn

SIZES = [0, 1, 7, 1000, 1023, 1024, 1025, 2000, 10**4, 10**5, 1048512, 2**20 - 1, 2**20, 2**20 + 1, 10**7, 10**8, 10**9]


SIZES += [2**30 - 1, 2**30, 10**10, 10**12, 2**40, 10**15]


@pytest.mark.parametrize("nbytes", SIZES)
def test_sizes_show_something(nbytes):
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for sign in (1, -1):
        text, unit = size(sign * nbytes).split(" ")
        value = float(text.replace(",", ""))
        # At least three digits: half a unit of the last is 0.5 % of the smallest.
        assert abs(value * units[unit] - sign * nbytes) <= 0.005 * nbytes
        assert unit == "B" or abs(value) >= 1
        assert unit == "GiB" or abs(value) < 1024
        assert len(text.replace("-", "")) <= 7 or unit == "GiB"


def test_reports_of_small_models_show_their_bytes():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    # GELU's input and its output.
    assert "64 B" in str(memory.profile(model, x))
    assert re.search(r"saved for backward +64 B, 0 B of them weight copies", str(memory.step_peak(model, x)))
    # The input alone.
    assert "saved for backward: 64 B -> 32 B (-50.0 %)" in str(lomem.convert(model, x))


def test_reports_as_json():
    for report in reports():
        contents = json.loads(report.to_json())
        assert contents == report.to_dict()
        assert contents["saved_bytes"] == report.saved_bytes
    assert contents["peak"]["categories"]["parameters"] == (16 * 16 + 16) * 4


def test_reports_as_tables():
    profile, step = map(str, reports())
    for text in ("norm", "MSLayerNorm", "no matrix product takes it", "aten.mul.Tensor in then"):
        assert text in profile
    for text in ("parameters", "optimizer state", "peak of the step", "(optimizer)"):
        assert text in step


def test_reports_without_rich(monkeypatch):
    shown = reports()
    real_import = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.startswith(("rich", "matplotlib")):
            raise ImportError("no", name=name.split(".")[0])
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    assert "no matrix product takes it" in str(shown[0])
    assert "parameters" in str(shown[1])
    with pytest.raises(ImportError, match=r"table\(\) needs the package rich: pip install 'lomem\[bench\]'"):
        shown[0].table()
    with pytest.raises(ImportError, match=r"lomem.memory.plot needs the package matplotlib"):
        shown[0].plot("memory.png")


def test_pictures(tmp_path):
    profile, step = reports()
    profile.plot(tmp_path / "profile.png")
    step.plot(tmp_path / "step.svg")
    memory.plot({"plain": step, "converted": step}, tmp_path / "both.png")
    assert all((tmp_path / name).stat().st_size for name in ("profile.png", "step.svg", "both.png"))
    with pytest.raises(ValueError, match=r"path is .*nowhere.both.png, expected a file in a folder that exists"):
        memory.plot({"plain": step}, tmp_path / "nowhere" / "both.png")
    with pytest.raises(ValueError, match=r"path is both.xyz, expected a file name that ends in one of"):
        memory.plot({"plain": step}, "both.xyz")
    with pytest.raises(TypeError, match=r"reports are of the types Profile, StepPeak, expected one type"):
        memory.plot({"a": profile, "b": step}, tmp_path / "both.png")
    with pytest.raises(TypeError, match=r"reports is .*, expected a dict of names and reports"):
        memory.plot(step, tmp_path / "both.png")


class LooksAtFloats(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


BAD = {
    "excluded": (
        lambda: memory.saved_for_backward([3]),
        TypeError,
        "lomem.memory.saved_for_backward: exclude has a int, expected only tensors",
    ),
    "model": (
        lambda: memory.profile(torch.zeros(1)),
        TypeError,
        "lomem.memory.profile: model is of type Tensor, expected a torch.nn.Module",
    ),
    "lazy": (
        lambda: memory.profile(nn.LazyLinear(3), tiny_input()),
        ValueError,
        "weight of model has no shape yet, expected a model that has run once",
    ),
    "batch": (
        lambda: memory.step_peak(Tiny(), 3),
        TypeError,
        "lomem.memory.step_peak: batch is of type int, expected a dict",
    ),
    "loss type": (
        lambda: memory.profile(Tiny(), tiny_input(), loss=3),
        TypeError,
        "loss is of type int, expected a callable",
    ),
    "loss result": (
        lambda: memory.profile(Tiny(), tiny_input(), loss=lambda y: 3),
        TypeError,
        "loss returned a int, expected a tensor of one element",
    ),
    "loss shape": (
        lambda: memory.step_peak(Tiny(), tiny_input(), loss=lambda y: y),
        ValueError,
        r"loss returned a tensor of shape \(4, 4\), expected one element",
    ),
    "loss without gradient": (
        lambda: memory.step_peak(Tiny(), tiny_input(), loss=lambda y: y.detach().sum()),
        ValueError,
        "the loss needs no gradients, expected one that",
    ),
    "nothing needs gradients": (
        lambda: memory.profile(Tiny().requires_grad_(False), tiny_input()),
        ValueError,
        "the output, of type Tensor, has no floating-point tensor that needs gradients",
    ),
    "optimizer": (
        lambda: memory.step_peak(Tiny(), tiny_input(), torch.optim.SGD),
        TypeError,
        "optimizer is of type type, expected a torch.optim.Optimizer or None",
    ),
    "another model's optimizer": (
        lambda: memory.step_peak(Tiny(), tiny_input(), torch.optim.SGD(Tiny().parameters())),
        ValueError,
        "optimizer holds 4 tensors that are not in model",
    ),
    "steps": (lambda: memory.step_peak(Tiny(), tiny_input(), steps=0), ValueError, "steps is 0, expected a positive"),
    "autocast": (
        lambda: memory.step_peak(Tiny(), tiny_input(), autocast="bf16"),
        TypeError,
        "autocast is 'bf16', expected a torch.dtype",
    ),
    "build_fn": (
        lambda: memory.estimate(Tiny(), tiny_input()),
        TypeError,
        "lomem.memory.estimate: build_fn is of type Tiny, expected a function that builds a model",
    ),
    "build_fn's result": (
        lambda: memory.estimate(lambda: 3, tiny_input()),
        TypeError,
        "lomem.memory.estimate: model is of type int, expected a torch.nn.Module",
    ),
    "device": (
        lambda: memory.estimate(Tiny, tiny_input(), device="tpu"),
        ValueError,
        "device is 'tpu', expected 'cuda' or 'cpu'",
    ),
    "estimated batch": (
        lambda: memory.estimate(Tiny, 3),
        TypeError,
        "lomem.memory.estimate: batch is of type int, expected a dict",
    ),
    "estimated optimizer": (
        lambda: memory.estimate(Tiny, tiny_input(), 3),
        TypeError,
        "lomem.memory.estimate: optimizer is of type int, expected a function",
    ),
    "values": (
        lambda: memory.estimate(lambda: LooksAtFloats(8, 8), tiny_input()),
        RuntimeError,
        "lomem.memory.estimate: the model calls aten._local_scalar_dense.default, which depends on the values of a "
        "tensor, and a fake one has only a shape: measure a small real model with lomem.memory.step_peak",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_sentence(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as error:
        call()
    assert "\n" not in str(error.value)
