"""Compares the gradients of a converted model with those of the original one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._trace.batch import Batch
from .._trace.float64 import has_float64
from .._trace.state import preserved, seed
from .._units import size
from .flow import untouched

__all__ = [
    "EXPECTED",
    "ExactGradient",
    "GradientFidelity",
    "GradientWarning",
    "Sums",
    "default_loss",
    "layers_of",
    "undisturbed",
    "wrong_scalar",
]


class GradientWarning(UserWarning):
    """Warns that the gradient of a converted model is far from the exact one, see :func:`lomem.convert`."""


@dataclass(frozen=True)
class GradientFidelity:
    """Comparison of an approximate gradient with the exact one.

    Attributes:
        cosine: Cosine of the angle between the two.
        ratio: Norm of the approximate gradient, relative to that of the exact one.
        error: Norm of the difference, relative to the norm of the exact gradient.
        share: Norm of the exact gradient, relative to that of the whole model's. (Where it is rounding noise, as for a
            bias in front of a BatchNorm, the other figures mean nothing.)
    """

    cosine: float
    ratio: float
    error: float
    share: float = 1.0

    def __str__(self) -> str:
        return f"cosine {self.cosine:.3f}, {self.ratio:.3g} times the norm, relative error {self.error:.2g}"


class Sums:
    """Sums over the elements of an approximate gradient a and the exact one e, and what follows from them.

    All are in float64, over any number of elements in constant memory.

    Attributes:
        weight: Sum of the weights w.
        exact: Sum of ``w * e**2``.
        approximate: Sum of ``w * a**2``.
        product: Sum of ``w * a * e``.
        squared: Sum of ``w * (a - e)**2``.
        difference: Sum of ``w * (a - e)``.
    """

    def __init__(self) -> None:
        self.weight = self.exact = self.approximate = self.product = self.squared = self.difference = 0.0

    def add(self, approximate: Tensor, exact: Tensor, weights: Tensor | None = None) -> None:
        """Adds the elements of two tensors of one shape, on the device of the first."""
        device = approximate.device if has_float64(approximate.device) else torch.device("cpu")
        given = [approximate, exact] if weights is None else [approximate, exact, weights]
        for parts in zip(*(_flat(t).split(_PART) for t in given), strict=True):
            a, e, *w = (part.to(device, torch.float64) for part in parts)
            d = a - e
            wa, we, wd = (w[0] * t for t in (a, e, d)) if w else (a, e, d)
            weight = w[0].sum() if w else torch.tensor(float(e.numel()), dtype=torch.float64, device=device)
            sums = torch.stack([weight, we @ e, wa @ a, wa @ e, wd @ d, wd.sum()]).tolist()
            self._add(sums)

    def _add(self, sums: list[float]) -> None:
        self.weight, self.exact, self.approximate, self.product, self.squared, self.difference = (
            so_far + more for so_far, more in zip(self._values(), sums, strict=True)
        )

    def _values(self) -> list[float]:
        return [self.weight, self.exact, self.approximate, self.product, self.squared, self.difference]

    def merge(self, other: Sums) -> None:
        """Adds the sums over other elements."""
        self._add(other._values())

    def fidelity(self) -> GradientFidelity:
        """The comparison; all NaN if the exact gradient is 0."""
        if self.exact == 0:
            return GradientFidelity(float("nan"), float("nan"), float("nan"))
        return GradientFidelity(
            self.product / self.exact**0.5 / self.approximate**0.5 if self.approximate else 0.0,
            (self.approximate / self.exact) ** 0.5,
            (self.squared / self.exact) ** 0.5,
        )


#: Elements that are compared at a time.
_PART = 2**22


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()  # the gradient of an embedding with sparse=True
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def layers_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The trainable parameters, each with the name of the first module that holds it directly."""
    found: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                found.setdefault(parameter, name)
    return found


#: What a loss returns.
EXPECTED = "expected a tensor of one element that requires gradients"


