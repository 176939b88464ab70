"""The table of activations in C++ against everything that is written down beside it."""

import inspect
import math
import re
from pathlib import Path

import lomem
import lomem.fit
import pytest
import torch.nn as nn
from activations_helpers import MODULES_OF_LOMEM_ALONE
from helpers import PUBLISHED
from lomem import functional as LF
from lomem.fit._functions import FUNCTIONS

# name -> ((parameter, default or None), ...), whether the gradient is exact, whether a step function is published
ROWS = {name: facts for name, *facts in lomem._C.activations()}
#: The function of torch's that has the name of a row.
PYTHON_NAMES = {name: "gelu" if name == "gelu_tanh" else name for name in ROWS}
HEADER = Path(lomem.__file__).parent / "include/lomem/ops/activations.h"
if not HEADER.exists():  # run from a checkout
    HEADER = Path(__file__).parents[2] / "cpp/include/lomem/ops/activations.h"
FEW_BIT = {"bits": 3, "criterion": "derivative", "steps": None, "rounding": "nearest", "seed": None}
OTHERS = {*PUBLISHED, "drawn_levels", "step_activation", "step_function"}


def module_of(function):
    """The class of lomem.nn that calls a function."""
    (found,) = [
        kind
        for kind in vars(lomem.nn).values()
        if isinstance(kind, type) and getattr(kind, "_function", None) is getattr(LF, function)
    ]
    return found


def test_every_function_is_a_row_and_every_row_a_function():
    assert set(PYTHON_NAMES.values()) == set(LF.activations.__all__) - OTHERS


@pytest.mark.parametrize("name", ROWS)
def test_functions_take_the_parameters_of_the_table(name):
    parameters, exact, _ = ROWS[name]
    signature = inspect.signature(getattr(LF, PYTHON_NAMES[name])).parameters
    positional = {
        p.name: None if p.default is p.empty else p.default
        for p in signature.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("input", "inplace", "approximate")
    }
    assert positional == dict(parameters)
    keywords = {p.name: p.default for p in signature.values() if p.kind is p.KEYWORD_ONLY}
    keywords.pop("fast", None)
    assert keywords == ({} if exact else FEW_BIT)


@pytest.mark.parametrize("name", ROWS)
def test_modules_take_the_parameters_of_the_table(name):
    parameters, exact, _ = ROWS[name]
    module = module_of(PYTHON_NAMES[name])
    taken = [argument for argument in module._arguments if argument not in ("inplace", "approximate")]
    assert taken == [parameter for parameter, _ in parameters]
    assert issubclass(module, lomem.nn.FewBitActivation) != exact
    values = {parameter: 0.25 if default is None else default for parameter, default in parameters}
    made = module(*[values[parameter] for parameter, default in parameters if default is None])
    assert {parameter: getattr(made, parameter) for parameter in values} == values
    if module.__name__ not in MODULES_OF_LOMEM_ALONE:
        assert issubclass(module, getattr(nn, module.__name__))


def functions_of_the_header():
    """Name -> parameters and defaults as written, of the functions of a tensor in the C++ header."""
    text = HEADER.read_text()
    found = re.findall(r"inline at::Tensor (\w+)\(\s*(.*?)\) \{\n", text, flags=re.DOTALL)
    result = {}
    for name, arguments in found:
        parts = [part.strip() for part in re.sub(r"\s+", " ", arguments).split(", ")]
        numbers = [re.fullmatch(r"double (\w+)(?: = (\S+))?", part) for part in parts]
        result[name] = (
            tuple((m[1], None if m[2] is None else float(m[2])) for m in numbers if m),
            any("FewBit" in part for part in parts),
        )
    return result


def test_the_header_has_the_functions_and_parameters_of_the_table():
    declared = functions_of_the_header()
    assert set(declared) == set(PYTHON_NAMES.values()) | set(PUBLISHED)
    for name, (parameters, exact, _) in ROWS.items():
        spelled = tuple(("lambda" if parameter == "lambd" else parameter, value) for parameter, value in parameters)
        assert declared[PYTHON_NAMES[name]] == (spelled, not exact), name


def test_the_header_has_a_module_for_every_row():
    text = (HEADER.parents[1] / "nn/activations.h").read_text()
    modules = set(re.findall(r"TORCH_MODULE(?:_IMPL)?\((\w+)", text))
    expected = {module_of(name).__name__ for name in PYTHON_NAMES.values()}
    assert modules == expected | {entry.module.__name__ for entry in PUBLISHED.values()}


def test_every_smooth_row_can_be_fitted():
    smooth = {name for name, (_, exact, _) in ROWS.items() if not exact}
    assert smooth <= set(FUNCTIONS)


@pytest.mark.parametrize("name", ROWS)
def test_which_criteria_a_row_has(name):
    parameters, exact, published = ROWS[name]
    values = [1.0 if default is None else default for _, default in parameters]
    if exact:
        with pytest.raises(ValueError, match=f"function is '{name}', expected one of gelu, "):
            LF.step_function(name, 2, parameters=values)
        return
    for criterion in ("derivative", "primitive"):
        for bits in range(1, 9):
            assert LF.step_function(name, bits, criterion=criterion, parameters=values).bits == bits
    if not published:
        with pytest.raises(ValueError, match="criterion is 'paper', expected 'derivative' or 'primitive' for "):
            LF.step_function(name, 2, criterion="paper", parameters=values)
        return
    steps = LF.step_function(name, 2, criterion="paper", parameters=values)
    gelu, silu = (entry.step for entry in PUBLISHED.values())
    oracle = gelu if name.startswith("gelu") else silu
    scale = 1.702 if module_of(PYTHON_NAMES[name]).__name__ in MODULES_OF_LOMEM_ALONE else 1.0
    assert steps.levels == oracle.levels
    pairs = zip(steps.boundaries, oracle.boundaries, strict=True)
    assert all(math.isclose(a * scale, b, rel_tol=1e-15) for a, b in pairs)
    with pytest.raises(ValueError, match="bits is 3, expected 2 for criterion 'paper'"):
        LF.step_function(name, 3, criterion="paper", parameters=values)
