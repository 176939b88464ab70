"""Packing against a bit-by-bit oracle in Python integers."""

import lomem
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lomem import reference


def pack_as_integer(codes, bits):
    """The layout's definition: one long little-endian integer."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(stream.to_bytes((bits * len(codes) + 7) // 8, "little"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_of_every_size(bits, device):
    for n in range(131):
        codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, device=device)
        packed = lomem.functional.pack_bits(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == pack_as_integer(codes.tolist(), bits)
        assert torch.equal(reference.pack_bits(codes, bits), packed)
        unpacked = lomem.functional.unpack_bits(packed, bits, n)
        assert unpacked.dtype == torch.uint8
        assert torch.equal(unpacked, codes)
        assert torch.equal(reference.unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_byte_unpacks(bits, device):
    packed = torch.arange(256, dtype=torch.int16).to(torch.uint8).repeat_interleave(bits).to(device)
    n = 256 * 8
    codes = lomem.functional.unpack_bits(packed, bits, n)
    assert torch.equal(codes, reference.unpack_bits(packed, bits, n))
    assert torch.equal(lomem.functional.pack_bits(codes, bits), packed)


@settings(deadline=None, max_examples=50)
@given(bits=st.integers(1, 8), n=st.integers(0, 200_000), seed=st.integers(0, 2**31))
def test_round_trip(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = lomem.functional.pack_bits(codes, bits)
    assert packed.numel() == (bits * n + 7) // 8
    assert torch.equal(lomem.functional.unpack_bits(packed, bits, n), codes)


def test_any_shape_and_strides(device):
    codes = torch.randint(0, 8, (5, 6), dtype=torch.uint8, device=device)
    want = lomem.functional.pack_bits(codes.flatten(), 3)
    assert torch.equal(lomem.functional.pack_bits(codes, 3), want)
    assert torch.equal(lomem.functional.pack_bits(codes.t(), 3), lomem.functional.pack_bits(codes.t().flatten(), 3))
    strided = torch.stack([want, want], dim=1)[:, 0]
    assert torch.equal(lomem.functional.unpack_bits(strided, 3, 30), codes.flatten())


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("position", [0, 7, 99_999])
def test_codes_that_do_not_fit_are_refused(bits, position):
    codes = torch.zeros(100_000, dtype=torch.uint8)
    codes[position] = 2**bits
    with pytest.raises(
        ValueError,
        match=f"lomem::pack_bits: codes has the value {2**bits}, expected at most {2**bits - 1} for {bits} bits",
    ):
        lomem.functional.pack_bits(codes, bits)


def test_names_of_lowmemorybp(device):
    flags = torch.rand(3, 7, device=device) > 0.5
    packed = lomem.functional.pack_bool_to_uint8(flags)
    assert packed.tolist() == pack_as_integer(flags.flatten().int().tolist(), 1)
    assert torch.equal(lomem.functional.unpack_uint8_to_bool(packed, (3, 7)), flags)
    assert torch.equal(lomem.functional.unpack_uint8_to_bool(packed, [7, 3]), flags.reshape(7, 3))
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32, expected torch\.bool"):
        lomem.functional.pack_bool_to_uint8(torch.ones(3))
