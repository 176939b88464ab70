// Masks of random bits from the Mersenne Twister.
#pragma once

#include <lomem/core/mersenne.h>

#include "dropout.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

/// New words [begin, end). Each depends on the word `distance` after it, at least a vector away.
inline void twist_words(std::uint32_t* words, int begin, int end, int distance) {
  int j = begin;
  for (; j + lanes <= end; j += lanes) {
    const Words twisted = mersenne_twist(load<Words>(words + j), load<Words>(words + j + 1));
    store(load<Words>(words + j + distance) ^ twisted, words + j, false);
  }
  for (; j < end; ++j) {
    words[j] = words[j + distance] ^ mersenne_twist(words[j], words[j + 1]);
  }
}

inline void advance(MersenneState& state) {
  constexpr int size = MersenneState::size;
  constexpr int middle = MersenneState::middle;
  std::uint32_t* const words = state.words;
  twist_words(words, 0, size - middle, middle);
  twist_words(words, size - middle, size - 1, middle - size);
  words[size - 1] = words[middle - 1] ^ mersenne_twist(words[size - 1], words[0]);
  state.next = 0;
}

inline void temper(const std::uint32_t* words, int n, std::uint32_t* numbers) {
  const auto some = [&](int j) { store(mersenne_tempered(load<Words>(words + j)), numbers + j, false); };
  int j = 0;
  for (; j + lanes <= n; j += lanes) {
    some(j);
  }
  if (j < n && n >= lanes) {
    some(n - lanes);
    return;
  }
  for (; j < n; ++j) {
    numbers[j] = mersenne_tempered(words[j]);
  }
}

/// The next n random numbers.
inline void draw_numbers(MersenneState& state, int n, std::uint32_t* numbers) {
  while (n > 0) {
    if (state.next == MersenneState::size) {
      advance(state);
    }
    const int left = MersenneState::size - state.next;
    const int count = n < left ? n : left;
    temper(state.words + state.next, count, numbers);
    state.next += count;
    numbers += count;
    n -= count;
  }
}

/// A bit for each pair of numbers whose mersenne_number is below the bound.
inline std::uint32_t below(const std::uint32_t* pairs, std::uint64_t bound) {
  const WideWords numbers = mersenne_number(load<WideWords>(pairs));
#if defined(__AVX512F__)
  return _mm512_cmplt_epu64_mask(bits_of<__m512i>(numbers), _mm512_set1_epi64(static_cast<long long>(bound)));
#elif defined(__AVX2__)
  // (Numbers have 53 bits, so they may be compared as signed ones.)
  const __m256i least = _mm256_set1_epi64x(static_cast<long long>(bound));
  return static_cast<std::uint32_t>(
      _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(least, bits_of<__m256i>(numbers)))));
#else
  std::uint32_t bits = 0;
  for (int lane = 0; lane < wide_lanes; ++lane) {
    bits |= numbers[lane] < bound ? 1u << lane : 0u;
  }
  return bits;
#endif
}

void bernoulli_mask(MersenneState& state, std::uint64_t bound, std::int64_t n, std::uint8_t* mask) {
  constexpr int batch = 512;
  alignas(64) std::uint32_t numbers[2 * batch] = {};
  for (std::int64_t begin = 0; begin < n; begin += batch) {
    const int count = static_cast<int>(n - begin < batch ? n - begin : batch);
    draw_numbers(state, 2 * count, numbers);
    for (int i = 0; i < count; i += 8) {
      std::uint32_t bits = 0;
      for (int j = 0; j < 8; j += wide_lanes) {
        bits |= below(numbers + 2 * (i + j), bound) << j;
      }
      // (What follows the last element in its byte is 0.)
      const std::uint32_t wanted = count - i < 8 ? (1u << (count - i)) - 1 : 0xffu;
      mask[(begin + i) / 8] = static_cast<std::uint8_t>(bits & wanted);
    }
  }
}

}  // namespace
}  // namespace lomem::cpu
