"""Models of any size without their memory, and what a training step of theirs would hold."""

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
    """Builds a model that has shapes and no data, for the block: whatever its size, it takes no memory.

    ``build_fn`` runs under ``torch.device("meta")``; then parameters and buffers become fake tensors on the CPU. Tied
    parameters stay tied. Inside the block all tensors that are made are fake, so that the model can be run; but
    integers and bools, up to a million, are real: models look at token ids and masks.

    Example:
        >>> with lomem.memory.fake(lambda: transformers.LlamaForCausalLM(config)) as model:
        ...     model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.shape

    Args:
        build_fn: Builds the model. Loading weights is needless.
    """
    with _fake("lomem.memory.fake", build_fn, "cpu") as (model, _):
        yield model


@contextlib.contextmanager
def _fake(function: str, build_fn: Callable[[], nn.Module], device: str) -> Iterator[tuple[nn.Module, _Faker]]:
    if isinstance(build_fn, nn.Module) or not callable(build_fn):
        raise TypeError(
            f"{function}: build_fn is of type {type(build_fn).__name__}, expected a function that builds a model"
        )
    # Tensors of the caller's, such as the targets in his loss function, may be real.
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
    except RuntimeError as error:  # of an op that has no meta kernel, or takes no tensors of two devices
        raise RuntimeError(
            f'{function}: build_fn does not run under torch.device("meta") ({first_sentence(error)}): measure a small '
            "real model with lomem.memory.step_peak"
        ) from error


@contextlib.contextmanager
def _faked(function: str, model: nn.Module) -> Iterator[_Faker]:
    """Puts fake tensors in place of a model's, for the block: build_fn may have returned a model that is there."""
    faker = _Faker(function)
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                for name, value in script_attributes(module).items():
                    if isinstance(value, Tensor):
                        stack.callback(module._c.setattr, name, value)
                        module._c.setattr(name, faker(value))
                continue
            # Not only parameters and buffers: some keep a tensor as a plain attribute.
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for tensors in tables:
                for name, value in tensors.items():
                    if isinstance(value, Tensor):
                        stack.callback(tensors.__setitem__, name, value)
                        tensors[name] = faker(value)
        yield faker


class _Faker:
    """Makes fake tensors on the CPU of others, under a fake mode: one of one, and one storage of one storage."""

    def __init__(self, function: str) -> None:
        self._function = function
        # The keys are kept: an address is another tensor's soon after.
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
                f"{self._function}: a {type(tensor).__name__} of layout {kind} cannot be made fake, expected torch's "
                "own strided tensors: measure a small real model with lomem.memory.step_peak"
            )
        (storage,) = storages_of(tensor)
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage, self._bytes(tensor, storage)
        base = self._storages[storage._cdata][1]
        return base.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _bytes(self, tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
        if tensor.device.type == "meta" or not is_looked_at(tensor):
            # Of integers made on the meta device (positions) nothing is known; 0 is a valid index, whatever of.
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
    """Says what a training step of a model of any size would hold, without its memory and without a GPU.

    The model is built as by :func:`fake`, and measured as by :func:`step_peak`. With ``device="cpu"`` the result is, to
    the byte, that of the real model on the CPU. With ``device="cuda"`` ops keep what they keep on a GPU, where it
    differs: dropout a mask of one byte an element; scaled dot product attention, fused, its inputs, its output and one
    float a row; under autocast, norms, softmax and losses their float32 inputs; optimizers run over all parameters at
    once (``foreach``). Not in it: workspaces inside ops and the allocator's rounding, 0 to 8 % of the peak.

    A fake tensor has no values, and a model that looks at them cannot be estimated. It may look at integers and bools
    (token ids, masks) that come from a real batch: whether transformers makes an attention mask depends on whether the
    padding mask has zeros. What a real op would refuse (dtypes that differ) a fake one may let pass.

    Example:
        >>> print(lomem.memory.estimate(build, {"input_ids": torch.zeros(4, 512, dtype=torch.long)}, torch.optim.AdamW))

    Args:
        build_fn: Builds the model; runs under ``torch.device("meta")``.
        batch: As of :func:`step_peak`, of real or meta tensors; or a function that makes it, which runs with fake
            tensors.
        optimizer: A function of the list of trainable parameters, such as a class of torch.optim.
        loss: As of :func:`lomem.memory.profile`.
        device: ``"cuda"`` or ``"cpu"``.
        autocast: Dtype under which the forward pass runs; by default that of the autocast block around.
        transform: Changes the model before it is measured; may return another.
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
