"""Plans a conversion: recognizes modules, makes candidates, and chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from .._trace.batch import Batch
from .adapters import is_adapter
from .cheap_ops import StepKind
from .finder import Finder, ways_of_its_own
from .flow import Flow, runs
from .kinds import Kind, Wishes
from .ledger import Candidate
from .plan_activation import plan_activation, plan_calls
from .plan_copy import plan_copies, plan_dropouts
from .plan_norm import plan_norm
from .recognize import (
    ActivationForm,
    NormForm,
    NotRecognized,
    recognize_activation,
    recognize_norm,
    signature,
)
from .settle import settle

__all__ = ["plan"]


#: Parts of class names that suggest a norm. Such modules are reported even if they are not recognized.
_NORM_NAMES = ("norm", "layer_norm", "ln_")
#: Classes with such names that are other norms.
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.LocalResponseNorm, nn.CrossMapLRN2d)


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            yield name, module


def _recognize(leaves: dict[str, nn.Module], flows: list[Flow]) -> dict[str, ActivationForm | NormForm | NotRecognized]:
    """Recognizes activations and norms, and modules close enough to one to be reported."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for call in (call for flow in flows for call in flow.calls if call.shapes):
        shapes.setdefault(call.name, set()).add(call.shapes[0])
    # Models have many equal modules.
    known: dict[Hashable, Any] = {}

    def once(recognize: Callable[..., Any], module: nn.Module, *arguments: Any) -> Any:
        key = recognize, signature(module), arguments
        if key not in known:
            known[key] = recognize(module, *arguments)
        return known[key]

    result: dict[str, ActivationForm | NormForm | NotRecognized] = {}
    for name, module in leaves.items():
        activation = once(recognize_activation, module)
        if isinstance(activation, ActivationForm) or activation.near:
            result[name] = activation
            continue
        named = _is_named_norm(module)
        if not named and next(module.parameters(), next(module.buffers(), None)) is None:
            continue  # a dropout, for example
        norm = once(recognize_norm, module, tuple(sorted(shapes.get(name, ()))))
        if isinstance(norm, NormForm) or norm.near or named:
            result[name] = norm
    return result


def _is_named_norm(module: nn.Module) -> bool:
    """Whether the class name suggests a norm over the last dimensions or channels."""
    if isinstance(module, _OTHER_NORMS) or type(module).__module__.startswith("torch.nn.utils."):
        return False
    return any(part in type(module).__name__.lower() for part in _NORM_NAMES)


def plan(model: nn.Module, inputs: Batch | None, wishes: Wishes) -> tuple[list[Candidate], Flow | None]:
    """Decides how each norm, activation and functional call is converted.

    Args:
        model: The model, left unchanged.
        inputs: Inputs to run it on. None skips the run, and no norm is converted.
        wishes: The user's options.

    Returns:
        All candidates, in the order of the model's modules, and the run in training mode.
    """
    leaves = dict(_leaves(model))
    layers = {n: m for n, m in model.named_modules() if n in leaves or is_adapter(m)}
    watched = [n for n, m in layers.items() if not isinstance(m, nn.Embedding)]
    flows = [] if inputs is None else runs(model, inputs, watched)
    if flows and not wishes.dropouts:
        flows[0].steps = [step for step in flows[0].steps if step.kind is not StepKind.DROPOUT]
    finder = Finder(model, flows) if flows else None
    found = []
    recognized = _recognize(leaves, flows)

    def known(name: str) -> bool:
        return isinstance(recognized.get(name), ActivationForm | NormForm) or wishes.excludes(name)

    for name, what in recognized.items():
        if isinstance(what, ActivationForm):
            found.append(_activation_candidate(name, leaves[name], what, finder, wishes, known))
        elif isinstance(what, NormForm):
            found.append(_norm_candidate(name, leaves[name], what, finder, wishes, known))
        else:
            c = Candidate(name, what.kind, f"unrecognized {what.kind}")
            c.leave(what.reason)
            found.append(c)
    if finder is not None:
        activation_modules = {name for name, what in recognized.items() if isinstance(what, ActivationForm)}
        found += plan_calls(finder, activation_modules.__contains__, known, wishes)
        found += plan_dropouts(finder)
        if wishes.pairs:
            claimed = {name for c in found if not c.left for name in c.changes}
            found += plan_copies(finder, claimed, known)
    if flows and flows[0].differentiates:
        for c in found:
            c.leave("the model computes gradients in its forward pass, and its result depends on them")
    for c in found:
        if not c.left and (wishes.keeps(c.kind) or wishes.excludes(c.name)):
            c.leave(f"conversion of {c.kind}s is off" if wishes.keeps(c.kind) else "it is excluded")
    if finder is not None:
        settle(found, finder, wishes.excludes)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda c: order[c.name]), flows[0] if flows else None


def _activation_candidate(
    name: str,
    module: nn.Module,
    form: ActivationForm,
    finder: Finder | None,
    wishes: Wishes,
    known: Callable[[str], bool],
) -> Candidate:
    problem = ways_of_its_own(module)
    if problem is not None:
        c = Candidate(name, Kind.ACTIVATION, form)
        c.leave(problem)
        return c
    return plan_activation(finder, name, module, form, wishes, known)


def _norm_candidate(
    name: str, module: nn.Module, form: NormForm, finder: Finder | None, wishes: Wishes, known: Callable[[str], bool]
) -> Candidate:
    problem = ways_of_its_own(module)
    if problem is None and finder is None:
        problem = "its consumers are unknown without example_inputs"
    if problem is not None or finder is None:
        c = Candidate(name, Kind.NORM, form)
        c.leave(problem or "")
        return c
    return plan_norm(finder, name, form, wishes.pairs, known, wishes.norm_groups)
