"""Gated units as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F

__all__ = ["GatedUnit", "GeGLU", "SwiGLU"]


class GatedUnit(nn.Module):
    """Gated unit ``activation(gate) * up`` that saves ``gate`` and ``up`` alone; see :func:`lomem.functional.gated`.

    ReGLU is ``GatedUnit("relu")``, and GLU ``GatedUnit("sigmoid")``; with ``layout="up_gate"`` the latter replaces
    :class:`torch.nn.GLU` on the last dimension. :class:`SwiGLU` and :class:`GeGLU` have names of their own.

    Args:
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"sigmoid"``.
        layout: Where the operands are in one tensor that holds both: ``"gate_up"``, ``"up_gate"`` or ``"interleaved"``.

    Raises:
        ValueError: If an argument is unknown.
    """

    def __init__(self, activation: str = "silu", *, layout: str = "gate_up") -> None:
        # Calling the op on the meta device checks the arguments here rather than in the first forward pass.
        F.gated(torch.empty(2, device="meta"), activation=activation, layout=layout)
        super().__init__()
        self.activation = activation
        self.layout = layout

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Returns ``activation(gate) * up``; without ``up``, ``gate`` holds both."""
        return F.gated(gate, up, self.activation, layout=self.layout)

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        return f"{self.activation!r}, layout={self.layout!r}"


class SwiGLU(GatedUnit):
    """``silu(gate) * up`` (Shazeer, arXiv:2002.05202), as a :class:`GatedUnit`.

    Args:
        layout: Where the operands are in one tensor that holds both, see :class:`GatedUnit`.
    """

    def __init__(self, *, layout: str = "gate_up") -> None:
        super().__init__("silu", layout=layout)


class GeGLU(GatedUnit):
    """``gelu(gate) * up`` (Shazeer, arXiv:2002.05202), as a :class:`GatedUnit`.

    Args:
        approximate: ``"none"`` or ``"tanh"``, as in :class:`torch.nn.GELU`.
        layout: Where the operands are in one tensor that holds both, see :class:`GatedUnit`.

    Raises:
        ValueError: If an argument is unknown.
    """

    def __init__(self, approximate: str = "none", *, layout: str = "gate_up") -> None:
        names = {"none": "gelu", "tanh": "gelu_tanh"}
        if approximate not in names:
            raise ValueError(f"lomem.nn.GeGLU: approximate is {approximate!r}, expected 'none' or 'tanh'")
        super().__init__(names[approximate], layout=layout)
