"""In how many source files an op or an activation stands: what adding one, or taking one away, touches.

    python tools/files_per_op.py                      # a table, and files that are too long
    python tools/files_per_op.py --files NAME         # the files of one
    python tools/files_per_op.py --check              # exit 1 where a count or a file is over its limit
    python tools/files_per_op.py --write-ceilings     # write the counts that are over their limit into this file

An op is one of the dispatcher: its `_forward`, `_backward` and the like count as it. An activation is a function of
`lomem.functional.activations`. A file counts where the name stands in it in any spelling, as words of an identifier:
`some_op`, `SomeOp2D` and `some_op_forward` are all some_op; `AwesomeOp` and `some_ops` are not. Counted are the tracked
sources, and not what a tool writes.

The limits are LIMIT_OF_OPS, LIMIT_OF_ACTIVATIONS and LIMIT_OF_LINES. What was over its limit when that was set has a
ceiling in CEILINGS, which is to be lowered with the count, and so can only fall.

Not limited are the names of EVERYDAY: torch has them, too, and tests, examples and benchmarks take them for a GELU or a
ReLU as such, of torch or of lomem. Where they stand says little of how the library is made; the other members of the
family are registered in the same places and tell it.
`threshold` is not limited either: it is a word, and a parameter of another activation.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LIMIT_OF_OPS = 12
LIMIT_OF_ACTIVATIONS = 10
LIMIT_OF_LINES = 800

#: Names that stand everywhere as examples.
EVERYDAY = frozenset({"elu", "gelu", "relu", "sigmoid", "silu", "tanh", "threshold"})

#: Counts of names over their limit.
CEILINGS: dict[str, int] = {}

FOLDERS = ("benchmarks", "cmake", "cpp", "examples", "python", "tests", "tools")
SUFFIXES = (".cmake", ".cpp", ".cu", ".cuh", ".def", ".h", ".py", ".pyi", ".toml")
NAMES = ("CMakeLists.txt", "Makefile")
#: Written by tools.
GENERATED = (
    "cpp/include/lomem/core/fast_forward_tables.h",
    "cpp/src/activations/data.cpp",
    "cpp/src/step_tables.cpp",
)

#: Names of lomem.functional.activations that are no activations.
_OTHERS = ("step_function",)
_OP = re.compile(r"^LOMEM_OP\(\s*(\w+)|^ *m\.def\(\s*\"(\w+)\(", re.MULTILINE)
_HALVES = ("_forward", "_backward", "_weight_grad")


def tracked(root: Path) -> list[str]:
    """Paths of the files that git tracks; in a copy without git, of all files but those that it would ignore."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return sorted(path for path in listed.stdout.split("\0") if path and (root / path).is_file())
    patterns = [".git/", *(root / ".gitignore").read_text(encoding="utf-8").split()]
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if not any(_ignores(pattern, path) for pattern in patterns))


def _ignores(pattern: str, path: Path) -> bool:
    parts = path.parts[:1] if pattern.startswith("/") else path.parts
    return any(fnmatch(part, pattern.strip("/")) for part in parts)


def sources(root: Path) -> dict[str, str]:
    """The tracked sources, those that tools write left out: path from the root and text."""
    return {path: (root / path).read_text(encoding="utf-8") for path in filter(is_source, tracked(root))}


def is_source(path: str) -> bool:
    """Whether a tracked file is counted."""
    folder, _, rest = path.partition("/")
    inside = folder in FOLDERS if rest else True
    name = Path(path).name
    return inside and path not in GENERATED and (name in NAMES or Path(path).suffix in SUFFIXES)


def ops(texts: Mapping[str, str]) -> list[str]:
    """The ops that the C++ sources define, halves left out."""
    found = {
        first or second
        for path, text in texts.items()
        if path.startswith("cpp/src/")
        for first, second in _OP.findall(text)
    }
    return sorted(name for name in found if not any(name == f"{base}{half}" for base in found for half in _HALVES))


