"""What ``lomem bench`` compares with from other libraries, if they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import Tensor


def of_norms(columns: int, *, layer: bool) -> dict[str, Callable[..., Tensor]]:
    """Norms of other libraries, if installed. All of them are affine."""
    peers: dict[str, Callable[..., Tensor]] = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        if layer:
            peers["liger"] = lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5)
        else:
            # Not in place, since torch's does not overwrite the gradient either.
            peers["liger"] = lambda x, weight: liger.liger_rms_norm(x, weight, 1e-5, 0.0, "llama", False)
    if importlib.util.find_spec("apex"):
        from apex.normalization import fused_layer_norm as apex

        if layer:
            peers["apex"] = lambda x, weight, bias: apex.fused_layer_norm_affine(
                x, weight, bias, (columns,), 1e-5, True
            )
        else:
            peers["apex"] = lambda x, weight: apex.fused_rms_norm_affine(x, weight, (columns,), 1e-5, True)
    return peers
