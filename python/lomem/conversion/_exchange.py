"""Changing what one module does, and nothing else about it.

A converted module keeps its identity: the object, its parameters, buffers, hooks, attributes and place in the model.
Only its class becomes a subclass of its own, with another ``forward``. So isinstance checks, state_dict keys,
optimizers and whoever else holds the module notice nothing, and undoing it is to give the class back.
"""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

from torch import nn

__all__ = ["Converted", "exchange", "give_back", "is_converted", "wrapped_since"]


class Converted(nn.Module):
    """Base of what :func:`exchange` puts before a module's class."""

    #: Before the name of the class.
    lomem_prefix: ClassVar[str] = ""
    #: Names of the attributes that hold the mixin's own data.
    lomem_attributes: ClassVar[tuple[str, ...]] = ()
    lomem_mixin: ClassVar[type[Converted]]
    lomem_original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name in any module, so pickle and deepcopy are told how to make it.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        make, arguments, *rest = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"lomem.convert: {type(self).lomem_original.__name__} has its own way of being pickled, which a "
                "converted module does not follow: lomem.restore the model first"
            )
        return (_new, (self.lomem_mixin, self.lomem_original, *arguments[1:]), *rest)


def _new(mixin: type[Converted], original: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = _class(mixin, original)
    return cls.__new__(cls, *arguments)


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _class(mixin: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    # One for each pair, so that modules of one class stay modules of one class.
    if (mixin, original) in _classes:
        return _classes[mixin, original]
    names = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "lomem_mixin": mixin,
        "lomem_original": original,
    }
    return _classes.setdefault(
        (mixin, original), type(f"{mixin.lomem_prefix}{original.__name__}", (mixin, original), names)
    )


def is_converted(module: nn.Module) -> bool:
    """Whether a module's class was exchanged."""
    return isinstance(module, Converted)


def exchange(module: nn.Module, mixin: type[Converted], **attributes: Any) -> None:
    """Puts a mixin before a module's class, and sets the mixin's attributes."""
    assert not is_converted(module)
    assert set(attributes) == set(mixin.lomem_attributes)
    module.__dict__.update(attributes)
    module.__class__ = _class(mixin, type(module))


def wrapped_since(module: nn.Module) -> bool:
    """Whether somebody else has exchanged a converted module's class since, as fully_shard does."""
    assert isinstance(module, Converted)
    return type(module) is not _class(module.lomem_mixin, module.lomem_original)


def give_back(module: nn.Module) -> None:
    """Undoes :func:`exchange`."""
    assert isinstance(module, Converted)
    for name in module.lomem_attributes:
        del module.__dict__[name]
    module.__class__ = module.lomem_original  # type: ignore[assignment]
