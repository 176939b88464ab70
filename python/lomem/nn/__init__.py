"""The ops as modules, which replace those of :mod:`torch.nn`."""

from typing import Any, NoReturn

from . import activations, adapters, dropouts, gated_units, linear, norms
from .activations import *  # noqa: F403
from .adapters import *  # noqa: F403
from .dropouts import *  # noqa: F403
from .gated_units import *  # noqa: F403
from .linear import *  # noqa: F403
from .norms import *  # noqa: F403

__all__ = [
    *activations.__all__,
    *adapters.__all__,
    *dropouts.__all__,
    *gated_units.__all__,
    *linear.__all__,
    *norms.__all__,
]


def _refuse_scripting(module: Any) -> NoReturn:
    # torch.jit.script calls this before it compiles a module, wherever that is in a model.
    raise NotImplementedError(
        f"lomem.nn.{type(module).__name__}: got torch.jit.script, expected torch.compile, torch.export or "
        "torch.jit.trace: TorchScript cannot compile lomem's modules"
    )


for _module in (activations, adapters, dropouts, gated_units, linear, norms):
    for _name in _module.__all__:
        # Pickles and reprs then refer to the public module.
        getattr(_module, _name).__module__ = __name__
        getattr(_module, _name).__prepare_scriptable__ = _refuse_scripting
