"""No public name goes away in silence: tools/public_names.py against the names of the last list."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import lomem
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/public_names.py"
BEFORE = ROOT / "tools/public_names.json"
sys.path.insert(0, str(TOOL.parent))

import public_names  # noqa: E402


@pytest.fixture(scope="module")
def names():
    return public_names.public_names()


@pytest.fixture
def notes():
    return public_names.unreleased((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


def test_every_removal_is_in_the_changelog():
    result = subprocess.run(
        [sys.executable, str(TOOL), "--against", str(BEFORE)], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_list_is_written_as_the_tool_writes_it(tmp_path):
    before = json.loads(BEFORE.read_text(encoding="utf-8"))
    public_names.write(before, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == BEFORE.read_text(encoding="utf-8")
    assert list(before) == ["C++", "Python", "command line", "headers", "ops"]
    assert all(len(found) > 20 for found in before.values())


REMOVED = {
    "Python": ["lomem.nn.NeverWas", "lomem.functional.never_was"],
    "C++": ["lomem::never_was", "lomem::nn::NeverWas"],
    "headers": ["lomem/never_was.h"],
    "ops": ["lomem::never_was_forward"],
    "command line": ["lomem bench --never-was", "lomem never-was"],
}


def test_a_removal_is_found_in_every_section(names, notes, capsys):
    before = {section: {**found, **dict.fromkeys(REMOVED[section], "")} for section, found in names.items()}
    assert public_names.compare(before, names, notes) == [name for section in names for name in REMOVED[section]]
    assert capsys.readouterr().out.count("does not say so") == sum(map(len, REMOVED.values()))
    mentioned = " ".join(f"`{name}`," for found in REMOVED.values() for name in found)
    assert public_names.compare(before, names, mentioned) == []


def test_what_is_inside_of_a_removed_name_goes_with_it(names, capsys):
    inside = {"lomem.gone": "module", "lomem.gone.Class": "class ()", "lomem.gone.Class.method": "(self)"}
    before = {**names, "Python": names["Python"] | inside}
    assert public_names.compare(before, names, "") == ["lomem.gone"]
    assert public_names.compare(before, names, "`lomem.gone` is no more.") == []
    # A class that is not mentioned is not excused by a module that is still there.
    before = {**names, "Python": names["Python"] | {"lomem.nn.Gone": "class ()", "lomem.nn.Gone.method": "(self)"}}
    assert public_names.compare(before, names, "`lomem.nn`") == ["lomem.nn.Gone"]


def test_changes_and_additions_are_no_removals(names, capsys):
    before = {**names, "Python": names["Python"] | {"lomem.convert": "(model)"}}
    after = {**names, "ops": names["ops"] | {"lomem::new": "lomem::new(Tensor input) -> Tensor"}}
    assert public_names.compare(before, after, "") == []
    printed = capsys.readouterr().out
    assert printed.startswith("changed  Python: lomem.convert\n    was  (model)\n    is   (model: 'nn.Module'")
    assert printed.endswith("added    ops: lomem::new\n")


@pytest.mark.parametrize(
    ("name", "text", "mentioned"),
    [
        ("lomem.bench", "`lomem.bench` and others", True),
        ("lomem.bench", "without lomem.bench.", True),
        ("lomem.bench", "`lomem.bench_report` and `lomem.bench.main`", False),
        ("lomem.bench", "`lomem.commands.bench`", False),
        ("lomem::gelu", "`lomem::gelu`: now elsewhere", True),
        ("lomem::gelu", "`lomem::gelu::value`, `lomem::nn::gelu`", False),
        ("lomem/kernels.h", "`lomem/cpu/kernels.h`", False),
        ("lomem/kernels.h", "the header lomem/kernels.h", True),
        ("lomem bench --only", "`lomem bench --only-this`", False),
        ("lomem bench --only", "`lomem bench --only CASE`", True),
    ],
)
def test_a_mention_is_the_whole_name(name, text, mentioned):
    assert public_names.is_mentioned(name, text) == mentioned


def test_only_what_is_not_released_and_not_added_is_read():
    text = (
        "## [Unreleased]\n\n### Added\n\n- new\n\n### Removed\n\n- old\n  one\n\n## [0.1.0]\n\n### Removed\n\n- older\n"
    )
    assert public_names.unreleased(text) == "Removed - old one"
    assert public_names.unreleased("# Log\n") == ""


HEADER = """
// namespace not_here { void a(); }
#pragma once
#define LOMEM_A(x) \\
  x { }
