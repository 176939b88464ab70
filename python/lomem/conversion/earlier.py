"""Lets pickles of earlier versions load, which refer to modules by their old names."""

from __future__ import annotations

import sys

from . import exchange, forms, live, modules, report

__all__: list[str] = []

for _module in (exchange, forms, live, modules, report):
    sys.modules[_module.__name__.replace(".conversion.", ".conversion._")] = _module
