"""The half of the rule for the default that needs no training (benchmarks/initial_gradients.py)."""

import math
import re
import sys
from pathlib import Path

import lomem
import pytest
import torch
from torch import nn
from zoo import ZOO

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
#: The setting of the default, with codes in place of exact pairs.
DEFAULT = "drawn, 4 bits"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def script():
    path = list(sys.path)
    sys.path[:0] = FOLDERS
    import initial_gradients

    yield initial_gradients
    sys.path[:] = path


#: Those that the rule names, which the script makes in other sizes than the zoo.
NAMED = (
    "efficientnet-b0",
    "mobilevit",
    "mobilevit-v2",
    "conv, BatchNorm, SiLU",
    "gpt2 (6 layers)",
    "llama (6 layers)",
    "bert (6 layers)",
    "vit (6 layers)",
)


def test_the_nets_are_those_of_the_rule(script):
    assert list(script.NETS) == [*NAMED, *(f"zoo: {name}" for name in ZOO)]


def test_the_setting_is_the_default(script):
    x = torch.linspace(-4, 4, 64)
    gradients = []
    for options in ({"pairs": "keep"}, script.SETTINGS[DEFAULT]):
        model = nn.Sequential(nn.SiLU())
        lomem.convert(model, **options)
        lomem.random.manual_seed(0)
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(model(leaf).sum(), leaf)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("net", [*NAMED, *(f"zoo: {name}" for name in ZOO)])
def test_the_default_passes(net, script):
    found = script.cosines(net, DEFAULT)
    if found is None:
        assert net == "zoo: phi3"  # its activation is a factor of a product whose other half shares its storage
        return
    one, mean = found
    assert one >= 0.9
    assert mean >= 0.99
    assert script.passes(DEFAULT, one, mean)
    assert mean > one - 1e-12  # where nothing but rounding in float64 is left, either may be larger


def cells_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_what_passes(script):
    assert script.passes("steps, 6 bits", 0.99, 0.99)
    assert not script.passes("steps, 6 bits", 0.98, 0.98)
    assert script.passes("drawn, 2 bits", 0.9, 0.99)
    assert script.passes("8 bits", 0.9, 0.99)
    assert not script.passes("drawn, 2 bits", 0.89, 0.99)
    assert not script.passes("drawn, 2 bits", 0.95, 0.98)
    assert not script.passes("drawn, 2 bits", math.nan, math.nan)


def test_the_committed_table_is_of_all_nets_and_settings_and_admits_the_default(script):
    header, _, *nets, verdicts = cells_of(script.RESULTS)
    assert header == ["net", *script.COMPARED]
    assert [row[0] for row in nets] == list(script.NETS)
    for setting, cells in zip(header[1:], list(zip(*nets, strict=True))[1:], strict=True):
        failed = sum(cell.startswith("**") for cell in cells)
        for cell in filter(None, cells):
            numbers = [float(number) for number in re.findall(r"\d\.\d+", cell)]
            assert len(numbers) == (1 if setting.startswith("steps") else 2)
        verdict = verdicts[header.index(setting)]
        assert verdict == "passes" if not failed else verdict.startswith(f"fails on {failed} of ")
    assert verdicts[header.index(DEFAULT)] == "passes"


def test_the_documents_say_what_the_table_says(script):
    header, _, *nets, _ = cells_of(script.RESULTS)
    checked = []
    names = {"step functions, paper": "steps, 2 bits, paper", "`bits=8`": "8 bits", "`bits=4`": "4 bits"}
    for kind, setting, bits, _, least, verdict in (row for row in cells_of(ROOT / "docs/convert.md") if len(row) == 6):
        name = names.get(setting)
        if kind not in ("(a)", "(b)") or setting == "**exact pairs**":
            continue
        number = bits.strip("*").split(",")[0]
        what = {"step functions": "steps", "drawn codes": "drawn"}.get(setting.strip("*"))
        name = name or f"{what}, {number} bit{'s' * (number != '1')}"
        numbers = []
        for row in nets:
            if cell := row[header.index(name)]:
                found = [float(number) for number in re.findall(r"-?\d\.\d+", cell)]
                numbers.append((found[0], found[-1], cell.startswith("**")))
        stated = re.findall(r"-?\d\.\d+", least)
        ends = [min(mean for mean, _, _ in numbers), min(one for _, one, _ in numbers)][: len(stated)]
        for text, end in zip(stated, ends, strict=True):
            # Half a unit of the last digit that is stated; a bit more, since a half is not exact.
            digits = len(text.partition(".")[2])
            assert abs(float(text) - end) <= 0.5001 * 10**-digits, (name, text, end)
        failed = sum(bad for *_, bad in numbers)
        fails = re.search(r"fails on (\d+)", least)
        assert (int(fails[1]) if fails else 0) == failed
        assert (verdict == "not admitted") == (failed > 0)
        checked.append(name)
    assert len(checked) == len(set(checked)) == 13  # (in one row are 5 and 6 drawn bits)


def test_the_table_says_what_fails(script):
    found = {("a", "steps, 2 bits"): (0.5, 0.5), ("a", DEFAULT): (0.95, 0.9961), ("b", "steps, 2 bits"): (0.999, 0.999)}
    found["b", DEFAULT] = None
    lines = script.table(found, ["a", "b"], ["steps, 2 bits", DEFAULT]).splitlines()
    assert "| a | **0.5000** | 0.9961 (0.9500) |" in lines
    assert "| b | 0.9990 |  |" in lines
    assert "| all | fails on 1 of 2 | passes |" in lines
