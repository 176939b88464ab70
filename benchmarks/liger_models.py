"""Tiny models with Liger-Kernel's layers, on the CPU as well: for liger_bytes.py and tests/python/test_liger.py.

Without a GPU, Triton's interpreter runs the kernels. It has to be chosen before triton is imported, and lacks some of
what the kernels use, which is added here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import lomem
import torch

#: What Liger-Kernel computes, by the title of a row: names of its options, with "mlp" for swiglu or geglu.
PATCHES: dict[str, set[str]] = {
    "nothing": set(),
    "norms": {"rms_norm"},
    "gated MLP": {"mlp"},
    "loss": {"fused_linear_cross_entropy"},
    "all, rotary embeddings too": {"rope", "rms_norm", "mlp", "fused_linear_cross_entropy"},
}
#: The name of its option for the gated MLP, by the kind of model.
KINDS = {"llama": "swiglu", "gemma": "geglu"}
VOCABULARY = 96
INTERPRET = {"TRITON_INTERPRET": "1"}


def load() -> str:
    """Imports Liger-Kernel, on the CPU with Triton's interpreter; returns why that does not work, or nothing."""
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install --no-deps liger-kernel, beside a build of torch with Triton"
    # Whether to interpret is decided when functions are decorated, and again where others are. Other programs and tests
    # decide for themselves.
    with mock.patch.dict(os.environ, {} if torch.cuda.is_available() or "triton" in sys.modules else INTERPRET):
        importlib.import_module("liger_kernel.transformers")
        triton = importlib.import_module("triton")
    if not torch.cuda.is_available() and isinstance(triton.language.sigmoid, triton.JITFunction):
        return "needs a GPU or Triton's interpreter, and triton was imported before without TRITON_INTERPRET=1"
    return ""


@contextlib.contextmanager
def interpreter(*, seen: bool) -> Iterator[None]:
    """Gives Triton's interpreter what Liger-Kernel's kernels need of it: numbers as tensors, and two functions.

    Args:
        seen: Whether torch's modes see what it does. They see nothing of kernels on a GPU. But lomem.convert tries
            norms in which it sees nothing strange on many inputs, which takes a minute here.
    """
    if torch.cuda.is_available():
        yield
        return
    import liger_kernel.ops.geglu
    import liger_kernel.ops.layer_norm
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter as interpreted

    convert, call = interpreted._implicit_cvt, interpreted.GridExecutor.__call__

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreted.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    def called(*args: Any, **options: Any) -> Any:
        with contextlib.nullcontext() if seen else _disable_current_modes():
            return call(*args, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, INTERPRET))
        stack.enter_context(mock.patch.object(interpreted, "_implicit_cvt", converted))
        stack.enter_context(mock.patch.object(interpreted.GridExecutor, "__call__", called))
        # These are of CUDA's library.
        for module in (liger_kernel.ops.rms_norm, liger_kernel.ops.layer_norm):
            stack.enter_context(mock.patch.object(module, "rsqrt", lambda x: tl.rsqrt(x)))
        stack.enter_context(mock.patch.object(liger_kernel.ops.geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1))
        yield


@contextlib.contextmanager
def patched(
    kind: str, patch: str, *, lora: bool = False, classes: bool = False, bits: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """A model that Liger-Kernel has patched, and a batch. Its patches of transformers last as long as the block.

    Args:
        kind: Of the model, in ``KINDS``.
        patch: What is patched, in ``PATCHES``.
        lora: Whether only adapters are trained.
        classes: Whether the classes are patched before the model is made, or else the model.
        bits: Of lomem.convert, if the model is to be converted before it is patched.
    """
    import transformers
    from transformers.models.gemma import modeling_gemma
    from transformers.models.llama import modeling_llama

    sources = {"llama": modeling_llama, "gemma": modeling_gemma}
    name = f"{kind.capitalize()}ForCausalLM"
    made = getattr(sources[kind], name)
    with (
        interpreter(seen="rms_norm" in PATCHES[patch]) if PATCHES[patch] else contextlib.nullcontext(),
        mock.patch.dict(vars(sources[kind])),
        mock.patch.object(made, "forward", made.forward),
    ):
        if classes:
            apply(kind, patch)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        config = getattr(transformers, f"{kind.capitalize()}Config")(**sizes, **heads, use_cache=False)
        model = made(config).train()
        if lora:
            model = adapted(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ids = torch.randint(0, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1)).to(device)
        model, batch = model.to(device), {"input_ids": ids, "labels": ids}
        if bits is not None:
            lomem.convert(model, batch, bits=bits, gradients=False)
        if not classes:
            apply(kind, patch, model.get_base_model() if lora else model)
        yield model, batch


def adapted(model: Any) -> Any:
    """The model with LoRA on all linear layers but the last."""
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # (By default, LoRA's second matrices start at 0, and then the first have no gradients.)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))


def apply(kind: str, patch: str, model: Any = None) -> None:
    """Patches a model, or the classes of its kind, as Liger-Kernel's documentation says."""
    if not PATCHES[patch]:
        return
    import liger_kernel.transformers as liger

    chosen = {KINDS[kind] if name == "mlp" else name for name in PATCHES[patch]}
    names = ("rope", "rms_norm", KINDS[kind], "fused_linear_cross_entropy")
    options: dict[str, Any] = {name: name in chosen for name in names}
    getattr(liger, f"apply_liger_kernel_to_{kind}")(**options, model=model)
