"""The package as the reference reads it: roles in docstrings, such as ``:func:`lomem.convert```, become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")


def without_roles(text: str, scope: str) -> str:
    """A docstring in Markdown.

    Args:
        text: The docstring.
        scope: The module in which a name without a dot is looked up.

    Returns:
        The docstring with names in backticks, each a link if the reference has the name.
    """

    def link(match: re.Match[str]) -> str:
        name = match[1]
        target = name if "." in name else f"{scope}.{name}"
        return f'<autoref identifier="{target}" optional>`{name}`</autoref>'

    return _ROLE.sub(link, text)


class Package(griffe.Extension):
    """Rewrites the roles of all docstrings, and finds functions that are named as their modules."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that is read."""
        if obj.docstring is not None:
            # The public name of what lomem.functional.activations defines is that of lomem.functional.
            public = ".".join(obj.module.path.split(".")[:2])
            obj.docstring.value = without_roles(obj.docstring.value, public)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when all of the package is read."""
        for name, member in list(pkg.members.items()):
            # `from .conversion import convert` is the function at run time, the module of that name for who only reads.
            if (
                member.is_alias
                and member.target_path.startswith(f"{pkg.name}.")
                and member.target_path.endswith(f".{name}")
            ):
                target = pkg.modules_collection.get_member(member.target_path)
                if target.is_module and name in target.members:
                    pkg.set_member(name, griffe.Alias(name, f"{member.target_path}.{name}", parent=pkg))