def wrong_scalar(value: Any) -> str | None:
    """What the value that a loss returned is, if it is not what it should be: one element that requires gradients."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        return None
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def default_loss(output: Any) -> Tensor:
    """The loss of a model whose user gave none.

    The output's ``loss`` if it has one that requires gradients, the output itself if it is a scalar, and otherwise the
    sum of its floating-point tensors, each element times a normal random number. These numbers are always the same.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    for value in (own, output):
        if isinstance(value, Tensor) and wrong_scalar(value) is None:
            return value
    # On the CPU, so that all devices get the same numbers. Not of a seed that a program uses: a batch may be drawn from
    # it in the same way, and would be multiplied with itself.
    generator = torch.Generator().manual_seed(_SEED)
    tensors = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise _SkippedError("no output of the model requires a gradient")
    options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    products = [t.float() * torch.randn(t.shape, **options).to(t.device) for t in tensors]
    return torch.stack([product.sum().to(products[0].device) for product in products]).sum()


_SEED = 0x6C6F6D656D


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name))


class _SkippedError(Exception):
    """There is nothing to compare, for the reason that this says."""


class _LossError(Exception):
    """The user's loss returned something else than a scalar that requires gradients."""


class ExactGradient:
    """The gradient of the original model, to compare with that of the converted one.

    Args:
        model: The model, left unchanged. No hook of a parameter runs.
        inputs: Its arguments.
        loss: Maps its output to a scalar; None for :func:`default_loss`.

    Attributes:
        missing: Why there is none, as a clause; None if there is one.

    Raises:
        ValueError: If the loss returns something else than a scalar that requires gradients.
    """

    def __init__(self, model: nn.Module, inputs: Batch, loss: Callable[[Any], Tensor] | None) -> None:
        self._model, self._inputs, self._loss = model, inputs, loss
        self._gradients: list[Tensor | None] = []
        self.missing: str | None = None
        # Collected before the run, in which modules may exchange parameters.
        self._layers = layers_of(model)
        try:
            self._exact()
        except _LossError as error:
            raise ValueError(f"lomem.convert: {error}") from None
        except Exception as error:
            self.missing = _said(error)

    def _exact(self) -> None:
        if not self._layers:
            raise _SkippedError("no parameter is trained")
        if any(hasattr(parameter, "full_tensor") for parameter in self._layers):  # a DTensor
            raise _SkippedError("parameters are distributed over several devices")
        problem = _others(self._model) or _short_of_memory(list(self._layers))
        if problem is not None:
            raise _SkippedError(problem)
        gradients = self._run()
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                if not bool(_flat(gradient).isfinite().all()):
                    raise _SkippedError("the exact gradient is not finite")
                gradients[i] = gradient.to("cpu", copy=True)  # which may be a buffer that the next pass writes to
        self._gradients = gradients
        if all(g is None for g in gradients):
            raise _SkippedError("the loss depends on no parameter that is trained")

    def _run(self) -> list[Tensor | None]:
        """A training step without the optimizer: the gradients of the parameters, None for those without."""
        parameters = list(self._layers)
        # A batch may come from a graph, whose backward pass would run now.
        inputs = self._inputs.map(lambda t: t.detach().requires_grad_(t.requires_grad))
        with untouched(self._model, True, inputs), undisturbed(self._model, self._loss), torch.enable_grad():
            seed(self._model, inputs.tensors())  # the same dropout in both passes
            output = inputs.call(self._model)
            if self._loss is None:
                value = default_loss(output)
            else:
                value = self._loss(output)
                wrong = wrong_scalar(value)
                if wrong is not None:
                    raise _LossError(f"loss returned {wrong}, {EXPECTED}")
            del output
            # Not value.backward(), which would write to the parameters and run what waits for their gradients, such as
            # an optimizer.
            return [
                None if g is None else g.detach() for g in torch.autograd.grad(value, parameters, allow_unused=True)
            ]

    @property
    def layers(self) -> set[str]:
        """Names of the modules that hold trained parameters."""
        return set(self._layers.values())

    def compare(self) -> tuple[GradientFidelity, dict[str, GradientFidelity]] | str:
        """Compares it with the gradient of the model as it is now; once, for it is freed.

        Returns:
            The comparison of the whole gradient and of each layer's; a clause that says why there is none.
        """
        assert self.missing is None
        try:
            return self._compare(self._run())
        except Exception as error:
            return _said(error)
        finally:
            self._gradients = []

    def _compare(self, approximate: list[Tensor | None]) -> tuple[GradientFidelity, dict[str, GradientFidelity]]:
        sums: dict[str, Sums] = {}
        for i, layer in enumerate(self._layers.values()):
            a, e = approximate[i], self._gradients[i]
            approximate[i] = self._gradients[i] = None  # freed as soon as they are compared
            known = a if e is None else e
            if known is not None:
                zero = torch.zeros((), dtype=known.dtype, device=known.device).expand(known.shape)
                sums.setdefault(layer, Sums()).add(zero if a is None else a, zero if e is None else e)
        whole = Sums()
        for layer_sums in sums.values():
            whole.merge(layer_sums)
        if whole.exact == 0:
            raise _SkippedError("the exact gradient is 0")
        return whole.fidelity(), {
            name: dataclasses.replace(layer.fidelity(), share=(layer.exact / whole.exact) ** 0.5)
            for name, layer in sums.items()
            if layer.exact > 0
        }


