"""Records one run of a model: its module calls, and where their results go."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._trace.batch import Batch
from .._trace.handover import is_whole
from .._trace.hooks import hook_after, hook_before
from .._trace.keeps import COPIES
from .._trace.recorder import Op, Recorder, Storage
from .._trace.state import exclusive, preserved
from .cheap_ops import UNARY, Step, StepKind, as_step, is_small
from .modules import as_activation, is_transformed

__all__ = ["ActivationCall", "Call", "Flow", "StepCall", "modes", "runs", "trace", "untouched"]


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: Name of the module.
        start: Number of ops recorded before the call.
        shapes: Shapes of its tensor arguments.
        single: Whether one tensor is its only argument.
        end: Number of ops recorded when it returned.
        input_id: Identity of its first argument, comparable with `result_id` of calls in the same run.
        input: Storage of its first argument, if that is a tensor with one.
        result_id: Identity of its result.
        result: Storage of its result, if that is a single tensor.
        dtype: Dtype of the result.
        numel: Number of elements of the result.
        requires_grad: Whether the result requires a gradient.
        saved: Positions in the recorder's list of what autograd saved during the call, excluding the module's hooks.
        transformed: Whether it runs inside a function transform (vmap and the like).
    """

    name: str
    start: int
    shapes: list[tuple[int, ...]]
    single: bool
    end: int = -1
    input_id: int = 0
    input: Storage | None = None
    result_id: int = 0
    result: Storage | None = None
    dtype: torch.dtype | None = None
    numel: int = 0
    requires_grad: bool = False
    saved: range = range(0)
    transformed: bool = False


@dataclass(eq=False)
class ActivationCall:
    """One call of torch's GELU or SiLU.

    Attributes:
        replaced: Whether a converted module would replace it.
        module: Name of the innermost running module, None outside all modules.
        numel: Number of elements of the argument.
        ops: Positions of its ops.
        saved: Positions of what autograd saved during the call.
        inplace: Whether it writes to its argument.
        input: Storage of the argument, None if it has none of its own.
        result: Storage of the result.
        result_id: Identity of the result.
    """

    replaced: bool
    module: str | None
    numel: int
    ops: range
    saved: range
    inplace: bool
    input: Storage | None
    result: Storage | None
    result_id: int


@dataclass(eq=False)
class StepCall:
    """One call of a cheap op whose result may be rebuilt from what one of its operands is.

    Attributes:
        kind: Which op.
        module: Name of the innermost running module, None outside all modules.
        operand_id: Identity of that operand.
        operand: Storage of that operand.
        gated: Whether it is a product with a factor as large.
        squared: Whether another factor of a product shares its storage, which is saved for that.
        small: Bytes of its small operands, if the op does not save them itself; of a dropout, of a bit per element.
        result: Storage of the result.
        result_id: Identity of the result.
        end: Number of ops recorded when it returned.
        saved: Positions of what autograd saved during the call.
        whole: Whether the operand is all that its storage holds.
    """

    kind: StepKind
    module: str | None
    operand_id: int
    operand: Storage | None
    gated: bool
    squared: bool
    small: int
    result: Storage | None
    result_id: int
    end: int
    saved: range
    whole: bool


_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_CASTS = (Tensor.to, Tensor.type, Tensor.type_as, Tensor.double, Tensor.float, Tensor.bfloat16, Tensor.half)


def _names_dtype(func: Any, args: Any, kwargs: Any) -> bool:
    values = (*args[1:], *kwargs.values())
    return func is not Tensor.to or any(isinstance(value, torch.dtype | Tensor) for value in values)


def _address(tensor: Tensor) -> int | None:
    # The address of the storage object, which is the recorder's key.
    if tensor.layout != torch.strided or tensor.is_nested or torch._C._are_functorch_transforms_active():
        return None
    return tensor.untyped_storage()._cdata


