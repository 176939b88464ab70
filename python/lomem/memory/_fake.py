"""Builds models of any size without allocating them, and estimates the memory of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from .._trace.recorder import inner_tensors, storages_of
from .._trace.state import script_attributes
from ._devices import CudaLike, FakeDevice, is_looked_at
from ._peak import StepPeak, measure_step
from ._run import Loss, check_model, first_sentence, translated

__all__ = ["estimate", "fake"]


@contextlib.contextmanager
def fake(build_fn: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Builds a model that has shapes but no data for the block, so that it takes no memory, whatever its size.

    ``build_fn`` runs under ``torch.device("meta")``; then parameters and buffers become fake tensors on the CPU. Tied
    parameters stay tied. All tensors created inside the block are fake, so that the model can be run, except for
    integer and bool tensors of up to a million elements: models read token ids and masks.

    Example:
        >>> with lomem.memory.fake(lambda: transformers.LlamaForCausalLM(config)) as model:
        ...     model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.shape

    Args:
        build_fn: Function that builds the model. It need not load weights.
    """
    with _fake("lomem.memory.fake", build_fn, "cpu") as (model, _):
        yield model


@contextlib.contextmanager
def _fake(function: str, build_fn: Callable[[], nn.Module], device: str) -> Iterator[tuple[nn.Module, _Faker]]:
    if isinstance(build_fn, nn.Module) or not callable(build_fn):
        raise TypeError(
            f"{function}: build_fn is of type {type(build_fn).__name__}, expected a function that builds a model"
        )
    # The user's tensors, such as targets in a loss function, may be real.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]):
        model = _built(function, build_fn)
        check_model(function, model)
        with mode, FakeDevice(mode, device), _faked(function, model) as faker:
            yield model, faker


def _built(function: str, build_fn: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_fn()
    except RuntimeError as error:  # an op has no meta kernel, or cannot mix devices
        raise RuntimeError(
            f'{function}: build_fn does not run under torch.device("meta") ({first_sentence(error)}): measure a small '
            "real model with lomem.memory.step_peak"
        ) from error


@contextlib.contextmanager
def _faked(function: str, model: nn.Module) -> Iterator[_Faker]:
    """Replaces a model's tensors by fake ones for the block. build_fn may have returned an existing model."""
    faker = _Faker(function)
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                for name, value in script_attributes(module).items():
                    if isinstance(value, Tensor):
                        stack.callback(module._c.setattr, name, value)
                        module._c.setattr(name, faker(value))
                continue
            # Some modules hold tensors as plain attributes too.
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for tensors in tables:
                for name, value in tensors.items():
                    if isinstance(value, Tensor):
                        stack.callback(tensors.__setitem__, name, value)
                        tensors[name] = faker(value)
        yield faker


class _Faker:
    """Maps tensors to fake ones on the CPU, under a fake mode: one per tensor, with one storage per storage."""

    def __init__(self, function: str) -> None:
        self._function = function
        # The keys stay alive, since an address may be reused.
        self._tensors: dict[Tensor, Tensor] = {}
        self._storages: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor not in self._tensors:
            result = self._make(tensor)
            if isinstance(tensor, nn.Parameter):
                result = nn.Parameter(result, requires_grad=tensor.requires_grad)
            self._tensors[tensor] = result.requires_grad_(tensor.requires_grad)
        return self._tensors[tensor]

    def _make(self, tensor: Tensor) -> Tensor:
        if is_traceable_wrapper_subclass(tensor) and not tensor.is_nested:
            names, context = tensor.__tensor_flatten__()
            inside = {name: self(getattr(tensor, name)) for name in names}
            return type(tensor).__tensor_unflatten__(inside, context, tensor.size(), tensor.stride())
        if tensor.layout != torch.strided or tensor.is_nested or inner_tensors(tensor):
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise ValueError(
                f"{self._function}: a {type(tensor).__name__} of layout {kind} cannot be made fake, expected plain "
                "strided tensors: measure a small real model with lomem.memory.step_peak"
            )
        (storage,) = storages_of(tensor)
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage, self._bytes(tensor, storage)
        base = self._storages[storage._cdata][1]
        return base.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _bytes(self, tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
        if tensor.device.type == "meta" or not is_looked_at(tensor):
            # Integers made on the meta device (positions) have no known values; 0 is a valid index into anything.
            return torch.zeros(storage.nbytes(), dtype=torch.uint8, device="cpu")
        with _disable_current_modes():
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            return whole.to("cpu", copy=True).view(torch.uint8)  # a copy: the model may write to it


def estimate(
    build_fn: Callable[[], nn.Module],
    batch: Any,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    *,
    loss: Loss | None = None,
    device: str = "cuda",
    autocast: torch.dtype | None = None,
    transform: Callable[[nn.Module], Any] | None = None,
) -> StepPeak:
    """Estimates the memory of a training step for a model of any size, without allocating the model and without a GPU.

    The model is built as by :func:`fake`, and measured as by :func:`step_peak`. With ``device="cpu"`` the result is
    exact to the byte for the real model on the CPU. With ``device="cuda"`` ops save what they save on a GPU: dropout a
    mask of one byte per element; fused scaled dot product attention its inputs, its output and one float per row;
    norms, softmax and losses under autocast their float32 inputs. Optimizers run over all parameters at once
    (``foreach``). The estimate leaves out workspaces inside ops and the allocator's rounding, 0 to 8 % of the peak.

    Fake tensors have no values, so a model that reads them cannot be estimated. It may read integers and bools (token
    ids, masks) from a real batch: whether transformers makes an attention mask depends on whether the padding mask has
    zeros. Fake ops may accept what real ones reject, such as mixed dtypes.

    Example:
        >>> print(lomem.memory.estimate(build, {"input_ids": torch.zeros(4, 512, dtype=torch.long)}, torch.optim.AdamW))

    Args:
        build_fn: Function that builds the model; runs under ``torch.device("meta")``.
        batch: Batch of real or meta tensors, as for :func:`step_peak`; or a function that returns one, run with fake
            tensors.
        optimizer: Function of the list of trainable parameters, such as a class from torch.optim.
        loss: Loss function, as for :func:`lomem.memory.profile`.
        device: ``"cuda"`` or ``"cpu"``.
        autocast: Autocast dtype of the forward pass; by default that of the surrounding autocast block.
        transform: Function that changes the model before it is measured; may return another model.
    """
    function = "lomem.memory.estimate"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"{function}: device is {device!r}, expected 'cuda' or 'cpu'")
    for name, value in (("optimizer", optimizer), ("transform", transform)):
        if value is not None and not callable(value):
            raise TypeError(f"{function}: {name} is of type {type(value).__name__}, expected a function")
    if autocast is None and torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
    with contextlib.ExitStack() as stack:
        model, faker = stack.enter_context(_fake(function, build_fn, device))
        stack.enter_context(translated(function))
        if transform is not None:
            changed = transform(model)
            model = changed if isinstance(changed, nn.Module) else model
        batch = batch() if callable(batch) else batch
        batch = tree_map_only(Tensor, faker, dict(batch) if hasattr(batch, "keys") else batch)
        made = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer is not None else None
        if made is not None and device == "cuda" and isinstance(made, Optimizer):
            _use_foreach(made)
        if device == "cuda":
            stack.enter_context(CudaLike())
        report = measure_step(function, model, batch, made, loss, 2, autocast)
    report.device = device
    return report


def _use_foreach(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
