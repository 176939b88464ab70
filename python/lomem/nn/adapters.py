"""Low-rank adapters of linear layers as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F

__all__ = ["LoRALinear"]

_NAME = "lomem.nn.LoRALinear"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LoRALinear(nn.Module):
    """A linear layer with frozen parameters and a trainable low-rank adapter beside it (LoRA, arXiv:2106.09685).

    The result is ``base(input) + lora(input)``, rounded to the dtype of the base's result: that of peft's layer, bit
    for bit where the base's weight is a floating-point tensor. See :func:`lomem.functional.lora` for what is saved.

    The state dict has the base's under ``base_layer.``, and ``lora_A.weight``, ``lora_B.weight`` and, with ``bias``,
    ``lora_B.bias``. These are the names in peft's adapter files; in a peft model they have the name of the adapter in
    between, as in ``lora_A.default.weight``.

    Args:
        base: The linear layer: :class:`torch.nn.Linear`, a 4-bit or 8-bit layer, ``Conv1D`` of transformers, or any
            other module that has ``in_features`` and ``out_features``. Its parameters are frozen.
        r: Rank of the adapter, at least 1.
        alpha: The adapter is multiplied by ``alpha / r``.
        dropout: Probability that an element of the adapter's input is dropped in training, in [0, 1).
        use_rslora: Divides ``alpha`` by ``sqrt(r)`` instead (arXiv:2312.03732).
        bias: Whether ``lora_B`` has a bias.
        dtype: Dtype of the adapter. By default float32, or float64 for a base in float64.

    Attributes:
        enabled: Whether the adapter takes part. True at first.
        merged: Whether it is merged into the weight of the base.

    Raises:
        ValueError: If an argument is out of its range, or the sizes of the base are not known.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        *,
        alpha: float = 1.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if r < 1:
            raise ValueError(f"{_NAME}: r is {r}, expected at least 1")
        in_features, out_features = _sizes(base)
        scaling = alpha / (math.sqrt(r) if use_rslora else r)
        # Calling the op on the meta device checks the arguments here rather than in the first forward pass.
        none = torch.empty((1, 1), device="meta", dtype=dtype)
        F.lora(none, none, none, scaling, p=dropout)
        super().__init__()
        tensor = next((t for t in (*base.parameters(), *base.buffers())), torch.empty(0))
        if dtype is None:
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        options: dict[str, Any] = {"device": tensor.device, "dtype": dtype}
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(in_features, r, bias=False, **options)
        self.lora_B = nn.Linear(r, out_features, bias=bias, **options)
        self.in_features = in_features
        self.out_features = out_features
        self.r = r
        self.alpha = alpha
        self.scaling = scaling
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.enabled = True
        self.merged = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``lora_A`` like the weight of :class:`torch.nn.Linear`, and sets ``lora_B`` to zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``base(input) + lora(input)``, with other arguments passed to the base."""
        result = self.base_layer(input, *args, **kwargs)
        if self.merged and not self.enabled:
            raise RuntimeError(f"{_NAME}: the adapter is merged and not enabled, expected a call of unmerge before")
        if self.merged or not self.enabled:
            return result
        return (result + self._update(input)).to(result.dtype)

    def _update(self, input: Tensor) -> Tensor:
        """What the adapter adds to the result of the base."""
        return F.lora(
            input,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            bias=self.lora_B.bias,
            p=self.dropout,
            training=self.training,
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapter to the weight of the base, and its bias to the base's, in place.

        Raises:
            RuntimeError: If the adapter is merged already, or the base has no floating-point weight, or no bias for
                that of the adapter.
        """
        if self.merged:
            raise RuntimeError(f"{_NAME}.merge: the adapter is merged already, expected one that is not")
        self._add_to_base(1, "merge")
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the adapter from the base again, in place. Two roundings to the dtype of the base remain.

        Raises:
            RuntimeError: If the adapter is not merged.
        """
        if not self.merged:
            raise RuntimeError(f"{_NAME}.unmerge: the adapter is not merged, expected one that is")
        self._add_to_base(-1, "unmerge")
        self.merged = False

    def _add_to_base(self, sign: int, method: str) -> None:
        base, bias = self.base_layer, self.lora_B.bias
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
            found = f"a weight of {weight.dtype}" if isinstance(weight, Tensor) else "no weight"
            raise RuntimeError(f"{_NAME}.{method}: the base has {found}, expected a floating-point weight")
        a, b = self.lora_A.weight, self.lora_B.weight
        # The weight of transformers' Conv1D is transposed.
        transposed = not hasattr(base, "in_features")
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if weight.shape != shape:
            raise RuntimeError(
                f"{_NAME}.{method}: the base has a weight of shape {tuple(weight.shape)}, expected {shape}"
            )
        of_base = getattr(base, "bias", None)
        if bias is not None and of_base is None:
            raise RuntimeError(f"{_NAME}.{method}: the base has no bias, expected one for the adapter's to be added to")
        # (16-bit products are inexact, and slow on some CPUs.)
        wide = torch.promote_types(a.dtype, torch.float32)
        update = (b.to(wide) @ a.to(wide)) * self.scaling
        weight.add_((update.t() if transposed else update).to(weight.device), alpha=sign)
        if bias is not None and of_base is not None:
            of_base.add_((bias.to(wide) * self.scaling).to(of_base.device), alpha=sign)

    def extra_repr(self) -> str:
        """Formats the arguments for ``repr``."""
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, use_rslora={self.use_rslora}"


def _sizes(base: nn.Module) -> tuple[int, int]:
    """Sizes of the last dimension of a linear layer's input and result."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(base, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    raise ValueError(f"{_NAME}: base is a {type(base).__name__}, expected a module with in_features and out_features")
