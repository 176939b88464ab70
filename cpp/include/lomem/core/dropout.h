// Dropout: kept elements are multiplied by 1 / (1 - p), the others by 0. Which ones are kept is a mask, or follows from
// a seed.
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>
#include <lomem/core/packing.h>
#include <lomem/core/philox.h>

#include <cstdint>

namespace lomem {

/// 1 / (1 - p) in the arithmetic type of T, by which torch multiplies on CUDA.
template <class T>
LOMEM_HOST_DEVICE constexpr compute_t<T> dropout_scale(double p) {
  using C = compute_t<T>;
  return C(1) / static_cast<C>(1.0 - p);
}

/// The same rounded to T, by which torch multiplies on the CPU, where its mask has the dtype of the input.
template <class T>
LOMEM_HOST_DEVICE constexpr compute_t<T> rounded_dropout_scale(double p) {
  return to_compute(from_compute<T>(dropout_scale<T>(p)));
}

/// x * scale or x * 0, rounded once. As in torch, that is NaN for an infinity or NaN that is not kept.
template <class T>
LOMEM_HOST_DEVICE constexpr T scaled_if(bool kept, T x, compute_t<T> scale) {
  return from_compute<T>(to_compute(x) * (kept ? scale : compute_t<T>(0)));
}

/// Of a seed, an element is kept if its word of the stream is at least this: p * 2^32, rounded.
LOMEM_HOST_DEVICE constexpr std::uint32_t dropout_bound(double p) {
  const double nearest = p * 0x1p32 + 0.5;
  return nearest < 0x1p32 ? static_cast<std::uint32_t>(nearest) : 0xffffffffu;
}

LOMEM_HOST_DEVICE constexpr bool is_kept(std::uint64_t word, std::uint32_t bound) {
  return static_cast<std::uint32_t>(word) >= bound;
}

/// The mask of a seed for the eight elements from number 8 * group on, counted in row-major order: word i of the stream
/// is that of element i.
LOMEM_HOST_DEVICE constexpr std::uint8_t mask_of_seed(std::uint64_t seed, std::uint64_t group, std::uint32_t bound) {
  unsigned mask = 0;
  for (int half = 0; half < 2; ++half) {
    const PhiloxBlock<std::uint64_t> block = philox_block(seed, 2 * group + static_cast<unsigned>(half));
    const unsigned bits = (is_kept(block.first, bound) ? 1u : 0u) | (is_kept(block.second, bound) ? 2u : 0u) |
                          (is_kept(block.third, bound) ? 4u : 0u) | (is_kept(block.fourth, bound) ? 8u : 0u);
    mask |= bits << (4 * half);
  }
  return static_cast<std::uint8_t>(mask);
}

}  // namespace lomem
