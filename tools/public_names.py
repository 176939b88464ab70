"""Lists the public names of lomem and finds removals that CHANGELOG.md does not mention.

    python tools/public_names.py                                      # print the names
    python tools/public_names.py --json tools/public_names.json       # write them; done for every release
    python tools/public_names.py --against tools/public_names.json    # print what was removed, changed and added since

The comparison exits with 1 if a name was removed that the section "Unreleased" of CHANGELOG.md does not mention in full
(`lomem.nn.GELU`, `lomem::gelu`, `lomem/ops.h`, `lomem bench --only`) outside "Added". The contents of a removed module,
class or command need not be mentioned separately. Moving a name counts as a removal.

Public names are

- in Python: modules without an underscore in their path, the names in their `__all__`, and the constructor, methods,
  properties and fields of classes. For a module without `__all__` only the module itself is public; the modules of
  INTERNAL packages are not public.
- in C++: namespaces, types, functions, variables and macros declared in the headers in cpp/include/lomem, by qualified
  name, and the members that classes and aliases inherit from other classes of the library, except for `detail` and
  private members. The headers themselves are names too.
- the ops of the dispatcher, with their schemas, and the options of the command `lomem`.

Python names are taken from the installed lomem with its optional packages, C++ names from the checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = ROOT / "cpp/include"

#: Packages whose public names are those in their own `__all__`, not those of their modules.
INTERNAL = ("lomem.conversion",)

#: A description (signature, schema or declarations) by section and name.
Names = dict[str, dict[str, str]]


# --- Python ---------------------------------------------------------------------------------------------------------


def python_names() -> dict[str, str]:
    """Modules, functions, classes and their members."""
    import lomem

    names: dict[str, str] = {}
    for path in ["lomem", *_modules(lomem)]:
        module = importlib.import_module(path)
        names[path] = "module"
        for name in getattr(module, "__all__", ()):
            _describe(f"{path}.{name}", getattr(module, name), names)
    return names


def _modules(package: ModuleType) -> Iterator[str]:
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if info.name.rpartition(".")[2].startswith("_"):
            continue
        yield info.name
        if info.ispkg and info.name not in INTERNAL:
            yield from _modules(importlib.import_module(info.name))


def _describe(path: str, value: Any, names: dict[str, str]) -> None:
    if isinstance(value, ModuleType):
        names[path] = "module"
    elif isinstance(value, type):
        names[path] = f"class {_signature(value)}"
        fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        for name in sorted({*dir(value), *fields}):
            owner = next((c for c in value.__mro__ if name in vars(c)), value)
            if not name.startswith("_") and owner.__module__.split(".")[0] == "lomem":
                names[f"{path}.{name}"] = _member(inspect.getattr_static(value, name, None))
    elif callable(value):
        names[path] = _signature(value)
    else:
        names[path] = type(value).__name__


def _member(value: Any) -> str:
    if isinstance(value, (staticmethod, classmethod)):
        return f"{type(value).__name__} {_signature(value.__func__)}"
    if inspect.isfunction(value):
        return _signature(value)
    return "property" if isinstance(value, property) else "attribute"


def _signature(value: Any) -> str:
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
    except (TypeError, ValueError):  # implemented in C
        return "(...)"


def op_names() -> dict[str, str]:
    """The ops of the dispatcher."""
    import lomem  # noqa: F401 registers them
    import torch

    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lomem::"))
    return {
        schema.name + ("." + schema.overload_name if schema.overload_name else ""): str(schema) for schema in schemas
    }


def command_names() -> dict[str, str]:
    """The commands of `lomem` and their options."""
    from lomem.commands.cli import parser

    names: dict[str, str] = {}
    _describe_parser(parser(), names)
    return names


def _describe_parser(parser: argparse.ArgumentParser, names: dict[str, str]) -> None:
    names[parser.prog] = "command"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _describe_parser(command, names)
        elif action.dest != "help":
            about = {"default": action.default, "choices": action.choices, "metavar": action.metavar}
            for spelling in action.option_strings or [action.dest]:
                names[f"{parser.prog} {spelling}"] = ", ".join(f"{k} {v}" for k, v in about.items() if v is not None)


# --- C++ ------------------------------------------------------------------------------------------------------------

_COMMENT_OR_STRING = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_TOKEN = re.compile(r"[A-Za-z_]\w*|\d(?:[eEpP][+-]|[\w.'])*|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])+'|::|->|==|&&|\|\||\S")
_IDENTIFIER = re.compile(r"~?[A-Za-z_]\w*$")

#: Macros that declare a name given as an argument, with the index of that argument.
_DECLARING_MACROS = {"TORCH_MODULE": 0, "TORCH_MODULE_IMPL": 0, "TORCH_ARG": -1}
#: Attributes followed by an argument in parentheses.
_ATTRIBUTES = ("__attribute__", "__launch_bounds__", "alignas")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def cpp_names(headers: list[Path]) -> dict[str, str]:
    """Names declared in headers, with their declarations joined by semicolons, and members that classes inherit."""
    found: dict[str, set[str]] = {}
    for header in headers:
        for name, declaration in declared(_with_lists(header)):
            found.setdefault(name, set()).add(declaration)
    while _inherit(found):
        pass
    public = {name: declarations for name, declarations in found.items() if "detail" not in name.split("::")}
    return {name: "; ".join(sorted(declarations)) for name, declarations in public.items()}


#: A list of declarations in a file of their own, between the definitions of the macros that it consists of.
_LIST = re.compile(r"((?:^#define \w+\(.*\n)+)#include \"(\w+\.def)\"\n(?:#undef .*\n)+", re.MULTILINE)


def _with_lists(header: Path) -> str:
    """The text of a header, with the declarations that its lists stand for."""

    def expanded(match: re.Match[str]) -> str:
        text = _without_comments((header.parent / match[2]).read_text(encoding="utf-8"))
        for name, parameters, body in re.findall(r"^#define (\w+)\((.*?)\) (.*)", match[1], re.MULTILINE):
            text = _expanded(text, name, parameters.split(", "), body)
        return text

    return _LIST.sub(expanded, header.read_text(encoding="utf-8"))


def _expanded(text: str, name: str, parameters: list[str], body: str) -> str:
    """A text in which every use of a macro is replaced."""
    while use := re.search(rf"\b{name}(?=\()", text):
        tokens = _Parser(_TOKEN.findall(text[use.end() :])).balanced()
        arguments = [" ".join(argument) for argument in _arguments(tokens[1:-1])]
        values = dict(zip(parameters, arguments, strict=True))
        replaced = re.sub(r"\w+", lambda word, values=values: values.get(word[0], word[0]), body)
        rest = text[use.end() :]
        for token in tokens:
            rest = rest[rest.index(token) + len(token) :]
        text = text[: use.start()] + replaced + rest
    return text


_ALIAS = re.compile(r"(?:template<.*> )?using \w+ = (?:typename )?([\w:]+)")
_CLASS = re.compile(r"(?:template<.*> )?(?:class|struct) [^:]*(?<!:): ?(.*)")
_BASE = re.compile(r"\bpublic ([\w:]+)")


def _inherit(found: dict[str, set[str]]) -> bool:
    """Adds to aliases and classes the members of the library's classes that they refer to or derive from."""
    new: dict[str, set[str]] = {}
    for name, declarations in found.items():
        scope = name.split("::")[:-1]
        for declaration in declarations:
            alias, record = _ALIAS.match(declaration), _CLASS.match(declaration)
            for other in [alias[1]] if alias else _BASE.findall(record[1]) if record else []:
                paths = ["::".join((*scope[:depth], other)) for depth in range(len(scope), -1, -1)]
                path = next((path for path in paths if path in found and path != name), None)
                if path is None:
                    continue
                for member in [member for member in found if member.startswith(f"{path}::")]:
                    rest = member.removeprefix(f"{path}::")
                    if rest.lstrip("~") == path.rpartition("::")[2]:
                        if not alias:
                            continue
                        rest = rest.replace(rest.lstrip("~"), name.rpartition("::")[2])
                    if f"{name}::{rest}" not in found:
                        new.setdefault(f"{name}::{rest}", set()).update(found[member])
    found |= new
    return bool(new)


