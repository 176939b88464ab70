"""lomem in the training loops of other libraries, which are imported on first use.

trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[TrainerCallback(bits=16)])
trainer = lightning.Trainer(callbacks=[LightningCallback(bits=16)])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._lightning import LightningCallback
    from ._transformers import TrainerCallback

__all__ = ["LightningCallback", "TrainerCallback"]

#: Modules by the names that they define, and what they need.
_MODULES = {
    "LightningCallback": ("._lightning", "lightning"),
    "TrainerCallback": ("._transformers", "transformers[torch]"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _MODULES[name]
    try:
        return getattr(importlib.import_module(module, __name__), name)
    except ImportError as error:
        raise ImportError(
            f"lomem.integrations.{name}: got an ImportError ({error}), expected the package: pip install '{package}'"
        ) from error
