// Storage in groups: tensors as codes of 8 or 4 bits with one bfloat16 scale for each group of consecutive elements.
//
// Layout: element i has code i, a two's complement number in [-Q, Q] with Q = 127 or 7, packed as in packing.h (4 bits:
// two codes per byte, that of the even element in the low bits, padding bits are 0). Elements of group g are those with
// i / group == g; the last group may be shorter. Its scale is number g of the scales.
//
// Elements become float32 first: float64 is rounded to nearest, and becomes infinite beyond float32's range. All
// arithmetic is IEEE float32 in the order given here, without fused multiply-add, so that every device gives the same
// bytes. In a group whose largest magnitude is m:
//   scale   m / Q, rounded up to bfloat16 so that scale * Q >= m: nothing is clipped. At least 2^-126, so that the step
//           of a group of subnormal numbers is 2^-126.
//   code    x * (1 / scale), rounded to an integer: to nearest, ties to even, or up with a probability that is the
//           fraction, so that the mean over seeds is x * (1 / scale).
//   value   code * scale, rounded to the element type, but no further than to its largest finite number: m / Q rounded
//           up must not make an infinity of a finite element.
//
// Of codes that were rounded at random, dither can be subtracted (rounding.h): the value is (code + u - 1/2) * scale.
//
// A group of zeros has scale 0 and codes 0; the sign of a zero is lost. If an element is infinite or NaN, the scale is
// NaN and the codes are 0: the whole group becomes NaN, because none of its elements should look as if it were finite.
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>
#include <lomem/core/packing.h>
#include <lomem/core/rounding.h>

#include <cstdint>

namespace lomem {

/// Bits per code, and elements per scale.
struct GroupFormat {
  /// 8 or 4.
  int bits = 8;
  /// A power of two, 16 to 1024: groups start at whole bytes and whole blocks of random numbers.
  int group = 128;
};

inline constexpr int min_scale_group = 16;
inline constexpr int max_scale_group = 1024;

LOMEM_HOST_DEVICE constexpr bool is_scale_group(std::int64_t group) {
  return min_scale_group <= group && group <= max_scale_group && (group & (group - 1)) == 0;
}

/// Number of scales of `numel` elements. `Int` is int64_t or a symbolic integer.
template <class Int>
LOMEM_HOST_DEVICE constexpr Int scale_count(Int numel, int group) {
  return (numel + (group - 1)) / group;
}

/// Q. Codes are in [-Q, Q].
LOMEM_HOST_DEVICE constexpr int largest_code(int bits) {
  return (1 << (bits - 1)) - 1;
}

// Scales --------------------------------------------------------------------------------------------------------------

template <class T>
LOMEM_HOST_DEVICE constexpr float to_float(T x) {
  return static_cast<float>(to_compute(x));
}

/// The bits of |x|. As integers they are ordered as the magnitudes are, with infinity above all numbers and NaN above
/// infinity.
LOMEM_HOST_DEVICE constexpr std::uint32_t magnitude_bits(float x) {
  return __builtin_bit_cast(std::uint32_t, x) & 0x7fffffffu;
}

inline constexpr std::uint16_t nan_scale = 0x7fc0;

/// The scale of a group, of which `largest` is the largest magnitude_bits.
LOMEM_HOST_DEVICE constexpr bfloat16 group_scale(std::uint32_t largest, int bits) {
  if (largest >= 0x7f800000u) {
    return {nan_scale};
  }
  if (largest == 0) {
    return {0};
  }
  const float m = __builtin_bit_cast(float, largest);
  const auto q = static_cast<float>(largest_code(bits));
  std::uint32_t up = (__builtin_bit_cast(std::uint32_t, m / q) + 0xffffu) >> 16;
  // The quotient was rounded, maybe down to a bfloat16. (The product is exact, or infinite.)
  if (to_compute(bfloat16{static_cast<std::uint16_t>(up)}) * q < m) {
    ++up;
  }
  constexpr std::uint32_t smallest = 0x0080;  // 2^-126
  return {static_cast<std::uint16_t>(up < smallest ? smallest : up)};
}

/// Whether all codes of a group with this scale are 0, whatever the elements are.
LOMEM_HOST_DEVICE constexpr bool has_no_codes(bfloat16 scale) {
  return scale.bits == 0 || scale.bits == nan_scale;
}

/// By what elements are multiplied. Neither infinite nor subnormal. Precondition: the group has codes.
LOMEM_HOST_DEVICE constexpr float group_inverse(bfloat16 scale) {
  return 1.0f / to_compute(scale);
}

// Codes ---------------------------------------------------------------------------------------------------------------

/// x * inverse, rounded before anything is added to it, and at most Q: it is above Q by rounding only.
LOMEM_HOST_DEVICE constexpr float scaled(float x, float inverse, float q) {
  const float t = rounded_product(x, inverse);
  const float above = t < -q ? -q : t;
  return above > q ? q : above;
}

/// The bits of a code, which is an integer in [-Q, Q].
LOMEM_HOST_DEVICE constexpr std::uint8_t code_bits(float code, int bits) {
  return static_cast<std::uint8_t>(static_cast<unsigned>(static_cast<int>(code)) & max_code(bits));
}

/// The code of the bits in the lowest `bits` of `word`.
LOMEM_HOST_DEVICE constexpr int code_of_bits(std::uint32_t word, int bits) {
  return static_cast<std::int32_t>(word << (32 - bits)) >> (32 - bits);
}

/// The codes of `count` <= 8 elements, of which the first is number `first`, a multiple of 8, of a tensor: a bit stream
/// as that of pack_word. `inverse` is that of their group. Without `random`, rounded to nearest.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr std::uint64_t encode_eight(
    const T* x, int count, float inverse, const RoundingBits* random, std::int64_t first) {
  const PhiloxBlock<std::uint64_t> block = random == nullptr ? PhiloxBlock<std::uint64_t>{} : random->block(first);
  constexpr auto q = static_cast<float>(largest_code(bits));
  std::uint64_t word = 0;
  LOMEM_UNROLL
  for (int j = 0; j < group_size; ++j) {
    if (j < count) {
      const float t = scaled(to_float(x[j]), inverse, q);
      const float code = random == nullptr ? nearest_integer(t) : stochastic_integer(t, random_of(block, j));
      word |= static_cast<std::uint64_t>(code_bits(code, bits)) << (bits * j);
    }
  }
  return word;
}

