"""The edits that the tests of the CUDA kernels must notice follow the sources: `make cuda-mutants` runs them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/cpp/cuda/emulator"))

import mutants  # noqa: E402


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_code(mutant):
    text = (ROOT / "cpp/include/lomem" / mutant.header).read_text(encoding="utf-8")
    assert mutants.mutated(mutant, text) != text
    line = text[: mutants.place(mutant, text)].rpartition("\n")[2]
    assert "//" not in line, "the edit is of a comment"


def test_names_are_unique():
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(names) == len(set(names))


def test_a_missing_place_is_an_error():
    mutant = mutants.MUTANTS[0]._replace(old="int x;", nth=1)
    assert mutants.mutated(mutant, "int x;\nint x;\n") == f"int x;\n{mutant.new}\n"
    with pytest.raises(ValueError, match=r"has 1 times 'int x;', expected more than 1"):
        mutants.mutated(mutant, "int x;\n")
