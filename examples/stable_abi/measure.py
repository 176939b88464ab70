"""GELU with two bits, of one library for many versions of torch: checks it, and times a call beside lomem's own.

    python examples/stable_abi/measure.py build/stable-abi/liblomem_stable.so

Inputs have one element, so that the call is timed, forward and backward; the contenders take turns, and figures are
medians in microseconds. Without lomem in the environment, torch's GELU alone is beside the prototype. The result, and
what follows from it: docs/versions.md.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CALLS, ROUNDS = 200, 51
#: Of GELU's approximation by three ReLUs: Yang et al., 2024, arXiv:2406.16282.
BOUNDARIES = torch.tensor([-3.1858810036855245, -0.001178821281161997, 3.190832613414926], dtype=torch.float64)
SLOPES = torch.tensor([-0.04922261145617846, 1.0979632065417297, -0.048740595085551286], dtype=torch.float64)
LEVELS = torch.cat([torch.zeros(1, dtype=torch.float64), SLOPES.cumsum(0)])
_boundaries, _levels = BOUNDARIES.tolist(), LEVELS.tolist()


class Function(torch.autograd.Function):
    """Autograd as a Python class."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """Saves the codes."""
        output, codes = torch.ops.lomem_stable.gelu_forward(input, _boundaries)
        ctx.save_for_backward(codes)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient by the codes."""
        return torch.ops.lomem_stable.step_multiply(grads[0], *ctx.saved_tensors, _levels)  # type: ignore[no-any-return]


def register() -> None:
    """Autograd by torch.library, and what torch.compile needs."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> Any:
        return torch.ops.lomem_stable.step_multiply(grad_output, *ctx.saved_tensors, _levels), None

    torch.library.register_autograd("lomem_stable::gelu_forward", backward, setup_context=setup_context)

    @torch.library.register_fake("lomem_stable::gelu_forward")
    def _(input: Tensor, boundaries: list[float]) -> tuple[Tensor, Tensor]:
        return torch.empty_like(input), input.new_empty([(input.numel() * 2 + 7) // 8], dtype=torch.uint8)

    @torch.library.register_fake("lomem_stable::step_multiply")
    def _(grad_output: Tensor, codes: Tensor, levels: list[float]) -> Tensor:
        return torch.empty_like(grad_output)


def check(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Compares values with torch's and gradients with the formula."""
    torch.manual_seed(0)
    x = (torch.randn(10_007) * 4).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    y = function(x)
    assert torch.equal(y, F.gelu(x)), "the forward pass is not torch's"
    wide = x.detach().double() if dtype is torch.float64 else x.detach().float()
    level = LEVELS[torch.searchsorted(BOUNDARIES.to(wide), wide)].to(wide)
    expected = (grad.to(wide) * level).to(dtype)
    (result,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(result, expected), "the gradient is not that of the step function"


def contenders() -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed."""
    result: dict[str, Callable[[Tensor], Tensor]] = {"torch's GELU": F.gelu}
    if importlib.util.find_spec("lomem"):
        import lomem

        result["lomem: C++ autograd"] = functools.partial(lomem.functional.gelu, bits=2, criterion="paper")
    result["stable ABI, torch.autograd.Function"] = Function.apply
    registered = torch.ops.lomem_stable.gelu_forward
    result["stable ABI, torch.library.register_autograd"] = lambda x: registered(x, _boundaries)[0]
    return result


def microseconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of one call, forward and backward."""
    one = torch.ones_like(x)
    start = time.perf_counter()
    for _ in range(CALLS):
        torch.autograd.grad(function(x), x, one)
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Checks and prints a table."""
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    register()
    functions = contenders()
    for name, function in functions.items():
        if name.startswith("stable"):
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                check(function, dtype)
    compiled = torch.compile(
        functions["stable ABI, torch.library.register_autograd"], fullgraph=True, backend="aot_eager"
    )
    check(compiled, torch.float32)
    x = torch.randn(1, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name].append(microseconds(function, x))
    print(f"torch {torch.__version__}: values and gradients are right, compiled too")
    for name, values in times.items():
        print(f"{statistics.median(values):8.2f} us  {name}")


if __name__ == "__main__":
    main()
