"""The tool that counts in how many files an op stands."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import lomem
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/files_per_op.py"
sys.path.insert(0, str(TOOL.parent))

import files_per_op  # noqa: E402


@pytest.fixture(scope="module")
def texts():
    return files_per_op.sources(ROOT)


# Names of no op here, so that this file counts for none.
@pytest.mark.parametrize(
    ("name", "text", "stands"),
    [
        ("rezelu2", "rezelu2", True),
        ("rezelu2", "class ReZELU2Impl {", True),
        ("rezelu2", "using StepReZELU2 = int;", True),
        ("rezelu2", "LOMEM_REZELU2(x)", True),
        ("rezelu2", "rezelu2_forward", True),
        ("rezelu2", "test_rezelu2s", False),
        ("rezelu2", "rezelu", False),
        ("zelu", "ReZELU2", False),
        ("zelu", "rezelu2", False),
        ("zelu", "QuickZELU", True),
        ("zelu", "ZELUTanh", True),
        ("tanh", "ZELUTanh", True),
        ("zelu", "fast::ZELU", True),
        ("quick_zelu", "QuickZELU", True),
        ("quick_zelu", "quickzelu", True),
        ("quick_zelu", "quick zelu", False),
        ("ms_any_norm", "MSAnyNormOptions", True),
        ("ms_any_norm", "any_norm", False),
        ("elu", "zelu, xelu, relu, gelu", False),
        ("elu", "F.elu(x)", True),
        ("relu", "relu9 NoisyReLU9", False),
        ("relu", "NoisyReLU(0.1)", True),
        ("logsmooth", "log_smooth", True),
        ("fold_bits", "unfold_bits", False),
        ("moosh", "MooshImpl mooshmash", True),
        ("moosh", "mooshmash", False),
    ],
)
def test_spellings(name, text, stands):
    assert files_per_op.stands_in(files_per_op.spelled(name), text) == stands


def test_ops_are_those_of_the_dispatcher(texts):
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas()]
    names = {name.removeprefix("lomem::") for name in schemas if name.startswith("lomem::")}
    halves = {name for name in names if re.sub("_(forward|backward|weight_grad)$", "", name) in names - {name}}
    assert len(halves) >= 5
    assert names - halves == set(files_per_op.ops(texts))


def test_both_ways_of_defining_an_op():
    listed = (
        '// LOMEM_OP(name, schema)\n#define LOMEM_OP(name, ...)\nLOMEM_OP(\n    one, "()")\nLOMEM_OP(one_forward, 0)\n'
        '  m.def("two(Tensor x)");\n  m.def(\n      "half_forward(Tensor x)");'
    )
    assert files_per_op.ops({"cpp/src/a.cpp": listed, "python/b.py": 'm.def("three(Tensor x)")'}) == [
        "half_forward",
        "one",
        "two",
    ]


def test_the_family_is_what_the_package_offers(texts):
    offered = (
        set(lomem.functional.activations.__all__) - {"drawn_levels", "step_function"} - set(files_per_op.ops(texts))
    )
    assert set(files_per_op.activations(texts)) == offered
    assert offered >= files_per_op.EVERYDAY
    assert len(offered - files_per_op.EVERYDAY) > 10


def test_sources_are_tracked_and_not_generated(texts):
    assert {"Makefile", "CMakeLists.txt", "python/lomem/_C.pyi", "tools/files_per_op.py"} <= texts.keys()
    assert not texts.keys() & {*files_per_op.GENERATED, "README.md", "tools/public_names.json"}
    assert "cpp/include/lomem/core/fast_forward_tables.h" in files_per_op.GENERATED
    written = [path for path, text in texts.items() if re.search(r"^// .*Written by[\s/]+(python )?tools/", text)]
    assert written == []


def test_a_copy_without_git(tmp_path):
    for path in (".gitignore", "cpp/a.cpp", "build/b.cpp", "tools/__pycache__/c.pyc", "demo.png", "docs/demo.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("/build/\n__pycache__/\n/demo.png\n", encoding="utf-8")
    assert files_per_op.tracked(tmp_path) == [".gitignore", "cpp/a.cpp", "docs/demo.png"]
    assert list(files_per_op.sources(tmp_path)) == ["cpp/a.cpp"]


def test_a_count_by_another_way(texts):
    """By the words of all identifiers, alone and together."""
    word = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

    def spellings(text):
        for identifier in re.findall(r"[A-Za-z]+", text):
            parts = word.findall(identifier.lower() if identifier.isupper() else identifier)
            for i, j in itertools.combinations(range(len(parts) + 1), 2):
                yield "".join(parts[i:j]).lower()

    spelled = {path: set(spellings(text)) for path, text in texts.items()}
    names = set(files_per_op.activations(texts)) - files_per_op.EVERYDAY
    names = {name for name in names if name.isalpha() and not name.endswith("elu")}
    assert len(names) > 6
    for name in names:
        expected = [path for path in texts if name in spelled[path] and path != files_per_op.ITSELF]
        assert files_per_op.files(name, texts) == expected != []


def test_tests_are_counted_apart():
    texts = {"cpp/a.cpp": "zelu", "tests/cpp/b.cpp": "ZELU", "tests/python/c.py": "F.zelu", "tools/d.py": "relu"}
    assert files_per_op.count("zelu", texts) == (1, 2)


LIMIT = {"op": 12, "activation": 10, "everyday": None}


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"op": (12, 99), "activation": (10, 99), "everyday": (99, 99)}, None),
        ({"op": (13, 0)}, "op is in 13 source files, expected at most 12"),
        ({"activation": (11, 0)}, "activation is in 11 source files, expected at most 10"),
    ],
)
def test_what_is_over_its_limit(counts, sentence):
    counts = {name: files_per_op.Count(*count) for name, count in counts.items()}
    assert files_per_op.problems(counts, LIMIT, {}) == ([] if sentence is None else [sentence])


def test_everyday_names_are_over_the_limit(texts):
    counts = {name: files_per_op.count(name, texts).sources for name in files_per_op.EVERYDAY}
    assert min(counts.values()) > files_per_op.LIMIT_OF_ACTIVATIONS


def test_long_files():
    lines = {"a.py": "x\n" * 800, "b.py": "x\n" * 801, "c.py": "x\n" * 900}
    long = files_per_op.too_long(lines)
    assert list(long.items()) == [("c.py", 900), ("b.py", 801)]
    assert files_per_op.problems({}, {}, long)[1] == "b.py has 801 lines, expected at most 800"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=600, check=False
    )


def test_the_command(texts):
    rows = [line.split() for line in run().stdout.splitlines()[1:]]
    counts = [int(row[2]) for row in rows if len(row) == 5]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == len(files_per_op.limits(texts))
    name = min(set(files_per_op.activations(texts)) - files_per_op.EVERYDAY)
    listed = run("--files", name).stdout.split()
    in_sources, in_tests = (str(sum(path.startswith("tests/") == tests for path in listed)) for tests in (False, True))
    assert [name, "activation", in_sources, "10", in_tests] in rows
    assert "python/lomem/functional/activations.py" in listed
    unknown = run("--files", "geglu")
    assert unknown.returncode == 2
    assert "--files is geglu, expected one of " in unknown.stderr


def test_the_check_says_what_the_table_says(texts):
    result = run("--check")
    limit = files_per_op.limits(texts)
    counts = {name: files_per_op.count(name, texts) for name in limit}
    found = files_per_op.problems(counts, limit, files_per_op.too_long(texts))
    assert result.stderr.splitlines() == found
    assert result.returncode == int(bool(found))


def test_nothing_is_over_its_limit(texts):
    result = run("--check")
    assert (result.returncode, result.stderr) == (0, "")
    assert files_per_op.too_long(texts) == {}
