"""The study of what few bits cost in quality (examples/fidelity.py): its runs, intervals and verdicts."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(EXAMPLES))
    import fidelity

    yield fidelity
    sys.path.remove(str(EXAMPLES))


def run(study, monkeypatch, results, *arguments):
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--results", str(results), *arguments])
    study.main()
    return results.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.usefixtures("one_thread")
def test_runs_are_resumed(study, monkeypatch, tmp_path):
    results = tmp_path / "study"
    arguments = ["--tasks", "conv", "--seeds", "1", "--steps", "3", "--settings", "plain", "exact", "steps, 2 bits"]
    lines = run(study, monkeypatch, results, *arguments)
    # (Nothing of this net can be converted exactly.)
    plain, steps = map(json.loads, lines)
    assert (plain["setting"], steps["setting"]) == ("plain", "steps, 2 bits")
    assert plain["before"] == steps["before"]
    assert (plain["early"], plain["late"]) == (1, 1)
    assert 0.9 < steps["early"] < 1
    assert 0.9 < steps["late"] < 1
    assert steps["saved_bytes"] < plain["saved_bytes"]
    more = run(study, monkeypatch, results, *arguments[:-1], "plain again", "steps, 2 bits")
    assert more[:2] == lines
    assert [json.loads(line)["setting"] for line in more[2:]] == ["plain again"]
    text = results.with_suffix(".md").read_text(encoding="utf-8")
    assert "| steps, 2 bits | 1 |" in text
    assert results.with_suffix(".png").stat().st_size > 0
    # Runs of another length are not mixed with them.
    run(study, monkeypatch, results, "--tasks", "conv", "--seeds", "1", "--steps", "2", "--settings", "plain")
    text = results.with_suffix(".md").read_text(encoding="utf-8")
    assert "\n2 steps; " in text
    assert "| plain | 1 |" in text
    assert "steps, 2 bits" not in text


@pytest.mark.usefixtures("one_thread")
def test_other_batches_are_those_that_follow(study, monkeypatch):
    # The control is trained on as many batches as the plain run, none of which it has seen.
    task, seen = study.TASKS["conv"][0](), []

    def step(run, batch):
        seen.append(batch["pixel_values"])

    monkeypatch.setattr(study.Run, "step", step)
    study.train(task, "conv", "plain", 0, 3)
    study.train(task, "conv", "plain again", 0, 3)
    assert len(seen) == 6
    batches = task.batches(0)
    assert all(torch.equal(x, next(batches)["pixel_values"]) for x in seen)


def test_intervals_and_verdicts(study):
    def outcomes(setting, scores):
        one = study.Outcome("conv", setting, 0, 200, 10.0, 0.0, 1e6, 0.99, 0.98)
        return [replace(one, seed=seed, score=score) for seed, score in enumerate(scores)]

    plain = [98.0, 97.0, 99.0, 98.0, 98.5]
    lost = {"exact": [0.0, 0.1, -0.1, 0.0, 0.0], "8 bits": [1.5, -1.0, 0.5, 0.2, 0.1], "4 bits": [1.0, 1.1, 0.9, 1, 1]}
    all_of_them = outcomes("plain", plain)
    for setting, values in lost.items():
        all_of_them += outcomes(setting, [a - b for a, b in zip(plain, values, strict=True)])
    for setting, values in lost.items():
        assert study.losses(all_of_them, setting, higher_is_better=True) == pytest.approx(values)
        assert study.losses(all_of_them, setting, higher_is_better=False) == pytest.approx([-v for v in values])
    # Of Student's t with 4 degrees of freedom, the 95 % quantile is 2.132 (any table of it).
    mean = sum(lost["8 bits"]) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in lost["8 bits"]) / 4 / 5)
    assert study.upper_end(lost["8 bits"]) == pytest.approx(mean + 2.132 * error, abs=1e-3 * error)
    assert study.upper_end([0.1]) == math.inf
    rows = {line.split(" | ")[0].strip("| "): line for line in study.table(all_of_them).splitlines() if "%" in line}
    assert "| admitted |" in rows["exact"]
    assert "| more seeds |" in rows["8 bits"]
    assert "| not admitted |" in rows["4 bits"]
