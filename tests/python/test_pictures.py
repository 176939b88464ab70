"""Pictures fit: nothing is cut off, and no margin is left empty."""

import itertools
import json
from pathlib import Path

import lomem
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as matplotlib laid them out."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def check(figure):
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    # To a fiftieth of an inch: letters are not as wide in every resolution.
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02
    assert box.width > 0.95 * width
    assert box.height > 0.9 * height
    for axes in figure.axes:
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        assert axes.dataLim.x0 >= left
        assert axes.dataLim.x1 <= right
        assert axes.dataLim.y0 >= bottom
        assert axes.dataLim.y1 <= top


def test_the_demo(drawn, tmp_path):
    from lomem.commands import demo

    for seeds in (1, 3):
        runs = [demo.Result(2**20, [10.0 + seed, 11.0], 0.9 + 0.01 * seed) for seed in range(seeds)]
        demo.plot({"torch": runs, "lomem": runs}, str(tmp_path / "demo.png"))
        check(drawn[-1])
        labels = [text.get_text() for text in drawn[-1].axes[2].texts]
        assert labels == (["90.00"] * 2 if seeds == 1 else ["91.00 ± 0.58"] * 2)


@pytest.mark.parametrize("name", ["amd-epyc", "amd-epyc-compile"])
def test_the_benchmark(drawn, tmp_path, name):
    from lomem.commands import bench_report

    bench_report.plot(bench_report.load(str(RESULTS / f"{name}.json")), str(tmp_path / "bench.png"))
    check(drawn[0])
    assert {axes.get_ylim() for axes in drawn[0].axes} == {drawn[0].axes[0].get_ylim()}


def test_the_papers_settings(drawn, tmp_path):
    from lomem.commands import model

    settings = json.loads((RESULTS / "paper-memory.json").read_text(encoding="utf-8"))["settings"]
    saved = [{method: e["saved_bytes"] for method, e in setting["estimates"].items()} for setting in settings]
    # In any order, settings of a model stand together.
    names = [setting["setting"] for setting in settings]
    model._plot_paper(names[::-1], saved[::-1], str(tmp_path / "paper.png"))
    check(drawn[0])
    (axes,) = drawn[0].axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    models = [name.split(",")[0] for name in shown]
    assert sorted(shown) == sorted(names)
    assert sum(a != b for a, b in itertools.pairwise(models)) == len(set(models)) - 1
    points = {c.get_label(): len(c.get_offsets()) for c in axes.collections}
    assert points == {
        model._PAPER_NAMES[method]: sum(method in one for one in saved)
        for method in ("activations", "norms", "lomem", "no peft cast", "exact", "8bit", "gated-mlp", "checkpoint")
    }


def test_one_setting(drawn, tmp_path):
    from lomem.commands import model

    saved = {"plain": 3 * 2**20, "activations": 2 * 2**20, "norms": 2**20, "lomem": 2**19, "checkpoint": 2**18}
    model._plot_paper(["vit-b, full fine-tuning"], [saved], str(tmp_path / "paper.png"))
    check(drawn[0])
    assert len(drawn[0].axes[0].collections) == 4


def test_step_functions(drawn, tmp_path):
    steps = {f"{bits} bits": lomem.functional.step_function("gelu", bits) for bits in (2, 3, 4)}
    lomem.fit.report("gelu", steps=steps).plot(tmp_path / "gelu.png")
    check(drawn[0])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["exact", *steps]


def test_memory(drawn, tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    profile = lomem.memory.profile(model, torch.randn(8, 64))
    for count in (1, 4):
        names = [f"a method of a long name, {i}" if count > 1 else "plain" for i in range(count)]
        lomem.memory.plot(dict.fromkeys(names, profile), tmp_path / "memory.png")
        check(drawn[-1])
