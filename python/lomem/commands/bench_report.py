"""Results of ``lomem bench``: files, tables and plots.

Requires the optional packages of ``pip install 'lomem[bench]'``: rich, and matplotlib for plots.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError(f"the benchmark needs the package {error.name}: pip install 'lomem[bench]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROGRAM = "lomem bench"
ACTIVATIONS = ("gelu", "gelu-tanh", "silu")
#: Not measured by default.
FEW_BIT = ("gelu-3bit", "gelu-4bit", "gelu-8bit")
NORMS = ("layer-norm", "layer-norm-affine", "rms-norm", "rms-norm-affine")
#: Not measured by default either.
GATED = ("swiglu", "geglu", "geglu-tanh", "reglu", "glu")
DROPOUT = ("dropout",)
LORA = ("lora-linear", "lora-linear-dropout")
STORAGE = ("quantize-8bit", "quantize-4bit", "dequantize-8bit", "dequantize-4bit")
#: Names for groups of cases.
FAMILIES = {
    "activations": ACTIVATIONS,
    "dropout": DROPOUT,
    "few-bit": FEW_BIT,
    "gated": GATED,
    "lora": LORA,
    "norms": NORMS,
    "storage": STORAGE,
}

#: One contender in one pass of one case. (Functional syntax, since `pass` cannot be a field name.)
Record = TypedDict(
    "Record",
    {
        "case": str,
        "shape": list[int],
        "elements": int,
        "dtype": str,
        "threads": int | None,  # None on a GPU
        "pass": str,
        "contender": str,
        "microseconds": float,  # per call
        "bytes_per_element": float,  # minimum to be moved
        "gigabytes_per_second": float,  # of those bytes
        "copy_gigabytes_per_second": float,  # bytes read and written by a copy between arrays in memory
        "copy_same_size_gigabytes_per_second": float,  # by a copy of the case's input, which caches may hold
        "fraction_of_copy": float,
        "fraction_of_copy_same_size": float,
        "time_over_lomem": float,  # medians of the ratios within a round
        "torch_time_over_time": float,
        "page_faults": float | None,  # per call; None on a GPU
        "preemptions": float | None,  # of a thread by another process, per call; None on a GPU
    },
)


class Results(NamedTuple):
    """The results of one run."""

    command: str
    machine: dict[str, Any]
    records: list[Record]


def select(only: Iterable[str] | None) -> list[str]:
    """The requested cases; by default all except those of FEW_BIT, GATED, DROPOUT, STORAGE and LORA."""
    known = [*ACTIVATIONS, *FEW_BIT, *GATED, *DROPOUT, *STORAGE, *LORA, *NORMS]
    if only is None:
        return [*ACTIVATIONS, *NORMS]
    wanted: set[str] = set()
    for name in only:
        if name not in known and name not in FAMILIES:
            raise ValueError(f"--only is {name}, expected some of {', '.join(dict.fromkeys([*FAMILIES, *known]))}")
        wanted.update(FAMILIES.get(name, (name,)))
    return [name for name in known if name in wanted]


def save(results: Results, path: str) -> None:
    """Writes a run to a file with one record per line, for readable diffs."""
    contents = json.dumps({"program": PROGRAM, **results._asdict(), "records": []}, indent=1)
    records = ",\n".join(f"  {json.dumps(record)}" for record in results.records)
    Path(path).write_text(contents.removesuffix("[]\n}") + f"[\n{records}\n ]\n}}\n", encoding="utf-8")


def load(path: str) -> Results:
    """Reads a run from a file."""
    if not Path(path).is_file():
        raise ValueError(f"--from is {path}, expected a file that exists")
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
        if contents["program"] != PROGRAM:
            raise ValueError("of another program")
        results = Results(contents["command"], contents["machine"], contents["records"])
        if any(Record.__annotations__.keys() != record.keys() for record in results.records):
            raise ValueError("of another version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--from is {path}, expected a file that `{PROGRAM} --json` of this version wrote") from error
    return results


def count_name(count: int) -> str:
    """Formats a count: 4096 is `4K`."""
    for unit, size in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def shape_name(shape: list[int]) -> str:
    """Formats a shape: [4096] is `4K`, [8192, 768] is `8192x768`."""
    return count_name(shape[0]) if len(shape) == 1 else "x".join(map(str, shape))


def threads_name(threads: int | None) -> str:
    """Number of threads for titles; empty for a GPU."""
    return "" if threads is None else "1 thread" if threads == 1 else f"{threads} threads"


def _title(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _contenders(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["contender"] for record in records))


def by_table(records: list[Record]) -> Iterator[list[Record]]:
    """Groups records by case and number of threads."""
    for _, group in itertools.groupby(records, lambda r: (r["threads"], r["case"])):
        yield list(group)


def print_header(results: Results, console: Console) -> None:
    """Prints the command, the machine and the meaning of the columns."""
    facts = {"command": results.command, **results.machine}
    rows = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        rows.add_row(name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    console.print(rows)
    console.print(COLUMNS)


def _microseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def table(records: list[Record]) -> Table:
    """Table of one case with one number of threads."""
    contenders = _contenders(records)
    first = records[0]
    result = Table(
        title=_title(first["case"], threads_name(first["threads"])),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for name in ("size", "dtype", "pass"):
        result.add_column(name, no_wrap=True)
    for name in contenders:
        result.add_column(f"{name}\nus", justify="right", no_wrap=True)
        if name != "torch":
            result.add_column("\nspeed", justify="right", no_wrap=True)
        if name == "lomem":
            result.add_column("\nof copy", justify="right", no_wrap=True)
    shown: list[int] = []
    for (shape, dtype, pass_), group in itertools.groupby(records, lambda r: (r["shape"], r["dtype"], r["pass"])):
        of = {record["contender"]: record for record in group}
        if shape != shown and shown:
            result.add_section()
        cells = ["" if shape == shown else shape_name(shape), dtype if pass_ == "forward" else "", pass_]
        shown = shape
        for name in contenders:
            cells.append(_microseconds(of[name]["microseconds"]) if name in of else "")
            if name != "torch":
                cells.append(f"{of[name]['torch_time_over_time']:.2f}x" if name in of else "")
            if name == "lomem":
                cells.append(f"{of[name]['fraction_of_copy_same_size']:.0%}")
        result.add_row(*cells)
    return result


def print_table(records: list[Record], console: Console) -> None:
    """Prints a table, the bandwidth of a copy and disturbances during the run."""
    console.print(table(records))
    copy = [record["copy_gigabytes_per_second"] for record in records]
    console.print(f"  Copy in memory: {min(copy):.0f} to {max(copy):.0f} GB/s.")
    if records[0]["threads"] is not None:
        faults = max(record["page_faults"] or 0 for record in records)
        preemptions = statistics.fmean(
            (record["preemptions"] or 0) / record["microseconds"] * 1e6 for record in records
        )
        console.print(f"  At most {faults:.1f} page faults per call; {preemptions:.0f} preemptions per second.")
        if preemptions > BUSY:
            console.print("  The machine was busy with other processes: these times are not reliable.")
    if any(record["contender"] == LAYER_NORM for record in records):
        console.print(f"  {LAYER_NORM}: {RMS_NORM_ON_CPU}")
    console.print()


#: Preemptions per second above which other processes distort the times.
BUSY = 100
COLUMNS = """
us       time per call
speed    torch's time divided by this time, above 1 if torch is slower
of copy  bandwidth relative to a copy of the input, which moves as many bytes or fewer
"""
#: A contender of rms-norm on CPUs.
LAYER_NORM = "lomem layer-norm"
RMS_NORM_ON_CPU = (
    "On a CPU, torch's rms_norm consists of several ops, so a speedup over it says little. "
    "lomem's layer norm on the same tensors does the work of a fused RMS norm, plus the mean."
)


def markdown(results: Results) -> str:
    """Markdown tables of torch's time divided by the time of each other contender."""
    machine = results.machine
    device = machine["device"] if machine["device"] != "cpu" else machine["cpu"]
    lines = [
        f"# {PROGRAM}: {device}",
        "",
        "Torch's time divided by lomem's, or by that of the contender named in the column: above 1, torch is slower. "
        f"{versions(machine)}.",
        "",
        f"`{results.command}`",
    ]
    for family, names in FAMILIES.items():
        mine = [record for record in results.records if record["case"] in names]
        for threads in dict.fromkeys(record["threads"] for record in mine):
            group = [record for record in mine if record["threads"] == threads]
            lines += ["", f"## {_title(family.capitalize(), threads_name(threads))}", "", *_markdown_table(group)]
            if any(record["contender"] == LAYER_NORM for record in group):
                lines += ["", f"{LAYER_NORM}: {RMS_NORM_ON_CPU}"]
    return "\n".join(lines) + "\n"


