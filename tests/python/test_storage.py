"""Storage in groups: bytes of the reference, errors of at most one step, and no bias."""

import itertools
import math

import lomem
import pytest
import torch
from helpers import DTYPES, LAYOUTS, all_patterns, make_input, same_bits
from lomem import reference
from torch.func import vmap

LF = lomem.functional
ops = torch.ops.lomem
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)
of_bits = pytest.mark.parametrize("bits", [8, 4])
of_roundings = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 130, 255, 256, 257, 383, 1000, 1025, 4099)
INF, NAN = float("inf"), float("nan")


def arguments(rounding, device, number=0x123456789ABCDEF, offset=3):
    """Keyword arguments of a rounding with a given seed."""
    if rounding == "nearest":
        return {"rounding": "nearest"}
    return {"rounding": "stochastic", "seed": torch.tensor(number, device=device), "offset": offset}


def assert_is_reference(x, bits, options, group_size=128):
    """Bytes of both ops; returns the result of the round trip, in the dtype and memory order of x."""
    got = LF.quantize_groups(x, bits, **options, group_size=group_size)
    want = reference.quantize_groups(x, bits, **options, group_size=group_size)
    n = x.numel()
    assert (got[0].dtype, got[0].shape) == (torch.uint8, ((n * bits + 7) // 8,))
    assert (got[1].dtype, got[1].shape) == (torch.bfloat16, (-(-n // group_size),))
    assert same_bits(got[1], want[1])
    assert torch.equal(got[0], want[0])
    dense = torch.empty_like(x)
    stride = dense.stride() if dense.stride() == x.stride() else None
    dither = {name: value for name, value in options.items() if name != "rounding"}
    for dtype, more in itertools.product(DTYPES, [{}, dither] if dither else [{}]):
        layout = {"stride": stride, "group_size": group_size}
        value = LF.dequantize_groups(*got, x.shape, dtype, bits, **layout, **more)
        expected = reference.dequantize_groups(*want, x.shape, dtype, bits, **layout, **more)
        assert value.stride() == expected.stride()
        assert torch.equal(value.isnan(), expected.isnan())
        assert same_bits(value.nan_to_num(0, INF, -INF), expected.nan_to_num(0, INF, -INF))
    return LF.dequantize_groups(*got, x.shape, x.dtype, bits, stride=stride, group_size=group_size), got[1]


@of_dtypes
@of_bits
@of_roundings
def test_sizes(rounding, bits, dtype, device):
    for n in SIZES:
        assert_is_reference(torch.randn(n, device=device).to(dtype), bits, arguments(rounding, device, offset=n))


@of_dtypes
@of_bits
@of_roundings
def test_groups(rounding, bits, dtype, device):
    for group_size in (16, 32, 64, 128, 256, 512, 1024):
        for n in (group_size - 1, group_size + 1, 3000):
            x = torch.randn(n, device=device).to(dtype)
            assert_is_reference(x, bits, arguments(rounding, device), group_size)


@of_dtypes
@of_layouts
@of_bits
@of_roundings
def test_layouts(rounding, bits, layout, dtype, device):
    x = make_input(layout, dtype, device)
    value, _ = assert_is_reference(x, bits, arguments(rounding, device))
    # Each element is at its place: within a step of the largest.
    step = float(x.abs().max()) / (127 if bits == 8 else 7) * 1.01 if x.numel() else 0
    assert bool(((value - x).abs() <= step + x.abs() * 0.01).all())


@of_layouts
def test_memory_order(layout, device):
    """A dense tensor's codes are those of its memory; those of other tensors, of a contiguous copy."""
    x = make_input(layout, torch.float32, device)
    options = arguments("stochastic", device)
    dense = torch.empty_like(x).stride() == x.stride() and x.numel() > 0
    flat = x.as_strided((x.numel(),), (1,)) if dense else x.reshape(-1)
    for got, want in zip(LF.quantize_groups(x, **options), LF.quantize_groups(flat, **options), strict=True):
        assert same_bits(got, want)


@of_bits
@of_roundings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_patterns(dtype, rounding, bits, device):
    """All numbers of a dtype, in groups of similar size and mixed."""
    x = all_patterns(dtype, device)
    for numbers in (x, x.reshape(256, 256).t().contiguous(), x[torch.randperm(65536)]):
        assert_is_reference(numbers, bits, arguments(rounding, device))
    finite = x[x.isfinite()]
    assert finite.numel() % 128 == 0
    value, scales = assert_is_reference(finite, bits, arguments(rounding, device))
    assert_within_a_step(finite, value, scales, rounding)


def assert_within_a_step(x, value, scales, rounding, group_size=128):
    """Off by half a scale, or a whole one, besides roundings."""
    step = scales.double().repeat_interleave(group_size)[: x.numel()]
    error = (value.double() - x.double()).abs()
    # The scaled element is rounded twice in float32, the value once in the dtype; float16 may be subnormal there.
    rounding_error = x.double().abs() * 2**-22 + value.double().abs() * torch.finfo(x.dtype).eps / 2
    rounding_error += 2**-25 if x.dtype == torch.float16 else 0
    assert value.isfinite().all()
    assert bool((error <= step * (0.5 if rounding == "nearest" else 1) + rounding_error).all())


@of_dtypes
@of_bits
@of_roundings
def test_errors_are_at_most_a_step(rounding, bits, dtype, device):
    """Nothing is clipped, at any size of numbers."""
    scales = (1e-5, 1.0, 1e3) if dtype == torch.float16 else (1e-44, 1e-40, 1e-38, 1e-30, 1.0, 1e30)
    for scale in scales:
        x = (torch.randn(5000, device=device, dtype=torch.float64) * scale).to(dtype)
        value, steps = assert_is_reference(x, bits, arguments(rounding, device))
        assert_within_a_step(x, value, steps, rounding)
        # A bfloat16 scale is up to 1/128 above the quotient, if it is not the smallest one.
        largest = x.double().abs().reshape(-1, 50).amax()
        assert steps.double().max() <= max(float(largest) / (127 if bits == 8 else 7) * (1 + 2**-7), 2**-126)


@of_dtypes
@of_bits
@of_roundings
def test_special_values(rounding, bits, dtype, device):
    """An infinity or NaN takes its group with it, and no other."""
    options = arguments(rounding, device)
    for special in (INF, -INF, NAN):
        x = torch.randn(300, device=device).to(dtype)
        x[130] = special
        value, scales = assert_is_reference(x, bits, options)
        assert value[128:256].isnan().all()
        assert value[:128].isfinite().all()
        assert value[256:].isfinite().all()
        assert scales.isnan().tolist() == [False, True, False]
    zeros = torch.tensor([0.0, -0.0] * 100, device=device).to(dtype)
    value, scales = assert_is_reference(zeros, bits, options)
    assert same_bits(value, torch.zeros_like(zeros))
    assert not scales.any()
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    x = torch.tensor([largest, -largest, largest / 3, 0.0], device=device, dtype=torch.float64).to(dtype)
    value, scales = assert_is_reference(x, bits, options)
    assert value.isfinite().all()
    assert_within_a_step(x, value, scales, rounding)


def test_doubles_beyond_float32(device):
    for number in (1e300, -1e39, 3.4028236e38):
        x = torch.tensor([1.0, number], device=device, dtype=torch.float64)
        value, _ = assert_is_reference(x, 8, {"rounding": "nearest"})
        assert value.isnan().all()
    x = torch.tensor([1.0, 3.4028235e38], device=device, dtype=torch.float64)
    value, scales = assert_is_reference(x, 8, {"rounding": "nearest"})
    assert_within_a_step(x, value, scales, "nearest")
    # (Seven times the scale is beyond float32.)
    value, _ = assert_is_reference(x, 4, {"rounding": "nearest"})
    assert value[1] == torch.finfo(torch.float32).max
    tiny = torch.tensor([1e-300, -1e-60], device=device, dtype=torch.float64)
    value, _ = assert_is_reference(tiny, 8, {"rounding": "nearest"})
    assert not value.any()


@of_bits
def test_other_dtypes_of_the_result(bits, device):
    """A tensor may come back in a smaller dtype, whose largest number is the limit."""
    x = torch.tensor([1e6, -1e6, 3.0], device=device)
    value = LF.dequantize_groups(*LF.quantize_groups(x, bits, rounding="nearest"), (3,), torch.float16, bits)
    assert value.tolist() == [65504.0, -65504.0, 0.0]


# Statistics. A mean of independent roundings is 5 standard errors away from its expectation with a probability of 6e-7.
# The seeds are fixed, so that a test that passes passes again.
DEVIATIONS = 5


@of_dtypes
@of_bits
def test_is_unbiased(bits, dtype, device):
    """Means over seeds, and over copies of a group, of each of 128 elements, some of them next to the largest."""
    n, copies, seeds = 128, 50, 100
    x = torch.randn(n, device=device, dtype=torch.float64).clamp(-2, 2).to(dtype)
    x[:4] = torch.tensor([2.0, -1.999, 1.9, 0.01], device=device, dtype=torch.float64).to(dtype)
    total = torch.zeros(n, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for number in range(seeds):
        codes, scales = LF.quantize_groups(x.repeat(copies), bits, seed=torch.tensor(number, device=device))
        assert bool((scales == scales[0]).all())
        value = LF.dequantize_groups(codes, scales, (copies, n), torch.float64, bits)
        total += value.sum(0)
        squares += value.square().sum(0)
    step, count = float(scales[0]), copies * seeds
    mean = total / count
    deviation = ((squares / count - mean.square()).clamp(min=0) / count).sqrt()
    assert bool(((mean - x.double()).abs() <= DEVIATIONS * deviation + step * 2**-16).all())


@of_dtypes
@of_bits
def test_subtracted_dither(bits, dtype, device):
    """The error is uniform, half a step each way, whatever the element is; its mean is 0."""
    n = 128 * 2000
    x = torch.randn(n, device=device, dtype=torch.float64).to(dtype)
    x[::8] = 0  # where codes alone have no error
    options = arguments("stochastic", device)
    codes, scales = LF.quantize_groups(x, bits, **options)
    options.pop("rounding")
    value = LF.dequantize_groups(codes, scales, (n,), torch.float64, bits, **options)
    error = (value - x.double()) / scales.double().repeat_interleave(128)
    # Scaled elements are rounded twice in float32.
    assert error.abs().max() <= 0.5 + 2**-14
    # Chi-square of 64 bins, with 63 degrees of freedom: 5 standard deviations above its mean.
    parts = {
        "all": error,
        "zeros": error[::8],
        "small": error[x.abs() < 0.5],
        "large": error[x.abs() > 1.5],
        "positive": error[x > 0],
        "the largest": error.view(-1, 128).gather(1, x.abs().view(-1, 128).max(1, keepdim=True)[1]).flatten(),
    }
    for name, part in parts.items():
        counts = torch.histc(part.float(), 64, -0.5, 0.5)
        expected = part.numel() / 64
        assert ((counts - expected).square() / expected).sum() < 63 + 5 * (2 * 63) ** 0.5, name
        assert abs(part.mean()) < 5 / (12 * part.numel()) ** 0.5, name
        assert abs(part.square().mean() * 12 - 1) < 5 * (0.8 / part.numel()) ** 0.5, name
    # Uncorrelated with the element, its neighbour and the neighbour's error.
    for other in (x.double(), x.double().roll(1), error.roll(1), error.roll(8)):
        centred = other - other.mean()
        correlation = (error * centred).mean() / (error.square().mean() * centred.square().mean()).sqrt()
        assert abs(correlation) < 5 / n**0.5


def rounded_up(x, seed, offset=0):
    """Which elements of x = k + 1/2 are rounded up, by the kernels. The first is the largest, and an integer."""
    codes, scales = LF.quantize_groups(x, seed=torch.tensor(seed, device=x.device), offset=offset)
    assert scales.eq(1).all()
    return codes.view(torch.int8).double() > x


def halves(n, device):
    """Numbers k + 1/2 in groups whose scale is 1."""
    x = torch.full((n,), 3.5, device=device)
    x[::128] = 127
    return x


def test_random_bits_are_independent(device):
    """Of neighbors, of seeds and of offsets: each is rounded up half of the time, two of them a quarter."""
    n = 2**17
    x = halves(n, device)
    inside = torch.arange(n, device=device) % 128 != 0

    def assert_frequency(events, q):
        count = events.numel()
        assert abs(int(events.sum()) - count * q) < DEVIATIONS * math.sqrt(count * q * (1 - q)) + 1

    base = rounded_up(x, 5)
    assert_frequency(base[inside], 0.5)
    for distance in (1, 2, 3, 4, 5, 7, 8, 16, 64, 1024):
        both = inside[distance:] & inside[:-distance]
        assert_frequency((base[distance:] & base[:-distance])[both], 0.25)
    for seed, offset in ((6, 0), (5, 1), (5, 2**32), (5, 2**62), (5 + 2**32, 0), (-5, 0)):
        other = rounded_up(x, seed, offset)
        assert_frequency((base & other)[inside], 0.25)
        assert torch.equal(rounded_up(x, seed, offset), other)


def test_random_bits_do_not_depend_on_groups(device):
    """The numbers of an element follow from its place, the seed and the offset."""
    x = torch.full((4096,), 3.5, device=device)
    x[::16] = 127
    options = arguments("stochastic", device)
    results = [LF.quantize_groups(x, **options, group_size=size)[0] for size in (16, 128, 1024)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(LF.quantize_groups(x[:1000], **options)[0], results[0][:1000])


@of_bits
def test_seeds_are_drawn_from_the_stream_of_lomem(bits, device):
    x = torch.randn(1000, device=device)

    def run():
        lomem.random.manual_seed(7)
        return [LF.quantize_groups(x, bits)[0] for _ in range(2)]

    before = torch.get_rng_state()
    first, second = run()
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(run(), (first, second), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cpu_kernels
@of_dtypes
@of_bits
@of_roundings
def test_threads(rounding, bits, dtype):
    before = torch.get_num_threads()
    x = torch.randn(300_007).to(dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            codes, scales = LF.quantize_groups(x, bits, **arguments(rounding, "cpu"))
            value = LF.dequantize_groups(codes, scales, x.shape, dtype, bits)
            results.append((codes, scales, value))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))
    value, scales = assert_is_reference(x, bits, arguments(rounding, "cpu"))
    assert_within_a_step(x, value, scales, rounding)


def test_strides_of_codes_and_scales(device):
    x = torch.randn(1000, device=device)
    codes, scales = LF.quantize_groups(x, rounding="nearest")
    want = LF.dequantize_groups(codes, scales, (10, 100), x.dtype)
    spread = [torch.stack([t, t], 1)[:, 0] for t in (codes, scales)]
    assert torch.equal(LF.dequantize_groups(*spread, (10, 100), x.dtype), want)
    transposed = LF.dequantize_groups(codes, scales, (10, 100), x.dtype, stride=(1, 10))
    assert torch.equal(transposed, want.reshape(100, 10).t())


def test_is_not_differentiable(device):
    x = torch.randn(100, device=device, requires_grad=True)
    _, scales = LF.quantize_groups(x, rounding="nearest")
    with pytest.raises(RuntimeError, match="lomem::quantize_groups"):
        scales.float().sum().backward()


def test_vmap(device):
    x = torch.randn(3, 200, device=device)
    codes, scales = vmap(lambda row: LF.quantize_groups(row, rounding="nearest"))(x)
    for i in range(3):
        want = LF.quantize_groups(x[i], rounding="nearest")
        assert torch.equal(codes[i], want[0])
        assert torch.equal(scales[i], want[1])


@of_bits
def test_meta(bits):
    x = torch.randn(3, 100, device="meta").t()
    for rounding in ("nearest", "stochastic"):
        codes, scales = LF.quantize_groups(x, bits, rounding=rounding)
        assert (codes.shape, scales.shape) == ((300 * bits // 8,), (3,))
        value = LF.dequantize_groups(codes, scales, x.shape, torch.float16, bits, stride=x.stride())
        assert (value.shape, value.stride(), value.dtype, value.device.type) == (
            x.shape,
            (1, 100),
            torch.float16,
            "meta",
        )
    assert LF.dequantize_groups(codes, scales, (300,), torch.float64, bits).stride() == (1,)


@of_bits
@of_roundings
def test_compiled_round_trips(rounding, bits, device):
    """Without graph breaks, and with the memory order of the tensor; sizes that change are symbols."""

    def round_trip(x, seed):
        options = {"seed": seed} if rounding == "stochastic" else {}
        codes, scales = LF.quantize_groups(x * 2, bits, rounding=rounding, **options)
        return LF.dequantize_groups(codes, scales, x.shape, x.dtype, bits, stride=x.stride()) + 1

    compiled = torch.compile(round_trip, fullgraph=True, dynamic=True)
    for x in (
        torch.randn(30, 50, device=device),
        torch.randn(7, 40, device=device),
        torch.randn(6, 9, device=device).t(),
    ):
        seed = torch.tensor(5, device=device)
        assert same_bits(compiled(x, seed), round_trip(x, seed))


# Errors, of which test_errors.py has those of odd tensors.


def raises(message, kind):
    return pytest.raises(kind, match="^" + message)


def test_errors_of_quantizing(device):
    x = torch.randn(10, device=device)
    name = "lomem::quantize_groups"
    seed = torch.tensor(1, device=device)
    for bits in (0, 1, 2, 7, 16, -8):
        with raises(f"{name}: bits is {bits}, expected 8 or 4", ValueError):
            LF.quantize_groups(x, bits)
    for size in (-128, 0, 1, 8, 100, 127, 2048, 2**40):
        with raises(f"{name}: group_size is {size}, expected a power of two from 16 to 1024", ValueError):
            LF.quantize_groups(x, group_size=size)
    with raises(f"{name}: offset is -1, expected at least 0", ValueError):
        LF.quantize_groups(x, offset=-1)
    with raises(f"{name}: rounding is 'up', expected 'stochastic' or 'nearest'", ValueError):
        LF.quantize_groups(x, rounding="up")
    with raises(f"{name}: seed is given, expected none with rounding 'nearest'", ValueError):
        LF.quantize_groups(x, rounding="nearest", seed=seed)
    with raises(rf"{name}: seed is of dtype int64 and shape \[1\], expected int64 and \[\]", RuntimeError):
        LF.quantize_groups(x, seed=seed.reshape(1))
    with raises(rf"{name}: seed is of dtype float32 and shape \[\], expected int64 and \[\]", RuntimeError):
        LF.quantize_groups(x, seed=seed.float())
    with raises(f"{name}: seed is on meta, expected {x.device}, the device of input", RuntimeError):
        LF.quantize_groups(x, seed=seed.to("meta"))
    with raises(f"{name}: input has dtype int32, expected float64, float32, bfloat16 or float16", RuntimeError):
        LF.quantize_groups(x.int())


def test_errors_of_dequantizing(device):
    codes, scales = LF.quantize_groups(torch.randn(300, device=device), rounding="nearest")
    name = "lomem::dequantize_groups"

    def call(codes=codes, scales=scales, size=(300,), dtype=torch.float32, bits=8, **options):
        return LF.dequantize_groups(codes, scales, size, dtype, bits, **options)

    for device_of_shapes in ("meta", device):
        on = {"codes": codes.to(device_of_shapes), "scales": scales.to(device_of_shapes)}
        with raises(f"{name}: codes has 300 bytes, expected 299 for 299 elements of 8 bits", RuntimeError):
            call(**on, size=(13, 23))
        with raises(f"{name}: codes has 300 bytes, expected 150 for 300 elements of 4 bits", RuntimeError):
            call(**on, bits=4)
        with raises(f"{name}: scales has 3 elements, expected 5 for 300 elements in groups of 64", RuntimeError):
            call(**on, group_size=64)
        with raises(f"{name}: scales has dtype float32, expected bfloat16", RuntimeError):
            call(on["codes"], on["scales"].float())
        with raises(f"{name}: codes has dtype int8, expected uint8", RuntimeError):
            call(on["codes"].view(torch.int8), on["scales"])
        with raises(f"{name}: dtype is int8, expected float64, float32, bfloat16 or float16", RuntimeError):
            call(**on, dtype=torch.int8)
        with raises(rf"{name}: seed is of dtype int32 and shape \[\], expected int64 and \[\]", RuntimeError):
            call(**on, seed=torch.zeros((), dtype=torch.int32, device=device_of_shapes))
        with raises(rf"{name}: seed is of dtype int64 and shape \[1\], expected int64 and \[\]", RuntimeError):
            call(**on, seed=torch.zeros(1, dtype=torch.int64, device=device_of_shapes))
        with raises(f"{name}: offset is -1, expected at least 0", ValueError):
            call(**on, offset=-1)
        with raises(f"{name}: bits is 5, expected 8 or 4", ValueError):
            call(**on, bits=5)
        with raises(f"{name}: group_size is 12, expected a power of two from 16 to 1024", ValueError):
            call(**on, group_size=12)
        with raises(rf"{name}: size is \[-1\], expected no negative number", ValueError):
            call(**on, size=(-1,))
        for size in ((2**62,), (2**32, 2**32), (0, 2**62, 4)):
            said = ", ".join(map(str, size))
            with raises(rf"{name}: size is \[{said}\], expected at most 576460752303423487 elements", ValueError):
                call(**on, size=size)
        with raises(rf"{name}: stride is \[1\], expected 2 numbers, as size has", ValueError):
            call(**on, size=(30, 10), stride=(1,))
        for stride in ((20, 1), (1, 1), (10, 2), (0, 1), (2, 30), (1, 15)):
            said = ", ".join(map(str, stride))
            dense = rf"{name}: stride is \[{said}\], expected that of a dense tensor of size \[30, 10\]"
            with raises(dense, ValueError):
                call(**on, size=(30, 10), stride=stride)
        with raises(rf"{name}: stride is \[-10, 1\], expected no negative number", ValueError):
            call(**on, size=(30, 10), stride=(-10, 1))
        for stride in ((10, 1), (1, 30)):
            assert call(**on, size=(30, 10), stride=stride).stride() == stride
        assert call(**on, size=(1, 30, 10), stride=(7, 1, 30)).shape == (1, 30, 10)
    with raises(f"{name}: scales is on meta, expected {codes.device}, the device of codes", RuntimeError):
        call(scales=scales.to("meta"))
