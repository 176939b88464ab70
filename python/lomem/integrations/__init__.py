"""lomem in the training loops of other libraries, which are imported on first use.

trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[TrainerCallback(bits=16)])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._transformers import TrainerCallback

__all__ = ["TrainerCallback"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("._transformers", __name__), name)
    except ImportError as error:
        raise ImportError(
            f"lomem.integrations.{name}: got an ImportError ({error}), expected transformers with what its Trainer "
            "needs: pip install 'transformers[torch]'"
        ) from error
