"""The options that stages need, passed on in the environment."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = "LOMEM_GPU_QUICK_OPTIONS"


@dataclass(frozen=True)
class Options:
    """How stages run.

    Attributes:
        rehearse: Whether the CPU stands in for the GPU, with tiny sizes.
        patience: Factor of the limits of stages.
        jobs: Number of processes side by side.
        architecture: Compute capability to compile for: ``90``.
        defines: Further arguments of CMake, such as ``FETCHCONTENT_SOURCE_DIR_GOOGLETEST=<folder>``.
        device_tests: Executable to use as device tests; "" for the one that is built.
        installed: Whether to test the lomem that Python imports, building nothing.
        on_host: Library that runs the CUDA kernels on the CPU, for a rehearsal; "" for the one that is built.
    """

    rehearse: bool = False
    patience: float = 1
    jobs: int = 1
    architecture: str = "90"
    defines: Sequence[str] = ()
    device_tests: str = ""
    installed: bool = False
    on_host: str = ""

    @property
    def device(self) -> str:
        """Device of the tensors."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def name(self) -> str:
        """Name of the folders below build/."""
        return "gpu-rehearsal" if self.rehearse else "gpu-quick"

    @property
    def build(self) -> Path:
        """Build folder."""
        return ROOT / "build" / f"{self.name}-wheel"

    @property
    def python(self) -> Path:
        """Folder into which the package is installed: that of `make gpu-build`, for `make gpu-bench`."""
        return ROOT / "build" / ("gpu-rehearsal-python" if self.rehearse else "gpu-python")

    def gtests(self) -> list[Path]:
        """The executables of the device tests."""
        if self.device_tests:
            return [Path(self.device_tests).resolve()]
        names = ["bodies"] if self.rehearse else ["device", "errors", "library"]
        return [self.build / "tests/cpp" / f"lomem_cuda_{name}_tests" for name in names]

    def host_library(self) -> str:
        """The library that runs the CUDA kernels on the CPU; "" if there is none."""
        built = self.build / "tests/cpp/liblomem_cuda_on_host.so"
        return self.on_host or (str(built) if built.exists() else "")

    def environment(self) -> dict[str, str]:
        """Variables for stages: these options, and where Python finds lomem and this package."""
        folders = [] if self.installed else [str(self.python)]
        folders += [str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            OPTIONS: json.dumps(dataclasses.asdict(self)),
            "PYTHONPATH": os.pathsep.join(folders),
            "PYTHONUNBUFFERED": "1",
            # A sum of a matrix product must not depend on the workspace that is free.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "CI": "1",  # hypothesis: the same examples every time
            # Processes side by side: threads that spin while they wait take the time of others.
            "OMP_WAIT_POLICY": "passive",
        }

    @classmethod
    def of_environment(cls) -> Options:
        """The options that the driver has passed on."""
        return cls(**json.loads(os.environ.get(OPTIONS, "{}")))


def stage_command(name: str) -> tuple[str, ...]:
    """The command that runs a stage of `stages.py`."""
    return (sys.executable, "-m", "gpu_quick.stages", name)
