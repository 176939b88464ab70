"""One page about all stages."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .driver import BAD, PASSED, SKIPPED, Record

#: What a page has room for.
FAILURES, LINES = 25, 3


def file_name(machine: Mapping[str, Any]) -> str:
    """Name of the files, without a suffix: `gpu-nvidia-h200-2026-01-31`. As lomem.commands.bench names its own."""
    return "-".join(["gpu", re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-"), machine["date"]])


def write(folders: Sequence[Path], machine: Mapping[str, Any], records: Sequence[Record]) -> list[Path]:
    """Writes the page and the records to each folder, and returns the paths of the pages."""
    pages = []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{file_name(machine)}.json"
        contents = {"program": "gpu-quick", "machine": dict(machine), "stages": [public(r) for r in records]}
        path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        pages.append(path.with_suffix(".md"))
        pages[-1].write_text(markdown(machine, records), encoding="utf-8")
    return pages


def public(record: Record) -> Record:
    """A record without what belongs to a process; of stages that went well, without the log."""
    hidden = {"process", "skip"} | (set() if record["status"] in BAD else {"log"})
    return {name: value for name, value in record.items() if name not in hidden}


def markdown(machine: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The page."""
    bad = [record["stage"] for record in records if record["status"] in BAD]
    done = all(record["status"] in (PASSED, SKIPPED) for record in records)
    verdict = f"**Went wrong: {', '.join(bad)}.**" if bad else "Nothing went wrong." if done else "Not finished."
    parts = [f"# {machine['title']}", verdict, of_machine(machine), of_stages(records)]
    parts += [of_failures(record) for record in records if record["status"] in BAD]
    notes = [f"- {record['stage']}: {text}" for record in records for text in record.get("notes", [])]
    parts += ["\n".join(["## Notes", "", *notes])] if notes else []
    figures: dict[str, list[Record]] = {}
    for record in records:
        for figure in record.get("figures", []):
            figures.setdefault(figure["table"], []).append({k: v for k, v in figure.items() if k != "table"})
    for name, rows in figures.items():
        parts.append(f"## {name}\n\n{table(list(rows[0]), [list(row.values()) for row in rows])}")
    return "\n\n".join(parts) + "\n"


def of_machine(machine: Mapping[str, Any]) -> str:
    """What it ran on."""
    rows = [(name.replace("_", " "), value) for name, value in machine.items() if name != "title" and value]
    return table(["", ""], rows)


def of_stages(records: Sequence[Record]) -> str:
    """A row for each stage."""
    rows = []
    for record in records:
        tests = record.get("tests", {})
        counts = [tests.get(outcome) or "" for outcome in ("passed", "failed", "skipped")]
        status = f"**{record['status']}**" if record["status"] in BAD else record["status"]
        seconds = f"{record.get('seconds', 0):.0f}"
        rows.append((record["stage"], record["title"], status, seconds, *counts, record.get("reason", "")))
    return table(["stage", "", "result", "s", "passed", "failed", "skipped", ""], rows)


def of_failures(record: Record) -> str:
    """The first lines of each failure, tests that did not end, and otherwise the end of the log."""
    failures, unfinished = record.get("failures", []), record.get("unfinished", [])
    lines = [f"## {record['stage']}: {record['status']}", ""]
    for failure in failures[:FAILURES]:
        lines += [f"- `{failure['name']}`", *(f"  > {line}" for line in failure["message"].splitlines()[:LINES])]
    if len(failures) > FAILURES:
        lines.append(f"- and {len(failures) - FAILURES} more")
    if unfinished:
        lines.append(f"- running when it ended: {', '.join(f'`{name}`' for name in unfinished[:FAILURES])}")
    if not failures and record.get("log"):
        lines += ["```text", *(line.replace("```", "'''") for line in record["log"][-15:]), "```"]
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [list(heads), ["---"] * len(heads), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def cell(value: Any) -> str:
    """The text of a table cell."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
