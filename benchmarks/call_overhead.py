"""Call overhead, without and with gradient: lomem's ops against the torch ops that they replace.

Inputs have one element, so that only the call is timed. The two are timed in turns; figures are medians in
microseconds. With --against, another installation of lomem is timed in the same run, alternating with this one. Needs
only lomem.

    python benchmarks/call_overhead.py
    python benchmarks/call_overhead.py --limit 1                # exit 1 if a call costs over 1 us more than torch's
    python benchmarks/call_overhead.py --against OTHER          # OTHER: the folder that contains the other lomem/
"""

import argparse
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
import time

import lomem
import torch
import torch.nn.functional as F

CALLS = 500
ROUNDS = 101
LF = lomem.functional


#: Names in lomem.functional. The first versions have no module of activations.
NAMES = LF.activations.__all__ if hasattr(LF, "activations") else dir(LF)
#: Where torch's function is not the one of that name in torch.nn.functional.
OF_TORCH = getattr(getattr(LF, "activations", None), "_TORCH_FUNCTIONS", {})


def torch_function(name):
    """The function of torch's that an activation replaces, None for any other name."""
    published = re.fullmatch(r"re(\w+)2", name)  # those of published step functions are called after torch's
    name = published[1] if published else name
    return OF_TORCH.get(name) or getattr(F, name, None)


def required_arguments(function):
    """Zeros for the arguments after the input that have no default."""
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return (0.0,) * (len(required) - 1)


def activations():
    """Maps names to lomem's and torch's functions of one tensor."""
    result = {}
    for name in NAMES:
        ours, theirs = getattr(LF, name), torch_function(name)
        if inspect.isfunction(ours) and theirs is not None and "norm" not in name:
            arguments = required_arguments(ours)
            result[name] = (
                lambda x, f=ours, a=arguments: f(x, *a),
                lambda x, f=theirs, a=arguments: f(x, *a),
            )
    return result


def of_one_element(norm):
    return lambda x: norm(x, (1,))


ACTIVATIONS = activations()
NORMS = {
    f"ms_{name}": (of_one_element(getattr(LF, f"ms_{name}")), of_one_element(getattr(F, name)))
    for name in ("layer_norm", "rms_norm")
}


def microseconds(function, x):
    start = time.perf_counter()
    for _ in range(CALLS):
        function(x)
    return (time.perf_counter() - start) / CALLS * 1e6


def one_round(requires_grad):
    """Maps names to microseconds of lomem and of torch."""
    x = torch.randn(1, requires_grad=requires_grad)
    pairs = {**ACTIVATIONS, **NORMS}
    return {name: (microseconds(ours, x), microseconds(theirs, x)) for name, (ours, theirs) in pairs.items()}


def serve():
    """Runs a round for every line of standard input, and prints it."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(one_round(line.strip() == "grad")), flush=True)


class Other:
    """Another installation of lomem, in a separate process."""

    def __init__(self, folder):
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def round(self, requires_grad):
        """Runs :func:`one_round` in that process."""
        self.process.stdin.write("grad\n" if requires_grad else "plain\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def report(title, rounds, others):
    """Prints medians; returns the largest median difference between lomem's and torch's calls of an activation."""
    columns = f"{'torch':>8}{'lomem':>8}{'over torch':>12}" + (f"{'other lomem':>13}" if others else "")
    print(f"{title:<28}{columns}")
    worst = 0.0
    for name in rounds[0]:
        ours, theirs = (statistics.median(r[name][i] for r in rounds) for i in (0, 1))
        difference = statistics.median(r[name][0] - r[name][1] for r in rounds)
        other = f"{statistics.median(r[name][0] for r in others):>13.2f}" if others and name in others[0] else ""
        print(f"{name:<28}{theirs:>8.2f}{ours:>8.2f}{difference:>+12.2f}{other}")
        if name in ACTIVATIONS:
            worst = max(worst, difference)
    print()
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="OTHER", help="folder of another installation of lomem")
    parser.add_argument("--limit", type=float, metavar="US", help="largest difference from torch, without gradient")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    torch.set_num_threads(1)
    other = Other(arguments.against) if arguments.against else None
    worst = {}
    for requires_grad in (False, True):
        rounds, others = [], []
        for _ in range(arguments.rounds):
            rounds.append(one_round(requires_grad))
            if other is not None:
                others.append(other.round(requires_grad))
        worst[requires_grad] = report("with gradient" if requires_grad else "without gradient", rounds, others)
    if arguments.limit is not None and worst[False] > arguments.limit:
        print(f"a call costs {worst[False]:.2f} us more than torch's, expected at most {arguments.limit}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
