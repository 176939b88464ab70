"""Autocast for any device type, including those without autocast (meta)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["autocast_dtype", "autocast_to"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The autocast dtype of a device type, None if autocast is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_to(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a dtype on a device type; None disables autocast."""
    # (Of a device that a program adds, is_autocast_available does not say whether torch.autocast takes it.)
    if not torch.amp.is_autocast_available(device) or (dtype is None and not torch.is_autocast_enabled(device)):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype) if dtype is not None else torch.autocast(device, enabled=False)
