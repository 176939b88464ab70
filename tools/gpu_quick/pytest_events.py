"""A plugin for pytest: every test and its outcome as events, and for a rehearsal, a sample of the tests.

Works in a single process and under pytest-xdist, where the controller reports for all workers.
"""

from __future__ import annotations

import os
from typing import Any

from . import events

#: One test in this many is run.
SAMPLE = "LOMEM_GPU_QUICK_SAMPLE"


class Reporter:
    """The hooks of the process that sees all tests."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test starts."""
        events.begin(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test is over: a test passes in its call, and fails or is skipped in any phase."""
        if report.failed:
            events.outcome(nodeid(report), "failed", message(report))
        elif report.skipped:
            events.outcome(nodeid(report), "skipped")
        elif report.when == "call":
            events.outcome(nodeid(report), "passed")

    def pytest_collectreport(self, report: Any) -> None:
        """A file cannot be read."""
        if report.failed:
            events.outcome(nodeid(report), "failed", message(report))


def nodeid(report: Any) -> str:
    """The name of a test or of a file."""
    return str(report.nodeid)


def message(report: Any) -> str:
    """The message of the exception and where it was raised, without the source around it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return "\n".join(str(report.longrepr).splitlines()[-events.LINES :])
    return f"{crash.path}:{crash.lineno}\n" + "\n".join(str(crash.message).splitlines()[: events.LINES - 1])


def pytest_configure(config: Any) -> None:
    """Workers of pytest-xdist do not report."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter())


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keeps the sample."""
    step = int(os.environ.get(SAMPLE, "1"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step])
    items[:] = items[::step]
