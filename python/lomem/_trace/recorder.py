"""Records what a model does while it runs: its ops, the storages they make, and which of them autograd saves.

:mod:`lomem.memory` and :mod:`lomem.conversion` are built on these records.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .hooks import ModulePath, SavedTensorsBlock

__all__ = [
    "Op",
    "Recorder",
    "Saved",
    "Storage",
    "inner_tensors",
    "storages_of",
]


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages that hold a tensor's data.

    A strided tensor has one, a sparse one several, a wrapper (vmap, jagged tensors) those of the tensors inside it, and
    an opaque tensor or a lazy parameter none.
    """
    return [part.untyped_storage() for part in _parts(tensor)]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that own the storages."""
    if functorch.is_functorch_wrapped_tensor(tensor):
        return _parts(functorch.get_unwrapped(tensor))
    if type(tensor) in _PLAIN:
        inside = []
    elif is_lazy(tensor):
        return []
    else:
        inside = inner_tensors(tensor)
    if inside:
        return [part for t in inside for part in _parts(t)]
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


#: The most common tensor types, none of which wraps other tensors.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors inside a wrapper subclass; none for a tensor with its own data."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [part for part in parts if isinstance(part, Tensor)]  # not a device mesh
    if isinstance(tensor, FakeTensor) or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return []
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # the storage of a wrapper has a size but no data
        # A wrapper without __tensor_flatten__: the wrapped tensors are among its attributes.
        return [value for value in vars(tensor).values() if isinstance(value, Tensor)]
    return []


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_nested or is_lazy(tensor) else tuple(tensor.shape)


@dataclass(eq=False)
class Storage:
    """Record of a storage, which outlives the storage.

    Attributes:
        nbytes: Size of the storage.
        born: Index of the op that made it, -1 if it existed before.
        died: Number of ops recorded when it was freed; None while it is alive.
        dtype: Dtype of the tensor by which it was first seen.
        shape: Shape of that tensor.
        copy_of: The storage that it was converted from, if a dtype conversion made it.
        label: Label given by the user of the recorder (``"parameter"`` and the like).
    """

    nbytes: int
    born: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    died: int | None = None
    copy_of: Storage | None = None
    label: str | None = None


@dataclass(eq=False)
class Op:
    """One call of an aten or other dispatcher op that is not a view.

    Attributes:
        func: The overload.
        module: Module in which it ran, see :attr:`ModulePath.path`; None outside the model, as during backward.
        node: Name of the running autograd node, during backward.
        inputs: Storages of its tensor arguments, in order, without repetition.
        written: Those that it changed in place.
        outputs: Storages of its results.
    """

    func: torch._ops.OpOverload
    module: str | None
    node: str | None
    inputs: tuple[Storage, ...]
    written: tuple[Storage, ...]
    outputs: tuple[Storage, ...]


@dataclass(eq=False)
class Saved:
    """One tensor that autograd saved.

    Attributes:
        storage: Storage of the tensor.
        module: Module in which it was saved.
        op: Number of ops recorded before it. An op that saves an input is the next one, one that saves its output the
            last one.
        dtype: Dtype of the tensor.
        shape: Shape of the tensor.
    """

    storage: Storage
    module: str | None
    op: int
    dtype: torch.dtype
    shape: tuple[int, ...]


_DEVICE = torch.ops.prim.device.default


@functools.cache
def _written_arguments(func: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@dataclass(eq=False)
class _Live:
    # A storage that is alive: its record, and a weak reference that reports when it is freed. This must be known, since
    # its address may then be reused.
    record: Storage
    # Not weakref.finalize, which for a parameter would stay registered as long as the parameter exists.
    end: weakref.ref[torch.UntypedStorage] = field(repr=False)


class Recorder(TorchDispatchMode):
    """Context manager that records the ops, storages and saved tensors of the code inside it.

    It keeps no tensor alive. Views are attributed to the storage that they share. Works on real and fake tensors, in
    forward and backward passes and in optimizers.

    Args:
        model: Model whose module names are recorded; None for none.

    Attributes:
        ops: Ops, in order.
        storages: Storages, in the order in which they were first seen.
        saved: Tensors that autograd saved, in order, with repetitions.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.storages: list[Storage] = []
        self.saved: list[Saved] = []
        self._live: dict[int, _Live] = {}
        self._path = ModulePath(model) if model is not None else None

    def __enter__(self) -> Recorder:
        if self._path is not None:
            self._path.__enter__()
        self._block = SavedTensorsBlock(self._save)
        self._block.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._block.__exit__(kind, error, traceback)
        del self._block  # it refers to this object: a cycle would wait for the garbage collector
        if self._path is not None:
            self._path.__exit__(kind, error, traceback)

    @property
    def module(self) -> str | None:
        """The module that is running."""
        return self._path.path if self._path is not None else None

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Labels the storages of tensors that have no label yet."""
        for tensor in tensors:
            for storage in self.records(tensor):
                storage.label = storage.label or label

    def records(self, tensor: Tensor, born: int = -1) -> list[Storage]:
        """The records of a tensor's storages, created if needed."""
        return [self._record(storage, tensor, born) for storage in storages_of(tensor)]

    def living(self) -> Iterator[Storage]:
        """The storages that are alive."""
        return (live.record for live in self._live.values())

    def _record(self, storage: torch.UntypedStorage, tensor: Tensor, born: int) -> Storage:
        # The address of the storage object, since that of its data is 0 for fake and meta tensors.
        key = storage._cdata
        live = self._live.get(key)
        if live is not None:
            return live.record
        record = Storage(storage.nbytes(), born, tensor.dtype, _shape(tensor))
        self.storages.append(record)
        self._live[key] = _Live(record, weakref.ref(storage, functools.partial(self._forget, weakref.ref(self), key)))
        return record

    @staticmethod
    def _forget(recorder: weakref.ref[Recorder], key: int, storage: weakref.ref[torch.UntypedStorage]) -> None:
        self = recorder()
        if self is not None:
            self._live.pop(key).record.died = len(self.ops)

    def _save(self, tensor: Tensor) -> None:
        for storage in self.records(tensor):  # a storage first seen here is an input of the next op
            self.saved.append(Saved(storage, self.module, len(self.ops), tensor.dtype, _shape(tensor)))

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            # A query, not an op. It is frequent for fake tensors, which know the answer.
            return getattr(args[0], "fake_device", None) or func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            # torch.tensor() makes its result without an op, and returns it through this one.
            result = func(*args, **kwargs)
            self.ops.append(Op(func, self.module, None, (), (), tuple(self._all([result], born=len(self.ops)))))
            return result
        inputs = self._all(tree_leaves((args, kwargs)))
        written = []
        for index, name in _written_arguments(func):
            value = args[index] if index < len(args) else kwargs.get(name)
            written += self._all(tree_leaves(value))
        result = func(*args, **kwargs)
        index = len(self.ops)
        outputs = self._all(tree_leaves(result), born=index)
        if func.is_view and not written:
            return result
        if func is torch.ops.aten._to_copy.default and inputs:
            for output in outputs:
                if output.born == index and output.dtype != inputs[0].dtype:
                    output.copy_of = inputs[0]
        node = torch._C._current_autograd_node()
        name = None if node is None else node.name()
        self.ops.append(Op(func, self.module, name, tuple(inputs), tuple(written), tuple(outputs)))
        return result

    def _all(self, leaves: Iterable[Any], born: int = -1) -> list[Storage]:
        found = (record for leaf in leaves if isinstance(leaf, Tensor) for record in self.records(leaf, born))
        return list(dict.fromkeys(found))
