"""DTensors: ops, modules and converted models on several processes, against one."""

import subprocess
import sys

import dtensor_models as models
import dtensor_ops as of
import pytest
import torch
from activations_helpers import ALL
from dtensor_helpers import run
from lomem._sharding import rules

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_op_has_a_rule():
    names = {
        name.removeprefix("lomem::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lomem::")
    }
    assert rules.RULES.keys() == names
    for name in names:
        packet = getattr(torch.ops.lomem, name)
        assert packet.overloads() == ["default"]


def test_importing_lomem_imports_no_dtensors():
    script = """
import sys, torch
before = {"torch.distributed.tensor", "torch._dynamo"} & sys.modules.keys()
import lomem
assert {"torch.distributed.tensor", "torch._dynamo"} & sys.modules.keys() == before
import torch.distributed.tensor
from torch._library.simple_registry import singleton
rule = singleton.find("lomem::gated").torch_dispatch_rules.find(torch.distributed.tensor.DTensor)
assert rule is not None and lomem._sharding._classes == (torch.distributed.tensor.DTensor,)
assert all(type(finder).__name__ != "_WhenImported" for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_activations(tmp_path):
    cases = [(of.activation, (name,)) for name in ALL]
    layouts = [("gelu", of.UNEVEN, of.as_it_is), ("relu", of.EVEN, of.transposed)]
    cases += [(of.layouts_of_activation, layout) for layout in layouts]
    run(tmp_path, [*cases, (of.steps_of_the_user, ()), (of.inplace_activation, ()), (of.second_derivative, ())])


def test_codes_and_random_numbers(tmp_path):
    cases = [(of.codes_stay, ()), (of.drawn_codes, ()), (of.groups, ())]
    run(tmp_path, [*cases, *[(of.dropout, (saves,)) for saves in ("mask", "seed")]])


def test_norms_and_gated_units(tmp_path):
    cases = [
        (of.norm, (kind, *layout))
        for kind in ("layer", "rms")
        for layout in ((of.EVEN, 1, True), (of.UNEVEN, 1, False), (of.UNEVEN, 2, True))
    ]
    run(tmp_path, [*cases, (of.gated, (of.UNEVEN,)), (of.sharded_weights_of_norms, ()), (of.gated_in_one, ())])


def test_linear_layers(tmp_path):
    cases = [(of.linear_layers, (shape,)) for shape in (of.EVEN, of.UNEVEN)]
    cases += [(of.randomized, (matmul,)) for matmul in ("gaussian", "dft", "crs", "wta-crs")]
    run(tmp_path, [*cases, (of.linear_layers_in_one, ()), (of.lora_with_dropout, ()), (of.direct_calls, ())])


def test_what_is_around(tmp_path):
    run(tmp_path, [(of.mixed, ()), (of.around, ())])


@pytest.mark.parametrize("name", models.BLOCKS)
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_tensor_parallel_models(tmp_path, sequence, name):
    options = [(order, sequence, local) for order in ("first", "after") for local in (False, True)]
    run(tmp_path, [(models.tensor_parallel, (name, *of)) for of in options])


def test_modules(tmp_path):
    run(tmp_path, [(models.modules, ()), (models.context, ())])


def test_a_transformer(tmp_path):
    run(tmp_path, [(models.llama, (sequence,)) for sequence in (False, True)])


def test_sharded_in_two_dimensions(tmp_path):
    run(tmp_path, [(models.sharded_in_two_dimensions, (sequence,)) for sequence in (False, True)], world=4)