def _markdown_table(records: list[Record]) -> Iterator[str]:
    ratios = [record for record in records if record["contender"] != "torch"]
    columns = sorted(
        dict.fromkeys((record["pass"], record["contender"]) for record in ratios),
        key=lambda column: ("forward", "backward", "both").index(column[0]),
    )
    names = [pass_ if contender == "lomem" else f"{pass_}: {contender}" for pass_, contender in columns]
    yield f"| case | size | dtype | {' | '.join(names)} |"
    yield "|---|---|---|" + "---:|" * len(columns)
    for key, group in itertools.groupby(ratios, lambda r: (r["case"], r["shape"], r["dtype"])):
        of = {(r["pass"], r["contender"]): f"{r['torch_time_over_time']:.2f}" for r in group}
        yield f"| {key[0]} | {shape_name(key[1])} | {key[2]} | {' | '.join(of.get(c, '') for c in columns)} |"


def versions(machine: dict[str, Any]) -> str:
    """Versions and date of a run, in one line."""
    return f"lomem {machine['lomem']} ({machine['commit']}), torch {machine['torch']}, {machine['date']}"


class Line(NamedTuple):
    """Plot style of a pass of a contender."""

    contender: str
    pass_: str
    color: str
    marker: str
    style: str


#: The Okabe-Ito palette, which is safe for colour-blind readers; markers and dashes repeat the distinction.
LINES = (
    Line("lomem", "forward", "#0072B2", "o", "-"),
    Line("lomem fast", "forward", "#56B4E9", "^", "-"),
    Line("lomem", "backward", "#0072B2", "s", "--"),
    Line("torch", "forward", "#D55E00", "o", "-"),
    Line("torch", "backward", "#D55E00", "s", "--"),
)


