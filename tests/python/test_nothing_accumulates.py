"""Repeating an operation leaves no more behind than doing it once, counted in objects.

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
ROUNDS = 2000 if SOAK else 10
STEPS = 20000 if SOAK else 200

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _only_what_is_new():
    """Ignores objects from before, in garbage collection too, which takes most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
    # Recorders are freed while the tensors that they saw live on.
    recorder = lomem._trace.recorder.Recorder(MODEL)
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


def living():
    """The number of live objects of each type, of Python's memory blocks, and of KiB of the process."""
    gc.collect()
    # Blocks include objects that the garbage collector does not track: numbers, strings.
    blocks = sys.getallocatedblocks()
    counts = collections.Counter(type(o).__qualname__ for o in gc.get_objects())
    counts["finalizers"] = len(weakref.finalize._registry)
    counts["blocks"] = blocks
    if SOAK:
        counts["KiB"] = resident_kib()
    return counts


def resident_kib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def assert_flat(act, rounds):
    """Checks that nothing grows once the caches of lomem, torch and Python are full. A leak grows with every round."""
    act()
    before = living()
    for _ in range(30):
        for _ in range(rounds):
            act()
        now = living()
        # A leak adds at least one object per round; half of that exceeds the random fluctuation. An arena of the
        # allocator is 1 MiB, and may come or go at random too.
        bound = collections.defaultdict(lambda: rounds / 2, KiB=rounds / 2 + 1024)
        grown = {kind: number - before[kind] for kind, number in now.items() if number - before[kind] > bound[kind]}
        if not grown:
            return
        before = now
    pytest.fail(f"{rounds} times leave {grown}")


def test_what_stays_is_seen():
    kept = []
    with pytest.raises(pytest.fail.Exception, match=f"{STEPS} times leave .*'blocks'"):
        assert_flat(lambda: kept.append(str(len(kept)) + "x" * 10), STEPS)


@pytest.mark.parametrize("name", OFTEN)
def test_nothing_accumulates(name):
    assert_flat(OFTEN[name], ROUNDS)


@pytest.mark.parametrize("zero", [False, True], ids=["inverted", "normalized"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("activations", ["2bit", "4bit"])
def test_training_accumulates_nothing(zero, activations, rounding):
    model = build(zero)
    optimizer = torch.optim.AdamW(model.parameters())
    lomem.convert(model, X, activations=activations, rounding=rounding)

    def step():
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()

    assert_flat(step, STEPS)


def test_a_recorder_ends_with_its_last_reference():
    """Without the garbage collector: a reference cycle would keep its records alive until it runs."""
    gc.disable()
    try:
        recorder = lomem._trace.recorder.Recorder(MODEL)
        with recorder:
            MODEL(X).sum().backward()
        end = weakref.ref(recorder)
        del recorder
        assert end() is None
    finally:
        gc.enable()
        MODEL.zero_grad()
