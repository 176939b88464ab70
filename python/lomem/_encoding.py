"""Tests whether a stream can encode a text."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["encodes"]


def encodes(text: str, stream: Any = None) -> bool:
    """Whether a stream (standard output by default) can encode a text."""
    stream = sys.stdout if stream is None else stream
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
