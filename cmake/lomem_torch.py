"""Finds torch and its version without importing it.

Run as a script, prints the folder of TorchConfig.cmake. As a dynamic-metadata provider, makes the
wheel require the minor version of torch that it is built against, because torch's C++ interface is
not stable across minor versions.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path


class TorchNotFoundError(RuntimeError):
    """There is no torch in the environment that lomem is built for."""


def find_torch() -> tuple[Path, str]:
    """Returns the folder and version of the torch that a lomem installed from here will run with."""
    # This interpreter's environment comes first: in pip's isolated build it is still the target of the
    # installation, although its packages cannot be imported there.
    folders = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    for folder in folders:
        if (folder / "share/cmake/Torch/TorchConfig.cmake").is_file():
            match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text(encoding="utf-8"))
            if match:
                return folder, match[1]
    msg = (
        f"lomem: no torch found for {sys.executable}: install torch 2.11 or newer in the environment that lomem is "
        "to run in; a front end with an isolated build needs --no-build-isolation"
    )
    raise TorchNotFoundError(msg)


_state = ""


def build_state(state: str) -> None:
    """Stores what the build backend is building."""
    global _state
    _state = state


def dynamic_wheel(_settings: object) -> dict[str, bool]:
    """Says that wheels have other dependencies than the source distribution they are built from."""
    return {"dependencies": True}


def dynamic_metadata(_settings: object, _project: object) -> dict[str, list[str]]:
    """Returns the dependencies."""
    if _state == "sdist":
        return {"dependencies": ["torch>=2.11"]}
    try:
        major, minor, *_ = find_torch()[1].split(".")
    except TorchNotFoundError as error:
        raise SystemExit(str(error)) from None  # one sentence, no traceback
    return {"dependencies": [f"torch=={major}.{minor}.*"]}


if __name__ == "__main__":
    try:
        print(find_torch()[0] / "share/cmake/Torch")
    except TorchNotFoundError as error:
        sys.exit(str(error))
