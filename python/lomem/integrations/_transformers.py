"""A callback for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._trace.autocast import autocast_to
from ..conversion import Report, convert
from ..conversion.exchange import is_converted
from ._shared import check_not_sharded, check_options, first_rows

__all__ = ["TrainerCallback"]

_NAME = "lomem.integrations.TrainerCallback"


class TrainerCallback(transformers.TrainerCallback):
    """Calls :func:`lomem.convert` when a ``transformers.Trainer``, or one that is derived from it, begins to train.

        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[TrainerCallback(bits=16)])
        trainer.train()

    The model is then where it is trained, with the weights of the checkpoint from which training resumes, wrapped by
    peft, not yet compiled, and converted under the trainer's autocast. The example inputs are the first two rows of the
    training data (not a batch of the dataloader, whose order they leave as it is), as the trainer's collator joins
    them. Random numbers are the same as without the callback. A model that is converted already is left alone.

    Args:
        example_inputs: What the model is called with instead, as for :func:`lomem.convert`: for trainers that call it
            with anything else than what the collator returns, and for data that can be iterated over only once.
        verbose: Whether the main process prints the report.
        **options: Further arguments of :func:`lomem.convert`.

    Attributes:
        report: What :func:`lomem.convert` returned; None before.

    Raises:
        TypeError: If :func:`lomem.convert` has no such option.
    """

    def __init__(self, example_inputs: Any = None, *, verbose: bool = True, **options: Any) -> None:
        check_options(_NAME, options)
        self.example_inputs, self.verbose, self.options = example_inputs, verbose, options
        self.report: Report | None = None

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Converts the model.

        Raises:
            ValueError: If the model is sharded already, the data can be iterated over only once, or
                :func:`lomem.convert` raises.
            RuntimeError: If :func:`lomem.convert` raises.
        """
        model: nn.Module = kwargs["model"]
        if any(map(is_converted, model.modules())):
            return
        check_not_sharded(_NAME, model)
        inputs = self.example_inputs
        inputs = first_rows(_NAME, kwargs["train_dataloader"], model) if inputs is None else inputs
        device = next(model.parameters()).device
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        model.train()  # as the trainer does before every step
        with autocast_to(device.type, dtype):
            self.report = convert(model, inputs, **self.options)
        if self.verbose and state.is_world_process_zero:
            print(self.report)
