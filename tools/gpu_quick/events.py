"""What a stage says while it runs: lines of JSON in a file, which outlast the stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .driver import EVENTS

#: Lines of a failure that are kept.
LINES = 12


def say(kind: str, **fields: Any) -> None:
    """Appends an event. Several processes may do so: a line is one write."""
    path = os.environ.get(EVENTS)
    line = (json.dumps({"kind": kind, **fields}) + "\n").encode()
    if path is None:  # a stage that is run by hand
        print(line.decode(), end="")
        return
    descriptor = os.open(Path(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def begin(name: str) -> None:
    """A test starts."""
    say("begin", name=name)


def outcome(name: str, result: str, message: str = "") -> None:
    """A test is over: `passed`, `failed` or `skipped`."""
    lines = message.strip().splitlines()
    say("test", name=name, outcome=result, message="\n".join(line[:300] for line in lines[:LINES]))


def check(name: str, good: bool, message: str) -> None:
    """A test that is one comparison."""
    outcome(name, "passed" if good else "failed", message)
    print(f"{'ok' if good else 'FAILED'}: {name}: {message}", flush=True)


def figure(table: str, **fields: Any) -> None:
    """A row of a table of the summary."""
    say("figure", table=table, **fields)
    print(f"{table}: {fields}", flush=True)


def note(text: str) -> None:
    """A sentence for the summary."""
    say("note", text=text)
    print(text, flush=True)


def skip(reason: str) -> None:
    """The stage cannot run here."""
    say("skip", reason=reason)
    print(f"skipped: {reason}", flush=True)
