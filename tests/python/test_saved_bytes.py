"""What is kept for the backward pass, in bytes and shared storages."""

import gc
import weakref
from functools import partial

import lomem
import pytest
import torch
from helpers import ACTIVATIONS, DTYPES, LAYOUTS, make_input
from lomem.memory import saved_for_backward
from torch import nn


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_keeps_two_bits_an_element(name, dtype, device):
    op = ACTIVATIONS[name].op
    for n in [*range(10), 1000, 1001, 1002, 1003]:
        x = torch.randn(n, device=device).to(dtype).requires_grad_()
        with saved_for_backward() as saved:
            y = op(x)
        assert (saved.nbytes, saved.tensors) == ((n + 3) // 4, 1), n
        assert y.requires_grad


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_activation_keeps_two_bits_an_element_in_every_layout(name, layout, device):
    x = make_input(layout, torch.float32, device).requires_grad_()
    with saved_for_backward() as saved:
        ACTIVATIONS[name].op(x)
    assert (saved.nbytes, saved.tensors) == ((x.numel() + 3) // 4, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("make", [lomem.nn.MSLayerNorm, lomem.nn.MSRMSNorm])
def test_a_norm_keeps_its_output_and_one_float_a_row(make, affine, dtype, device):
    norm = make((3, 8), elementwise_affine=affine, device=device, dtype=dtype)
    x = torch.randn(5, 2, 3, 8, device=device).to(dtype).requires_grad_()
    with saved_for_backward(norm.parameters()) as saved:
        y = norm(x)
    rstd_size = 8 if dtype == torch.float64 else 4
    assert saved.nbytes == y.numel() * y.element_size() + 10 * rstd_size
    assert y.untyped_storage()._cdata in {s._cdata for s in saved.storages}
    assert len(saved.storages) == 2


@pytest.mark.parametrize(
    "make",
    [partial(lomem.nn.MSLayerNorm, 8), partial(lomem.nn.MSRMSNorm, 8), *(a.module for a in ACTIVATIONS.values())],
    ids=["layer", "rms", *ACTIVATIONS],
)
def test_nothing_is_kept_without_gradient(make, device):
    module = make()
    x = torch.randn(4, 8, device=device)
    with saved_for_backward() as saved:
        module(x)
        with torch.no_grad():
            module(x.clone().requires_grad_())
        with torch.inference_mode():
            module(x)
    assert saved.tensors == 0


# Norms and what consumes them. The unit of `want` is one bf16 copy of the activation; the figures are
# those of the storages of activation size: rstd and casts of weights are told apart by their size.

ROWS, WIDTH = 40, 32


class Consumers(nn.Module):
    """Linear layers on one tensor, as q, k and v are."""

    def __init__(self, count, dtype=None, frozen=False):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(count))
        if frozen:
            self.requires_grad_(False)

    def forward(self, x):
        return sum(linear(x) for linear in self.linears)


class PeftLinear(nn.Module):
    """A frozen linear layer with a low-rank one beside it, whose input is cast to its weights' dtype."""

    def __init__(self, dtype=None, dropout=0.0):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.a = nn.Linear(WIDTH, 4, bias=False)
        self.b = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        lora = self.b(self.a(self.dropout(x.to(self.a.weight.dtype))))
        return self.base(x) + lora.to(x.dtype)


def adapted(dtype=None):
    """The same by lomem."""
    return lomem.nn.LoRALinear(nn.Linear(WIDTH, WIDTH, dtype=dtype), 4)


def activation_copies(norm, consumers, x, autocast):
    """bf16 copies of the activation that norm and consumers keep together, input included."""
    parameters = [*norm.parameters(), *consumers.parameters()]
    with (
        saved_for_backward(parameters) as saved,
        torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast),
    ):
        consumers(norm(x)).sum().backward()
    unit = ROWS * WIDTH * 2
    return sum(s.nbytes() for s in saved.storages if s.nbytes() in (unit, 2 * unit)) / unit, saved


