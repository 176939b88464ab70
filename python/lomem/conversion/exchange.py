"""Changing what one module does, and nothing else about it.

A converted module keeps its identity: the object, its parameters, buffers, hooks, attributes and place in the model.
Only its class becomes a subclass of its own, with another ``forward`` and everything else that tools look at: name,
module, signature, docstring. So isinstance checks, state_dict keys, optimizers and whoever else holds the module notice
nothing, and undoing it is to give the class back.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

from torch import nn

__all__ = [
    "Changes",
    "Converted",
    "exchange",
    "exchange_all",
    "give_all_back",
    "give_back",
    "is_converted",
    "original_class",
    "unexchangeable",
    "wrapped_since",
]


class Converted(nn.Module):
    """Base of what :func:`exchange` puts before a module's class."""

    #: Before the name of the class, in the module's repr.
    lomem_prefix: ClassVar[str] = ""
    #: Names of the attributes that hold the mixin's own data.
    lomem_attributes: ClassVar[tuple[str, ...]] = ()
    lomem_mixin: ClassVar[type[Converted]]
    lomem_original: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **options: Any) -> None:
        # What a class does with its subclasses (register them, ask for arguments) is meant for those of its users.
        if "lomem_original" not in vars(cls):
            super().__init_subclass__(**options)

    def _get_name(self) -> str:
        return self.lomem_prefix + super()._get_name()

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


class _ConvertedType(type):
    """The type of converted classes: every instance of the original class counts as an instance.

    Tools look a class up by its name in a model (FSDP's wrapping does), and then for its instances. They find either
    class, and are to find all modules.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        original = vars(cls).get("lomem_original")
        return type.__instancecheck__(cls, instance) or (original is not None and isinstance(instance, original))


def _metaclass(original: type[nn.Module]) -> type:
    own = type(original)
    if own is type:
        return _ConvertedType
    return type(own.__name__, (_ConvertedType, own), {"__module__": own.__module__})


#: The converted classes that are in use, by mixin, class and the forward that this has.
_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()


def _class(mixin: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    # One for each pair, so that modules of one class stay modules of one class.
    key = mixin, original, original.forward
    known = _classes.get(key)
    if known is not None:
        return known
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "lomem_mixin": mixin,
        "lomem_original": original,
        "forward": _forward(mixin, original),
    }
    made = _metaclass(original)(original.__name__, (mixin, original), names)
    return _classes.setdefault(key, made)


def _forward(mixin: type[Converted], original: type[nn.Module]) -> Any:
    known = original.forward

    @functools.wraps(known)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(type(self), "lomem_mixin", None) is not mixin:
            # A bound method that somebody stored before the module was restored.
            return type(self).forward(self, *args, **kwargs)
        if original.forward is not known:
            return original.forward(self, *args, **kwargs)  # the class got another one since
        return mixin.forward(self, *args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):  # of a forward that has none
        forward.__signature__ = inspect.signature(known)  # type: ignore[attr-defined]  # also for who unwraps nothing
    return forward


def is_converted(module: nn.Module) -> bool:
    """Whether a module's class was exchanged."""
    return isinstance(module, Converted)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before its conversion."""
    return module.lomem_original if isinstance(module, Converted) else type(module)


def unexchangeable(module: nn.Module, mixin: type[Converted]) -> str | None:
    """Why a module's class cannot be exchanged, or None."""
    original = type(module)
    try:
        module.__class__ = _class(mixin, original)
        module.__class__ = original  # type: ignore[assignment]
    except Exception as error:
        return f"its class takes no subclass: {type(error).__name__}: {error}"
    return None


def exchange(module: nn.Module, mixin: type[Converted], **attributes: Any) -> None:
    """Puts a mixin before a module's class, and sets the mixin's attributes."""
    assert not is_converted(module)
    assert set(attributes) == set(mixin.lomem_attributes)
    module.__class__ = _class(mixin, type(module))
    module.__dict__.update(attributes)


def wrapped_since(module: nn.Module) -> bool:
    """Whether somebody else has exchanged a converted module's class since, as fully_shard does."""
    assert isinstance(module, Converted)
    return "lomem_original" not in vars(type(module))


def give_back(module: nn.Module) -> None:
    """Undoes :func:`exchange`."""
    assert isinstance(module, Converted)
    for name in module.lomem_attributes:
        module.__dict__.pop(name, None)
    module.__class__ = module.lomem_original  # type: ignore[assignment]


#: Mixins and their attributes, by the names of modules.
Changes: TypeAlias = Mapping[str, tuple[type[Converted], Mapping[str, Any]]]


def exchange_all(modules: Mapping[str, nn.Module], changes: Iterable[Changes]) -> None:
    """Makes all changes, of a module that several name the last one.

    Args:
        modules: All modules of a model, by name.
        changes: What is to be made of some.
    """
    for name, (mixin, attributes) in {n: change for c in changes for n, change in c.items()}.items():
        exchange(modules[name], mixin, **attributes)


def give_all_back(modules: Iterable[nn.Module]) -> None:
    """Undoes all of them."""
    for module in modules:
        if is_converted(module):
            give_back(module)
