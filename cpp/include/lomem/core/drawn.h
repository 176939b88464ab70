// Codes drawn at random: few-bit derivatives of activation functions that are right in the mean.
//
// The derivative h'(x) lies in [low, high]. It is rounded to `bits` bits by stochastic rounding with subtracted dither
// (rounding.h): with Q = 2^bits - 1 and a random u in (0, 1) of each element,
//   s      (h'(x) - low) / (high - low), in [0, 1]
//   t      s * Q, rounded to a multiple of 2^-16
//   code   t - u, rounded up: an integer in [0, Q]
//   level  low + (high - low) / Q * (code + u - 1/2), computed in the backward pass, where u is drawn again
// so that the mean of the level over u is low + (high - low) / Q * t, which is h'(x), and its variance ((high - low) /
// Q)^2 / 12 for every x: no fit to a density could make it smaller for all of them. A step function has no such mean.
// Two levels without dither, drawn with the probabilities that give the mean, have up to three times the variance.
//
// s is a polynomial of x on each of 32 pieces, 16 on either side of an origin, at which the derivative may jump. All
// arithmetic is IEEE float32 in the order given here, without fused multiply-add, so that every device gives the same
// codes. Random bits are those of storage in groups: 16 for each element, of a seed, an offset and its number.
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>
#include <lomem/core/packing.h>
#include <lomem/core/rounding.h>

#include <cstdint>

namespace lomem {

/// s as a function of x.
struct DrawnTable {
  static constexpr int degree = 5;
  static constexpr int side_pieces = 16;
  static constexpr int pieces = 2 * side_pieces;

  /// One side of the origin. With distance m from the origin, m / (1 + m) if `rational`:
  struct Side {
    /// Pieces reach to here, exclusively.
    float bound;
    /// Pieces per unit of m.
    float density;
    /// s where there are no pieces.
    float beyond;
  };

  float origin;
  /// Whether pieces divide m / (1 + m) evenly, and not m: for derivatives that fall slowly.
  bool rational;
  /// x <= origin, and NaN, and x > origin.
  Side sides[2];
  /// Piece p has the coefficients coefficients[k][p] of v^k, for v from 0, nearer to the origin, to 1. The first 16 are
  /// those with x <= origin.
  float coefficients[degree + 1][pieces];
};

/// Number of entries of a table of t, one for each 16-bit element: there, it is quicker to look up than to compute.
inline constexpr int drawn_target_count = 1 << 16;

/// Where in a table an element is.
struct DrawnPlace {
  int piece;
  float v;
  /// Whether there is no piece.
  bool beyond;
  int side;
};

LOMEM_HOST_DEVICE constexpr DrawnPlace drawn_place(const DrawnTable& table, float x) {
  const float d = x - table.origin;
  const int side = d > 0.0f ? 1 : 0;
  float m = d < 0.0f ? -d : d;
  if (table.rational) {
    constexpr float most = 0x1p100f;  // of an infinite one, the quotient would be NaN
    const float finite = m < most ? m : most;
    m = finite / (1.0f + finite);
  }
  const float q = rounded_product(m, table.sides[side].density);
  constexpr auto last = static_cast<float>(DrawnTable::side_pieces - 1);
  const int place = static_cast<int>(q < last ? q : last);  // (NaN becomes the last piece.)
  return {side * DrawnTable::side_pieces + place, q - static_cast<float>(place), !(m < table.sides[side].bound), side};
}

/// s of a place. `row(k)` are the coefficients of v^k.
template <class Row>
LOMEM_HOST_DEVICE constexpr float drawn_value(const DrawnTable& table, const DrawnPlace& place, const Row& row) {
  float p = row(DrawnTable::degree)[place.piece];
  LOMEM_UNROLL
  for (int k = DrawnTable::degree - 1; k >= 0; --k) {
    p = rounded_product(p, place.v) + row(k)[place.piece];
  }
  const float s = place.beyond ? table.sides[place.side].beyond : p;
  const float above = s > 0.0f ? s : 0.0f;
  return above < 1.0f ? above : 1.0f;
}

/// s of x, in [0, 1].
LOMEM_HOST_DEVICE constexpr float drawn_value(const DrawnTable& table, float x) {
  return drawn_value(table, drawn_place(table, x), [&](int k) { return table.coefficients[k]; });
}

/// The largest float below 1/2: added to a number in [0, 2^24) and rounded down, it gives the nearest integer. (With
/// 1/2 itself, odd integers from 2^23 on would become the next even ones.)
inline constexpr float nearly_half = 0x1.fffffep-2f;

/// t of s, as a multiple of 2^-16.
LOMEM_HOST_DEVICE constexpr std::uint32_t drawn_target(float s, int bits) {
  const float scale = static_cast<float>(max_code(bits)) * 0x1p16f;
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(rounded_product(s, scale) + nearly_half));
}

/// The code of t for 16 random bits, from which u = (random + 1/2) / 2^16.
LOMEM_HOST_DEVICE constexpr std::uint8_t drawn_code(std::uint32_t target, std::uint32_t random) {
  return static_cast<std::uint8_t>((target + (0xffffu ^ random)) >> 16);
}

/// The levels of codes: those of code j and the random bits of its element are
/// low + step * (j + u - 1/2), where step = (high - low) / Q.
template <class C>
struct DrawnLevels {
  C low;
  C step;
};

/// A level, in the arithmetic type of the gradient. (Code and dither together have at most 25 bits.)
template <class C>
LOMEM_HOST_DEVICE constexpr C drawn_level(const DrawnLevels<C>& levels, int code, std::uint32_t random) {
  const C place = static_cast<C>(static_cast<float>(code) + dither(random));
  return levels.low + rounded_product(levels.step, place);
}

/// packed[0, packed_bytes(n, bits)) = codes of x[0, n). The first element is number `first` of the tensor, a multiple
/// of 8. float64 is rounded to float32 first.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr void drawn_encode(
    const DrawnTable& table, const T* x, std::int64_t first, std::int64_t n, const RoundingBits& random,
    std::uint8_t* packed) {
  for (std::int64_t i = 0; i < n; i += group_size) {
    const int count = static_cast<int>(n - i < group_size ? n - i : group_size);
    const PhiloxBlock<std::uint64_t> block = random.block(first + i);
    std::uint8_t codes[group_size] = {};
    for (int j = 0; j < count; ++j) {
      const float s = drawn_value(table, static_cast<float>(to_compute(x[i + j])));
      codes[j] = drawn_code(drawn_target(s, bits), random_of(block, j));
    }
    pack<bits>(codes, count, packed + i / group_size * bits);
  }
}

/// grad_input[i] = grad_output[i] * level of code i, rounded as in step_gradient, for i in [0, n).
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr void drawn_decode_multiply(
    const T* grad_output, const std::uint8_t* packed, const DrawnLevels<compute_t<T>>& levels, std::int64_t first,
    std::int64_t n, const RoundingBits& random, T* grad_input) {
  for (std::int64_t i = 0; i < n; i += group_size) {
    const int count = static_cast<int>(n - i < group_size ? n - i : group_size);
    const PhiloxBlock<std::uint64_t> block = random.block(first + i);
    std::uint8_t codes[group_size] = {};
    unpack<bits>(packed + i / group_size * bits, count, codes);
    for (int j = 0; j < count; ++j) {
      const compute_t<T> level = drawn_level(levels, codes[j], random_of(block, j));
      grad_input[i + j] = from_compute<T>(to_compute(grad_output[i + j]) * level);
    }
  }
}

}  // namespace lomem
