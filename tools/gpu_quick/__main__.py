"""The most important tests and measurements on a GPU, in eight minutes: `make gpu-quick PYTHON=python`.

Builds for that GPU alone, runs the tests and measurements that need it, the most important first, and writes one page
about them. Needs no network. Every stage has a limit, and all together have a budget; results are on disk as soon as
they are known, and a second call goes on where the first was stopped: what passed is not repeated unless the sources,
torch or the GPU have changed. Stages whose packages are missing are skipped, and the page names them.

`--rehearse` runs the same stages without a GPU, on tensors of the CPU and with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import driver, stages, summary
from .options import ROOT, Options

PACKAGES = ("transformers", "peft", "timm", "triton", "pytest", "pytest-xdist", "hypothesis", "rich")
PROGRAMS = ("nvcc", "ccache", "ninja", "compute-sanitizer")


def output(*command: str) -> str:
    """What a program prints; "" if it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def version(package: str) -> str:
    """Version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_version() -> str:
    """Version of torch, with the part that names CUDA; read, not imported: that takes seconds."""
    sys.path.insert(0, str(ROOT / "cmake"))
    return str(importlib.import_module("lomem_torch").find_torch()[1])


def gpu() -> dict[str, str]:
    """Facts about the first GPU; none if there is none."""
    names = ("name", "driver_version", "memory.total", "compute_cap")
    line = output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader").partition("\n")[0]
    return dict(zip(names, line.split(", "), strict=True)) if line.count(", ") == len(names) - 1 else {}


def machine(rehearse: bool, jobs: int, facts: dict[str, str]) -> dict[str, Any]:
    """What the page says about where it ran."""
    toolkit = re.search(r"release ([\d.]+)", output("nvcc", "--version"))
    missing = [name for name in PACKAGES if not version(name)] + [name for name in PROGRAMS if not shutil.which(name)]
    return {
        "title": "Rehearsal of gpu-quick, without a GPU" if rehearse else "gpu-quick",
        "date": summary.today(),
        "commit": os.environ.get("LOMEM_COMMIT") or output("git", "describe", "--always", "--dirty") or "unknown",
        "sources": driver.source_hash(ROOT, (*stages.SELF, "tests")),
        "device": "rehearsal" if rehearse else facts.get("name", "no GPU"),
        "driver": facts.get("driver_version", ""),
        "GPU memory": facts.get("memory.total", ""),
        "compute capability": facts.get("compute_cap", ""),
        "nvcc": toolkit[1] if toolkit else "",
        "torch": torch_version(),
        "Python": platform.python_version(),
        "cores": f"{os.cpu_count()}, {jobs} used",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES if version(name)),
        "missing": ", ".join(missing),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_quick", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--rehearse", action="store_true", help="run on tensors of the CPU, with tiny sizes")
    add("--list", action="store_true", help="list the stages and what they did so far")
    add("--only", type=lambda text: text.split(","), default=[], metavar="STAGES", help="these stages and their needs")
    add("--again", action="store_true", help="repeat stages that passed: those of --only, or all")
    add("--results", type=Path, metavar="FOLDER", help="where records, logs and the page go (build/gpu-quick)")
    add("--page", type=Path, metavar="FOLDER", help="where the page goes too (benchmarks/results)")
    add("--budget", type=float, metavar="SECONDS", help="seconds for all stages together (480; 3600 with --rehearse)")
    add(
        "--patience",
        type=float,
        metavar="FACTOR",
        help="on the time limits of the stages, for few cores (1; 10 with --rehearse)",
    )
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes side by side (the cores)")
    add(
        "--define",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for CMake; FETCHCONTENT_SOURCE_DIR_GOOGLETEST",
    )
    add("--device-tests", default="", metavar="PATH", help="executable to run as the device tests")
    add("--installed", action="store_true", help="build nothing: test the lomem that Python imports")
    add("--on-host", default=os.environ.get("LOMEM_CUDA_ON_HOST", ""), metavar="PATH", help="see make pytest-on-host")
    return parser.parse_args()


def stop(number: int, frame: object) -> None:
    """Ends the stage that runs, and keeps what it said."""
    raise SystemExit(128 + number)


def main() -> int:
    """Runs the stages."""
    given = arguments()
    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"  # where nvcc is, if it is not on the path
    facts = gpu()
    if not facts and not given.rehearse and not given.list and given.only != ["build"]:
        sys.exit("gpu-quick: nvidia-smi shows no GPU, expected one (or --rehearse, or --only build)")
    options = Options(
        rehearse=given.rehearse,
        patience=given.patience or (10 if given.rehearse else 1),
        jobs=given.jobs,
        architecture=facts.get("compute_cap", "9.0").replace(".", ""),
        defines=given.define,
        device_tests=given.device_tests,
        installed=given.installed,
        on_host=given.on_host,
    )
    folder = given.results or ROOT / "build" / options.name
    about = machine(given.rehearse, given.jobs, facts)
    published = given.page or (ROOT / "benchmarks/results" if facts and not given.rehearse else None)
    pages = [folder, *filter(None, [published])]
    run = driver.Driver(
        stages.stages(options),
        folder.resolve(),
        ROOT,
        {
            "torch": about["torch"],
            "Python": about["Python"],
            "architecture": options.architecture,
            "given": " ".join(["installed"] * options.installed + [options.device_tests, options.on_host]).strip(),
        },
        f"{about['device']} {about['driver']}",
        given.budget or (3600 if given.rehearse else 480),
        options.environment(),
    )
    if given.list:
        for stage in run.stages:
            status = "passed" if run.has_passed(stage) else (run.record(stage) or {}).get("status", "not run")
            print(f"{stage.name:12}  {stage.limit:4.0f} s  {status:11}  {stage.title}")
        return 0
    run.changed = lambda: summary.write(pages, about, run.records())
    signal.signal(signal.SIGTERM, stop)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a stage that is aborted leaves no core
    try:
        good = run.run(given.only, given.again)
    finally:
        for page in summary.write(pages, about, run.records()):
            print(page)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
