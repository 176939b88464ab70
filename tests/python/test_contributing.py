"""What CONTRIBUTING.md names is there: paths, make targets, commands, tests, and names in the files that it names."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from files_per_op import tracked  # noqa: E402

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

#: Words in backticks that name nothing in the repository. (What git ignores, a build makes.)
ALLOWED = frozenset({"lomem", "torch.ops"})
IGNORED = frozenset(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())

SUFFIX = r"h|cpp|cu|cuh|py|pyi|cmake|def|json|md|toml|yml|cff|in"
PATH = re.compile(rf"[\w.<>{{}},*/-]*(?:/|[\w}}>*]\.(?:{SUFFIX}))|\.ci/run|[\w.-]+(?:/[\w.-]+)+")
COMMANDS = ("cmake", "ctest", "lomem", "make", "pytest", "python")
#: Keywords, and words of every program.
LANGUAGE = frozenset({"using", "struct", "class", "enum", "template", "constexpr", "def", "import", "int", "void"})


FILES = tracked(ROOT)
FOLDERS = {str(parent) for path in FILES for parent in Path(path).parents}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {
    target for line in re.findall(r"^([\w./ -]+):(?![=:])", MAKEFILE, re.MULTILINE) for target in line.split()
} - {".PHONY"}


_PRESETS = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
PRESETS = {preset["name"] for kind in _PRESETS.values() if isinstance(kind, list) for preset in kind}


class Block(NamedTuple):
    """An item of a list, a row of a table, a paragraph, or the lines of a fence."""

    text: str
    fence: str | None  # its language


def blocks(document: str) -> list[Block]:
    """What stands together in a document."""
    found: list[Block] = []
    # Prose, then a language and what is in its fence, then what stands behind the end, which is nothing, and again.
    parts = re.split(r"^```(.*)$", document, flags=re.MULTILINE)
    for prose in parts[::4]:
        starts = r"\n\n|\n(?=\| )|\n(?=- )|\n(?=\d+\. )"
        found += [Block(" ".join(text.split()), None) for text in re.split(starts, prose) if text.strip()]
    found += [Block(text.strip("\n"), language) for language, text in zip(parts[1::4], parts[2::4], strict=True)]
    return found


BLOCKS = blocks(TEXT)
PROSE = [block for block in BLOCKS if block.fence is None]
TREES = [block for block in BLOCKS if block.fence in ("", "text")]


def words(block: Block) -> list[str]:
    """What stands in backticks."""
    return [" ".join(word.split()) for word in re.findall(r"`([^`]+)`", block.text)]


def alternatives(path: str) -> list[str]:
    """`a/{b,c}.h` is `a/b.h` and `a/c.h`; what stands for a name, `<family>`, is any name."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        return [re.sub(r"<\w+>", "*", path).rstrip("/")]
    return [
        one
        for choice in match[1].split(",")
        for one in alternatives(path[: match.start()] + choice + path[match.end() :])
    ]


def found(path: str, folder: str) -> list[str]:
    """The tracked files and folders that a path is, seen from a folder."""
    whole = path if folder in ("", ".") else f"{folder}/{path}"
    pattern = re.compile(re.escape(whole).replace(r"\*", "[^/]*"))
    return [one for one in [*FILES, *FOLDERS] if pattern.fullmatch(one)]


def tree_entries(tree: str) -> Iterator[tuple[str, str]]:
    """Paths at the beginning of lines of a tree, each with the folder that it is in."""
    above: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > 8:  # a description goes on
            continue
        while above and above[-1][0] >= indent:
            above.pop()
        folder = above[-1][1] if above else ""
        names, end = [], indent
        for word in re.finditer(r"\S+", line):
            # What stands further off is a description, which may begin with a path of its own.
            if not PATH.fullmatch(word[0]) or word.start() > end + 2:
                break
            names.append(word[0])
            end = word.end()
        assert names, f"{line!r} begins with no path"
        for name in names:
            yield name, folder
        above.append((indent, "/".join(filter(None, (folder, names[0].rstrip("/"))))))


