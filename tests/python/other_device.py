"""A device that torch does not know, for tests: its memory is the CPU's, and its kernels are those of the CPU.

Importing this module registers the device for the rest of the process, as torch's `PrivateUse1` backend, so tests that
use it run in a process of their own (test_other_devices.py).

With the environment variable `LOMEM_NO_FLOAT64`, the device has no float64, like MPS.
"""

import os

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "lab"
NO_FLOAT64 = bool(os.environ.get("LOMEM_NO_FLOAT64"))


class _Module(_DummyBackendModule):
    """`torch.lab`: what torch asks of a device's module. Random numbers are the CPU's."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def manual_seed(self, seed):
        torch.default_generator.manual_seed(seed)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
#: What is allocated stays: a storage at an address does not own it.
_memory = []
#: Names of the ops that ran on the device.
calls = set()


def _storage(nbytes):
    _memory.append(torch.empty(max(nbytes, 1), dtype=torch.uint8))
    return torch._C._construct_storage_from_data_pointer(_memory[-1].data_ptr(), DEVICE, nbytes)


def _set(tensor, storage, offset, size, stride):
    return torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, storage, offset, size, stride)


def _tensor(storage, dtype, offset, size, stride):
    return _set(torch._C._acc.create_empty_tensor((0,), dtype), storage, offset, list(size), list(stride))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    dtype = dtype or torch.get_default_dtype()
    if NO_FLOAT64 and dtype == torch.float64:
        raise TypeError(f"{NAME} has no float64")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
    return _tensor(_storage((last + 1) * dtype.itemsize), dtype, 0, size, stride)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    like = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    return _empty_strided(size, like.stride(), dtype)


def on_cpu(tensor):
    """The CPU's tensor with the same memory, and others as they are."""
    if tensor.device.type != NAME:
        return tensor
    if tensor.numel() == 0:  # an op may resize it
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    storage = tensor.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    with torch.no_grad():
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(same, tensor.storage_offset(), tensor.shape, tensor.stride())


def _on_device(tensor):
    # (A scalar that was wrapped, or a result that was an operand of the CPU.)
    result = _empty_strided(tensor.shape, tensor.stride(), tensor.dtype)
    on_cpu(result).copy_(tensor)
    return result


def _run(op, *args, **kwargs):
    """Every op of torch: the CPU's, on the same memory."""
    calls.add(op._schema.name)
    schema = op._schema
    given = {**dict(zip([argument.name for argument in schema.arguments], args, strict=False)), **kwargs}
    if "device" in given:
        given["device"] = torch.device("cpu")
    moved = {name: tree_map_only(torch.Tensor, on_cpu, value) for name, value in given.items()}
    for argument in schema.arguments:  # torch passes wrapped numbers as numbers
        value = moved.get(argument.name)
        if isinstance(value, (int, float)) and argument.type.kind() == "TensorType":
            kind = torch.float64 if isinstance(value, float) else None
            moved[argument.name] = torch.tensor(value, dtype=kind)
    results = op(**moved)
    written = {}
    for argument in schema.arguments:
        before, after = given.get(argument.name), moved.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(before, torch.Tensor):
            continue
        written[id(after)] = before
        if after.shape != before.shape:  # resized
            copy = _on_device(after)
            _set(before, copy.untyped_storage(), 0, list(after.shape), list(after.stride()))
    first = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)

    def back(result):
        if id(result) in written:
            return written[id(result)]
        source = on_cpu(first) if first is not None and first.device.type == NAME else None
        if source is not None and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            storage = first.untyped_storage()
            return _tensor(storage, result.dtype, result.storage_offset(), result.shape, result.stride())
        return _on_device(result)

    return tree_map_only(torch.Tensor, back, results)


def _copy(self, source, non_blocking=False):
    on_cpu(self).copy_(on_cpu(source))
    return self


def _as_strided(self, size, stride, storage_offset=None):
    return torch.ops.aten.as_strided.default.redispatch(_CPU, self, size, stride, storage_offset)


def _zero(self):
    on_cpu(self).zero_()
    return self


_aten = torch.library.Library("aten", "IMPL")
for _name, _function in {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "copy_": _copy,
    "as_strided": _as_strided,
    # (Below a torch_dispatch mode, where lomem makes a counter of seeds, torch finds no fallback in Python.)
    "zero_": _zero,
}.items():
    _aten.impl(_name, _function, "PrivateUse1")
_all = torch.library.Library("_", "IMPL")
_all.fallback(_run, "PrivateUse1")
_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
