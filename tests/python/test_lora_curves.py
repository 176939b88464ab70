"""Training with LoRA, plain and converted, from the same seeds (examples/lora_curves.py): the same losses."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

EXAMPLES = Path(__file__).parents[2] / "examples"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, about names that peft uses
]


@pytest.fixture(scope="module")
def curves():
    sys.path.insert(0, str(EXAMPLES))
    import lora_curves

    yield lora_curves
    sys.path.remove(str(EXAMPLES))


#: The largest difference of a loss of 3.5, of which the last digit is 2.4e-7: a few roundings of it in float32, and of
#: what it is computed from in bfloat16, whose mean over 32 tokens it is.
TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_losses_are_the_same(curves, dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    base = transformers.LlamaForCausalLM(config).to(curves.DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    # A few sequences over and over, so that there is something to learn.
    known = torch.randint(0, 32, (4, 2, 16), generator=generator)
    batches = [{"input_ids": known[i % 4], "labels": known[i % 4]} for i in range(50)]
    result = curves.train(base, batches, r=4)
    assert result.difference("converted") <= TOLERANCES[dtype]
    # The control shows that these are roundings.
    assert 0 < result.difference("control") <= TOLERANCES[dtype]
    assert result.difference("converted") <= 4 * result.difference("control")
    plain = result.losses["plain"]
    assert plain[-1] < plain[0] - 0.03
    assert result.saved["converted"] < 0.6 * result.saved["plain"]
    assert result.exchanged


def test_the_committed_results(curves):
    contents = json.loads((RESULTS / "lora-curves.json").read_text(encoding="utf-8"))
    assert (RESULTS / "lora-curves.md").read_text(encoding="utf-8") == curves.table(contents)
    page = (RESULTS.parents[1] / "docs" / "lora.md").read_text(encoding="utf-8")
    for dtype, of_dtype in contents["curves"].items():
        result = curves.Curves(**of_dtype)
        assert len(result.losses["plain"]) == 50
        assert result.exchanged
        # To rounding: what another order of computation changes too.
        assert result.difference("converted") <= 4 * result.difference("control")
        figures = (result.losses["plain"][0], result.losses["plain"][-1])
        saved = (result.saved[run] / 2**20 for run in ("plain", "converted"))
        cells = [*(f"{n:.0f}" for n in saved), *(f"{loss:.4f}" for loss in figures)]
        cells += [f"{result.difference(run):.1e}" for run in ("converted", "control")]
        assert f"| {dtype} | {' | '.join(cells)} |" in page