def anchors() -> set[str]:
    """The folders that paths are relative to: the root, and those that the document names, with those of files."""
    named = [
        path for tree in TREES for entry, folder in tree_entries(tree.text) for path in found(entry.rstrip("/"), folder)
    ]
    named += [
        path
        for block in PROSE
        for word in words(block)
        if PATH.fullmatch(word)
        for one in alternatives(word)
        for path in found(one, "")
    ]
    folders = {path if path in FOLDERS else str(Path(path).parent) for path in named}
    return {".", *folders, *(str(parent) for folder in folders for parent in Path(folder).parents)}


ANCHORS = anchors()


def files_of(path: str) -> list[str]:
    """Every file or folder that a path of the document may mean; fails where there is none."""
    result = []
    for one in alternatives(path):
        meant = sorted({hit for anchor in ANCHORS for hit in found(one, anchor)})
        assert meant, f"CONTRIBUTING.md names `{path}`, which is in none of the folders that it names"
        result += meant
    return result


# What there is to check.


def test_the_document_is_read():
    assert len(PROSE) > 20
    assert TREES
    assert len([word for block in PROSE for word in words(block)]) > 50


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.text.split()[0])
def test_the_house(tree):
    entries = list(tree_entries(tree.text))
    assert len(entries) > 15
    for name, folder in entries:
        for one in alternatives(name):
            assert found(one, folder), f"the house has no {folder}/{name}"
    # And what its descriptions speak of.
    for word in re.findall(rf"[\w.<>{{}},*/-]+\.(?:{SUFFIX})\b", tree.text):
        files_of(word)


def test_links():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert target in FILES or target.rstrip("/") in FOLDERS, target


def check_command(command: str) -> None:
    """Whether what a command names is there."""
    program, *arguments = command.partition(" #")[0].split()
    program = program.rpartition("/")[2]
    if program == "make":
        goals = [word for word in arguments if "=" not in word]
        assert goals
        assert set(goals) <= TARGETS, f"make has none of the targets {sorted(set(goals) - TARGETS)}"
    elif program == "cmake" or (program == "ctest" and "--preset" in arguments):
        assert arguments[arguments.index("--preset") + 1] in PRESETS
    elif program == "ctest":
        sought = arguments[arguments.index("-R") + 1]
        lists = [(ROOT / path).read_text(encoding="utf-8") for path in FILES if Path(path).name == "CMakeLists.txt"]
        assert any(re.search(rf"NAME \S*{sought}", text) for text in lists), f"ctest has no {sought}"
    elif program == "python" and arguments[:1] == ["-m"]:
        check_command(" ".join(arguments[1:]))
    elif program in ("python", "pytest"):
        paths = [word.partition("::")[0] for word in arguments if not word.startswith("-")]
        assert paths
        assert paths[0] in FILES or paths[0] in FOLDERS
    elif program == "lomem":
        sources = (ROOT / "python/lomem/commands/cli.py").read_text(encoding="utf-8")
        assert re.search(rf"add_parser\(\s*\"{arguments[0]}\"", sources), f"lomem has no command {arguments[0]}"
        assert all(f'"{word}"' in sources for word in arguments if word.startswith("--"))
    else:
        raise AssertionError(f"CONTRIBUTING.md has a command of an unknown kind: {command}")