def check_drawn(cases: Iterable[str]) -> str:
    """The case to plot: the first activation."""
    drawn = [case for case in cases if case in ACTIVATIONS]
    if not drawn:
        raise ValueError(f"--plot shows an activation, expected one of {', '.join(ACTIVATIONS)} among the cases")
    return drawn[0]


def plot(results: Results, path: str) -> None:
    """Plots bandwidth against size, with copies for comparison: one panel per dtype and number of threads."""
    from matplotlib.figure import Figure

    case = check_drawn(record["case"] for record in results.records)
    records = [record for record in results.records if record["case"] == case]
    dtypes = list(dict.fromkeys(record["dtype"] for record in records))
    threads = list(dict.fromkeys(record["threads"] for record in records))
    machine = results.machine
    figure = Figure(figsize=(max(7.0, 3.0 * len(dtypes) + 0.6), 2.6 * len(threads) + 1.4), layout="constrained")
    grid = figure.subplots(len(threads), len(dtypes), sharex=True, sharey=True, squeeze=False)
    for (row, count), (column, dtype) in itertools.product(enumerate(threads), enumerate(dtypes)):
        axes = grid[row][column]
        _draw(axes, [r for r in records if r["dtype"] == dtype and r["threads"] == count])
        _mark_caches(axes, machine, dtype)
        axes.set_title(_title(dtype, threads_name(count)), fontsize=10)
        if row == len(threads) - 1:
            axes.set_xlabel("elements of the input")
        if column == 0:
            axes.set_ylabel("GB/s")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False, title=HEIGHT)
    device = machine["device"]
    if device == "cpu":
        device = f"{machine['cpu']}, {machine['lomem_cpu_capability']} kernels"
    figure.suptitle(
        f"{case}: minimum number of bytes moved, divided by the time per call\n{device}; {versions(machine)}",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


#: Legend title, since the plot does not show times.
HEIGHT = "at equal bandwidth, the op with fewer bytes to move (lomem backward) is faster"


def _draw(axes: Axes, records: list[Record]) -> None:
    sizes = sorted({record["elements"] for record in records})
    # All records of a size contain the same measurement.
    of = {record["elements"]: record for record in records}
    same_size = [of[size]["copy_same_size_gigabytes_per_second"] for size in sizes]
    memory = [of[size]["copy_gigabytes_per_second"] for size in sizes]
    axes.plot(sizes, same_size, label="copy of the input", color="black", linewidth=2.5, zorder=1)
    axes.plot(sizes, memory, label="copy in memory", color="0.5", linewidth=1, linestyle=":", zorder=1)
    for line in LINES:
        mine = [r for r in records if (r["contender"], r["pass"]) == (line.contender, line.pass_)]
        if mine:
            axes.plot(
                [r["elements"] for r in mine],
                [r["gigabytes_per_second"] for r in mine],
                label=f"{line.contender} {line.pass_}",
                color=line.color,
                marker=line.marker,
                linestyle=line.style,
                markersize=5,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = sizes if len(sizes) <= 6 else sizes[:: -(-len(sizes) // 6)]
    axes.set_xticks(shown, [count_name(size) for size in shown], minor=False)
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_caches(axes: Axes, machine: dict[str, Any], dtype: str) -> None:
    """Marks the sizes at which input and output together fill a cache."""
    width = int(dtype[-2:]) // 8
    low, high = axes.get_xlim()
    for name in ("l2", "l3"):
        size = machine.get(f"{name}_cache_bytes")
        if size and low < size / (2 * width) < high:
            axes.axvline(size / (2 * width), color="0.75", linewidth=0.8, zorder=0)
            axes.annotate(
                name.upper(),
                (size / (2 * width), 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(2, 0),
                textcoords="offset points",
                color="0.45",
                fontsize=8,
            )
