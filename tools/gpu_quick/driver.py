"""Runs stages one after the other: each in a process of its own, with a limit, and with its result on disk at once.

A stage is a command. What it has to say (tests, figures, notes) it appends to a file of events, so that all of it
counts even if the stage is killed. Its record, `<name>.json`, is written when it starts and again when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

PASSED, FAILED, TIMEOUT, SKIPPED, RUNNING = "passed", "failed", "timeout", "skipped", "running"
#: What an earlier driver left, if it was killed.
INTERRUPTED = "interrupted"

#: Statuses of a run that went wrong.
BAD = frozenset({FAILED, TIMEOUT, INTERRUPTED})

EVENTS = "LOMEM_GPU_QUICK_EVENTS"


@dataclass(frozen=True)
class Stage:
    """A command with a limit.

    Attributes:
        name: Name of its files and on the command line.
        title: What it shows, for people.
        command: Program and arguments.
        limit: Seconds after which it is killed.
        needs: Stages without which it cannot run.
        sources: Files and folders on whose contents its result depends.
        outputs: Files that it makes, without which an earlier pass does not count.
        on_gpu: Whether its result depends on the GPU.
    """

    name: str
    title: str
    command: Sequence[str]
    limit: float
    needs: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    on_gpu: bool = True


def source_hash(root: Path, sources: Iterable[str]) -> str:
    """Hash of the names and contents of files and of all files in folders. Needs no git."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        top = root / source
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@dataclass
class Driver:
    """Runs stages and keeps their records.

    Attributes:
        stages: In the order in which they run.
        folder: Where results are written.
        root: Where commands run, and what sources are relative to.
        identity: What else results depend on, such as the version of torch.
        gpu: The GPU and its driver.
        budget: Seconds for all stages together.
        environment: Variables for the stages.
        changed: Called whenever a stage has ended.
    """

    stages: Sequence[Stage]
    folder: Path
    root: Path
    identity: dict[str, str]
    gpu: str
    budget: float
    environment: dict[str, str] = field(default_factory=dict)
    changed: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + self.budget
        for stage in self.stages:  # what an earlier driver started and could not end
            record = self.record(stage)
            if record is not None and record["status"] == RUNNING:
                end_of(record["process"])
                self._write(stage, {**record, **self._events(stage), "status": INTERRUPTED})

    def record(self, stage: Stage) -> Record | None:
        """The record of a stage on disk, if it ever ran."""
        with contextlib.suppress(OSError, ValueError):
            record: Record = json.loads(self._path(stage, "json").read_text(encoding="utf-8"))
            return record
        return None

    def records(self) -> list[Record]:
        """The records of all stages; those that never ran have only a status."""
        return [self.record(s) or {"stage": s.name, "title": s.title, "status": "not run"} for s in self.stages]

    def identity_of(self, stage: Stage) -> dict[str, str]:
        """What the result of a stage depends on."""
        facts = {**self.identity, "sources": source_hash(self.root, stage.sources)}
        return {**facts, "gpu": self.gpu} if stage.on_gpu else facts

    def has_passed(self, stage: Stage) -> bool:
        """Whether the stage passed earlier, with the same sources and on the same GPU."""
        record = self.record(stage)
        return (
            record is not None
            and record["status"] == PASSED
            and record["identity"] == self.identity_of(stage)
            and all(path.exists() for path in stage.outputs)
        )

    def selected(self, only: Iterable[str]) -> list[Stage]:
        """The named stages and what they need; all of them if none is named."""
        by_name = {stage.name: stage for stage in self.stages}
        todo, wanted = list(only), set()
        while todo:
            name = todo.pop()
            if name not in by_name:
                raise ValueError(f"there is no stage {name}, expected some of {', '.join(by_name)}")
            wanted.add(name)
            todo += by_name[name].needs
        return [stage for stage in self.stages if not wanted or stage.name in wanted]

    def run(self, only: Iterable[str] = (), again: bool = False) -> bool:
        """Runs the stages that have not passed. Returns whether nothing went wrong in those selected."""
        only = list(only)
        selected = self.selected(only)
        good = True
        for stage in selected:
            # `again` means the stages that were named, not what they need.
            repeat = again and (not only or stage.name in only)
            if not repeat and self.has_passed(stage):
                print(f"{stage.name}: passed earlier", flush=True)
                continue
            lacking = [s.name for s in self.stages if s.name in stage.needs and not self.has_passed(s)]
            if lacking:
                self._skip(stage, f"needs {', '.join(lacking)}")
            elif self.end - time.monotonic() <= 0:
                self._skip(stage, f"the budget of {self.budget:g} s is used up")
            else:
                print(f"{stage.name}: {stage.title}, at most {self._limit(stage):.0f} s", flush=True)
                self._execute(stage)
            record = self.record(stage) or {}
            good = good and record.get("status") not in BAD
            reason = f" ({record['reason']})" if record.get("reason") else ""
            print(f"{stage.name}: {record.get('status')}{reason}, {record.get('seconds', 0):.0f} s", flush=True)
            self.changed()
        return good

    def _limit(self, stage: Stage) -> float:
        return min(stage.limit, self.end - time.monotonic())

    def _path(self, stage: Stage, suffix: str) -> Path:
        return self.folder / f"{stage.name}.{suffix}"

    def _write(self, stage: Stage, record: Record) -> None:
        path = self._path(stage, "json")
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)  # at once: a reader sees the old record or the new one

    def _skip(self, stage: Stage, reason: str) -> None:
        earlier, identity = self.record(stage), self.identity_of(stage)
        if earlier is not None and earlier["status"] in BAD and earlier["identity"] == identity:
            return  # what it found stays
        record = {"stage": stage.name, "title": stage.title, "status": SKIPPED, "reason": reason, "seconds": 0.0}
        self._write(stage, {**record, "identity": identity})

    def _execute(self, stage: Stage) -> None:
        """Runs a stage to its end or its limit, and ends all that it started."""
        limit = self._limit(stage)
        record: Record = {
            "stage": stage.name,
            "title": stage.title,
            "status": RUNNING,
            "reason": "",
            "seconds": 0.0,
            "limit": round(limit, 1),
            "identity": self.identity_of(stage),
        }
        events = self._path(stage, "events")
        events.unlink(missing_ok=True)
        start = time.monotonic()
        with self._path(stage, "log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    stage.command,
                    cwd=self.root,
                    env={**os.environ, "PYTHONFAULTHANDLER": "1", **self.environment, EVENTS: str(events)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._write(stage, {**record, "status": FAILED, "reason": str(error)})
                return
        self._write(stage, {**record, "process": identity_of(process.pid)})
        record["status"], record["reason"] = INTERRUPTED, "the driver was stopped"
        try:
            try:
                code = process.wait(limit)
                record["status"], record["reason"] = (FAILED, how(code)) if code else (PASSED, "")
            except subprocess.TimeoutExpired:
                record["status"], record["reason"] = TIMEOUT, f"killed after {limit:.0f} s"
                # Python then says where it was (PYTHONFAULTHANDLER).
                signal_group(process.pid, signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
        finally:
            signal_group(process.pid, signal.SIGKILL)
            process.wait()
            record["seconds"] = round(time.monotonic() - start, 1)
            record |= self._events(stage)
            if record["status"] == PASSED and record["skip"]:
                record["status"], record["reason"] = SKIPPED, record["skip"]
            if record["status"] == PASSED and record["failures"]:
                record["status"], record["reason"] = FAILED, "see the failures"
            self._write(stage, record)

    def _events(self, stage: Stage) -> Record:
        """What the stage said, as fields of its record."""
        counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
        fields: Record = {"tests": counts, "failures": [], "figures": [], "notes": [], "skip": ""}
        begun: set[str] = set()
        for event in read_events(self._path(stage, "events")):
            kind = event.pop("kind", "")
            if kind == "begin":
                begun.add(event["name"])
            elif kind == "test":
                begun.discard(event["name"])
                counts[event["outcome"]] += 1
                if event["outcome"] == "failed":
                    fields["failures"].append({"name": event["name"], "message": event["message"]})
            elif kind == "figure":
                fields["figures"].append(event)
            elif kind == "note":
                fields["notes"].append(event["text"])
            elif kind == "skip":
                fields["skip"] = event["reason"]
        fields["unfinished"] = sorted(begun)
        with contextlib.suppress(OSError):
            text = self._path(stage, "log").read_bytes()[-6000:].decode("utf-8", "replace")
            fields["log"] = text.splitlines()[-40:]
        return fields


def read_events(path: Path) -> Iterable[Record]:
    """The events of a file. The last line may be cut off, since whoever wrote it may have been killed."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def how(code: int) -> str:
    """What an exit status means."""
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def signal_group(leader: int, number: int) -> None:
    """Sends a signal to all processes of a group that are left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def identity_of(pid: int) -> list[int]:
    """A process and when it started: a number of a process is used again."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # After the name, which may hold spaces and parentheses.
        return [pid, int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])]
    return [pid, -1]


def end_of(process: list[int]) -> None:
    """Ends what a killed driver left running, with all that it started."""
    pid, started = process
    if started >= 0 and identity_of(pid) == process:
        signal_group(pid, signal.SIGKILL)
