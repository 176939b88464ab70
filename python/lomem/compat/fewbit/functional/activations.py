"""FewBit's ``fewbit.functional.activations``.

The piecewise linear functions, :data:`STEPWISE`, are :mod:`lomem.functional`'s. The others, :data:`CONTINOUS` (FewBit's
spelling), take the arguments of torch's functions without ``approximate`` and ``inplace``, and in addition, by keyword:

- ``bits``: number of bits saved per element, 1 to 8. None is 3.
- ``borders`` and ``values``: another step function as the derivative. ``borders`` has one element more than ``values``;
  its first and last are the ends of the domain and make no difference. Given together, and without ``bits``.

Both arguments are read on the host: on a GPU that synchronizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .... import _C
from .... import functional as LF
from ....functional.activations import with_steps
from ....steps import StepFunction

#: FewBit's default number of bits.
BITS = 3
#: Ends of the domain that FewBit fits step functions on.
_DOMAIN = 100.0

# Those of lomem's functions that torch has under the same name.
_SHARED = [row for row in _C.activations() if hasattr(torch.nn.functional, row[0])]
_EXACT = sorted(name for name, _, exact, _ in _SHARED if exact)
# name -> parameters, which all have defaults
_SMOOTH = {name: [value or 0.0 for _, value in parameters] for name, parameters, exact, _ in _SHARED if not exact}

STEPWISE = (*_EXACT, "stepwise")
CONTINOUS = tuple(sorted(_SMOOTH))

__all__ = ["StepwiseStore", "store"]
__all__ += [*STEPWISE, *CONTINOUS]


def step_function(where: str, borders: Any, values: Any) -> StepFunction:
    """A step function in FewBit's form: any number of values from 1 to 256, and borders with both ends or neither.

    Args:
        where: Name of the public function, for errors.
        borders: 1-D tensor.
        values: 1-D tensor, with one element more than ``borders`` or one less.

    Raises:
        TypeError: If an argument is not a tensor.
        ValueError: If it is not as described.
    """
    for name, tensor in (("borders", borders), ("values", values)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} is of type {type(tensor).__name__}, expected a 1-D tensor")
        if tensor.ndim != 1:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected a 1-D tensor")
    if not 1 <= values.numel() <= 256:
        raise ValueError(f"{where}: values has {values.numel()} elements, expected 1 to 256")
    inner = borders[1:-1] if borders.numel() > values.numel() else borders
    if inner.numel() + 1 != values.numel():
        raise ValueError(
            f"{where}: borders has {borders.numel()} elements, expected {values.numel() + 1} with both ends or "
            f"{values.numel() - 1} without, for {values.numel()} values"
        )
    boundaries, levels = inner.tolist(), values.tolist()
    # The next power of 2, with steps of height 0 at the last boundary: no input gets a code in between.
    bits = max(1, (len(levels) - 1).bit_length())
    boundaries += (boundaries[-1:] or [0.0]) * (2**bits - 1 - len(boundaries))
    levels += levels[-1:] * (2**bits - len(levels))
    try:
        return StepFunction(tuple(boundaries), tuple(levels))
    except ValueError as error:
        raise ValueError(f"{where}: borders and values are no step function: {error}") from error


class StepwiseStore:
    """The step functions that the activations use, by name and number of bits.

    They are those of lomem, with the default parameters of the activation, except for what :meth:`add` or :meth:`load`
    replaced.
    """

    def __init__(self) -> None:
        self._added: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._steps: dict[tuple[str, int], StepFunction] = {}
        self._cache: dict[tuple[str, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _keys(self) -> list[tuple[str, int]]:
        return [*dict.fromkeys([*((name, bits) for name in CONTINOUS for bits in range(1, 9)), *self._added])]

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(stored={len(self)}, cached={len(self._cache)})"

    def add(self, name: str, bits: int, value: tuple[Tensor, Tensor]) -> None:
        """Sets the step function that the activation ``name`` uses with ``bits`` bits from now on, whatever parameters.

        Args:
            name: Name of the activation.
            bits: Number of bits, 1 to 8.
            value: Borders, with both ends, and values: 1-D tensors. At most ``2**bits`` values.

        Raises:
            ValueError: If ``value`` is no step function of ``bits`` bits.
        """
        where = "lomem.compat.fewbit.functional.store.add"
        borders, values = value
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"{where}: bits is {bits!r}, expected 1 to 8")
        steps = step_function(where, borders, values)
        if borders.numel() != values.numel() + 1:
            raise ValueError(
                f"{where}: borders has {borders.numel()} elements, expected {values.numel() + 1}, with both ends"
            )
        if steps.bits > bits:
            raise ValueError(
                f"{where}: values has {values.numel()} elements, expected at most {2**bits} for {bits} bits"
            )
        self._steps[name, bits] = steps
        self._added[name, bits] = (borders, values.to(borders))
        self._cache = {key: kept for key, kept in self._cache.items() if key[:2] != (name, bits)}

    def get(
        self, name: str, bits: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns borders, with both ends, and values.

        Args:
            name: Name of the activation.
            bits: Number of bits.
            device: Device of the tensors, by default the CPU.
            dtype: Dtype of the tensors, by default float32.

        Raises:
            KeyError: If there is no such step function.
        """
        key = (name, bits, torch.device(device or "cpu"), dtype or torch.float32)
        if key not in self._cache:
            borders, values = self._found(name, bits)
            self._cache[key] = (borders.to(key[2], key[3]), values.to(key[2], key[3]))
        return self._cache[key]

    def _found(self, name: str, bits: int) -> tuple[Tensor, Tensor]:
        if (name, bits) in self._added:
            return self._added[name, bits]
        if name not in CONTINOUS or bits not in range(1, 9):
            raise KeyError(
                f"lomem.compat.fewbit.functional.store.get: no step function for {name!r} with {bits!r} bits, expected "
                f"1 to 8 bits and one of {', '.join(CONTINOUS)}"
            )
        steps = LF.step_function(name, bits, parameters=_SMOOTH[name])
        end = max(_DOMAIN, *(2 * abs(boundary) for boundary in steps.boundaries))
        borders = torch.tensor([-end, *steps.boundaries, end], dtype=torch.float64)
        return borders, torch.tensor(steps.levels, dtype=torch.float64)

    def steps(self, name: str, bits: int) -> StepFunction | None:
        """What was added for an activation, None if nothing was."""
        return self._steps.get((name, bits))

    def items(self, cached: bool = False) -> Iterator[tuple[tuple[Any, ...], tuple[Tensor, Tensor]]]:
        """Yields keys and step functions.

        Args:
            cached: Whether only those that :meth:`get` has made, with device and dtype as part of the key.
        """
        if cached:
            yield from list(self._cache.items())
        else:
            yield from ((key, self._found(*key)) for key in self._keys())

    def load(self, path: str | Path) -> StepwiseStore:
        """Adds the step functions of an ``.npz`` file, and returns the store.

        Args:
            path: File with two arrays for each, named like ``gelu03-borders`` and ``gelu03-levels``.

        Raises:
            ValueError: If the arrays are named otherwise.
        """
        import numpy as np

        with np.load(path) as arrays:
            for key in sorted({name.rpartition("-")[0] for name in arrays}):
                if not key[-2:].isdecimal() or not {f"{key}-borders", f"{key}-levels"} <= set(arrays):
                    raise ValueError(
                        f"lomem.compat.fewbit.functional.store.load: {path} has arrays {', '.join(sorted(arrays))}, "
                        "expected pairs such as 'gelu03-borders' and 'gelu03-levels'"
                    )
                borders, levels = (torch.from_numpy(arrays[f"{key}-{part}"]) for part in ("borders", "levels"))
                self.add(key[:-2], int(key[-2:]), (borders, levels))
        return self


