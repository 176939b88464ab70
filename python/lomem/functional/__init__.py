"""The ops as functions, with the argument order of :mod:`torch.nn.functional`.

Every function raises a RuntimeError or ValueError that names op, argument, the value it got and the
value it wants; of arguments that are not of the type asked for, torch's own error. They work under
autocast, ``torch.compile``, ``torch.export``, ``torch.jit.trace``, checkpointing and saved-tensor hooks, on ``meta``
tensors and on subclasses that wrap tensors. Of nested tensors of layout ``torch.jagged``, activations and norms are
torch's own, with the exact gradient and all that torch keeps for it; other nested, sparse and quantized tensors raise.
Forward-mode differentiation and ``torch.func`` gradients raise.
"""

from . import activations, linear, norms, packing
from .activations import *  # noqa: F403
from .linear import *  # noqa: F403
from .norms import *  # noqa: F403
from .packing import *  # noqa: F403

__all__ = [*activations.__all__, *linear.__all__, *norms.__all__, *packing.__all__]