def _without_comments(text: str) -> str:
    return _COMMENT_OR_STRING.sub(lambda m: m[0] if m[0][0] in "\"'" else " ", text)


def declared(text: str) -> Iterator[tuple[str, str]]:
    """Names declared in the text of a header, each with its declaration."""
    text = _without_comments(text)
    for macro in re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+(?:\([^)]*\))?)", text, re.MULTILINE):
        name = macro.partition("(")[0]
        if "_DETAIL_" not in name:
            yield name, f"#define {macro}"
    tokens = _TOKEN.findall(_DIRECTIVE.sub("", text))
    yield from _Parser(tokens).scope(())


class _Parser:
    """Parser of C++ declarations; skips function bodies."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def scope(self, names: tuple[str, ...], access: str = "") -> Iterator[tuple[str, str]]:
        """Declarations up to the brace that closes a namespace or, with an access specifier, a class."""
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token == "}":
                self.at += 1
                return
            if access and token in ("public", "protected", "private") and self.tokens[self.at + 1] == ":":
                access = token
                self.at += 2
            else:
                yield from self._declaration(names, access)

    def _declaration(self, names: tuple[str, ...], access: str) -> Iterator[tuple[str, str]]:
        head: list[str] = []
        while self.at < len(self.tokens) and self.tokens[self.at] not in (";", "{", "}"):
            head += self.balanced()
        if self.at < len(self.tokens) and self.tokens[self.at] == "{":
            yield from self._braces(head, names, access)
        else:
            if self.at < len(self.tokens) and self.tokens[self.at] == ";":
                self.at += 1
            yield from _named(head, names, access)

    def balanced(self) -> list[str]:
        """The next token; if it is an opening bracket, all tokens up to the closing one."""
        start, ends = self.at, []
        while True:
            token = self.tokens[self.at]
            self.at += 1
            if token in _PAIRS:
                ends.append(_PAIRS[token])
            elif ends and token == ends[-1]:
                ends.pop()
            if not ends or self.at == len(self.tokens):
                return self.tokens[start : self.at]

    def _braces(self, head: list[str], names: tuple[str, ...], access: str) -> Iterator[tuple[str, str]]:
        bare = _without_attributes(head)
        if bare[:1] == ["inline"] and bare[1:2] == ["namespace"]:
            bare = bare[1:]
        if bare[:1] == ["namespace"]:
            self.at += 1
            inner = tuple(token for token in bare[1:] if token != "::") or ("detail",)  # anonymous
            yield from self.scope((*names, *inner))
            return
        if bare[:1] == ["extern"]:  # "C"
            self.at += 1
            yield from self.scope(names)
            return
        if bare and bare[0] in ("class", "struct", "union", "enum"):
            kind, name = bare[0], next(token for token in bare[1:] if token not in ("class", "struct"))
            if access != "private":
                yield "::".join((*names, name)), _text(head)
            if kind == "enum":
                for enumerator in _arguments(self.balanced()[1:-1]):
                    if enumerator and access != "private":
                        yield "::".join((*names, name, enumerator[0])), "enumerator"
            else:
                self.at += 1
                members = list(self.scope((*names, name), "private" if kind == "class" else "public"))
                yield from members if access != "private" else ()
            while self.at < len(self.tokens) and self.tokens[self.at] != ";":
                self.balanced()
            self.at += 1
            return
        yield from _named(head, names, access)
        self.balanced()
        if _parameters(bare) is None:  # a variable initialized with braces
            while self.at < len(self.tokens) and self.tokens[self.at] != ";":
                self.balanced()
        else:  # a function, possibly a constructor that initializes members with braces
            while self.at < len(self.tokens) and self.tokens[self.at] in (",", "{"):
                while self.tokens[self.at] != "{":
                    self.balanced()
                self.balanced()


def _without_attributes(head: list[str]) -> list[str]:
    """A declaration without `template <...>`, attributes and LOMEM_ macros."""
    bare, i = [], 0
    while i < len(head):
        token = head[i]
        if token == "template" and head[i + 1 : i + 2] == ["<"] and (not bare):
            i = _after(head, i + 1, "<", ">")
        elif token == "[" and head[i + 1 : i + 2] == ["["]:
            i = _after(head, i, "[", "]")
        elif token in _ATTRIBUTES:
            i = _after(head, i + 1, "(", ")")
        elif token.startswith("LOMEM_"):
            i += 1
        else:
            bare.append(token)
            i += 1
    return bare


def _after(tokens: list[str], start: int, opening: str, closing: str) -> int:
    """Index after the bracket that closes the one at `start`; angle brackets inside parentheses are ignored."""
    depth = parentheses = 0
    for i in range(start, len(tokens)):
        if opening != "(":
            parentheses += (tokens[i] == "(") - (tokens[i] == ")")
        if not parentheses:
            depth += (tokens[i] == opening) - (tokens[i] == closing)
            if depth == 0:
                return i + 1
    return len(tokens)


def _depths(tokens: list[str]) -> Iterator[tuple[int, str, int]]:
    """Yields index, token and nesting depth; angle brackets count after identifiers."""
    depth, angles = 0, 0
    for i, token in enumerate(tokens):
        if token in ")]}":
            depth -= 1
        if token == ">" and angles:
            angles -= 1
        yield i, token, depth + angles
        if token in "([{":
            depth += 1
        if token == "<" and i and _IDENTIFIER.match(tokens[i - 1]) and tokens[i - 1] != "operator":
            angles += 1


def _parameters(bare: list[str]) -> int | None:
    """Index at which the parameters of a function begin; None if the declaration is not a function."""
    if "operator" in bare:
        i = bare.index("operator") + 1
        return i + 2 if bare[i : i + 2] == ["(", ")"] else bare.index("(", i)
    for i, token, depth in _depths(bare):
        if depth == 0 and token == "=":
            return None
        named = i and (_IDENTIFIER.match(bare[i - 1]) or bare[i - 1] == ">") and bare[i - 1] != "decltype"
        if depth == 0 and token == "(" and named:
            return i
    return None


def _arguments(tokens: list[str]) -> list[list[str]]:
    """Splits tokens at top-level commas."""
    parts: list[list[str]] = [[]]
    for _, token, depth in _depths(tokens):
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _named(head: list[str], names: tuple[str, ...], access: str) -> Iterator[tuple[str, str]]:
    """Names declared by a declaration that opens no scope."""
    bare = _without_attributes(head)
    skipped = ("static_assert", "friend", "template", "class", "struct", "union", "enum")
    if (
        not bare
        or access == "private"
        or bare[0] in skipped
        or bare[:2] in (["extern", "template"], ["using", "namespace"])
    ):
        return
    start = _parameters(bare)
    found: list[str]
    if bare[0] in _DECLARING_MACROS:
        arguments = _arguments(bare[2 : _after(bare, 1, "(", ")") - 1])
        found = [arguments[_DECLARING_MACROS[bare[0]]][-1]]
    elif bare[0] == "using":
        found = [bare[1] if "=" in bare else bare[-1]]
    elif bare[0] == "typedef":
        found = [bare[-1]]
    elif "operator" in bare:
        found = ["".join(bare[bare.index("operator") : start])]
    elif start is not None:
        end = start - 1
        if bare[end] == ">":  # arguments of a specialization
            end = max(i for i, token, depth in _depths(bare[:start]) if token == "<" and depth == 0) - 1
        found = [("~" if bare[end - 1 : end] == ["~"] else "") + bare[end]]
    else:
        found = []
        for declarator in _arguments(bare):
            ends = [i for i, token, depth in _depths(declarator) if depth == 0 and token in ("=", "[")]
            found.append(declarator[: min(ends, default=len(declarator))][-1])
    for name in found:
        yield "::".join((*names, name)), _text(_head_of_function(head) if start is not None else head)


def _head_of_function(head: list[str]) -> list[str]:
    """A function declaration without member initializers."""
    end = next((i for i, token, depth in _depths(head) if token == ":" and depth == 0), len(head))
    return head[:end]


def _text(tokens: list[str]) -> str:
    text = re.sub(r" ?(::|->|[(\[]) ?", r"\1", " ".join(tokens))
    return re.sub(r" (&&|[),\]>&*])", r"\1", re.sub(r" ?< ", "<", text)).replace("{ }", "{}")


# --- All of them ----------------------------------------------------------------------------------------------------


def public_names(include: Path = INCLUDE) -> Names:
    """All public names, by section."""
    headers = sorted(path for path in (include / "lomem").rglob("*.*") if path.suffix in (".h", ".cuh"))
    return {
        "Python": python_names(),
        "C++": cpp_names(headers),
        "headers": {path.relative_to(include).as_posix(): "" for path in headers},
        "ops": op_names(),
        "command line": command_names(),
    }


def write(names: Names, path: Path) -> None:
    """Writes the names to a file, sorted and one per line, for readable diffs."""
    path.write_text(json.dumps(names, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def unreleased(changelog: str) -> str:
    """The section "Unreleased" of a changelog without "Added", on one line."""
    section = re.search(r"^## \[?Unreleased\]?$(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE)
    parts = re.split(r"^### ", section[1], flags=re.MULTILINE) if section else []
    return " ".join(" ".join(part for part in parts if not part.startswith("Added")).split())


def is_mentioned(name: str, text: str) -> bool:
    """Whether a text contains a name in full, not as part of a longer one."""
    return re.search(rf"(?<![\w.:/-]){re.escape(name)}(?![\w/-]|[.:]+\w)", text) is not None


def _inside(name: str) -> Iterator[str]:
    """Yields the names of the scopes that contain a name."""
    for separator in (".", "::", " "):
        while separator in name:
            name = name.rpartition(separator)[0]
            yield name


def compare(before: Names, after: Names, notes: str) -> list[str]:
    """Prints the differences; returns the removed names that the notes do not mention."""
    missing = []
    for section, old in before.items():
        new = after.get(section, {})
        removed = [name for name in old if name not in new]
        within = set(removed)
        for name in removed:
            if any(outer in within for outer in _inside(name)):
                print(f"removed  {section}: {name}, with its scope")
            elif is_mentioned(name, notes):
                print(f"removed  {section}: {name}, as CHANGELOG.md says")
            else:
                print(f"removed  {section}: {name}, and CHANGELOG.md does not say so")
                missing.append(name)
        for name in (name for name in old if name in new and old[name] != new[name]):
            print(f"changed  {section}: {name}\n    was  {old[name]}\n    is   {new[name]}")
        for name in (name for name in new if name not in old):
            print(f"added    {section}: {name}")
    return missing


def main() -> int:
    """Prints, writes or compares the names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the names")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with the names that --json wrote")
    arguments = parser.parse_args()
    names = public_names()
    if arguments.json is not None:
        write(names, arguments.json)
    if arguments.against is not None:
        notes = unreleased((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        missing = compare(json.loads(arguments.against.read_text(encoding="utf-8")), names, notes)
        for name in missing:
            print(f'{name} was removed, expected a line about it under "Unreleased" in CHANGELOG.md', file=sys.stderr)
        return int(bool(missing))
    if arguments.json is None:
        for section, found in names.items():
            print(f"# {section}")
            for name, about in sorted(found.items()):
                print(f"{name}  {about}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
