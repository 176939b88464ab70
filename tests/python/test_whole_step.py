"""benchmarks/whole_step.py: its interval and table, and the script on tiny models."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")  # of lomem.commands.bench

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import whole_step  # noqa: E402


def probability_below(n, k):
    """That at most k of n tosses of a coin are heads."""
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


@pytest.mark.parametrize("n", range(6, 60))
def test_the_interval_is_the_shortest_with_95_percent(n):
    values = list(range(n))
    low, high = whole_step.interval_of_median(values[::-1])
    # The median is below the value number `low` if that many or fewer of the values are below the median.
    assert high == n - 1 - low
    assert 1 - 2 * probability_below(n, low) >= 0.95
    assert 1 - 2 * probability_below(n, low + 1) < 0.95


def test_fewer_rounds_have_no_interval():
    with pytest.raises(ValueError, match="got 5 rounds, expected at least 6 for an interval of 95 %"):
        whole_step.interval_of_median([1.0] * 5)


def test_the_table_compares_steps_of_the_same_round():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    results = {
        "plain": {"saved_bytes": 4 * 2**20, "seconds": drift},
        "lomem": {"saved_bytes": 3 * 2**20, "seconds": [1.25 * s for s in drift]},
    }
    lines = whole_step.table("A model", results)
    assert lines[-3:-1] == [
        "| plain | 4.0 |  | 6,000 |  |  |",
        "| `lomem.convert` | 3.0 | -25.0 % | 7,500 | 1.250 | 1.250 to 1.250 |",
    ]


def test_the_script(tmp_path):
    pytest.importorskip("peft")
    files = [tmp_path / "steps.json", tmp_path / "steps.md"]
    methods = ["plain", "exact", "checkpointing", "every-second"]
    command = [sys.executable, ROOT / "benchmarks/whole_step.py", "--small", "--rounds", "6", "--cases", "vit-s-amp"]
    command += ["--methods", ",".join(methods), "--json", files[0], "--table", files[1], "--note", "A try."]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    case = json.loads(files[0].read_text())["cases"]["vit-s-amp"]["methods"]
    assert list(case) == methods
    assert all(len(result["seconds"]) == 6 and min(result["seconds"]) > 0 for result in case.values())
    saved = {method: result["saved_bytes"] for method, result in case.items()}
    assert saved["checkpointing"] < saved["every-second"] < saved["exact"] < saved["plain"]
    text = files[1].read_text()
    assert text.count("\n| ") == 1 + len(methods)
    assert "- A try.\n" in text


def test_a_budget_can_be_set_in_a_fresh_process():
    command = [
        sys.executable,
        "-c",
        "import whole_step; print(whole_step.torch._functorch.config.activation_memory_budget)",
    ]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "benchmarks", timeout=600)
    assert float(found.stdout) == 1


def test_the_committed_results():
    """The table is that of the figures, and the fewer bytes do not come from another model."""
    path = ROOT / "benchmarks/results/whole-step.json"
    contents = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == whole_step.markdown(contents)
    assert contents["cases"].keys() <= whole_step.CASES.keys()
    for case in contents["cases"].values():
        saved = {method: result["saved_bytes"] for method, result in case["methods"].items()}
        assert list(saved) == list(whole_step.METHODS)
        assert saved["checkpointing"] <= saved["8bit"] <= saved["lomem"] <= saved["exact"] < saved["plain"]
        assert saved["8bit-compile"] <= saved["exact-compile"] <= saved["compile"]


def test_saved_bytes_of_plain_training():
    """ViT-S in float32, to the byte, counted from its layers."""
    path = ROOT / "benchmarks/results/whole-step.json"
    saved = json.loads(path.read_text())["cases"]["vit-s"]["methods"]["plain"]["saved_bytes"]
    rows, d, heads = 16 * 197, 384, 6
    norm = 4 * rows * (d + 2)  # input, mean, standard deviation
    attention = 4 * (3 * rows * d + rows * d + heads * rows)  # q, k, v, result, log of the sums
    mlp = 4 * rows * (4 * d + 4 * d)  # the input and the result of GELU
    linears = 4 * rows * (d + d)  # the inputs of q, k and v, and of the first of the MLP
    layers = 12 * (2 * norm + linears + attention + mlp)
    # The last norm; all of its output, of which the head takes a row; the logs of the probabilities; a sum of weights.
    head = norm + 4 * rows * d + 4 * 16 * 1000 + 4
    assert saved == layers + head


def test_the_document_names_what_there_is():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for option in re.findall(r"`--([\w-]+)[^`]*`", text[text.index("## Whole training steps") :]):
        assert f'"--{option}"' in (ROOT / "benchmarks/whole_step.py").read_text(encoding="utf-8")
