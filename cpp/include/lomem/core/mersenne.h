// The Mersenne Twister MT19937, from which torch draws on the CPU: Matsumoto and Nishimura, "Mersenne Twister: a
// 623-dimensionally equidistributed uniform pseudo-random number generator", ACM Transactions on Modeling and Computer
// Simulation 8, 1998.
#pragma once

#include <lomem/config.h>

#include <cstdint>

namespace lomem {

/// The words from which the next numbers are made, and how many of them have been.
struct MersenneState {
  static constexpr int size = 624;
  static constexpr int middle = 397;

  std::uint32_t words[size];
  /// Words before this one are used up.
  int next = size;
};

/// What word j + middle is combined with for the new word j. u and v are words j and j + 1. `Word` is std::uint32_t or
/// a vector of such, also below.
template <class Word>
LOMEM_HOST_DEVICE constexpr Word mersenne_twist(Word u, Word v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ ((Word{} - (v & 1u)) & 0x9908b0dfu);
}

/// The random number of a word.
template <class Word>
LOMEM_HOST_DEVICE constexpr Word mersenne_tempered(Word y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  y ^= y >> 18;
  return y;
}

/// A number of 53 bits from two random numbers, as torch makes it: u = number / 2^53 is uniform in [0, 1). `Wide` is
/// std::uint64_t or a vector of such, with the first number in the lower half.
template <class Wide>
LOMEM_HOST_DEVICE constexpr Wide mersenne_number(Wide both) {
  return (both << 32 | both >> 32) & ((std::uint64_t{1} << 53) - 1);
}

/// u < p if and only if the number is below this.
LOMEM_HOST_DEVICE constexpr std::uint64_t bernoulli_bound(double p) {
  const double scaled = p * 0x1p53;
  const auto below = static_cast<std::uint64_t>(scaled);
  return static_cast<double>(below) < scaled ? below + 1 : below;
}

}  // namespace lomem
