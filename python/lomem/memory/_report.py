"""Common parts of the reports: tables, plots and JSON.

Tables need rich and plots need matplotlib, both optional: ``pip install 'lomem[bench]'``.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._encoding import encodes
from .._units import size, unit_of

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Report", "Section", "dtype_name", "plot", "top"]


#: Columns with sizes, which are right-aligned.
_SIZES = ("size", "own", "with submodules", "output", "step", "forward and backward")


class Section(NamedTuple):
    """One table of a report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def top(rows: Iterable[tuple[int, Sequence[str]]], count: int = 15) -> list[Sequence[str]]:
    """The rows with the largest numbers, largest first, and a last row with the number of the others."""
    ordered = sorted(rows, key=lambda row: -row[0])
    shown = [cells for _, cells in ordered[:count]]
    if len(ordered) > count:
        shown.append([f"and {len(ordered) - count} more"])
    return shown


def _right(column: str) -> bool:
    return column in _SIZES


class Report:
    """A dataclass that can be shown as tables, a plot or JSON."""

    def sections(self) -> list[Section]:
        """The tables."""
        raise NotImplementedError

    def categories(self) -> dict[str, int]:
        """Bytes in each category, for plots."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All attributes, including nested reports, as JSON-compatible values."""
        return _plain(self)

    def to_json(self, indent: int | None = 1) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> RenderableType:
        """The tables, for ``rich.print``."""
        try:
            from rich.box import SIMPLE_HEAD
            from rich.console import Group
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            raise ImportError(f"table() needs the package {error.name}: pip install 'lomem[bench]'") from error
        parts: list[RenderableType] = []
        for section in self.sections():
            table = Table(box=SIMPLE_HEAD)
            for column in section.columns:
                table.add_column(column, justify="right" if _right(column) else "left", no_wrap=_right(column))
            for row in section.rows:
                # Text, not markup: names of modules may contain brackets.
                table.add_row(*map(Text, row))
            parts += [Text(section.title, style="bold"), table]
        return Group(*parts)

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self._plain_text()
        file = _Page()
        Console(file=file, width=120).print(self.table())
        return file.getvalue().rstrip()

    def _plain_text(self) -> str:
        lines = []
        for section in self.sections():
            rows = [list(section.columns), *([*row] + [""] * (len(section.columns) - len(row)) for row in section.rows)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(section.columns))]
            lines.append(section.title)
            for row in rows:
                cells = zip(row, widths, section.columns, strict=True)
                line = "  ".join(c.rjust(w) if _right(name) else c.ljust(w) for c, w, name in cells)
                lines.append("  " + line.rstrip())
            lines.append("")
        return "\n".join(lines).rstrip()

    def plot(self, path: str | Path) -> None:
        """Draws the categories as a stacked bar; see :func:`lomem.memory.plot`."""
        plot({getattr(self, "source", "saved"): self}, path)


class _Page(io.StringIO):
    @property
    def encoding(self) -> str:  # type: ignore[override]
        # The encoding of the likely output: if it cannot encode box-drawing characters, rich uses ASCII.
        return "utf-8" if encodes("─") else "ascii"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, without the module."""
    return str(dtype).removeprefix("torch.")


#: Okabe and Ito's colours, which colour-blind readers can tell apart, and greys for what lomem does not reduce.
_COLORS = {
    "parameters": "0.55",
    "optimizer state": "0.7",
    "inputs": "0.85",
    "gradients": "#56B4E9",
    "weight copies": "#E69F00",
    "activations": "#0072B2",
    "recomputed": "#009E73",
    "temporaries": "#D55E00",
    "unaccounted": "#CC79A7",
}


def plot(reports: Mapping[str, Report], path: str | Path) -> None:
    """Draws reports side by side: a stacked bar per report, a colour per category.

    Example:
        >>> lomem.memory.plot({"plain": before, "converted": after}, "memory.png")

    Args:
        reports: Reports of one type, by their labels below the bars.
        path: File to write; its extension determines the format.
    """
    if not isinstance(reports, Mapping) or not reports or not all(isinstance(r, Report) for r in reports.values()):
        raise TypeError(
            f"lomem.memory.plot: reports is {reports!r:.80}, expected a dict of names and reports of lomem.memory"
        )
    if len({type(report) for report in reports.values()}) > 1:
        kinds = ", ".join(type(report).__name__ for report in reports.values())
        raise TypeError(f"lomem.memory.plot: reports are of the types {kinds}, expected one type")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"lomem.memory.plot needs the package {error.name}: pip install 'lomem[bench]'") from error
    path = Path(path)
    figure = Figure(figsize=(1.6 * len(reports) + 3.2, 4.2), layout="constrained")
    suffixes = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in suffixes:
        raise ValueError(
            f"lomem.memory.plot: path is {path}, expected a file name that ends in one of {', '.join(suffixes)}"
        )
    if not path.resolve().parent.is_dir():
        raise ValueError(f"lomem.memory.plot: path is {path}, expected a file in a folder that exists")
    axes = figure.subplots()
    bars = [report.categories() for report in reports.values()]
    used = [name for name in _COLORS if any(bar.get(name) for bar in bars)]
    bottom = [0.0] * len(bars)
    unit, factor = unit_of(max(sum(bar.values()) for bar in bars))
    for name in used:
        heights = [bar.get(name, 0) / factor for bar in bars]
        axes.bar(list(reports), heights, bottom=bottom, label=name, color=_COLORS[name], width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for x, bar in enumerate(bars):
        axes.annotate(
            size(sum(bar.values())),
            (x, bottom[x]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.margins(y=0.1)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
