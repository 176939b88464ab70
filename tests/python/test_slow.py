"""The list of slow enumerations."""

import re
from pathlib import Path

import pytest
from conftest import SLOW


@pytest.mark.parametrize("name", SLOW)
def test_every_enumeration_is_there(name):
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    assert any(re.search(rf"^ *def {name}\(", source, re.MULTILINE) for source in sources)
    assert SLOW[name] > 1
