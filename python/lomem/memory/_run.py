"""Runs a forward pass and its loss, for all measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .._trace.autocast import autocast_dtype, autocast_to
from .._trace.batch import Batch
from .._trace.recorder import Recorder

#: Function that computes a scalar from a model's output.
Loss: TypeAlias = Callable[[Any], Tensor]

#: Labels of the storages that exist before a step.
PARAMETER, BUFFER, INPUT = "parameter", "buffer", "input"


def check_model(function: str, model: Any) -> None:
    """Raises if ``model`` is not a module that can be run."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is of type {type(model).__name__}, expected a torch.nn.Module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{function}: {name} of model has no shape yet, expected a model that has run once")


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Run:
    """A model with its arguments and its loss.

    Args:
        function: Name of the public function, for errors.
        model: The model to run.
        batch: Its arguments.
        loss: Function that computes a scalar from its output.
        autocast: Autocast dtype of the forward pass; by default that of the surrounding block.

    Attributes:
        inputs: The tensors among the arguments, detached from any graph.
        device: Device of the model's first parameter, otherwise of its first input.
        autocast: Autocast dtype, None without autocast.
    """

    def __init__(
        self,
        function: str,
        model: nn.Module,
        batch: Batch,
        loss: Loss | None,
        autocast: torch.dtype | None = None,
    ) -> None:
        check_model(function, model)
        if loss is not None and not callable(loss):
            raise TypeError(f"{function}: loss is of type {type(loss).__name__}, expected a callable of the output")
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"{function}: autocast is {autocast!r}, expected a torch.dtype such as torch.bfloat16")
        self.function, self.model, self._loss = function, model, loss
        # New leaves: a backward pass must not enter the user's graph, nor leave gradients in the user's tensors.
        self._batch = batch.map(_leaf)
        self.inputs = self._batch.tensors()
        first = next(iter([*model.parameters(), *self.inputs]), None)
        self.device = torch.device("cpu") if first is None else first.device
        kind = self.device.type
        ambient = autocast_dtype(kind)
        if autocast is not None and not torch.amp.is_autocast_available(kind):
            raise ValueError(f"{function}: autocast is {autocast}, but the device {kind} has none, expected None")
        self.autocast = ambient if autocast is None else autocast

    def forward(self) -> Tensor:
        """Returns the loss. The output is dropped, as by ``loss = model(**batch).loss``."""
        # autocast frees its cache of weight copies at the end of the outermost block, which may be the user's, long
        # after the forward pass. And a copy made earlier would not be seen here.
        torch.clear_autocast_cache()
        fake = self.fake_mode() is not None
        try:
            with self._autocast(self.autocast), translated(self.function, fake):
                output = self._batch.call(self.model)
                loss = self._default_loss(output) if self._loss is None else self._loss(output)
        finally:
            torch.clear_autocast_cache()
        if not isinstance(loss, Tensor):
            raise TypeError(f"{self.function}: loss returned a {type(loss).__name__}, expected a tensor of one element")
        if loss.numel() != 1:
            raise ValueError(
                f"{self.function}: loss returned a tensor of shape {tuple(loss.shape)}, expected one element"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"{self.function}: the loss needs no gradients, expected one that a parameter or input with "
                "requires_grad=True goes into"
            )
        return loss

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass, always without autocast."""
        with self._autocast(None), translated(self.function, self.fake_mode() is not None):
            loss.backward()

    def label(self, recorder: Recorder) -> None:
        """Labels the storages that exist before the forward pass."""
        recorder.label(self.model.parameters(), PARAMETER)
        recorder.label(self.model.buffers(), BUFFER)
        recorder.label(self.inputs, INPUT)

    def fake_mode(self) -> FakeTensorMode | None:
        """The fake mode of a fake model, otherwise None."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.inputs]
        return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)

    def _autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        return autocast_to(self.device.type, dtype)

    def _default_loss(self, output: Any) -> Tensor:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        if isinstance(output, Mapping):
            output = dict(output)
        sums = [_sum(t) for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
        if not sums:
            raise ValueError(
                f"{self.function}: the output, of type {type(output).__name__}, has no floating-point tensor that "
                "needs gradients, expected one, or a function of the output as loss"
            )
        return torch.stack([s.to(sums[0]) for s in sums]).sum() if len(sums) > 1 else sums[0]


def _sum(tensor: Tensor) -> Tensor:
    # torch cannot sum strided nested tensors or opaque ones.
    if tensor.is_nested and tensor.layout == torch.strided:
        return torch.stack([t.sum() for t in tensor.unbind()]).sum()
    return (tensor.to_dense() if tensor.is_mkldnn else tensor).sum()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


_INSTEAD = "measure a small real model with lomem.memory.step_peak"


@contextlib.contextmanager
def translated(function: str, fake: bool = True) -> Iterator[None]:
    """Replaces errors of torch under a measurement by one-sentence messages.

    Args:
        function: Name of the public function.
        fake: Whether the model may be fake.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise RuntimeError(
            f"{function}: the model calls {error.func}, which depends on the values of a tensor, and a fake one has "
            f"only a shape: {_INSTEAD}"
        ) from error
    except UnsupportedOperatorException as error:
        raise RuntimeError(
            f"{function}: the model calls {error.func}, which has no kernel for fake tensors: {_INSTEAD}"
        ) from error
    except RuntimeError as error:
        if refuses_hooks(error):
            raise RuntimeError(no_hooks(function)) from error
        if fake and isinstance(error, NotImplementedError):
            raise RuntimeError(
                f"{function}: the model does not run with fake tensors ({first_sentence(error)}): {_INSTEAD}"
            ) from error
        raise
    except AssertionError as error:
        # Raised for a jagged tensor made of fake ones.
        if fake and "shape_env" in str(error):
            raise RuntimeError(
                f"{function}: the model makes tensors whose sizes are unknown with fake tensors: {_INSTEAD}"
            ) from error
        raise


def refuses_hooks(error: BaseException | None) -> bool:
    """Whether torch raised the error because a function transform does not support saved-tensor hooks."""
    return isinstance(error, RuntimeError) and "don't yet support saved tensor hooks" in str(error)


def no_hooks(function: str) -> str:
    """The error message for a model in which torch does not support saved-tensor hooks."""
    return (
        f"{function}: the model calls torch.func.grad, vjp, jacrev or hessian, inside which torch does not report "
        "what is saved, expected a model without them"
    )


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error message of torch, which may have many lines."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
