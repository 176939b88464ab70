"""Which settings bring the gradient of a converted model closer to the exact one."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from .. import functional as LF
from .fidelity import GradientFidelity
from .forms import ActivationForm
from .kinds import KEEP, Criterion, Function, Wishes
from .ledger import Candidate

__all__ = ["LEAST", "LEAST_OF_ONE_DRAW", "advice", "step_error", "warning"]

#: The cosine of a gradient to the exact one below which :func:`lomem.convert` warns, and the one that it aims at.
LEAST, AIM = 0.95, 0.99
#: The same of one draw of a gradient that is right in the mean: noise averages out, an error that stays does not.
LEAST_OF_ONE_DRAW = 0.9
#: Least share of the gradient with which a layer is named.
_COUNTS = 1e-3
#: A cosine below which that of unrelated gradients may be.
_CHANCE = 0.05


@functools.cache
def step_error(function: Function, bits: int, criterion: Criterion) -> float:
    """Relative error of the derivative of a step function, in the 2-norm over the standard normal distribution.

    Of codes that are drawn at random, the relative standard deviation.
    """
    x = torch.linspace(-8, 8, 8001, dtype=torch.float64, device="cpu")
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = F.gelu(leaf) if function is Function.GELU else F.silu(leaf)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
    density = torch.exp(-(x**2) / 2)
    if criterion is Criterion.DRAWN:
        variance = LF.drawn_levels(function.value, bits).deviation ** 2
        return float((density.sum() * variance / (density @ slope**2)).sqrt())
    steps = LF.step_function(function.value, bits, criterion=criterion.value).derivative(x)
    return float((density @ (slope - steps) ** 2 / (density @ slope**2)).sqrt())


def _functions(chosen: Iterable[Candidate]) -> set[Function]:
    """What is computed with step functions."""
    found: set[Function] = set()
    for c in chosen:
        if c.action.code_bits is not None:
            form = c.form
            found |= {form.kind} if isinstance(form, ActivationForm) else {f for f in Function if f.call in str(form)}
    return found


def advice(
    gradient: GradientFidelity, chosen: list[Candidate], wishes: Wishes, given: Mapping[str, str | None]
) -> str | None:
    """The options that are expected to give a cosine of at least 0.99, as they are written in a call.

    If there are none, those that come closest; None if that is what was used.

    Small errors of a gradient are taken to be proportional to those of what is stored: of the step functions'
    derivatives, and of numbers in groups. Each layer multiplies what has become of the gradient so far, so it is the
    logarithm of 1 plus the error that is proportional in general.

    Args:
        gradient: What was measured.
        chosen: The conversions made.
        wishes: Their options.
        given: The arguments ``activations``, ``norms`` and ``pairs``, None for those left to ``bits``.
    """
    # The tangent of the angle is the error of the gradient at its best length. It alone is large if the gradient has
    # become small. How near to 0 a small cosine is, or whether it is negative, is chance.
    error = math.log1p(max(gradient.error, (max(gradient.cosine, _CHANCE) ** -2 - 1) ** 0.5))
    groups = [c.action.group_bits for c in chosen if c.action.group_bits is not None]
    functions = _functions(chosen)
    criterion, bits = wishes.criterion, wishes.bits or 2
    # Without these, bits=16 would find nothing to convert.
    exact = bool(groups) or any(c.action.exact for c in chosen)

    def enough(bits_then: int, criterion_then: Criterion) -> bool:
        factors = [step_error(f, bits_then, criterion_then) / step_error(f, bits, criterion) for f in functions]
        # The noise of a group is proportional to its step, which is its largest element over the largest code.
        factors += [(2 ** (noisy - 1) - 1) / 127 for noisy in groups]
        # The cosine is that of an error at right angles. No exponential beyond what a number holds.
        return 1 / math.hypot(1, math.expm1(min(error * max(factors), 700))) >= AIM

    drawn = criterion is Criterion.DRAWN
    other = [] if drawn or criterion is Criterion.DERIVATIVE else ['criterion="derivative"']
    best = Criterion.DRAWN if drawn else Criterion.DERIVATIVE
    if groups or wishes.pair_groups is not None or wishes.norm_groups is not None:
        fewer = min([*groups, bits]) < 8
        if not exact and not fewer:
            return None
        dial = 8 if fewer and (not exact or enough(8, best)) else 16
        stored = "8bit" if dial == 8 else "auto"
        kept = (None, "auto", KEEP)
        settings = [f'{name}="{stored}"' for name in ("norms", "pairs") if given[name] not in kept]
        if dial == 8 and given["activations"] not in kept:
            settings.append('activations="8bit"')
        return ", ".join([f"bits={dial}", *settings, *(other if dial == 8 else [])])
    if other and enough(bits, Criterion.DERIVATIVE):
        return other[0]
    for more in range(bits + 1, 9):
        if enough(more, best):
            return ", ".join([f'activations="{more}bit"', *other])
    if exact:
        return "bits=16"  # not activations="keep", which would leave exact pairs too
    return None if bits == 8 else ", ".join(['activations="8bit"', *other])


def warning(
    gradient: GradientFidelity, layers: Mapping[str, GradientFidelity], settings: str | None, *, drawn: bool
) -> str:
    """One sentence about a gradient that is far from the exact one. ``drawn``: it is one of many that may be drawn."""
    cure = f"pass {settings} for a closer one" if settings is not None else "lomem.restore undoes the conversion"
    counting = [name for name, layer in layers.items() if layer.share >= _COUNTS]
    worst = sorted(counting, key=lambda name: layers[name].cosine)
    named = [f"{name or '(the model)'} ({layers[name].cosine:.3f})" for name in worst[:3]]
    least = LEAST_OF_ONE_DRAW if drawn else LEAST
    more = sum(layers[name].cosine < least for name in worst[3:])
    where = ", ".join(named) + (f", and {more} more below {least}" if more else "")
    which = "one draw of the gradient" if drawn else "the gradient"
    return (
        f"{which} on the example batch has a cosine of {gradient.cosine:.3f} to the exact one, furthest off in "
        f"{where}: {cure}"
    )
