// Philox4x32, a counter-based random number generator: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011. A block of four words is a function of a counter and a key, so that any block can be computed by
// itself, in any order, on any device.
#pragma once

#include <lomem/config.h>

#include <cstdint>

namespace lomem {

/// Rounds that the paper recommends, with a margin.
inline constexpr int philox_rounds = 10;
/// The fewest with which all tests of TestU01's BigCrush pass (table 2 of the paper). Their number is what rounding at
/// random costs.
inline constexpr int philox_rounds_of_rounding = 7;

/// Four 32-bit words, in the lower halves of 64-bit ones. `Word` is std::uint64_t or a vector of such.
template <class Word>
struct PhiloxBlock {
  Word first;
  Word second;
  Word third;
  Word fourth;
};

/// Multiplies the lower halves of words: the product of two 32-bit numbers.
struct PhiloxProduct {
  LOMEM_HOST_DEVICE static constexpr std::uint64_t of(std::uint64_t x, std::uint32_t factor) {
    return (x & 0xffffffffu) * factor;
  }
};

/// The block of a counter for a key, of two words. The upper halves of words are ignored, and hold anything in the
/// result. `Product` multiplies what `Word` is.
template <class Product, int rounds = philox_rounds, class Word>
LOMEM_HOST_DEVICE constexpr PhiloxBlock<Word> philox(
    PhiloxBlock<Word> counter, std::uint32_t key, std::uint32_t other_key) {
  for (int round = 0; round < rounds; ++round) {
    const Word a = Product::of(counter.first, 0xd2511f53u);
    const Word b = Product::of(counter.third, 0xcd9e8d57u);
    counter = {
        (b >> 32) ^ counter.second ^ std::uint64_t{key}, b, (a >> 32) ^ counter.fourth ^ std::uint64_t{other_key}, a};
    key += 0x9e3779b9u;
    other_key += 0xbb67ae85u;
  }
  return counter;
}

/// Block number `index` of the stream of a 64-bit seed, which is the key. A seed has a stream for each `offset`.
template <int rounds = philox_rounds>
LOMEM_HOST_DEVICE constexpr PhiloxBlock<std::uint64_t> philox_block(
    std::uint64_t seed, std::uint64_t index, std::uint64_t offset = 0) {
  return philox<PhiloxProduct, rounds>(
      PhiloxBlock<std::uint64_t>{index, index >> 32, offset, offset >> 32}, static_cast<std::uint32_t>(seed),
      static_cast<std::uint32_t>(seed >> 32));
}

/// Word i of stream 0: word i % 4 of block i / 4.
template <int rounds = philox_rounds>
LOMEM_HOST_DEVICE constexpr std::uint32_t philox_word(std::uint64_t seed, std::uint64_t i) {
  const PhiloxBlock<std::uint64_t> block = philox_block<rounds>(seed, i / 4);
  const std::uint64_t low = i % 2 == 0 ? block.first : block.second;
  const std::uint64_t high = i % 2 == 0 ? block.third : block.fourth;
  return static_cast<std::uint32_t>(i % 4 < 2 ? low : high);
}

}  // namespace lomem
