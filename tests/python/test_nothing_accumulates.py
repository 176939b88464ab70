"""What is done again and again leaves no more behind than what is done once: counted in objects, not in time.

`make soak` does each a hundred times as often, and looks at the memory of the process as well.
"""

import collections
import gc
import os
import sys
import weakref
from pathlib import Path

import lomem
import pytest
import torch
from lomem import memory
from torch import nn

SOAK = "LOMEM_SOAK" in os.environ
ROUNDS = 2000 if SOAK else 12
STEPS = 20000 if SOAK else 200

pytestmark = pytest.mark.usefixtures("one_thread")


def build(zero=False):
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[1].weight[0] = 0.0 if zero else 1.0
    return model


MODEL, ZERO, SCRIPTED = build(), build(zero=True), nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Linear(16, 4)))
X = torch.randn(2, 16)
OPTIMIZER = torch.optim.AdamW(MODEL.parameters())


def convert_and_restore(model):
    lomem.convert(model, X)
    lomem.restore(model)


def convert_wrongly():
    with pytest.raises(RuntimeError):
        lomem.convert(MODEL, X[:, :3])


def save():
    with memory.saved_for_backward(MODEL.parameters()):
        MODEL(X)


def fake():
    with memory.fake(build):
        pass


def keep_a_graph():
    # Recorders end while what they saw lives on.
    recorder = lomem._record.Recorder(MODEL)
    with recorder:
        MODEL(X)


OFTEN = {
    "convert and restore": lambda: convert_and_restore(MODEL),
    "convert and restore, normalized": lambda: convert_and_restore(ZERO),
    "convert, dry": lambda: lomem.convert(MODEL, X, dry_run=True),
    "convert that raises": convert_wrongly,
    "profile": lambda: memory.profile(MODEL, X),
    "profile of a ScriptModule": lambda: memory.profile(SCRIPTED, X),
    "step_peak": lambda: memory.step_peak(MODEL, X, OPTIMIZER),
    "estimate": lambda: memory.estimate(build, X, torch.optim.AdamW),
    "estimate, converted": lambda: memory.estimate(build, X, transform=lambda m: lomem.convert(m, X) and None),
    "fake": fake,
    "saved_for_backward": save,
    "Recorder": keep_a_graph,
    "map_module": lambda: lomem.map_module(build(), lomem.convert_activation),
}


def objects():
    """How many objects of each type live."""
    gc.collect()
    counts = collections.Counter(type(o).__qualname__ for o in gc.get_objects())
    counts["finalizers"] = len(weakref.finalize._registry)
    return counts


def resident_kib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def growth(act, rounds):
    """What acting so often leaves behind: types of objects by number, Python's blocks of memory, the process's KiB."""
    before = objects()
    before = objects()  # again: the first one leaves what the second finds
    blocks, resident = sys.getallocatedblocks(), resident_kib()
    for _ in range(rounds):
        act()
    gc.collect()
    # Blocks hold also what the garbage collector does not know: numbers, strings.
    grown = {"blocks": sys.getallocatedblocks() - blocks} | {kind: n - before[kind] for kind, n in objects().items()}
    if SOAK:
        # An arena of the allocator is a MiB, and comes or goes by itself.
        grown["KiB"] = max(resident_kib() - resident - 1024, 0)
    # What stays each time is there as many times; half of that is more than what comes and goes by itself.
    return {kind: number for kind, number in grown.items() if number > rounds / 2}


def assert_flat(act, rounds):
    """Caches fill, of lomem's, torch's and Python's: then nothing grows. What stays behind each time grows for ever."""
    act()
    grown = [growth(act, rounds)]
    while grown[-1] and len(grown) < 6:
        grown.append(growth(act, rounds))
    assert not grown[-1], grown


@pytest.mark.parametrize("name", OFTEN)
def test_nothing_accumulates(name):
    assert_flat(OFTEN[name], ROUNDS)


@pytest.mark.parametrize("zero", [False, True], ids=["inverted", "normalized"])
@pytest.mark.parametrize("activations", ["2bit", "4bit"])
def test_training_accumulates_nothing(zero, activations):
    model = build(zero)
    optimizer = torch.optim.AdamW(model.parameters())
    lomem.convert(model, X, activations=activations)

    def step():
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()

    assert_flat(step, STEPS)


def test_a_recorder_ends_with_its_last_reference():
    """Without the garbage collector: a cycle would keep what it recorded until then."""
    gc.disable()
    try:
        recorder = lomem._record.Recorder(MODEL)
        with recorder:
            MODEL(X).sum().backward()
        end = weakref.ref(recorder)
        del recorder
        assert end() is None
    finally:
        gc.enable()
        MODEL.zero_grad()
