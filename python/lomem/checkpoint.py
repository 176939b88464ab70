"""Selective checkpointing with the ops of lomem.

``torch.utils.checkpoint.create_selective_checkpoint_contexts`` is asked op by op what to save, and sees what runs below
autograd. A differentiable op of lomem runs as another one there (``lomem::gated`` as itself, but ``lomem::ms_rms_norm``
as ``lomem::ms_rms_norm_forward``), so its own name in a list of ops matches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from . import _C, functional, reference

__all__ = ["policy"]

_Op: TypeAlias = OpOverload | HigherOrderOperator
#: Whether a call, by its arguments, is one of those that are to be saved.
_Condition: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], bool]

_ACTIVATIONS = {name: exact for name, _, exact, _ in _C.activations()}
#: Ops of activations: the public one, and what runs as it.
FEW_BIT = ("step_activation", "step_activation_forward", "fused_activation_forward")
DRAWN = ("drawn_activation", "drawn_activation_forward")
EXACT = ("hard_activation", "hard_activation_forward")
#: What ops run as below autograd, where that is not the op itself or the one that is called so with `_forward`.
_RUNS_AS = {FEW_BIT[0]: FEW_BIT, "dropout": ("dropout", "dropout_forward", "seeded_dropout_forward")}
#: Ops of published step functions, with the names of their activations.
_PUBLISHED = {"regelu2": (reference.REGELU2, ("gelu", "gelu_tanh")), "resilu2": (reference.RESILU2, ("silu",))}


def policy(save: Iterable[Any]) -> Callable[..., CheckpointPolicy]:
    """What ``create_selective_checkpoint_contexts`` needs to save some ops and to compute the rest again.

        contexts = functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts,
            lomem.checkpoint.policy(save=[torch.ops.aten.mm, lomem.functional.ms_rms_norm]),
        )
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    What is saved of an op are all of its results: of an activation the output and its codes, for example. An activation
    by its name, such as ``lomem.functional.gelu``, stands for all of its forms: any number of bits and any rounding.

    An op that is saved does not draw its random numbers again, so that the next one would draw them in its place.
    Where an op that draws numbers of torch's generator is saved (dropout, attention with dropout), all others in the
    region that do are therefore saved too. lomem's own stream (:mod:`lomem.random`) has no part in this.

    Args:
        save: Ops of ``torch.ops.lomem`` and functions of :mod:`lomem.functional`; ops of other namespaces
            (``torch.ops.aten.mm`` for all of its overloads, ``torch.ops.aten.mm.default`` for one); higher-order ops.

    Returns:
        A function of a context, an op and its arguments, which is called once for every op that runs in the region. It
        returns ``MUST_SAVE`` or ``PREFER_RECOMPUTE``. Where an op that draws is saved, it raises a RuntimeError for one
        that draws in place, which cannot be saved (``aten::bernoulli_``, as which ``nn.Dropout`` runs on the CPU).

    Raises:
        TypeError: If ``save`` is not a collection of ops.
        ValueError: If an op never runs as itself in a forward pass, so that it would match nothing: ops made of others,
            such as ``aten::matmul`` and ``lomem::lora``; ops that write to their arguments; gradients.
    """
    if isinstance(save, str | OpOverload | OpOverloadPacket) or not isinstance(save, Iterable):
        raise TypeError(f"lomem.checkpoint.policy: save is {save!r}, expected a list of ops")
    chosen: dict[_Op, list[_Condition]] = {}
    for op in save:
        for one, condition in _runs(op):
            chosen.setdefault(one, []).append(condition)
    return _Policy(chosen)


class _Policy:
    def __init__(self, chosen: dict[_Op, list[_Condition]]) -> None:
        self._chosen = chosen
        # The first op that is saved and draws. (Attention draws only with dropout, so a call must show it.)
        self._drawing = next((op for op in chosen if _draws(op) and not _has_dropout_p(op)), None)

    def __call__(self, ctx: SelectiveCheckpointContext, op: _Op, /, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if any(condition(args, kwargs) for condition in self._chosen.get(op, ())):
            if self._drawing is None and _draws(op, args, kwargs):
                self._drawing = op
            return CheckpointPolicy.MUST_SAVE
        if self._drawing is None or not _draws(op, args, kwargs):
            return CheckpointPolicy.PREFER_RECOMPUTE
        assert isinstance(op, OpOverload)  # since it draws
        if op._schema.is_mutable:
            raise RuntimeError(
                f"lomem.checkpoint.policy: save has {_name(self._drawing)}, and the region also runs {_name(op)}, "
                "expected no op that draws random numbers in place: it cannot be saved, and would draw others again"
            )
        return CheckpointPolicy.MUST_SAVE


def _draws(op: _Op, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> bool:
    """Whether an op draws numbers of torch's generator, with arguments or at all."""
    if not isinstance(op, OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    if op.namespace == "lomem":
        return "dropout" in op._opname
    if not args or not _has_dropout_p(op):
        return True
    place = [argument.name for argument in op._schema.arguments].index("dropout_p")
    default = op._schema.arguments[place].default_value
    return bool((args[place] if place < len(args) else (kwargs or {}).get("dropout_p", default)) != 0)


def _has_dropout_p(op: _Op) -> bool:
    return isinstance(op, OpOverload) and any(argument.name == "dropout_p" for argument in op._schema.arguments)


def _name(op: _Op) -> str:
    return str(op.name()) if isinstance(op, OpOverload) else str(op)


def _runs(op: Any) -> list[tuple[_Op, _Condition]]:
    """What an op that a user names runs as."""
    name = getattr(op, "__name__", "")
    if name in functional.__all__ and getattr(functional, name) is op:
        return _runs_of_function(op, name)
    if isinstance(op, HigherOrderOperator):
        return [(op, _always)]
    if not isinstance(op, OpOverload | OpOverloadPacket):
        raise ValueError(
            f"lomem.checkpoint.policy: save has {op!r}, expected ops of torch.ops and functions of lomem.functional"
        )
    packet = op.overloadpacket if isinstance(op, OpOverload) else op
    namespace, _, name = packet._qualified_op_name.partition("::")
    if namespace == "lomem":
        return _runs_of_op(name)
    overloads = [op] if isinstance(op, OpOverload) else [getattr(op, overload) for overload in op.overloads()]
    # (Some are TorchScript's alone.)
    overloads = [overload for overload in overloads if torch._C._dispatch_has_kernel(overload.name())]
    found = [overload for overload in overloads if not (_is_composite(overload) or overload._schema.is_mutable)]
    if not found:
        why = "is made of other ops" if any(map(_is_composite, overloads)) else "writes to its arguments"
        raise ValueError(
            f"lomem.checkpoint.policy: save has {namespace}::{name}, which {why}, expected ops that autograd runs as "
            "they are and that only return results, such as torch.ops.aten.mm and torch.ops.aten.addmm"
        )
    return [(overload, _always) for overload in found]


def _is_composite(op: OpOverload) -> bool:
    return bool(op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def _always(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True


def _is_seed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not args[0] and kwargs.get("dtype") == torch.int64


def _overload(name: str) -> OpOverload:
    return getattr(torch.ops.lomem, name).default  # type: ignore[no-any-return]


def _runs_of_op(name: str) -> list[tuple[_Op, _Condition]]:
    runs: list[tuple[_Op, _Condition]]
    if name == "lora":
        raise ValueError(
            "lomem.checkpoint.policy: save has lomem::lora, which is made of other ops, expected those: its products "
            "are torch.ops.aten.mm"
        )
    if name.endswith(("_backward", "_weight_grad")):
        raise ValueError(
            f"lomem.checkpoint.policy: save has lomem::{name}, which computes gradients, expected an op of the forward "
            "pass"
        )
    if name in _PUBLISHED:
        return [(_overload(FEW_BIT[0]), _is_published(name)), (_overload(FEW_BIT[-1]), _is_published(name))]
    names = _RUNS_AS.get(name, (name, f"{name}_forward"))
    runs = [(_overload(one), _always) for one in names if hasattr(torch.ops.lomem, one)]
    # With codes in groups goes the seed of their dither, which is drawn before them: another one would add noise.
    return [*runs, (torch.ops.aten.full.default, _is_seed)] if name == "quantize_groups" else runs


def _runs_of_function(function: Callable[..., Any], name: str) -> list[tuple[_Op, _Condition]]:
    if name in _ACTIVATIONS:
        names = {name, f"{name}_tanh"} & _ACTIVATIONS.keys()
        ops = EXACT if _ACTIVATIONS[name] else (*FEW_BIT, *DRAWN)
        return [(_overload(op), lambda args, kwargs: args[1] in names) for op in ops]
    # (LowMemoryBP's names of norms lack the prefix.) What computes a function of the user's is made of the user's ops.
    found = [one for one in (name, f"ms_{name}") if hasattr(torch.ops.lomem, one) and name != FEW_BIT[0]]
    if not found:
        raise ValueError(
            f"lomem.checkpoint.policy: save has lomem.functional.{name}, which runs no op of its own, expected a "
            "function that does, or ops of torch.ops"
        )
    return _runs_of_op(found[0])


def _is_published(name: str) -> _Condition:
    """Whether a call is one with this published step function."""
    steps, names = _PUBLISHED[name]

    def condition(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # The fused op has boundaries in third place; the other one, which runs if no gradient is needed, parameters.
        _, function, numbers, *_ = args
        return tuple(numbers) == steps.boundaries or (kwargs.get("criterion") == "paper" and function in names)

    return condition
