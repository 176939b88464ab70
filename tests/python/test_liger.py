"""Liger-Kernel's own layers, converted: patched first, as its documentation says, then lomem.convert.

Runs where triton and liger_kernel are, and without a GPU on Triton's interpreter (benchmarks/liger_models.py).
"""

import sys
from pathlib import Path

import lomem
import pytest
import torch
from lomem.memory import saved_for_backward

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import liger_models
from bytes_alive import bytes_alive

PROBLEM = liger_models.load()  # before transformers, which imports triton
if PROBLEM:
    pytest.skip(f"Liger-Kernel: {PROBLEM}", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

PATCHED = [patch for patch, kernels in liger_models.PATCHES.items() if kernels]
#: Those that leave nothing to convert: layers of plain torch are linear layers, behind norms that are Liger-Kernel's.
ALL = PATCHED[-1]


def run(model, batch):
    model.zero_grad(set_to_none=True)
    with saved_for_backward([*model.parameters(), *model.buffers(), *batch.values()]) as saved:
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), saved.nbytes, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(grads, others):
    """The difference of two gradients, relative to the second one."""
    assert grads.keys() == others.keys()
    norm = sum(g.square().sum() for g in others.values()).sqrt()
    return (sum((grads[name] - g).square().sum() for name, g in others.items()).sqrt() / norm).item()


def forwards(model):
    """What the modules that are Liger-Kernel's run, by name, whether on the instance or of the class."""
    methods = {name: getattr(module.forward, "__func__", None) for name, module in model.named_modules()}
    return {name: m for name, m in methods.items() if getattr(m, "__module__", "").startswith("liger_kernel")}


@pytest.mark.parametrize("kind", liger_models.KINDS)
@pytest.mark.parametrize("patch", PATCHED)
def test_liger_computes_what_transformers_does(kind, patch):
    with liger_models.patched(kind, "nothing") as (model, batch):
        loss, _, grads = run(model, batch)
    with liger_models.patched(kind, patch) as (model, batch):
        assert forwards(model)
        ours = run(model, batch)
    assert ours[0] == pytest.approx(loss, rel=1e-6)
    assert distance(ours[2], grads) < 1e-5  # other orders of sums in float32


@pytest.mark.parametrize("classes", [False, True], ids=["model", "classes"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", liger_models.KINDS)
@pytest.mark.parametrize("patch", PATCHED)
@pytest.mark.parametrize("bits", [16, 8])
def test_a_patched_model_is_converted(kind, patch, lora, classes, bits):
    with liger_models.patched(kind, patch, lora=lora, classes=classes) as (model, batch):
        before, patched = run(model, batch), forwards(model)
        if patch == ALL:
            with pytest.raises(lomem.NothingToConvertError):
                lomem.convert(model, batch, bits=bits, gradients=False)
        else:
            assert lomem.convert(model, batch, bits=bits, gradients=False).converted
        after = run(model, batch)
        # Liger-Kernel's modules compute what they did, by the same functions.
        assert forwards(model) == patched
        assert bytes_alive(lambda: model(**batch).loss)[0] == after[1]
    if patch == ALL:
        assert after[1] == before[1]
    else:
        assert after[1] < before[1]
    assert after[0] == pytest.approx(before[0], rel=1e-6)  # norms are rounded otherwise
    # Rounding in float32; 8 bits err by half a percent per tensor kept in them, of which a few are behind each other.
    assert distance(after[2], before[2]) < (2e-2 if bits == 8 and patch != ALL else 1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("patch", PATCHED)
def test_a_converted_model_is_patched(patch, lora):
    """The other order: gradients are right, and as many bytes are saved as by Liger-Kernel alone, or fewer."""
    with liger_models.patched("llama", patch, lora=lora) as (model, batch):
        alone = run(model, batch)
    with liger_models.patched("llama", patch, lora=lora, classes=False, bits=16) as (model, batch):
        after = run(model, batch)
    assert after[1] <= alone[1]
    assert after[0] == pytest.approx(alone[0], rel=1e-6)
    assert distance(after[2], alone[2]) < 1e-5


@pytest.mark.parametrize("patch", ["loss", "gated MLP"])
def test_the_original_model_is_restored(patch):
    with liger_models.patched("llama", patch) as (model, batch):
        before, patched = run(model, batch), forwards(model)
        lomem.convert(model, batch, bits=16)
        lomem.restore(model)
        after = run(model, batch)
        assert forwards(model) == patched
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], grad) for name, grad in before[2].items())
