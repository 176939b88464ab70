// Rounding to integers: to nearest, and at random, so that the mean over all random bits is the number itself.
//
// Subtracted dither: of an integer to which t was rounded at random, the value is integer + u - 1/2 if the random
// number u in (0, 1) is drawn again. The integer is t - u rounded up, so integer + u - t is uniform in [0, 1) whatever
// t is: the error is independent of t, at most 1/2, and has the variance 1/12. Without u it depends on the fraction of
// t, is up to 1, and has twice the variance on average. (Schuchman, "Dither signals and their effect on quantization
// noise", IEEE Trans. Commun. Technol. 12, 1964.)
#pragma once

#include <lomem/config.h>
#include <lomem/core/packing.h>
#include <lomem/core/philox.h>

#include <cstdint>

namespace lomem {

/// a * b, rounded before anything is added to it. (nvcc would contract the two to one operation, which is rounded
/// once.)
LOMEM_HOST_DEVICE constexpr float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
LOMEM_HOST_DEVICE constexpr double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

/// The nearest integer, ties to even, of |t| < 2^22: floats from 2^23 to 2^24 are the integers there.
LOMEM_HOST_DEVICE constexpr float nearest_integer(float t) {
  constexpr float shift = 0x1.8p23f;
  return (t + shift) - shift;
}

/// Number 2 * j or 2 * j + 1 of 16 random bits in a word.
LOMEM_HOST_DEVICE constexpr std::uint32_t random_half(std::uint64_t word, bool odd) {
  return (static_cast<std::uint32_t>(word) >> (odd ? 16 : 0)) & 0xffffu;
}

/// The integer below or above t, for |t| < 2^22 and 16 random bits. Above with a probability that is t - floor(t)
/// rounded to a multiple of 2^-16: the mean over all random bits is off by at most 2^-17. (Rounding t + u down would
/// not do: for |t| near 127 the sum has a precision of 2^-17, so that ties of the sum would favour even numbers. The
/// difference is exact, but for t in (-1, 0), where it is rounded to a multiple of 2^-24 at least.)
LOMEM_HOST_DEVICE constexpr float stochastic_integer(float t, std::uint32_t random) {
  const float nearest = nearest_integer(t);
  const float below = nearest > t ? nearest - 1.0f : nearest;
  const float u = (static_cast<float>(random) + 0.5f) * 0x1p-16f;
  return t - below > u ? below + 1.0f : below;
}

/// u - 1/2 of the same random bits, exact.
LOMEM_HOST_DEVICE constexpr float dither(std::uint32_t random) {
  return (static_cast<float>(random) + 0.5f) * 0x1p-16f - 0.5f;
}

/// Where random bits come from. Those of element i depend on `seed`, `offset` and i alone: block i / 8 of philox_block
/// has 16 bits for each of eight elements, in the order of words and low halves first.
struct RoundingBits {
  std::uint64_t seed;
  std::uint64_t offset;

  LOMEM_HOST_DEVICE constexpr PhiloxBlock<std::uint64_t> block(std::int64_t i) const {
    return philox_block<philox_rounds_of_rounding>(seed, static_cast<std::uint64_t>(i) / 8, offset);
  }
};

/// The 16 bits of element j = 0..7 of a block.
LOMEM_HOST_DEVICE constexpr std::uint32_t random_of(const PhiloxBlock<std::uint64_t>& block, int j) {
  const std::uint64_t low = j < 2 ? block.first : block.second;
  const std::uint64_t high = j < 6 ? block.third : block.fourth;
  return random_half(j < 4 ? low : high, j % 2 != 0);
}

}  // namespace lomem
