"""Where torch is and of which version, without importing it.

Run as a script, prints the folder of TorchConfig.cmake. As a dynamic-metadata provider, makes the
wheel require the minor version of torch that it is built against: the C++ interface of torch is
not stable across minor versions.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path


class TorchNotFoundError(RuntimeError):
    """No torch in the environment that lomem is built for."""


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch that a lomem installed from here will run with."""
    # First the environment of this interpreter: in pip's isolated build it is still the one that
    # is installed into, though its packages cannot be imported there.
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
        f"lomem: no torch in reach of {sys.executable}: install torch 2.11 or newer in the environment that lomem is "
        "to run in; a front end that builds elsewhere needs --no-build-isolation"
    )
    raise TorchNotFoundError(msg)


_state = ""


def build_state(state: str) -> None:
    """What is being built, from the build backend."""
    global _state
    _state = state


def dynamic_wheel(_settings: object) -> dict[str, bool]:
    """That the dependencies of a source distribution are not those of the wheels made of it."""
    return {"dependencies": True}


def dynamic_metadata(_settings: object, _project: object) -> dict[str, list[str]]:
    """The dependencies."""
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
