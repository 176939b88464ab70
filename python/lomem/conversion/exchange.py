"""Changes what a module does, and nothing else about it.

A converted module keeps its identity: the object, its parameters, buffers, hooks, attributes and place in the model.
Only its class is replaced, by a subclass with another ``forward`` and the same name, module, signature and docstring.
isinstance checks, state_dict keys, optimizers and other references to the module keep working. Restoring the module
means setting its class back.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias

from torch import nn

__all__ = [
    "Changes",
    "Converted",
    "exchange",
    "exchange_all",
    "give_all_back",
    "give_back",
    "given_back",
    "is_converted",
    "original_class",
    "unexchangeable",
    "wrapped_since",
]


class Converted(nn.Module):
    """Base of the mixins that :func:`exchange` puts before a module's class."""

    #: Prefix of the class name in the module's repr.
    lomem_prefix: ClassVar[str] = ""
    #: Names of the attributes that hold the mixin's data.
    lomem_attributes: ClassVar[tuple[str, ...]] = ()
    lomem_mixin: ClassVar[type[Converted]]
    lomem_original: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **options: Any) -> None:
        # What a class does with its subclasses (register them, require arguments) is meant for those that users write.
        if "lomem_original" not in vars(cls):
            super().__init_subclass__(**options)

    @classmethod
    def combined(
        cls, attributes: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[type[Converted], Mapping[str, Any]]:
        """The change of a module that combines this mixin's attributes with those of another change.

        The other one is of this mixin or of a base. By default it says the same.
        """
        return cls, attributes

    def _get_name(self) -> str:
        return self.lomem_prefix + super()._get_name()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be imported by name, so pickle and deepcopy are told how to make it.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        make, arguments, *rest = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"lomem.convert: {type(self).lomem_original.__name__} defines how it is pickled, which converted "
                "modules do not support: call lomem.restore on the model first"
            )
        return (_new, (self.lomem_mixin, self.lomem_original, *arguments[1:]), *rest)


def _new(mixin: type[Converted], original: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = _class(mixin, original)
    return cls.__new__(cls, *arguments)


class _ConvertedType(type):
    """Metaclass of converted classes: every instance of the original class counts as an instance.

    Some tools, such as FSDP's wrapping, look up a class by its name in a model and then search for its instances.
    Whichever of the two classes they find, they must find all modules.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        original = vars(cls).get("lomem_original")
        return type.__instancecheck__(cls, instance) or (original is not None and isinstance(instance, original))


def _metaclass(original: type[nn.Module]) -> type:
    own = type(original)
    if own is type:
        return _ConvertedType
    return type(own.__name__, (_ConvertedType, own), {"__module__": own.__module__})


#: The converted classes in use, by mixin, original class and its forward.
_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()


def _class(mixin: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    # One class per pair, so that modules of one class still share a class.
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
            # A bound method that was stored before the module was restored.
            return type(self).forward(self, *args, **kwargs)
        if original.forward is not known:
            return original.forward(self, *args, **kwargs)  # the class has been given another forward since
        return mixin.forward(self, *args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):  # some forwards have no signature
        forward.__signature__ = inspect.signature(known)  # type: ignore[attr-defined]  # for tools that do not unwrap
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
        return f"its class cannot be subclassed: {type(error).__name__}: {error}"
    return None


def exchange(module: nn.Module, mixin: type[Converted], **attributes: Any) -> None:
    """Puts a mixin before a module's class, and sets the mixin's attributes."""
    assert not is_converted(module)
    assert set(attributes) == set(mixin.lomem_attributes)
    module.__class__ = _class(mixin, type(module))
    module.__dict__.update(attributes)


def wrapped_since(module: nn.Module) -> bool:
    """Whether something else, such as fully_shard, has replaced a converted module's class since."""
    assert isinstance(module, Converted)
    return "lomem_original" not in vars(type(module))


def give_back(module: nn.Module) -> None:
    """Undoes :func:`exchange`."""
    assert isinstance(module, Converted)
    for name in module.lomem_attributes:
        module.__dict__.pop(name, None)
    module.__class__ = module.lomem_original  # type: ignore[assignment]


#: Mixins and their attributes, by module name.
Changes: TypeAlias = Mapping[str, tuple[type[Converted], Mapping[str, Any]]]


def exchange_all(modules: Mapping[str, nn.Module], changes: Iterable[Changes]) -> None:
    """Makes all changes. If several name the same module, they are combined.

    Args:
        modules: All modules of a model, by name.
        changes: The changes to make.
    """
    combined: dict[str, tuple[type[Converted], Mapping[str, Any]]] = {}
    for name, (mixin, attributes) in ((n, change) for c in changes for n, change in c.items()):
        known = combined.get(name)
        if known is not None and issubclass(known[0], mixin) and known[0] is not mixin:
            combined[name] = known[0].combined(known[1], attributes)
        else:
            combined[name] = (mixin, attributes) if known is None else mixin.combined(attributes, known[1])
    for name, (mixin, attributes) in combined.items():
        exchange(modules[name], mixin, **attributes)


def give_all_back(modules: Iterable[nn.Module]) -> None:
    """Undoes :func:`exchange` for all converted modules."""
    for module in modules:
        if is_converted(module):
            give_back(module)


@contextlib.contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Undoes :func:`exchange` for all modules of a model, and does it again after the block."""
    held = []
    for module in model.modules():
        if isinstance(module, Converted):
            attributes = {name: vars(module)[name] for name in module.lomem_attributes if name in vars(module)}
            held.append((module, type(module), attributes))
    try:
        for module, _, _ in held:
            give_back(module)
        yield
    finally:
        for module, converted, attributes in held:
            module.__class__ = converted
            module.__dict__.update(attributes)
