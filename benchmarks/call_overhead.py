"""Call overhead without gradient: lomem's ops against the torch ops that they replace.

Inputs have one element, so that only the call is timed. The two are timed in turns; the figures are medians. Needs only
lomem.

    python benchmarks/call_overhead.py
"""

import statistics
import time

import lomem
import torch
import torch.nn.functional as F

CALLS = 2000
ROUNDS = 101
PAIRS = {
    "regelu2 / gelu": (lomem.functional.regelu2, F.gelu),
    "resilu2 / silu": (lomem.functional.resilu2, F.silu),
    "ms_layer_norm / layer_norm": (
        lambda x: lomem.functional.ms_layer_norm(x, (1,)),
        lambda x: F.layer_norm(x, (1,)),
    ),
    "ms_rms_norm / rms_norm": (lambda x: lomem.functional.ms_rms_norm(x, (1,)), lambda x: F.rms_norm(x, (1,))),
}


def microseconds(function, x):
    start = time.perf_counter()
    for _ in range(CALLS):
        function(x)
    return (time.perf_counter() - start) / CALLS * 1e6


def main():
    torch.set_num_threads(1)
    x = torch.randn(1)
    print(f"{'microseconds per call':<28}{'lomem':>8}{'torch':>8}{'difference':>12}")
    for name, (ours, theirs) in PAIRS.items():
        pairs = [(microseconds(ours, x), microseconds(theirs, x)) for _ in range(ROUNDS)]
        a, b, difference = (statistics.median(v) for v in (*zip(*pairs, strict=True), [p - q for p, q in pairs]))
        print(f"{name:<28}{a:>8.2f}{b:>8.2f}{difference:>+12.2f}")


if __name__ == "__main__":
    main()
