"""``lomem demo``: a small Vision Transformer on scikit-learn's digits, with plain torch and with lomem.

Requires the optional packages of ``pip install 'lomem[demo]'``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError(f"the demo needs the package {error.name}: pip install 'lomem[demo]'") from error

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import memory
from .. import nn as lnn
from .plotting import check_plot
from .terminal import console, plus_minus

BATCH = 64
EPOCHS = 60


class Layers(NamedTuple):
    """The layers in which the two models differ."""

    norm: Callable[[int], nn.Module]
    activation: Callable[[], nn.Module]


#: Both have the same parameters, so a seed gives the same initial weights.
METHODS = {
    "torch": Layers(nn.LayerNorm, nn.GELU),
    "lomem": Layers(
        lambda width: lnn.MSLayerNorm(width, elementwise_affine=True), partial(lnn.GELU, bits=2, criterion="paper")
    ),
}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, layers: Layers) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = layers.norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = layers.norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), layers.activation(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block to a tensor of shape (batch, tokens, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.projection(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Vision Transformer for 8x8 images: 16 patches of 2x2 pixels and a class token."""

    def __init__(self, layers: Layers, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, layers) for _ in range(depth)))
        self.norm = layers.norm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, 1, 8, 8) to logits (batch, 10)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Data(NamedTuple):
    """Images of shape (n, 1, 8, 8) with values in [0, 1], and labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data() -> Data:
    """Loads the digits in their original order; the last fifth, by other writers, is the test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    split = len(labels) * 4 // 5
    return Data(images[:split], labels[:split], images[split:], labels[split:])


class Result(NamedTuple):
    """Result of one training run."""

    saved_bytes: int
    step_ms: list[float]
    accuracy: float


class Run:
    """One model during training."""

    def __init__(self, layers: Layers, data: Data, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = VisionTransformer(layers)
        self.data = data
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=3e-3, total_steps=steps)
        self.step_ms: list[float] = []

    def loss(self, index: Tensor) -> Tensor:
        """Loss on a batch of training images."""
        return F.cross_entropy(self.model(self.data.train_images[index]), self.data.train_labels[index])

    def saved_bytes(self, index: Tensor) -> int:
        """Bytes that autograd saves for a batch, without parameters, which are in memory anyway."""
        with memory.saved_for_backward(self.model.parameters()) as saved:
            self.loss(index)
        return saved.nbytes

    def step(self, index: Tensor) -> None:
        """Runs one optimizer step and records its time."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(index).backward()
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.schedule.step()

    def accuracy(self) -> float:
        """Accuracy on the test set."""
        with torch.no_grad():
            predicted = self.model(self.data.test_images).argmax(1)
        return (predicted == self.data.test_labels).double().mean().item()


def compare(seeds: int, epochs: int, terminal: Console) -> dict[str, list[Result]]:
    """Trains both models from each seed on the same batches, alternating step by step."""
    data = load_data()
    n = len(data.train_labels)
    steps = epochs * (n // BATCH)
    results: dict[str, list[Result]] = {name: [] for name in METHODS}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=terminal) as progress:
        task = progress.add_task("training", total=seeds * steps)
        for seed in range(seeds):
            progress.update(task, description=f"training both, seed {seed}")
            runs = {name: Run(layers, data, seed, steps) for name, layers in METHODS.items()}
            shuffle = torch.Generator().manual_seed(seed)
            for _ in range(epochs):
                # Full batches only, to keep step times comparable.
                for index in torch.randperm(n, generator=shuffle)[: n // BATCH * BATCH].split(BATCH):
                    for run in runs.values():
                        run.step(index)
                    progress.advance(task)
            for name, run in runs.items():
                saved_bytes = run.saved_bytes(torch.arange(BATCH))
                results[name].append(Result(saved_bytes, run.step_ms, run.accuracy()))
    return results


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


class Figures(NamedTuple):
    """One row of the comparison: a value per seed and method, and the difference."""

    name: str
    form: str
    values: dict[str, list[float]]
    difference: str


def figures(results: dict[str, list[Result]]) -> list[Figures]:
    """The rows of the table and the panels of the plot."""
    torch_runs, lomem_runs = results["torch"], results["lomem"]
    saved = {name: [r.saved_bytes * 2**-20 for r in runs] for name, runs in results.items()}
    step = {name: [statistics.median(r.step_ms) for r in runs] for name, runs in results.items()}
    accuracy = {name: [100 * r.accuracy for r in runs] for name, runs in results.items()}
    # The two models alternate, so ratios of adjacent steps are robust against changes in machine load.
    ratio = statistics.median(
        b / a for x, y in zip(torch_runs, lomem_runs, strict=True) for a, b in zip(x.step_ms, y.step_ms, strict=True)
    )
    gain, error = _mean_and_error([b - a for a, b in zip(accuracy["torch"], accuracy["lomem"], strict=True)])
    smaller = 100 * (saved["lomem"][0] / saved["torch"][0] - 1)
    return [
        Figures("saved for backward, MiB", ".2f", saved, f"{smaller:+.1f} %"),
        Figures("step time, ms (median)", ".1f", step, f"{100 * (ratio - 1):+.1f} %"),
        Figures(
            "test accuracy, %", ".2f", accuracy, f"{gain:+.2f}" + (f" {plus_minus()} {error:.2f}" if error else "")
        ),
    ]


def table(results: dict[str, list[Result]]) -> Table:
    """Table of the comparison, with standard errors if there are several seeds."""
    runs = len(results["torch"])
    seeds = f", mean of {runs} seeds {plus_minus()} standard error" if runs > 1 else ""
    rows = Table("", title=f"Vision Transformer on digits, batch {BATCH}{seeds}")
    for heading in (*METHODS, "difference"):
        rows.add_column(heading, justify="right")
    for row in figures(results):
        cells = []
        for method in METHODS:
            mean, error = _mean_and_error(row.values[method])
            cells.append(format(mean, row.form) + (f" {plus_minus()} {error:{row.form}}" if error else ""))
        rows.add_row(row.name, *cells, row.difference)
    return rows


def plot(results: dict[str, list[Result]], path: str) -> None:
    """Plots the three rows of the table as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    rows = figures(results)
    for axes, row in zip(figure.subplots(1, len(rows)), rows, strict=True):
        means, errors = zip(*(_mean_and_error(row.values[m]) for m in METHODS), strict=True)
        error_bars = {"yerr": errors, "capsize": 4} if any(errors) else {}
        bars = axes.bar(list(METHODS), means, width=0.7, color=["0.65", "#0072B2"], **error_bars)
        labels = [
            f"{mean:{row.form}}" + (f" ± {e:{row.form}}" if e else "") for mean, e in zip(means, errors, strict=True)
        ]
        axes.bar_label(bars, labels=labels, padding=2)
        axes.set_title(f"{row.name}\n{row.difference}", fontsize=10)
        # Bars start at 0, with room for the labels above them.
        axes.set_ylim(0, 1.15 * max(mean + error for mean, error in zip(means, errors, strict=True)))
        axes.set_xlim(-0.5, 1.5)
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "left", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(seeds: int = 1, epochs: int | None = None, plot_path: str | None = None) -> int:
    """Runs ``lomem demo``: trains, prints the table and writes the plot if a path is given."""
    if plot_path is not None:
        check_plot(plot_path, "demo")  # fail before training
    terminal = console()
    results = compare(seeds, epochs or EPOCHS, terminal)
    terminal.print(table(results))
    if plot_path is not None:
        plot(results, plot_path)
        terminal.print(f"plot written to {plot_path}")
    return 0