def _said(error: Exception) -> str:
    if isinstance(error, _SkippedError | _LossError):
        return str(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:297]}..."


#: Where parameters and modules keep what runs in the backward pass. (torch.autograd.grad, too, runs the first ones.)
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def undisturbed(model: nn.Module, loss: Any) -> Iterator[None]:
    """Takes the hooks of the backward pass off, some of which are optimizers, and restores a loss that is a module."""
    holders = [*model.parameters(), *model.modules()]
    held = [(holder, name, getattr(holder, name)) for holder in holders for name in _HOOKS if hasattr(holder, name)]
    held = [(holder, name, hooks) for holder, name, hooks in held if hooks]
    with preserved(loss) if isinstance(loss, nn.Module) else contextlib.nullcontext():
        try:
            for holder, name, _ in held:
                setattr(holder, name, OrderedDict())
            yield
        finally:
            for holder, name, hooks in held:
                setattr(holder, name, hooks)


def _others(model: nn.Module) -> str | None:
    """A clause that says that the passes have effects elsewhere, or None."""
    if any(getattr(p, "main_grad", None) is not None for p in model.parameters()):
        return "parameters have a main_grad, to which a backward pass may add"
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # One process that skips the comparison, for whatever reason, would leave the others waiting.
        kinds = [nn.parallel.DistributedDataParallel, nn.SyncBatchNorm]
        if "torch.distributed.fsdp" in sys.modules:  # else no module is of this class
            kinds.append(sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel)
        for module in model.modules():
            if isinstance(module, tuple(kinds)):
                return f"{type(module).__name__} communicates with other processes"
    return None


def _short_of_memory(parameters: list[nn.Parameter]) -> str | None:
    """A clause that says which device lacks memory for the exact and the approximate gradient, or None."""
    needed: Counter[torch.device] = Counter()
    for parameter in parameters:
        # The exact gradient, the approximate one, and what the pass that makes it needs besides. (On an accelerator the
        # exact one is kept on the CPU, but may be there as well for a while.)
        needed[parameter.device] += 3 * parameter.nbytes
        if parameter.device.type != "cpu":
            needed[torch.device("cpu")] += parameter.nbytes
    for device, nbytes in needed.items():
        free = _available(device)
        if free is not None and nbytes > free:
            return f"this takes {size(nbytes)} of memory ({device}), of which {size(free)} are available"
    return None


def _available(device: torch.device) -> int | None:
    """Bytes of memory that are available on a device; None if that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has reserved, and not handed out, is available too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not on every system
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
