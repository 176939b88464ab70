"""Batches, as they may be written for conversion, memory and fit."""

import collections

import lomem
import pytest
import torch
from lomem._trace.batch import Batch, as_batch
from torch import nn


def test_a_tensor_a_tuple_a_list_or_a_mapping():
    x = torch.ones(2)
    assert as_batch("f", "batch", x) == Batch((x,), {})
    assert as_batch("f", "batch", (x, 1)) == Batch((x, 1), {})
    assert as_batch("f", "batch", [x, 1]) == Batch((x, 1), {})
    assert as_batch("f", "batch", {"x": x}) == Batch((), {"x": x})
    assert as_batch("f", "batch", collections.UserDict(x=x)) == Batch((), {"x": x})


@pytest.mark.parametrize("value", [3, None, "text", {1, 2}, iter(())])
def test_anything_else_is_named(value):
    wanted = "expected a dict of keyword arguments, a tuple or list of positional ones, or a tensor"
    with pytest.raises(TypeError, match=rf"^f: batch is of type {type(value).__name__}, {wanted}$"):
        as_batch("f", "batch", value)
    with pytest.raises(ValueError, match=r"^g: inputs is of type"):
        as_batch("g", "inputs", value, ValueError)


def test_it_calls_maps_and_lists_its_tensors():
    x, y = torch.ones(2), torch.full((2,), 2.0)
    batch = Batch((x, {"inner": [y]}), {"scale": 3.0})
    assert [id(t) for t in batch.tensors()] == [id(x), id(y)]
    doubled = batch.map(lambda t: 2 * t)
    assert doubled.kwargs == batch.kwargs
    assert torch.equal(doubled.args[0], 2 * x)
    assert torch.equal(doubled.args[1]["inner"][0], 2 * y)
    assert torch.equal(batch.args[0], x)

    class Model(nn.Module):
        def forward(self, x, other, scale):
            return scale * (x + other["inner"][0])

    assert torch.equal(batch.call(Model()), torch.full((2,), 9.0))


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        (lambda m: lomem.convert(m, 3), ValueError, "lomem.convert: example_inputs"),
        (lambda m: lomem.memory.step_peak(m, 3), TypeError, "lomem.memory.step_peak: batch"),
        (lambda m: lomem.fit.calibrate(m, [3]), TypeError, "lomem.fit.calibrate: batch"),
    ],
)
def test_whoever_takes_a_batch_says_the_same_of_another_thing(call, kind, named):
    with pytest.raises(
        kind, match=rf"{named} is of type int, expected a dict of keyword arguments, a tuple or list of"
    ):
        call(nn.Sequential(nn.Linear(2, 2), lomem.nn.GELU(bits=2)))
