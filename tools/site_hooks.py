"""What MkDocs does with docs/ besides (mkdocs.yml): links out of the folder, pages of the reference, formulae.

The documents are read in the repository too. So they link to files beside docs/ by relative paths, and write formulae
between dollars. On the site

- files that pages link to become pages below repository/, documents as they are and sources as listings;
- every page of the navigation below api/ is the reference of the module that it is named after;
- formulae become MathML, which browsers show without a script.
"""

from __future__ import annotations

import functools
import html
import logging
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from latex2mathml import converter
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("mkdocs.hooks.lomem")  # of whose warnings --strict makes errors
FOLDER = "repository/"

#: Languages of listings. Files with another suffix are copied as they are.
LANGUAGES = {".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".h": "cpp", ".py": "python"}
#: Documents whose names end otherwise.
TEXTS = {".cff": "yaml", ".json": "json", "": "text"}

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^( *)(```+).*?^\1\2$", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def target_of(link: str, path: str) -> str | None:
    """The file of the repository that a link in another file means.

    Args:
        link: The link, without a fragment.
        path: The path of the file that has it, from the root of the repository.

    Returns:
        The path of the file, or None if there is no such file or the link is not a relative path.
    """
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if not target.startswith("..") and (ROOT / target).is_file() else None


def place_of(path: str) -> str:
    """Where the site has a file of the repository, from the root of the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = posixpath.splitext(path)[1]
    return f"{FOLDER}{path}.md" if suffix in LANGUAGES or suffix in TEXTS else FOLDER + path


def path_of(place: str) -> str | None:
    """The file of the repository that a page shows, None for a page that is made here."""
    if not place.startswith(FOLDER):
        return None if place.startswith("api/") else "docs/" + place
    path = place.removeprefix(FOLDER)
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def outside_fences(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of a document, each with whether it is a block of code."""
    end = 0
    for fence in _FENCE.finditer(text):
        yield text[end : fence.start()], False
        yield fence[0], True
        end = fence.end()
    yield text[end:], False


def links(text: str, path: str) -> Iterator[str]:
    """The files of the repository that a document links to."""
    for part, code in outside_fences(text):
        if not code:
            yield from filter(None, (target_of(match[2], path) for match in _LINK.finditer(part)))


def rewritten(text: str, path: str) -> str:
    """A document with links to where the site has the files."""
    here = posixpath.dirname(place_of(path))

    def link(match: re.Match[str]) -> str:
        target = target_of(match[2], path)
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(place_of(target), here or ".") + match[3]

    return "".join(part if code else _LINK.sub(link, part) for part, code in outside_fences(text))


def listing(path: str) -> str:
    """The page of a file that is not a document."""
    suffix = posixpath.splitext(path)[1]
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall(r"`{2,}", text)), default=2))
    language = LANGUAGES.get(suffix) or TEXTS[suffix]
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}{language}\n{text}{fence}\n"


def mathml(content: str) -> str:
    """A page with its formulae as MathML."""

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[2]).strip()
        return converter.convert(text[2:-2].strip(), display="inline" if text.startswith(r"\(") else "block")

    return _FORMULA.sub(formula, content)


@functools.cache
def _package() -> Any:
    return griffe.load("lomem", search_paths=[ROOT / "python"], allow_inspection=False, resolve_aliases=True)


def undocumented(module: str, content: str) -> list[str]:
    """The public functions and classes of a module that a page of the reference lacks."""
    parts = module.split(".")[1:]
    found = _package()[".".join(parts)] if parts else _package()
    return [
        name
        for name in map(str, found.exports or [])
        if not name.startswith("_") and name in found.members and (found[name].is_function or found[name].is_class)
        if f'id="{module}.{name}"' not in content
    ]


def _entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, (dict, list)):
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _entries(item)


# --- Called by MkDocs -------------------------------------------------------------------------------------------------


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of the reference, and those of the repository's files that documents link to."""
    for place in _entries(config.nav):
        if place.startswith("api/"):
            module = posixpath.basename(place).removesuffix(".md")
            files.append(File.generated(config, place, content=f"# {module}\n\n::: {module}\n"))
    documents = [path for path in map(path_of, (f.src_uri for f in files.documentation_pages())) if path]
    documents += [path for path in map(path_of, _entries(config.nav)) if path]
    seen = set(documents)
    while documents:
        path = documents.pop()
        if not path.startswith("docs/"):
            whole = posixpath.splitext(path)[1] not in {*LANGUAGES, *TEXTS}
            content = {"abs_src_path": str(ROOT / path)} if whole else {"content": listing(path)}
            files.append(File.generated(config, place_of(path), **content))
        if path.endswith(".md") and (ROOT / path).is_file():
            new = {*links((ROOT / path).read_text(encoding="utf-8"), path)} - seen
            seen |= new
            documents += new
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files beside docs/ lead to their pages."""
    path = path_of(page.file.src_uri)
    return markdown if path is None or not path.endswith(".md") else rewritten(markdown, path)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulae are shown, and the reference is complete."""
    if page.file.src_uri.startswith("api/"):
        module = posixpath.basename(page.file.src_uri).removesuffix(".md")
        for name in undocumented(module, content):
            LOG.warning("%s has no entry for %s", page.file.src_uri, name)
    return mathml(content)