#: The step functions in use.
store = StepwiseStore()


def stepwise(
    xs: Tensor,
    borders: Tensor,
    levels: Tensor,
    parity: bool | None = None,
    shift: tuple[float, float] | None = None,
) -> Tensor:
    """The identity, with a step function as its derivative.

    Args:
        xs: Tensor of any shape; float64, float32, bfloat16 or float16.
        borders: 1-D tensor of the borders between the levels, ascending, without or with both ends of the domain.
        levels: 1-D tensor of 1 to 256 levels.
        parity: None only: give the step function on both sides.
        shift: None only.

    Returns:
        A copy of ``xs``. (FewBit returns ``xs`` itself.) Its gradient is ``grad_output`` times the level at ``xs``.

    Raises:
        ValueError: If an argument is not as described.
    """
    where = "lomem.compat.fewbit.functional.stepwise"
    for name, value in (("parity", parity), ("shift", shift)):
        if value is not None:
            raise ValueError(f"{where}: {name} is {value!r}, expected None and the whole step function")
    return with_steps(xs, lambda x: x, step_function(where, borders, levels))


def _few_bit(name: str) -> Callable[..., Tensor]:
    """The function of lomem with FewBit's arguments."""
    of_lomem = getattr(LF, name)
    where = f"lomem.compat.fewbit.functional.{name}"
    kind = inspect.Parameter
    # torch's own, without those that FewBit has not.
    parameters = [
        p
        for p in inspect.signature(of_lomem).parameters.values()
        if p.kind is kind.POSITIONAL_OR_KEYWORD and p.name not in ("approximate", "inplace")
    ]
    bits = kind("bits", kind.KEYWORD_ONLY, default=None, annotation=int | None)
    if name == "gelu":  # gelu(x, 3) in FewBit's first versions
        bits = bits.replace(kind=kind.POSITIONAL_OR_KEYWORD)
    others = [kind(other, kind.KEYWORD_ONLY, default=None, annotation=Tensor | None) for other in ("borders", "values")]
    signature = inspect.Signature([*parameters, bits, *others], return_annotation=Tensor)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{where}: {error}, expected {signature}") from None
        bits, borders, values = (arguments.pop(argument, None) for argument in ("bits", "borders", "values"))
        return of_lomem(**arguments, **_derivative(where, name, bits, borders, values))  # type: ignore[no-any-return]

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"""FewBit's ``{name}``: :func:`lomem.functional.{name}` with ``bits``, ``borders`` and ``values``.

    See :mod:`lomem.compat.fewbit.functional.activations`.
    """
    vars(call)["__signature__"] = signature
    return call


def _derivative(where: str, name: str, bits: int | None, borders: Any, values: Any) -> dict[str, Any]:
    """The arguments of lomem's functions that choose the step function."""
    if (borders is None) != (values is None):
        given, missing = ("borders", "values") if values is None else ("values", "borders")
        raise ValueError(f"{where}: {given} is given and {missing} is None, expected both or neither")
    if borders is not None:
        if bits is not None:
            raise ValueError(f"{where}: bits is {bits!r}, expected None with borders and values")
        return {"steps": step_function(where, borders, values)}
    bits = BITS if bits is None else bits
    return {"bits": bits, "steps": store.steps(name, bits)}


for _name in _EXACT:
    globals()[_name] = getattr(LF, _name)
for _name in CONTINOUS:
    globals()[_name] = _few_bit(_name)


def __getattr__(name: str) -> Any:  # for type checkers, which do not see the names that are set above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
