"""The backward op that every step activation shares, for all bit widths."""

import lomem
import pytest
import torch
from helpers import DTYPES, same_bits
from lomem import reference


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(bits, dtype, device):
    levels = torch.randn(2**bits, dtype=torch.float64).tolist()
    for n in [*range(20), 255, 256, 257, 70_001]:
        grad = torch.randn(n, device=device).to(dtype)
        codes = lomem.functional.pack_bits(torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device=device), bits)
        got = torch.ops.lomem.step_activation_backward(grad, codes, levels, bits)
        assert same_bits(got, reference.step_activation_backward(grad, codes, levels, bits)), n


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_codes_follow_row_major_order_whatever_the_strides(bits, device):
    levels = torch.randn(2**bits, dtype=torch.float64).tolist()
    codes = lomem.functional.pack_bits(torch.randint(0, 2**bits, (4, 6), dtype=torch.uint8, device=device), bits)
    grad = torch.randn(6, 4, device=device).t()
    want = torch.ops.lomem.step_activation_backward(grad.contiguous(), codes, levels, bits)
    assert torch.equal(torch.ops.lomem.step_activation_backward(grad, codes, levels, bits), want)
    strided = torch.stack([codes, codes], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(torch.ops.lomem.step_activation_backward(grad, strided, levels, bits), want)


def test_is_its_own_derivative(device):
    levels = torch.randn(8, dtype=torch.float64).tolist()
    codes = lomem.functional.pack_bits(torch.randint(0, 8, (21,), dtype=torch.uint8, device=device), 3)
    grad = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)

    def op(g):
        return torch.ops.lomem.step_activation_backward(g, codes, levels, 3)

    assert torch.autograd.gradcheck(op, grad)
    assert torch.autograd.gradgradcheck(op, grad)
