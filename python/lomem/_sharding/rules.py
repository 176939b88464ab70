"""What each op does with DTensors, forward and backward.

The dispatcher asks below autograd, so that the ops keep their gradients, and whatever calls them works: functions,
modules, converted models, compilers. Tensors are brought to placements with which every rank can run the op on what it
has. Elementwise ops keep all shards, norms those outside of the dimensions that they normalize over. Everything else
becomes a replica, a ``Partial`` among it, as with torch's ops. What an op saves belongs to a rank's own shard
(:class:`CodesOf`), and tells the backward op where the gradient has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..checkpoint import _PUBLISHED, DRAWN, EXACT, FEW_BIT
from ..functional import linear, packing
from ..functional.norms import LAYER_NORM, RMS_NORM
from .layouts import (
    Layout,
    as_distributed,
    contiguous_strides,
    dense_strides,
    in_order,
    is_sharded,
    memory_order,
    moved,
    placements_of_coded,
    placements_of_codes,
    seed_of_shard,
)

__all__ = ["RULES", "register"]


class Call:
    """A call of an op with DTensors.

    Attributes:
        op: The op.
        values: All arguments by name.
        mesh: The mesh of the DTensors.
    """

    def __init__(self, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.op = op
        arguments = op._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        self.values: dict[str, Any] = {a.name: given.get(a.name, a.default_value) for a in arguments}
        # (A seed is the same on every rank.)
        tensors = {name: v for name, v in self.values.items() if isinstance(v, Tensor) and name != "seed"}
        distributed = as_distributed(op._schema.name, tensors)
        self.values |= distributed
        self.mesh: DeviceMesh = next(t.device_mesh for t in distributed.values() if t is not None)

    def local(self, name: str, layout: Layout) -> Tensor | None:
        """The local tensor of an argument, with these placements; None if there is no such argument."""
        tensor = self.values.get(name)
        return None if tensor is None else moved(tensor, layout)

    def run(self, **values: Any) -> Any:
        """Runs the op with other values of some arguments."""
        return self.op(**{**self.values, **values})

    def wrapped(
        self, tensor: Tensor, layout: Layout, shape: Sequence[int], strides: Sequence[int] | None = None
    ) -> DTensor:
        """A DTensor of local tensors, each a shard, of a whole with this shape and, unless it is row-major, strides."""
        strides = contiguous_strides(shape) if strides is None else strides
        options: dict[str, Any] = {"shape": torch.Size(shape), "stride": tuple(strides)}
        return DTensor.from_local(tensor, self.mesh, layout, run_check=False, **options)

    def codes(self, tensor: Tensor, layout: Layout, order: Sequence[int], bits: int, numel: int) -> DTensor:
        """Codes of a tensor with these placements and number of elements."""
        return self.wrapped(tensor, placements_of_codes(layout, order), (-(-bits * numel // 8),))

    def seed(self, layout: Layout) -> dict[str, Tensor]:
        """The argument ``seed``, if it is given, as this rank uses it for its shard."""
        seed = self.values.get("seed")
        if seed is None:
            return {}
        plain = moved(seed, (Replicate(),) * self.mesh.ndim) if isinstance(seed, DTensor) else seed
        return {"seed": seed_of_shard(plain, self.mesh, layout)}


Rule: TypeAlias = Callable[[Call], Any]


def _stays(layout: Layout, keep: Callable[[int], bool] = lambda dim: True) -> Layout:
    """The placements nearest to these with which only some dimensions are sharded."""
    return tuple(p if is_sharded(p) and keep(p.dim) else Replicate() for p in layout)  # type: ignore[attr-defined]


def _common(tensors: Sequence[DTensor | None], keep: Callable[[int], bool] = lambda dim: True) -> Layout:
    """Placements for tensors of one shape: shards of the first that has any, since a replica is split for free."""
    layouts = [_stays(t.placements, keep) for t in tensors if t is not None]
    return tuple(next((p for p in column if is_sharded(p)), column[0]) for column in zip(*layouts, strict=True))


def _replicas(layout: Layout) -> bool:
    return not any(map(is_sharded, layout))


# Activations, dropout, codes: elementwise ----------------------------------------------------------------------------


def _prepared(call: Call) -> tuple[Tensor, Layout, Sequence[int], Sequence[int]]:
    """The input of an elementwise op, dense and in the memory order that the whole has, for which codes are made."""
    x: DTensor = call.values["input"]
    strides = dense_strides(x.shape, x.stride())
    order = memory_order(x.shape, strides)
    layout = _stays(x.placements)
    return in_order(moved(x, layout), order), layout, order, strides


def _elementwise(call: Call) -> DTensor:
    x, layout, _, strides = _prepared(call)
    return call.wrapped(call.run(input=x), layout, call.values["input"].shape, strides)


def _with_codes(call: Call) -> tuple[DTensor, DTensor]:
    x, layout, order, strides = _prepared(call)
    output, codes = call.run(input=x)
    whole = call.values["input"]
    return call.wrapped(output, layout, whole.shape, strides), call.codes(
        codes, layout, order, call.values.get("bits", 1), whole.numel()
    )


def _with_drawn_codes(call: Call) -> tuple[DTensor, DTensor, DTensor]:
    x, layout, order, strides = _prepared(call)
    if call.values["seed"] is None and not _replicas(layout):
        # Drawn by the op, which compilers know. All ranks draw the same one.
        *_, call.values["seed"] = call.run(input=x.new_empty(0))
    output, codes, used = call.run(input=x, **call.seed(layout))
    seed = used if _replicas(layout) else call.values["seed"]
    whole = call.values["input"]
    return (
        call.wrapped(output, layout, whole.shape, strides),
        call.codes(codes, layout, order, call.values["bits"], whole.numel()),
        seed if isinstance(seed, DTensor) else call.wrapped(seed, (Replicate(),) * call.mesh.ndim, ()),
    )


def _codes_alone(call: Call) -> DTensor:
    """Codes in row-major order."""
    name = "input" if "input" in call.values else "codes"
    x: DTensor = call.values[name]
    layout = _stays(x.placements)
    codes = call.run(**{name: moved(x, layout)}, **call.seed(layout))
    return call.codes(codes, layout, range(x.dim()), call.values.get("bits", 1), x.numel())


def _unpacked(call: Call) -> DTensor:
    layout = (Replicate(),) * call.mesh.ndim
    return call.wrapped(call.run(packed=call.local("packed", layout)), layout, (call.values["numel"],))


def _of_codes(call: Call) -> DTensor:
    """The op that multiplies a tensor by what codes of its elements, in row-major order, stand for.

    Or a seed. It keeps the placements of the tensor that it was drawn for, if it was drawn here.
    """
    name = next(iter(call.values))
    x: DTensor = call.values[name]
    kept = next((of for of in ("codes", "mask") if of in call.values), "seed")
    codes = call.values[kept]
    drawn = isinstance(codes, DTensor)
    layout = placements_of_coded(codes.placements) if drawn else _stays(x.placements)
    others = {kept: codes.to_local()} if drawn else {}
    call.values |= others
    others |= call.seed(layout)
    # Where every rank has all codes, shards of the tensor need not be gathered: they are put where they belong.
    taken = {p.dim for p in layout if is_sharded(p)}  # type: ignore[attr-defined]
    finer = tuple(
        b if not is_sharded(a) and isinstance(b, Shard) and b.dim not in taken else a
        for a, b in zip(layout, x.placements, strict=True)
    )
    local = moved(x, finer)
    if finer == layout:
        return call.wrapped(call.run(**{name: local}, **others).contiguous(), layout, x.shape)
    size, _ = compute_local_shape_and_global_offset(x.shape, call.mesh, layout)
    _, offset = compute_local_shape_and_global_offset(x.shape, call.mesh, finer)
    split = {p.dim for a, p in zip(layout, finer, strict=True) if a != p}  # type: ignore[attr-defined]
    place = tuple(
        slice(offset[dim], offset[dim] + local.shape[dim]) if dim in split else slice(None) for dim in range(x.dim())
    )
    whole = local.new_zeros(size)
    whole[place] = local
    return call.wrapped(call.run(**{name: whole}, **others)[place].contiguous(), finer, x.shape)


# Shards draw different numbers and replicas the same ones, although all ranks advance torch's generator alike: by one
# seed, which is drawn for the whole.


def _drawn_seed(call: Call, x: Tensor) -> Tensor:
    _, seed = torch.ops.lomem.seeded_dropout_forward(x.new_empty(0), call.values["p"])
    return seed  # type: ignore[no-any-return]


def _dropped(call: Call, *, by_seed: bool) -> tuple[DTensor, DTensor]:
    x, layout, _, strides = _prepared(call)
    whole, p = call.values["input"], call.values["p"]
    rows = range(whole.dim())
    if _replicas(layout):
        op = torch.ops.lomem.seeded_dropout_forward if by_seed else torch.ops.lomem.dropout_forward
        output, kept = op(x, p)
    else:
        kept = _drawn_seed(call, x)
        seed = seed_of_shard(kept, call.mesh, layout)
        if by_seed:
            output = torch.ops.lomem.seeded_dropout_apply(x, seed, p)
        else:
            ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
            kept = packing.pack_bool_to_uint8(torch.ops.lomem.seeded_dropout_apply(ones, seed, p) != 0)
            output = torch.ops.lomem.dropout_apply(x, kept, p)
    output = call.wrapped(in_order(output, memory_order(whole.shape, strides)), layout, whole.shape, strides)
    if by_seed:
        return output, call.wrapped(kept, placements_of_codes(layout, rows), ())
    return output, call.codes(kept, layout, rows, 1, whole.numel())


def _dropout(call: Call) -> DTensor:
    return _dropped(call, by_seed=call.values["saves"] == "seed")[0]


# Storage in groups ---------------------------------------------------------------------------------------------------


def _groups_of(numel: int, size: int) -> tuple[int]:
    return (-(-numel // size),)


def _in_groups(call: Call) -> tuple[DTensor, DTensor]:
    """Codes and scales of the shards, whose groups are their own."""
    x: DTensor = call.values["input"]
    layout, numel = _stays(x.placements), x.numel()
    dense = sorted(x.stride()) == sorted(dense_strides(x.shape, x.stride()))
    order = memory_order(x.shape, x.stride()) if dense else range(x.dim())
    codes, scales = call.run(input=in_order(moved(x, layout), order), **call.seed(layout))
    of = placements_of_codes(layout, order)
    return (
        call.codes(codes, layout, order, call.values["bits"], numel),
        call.wrapped(scales, of, _groups_of(numel, call.values["group_size"])),
    )


def _from_groups(call: Call) -> DTensor:
    shape, strides = call.values["size"], call.values["stride"]
    strides = contiguous_strides(shape) if strides is None else strides
    order = memory_order(shape, strides)
    codes, scales = call.values["codes"], call.values["scales"]
    layout = placements_of_coded(codes.placements, order)
    size, _ = compute_local_shape_and_global_offset(torch.Size(shape), call.mesh, layout)
    locals_ = {"codes": codes.to_local(), "scales": moved(scales, codes.placements), **call.seed(layout)}
    x = call.run(**locals_, size=size, stride=dense_strides(size, strides))
    return call.wrapped(x, layout, shape, strides)


# Norms ---------------------------------------------------------------------------------------------------------------


def _outside(call: Call, *tensors: DTensor) -> Layout:
    """Shards of whole rows."""
    rows = tensors[0].dim() - len(call.values["normalized_shape"])
    return _common(tensors, lambda dim: dim < rows)


def _parameters(call: Call) -> dict[str, Tensor | None]:
    layout = (Replicate(),) * call.mesh.ndim
    return {name: call.local(name, layout) for name in ("weight", "bias") if name in call.values}


def _norm(call: Call) -> Any:
    x: DTensor = call.values["input"]
    layout = _outside(call, x)
    results = call.run(input=moved(x, layout), **_parameters(call))
    if isinstance(results, Tensor):
        return call.wrapped(results, layout, x.shape)
    output, rstd = results
    k = len(call.values["normalized_shape"])
    return call.wrapped(output, layout, x.shape), call.wrapped(rstd, layout, (*x.shape[: x.dim() - k], *(1,) * k))


def _norm_backward(call: Call) -> tuple[DTensor | None, ...]:
    x: DTensor = call.values["output"]
    layout = _outside(call, x, call.values["grad_output"])
    tensors = {name: call.local(name, layout) for name in ("grad_output", "output", "rstd")}
    grad, *of_parameters = call.run(**tensors, **_parameters(call))
    summed = tuple(Partial() if is_sharded(p) else Replicate() for p in layout)
    shape = call.values["normalized_shape"]
    return (
        None if grad is None else call.wrapped(grad, layout, x.shape),
        *(None if g is None else call.wrapped(g, summed, shape) for g in of_parameters),
    )


# Gated units ---------------------------------------------------------------------------------------------------------


def _both(call: Call, others: Sequence[DTensor]) -> tuple[Layout, dict[str, Tensor | None]]:
    """Placements of a gated unit, and its operands: one tensor that holds both is not split within a row."""
    gate, up = call.values["gate"], call.values["up"]
    last = gate.dim() - 1
    layout = _common([gate, up, *others], lambda dim: up is not None or dim != last)
    return layout, {name: call.local(name, layout) for name in ("gate", "up")}


def _gated(call: Call) -> DTensor:
    layout, operands = _both(call, ())
    gate, up = call.values["gate"], call.values["up"]
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    strides = dense_strides(shape, gate.stride())
    return call.wrapped(in_order(call.run(**operands), memory_order(shape, strides)), layout, shape, strides)


def _gated_backward(call: Call) -> tuple[DTensor | None, ...]:
    grad: DTensor = call.values["grad_output"]
    layout, operands = _both(call, (grad,))
    results = call.run(grad_output=moved(grad, layout), **operands)
    gate = call.values["gate"]
    shapes = (gate.shape, gate.shape, grad.shape)
    return tuple(
        None if t is None else call.wrapped(t.contiguous(), layout, shape)
        for t, shape in zip(results, shapes, strict=True)
    )


def _gated_linear(call: Call) -> Tensor:
    v = call.values
    hidden = torch.ops.lomem.gated(v["gate"], v["up"], v["activation"], layout=v["layout"])
    return F.linear(hidden.to(v["weight"].dtype), v["weight"], v["bias"])


# Linear layers: called as functions, they have rules of their own (products.py); here products are torch's ------------


def _lora(call: Call) -> Tensor:
    v = call.values
    a = v["lora_a"]
    x = v["input"].to(v["dtype"] or a.dtype)
    x = torch.ops.lomem.dropout(x, v["p"]) if v["p"] else x
    return F.linear(F.linear(x.to(a.dtype), a), v["lora_b"], v["bias"]) * v["scaling"]


def _lora_weight_grad(call: Call) -> DTensor:
    """Columns may be shards. Rows are flattened in one operand, so they may not, if the other one is no matrix."""
    x: DTensor = call.values["input"]
    grad: DTensor = call.values["grad_product"]
    mask = call.values["mask"]
    last = x.dim() - 1
    layout = placements_of_coded(mask.placements) if mask is not None else _stays(x.placements)
    if mask is not None and any(is_sharded(p) for p in layout):
        x = torch.ops.lomem.dropout_apply(x.to(call.values["dtype"]), mask, call.values["p"])
        mask = None
    layout = _stays(x.placements, lambda dim: dim == last or last == 1)
    by_rows = tuple(Shard(0) if p == Shard(0) and last == 1 else Replicate() for p in layout)
    local = call.run(
        grad_product=moved(grad, by_rows), input=moved(x, layout), mask=None if mask is None else mask.to_local()
    )
    of = tuple(Partial() if p == Shard(0) and last == 1 else Shard(1) if is_sharded(p) else Replicate() for p in layout)
    return call.wrapped(local, of, (grad.shape[1], x.shape[last]))


def _plain_linear(call: Call) -> Tensor:
    """Without a gradient of the weight, nothing is compressed."""
    return F.linear(call.values["input"], call.values["weight"], call.values["bias"])


def _compressed_forward(call: Call) -> tuple[Tensor, ...]:
    """Each rank compresses the rows, or the columns, that it has. The results are named after these."""
    v = call.values
    x: DTensor = v["input"]  # a matrix
    output = F.linear(x, v["weight"], v["bias"])
    layout = _stays(x.placements)
    by_rows = tuple(p if is_sharded(p) and p.dim == 0 else Replicate() for p in layout)  # type: ignore[attr-defined]
    local = moved(x, layout)

    def compress(rows: Tensor, proj_dim: int, **seed: Any) -> tuple[Tensor, Tensor, Tensor]:
        none = rows.new_empty(0, rows.shape[1])
        _, *results = call.run(input=rows, weight=none, bias=None, proj_dim=proj_dim, **seed)
        return tuple(results)  # type: ignore[return-value]

    if v["seed"] is None:
        *_, v["seed"] = compress(local.new_zeros(2, 1), 1)
    rows = local.shape[0]
    proj_dim = min(rows, max(1, round(v["proj_dim"] * rows / max(x.shape[0], 1))))
    if rows:
        compressed, indices, _ = compress(local, proj_dim, **call.seed(by_rows))
    else:
        compressed, indices = local.new_empty(0, local.shape[1]), local.new_empty(0, dtype=torch.int64)
    of = placements_of_codes(layout, (0, 1))
    seed = v["seed"]
    return (
        output,
        call.wrapped(compressed, of, (v["proj_dim"], x.shape[1])),
        call.wrapped(indices, of, (v["proj_dim"] if indices.numel() else 0,)),
        seed if isinstance(seed, DTensor) else call.wrapped(seed, (Replicate(),) * call.mesh.ndim, ()),
    )


def _compressed_weight_grad(call: Call) -> DTensor:
    grad: DTensor = call.values["grad_output"]
    compressed, indices = call.values["compressed"], call.values["indices"]
    of = placements_of_coded(compressed.placements)

    # Shards of rows are those of the input; of columns, those of the output where the input has all columns.
    def needed(own: Placement, given: Placement) -> Placement:
        if is_sharded(own):
            return own if own.dim == 0 else Replicate()  # type: ignore[attr-defined]
        return given if is_sharded(given) and given.dim == 1 else Replicate()  # type: ignore[attr-defined]

    def result(own: Placement, given: Placement) -> Placement:
        if is_sharded(own):
            return Partial() if own.dim == 0 else own  # type: ignore[attr-defined]
        return Shard(0) if is_sharded(given) else Replicate()

    layout = tuple(map(needed, of, grad.placements))
    by_rows = tuple(p if is_sharded(p) and p.dim == 0 else Replicate() for p in of)  # type: ignore[attr-defined]
    local, own = moved(grad, layout), compressed.to_local()
    if own.shape[0]:
        given = {"compressed": own, "indices": None if indices is None else indices.to_local()}
        weight_grad = call.run(grad_output=local, **given, **call.seed(by_rows))
    else:
        weight_grad = own.new_zeros(local.shape[1], own.shape[1])
    return call.wrapped(weight_grad, tuple(map(result, of, layout)), (grad.shape[1], compressed.shape[1]))


# -- ------------------------------------------------------------------------------------------------------------------


def _decomposed(call: Call) -> Any:
    """Only seen in inference mode."""
    return call.op.decompose(**call.values)


def _names(*ops: torch._ops.OpOverload) -> list[str]:
    return [op._opname for op in ops]


#: The rule of each op.
RULES: dict[str, Rule] = {
    **dict.fromkeys((FEW_BIT[0], EXACT[0], DRAWN[0]), _elementwise),
    **dict.fromkeys((*FEW_BIT[1:], *EXACT[1:]), _with_codes),
    DRAWN[1]: _with_drawn_codes,
    **dict.fromkeys((f"{name}_backward" for name in (FEW_BIT[0], DRAWN[0])), _of_codes),
    **dict.fromkeys(("band_codes", "drawn_codes", "step_codes", *_names(packing.PACK)), _codes_alone),
    **dict.fromkeys(_names(packing.UNPACK), _unpacked),
    **dict.fromkeys(_PUBLISHED, _decomposed),
    "dropout": _dropout,
    "dropout_forward": lambda call: _dropped(call, by_seed=False),
    "seeded_dropout_forward": lambda call: _dropped(call, by_seed=True),
    **dict.fromkeys(("dropout_apply", "seeded_dropout_apply"), _of_codes),
    "quantize_groups": _in_groups,
    "dequantize_groups": _from_groups,
    **dict.fromkeys(_names(*(op for norm in (LAYER_NORM, RMS_NORM) for op in (norm.op, norm.forward))), _norm),
    **dict.fromkeys(_names(LAYER_NORM.backward, RMS_NORM.backward), _norm_backward),
    "gated": _gated,
    "gated_backward": _gated_backward,
    "gated_linear": _gated_linear,
    "lora": _lora,
    "lora_weight_grad": _lora_weight_grad,
    linear.OP._opname: _plain_linear,
    f"{linear.OP._opname}_forward": _compressed_forward,
    f"{linear.OP._opname}_weight_grad": _compressed_weight_grad,
}

_library = torch.library.Library("lomem", "FRAGMENT")


def _as_dispatched(rule: Rule) -> Callable[..., Any]:
    def dispatched(cls: type, op: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            return rule(Call(op, args, kwargs))

    return dispatched


def register() -> None:
    """Registers the rules of all ops."""
    for name, rule in RULES.items():
        torch.library.register_torch_dispatch(f"lomem::{name}", DTensor, _as_dispatched(rule), lib=_library)
