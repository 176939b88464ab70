// Dropout: products with the mask of bits in memory, or with that of a seed.
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

// Masks ----------------------------------------------------------------------------------------------

/// In memory.
struct StoredMask {
  const std::uint8_t* bits;

  /// Of the elements from i on, which is a multiple of 8.
  PairMask at(std::int64_t i) const {
    return load<PairMask>(bits + i / 8);
  }
  /// The same for fewer elements. (Nothing beyond them is read.)
  PairMask at(std::int64_t i, std::int64_t count) const {
    std::uint32_t mask = 0;
    for (std::int64_t begin = 0; begin < count; begin += 8) {
      mask |= static_cast<std::uint32_t>(bits[(i + begin) / 8]) << begin;
    }
    return static_cast<PairMask>(mask);
  }
};

/// Words of 64 bits, in one register.
typedef std::uint64_t WideWords __attribute__((vector_size(lanes * 4)));
constexpr int wide_lanes = lanes / 2;

/// As PhiloxProduct.
struct WideProduct {
  static WideWords of(const WideWords& x, std::uint32_t factor) {
#if defined(__AVX512F__)
    return bits_of<WideWords>(_mm512_mul_epu32(bits_of<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
    return bits_of<WideWords>(_mm256_mul_epu32(bits_of<__m256i>(x), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__) && !defined(__AVX__)
    return bits_of<WideWords>(_mm_mul_epu32(bits_of<__m128i>(x), _mm_set1_epi64x(factor)));
#else
    return (x & std::uint64_t{0xffffffff}) * std::uint64_t{factor};
#endif
  }
};

/// A bit for each word that is at least `least`.
inline std::uint32_t at_least(const Words& x, std::uint32_t least) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(bits_of<__m512i>(x), _mm512_set1_epi32(static_cast<int>(least)));
#else
  const auto above = x >= least - Words{};
#if defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(bits_of<__m256>(above)));
#elif defined(__SSE2__) && !defined(__AVX__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(bits_of<__m128>(above)));
#else
  std::uint32_t bits = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    bits |= above[lane] != 0 ? 1u << lane : 0u;
  }
  return bits;
#endif
#endif
}

/// Moves bits 2 j and 2 j + 1 to 4 j and 4 j + 1.
inline std::uint32_t spread_pairs(std::uint32_t bits) {
#if defined(__AVX512F__)
  return _pdep_u32(bits, 0x33333333u);
#else
  static_assert(lanes <= 8);
  bits = (bits | bits << 4) & 0x0f0fu;
  return (bits | bits << 2) & 0x3333u;
#endif
}

/// mask_of_seed.
class SeededMask {
 public:
  /// `first`, a multiple of 8, is the number of element 0.
  SeededMask(std::uint64_t seed, std::int64_t first, std::uint32_t bound)
      : seed_(seed), first_block_(static_cast<std::uint64_t>(first) / 4), bound_(bound) {
    for (int lane = 0; lane < wide_lanes; ++lane) {
      offsets_[lane] = static_cast<std::uint64_t>(lane);
    }
  }

  PairMask at(std::int64_t i) const {
    const WideWords index = first_block_ + static_cast<std::uint64_t>(i) / 4 + offsets_;
    const auto block = philox<WideProduct>(
        PhiloxBlock<WideWords>{index, index >> 32, WideWords{}, WideWords{}}, static_cast<std::uint32_t>(seed_),
        static_cast<std::uint32_t>(seed_ >> 32));
    return static_cast<PairMask>(kept(block.first, block.second) | kept(block.third, block.fourth) << 2);
  }
  PairMask at(std::int64_t i, std::int64_t /*count*/) const {
    return at(i);
  }

 private:
  /// Of two words of each block, at the place of the first two.
  std::uint32_t kept(const WideWords& low, const WideWords& high) const {
    const WideWords both = (low & std::uint64_t{0xffffffff}) | high << 32;
    return spread_pairs(at_least(bits_of<Words>(both), bound_));
  }

  std::uint64_t seed_;
  std::uint64_t first_block_;
  std::uint32_t bound_;
  WideWords offsets_;
};

// Products -------------------------------------------------------------------------------------------

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
inline void multiply_some(const T* x, PairMask mask, compute_t<T> scale, std::int64_t n, T* product) {
  for (std::int64_t j = 0; j < n; ++j) {
    product[j] = scaled_if((mask >> j & 1) != 0, x[j], scale);
  }
}

template <class T, class Mask>
void multiply_masked(
    const T* x, const Mask& mask, compute_t<T> scale, std::int64_t n, T* product, [[maybe_unused]] bool stream) {
  std::int64_t i = 0;
  if constexpr (sizeof(T) < sizeof(double)) {
    const PairBits<T> bits;
    const Floats factor = broadcast(scale);
    const bool streams = stream && is_aligned(product, lanes * sizeof(T) * 2);
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const FloatPair factors = bits.select(mask.at(i), factor);
      const FloatPair values = load_pair(x + i);
      store_pair<T>({values.first * factors.first, values.second * factors.second}, product + i, streams);
    }
    if (streams) {
      stream_fence();
    }
  } else {
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      multiply_some(x + i, mask.at(i), scale, 2 * lanes, product + i);
    }
  }
  if (i < n) {
    multiply_some(x + i, mask.at(i, n - i), scale, n - i, product + i);
  }
}

void mask_multiply(
    DType dtype, const void* x, const std::uint8_t* mask, double scale, std::int64_t n, void* product, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    multiply_masked(
        static_cast<const T*>(x), StoredMask{mask}, static_cast<compute_t<T>>(scale), n, static_cast<T*>(product),
        stream);
  });
}

void seed_multiply(
    DType dtype, const void* x, std::uint64_t seed, std::int64_t first, std::uint32_t bound, double scale,
    std::int64_t n, void* product, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    multiply_masked(
        static_cast<const T*>(x), SeededMask(seed, first, bound), static_cast<compute_t<T>>(scale), n,
        static_cast<T*>(product), stream);
  });
}

}  // namespace
}  // namespace lomem::cpu