/// Encodes the elements of a group, of which the first is number `first` of a tensor. Writes packed_bytes(count, bits)
/// bytes and returns the scale.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr bfloat16 encode_group(
    const T* x, std::int64_t first, std::int64_t count, const RoundingBits* random, std::uint8_t* codes) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = magnitude_bits(to_float(x[i]));
    largest = magnitude > largest ? magnitude : largest;
  }
  const bfloat16 scale = group_scale(largest, bits);
  const bool none = has_no_codes(scale);
  const float inverse = none ? 0.0f : group_inverse(scale);
  for (std::int64_t i = 0; i < count; i += group_size) {
    const int size = static_cast<int>(count - i < group_size ? count - i : group_size);
    const std::uint64_t word = none ? 0 : encode_eight<bits>(x + i, size, inverse, random, first + i);
    for (int b = 0; b < packed_bytes(size, bits); ++b) {
      codes[i * bits / 8 + b] = static_cast<std::uint8_t>(word >> (8 * b));
    }
  }
  return scale;
}

// Values --------------------------------------------------------------------------------------------------------------

/// The largest finite number that a T becomes, which for float64 is that of float32.
template <class T>
LOMEM_HOST_DEVICE constexpr float largest_value() {
  return sizeof(T) >= sizeof(float) ? 0x1.fffffep127f : 0x1.fep127f;
}
template <>
LOMEM_HOST_DEVICE constexpr float largest_value<float16>() {
  return 65504.0f;
}

/// What values of a group are limited to. (Not those of an infinite or NaN scale.)
template <class T>
LOMEM_HOST_DEVICE constexpr float value_limit(bfloat16 scale) {
  const bool finite = (scale.bits & 0x7f80u) != 0x7f80u;
  return finite ? largest_value<T>() : to_compute(bfloat16{0x7f80});
}

/// `code` is an integer, or one with its dither, of 24 bits: their sum is exact.
template <class T>
LOMEM_HOST_DEVICE constexpr T decoded(float code, float scale, float limit) {
  const float v = code * scale;
  const float above = v < -limit ? -limit : v;
  return from_compute<T>(static_cast<compute_t<T>>(above > limit ? limit : above));
}

/// Code j = 0..7 of a bit stream of codes.
template <int bits>
LOMEM_HOST_DEVICE constexpr float code_of_word(std::uint64_t word, int j) {
  return static_cast<float>(code_of_bits(unpack_word<bits>(word, j), bits));
}

/// The inverse of encode_group. With `random`, that of the codes, dither is subtracted; the first element is number
/// `first` of the tensor.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr void decode_group(
    const std::uint8_t* codes, std::int64_t count, bfloat16 scale, T* y, const RoundingBits* random = nullptr,
    std::int64_t first = 0) {
  const float factor = to_compute(scale);
  const float limit = value_limit<T>(scale);
  PhiloxBlock<std::uint64_t> block{};
  for (std::int64_t i = 0; i < count; ++i) {
    if (random != nullptr && i % group_size == 0) {
      block = random->block(first + i);
    }
    float code = code_of_word<bits>(std::uint64_t{codes[i * bits / 8]} >> (i * bits % 8), 0);
    if (random != nullptr) {
      code += dither(random_of(block, static_cast<int>(i % group_size)));
    }
    y[i] = decoded<T>(code, factor, limit);
  }
}

/// A number of bits as a type: calls visitor(Bits<bits>{}). Precondition: bits is 8 or 4. Host only, like visit_bits.
template <class Visitor>
constexpr decltype(auto) visit_group_bits(int bits, Visitor&& visitor) {
  return bits == 4 ? visitor(Bits<4>{}) : visitor(Bits<8>{});
}

}  // namespace lomem
