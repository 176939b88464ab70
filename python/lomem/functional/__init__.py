"""The ops as functions, with the argument order of :mod:`torch.nn.functional`.

For an invalid argument they raise a RuntimeError or ValueError that names the op, the argument, its value and what was
expected; for an argument of the wrong type, torch raises its own error. They work under autocast, ``torch.compile``,
``torch.export``, ``torch.jit.trace``, checkpointing and saved-tensor hooks, on ``meta`` tensors and on tensor wrapper
subclasses. For nested tensors with layout ``torch.jagged``, activations, norms and dropout call torch's own ops, which
compute the exact gradient and save as much as usual; other nested, sparse and quantized tensors raise. Forward-mode
differentiation and ``torch.func`` gradients raise.
"""

from . import activations, adapters, dropouts, gated_units, linear, norms, packing, storage
from .activations import *  # noqa: F403
from .adapters import *  # noqa: F403
from .dropouts import *  # noqa: F403
from .gated_units import *  # noqa: F403
from .linear import *  # noqa: F403
from .norms import *  # noqa: F403
from .packing import *  # noqa: F403
from .storage import *  # noqa: F403

__all__ = [
    *activations.__all__,
    *adapters.__all__,
    *dropouts.__all__,
    *gated_units.__all__,
    *linear.__all__,
    *norms.__all__,
    *packing.__all__,
    *storage.__all__,
]
