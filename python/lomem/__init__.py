"""Less activation memory in PyTorch training, without recomputation.

Step activations save 2 bits per element for the backward pass; memory-sharing norms save their output,
which the next linear layer saves anyway.

    model.act = lomem.nn.GELU(bits=2)       # in place of torch.nn.GELU()
    model.norm = lomem.nn.MSLayerNorm(768)  # in place of torch.nn.LayerNorm(768, elementwise_affine=False)
"""

from pathlib import Path as _Path

import torch as _torch

from ._build_info import torch_version as _built_for
from ._build_info import version as __version__

if not (_torch.__version__ + ".").startswith(_built_for + "."):
    raise ImportError(
        f"lomem {__version__} was built against torch {_built_for} and does not load under torch "
        f"{_torch.__version__}: rebuild it in this environment with "
        "`pip install --no-build-isolation --force-reinstall --no-deps` from its sources"
    )

from . import _C

# The CUDA kernels are in a separate library that needs a torch build with CUDA.
if _torch.version.cuda is not None and _C.cuda_archs():
    _torch.ops.load_library(str(_Path(_C.__file__).with_name("lib") / "liblomem_cuda.so"))

from . import _other_devices, _sharding, checkpoint, functional, integrations, memory, nn, random, reference
from ._decompositions import decompositions
from .conversion import GradientWarning, NothingToConvertError, convert, restore
from .mapping import convert_activation, convert_linear, map_module
from .steps import DrawnLevels, StepFunction

_other_devices.register()
_sharding.register()


def __getattr__(name: str) -> object:
    # Imported on first use: lomem.fit needs NumPy and SciPy, the others are LowMemoryBP's and FewBit's names.
    if name in ("activation", "compat", "fit", "normalization", "packing"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


#: Add to `CMAKE_PREFIX_PATH` so that `find_package(lomem)` finds the C++ package in this wheel.
cmake_prefix_path = str(_Path(_C.__file__).resolve().parent)

__all__ = [
    "DrawnLevels",
    "GradientWarning",
    "NothingToConvertError",
    "StepFunction",
    "__version__",
    "checkpoint",
    "cmake_prefix_path",
    "convert",
    "convert_activation",
    "convert_linear",
    "decompositions",
    "functional",
    "integrations",
    "map_module",
    "memory",
    "nn",
    "random",
    "reference",
    "restore",
]