#define LOMEM_DETAIL_B
namespace lomem {
enum class Kind : int { one = 1, two };
/* int b; */
template <class T, int n = (1 > 0 ? 1 : 2)>
LOMEM_API std::map<T, std::function<int(T)>> call(const T& x = T{1}, const char* s = "};") { return { {x, f(x)} }; }
struct alignas(16) LOMEM_API Pair : public Base<int, long> {
  explicit Pair(int a) : first{a}, second(a) {}
  ~Pair();
  bool operator==(const Pair& other) const { return first == other.first; }
  int operator()(int i) const;
  int first, *second = nullptr;
  using Base::member;
 private:
  int hidden = 0;
  struct Inner { int of_inner; };
};
struct Forward;
using Alias = Pair;
inline constexpr int table[2] = {1, 2};
constexpr auto sum{1 + 2};
template <> int specialized<Kind::one>(int);
extern template int instantiated<int>(int);
template <class V> constexpr decltype(auto) visit(V&& v) { return v(1); }
static_assert(sizeof(int) == 4, "int");
TORCH_MODULE(Net);
struct Options { TORCH_ARG(std::pair<int, long>, value) = {1, 2}; };
namespace detail { int hidden(); struct Hidden { int x; }; }
namespace { int local; }
}  // namespace lomem
namespace lomem::inner { void f(); }
"""


def test_declarations():
    found = {name: text for name, text in public_names.declared(HEADER) if "::detail::" not in name}
    assert set(found) == {"LOMEM_A"} | {
        f"lomem::{name}"
        for name in (
            *("Kind", "Kind::one", "Kind::two", "call", "Alias", "table", "sum", "specialized", "visit", "Net"),
            *("Pair", "Pair::Pair", "Pair::~Pair", "Pair::operator==", "Pair::operator()"),
            *("Pair::first", "Pair::second", "Pair::member", "Options", "Options::value", "inner::f"),
        )
    }
    assert found["lomem::Pair::Pair"] == "explicit Pair(int a)"
    assert found["lomem::Kind"] == "enum class Kind : int"


def test_declarations_in_a_list(tmp_path):
    (tmp_path / "a.def").write_text(
        "// LIB_ENTRY(name, result, parameters)\n"
        "LIB_ENTRY(one, int, (long a, // the first\n  bool b LIB_DEFAULT(f(1, 2))))\n"
        'LIB_ENTRY(\n    two, std::array<int, 2>, (const char* text LIB_DEFAULT(",)")))\n'
    )
    (tmp_path / "a.h").write_text(
        "namespace lib {\n"
        "#define LIB_DEFAULT(value) = value\n"
        "#define LIB_ENTRY(name, Result, parameters) Result name parameters;\n"
        '#include "a.def"\n'
        "#undef LIB_ENTRY\n"
        "#undef LIB_DEFAULT\n"
        "int three();\n"
        "}\n"
    )
    assert public_names.cpp_names([tmp_path / "a.h"]) == {
        "lib::one": "int one(long a, bool b = f(1, 2))",
        "lib::two": 'std::array<int, 2> two(const char* text = ",)")',
        "lib::three": "int three()",
    }


def test_members_are_inherited(tmp_path):
    header = tmp_path / "a.h"
    header.write_text(
        "namespace lib {\n"
        "template <class T> class Base { public: Base(); ~Base(); void f(T); private: int hidden; };\n"
        "namespace detail { struct Own { int g(); }; }\n"
        "namespace inner { class Derived : public Base<int>, public detail::Own { public: Derived(int); int h; }; }\n"
        "class Hidden : Base<int> {};\n"
        "using Alias = inner::Derived;\n"
        "using Same = Base<long>;\n"
        "}\n"
    )
    expected = {
        "Base": ["Base", "~Base", "f"],
        "inner::Derived": ["Derived", "f", "g", "h"],
        "Alias": ["Alias", "f", "g", "h"],
        "Same": ["Same", "~Same", "f"],
        "Hidden": [],
    }
    names = {f"lib::{name}" for name in expected}
    names |= {f"lib::{name}::{member}" for name, members in expected.items() for member in members}
    assert public_names.cpp_names([header]).keys() == names


def test_all_that_the_library_exports_is_found(names):
    """Another way to find functions of the interface: the macro, then the last word before a parenthesis."""
    for header in names["headers"]:
        text = re.sub(r"//.*", "", (public_names.INCLUDE / header).read_text(encoding="utf-8"))
        text = re.sub(r"namespace detail \{.*?\n\}(?!;)", "", text, flags=re.DOTALL)
        for function in re.findall(r"^LOMEM_API [^();]*?(\w+)(?:<[^()]*>)?\(", text, re.MULTILINE):
            assert any(name.endswith(f"::{function}") for name in names["C++"]), (header, function)


def test_all_ops_are_found(names):
    paths = [path for path in (ROOT / "cpp/src").rglob("*") if path.suffix in (".cpp", ".def")]
    definition = re.compile(r"^LOMEM_OP\(\s*(\w+)|^ *m\.def\(\s*\"(\w+)\(", re.MULTILINE)
    found = [match for path in paths for match in definition.findall(path.read_text(encoding="utf-8"))]
    defined = {f"lomem::{first or second}" for first, second in found}
    assert len(defined) > 20
    assert set(names["ops"]) == defined


def test_all_options_are_found(names):
    folder = Path(lomem.__file__).parent / "commands"
    sources = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    given = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", sources))
    assert len(given) > 20
    assert {name.split()[-1] for name in names["command line"] if " --" in name} == given


def test_all_of_all_is_found(names):
    """Literal names in the lists of the sources."""
    package = Path(lomem.__file__).parent
    count = 0
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        module = ".".join(parts)
        if any(part.startswith("_") for part in parts) or module.startswith(
            tuple(f"{name}." for name in public_names.INTERNAL)
        ):
            assert names["Python"].get(module) != "module"
            continue
        assert names["Python"][module] == "module"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                listed = [element.value for element in node.value.elts if isinstance(element, ast.Constant)]
                count += len(listed)
                assert {f"{module}.{name}" for name in listed} <= names["Python"].keys()
    assert count > 100
