// Dropout: products with a mask of bits.
#pragma once

#include <lomem/core/dropout.h>

#include "vector.h"

namespace lomem::cpu {
namespace {

/// A mask of 2 * lanes elements.
#if defined(__AVX512F__)
using PairMask = std::uint32_t;
#elif defined(__AVX__)
using PairMask = std::uint16_t;
#else
using PairMask = std::uint8_t;
#endif
static_assert(8 * sizeof(PairMask) == 2 * lanes);

/// The bits of 2 * lanes elements in a word, in the order of load_pair.
template <class T>
class PairBits {
 public:
  PairBits() {
    constexpr bool alternating = std::is_same_v<T, bfloat16>;
    for (int lane = 0; lane < lanes; ++lane) {
      first_[lane] = 1u << (alternating ? 2 * lane : lane);
      second_[lane] = 1u << (alternating ? 2 * lane + 1 : lane + lanes);
    }
  }

  /// scale where the bit is set, otherwise 0.
  FloatPair select(PairMask mask, const Floats& scale) const {
    const Words word = static_cast<std::uint32_t>(mask) - Words{};
    return {(word & first_) != 0u ? scale : Floats{}, (word & second_) != 0u ? scale : Floats{}};
  }

 private:
  Words first_;
  Words second_;
};

template <class T>
void mask_multiply_elements(
    const T* x, const std::uint8_t* mask, compute_t<T> scale, std::int64_t n, T* product,
    [[maybe_unused]] bool stream) {
  std::int64_t i = 0;
  if constexpr (sizeof(T) < sizeof(double)) {
    const PairBits<T> bits;
    const Floats factor = broadcast(scale);
    const bool streams = stream && is_aligned(product, lanes * sizeof(T) * 2);
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const FloatPair factors = bits.select(load<PairMask>(mask + i / 8), factor);
      const FloatPair values = load_pair(x + i);
      store_pair<T>({values.first * factors.first, values.second * factors.second}, product + i, streams);
    }
    if (streams) {
      stream_fence();
    }
  }
  lomem::mask_multiply(x + i, mask + i / 8, scale, n - i, product + i);
}

void mask_multiply(
    DType dtype, const void* x, const std::uint8_t* mask, double scale, std::int64_t n, void* product, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    mask_multiply_elements(
        static_cast<const T*>(x), mask, static_cast<compute_t<T>>(scale), n, static_cast<T*>(product), stream);
  });
}

}  // namespace
}  // namespace lomem::cpu
