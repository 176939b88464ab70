"""The ops as modules, which replace those of :mod:`torch.nn`."""

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

for _module in (activations, adapters, dropouts, gated_units, linear, norms):
    for _name in _module.__all__:
        # Pickles and reprs then refer to the public module.
        getattr(_module, _name).__module__ = __name__
