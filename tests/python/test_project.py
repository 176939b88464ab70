"""The files that a project has beside its code: they parse, and what they name is there."""

import ast
import importlib
import os
import re
from pathlib import Path

import lomem
import pytest
import yaml
from test_contributing import FILES, FOLDERS, ROOT, TARGETS, check_command, is_command

TEXTS = ["CODE_OF_CONDUCT.md", "SECURITY.md", ".github/pull_request_template.md"]
FORMS = sorted(path for path in FILES if path.startswith(".github/ISSUE_TEMPLATE/") and not path.endswith("config.yml"))
WORKFLOWS = sorted(path for path in FILES if path.startswith(".github/workflows/"))
PAPERS = {
    "2406.16282": "Yang",
    "2202.00441": "Novikov",
    "2201.13195": "Bershatsky",
    "2305.15265": "Liu",
    "2002.05202": "Shazeer",
    "2106.09685": "Hu",
    "2312.03732": "Kalajdzievski",
}


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def parsed(path):
    return yaml.safe_load(read(path))


def strings(value):
    """All texts in what YAML holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def test_they_are_there():
    assert {*TEXTS, "CITATION.cff", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"} <= set(FILES)
    assert [Path(path).stem for path in FORMS] == ["bug_report", "feature_request"]
    assert WORKFLOWS == [".github/workflows/ci.yml", ".github/workflows/docs.yml"]


@pytest.mark.parametrize("path", sorted(path for path in FILES if Path(path).suffix in (".yml", ".yaml", ".cff")))
def test_yaml(path):
    assert isinstance(parsed(path), dict)


# CITATION.cff


def test_the_version_of_the_citation():
    header = read("cpp/include/lomem/version.h")
    version = ".".join(re.findall(r"#define LOMEM_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
    assert parsed("CITATION.cff")["version"] == version


def test_the_citation_is_valid():
    """By the schema of version 1.2.0: the keys that it wants, and the ones that are used here."""
    citation = parsed("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    optional = {
        "abstract",
        "date-released",
        "doi",
        "identifiers",
        "keywords",
        "license",
        "references",
        "type",
        "version",
    }
    assert {"authors", "cff-version", "message", "title"} <= citation.keys()
    assert citation.keys() <= {"authors", "cff-version", "message", "title", *optional}
    assert citation["license"] == re.search(r'^license = "(.*)"', read("pyproject.toml"), re.MULTILINE)[1]
    for author in citation["authors"]:
        assert author.keys() in ({"name"}, {"given-names", "family-names"})
    for reference in citation["references"]:
        assert reference["type"] in ("article", "conference-paper")
        assert reference.keys() <= {
            *("authors", "title", "type", "year", "url", "notes", "collection-title", "identifiers")
        }
        assert isinstance(reference["year"], int)
        assert all(author.keys() == {"given-names", "family-names"} for author in reference["authors"])
        assert [identifier.keys() for identifier in reference["identifiers"]] == [{"type", "value"}]


def test_the_papers_are_cited():
    """Those that the library implements, and no other is named in its headers and documents."""
    references = {}
    for reference in parsed("CITATION.cff")["references"]:
        number = reference["url"].removeprefix("https://arxiv.org/abs/")
        assert reference["identifiers"][0]["value"] == f"arXiv:{number}"
        assert reference["year"] == 2000 + int(number[:2])
        references[number] = reference["authors"][0]["family-names"]
    assert references == PAPERS
    sources = [path for path in FILES if path.startswith(("cpp/", "python/", "docs/"))]
    named = set()
    for path in sources:
        if Path(path).suffix in (".h", ".cuh", ".cpp", ".py", ".md"):
            named |= set(re.findall(r"arXiv[.:](?:org/abs/)?(\d{4}\.\d{5})", read(path), re.IGNORECASE))
    assert named <= references.keys()
    assert len(named) == 7


# What the texts name


def named_in_texts():
    for path in [*TEXTS, *FORMS]:
        text = read(path) if path.endswith(".md") else "\n".join(strings(parsed(path)))
        yield from ((path, " ".join(word.split())) for word in re.findall(r"`([^`]+)`", text))


@pytest.mark.parametrize(("path", "word"), list(named_in_texts()))
def test_words_in_backticks(path, word):
    if is_command(word):
        check_command(word)
    elif word in FILES or word.rstrip("/") in FOLDERS:
        pass
    elif "::" in word:
        assert any(f"namespace {word} " in read(file) for file in FILES if file.startswith("cpp/include/")), word
    elif re.fullmatch(r"lomem(\.\w+)*", word):
        value = lomem
        for name in word.split(".")[1:]:
            value = getattr(value, name)
    else:
        assert word == "torch.ops.lomem", f"{path} has a word of an unknown kind in backticks: `{word}`"


@pytest.mark.parametrize("path", TEXTS)
def test_links(path):
    for target in re.findall(r"\]\(([^)#]+)", read(path)):
        assert target.startswith("https://") or target in FILES, target
    for name in re.findall(r"\b[A-Z_]{5,}\.md\b", read(path)):
        assert name in FILES


@pytest.mark.parametrize("path", [*TEXTS, *FORMS, "CITATION.cff"])
def test_no_address_is_made_up(path):
    """Maintainers are reached through the repository."""
    assert re.findall(r"[\w.+-]+@[\w-]+\.\w+", read(path)) == []


def test_vulnerabilities_are_reported_in_private():
    for path in ("SECURITY.md", "CODE_OF_CONDUCT.md", FORMS[0]):
        assert re.search(r"private\s+security\s+advisory\s+on\s+the\s+repository", read(path))


# Forms of issues


@pytest.mark.parametrize("path", FORMS)
def test_forms(path):
    form = parsed(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"checkboxes", "dropdown", "input", "textarea"}
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) >= 3
    for field in form["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert "value" in field["attributes"] if field["type"] == "markdown" else field["attributes"]["label"]
        options = field["attributes"].get("options", [])
        assert len(set(options)) == len(options)
        assert bool(options) == (field["type"] == "dropdown")


def test_the_bug_report_asks_for_every_part():
    """Modules and commands that the options name are there."""
    (parts,) = (field["attributes"]["options"] for field in parsed(FORMS[0])["body"] if field["type"] == "dropdown")
    text = ", ".join(parts)
    for name in re.findall(r"\blomem\.\w+", text):
        importlib.import_module("lomem.fit")
        assert hasattr(lomem, name.removeprefix("lomem.")), name
    commands = re.findall(r"\blomem [a-z]+", text)
    assert len(commands) >= 3
    for command in commands:
        check_command(command)


def test_issues_of_no_form():
    assert parsed(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}


# The workflow


@pytest.fixture
def workflow():
    return parsed(WORKFLOWS[0])


def test_the_workflow_runs_what_must_pass(workflow):
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert steps[0]["uses"].startswith("actions/checkout@v")
    assert [step["run"] for step in steps if "apt-get" not in step.get("run", "apt-get")] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    # YAML's `on` is true.
    assert workflow[True].keys() == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    assert steps[-1]["env"].keys() <= set(re.findall(r"^(\w+) \?=", read("Makefile"), re.MULTILINE))


def test_the_workflow_installs_what_needs_root(workflow):
    """What .ci/run and the targets that it makes would install, if they were root."""
    text = read(".ci/run") + re.search(r"^gtest:\n(?:\t.*\n)+", read("Makefile"), re.MULTILINE)[0]
    wanted = {p for line in re.findall(r"apt-get install (.*?)(?:[;>]|$)", text) for p in line.split() if p[0] != "-"}
    assert wanted == {"ccache", "libgtest-dev"}
    (job,) = workflow["jobs"].values()
    installed = {word for step in job["steps"] if "apt-get" in step.get("run", "") for word in step["run"].split()}
    assert wanted | {"g++", "make", "python3-venv", "python3-dev"} <= installed


def test_the_workflow_keeps_the_compiler_cache(workflow):
    (job,) = workflow["jobs"].values()
    (cache,) = (step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/cache@"))
    assert f'CCACHE_DIR="$PWD/{cache["path"]}"' in read(".ci/run")


def test_the_site_is_published_as_it_is_built():
    """Of the main branch alone; only the job that publishes may write."""
    workflow = parsed(WORKFLOWS[1])
    assert workflow[True] == {"push": {"branches": ["main"]}}
    assert workflow["permissions"] == {"contents": "read"}
    build, publish = (workflow["jobs"][name] for name in ("build", "publish"))
    assert [step["run"] for step in build["steps"] if "run" in step] == ["make docs"]
    (upload,) = (step for step in build["steps"] if "upload-pages-artifact@" in step.get("uses", ""))
    assert upload["with"] == {"path": parsed("mkdocs.yml")["site_dir"]}
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write", "pages": "write"}
    assert publish["needs"] == "build"


def test_what_must_pass_is_made():
    goals = re.findall(r"^ *make (\S+)$", read(".ci/run"), re.MULTILINE)
    assert len(goals) > 5
    assert set(goals) <= TARGETS


# The house of the Python package


def imported(path, module):
    """Absolute names of what a module of the package imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_only_the_commands_import_the_commands():
    """The library does without them."""
    package = ROOT / "python/lomem"
    importing = set()
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        names = set(imported(path, module))
        assert not any(name.startswith(".") for name in names)
        if any(name == "lomem.commands" or name.startswith("lomem.commands.") for name in names):
            importing.add(module)
    outside = {module for module in importing if not module.startswith("lomem.commands.")}
    assert outside == {"lomem.__main__"}
    assert "lomem.commands.cli" in importing