CASES = {
    # name: consumers, dtype of the residual stream, autocast, copies with torch's norm, with lomem's
    "AMP, one trainable linear": (lambda: Consumers(1), torch.float32, True, 3, 1),
    "AMP, q/k/v trainable": (lambda: Consumers(3), torch.float32, True, 5, 1),
    "bf16": (lambda: Consumers(3, torch.bfloat16), torch.bfloat16, False, 2, 1),
    "AMP, frozen linear": (lambda: Consumers(1, frozen=True), torch.float32, True, 2, 1),
    # torch keeps its fp32 input; peft's cast makes an fp32 output serve both the norm and itself.
    "AMP, peft casts to fp32": (PeftLinear, torch.float32, True, 3, 2),
    # Here the fp32 cast that peft's linear keeps is as large as what is shared: no gain.
    "bf16 base, fp32 LoRA": (lambda: PeftLinear(torch.bfloat16), torch.bfloat16, False, 3, 3),
    # lomem's adapters keep no cast. Under AMP, torch's norm emits fp32.
    "bf16 base, lomem's fp32 LoRA": (lambda: adapted(torch.bfloat16), torch.bfloat16, False, 2, 1),
    "AMP, lomem's LoRA": (adapted, torch.float32, True, 4, 1),
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("case", CASES)
def test_the_norm_output_is_shared(case, kind, affine, device):
    make_consumers, dtype, autocast, plain_copies, ours_copies = CASES[case]
    ours = lomem.nn.MSLayerNorm if kind == "layer" else lomem.nn.MSRMSNorm
    plain = nn.LayerNorm if kind == "layer" else nn.RMSNorm
    x = torch.randn(ROWS, WIDTH, device=device).to(dtype).requires_grad_()
    consumers = make_consumers().to(device)

    norm = ours(WIDTH, elementwise_affine=affine, device=device, dtype=dtype)
    got, saved = activation_copies(norm, consumers, x, autocast)
    assert got == ours_copies
    # One float a row beside it.
    assert ROWS * 4 in [s.nbytes() for s in saved.storages]

    if kind == "layer":
        theirs = plain(WIDTH, elementwise_affine=affine, device=device, dtype=dtype)
        assert activation_copies(theirs, consumers, x, autocast)[0] == plain_copies


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_q_k_v_under_autocast_keep_one_storage(kind, device):
    """The promise in full: one bf16 storage, one float a row, and the casts of the three weights."""
    norm = (lomem.nn.MSLayerNorm if kind == "layer" else lomem.nn.MSRMSNorm)(WIDTH).to(device)
    consumers = Consumers(3).to(device)
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    with saved_for_backward(consumers.parameters()) as saved, torch.autocast(device.type, dtype=torch.bfloat16):
        y = norm(x)
        consumers(y)
    assert y.dtype == torch.bfloat16
    weight_casts = 3 * WIDTH * WIDTH * 2
    assert saved.nbytes - weight_casts == ROWS * WIDTH * 2 + ROWS * 4
    assert y.untyped_storage()._cdata in {s._cdata for s in saved.storages}


def test_dropout_between_breaks_the_sharing_by_its_own_copy_only(device):
    # y for the norm, the dropped copy for the linear, and dropout's mask.
    norm = lomem.nn.MSLayerNorm(WIDTH).to(device)
    consumers = nn.Sequential(nn.Dropout(0.1), Consumers(1)).to(device)
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    with saved_for_backward(consumers.parameters()) as saved, torch.autocast(device.type, dtype=torch.bfloat16):
        consumers(norm(x))
    unit = ROWS * WIDTH * 2
    # On the CPU dropout's mask has the activation's dtype, elsewhere it is bool: half a unit.
    assert sum(s.nbytes() == unit for s in saved.storages) == (3 if device.type == "cpu" else 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_keeps_one_bit_an_element(dtype, device):
    for n in [*range(10), 1000, 1001, 1007]:
        x = torch.randn(n, device=device).to(dtype).requires_grad_()
        with saved_for_backward() as saved:
            lomem.functional.dropout(x, 0.1)
        assert (saved.nbytes, saved.tensors) == ((n + 7) // 8, 1), n
        with saved_for_backward() as saved:
            lomem.functional.dropout(x, 0.1, saves="seed")
        assert (saved.nbytes, saved.tensors) == (8, 1), n


def test_float32_output_on_request(device):
    # For a post-LN residual stream: no loss of digits, and what linears keep is theirs again.
    norm = lomem.nn.MSLayerNorm(WIDTH, output_dtype=torch.float32).to(device)
    x = torch.randn(ROWS, WIDTH, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32


def test_saved_for_backward_counts_storages_once(device):
    x = torch.randn(10, device=device, requires_grad=True)
    with saved_for_backward() as saved:
        x.sin()
        x.cos()
    assert (saved.nbytes, saved.tensors, len(saved.storages)) == (40, 2, 1)
    with saved_for_backward([x]) as saved:
        x.sin()
    assert (saved.nbytes, saved.tensors) == (0, 0)


def test_saved_for_backward_nests_and_frees(device):
    x = torch.randn(8, device=device, requires_grad=True)
    with saved_for_backward() as outer:
        lomem.functional.gelu(x, bits=2)
        with saved_for_backward() as inner:
            lomem.functional.gelu(x, bits=2)
        lomem.functional.gelu(x, bits=2)
    assert (outer.nbytes, inner.nbytes) == (6, 2)
    failed = saved_for_backward()
    with pytest.raises(RuntimeError, match="normalized_shape"), failed:
        lomem.functional.ms_layer_norm(lomem.functional.gelu(x, bits=2), (7,))
    assert failed.nbytes == 2
    lomem.functional.gelu(x, bits=2)
    assert (outer.nbytes, failed.nbytes) == (6, 2)
    # Without the garbage collector: no reference cycle holds the storages.
    gc.disable()
    try:
        reference = weakref.ref(outer)
        del outer
        assert reference() is None
    finally:
        gc.enable()


def test_saved_for_backward_counts_sparse_tensors(device):
    sparse = torch.eye(4, device=device).to_sparse()
    dense = torch.randn(4, 3, device=device, requires_grad=True)
    with saved_for_backward([dense]) as saved:
        torch.sparse.mm(sparse, dense)
    # 4 values of 4 bytes and 2 x 4 indices of 8.
    assert saved.nbytes == 4 * 4 + 8 * 8
    with saved_for_backward([sparse, dense]) as saved:
        torch.sparse.mm(sparse, dense)
    assert saved.nbytes == 0
