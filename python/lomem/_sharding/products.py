"""Linear layers of DTensors: each rank runs them on its shards, with their own gradients.

Above autograd, unlike the rules of other ops: the gradients flatten leading dimensions, which torch does by gathering
where one of them is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..functional.linear import OP
from .layouts import Layout, as_distributed, contiguous_strides, is_sharded, moved, seed_of_shard

__all__ = ["compressed_linear", "gated_linear", "linear", "lora"]


class _Plan(NamedTuple):
    """How a product is shared by the ranks.

    Attributes:
        mesh: The mesh.
        inputs: Placements of the operands.
        gradients: Placements of their gradients.
        output: Placements of the result.
    """

    mesh: DeviceMesh
    inputs: list[Layout]
    gradients: list[Layout]
    output: Layout


def _axes(letters: str, tensor: Tensor) -> list[str]:
    """Names of the dimensions: ``*`` stands for all leading ones."""
    leading = tensor.dim() - len(letters.lstrip("*"))
    return [f"*{i}" for i in range(leading)] + list(letters.lstrip("*"))


def _plan(letters: Sequence[str], output: Sequence[str], tensors: Sequence[DTensor]) -> _Plan:
    """Plans a product, whose dimensions have these names.

    Each dimension of the mesh may split one dimension of the product: that of the first operand that is sharded. An
    operand without it is a replica, whose gradient is a sum over ranks, and so is the result without it.
    """
    mesh = tensors[0].device_mesh
    names = [_axes(of, t) for of, t in zip(letters, tensors, strict=True)]
    columns: list[tuple[list[Placement], list[Placement], Placement]] = []
    for dim in range(mesh.ndim):
        split = None
        for of, tensor in zip(names, tensors, strict=True):
            placement = tensor.placements[dim]
            if split is None and isinstance(placement, Shard):
                split = of[placement.dim]
        if split is None:
            columns.append(([Replicate()] * len(names), [Replicate()] * len(names), Replicate()))
            continue
        columns.append(
            (
                [Shard(of.index(split)) if split in of else Replicate() for of in names],
                [Shard(of.index(split)) if split in of else Partial() for of in names],
                Shard(output.index(split)) if split in output else Partial(),
            )
        )
    inputs = [tuple(column[0][i] for column in columns) for i in range(len(names))]
    gradients = [tuple(column[1][i] for column in columns) for i in range(len(names))]
    return _Plan(mesh, inputs, gradients, tuple(column[2] for column in columns))


class _Local(torch.autograd.Function):
    """The local tensor of a DTensor with other placements, whose gradient has those in which it is computed.

    That of ``redistribute`` would be brought back to the placements before, which is left to whoever needs them.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, layout: Layout, gradients: Layout) -> Tensor:
        ctx.mesh, ctx.gradients = tensor.device_mesh, gradients
        ctx.shape, ctx.strides = tensor.shape, contiguous_strides(tensor.shape)
        local = moved(tensor, layout)
        return local.view_as(local)  # a tensor of its own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        options: dict[str, Any] = {"shape": ctx.shape, "stride": ctx.strides}
        return DTensor.from_local(grad.contiguous(), ctx.mesh, ctx.gradients, run_check=False, **options), None, None