def commands() -> list[str]:
    """Lines of consoles and commands in backticks."""
    typed = [
        line.removeprefix("$ ")
        for block in BLOCKS
        if block.fence == "console"
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    return typed + [word for block in PROSE for word in words(block) if is_command(word)]


def is_command(word: str) -> bool:
    return " " in word and word.split()[0] in COMMANDS


@pytest.mark.parametrize("command", commands())
def test_commands(command):
    check_command(command)


def identifiers(word: str) -> list[str]:
    """The names in a piece of code."""
    return [name for name in re.findall(r"[A-Za-z_]\w*", word) if name not in LANGUAGE]


def stands_in(name: str, path: str) -> bool:
    """Whether a file, or a file of a folder, has a name in it; of tests in C++, also of a suite or a test."""
    inside = [file for file in FILES if file == path or file.startswith(path.rstrip("/") + "/")]
    return any(re.search(rf"\b{name}\b", read(file)) for file in inside)


def read(path: str) -> str:
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:  # of a picture
        return ""


def cases() -> Iterator[tuple[int, str]]:
    for i, block in enumerate(PROSE):
        for word in dict.fromkeys(words(block)):
            if word not in ALLOWED and word.strip("/") not in IGNORED and not is_command(word):
                yield i, word


@pytest.mark.parametrize(("block", "word"), list(cases()))
def test_words_in_backticks(block, word):
    """A path is there. A name is in one of the files that its row or numbered step names, elsewhere in any source."""
    if PATH.fullmatch(word):
        assert files_of(word)
        return
    if word in TARGETS | PRESETS:
        return
    names = identifiers(word)
    assert names, f"CONTRIBUTING.md has a word of an unknown kind in backticks: `{word}`"
    directs = re.match(r"\d+\. |\| ", PROSE[block].text) is not None
    named = [f for other in words(PROSE[block]) if directs and PATH.fullmatch(other) for f in files_of(other)]
    suffixes = (".h", ".cpp", ".cu", ".cuh", ".py", ".def", ".cmake")
    sources = [path for path in FILES if Path(path).suffix in suffixes or Path(path).name == "CMakeLists.txt"]
    for name in names:
        where = named or [path for path in sources if Path(path).name != Path(__file__).name]
        assert any(stands_in(name, path) for path in where), f"`{name}` of `{word}` is in none of {where[:20]}"


def pairs() -> list[tuple[str, str]]:
    """`name` of `file`, and `file` has `name`: what is said of one file in particular."""
    pattern = r"`([A-Za-z_]\w*)` (?:of|in) `([^`]+)`"
    return [pair for block in PROSE for pair in re.findall(pattern, block.text) if PATH.fullmatch(pair[1])]


@pytest.mark.parametrize(("name", "path"), pairs())
def test_a_name_of_a_file(name, path):
    """In the file itself; in a file of GoogleTest, as a suite, a test or an alias of types."""
    for file in files_of(path):
        text = read(file)
        if re.search(r"^(?:TYPED_)?TEST(?:_[PF])?\(", text, re.MULTILINE):
            macro = rf"\b(?:TYPED_)?TEST(?:_SUITE|_P|_F)?\([^)]*\b{name}\b"
            instance = rf"\bINSTANTIATE_TEST_SUITE_P\([^)]*\b{name}\b"
            assert re.search(rf"{macro}|{instance}|^using {name}\b", text, re.MULTILINE), f"{file} has no test {name}"
        else:
            assert re.search(rf"\b{name}\b", text), f"{file} has no {name}"


# That the checks would notice.


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "cmake --preset no-such",
        "ctest -R no-such-test",
        "python tools/no_such.py",
        "lomem no-such",
    ],
)
def test_a_command_that_is_not_there(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(command)


def test_a_path_that_is_not_there():
    for path in (
        "conversion/_no_such.py",
        "no_such.h",
        "tests/no_such/",
        "core/{step,no_such}.h",
        "<family>_no_such.cpp",
    ):
        assert PATH.fullmatch(path)
        with pytest.raises(AssertionError):
            files_of(path)
    assert files_of("core/{step,norm}.h") == ["cpp/include/lomem/core/step.h", "cpp/include/lomem/core/norm.h"]


def test_a_tree_is_read_with_its_folders():
    tree = "cpp/\n  core/  {a,b}.h: what.h\n                more of it\n  x.h  y.h   two\n    deeper.h\ntools/ z\n"
    entries = [("cpp/", ""), ("core/", "cpp"), ("x.h", "cpp"), ("y.h", "cpp"), ("deeper.h", "cpp/x.h"), ("tools/", "")]
    assert [entry for entry in tree_entries(tree) if "{" not in entry[0]] == entries