def activations(texts: Mapping[str, str]) -> list[str]:
    """The family: what `lomem.functional.activations` offers."""
    for node in ast.parse(texts["python/lomem/functional/activations.py"]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(set(ast.literal_eval(node.value)) - {*_OTHERS, *ops(texts)})
    raise ValueError("lomem.functional.activations has no __all__, expected a list of names")


def spelled(name: str) -> re.Pattern[str]:
    """Matches a name in any case, with and without underscores between its letters."""
    return re.compile("_?".join(map(re.escape, name.replace("_", ""))), re.IGNORECASE)


def stands_in(pattern: re.Pattern[str], text: str) -> bool:
    """Whether a name is a word, or some words, of an identifier in a text."""
    return any(_begins(text, match.start()) and _ends(text, match.end()) for match in pattern.finditer(text))


def _new_word(text: str, at: int) -> bool:
    """Whether a capital letter begins a word of an identifier like `StepSomeOpImpl`."""
    if not text[at].isupper():
        return False
    return not text[at - 1].isupper() or text[at + 1 : at + 2].islower()


def _begins(text: str, at: int) -> bool:
    return at == 0 or not text[at - 1].isalnum() or _new_word(text, at)


def _ends(text: str, at: int) -> bool:
    return at == len(text) or not text[at].isalnum() or _new_word(text, at)


def files(name: str, texts: Mapping[str, str]) -> list[str]:
    """The files in which a name stands."""
    pattern = spelled(name)
    return [path for path, text in texts.items() if stands_in(pattern, text)]


def limits(texts: Mapping[str, str]) -> dict[str, int | None]:
    """Every op and activation, and how many files it may stand in without a ceiling; None of everyday names."""
    of_ops = dict.fromkeys(ops(texts), LIMIT_OF_OPS)
    of_family = dict.fromkeys(activations(texts), LIMIT_OF_ACTIVATIONS)
    return {name: None if name in EVERYDAY else limit for name, limit in {**of_family, **of_ops}.items()}


def too_long(texts: Mapping[str, str]) -> dict[str, int]:
    """Files of more lines than LIMIT_OF_LINES, the longest first."""
    counts = {path: text.count("\n") for path, text in texts.items()}
    return {p: n for p, n in sorted(counts.items(), key=lambda item: -item[1]) if n > LIMIT_OF_LINES}


def problems(
    counts: Mapping[str, int], limit: Mapping[str, int | None], ceilings: Mapping[str, int], long: Mapping[str, int]
) -> list[str]:
    """What the check finds, a sentence each."""
    found = []
    for name, count in counts.items():
        allowed, ceiling = limit[name], ceilings.get(name)
        if allowed is None:
            continue
        if count > max(allowed, ceiling or 0):
            found.append(f"{name} stands in {count} files, expected at most {max(allowed, ceiling or 0)}")
        elif ceiling is not None and count < ceiling:
            new = f"is to be {count}" if count > allowed else "is to go"
            found.append(f"{name} stands in {count} files: its ceiling of {ceiling} {new}")
        elif ceiling is not None and ceiling <= allowed:
            found.append(f"{name} has a ceiling of {ceiling}, expected none: the limit is {allowed}")
    found += [f"{name} has a ceiling, expected the name of an op or an activation" for name in ceilings.keys() - counts]
    found += [f"{path} has {lines} lines, expected at most {LIMIT_OF_LINES}" for path, lines in long.items()]
    return found


def with_ceilings(script: str, ceilings: Mapping[str, int]) -> str:
    """This file's text with other ceilings."""
    lines = "".join(f'    "{name}": {count},\n' for name, count in sorted(ceilings.items()))
    written = "CEILINGS: dict[str, int] = " + (f"{{\n{lines}}}\n" if ceilings else "{}\n")
    return re.sub(r"^CEILINGS: .*?\}\n", written, script, count=1, flags=re.DOTALL | re.MULTILINE)


def _print_table(counts: Mapping[str, int], limit: Mapping[str, int | None], of_ops: Iterable[str]) -> None:
    kinds = dict.fromkeys(counts, "activation") | dict.fromkeys(of_ops, "op")
    width = max(map(len, counts))
    print(f"{'':{width}}  {'':10}  files  limit")
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        allowed = "none" if limit[name] is None else str(max(limit[name] or 0, CEILINGS.get(name, 0)))
        print(f"{name:{width}}  {kinds[name]:10}  {count:5}  {allowed:>5}")


def main() -> int:
    """Prints, checks or writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", metavar="NAME", help="list the files of one op or activation")
    parser.add_argument("--check", action="store_true", help="exit 1 where something is over its limit")
    parser.add_argument("--write-ceilings", action="store_true", help="take today's counts over the limits as ceilings")
    arguments = parser.parse_args()
    texts = sources(ROOT)
    limit = limits(texts)
    if arguments.files is not None:
        if arguments.files not in limit:
            parser.error(f"--files is {arguments.files}, expected one of {', '.join(sorted(limit))}")
        print("\n".join(files(arguments.files, texts)))
        return 0
    counts = {name: len(files(name, texts)) for name in limit}
    if arguments.write_ceilings:
        over = {name: n for name, n in counts.items() if (allowed := limit[name]) is not None and n > allowed}
        script = Path(__file__)
        script.write_text(with_ceilings(script.read_text(encoding="utf-8"), over), encoding="utf-8")
        return 0
    long = too_long(texts)
    if arguments.check:
        found = problems(counts, limit, CEILINGS, long)
        print("\n".join(found), file=sys.stderr, end="\n" if found else "")
        return int(bool(found))
    _print_table(counts, limit, ops(texts))
    for path, lines in long.items():
        print(f"{path}: {lines} lines, of which {LIMIT_OF_LINES} are allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
