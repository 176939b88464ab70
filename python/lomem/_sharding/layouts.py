"""How tensors lie on a mesh of devices, and in the memory of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

__all__ = [
    "CodesOf",
    "Layout",
    "as_distributed",
    "contiguous_strides",
    "dense_strides",
    "in_order",
    "is_sharded",
    "memory_order",
    "moved",
    "number_of_shard",
    "placements_of_coded",
    "placements_of_codes",
    "seed_of_shard",
]

#: Placements, one for each dimension of a mesh.
Layout: TypeAlias = tuple[Placement, ...]


class CodesOf(Partial):
    """Of codes: each rank has those of its own shard of another tensor, which has the given placement.

    Codes follow the order of elements in memory, so that those of all shards are no shards of the codes of the whole
    tensor. They can be used with the very same shards only, and every redistribution raises. (It is a ``Partial``, the
    kind of placement whose redistribution is its own business.)

    Attributes:
        placement: The placement of the other tensor, with its dimensions in memory order where the codes are in it.
    """

    placement: Placement

    def __init__(self, placement: Placement) -> None:
        super().__init__("lomem_codes")
        object.__setattr__(self, "placement", placement)

    def _moved(self, *args: Any) -> Any:
        raise RuntimeError(
            f"lomem: codes of a tensor with placement {self.placement!r} got a redistribution, expected none: each "
            "rank has the codes of its own shard, in the order of its elements in memory"
        )

    _reduce_value: Any = _moved
    _reduce_shard_value: Any = _moved
    _partition_value: Any = _moved

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodesOf) and self.placement == other.placement

    def __hash__(self) -> int:
        return hash((CodesOf, self.placement))

    def __repr__(self) -> str:
        return f"CodesOf({self.placement!r})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return CodesOf, (self.placement,)


def is_sharded(placement: Placement) -> bool:
    """Whether each rank has a part of the elements: ``Shard``, and torch's private one of FSDP with TP."""
    return isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard"


def _with_dim(placement: Placement, dims: Sequence[int]) -> Placement:
    """A placement of shards on another dimension, ``dims`` of the old one."""
    dim = dims[placement.dim]  # type: ignore[attr-defined]
    if isinstance(placement, Shard):
        return Shard(dim)
    return type(placement)(dim, split_factor=placement.split_factor)  # type: ignore[call-arg,attr-defined]


def placements_of_codes(layout: Layout, order: Sequence[int]) -> Layout:
    """Placements of codes of a tensor, in the order of its dimensions that is given."""
    places = [order.index(dim) for dim in range(len(order))]
    return tuple(CodesOf(_with_dim(p, places)) if is_sharded(p) else Replicate() for p in layout)


def placements_of_coded(layout: Layout, order: Sequence[int] | None = None) -> Layout:
    """The inverse: placements of the tensor that codes are of. In the order of its codes if no order is given."""
    found = tuple(p.placement if isinstance(p, CodesOf) else Replicate() for p in layout)
    return found if order is None else tuple(_with_dim(p, order) if is_sharded(p) else p for p in found)


def as_distributed(op: str, tensors: Mapping[str, Tensor | None]) -> dict[str, DTensor | None]:
    """The tensor arguments of an op, of which one is a DTensor, after checking that all are, on the same mesh.

    Inside of ``torch.distributed.tensor.experimental.implicit_replication``, others are replicas, as for torch's ops.
    """
    first = next(name for name, t in tensors.items() if isinstance(t, DTensor))
    mesh = tensors[first].device_mesh  # type: ignore[union-attr]
    implicit = getattr(DTensor._op_dispatcher, "_allow_implicit_replication", False)
    result: dict[str, DTensor | None] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
            if not implicit:
                raise RuntimeError(
                    f"{op}: {name} is a torch.Tensor and {first} a DTensor, expected DTensors alone "
                    "(torch.distributed.tensor.distribute_module and distribute_tensor make them)"
                )
            tensor = DTensor.from_local(tensor, mesh, (Replicate(),) * mesh.ndim, run_check=False)
        if tensor is not None and tensor.device_mesh != mesh:
            raise RuntimeError(f"{op}: {name} is on {tensor.device_mesh}, expected {mesh}, the mesh of {first}")
        result[name] = tensor
    return result


def moved(tensor: DTensor, layout: Layout) -> Tensor:
    """The local tensor of a rank, after redistribution if the placements differ."""
    if tensor.placements != layout:
        tensor = tensor.redistribute(tensor.device_mesh, layout)
    return tensor.to_local()


# Memory order --------------------------------------------------------------------------------------------------------


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor in row-major order."""
    return dense_strides(shape, range(len(shape), 0, -1))


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in memory in the order of these strides."""
    result, step = [0] * len(shape), 1
    for dim in reversed(_descending(strides)):
        result[dim] = step
        step *= max(shape[dim], 1)
    return tuple(result)


def _descending(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The order of dimensions in which a dense tensor is row-major, as cpp/src/activations/order.h has it."""
    step, contiguous = 1, True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        contiguous &= size == 1 or stride == step
        step *= size
    return list(range(len(shape))) if contiguous or math.prod(shape) == 0 else _descending(strides)


def in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor itself if it is dense in a memory order, otherwise a copy that is."""
    ordered = tensor.permute(*order)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute(*(order.index(dim) for dim in range(len(order))))


# Random numbers ------------------------------------------------------------------------------------------------------


def number_of_shard(mesh: DeviceMesh, layout: Layout) -> int:
    """The number of this rank's shard: replicas have the same one."""
    number = 0
    for dim, placement in enumerate(layout):
        if is_sharded(placement):
            number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


#: Added to a seed once for each shard: 2^64 divided by the golden ratio, so that no two shards of tensors with
#: neighbouring seeds meet (Steele et al., "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = 0x9E3779B97F4A7C15


def seed_of_shard(seed: Tensor, mesh: DeviceMesh, layout: Layout) -> Tensor:
    """The seed from which a rank draws: different ones for shards, the same for replicas."""
    number = number_of_shard(mesh, layout)
    if number == 0:
        return seed
    shift = (number * _GOLDEN + 2**63) % 2**64 - 2**63  # as int64
    return seed + shift
