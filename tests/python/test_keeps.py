"""The table of what ops save for backward, compared with what autograd saves."""

import lomem
import pytest
import torch
from lomem._trace import keeps
from torch.autograd.graph import saved_tensors_hooks

aten = torch.ops.aten


def rand(*shape):
    return torch.randn(shape)


HEADS = [rand(2, 4, 16, 64) for _ in range(3)]
SEQUENCES = [t.transpose(1, 2) for t in HEADS]
MASK = rand(2, 4, 16, 16)
CONVOLUTION = ([1], [0], [1], False, [0], 1)

#: By op: where it runs, its arguments and keyword arguments. Ops without a kernel for the CPU run on meta tensors, of
#: which autograd saves the same.
CALLS = {
    aten.linear: ("cpu", (rand(4, 5), rand(3, 5), rand(3)), {}),
    aten.mm: ("cpu", (rand(4, 5), rand(5, 3)), {}),
    aten.bmm: ("cpu", (rand(2, 4, 5), rand(2, 5, 3)), {}),
    aten.addmm: ("cpu", (rand(3), rand(4, 5), rand(5, 3)), {}),
    aten.baddbmm: ("cpu", (rand(2, 4, 3), rand(2, 4, 5), rand(2, 5, 3)), {}),
    aten.mv: ("cpu", (rand(4, 5), rand(5)), {}),
    aten.addmv: ("cpu", (rand(4), rand(4, 5), rand(5)), {}),
    aten.convolution: ("cpu", (rand(2, 3, 8), rand(4, 3, 3), rand(4), *CONVOLUTION), {}),
    aten._convolution: ("cpu", (rand(2, 3, 8), rand(4, 3, 3), rand(4), *CONVOLUTION, False, False, False, False), {}),
    aten._scaled_dot_product_flash_attention_for_cpu: ("cpu", (*HEADS, 0.0, False), {"attn_mask": MASK}),
    aten._scaled_dot_product_flash_attention: ("meta", tuple(HEADS), {}),
    aten._scaled_dot_product_efficient_attention: ("meta", (*HEADS, MASK, True), {}),
    aten._scaled_dot_product_cudnn_attention: ("meta", (*HEADS, MASK, True), {}),
    aten._scaled_dot_product_fused_attention_overrideable: ("meta", (*HEADS, MASK, 0.0, False, False), {}),
    aten._flash_attention_forward: ("meta", (*SEQUENCES, None, None, 16, 16, 0.0, False, False), {}),
    aten._efficient_attention_forward: ("meta", (*SEQUENCES, MASK, None, None, None, None, 0.0, 0, True), {}),
    aten._to_copy: ("cpu", (rand(4, 5),), {"dtype": torch.float64}),
    aten.clone: ("cpu", (rand(4, 5),), {}),
    aten.roll: ("cpu", (rand(4, 5), [1], [1]), {}),
    aten.native_dropout: ("cpu", (rand(4, 5), 0.5, True), {}),
    aten._fused_dropout: ("meta", (rand(4, 5), 0.5), {}),
}
#: Ops of the table that take tensors which have no storage to compare, and have a test of their own.
OTHERS = {aten.mkldnn_linear}
#: Operands that get no gradient, so that none of theirs can be asked for.
WITHOUT_GRADIENT = {
    aten._scaled_dot_product_flash_attention_for_cpu: {3},
    aten._scaled_dot_product_cudnn_attention: {3},
}


def saved_by(op, device, args, kwargs, needing):
    """Positions of the tensor arguments that are saved where some of them need a gradient."""
    count = 0

    def placed(value):
        nonlocal count
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.to(device, copy=True).requires_grad_(count in needing)
        count += 1
        return tensor

    args = [placed(value) for value in args]
    kwargs = {name: placed(value) for name, value in kwargs.items()}
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage()._cdata)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = op(*args, **kwargs)  # held, so that no address is used again
    assert result is not None
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    return {i for i, t in enumerate(tensors) if t.untyped_storage()._cdata in saved}, len(tensors)


def test_every_entry_is_tested():
    assert set(CALLS) | OTHERS == set(keeps.KEEPS)
    assert set(keeps.KEEPS) == {*keeps.PRODUCTS, *keeps.ATTENTION, *keeps.COPIES, *keeps.DROPOUTS}


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_an_entry_says_what_autograd_saves(op):
    device, args, kwargs = CALLS[op]
    positions = set(keeps.KEEPS[op])
    _, count = saved_by(op, device, args, kwargs, set())
    able = set(range(count)) - WITHOUT_GRADIENT.get(op, set())
    everything, _ = saved_by(op, device, args, kwargs, able)
    assert everything == positions
    for partner in positions & able:
        # Where one operand needs a gradient, all others of the entry are saved.
        saved, _ = saved_by(op, device, args, kwargs, {partner})
        assert saved >= positions - {partner}
        assert saved <= positions


def test_the_entry_of_mkldnns_linear_layer():
    x, weight, bias = rand(4, 5).to_mkldnn(), rand(3, 5), rand(3)
    for partner in (0, 1):
        operands = [t.detach().requires_grad_(i == partner) for i, t in enumerate((x, weight, bias))]
        saved = []
        with saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t):
            aten.mkldnn_linear(*operands)
        positions = {i for i, t in enumerate(operands) for s in saved if (s.shape, s.layout) == (t.shape, t.layout)}
        assert positions == set(keeps.KEEPS[aten.mkldnn_linear]) == {0, 1}


def test_memory_and_conversion_read_the_table():
    from lomem.conversion import flow, plan_norm
    from lomem.memory import _norms

    assert plan_norm.KEEPS is keeps.KEEPS
    assert plan_norm.saves_operands is _norms.saves_operands is keeps.saves_operands
    assert flow.COPIES is _norms.COPIES is keeps.COPIES
    assert _norms.DROPOUTS is keeps.DROPOUTS
    assert [name for module in (flow, plan_norm, _norms) for name in vars(module) if name.endswith("PRODUCTS")] == []


def test_saves_operands():
    assert keeps.saves_operands(aten.mm.default)
    assert keeps.saves_operands(aten._scaled_dot_product_flash_attention.default)
    assert not keeps.saves_operands(aten.clone.default)
    assert not keeps.saves_operands(aten.sin.default)
    assert lomem.memory is not None