def _product(
    op: str,
    names: Sequence[str],
    letters: Sequence[str],
    tensors: Sequence[Tensor | None],
    function: Callable[..., Tensor],
) -> DTensor:
    """A product of rows, the first operand, with a bias of letter ``o`` as the last one, or None.

    Args:
        op: Name of the op, for messages.
        names: Names of the operands, for messages.
        letters: Names of their dimensions.
        tensors: The operands.
        function: Computes the product from local operands, in this order, and from the plan.
    """
    given = as_distributed(op, dict(zip(names, tensors, strict=True)))
    present = [(of, t) for of, t in zip(letters, given.values(), strict=True) if t is not None]
    operands = [t for _, t in present]
    rows = operands[0]
    output = [*_axes(letters[0], rows)[:-1], "o"]
    plan = _plan([of for of, _ in present], output, operands)
    local = iter(
        _Local.apply(tensor, layout, gradients)
        for tensor, layout, gradients in zip(operands, plan.inputs, plan.gradients, strict=True)
    )
    locals_ = [None if given[name] is None else next(local) for name in names]
    terms = math.prod(plan.mesh.size(i) for i, p in enumerate(plan.output) if isinstance(p, Partial))
    if locals_[-1] is not None and terms > 1:
        locals_[-1] = locals_[-1] / terms  # as torch does, for the same bits
    sizes = {axis: size for of, t in present for axis, size in zip(_axes(of, t), t.shape, strict=True)}
    shape = torch.Size([sizes[axis] for axis in output])
    result = function(plan, *locals_)
    options: dict[str, Any] = {"shape": shape, "stride": contiguous_strides(shape)}
    return DTensor.from_local(result.contiguous(), plan.mesh, plan.output, run_check=False, **options)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    function: Callable[[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]], Tensor],
) -> DTensor | None:
    """A linear layer, if no rank needs more of its input than it has; otherwise None.

    Args:
        input: Shape (..., in).
        weight: Shape (out, in).
        bias: Shape (out,), or None.
        function: Computes it from local tensors, and from a function that makes a local tensor of another DTensor with
            the placements of the input.
    """
    names, letters = ("input", "weight", "bias"), ("*i", "oi", "o")
    tensors = (input, weight, bias)
    operands = [t for t in tensors if isinstance(t, DTensor)]
    if len(operands) < 2 + (bias is not None) or len({t.device_mesh for t in operands}) > 1:
        return None
    plan = _plan(letters[: len(operands)], [*_axes("*i", input)[:-1], "o"], operands)
    layout = plan.inputs[0]
    if layout != operands[0].placements:
        return None

    def local(tensor: Tensor) -> Tensor:
        return moved(tensor, layout) if isinstance(tensor, DTensor) else tensor

    return _product("linear", names, letters, tensors, lambda _, x, w, b: function(x, w, b, local))


def gated_linear(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Any:
    """What :func:`lomem.functional.gated_linear` does with DTensors."""
    op = torch.ops.lomem.gated_linear
    # One tensor that holds both operands is not split within a row.
    letters = ("*f", "*f", "of", "o") if up is not None else ("*g", "", "of", "o")
    if up is None and isinstance(gate, DTensor):
        last = gate.dim() - 1
        layout = tuple(Replicate() if p == Shard(last) else p for p in gate.placements)
        gate = gate.redistribute(gate.device_mesh, layout)
        if isinstance(weight, DTensor):
            layout = tuple(Replicate() if p == Shard(1) else p for p in weight.placements)
            weight = weight.redistribute(weight.device_mesh, layout)
    return _product(
        "lomem::gated_linear",
        ("gate", "up", "weight", "bias"),
        letters,
        (gate, up, weight, bias),
        lambda _, *local: op(*local, *args, **kwargs),
    )


def lora(input: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, *, bias: Tensor | None, p: float) -> Any:
    """What :func:`lomem.functional.lora` does with DTensors."""
    rows = input
    if p and isinstance(input, DTensor) and any(map(is_sharded, input.placements)):
        # Shards have to draw different numbers, which the op cannot.
        rows, p = torch.ops.lomem.dropout(input.to(lora_a.dtype), p), 0.0

    def function(_: _Plan, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.lomem.lora(x, a, b, scaling, bias=bias, p=p)  # type: ignore[no-any-return]

    names = ("input", "lora_a", "lora_b", "bias")
    return _product("lomem::lora", names, ("*i", "ri", "or", "o"), (rows, lora_a, lora_b, bias), function)


def compressed_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, seed: Tensor | None, **options: Any
) -> Any:
    """A randomized linear layer of DTensors: each rank compresses the rows that it has."""
    if isinstance(seed, DTensor):
        seed = seed.full_tensor()

    def function(plan: _Plan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = dict(options, seed=seed)
        last = x.dim() - 1
        by_rows = tuple(p if is_sharded(p) and p != Shard(last) else Replicate() for p in plan.inputs[0])
        if any(map(is_sharded, by_rows)):
            # Shards of rows are compressed independently of each other, to as large a part of them.
            if seed is None:
                own["seed"] = torch.ops.lomem.drawn_activation_forward(x.new_empty(0), "gelu", (), 1)[2]
            own["seed"] = seed_of_shard(own["seed"], plan.mesh, by_rows)
            rows = input.numel() // max(input.shape[-1], 1)
            part = x.numel() // max(x.shape[-1], 1) / max(rows, 1)
            for name in ("proj_dim", "proj_dim_min", "proj_dim_max"):
                if own[name] is not None:
                    own[name] = max(1, round(own[name] * part))
        return OP(x, weight, bias, **own)  # type: ignore[no-any-return]

    names = ("input", "weight", "bias")
    return _product(OP._schema.name, names, ("*i", "oi", "o"), (input, weight, bias), function)