class _Calls(TorchFunctionMode):
    """Records calls that the ops alone do not show.

    Attributes:
        results: Results of the watched modules, by the addresses of their storages.
        followed: Identities of tensors that may be rebuilt: results of modules that are no products, and of calls of
            activations, and what cheap ops make of them.
        kept: Tensors kept alive, so that no identity is reused.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.results: dict[int | None, Storage] = {}
        self.followed: set[int] = set()
        self.kept: list[Any] = []

    def _storage(self, tensor: Any) -> Storage | None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
            return None
        records = self.flow.recorder.records(tensor)
        return records[0] if len(records) == 1 else None

    def _follow(self, result: Tensor) -> int:
        self.kept.append(result)
        self.followed.add(id(result))
        return id(result)

    def _step(self, step: Step, result: Tensor, saved: range) -> None:
        for i, operand in enumerate(step.operands):
            # A copy of any tensor may be made again.
            followed = id(operand) in self.followed or step.kind in UNARY
            if followed and result is not operand and step.passes_on(i):
                self.kept.append(operand)
                others = [t for j, t in enumerate(step.operands) if j != i]
                gated = any(not is_small(t, operand) for t in others)
                summands = others if step.kind is StepKind.SUM else []
                small = sum(t.numel() * t.element_size() for t in summands)
                if step.kind is StepKind.DROPOUT:
                    small = (operand.numel() + 7) // 8
                storages = self._storage(operand), self._storage(result)
                recorder = self.flow.recorder
                factors = others if step.kind is StepKind.PRODUCT else []
                squared = storages[0] is not None and any(self._storage(t) is storages[0] for t in factors)
                of = step.kind, recorder.module, id(operand), storages[0], gated, squared, small, storages[1]
                self.flow.steps.append(StepCall(*of, self._follow(result), len(recorder.ops), saved, is_whole(operand)))
                return

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, recorder = kwargs or {}, self.flow.recorder
        if torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
            return func(*args, **kwargs)  # below autograd: called by a recorder, not by the model
        call = as_activation(func, args, kwargs)
        step = as_step(func, args, kwargs)
        module, op, saved = recorder.module, len(recorder.ops), len(recorder.saved)
        result = func(*args, **kwargs)
        if call is not None:
            ranges = range(op, len(recorder.ops)), range(saved, len(recorder.saved))
            storages = self._storage(call.input), self._storage(result)
            self.flow.activations.append(
                ActivationCall(
                    call.replaced, module, call.input.numel(), *ranges, call.inplace, *storages, self._follow(result)
                )
            )
        elif func == _DTYPE or (func in _CASTS and result is args[0] and _names_dtype(func, args, kwargs)):
            # Not through the recorder, which reads dtypes itself.
            address = _address(args[0])
            storage = None if address is None else self.results.get(address)
            if storage is not None:
                self.flow.asked.add((storage, module))
        # Where nothing is passed on, nothing is planned.
        if step is not None and step.makes(result) and torch.is_grad_enabled() and not is_transformed():
            self._step(step, result, range(saved, len(recorder.saved)))
        return result


@dataclass
class Flow:
    """One run of a model.

    Attributes:
        recorder: Its ops, storages and saved tensors.
        calls: Calls of the watched modules.
        activations: Calls of torch's GELU and SiLU that converted modules see; empty for runs without gradients.
        steps: Calls of casts and dropouts, and of other cheap ops on results that may be rebuilt; empty for runs
            without gradients.
        asked: Storages whose dtype a module read, or that it cast to their own dtype; empty for runs without gradients.
        escaped: Storages that outlive the run, in its output or stashed somewhere.
    """

    recorder: Recorder
    calls: list[Call] = field(default_factory=list)
    activations: list[ActivationCall] = field(default_factory=list)
    steps: list[StepCall] = field(default_factory=list)
    asked: set[tuple[Storage, str | None]] = field(default_factory=set)
    escaped: set[Storage] = field(default_factory=set)

    @property
    def differentiates(self) -> bool:
        """Whether the run includes a backward pass."""
        return any(op.node is not None for op in self.recorder.ops)

    def hide_nothing(self) -> None:
        """Treats all results as escaped, for when it is not known which are."""
        self.escaped.update(call.result for call in self.calls if call.result is not None)

    def calls_of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.name == name]

    def ops_inside(self, call: Call) -> list[Op]:
        """The ops that ran during a call."""
        return self.recorder.ops[call.start : call.end]

    def uses(self, storage: Storage, after: int) -> Iterator[tuple[Op, Storage]]:
        """Ops that take a storage or a copy of it in another dtype or order, each with the storage it takes."""
        aliases = [storage]
        for op in self.recorder.ops[after:]:
            taken = [alias for alias in aliases if alias in op.inputs]
            if not taken:
                continue
            if op.func._overloadpacket in COPIES and not op.written:
                aliases += [output for output in op.outputs if output not in aliases]
            else:
                for alias in taken:
                    yield op, alias

    def casts(self, storage: Storage, after: int) -> list[Storage]:
        """Copies of a storage in another dtype."""
        return [s for s in self.recorder.storages if s.copy_of is storage and s.born >= after]


def _one_step(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _plainly(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


#: Only one thread at a time patches torch.
_between = threading.RLock()


@contextlib.contextmanager
def _nothing_between() -> Iterator[None]:
    # Disables checkpointing and saved-tensor hooks. What a checkpointed region saves when it is recomputed is not
    # visible in the forward pass, but is what it saves without checkpointing; the model's own saved-tensor hooks
    # (offloading) would hide what they pack. torch has no switch for either, so this patches what both checkpoint
    # variants call around a region, and the hooks' __enter__ and __exit__. Other threads are not affected.
    here = threading.get_ident()

    def in_this_thread(original: Any, replacement: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (replacement if threading.get_ident() == here else original)(*args, **kwargs)

        return call

    checkpoint, hooks = torch.utils.checkpoint, torch.autograd.graph.saved_tensors_hooks
    with _between, contextlib.ExitStack() as stack:

        class Function(checkpoint.CheckpointFunction):  # type: ignore[misc,name-defined]
            apply = staticmethod(in_this_thread(checkpoint.CheckpointFunction.apply, _plainly))

        step = "_checkpoint_without_reentrant_generator"
        for owner, name, value in (
            (checkpoint, step, in_this_thread(getattr(checkpoint, step), _one_step)),
            (checkpoint, "CheckpointFunction", Function),
            (hooks, "__enter__", in_this_thread(hooks.__enter__, lambda self: None)),
            (hooks, "__exit__", in_this_thread(hooks.__exit__, lambda self, *error: None)),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextlib.contextmanager
def untouched(model: nn.Module, training: bool, inputs: Batch) -> Iterator[None]:
    """Restores the model, the random state and autocast's cache after the block.

    Args:
        model: The model.
        training: Mode of all modules inside the block.
        inputs: Its arguments, which the model may write to.
    """
    with exclusive:
        # Weight copies made without gradient would be reused in runs with gradient, and earlier ones would not be
        # recognized as copies.
        torch.clear_autocast_cache()
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it bypasses the modules
            with preserved(model, inputs=inputs.tensors()):
                for module in model.modules():
                    module.training = training  # not model.train(), which a module may override
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.clear_autocast_cache()


def trace(model: nn.Module, inputs: Batch, watched: Iterable[str], *, training: bool, grad: bool) -> Flow:
    """Runs a model's forward pass once, and records it.

    Args:
        model: The model, left unchanged.
        inputs: Its arguments.
        watched: Names of the modules whose calls are recorded.
        training: Mode of the model during the run.
        grad: Whether autograd records. What it saves shows only with it; results that escape in objects that are not
            pytrees show only without it.
    """
    recorder = Recorder(model)
    flow = Flow(recorder)
    calls = _Calls(flow)
    # Kept alive until the run is over, so that no address or storage is reused.
    kept: list[Any] = []
    open_calls: list[Call] = []

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        kept.append(values)
        call = Call(
            name,
            len(recorder.ops),
            [() if t.is_nested else tuple(t.shape) for t in tensors],
            len(tensors) == len(values) == 1,
        )
        call.input_id = id(values[0]) if values else 0
        call.input = calls._storage(values[0]) if values else None
        call.saved = range(len(recorder.saved), len(recorder.saved))
        call.transformed = torch._C._are_functorch_transforms_active()
        open_calls.append(call)
        flow.calls.append(call)

    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        call = open_calls.pop()
        call.end = len(recorder.ops)
        call.saved = range(call.saved.start, len(recorder.saved))
        if isinstance(result, Tensor) and result.layout == torch.strided and not result.is_nested:
            kept.append(result)
            records = recorder.records(result)
            call.result = records[0] if len(records) == 1 else None  # a wrapper subclass may have several
            call.dtype, call.numel, call.requires_grad = result.dtype, result.numel(), result.requires_grad
            call.result_id = id(result)
            if call.result is not None:
                calls.results[_address(result)] = call.result
            if all(p.dim() < 2 for p in module.parameters()):
                calls.followed.add(id(result))

    handles: list[Any] = []
    modules = dict(model.named_modules())
    try:
        for name in watched:
            before = functools.partial(enter, name)
            handles.append(hook_before(modules[name], before, with_kwargs=True))
            # Before the user's hooks, which may change or replace the result.
            handles.append(hook_after(modules[name], leave, with_kwargs=True, prepend=True))
        seen = calls if grad else contextlib.nullcontext()
        with untouched(model, training, inputs), torch.set_grad_enabled(grad), recorder, _nothing_between(), seen:
            recorder.label((*model.parameters(), *model.buffers()), "parameter")
            recorder.label(inputs.tensors(), "input")
            output = inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
    results = {call.result for call in flow.calls if call.result is not None}
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            flow.escaped.update(recorder.records(leaf))
    if grad:
        del output, leaf  # frees the graph, which holds results that have not escaped
    kept.clear()
    calls.kept.clear()
    if any(storage in results - flow.escaped for storage in recorder.living()):
        gc.collect()  # only if needed: it is slow, and results are rarely in a reference cycle
    flow.escaped.update(storage for storage in recorder.living() if storage in results)
    return flow


def modes(model: nn.Module) -> tuple[bool, ...]:
    """The modes in which a model can be run: training, and evaluation unless weights are quantized."""
    # On the CPU, bitsandbytes permanently repacks weights in evaluation mode, with lower precision.
    quantized = any(not p.is_floating_point() for p in model.parameters())
    return (True,) if quantized else (True, False)


def _run(model: nn.Module, inputs: Batch, watched: Iterable[str], training: bool, grad: bool) -> Flow:
    try:
        return trace(model, inputs, watched, training=training, grad=grad)
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise RuntimeError(
            f"lomem.convert: the model does not run on example_inputs in {mode} mode: {type(error).__name__}: {error}"
        ) from error


def runs(model: nn.Module, inputs: Batch, watched: list[str]) -> list[Flow]:
    """The runs that a conversion is based on. The first is in training mode with gradients.

    Args:
        model: The model, left unchanged, except that lazy modules get their parameters.
        inputs: Its arguments.
        watched: Names of the modules whose calls are recorded.
    """
    # With gradients to see what is saved; without, to see what escapes in objects that hide tensors; in evaluation
    # mode for paths that training does not take.
    _initialize(model, inputs)
    flows = [_run(model, inputs, watched, training=True, grad=True)]
    for training in modes(model):
        try:
            flows.append(_run(model, inputs, watched, training, grad=False))
        except RuntimeError:
            if not training:
                raise
            flows[0].hide_nothing()  # the model needs gradients in training (`retain_grad`)
    return flows


def _initialize(model: nn.Module, inputs: Batch) -> None:
    # Lazy modules get their parameters in their first run, which cannot be undone.
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        with torch.no_grad():
            inputs.call(model)
