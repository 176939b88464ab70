"""Makes ops on fake CPU tensors save what they would save on a real device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["CudaLike", "FakeDevice", "is_looked_at"]

#: Ops whose second and third results are statistics, such as the mean and rstd.
_NORMS = (
    "aten::native_layer_norm",
    "aten::native_group_norm",
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_batch_norm_with_update",
)

# fmt: off
#: Under autocast, CUDA computes these in float32, and the CPU in the dtype of their inputs. See ATen/autocast_mode.h.
_FLOAT32 = frozenset((
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "acos", "asin", "cosh", "exp", "expm1", "log",
    "log10", "log1p", "log2", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "sinh", "softplus", "tan",
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy_with_logits", "cosine_similarity", "cosine_embedding_loss", "hinge_embedding_loss",
    "margin_ranking_loss", "multilabel_margin_loss", "multi_margin_loss", "poisson_nll_loss", "soft_margin_loss",
    "triplet_margin_loss", "cdist", "dist", "logsumexp", "renorm", "interpolate",
))
# fmt: on
#: These read 16-bit inputs without a copy, and compute in float32.
_FLOAT32_RESULT = frozenset(["softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"])


_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default


def is_looked_at(value: Any) -> bool:
    """Whether models may read the value: small integer and bool tensors, such as token ids and masks."""
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        return False
    return value.numel() <= 2**20  # larger ones, such as the mask of a long sequence, take time and memory


class FakeDevice(TorchDispatchMode):
    """Mode that corrects the results of a fake mode on CPU tensors, to match the CPU or CUDA.

    - Small integers and bools that depend on no fake tensor are computed. For example, whether transformers makes an
      attention mask depends on the values of the padding mask.
    - The statistics of norms of 16-bit tensors get their real dtype: float32 on CUDA, and on the CPU if the weight is
      float32. The fake mode gives them the input's dtype.
    - The gradient of a norm's input gets the input's dtype. The fake mode gives it the weight's.

    Args:
        mode: The active fake mode.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, mode: FakeTensorMode, device: str) -> None:
        super().__init__()
        self._mode, self._cuda = mode, device == "cuda"

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return getattr(args[0], "fake_device", None) or func(*args, **kwargs)
        known = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in known) and (
            func is _ITEM or (all(map(is_looked_at, known)) and self._makes_integers(func, args, kwargs))
        ):
            with _disable_current_modes():
                return func(*args, **kwargs)
        results = func(*args, **kwargs)
        wide = self._cuda or any(tensor.dtype == torch.float32 for tensor in known)
        name = func._schema.name
        if wide and name in _NORMS and _is_short(args[0]):
            return (results[0], *map(_float, results[1:3]), *results[3:])
        if name.removesuffix("_backward") in _NORMS and name not in _NORMS and results[0] is not None:
            return (results[0].to(args[1].dtype), *results[1:])
        return results

    def _makes_integers(self, func: torch._ops.OpOverload, args: Any, kwargs: Any) -> bool:
        # On fake tensors, since the op may write to its arguments.
        args, kwargs = tree_map_only(Tensor, self._mode.from_tensor, (args, kwargs))
        results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
        return bool(results) and all(t.device.type == "cpu" and is_looked_at(t) for t in results)


class CudaLike(TorchFunctionMode):
    """Mode in which functions of fake CPU tensors run the ops that CUDA tensors would.

    Dropout saves a bool mask; scaled dot product attention uses the flash kernel (16 bits, no mask) or the efficient
    one; RMS norm is one op; under autocast, functions that CUDA's autocast runs in float32 run in float32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in _FLOAT32:
                args, kwargs = tuple(map(_float, args)), {key: _float(value) for key, value in kwargs.items()}
            elif name in _FLOAT32_RESULT and _is_short(args[0] if args else kwargs.get("input")):
                kwargs = {**kwargs, "dtype": kwargs.get("dtype") or torch.float32}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.dropout:
            return _dropout(*args, **kwargs)
        if name == "rms_norm":
            return _rms_norm(*args, **kwargs)
        # types lists the classes of arguments that override __torch_function__.
        body = None if types else _body(func)
        if body is None:
            return func(*args, **kwargs)
        with self:
            return body(*args, **kwargs)


#: Functions written in Python call these first, and hand themselves to the mode if the result is True.
_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@functools.cache
def _body(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of a function written in Python that ignores modes, so that the mode can be on for the functions it calls.

    This makes visible the attention in ``multi_head_attention_forward``, and what a backward pass recomputes.
    """
    known = getattr(func, "__module__", None) == F.__name__ or func in (Tensor.backward, torch.autograd.backward)
    if not known or not isinstance(func, FunctionType):
        return None
    names = {**func.__globals__, **dict.fromkeys(_QUESTIONS, lambda *args: False)}
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _is_short(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _float(value: Any) -> Any:
    return value.float() if _is_short(value) else value


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    # The condition in at::native::dropout for CUDA tensors.
    if train and 0 < p < 1 and input.numel() > 0:
        return torch.native_dropout(input, p, True)[0]
    return torch.dropout(input, p, train)


class _FusedRMSNorm(torch.autograd.Function):
    """Saves what aten::_fused_rms_norm saves, which the CPU runs as a chain of other ops. Results are empty (fake)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, normalized_shape: list[int], weight: Tensor | None) -> Tensor:
        rows = input.shape[: input.dim() - len(normalized_shape)]
        statistics = torch.float64 if input.dtype == torch.float64 else torch.float32
        ctx.save_for_backward(input, input.new_empty(rows, dtype=statistics), weight)
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weight = ctx.saved_tensors
        needed = zip((x, None, weight), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if need else None for tensor, need in needed)


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if weight is not None and weight.dtype != input.dtype:
        return torch.rms_norm(input, normalized_shape, weight, eps)
    return _FusedRMSNorm.apply(input, normalized_shape, weight)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) if t.is_floating_point() else t for t in (query, key, value))
    rows, columns, width = query.shape[-2], key.shape[-2], query.shape[-1]
    fused = query.dim() == key.dim() == value.dim() == 4 and width == value.shape[-1] and width % 8 == 0
    short = _is_short(query)
    if fused and short and attn_mask is None and width <= 256 and (rows == columns or not is_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if not fused or query.dtype == torch.float64 or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None:
        attn_mask = _bias(attn_mask, query, columns)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Tensor, query: Tensor, columns: int) -> Tensor:
    """The mask for the efficient kernel: in the query's dtype, with aligned rows, expanded without using memory."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, float("-inf"))
    if columns % 16:
        mask = F.pad(mask, (0, 16 - columns % 16))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], columns)
