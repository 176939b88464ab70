"""LowMemoryBP's ``lomem.nn``: :mod:`lomem.nn` with LowMemoryBP's default of ``eps``.

LowMemoryBP has four of these modules, without affine parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ... import nn
from ...nn import *  # noqa: F403

__all__ = [*nn.__all__]


class MSRMSNorm(nn.MSRMSNorm):
    """:class:`lomem.nn.MSRMSNorm` with ``eps=1e-5`` as the default, in place of the machine epsilon.

    Args:
        normalized_shape: Sizes of the last dimensions of the input, or the size of the last one as an int.
        eps: Value added to the mean square.
        args: Further arguments of :class:`lomem.nn.MSRMSNorm`.
        kwargs: The same.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = 1e-5, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(normalized_shape, eps, *args, **kwargs)
