"""A callback for Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..conversion import Report, convert
from ..conversion.exchange import is_converted
from ._shared import check_not_sharded, check_options, first_rows

try:
    from lightning.pytorch import Callback
except ImportError:  # the package of the same authors that has Lightning alone
    from pytorch_lightning import Callback  # type: ignore[assignment]

__all__ = ["LightningCallback"]

_NAME = "lomem.integrations.LightningCallback"


class LightningCallback(Callback):
    """Calls :func:`lomem.convert` when a ``lightning.Trainer`` begins to train.

        trainer = lightning.Trainer(callbacks=[LightningCallback(bits=16)])
        trainer.fit(module, loader)

    The module is then where it is trained, with the weights of the checkpoint from which training resumes, and
    converted under the trainer's precision. It is called with the first two rows of the training data (not a batch of
    the dataloader, whose order they leave as it is), as the dataloader collates them: with a mapping as keyword
    arguments; with the first item of a tuple or list, such as the images of images and labels; with anything else as it
    is. Random numbers are the same as without the callback. A module that is converted already is left alone.

    Args:
        example_inputs: What is called with instead, as for :func:`lomem.convert`.
        part: Name of the part of the module to convert, which is then what is called: ``"model"``, for example, for a
            ``LightningModule`` without a ``forward`` of its own, or with an attribute ``model`` that takes the batch.
        verbose: Whether the main process prints the report.
        **options: Further arguments of :func:`lomem.convert`.

    Attributes:
        report: What :func:`lomem.convert` returned; None before.

    Raises:
        TypeError: If :func:`lomem.convert` has no such option.
    """

    def __init__(self, example_inputs: Any = None, *, part: str = "", verbose: bool = True, **options: Any) -> None:
        check_options(_NAME, options)
        self.example_inputs, self.part, self.verbose, self.options = example_inputs, part, verbose, options
        self.report: Report | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Converts the module.

        Raises:
            ValueError: If the module is sharded or compiled already, the data can be iterated over only once or are not
                in one DataLoader, or :func:`lomem.convert` raises.
            RuntimeError: If :func:`lomem.convert` raises.
        """
        model: nn.Module = pl_module.get_submodule(self.part)
        if any(map(is_converted, model.modules())):
            return
        check_not_sharded(_NAME, trainer.strategy.model)
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise ValueError(
                f"{_NAME}: the module is compiled already when training begins, expected one that is not: call "
                "lomem.convert before torch.compile"
            )
        inputs = self.example_inputs
        if inputs is None:
            inputs = first_rows(_NAME, trainer.train_dataloader, pl_module)
            inputs = (inputs[0],) if isinstance(inputs, tuple | list) else inputs
        inputs = trainer.strategy.batch_to_device(inputs)
        with trainer.precision_plugin.forward_context():
            self.report = convert(model, inputs, **self.options)
        if self.verbose and trainer.is_global_zero:
            print(self.report)
