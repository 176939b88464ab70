"""FewBit's ``fewbit.functional``."""

from . import activations, linear, variance
from .activations import *  # noqa: F403
from .linear import *  # noqa: F403
from .variance import *  # noqa: F403

__all__ = [*activations.__all__, *linear.__all__, *variance.__all__]
