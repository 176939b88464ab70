// Storage in groups: codes and scales of elements, and elements of codes and scales. With the results of encode_group
// and decode_group, byte for byte.
//
// Elements are handled in pairs of vectors, those at even places and those at odd places: their codes are joined by a
// shift, for 8 bits as for 4, and the two halves of a random word belong to one place in each vector.
#pragma once

#include <lomem/core/storage.h>

#include "dropout.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

typedef std::int32_t Ints __attribute__((vector_size(lanes * 4)));
typedef std::int16_t Shorts __attribute__((vector_size(lanes * 4)));

/// Elements of one pair of vectors, and of the blocks of random numbers in a vector.
constexpr int pair_elements = 2 * lanes;
constexpr int block_elements = group_size * wide_lanes;
static_assert(block_elements == 2 * pair_elements);

// Order --------------------------------------------------------------------------------------------------------------

/// Consecutive elements to those at even places and those at odd places.
inline FloatPair even_and_odd(const FloatPair& x) {
#if defined(__AVX512F__)
  const __m512 a = bits_of<__m512>(x.first);
  const __m512 b = bits_of<__m512>(x.second);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {bits_of<Floats>(_mm512_permutex2var_ps(a, even, b)), bits_of<Floats>(_mm512_permutex2var_ps(a, odd, b))};
#elif defined(__AVX2__)
  const __m256 a = bits_of<__m256>(x.first);
  const __m256 b = bits_of<__m256>(x.second);
  const auto quarters = [](__m256 v) { return _mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8); };
  return {
      bits_of<Floats>(quarters(_mm256_shuffle_ps(a, b, 0x88))),
      bits_of<Floats>(quarters(_mm256_shuffle_ps(a, b, 0xdd)))};
#elif defined(__SSE2__) && !defined(__AVX__)
  const __m128 a = bits_of<__m128>(x.first);
  const __m128 b = bits_of<__m128>(x.second);
  return {bits_of<Floats>(_mm_shuffle_ps(a, b, 0x88)), bits_of<Floats>(_mm_shuffle_ps(a, b, 0xdd))};
#else
  FloatPair result;
  for (int lane = 0; lane < lanes / 2; ++lane) {
    result.first[lane] = x.first[2 * lane];
    result.first[lane + lanes / 2] = x.second[2 * lane];
    result.second[lane] = x.first[2 * lane + 1];
    result.second[lane + lanes / 2] = x.second[2 * lane + 1];
  }
  return result;
#endif
}

/// The inverse.
inline FloatPair consecutive(const FloatPair& x) {
#if defined(__AVX512F__)
  const __m512 even = bits_of<__m512>(x.first);
  const __m512 odd = bits_of<__m512>(x.second);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {
      bits_of<Floats>(_mm512_permutex2var_ps(even, low, odd)),
      bits_of<Floats>(_mm512_permutex2var_ps(even, high, odd))};
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps(bits_of<__m256>(x.first), bits_of<__m256>(x.second));
  const __m256 high = _mm256_unpackhi_ps(bits_of<__m256>(x.first), bits_of<__m256>(x.second));
  return {
      bits_of<Floats>(_mm256_permute2f128_ps(low, high, 0x20)),
      bits_of<Floats>(_mm256_permute2f128_ps(low, high, 0x31))};
#elif defined(__SSE2__) && !defined(__AVX__)
  const __m128 even = bits_of<__m128>(x.first);
  const __m128 odd = bits_of<__m128>(x.second);
  return {bits_of<Floats>(_mm_unpacklo_ps(even, odd)), bits_of<Floats>(_mm_unpackhi_ps(even, odd))};
#else
  FloatPair result;
  for (int lane = 0; lane < lanes / 2; ++lane) {
    result.first[2 * lane] = x.first[lane];
    result.first[2 * lane + 1] = x.second[lane];
    result.second[2 * lane] = x.first[lane + lanes / 2];
    result.second[2 * lane + 1] = x.second[lane + lanes / 2];
  }
  return result;
#endif
}

template <class T>
inline FloatPair load_even_and_odd(const T* x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return load_pair(x);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    return even_and_odd({to_floats(load_as<double>(x)), to_floats(load_as<double>(x + lanes))});
  } else {
    return even_and_odd(load_pair(x));
  }
}

template <class T>
inline void store_even_and_odd(const FloatPair& x, T* target, bool stream) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    store_pair(x, target, stream);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    const FloatPair values = consecutive(x);
    store_as<double>(to_doubles(values.first), target, stream);
    store_as<double>(to_doubles(values.second), target + lanes, stream);
  } else {
    store_pair(consecutive(x), target, stream);
  }
}

// Random numbers -----------------------------------------------------------------------------------------------------

/// Words of two sets of blocks. Each round of one set waits for the one before it, and the other set fills the gaps.
struct TwoWideWords {
  WideWords first;
  WideWords second;

  TwoWideWords operator>>(int count) const {
    return {first >> count, second >> count};
  }
  TwoWideWords operator^(const TwoWideWords& x) const {
    return {first ^ x.first, second ^ x.second};
  }
  TwoWideWords operator^(std::uint64_t x) const {
    return {first ^ x, second ^ x};
  }
};

/// As WideProduct.
struct TwoWideProducts {
  static TwoWideWords of(const TwoWideWords& x, std::uint32_t factor) {
    return {WideProduct::of(x.first, factor), WideProduct::of(x.second, factor)};
  }
};

/// Random bits, 16 for each element.
class RandomWords {
 public:
  explicit RandomWords(const RoundingBits& random) : random_(random) {
    // Then the halves of blocks, two words each, are joined within every 16 bytes.
    for (int lane = 0; lane < wide_lanes; ++lane) {
      lanes_[lane] = static_cast<std::uint64_t>(lane / 2 + lane % 2 * (wide_lanes / 2));
    }
  }

  /// Those of 2 * block_elements elements from number i on, a multiple of 8.
  void store_at(std::int64_t i, std::uint16_t* halves) const {
    const WideWords stream = random_.offset - WideWords{};
    const auto both = philox<TwoWideProducts, philox_rounds_of_rounding>(
        PhiloxBlock<TwoWideWords>{
            {blocks_at(i), blocks_at(i + block_elements)},
            {blocks_at(i) >> 32, blocks_at(i + block_elements) >> 32},
            {stream, stream},
            {stream >> 32, stream >> 32}},
        static_cast<std::uint32_t>(random_.seed), static_cast<std::uint32_t>(random_.seed >> 32));
    store_in_order({both.first.first, both.second.first, both.third.first, both.fourth.first}, halves);
    store_in_order(
        {both.first.second, both.second.second, both.third.second, both.fourth.second}, halves + block_elements);
  }

 private:
  WideWords blocks_at(std::int64_t i) const {
    return static_cast<std::uint64_t>(i) / group_size + lanes_;
  }

  static WideWords two(const WideWords& low, const WideWords& high) {
    return (low & std::uint64_t{0xffffffff}) | high << 32;
  }

  static void store_in_order(const PhiloxBlock<WideWords>& block, std::uint16_t* halves) {
    const WideWords low = two(block.first, block.second);
    const WideWords high = two(block.third, block.fourth);
#if defined(__AVX512F__)
    const __m512i a = bits_of<__m512i>(low);
    const __m512i b = bits_of<__m512i>(high);
    store(_mm512_unpacklo_epi64(a, b), halves, false);
    store(_mm512_unpackhi_epi64(a, b), halves + pair_elements, false);
#elif defined(__AVX2__)
    const __m256i a = bits_of<__m256i>(low);
    const __m256i b = bits_of<__m256i>(high);
    store(_mm256_unpacklo_epi64(a, b), halves, false);
    store(_mm256_unpackhi_epi64(a, b), halves + pair_elements, false);
#elif defined(__SSE2__) && !defined(__AVX__)
    const __m128i a = bits_of<__m128i>(low);
    const __m128i b = bits_of<__m128i>(high);
    store(_mm_unpacklo_epi64(a, b), halves, false);
    store(_mm_unpackhi_epi64(a, b), halves + pair_elements, false);
#else
    for (int lane = 0; lane < wide_lanes; ++lane) {
      const std::uint64_t words[2] = {low[lane], high[lane]};
      std::memcpy(halves + group_size * (lane / 2 + lane % 2 * (wide_lanes / 2)), words, sizeof(words));
    }
#endif
  }

  RoundingBits random_;
  WideWords lanes_;
};

// Scales -------------------------------------------------------------------------------------------------------------

inline Shorts larger(const Shorts& a, const Shorts& b) {
#if defined(__AVX512F__)
  return bits_of<Shorts>(_mm512_max_epi16(bits_of<__m512i>(a), bits_of<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_of<Shorts>(_mm256_max_epi16(bits_of<__m256i>(a), bits_of<__m256i>(b)));
#elif defined(__SSE2__) && !defined(__AVX__)
  return bits_of<Shorts>(_mm_max_epi16(bits_of<__m128i>(a), bits_of<__m128i>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Ints larger(const Ints& a, const Ints& b) {
#if defined(__AVX512F__)
  return bits_of<Ints>(_mm512_max_epi32(bits_of<__m512i>(a), bits_of<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_of<Ints>(_mm256_max_epi32(bits_of<__m256i>(a), bits_of<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

inline std::int32_t largest_lane(const Ints& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(bits_of<__m512i>(x));
#else
  std::int32_t largest = x[0];
  for (int lane = 1; lane < lanes; ++lane) {
    largest = x[lane] > largest ? x[lane] : largest;
  }
  return largest;
#endif
}

/// The largest magnitude_bits of n elements. (Those of 16-bit elements are in the same order before they are
/// converted.)
template <class T>
inline std::uint32_t largest_magnitude(const T* x, std::int64_t n) {
  std::int64_t i = 0;
  std::uint32_t largest = 0;
  if constexpr (sizeof(T) == 2) {
    Shorts most{};
    for (; i + pair_elements <= n; i += pair_elements) {
      most = larger(most, load<Shorts>(x + i) & std::int16_t{0x7fff});
    }
    const Ints both = bits_of<Ints>(most);
    const auto bits = static_cast<std::uint16_t>(largest_lane(larger(both >> 16, both & 0x7fff)));
    largest = magnitude_bits(to_float(T{bits}));
  } else {
    Ints most{};
    for (; i + pair_elements <= n; i += pair_elements) {
      for (int part = 0; part < 2; ++part) {
        Floats values;
        if constexpr (sizeof(T) == sizeof(double)) {
          values = to_floats(load_as<double>(x + i + part * lanes));
        } else {
          values = load<Floats>(x + i + part * lanes);
        }
        most = larger(most, bits_of<Ints>(values) & 0x7fffffff);
      }
    }
    largest = static_cast<std::uint32_t>(largest_lane(most));
  }
  for (; i < n; ++i) {
    const std::uint32_t magnitude = magnitude_bits(to_float(x[i]));
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Codes --------------------------------------------------------------------------------------------------------------

inline Floats floor_of(const Floats& t) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_roundscale_ps(bits_of<__m512>(t), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#elif defined(__AVX__)
  return bits_of<Floats>(_mm256_floor_ps(bits_of<__m256>(t)));
#else
  const Floats nearest = (t + 0x1.8p23f) - 0x1.8p23f;
  return nearest > t ? nearest - 1.0f : nearest;
#endif
}

/// (The second operand if one is NaN.)
inline Floats larger(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_max_ps(bits_of<__m512>(a), bits_of<__m512>(b)));
#elif defined(__AVX__)
  return bits_of<Floats>(_mm256_max_ps(bits_of<__m256>(a), bits_of<__m256>(b)));
#elif defined(__SSE2__)
  return bits_of<Floats>(_mm_max_ps(bits_of<__m128>(a), bits_of<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}

inline Floats smaller(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_min_ps(bits_of<__m512>(a), bits_of<__m512>(b)));
#elif defined(__AVX__)
  return bits_of<Floats>(_mm256_min_ps(bits_of<__m256>(a), bits_of<__m256>(b)));
#elif defined(__SSE2__)
  return bits_of<Floats>(_mm_min_ps(bits_of<__m128>(a), bits_of<__m128>(b)));
#else
  return a < b ? a : b;
#endif
}

/// The integer below |t| < 2^22 or the one above, in the low bits of words. `random` has 16 random bits from bit 7 on.
inline Words stochastic_integers(const Floats& t, const Words& random) {
  const Floats below = floor_of(t);
  // 1 + u, without rounding.
  const Floats u = bits_of<Floats>((random & 0x007fff80u) | 0x3f800040u) - 1.0f;
  const Words integers = bits_of<Words>(below + 0x1.8p23f);
#if defined(__AVX512F__)
  const __mmask16 up = _mm512_cmp_ps_mask(bits_of<__m512>(t - below), bits_of<__m512>(u), _CMP_GT_OQ);
  const __m512i ints = bits_of<__m512i>(integers);
  return bits_of<Words>(_mm512_mask_add_epi32(ints, up, ints, _mm512_set1_epi32(1)));
#else
  return integers - bits_of<Words>(t - below > u);
#endif
}

/// Codes of elements in the low bits of words. Without `random`, rounded to nearest.
///
/// A scaled element is at most Q + 2^-17, which is rounded to Q; but -Q - 2^-17, of 8 bits, may be rounded down.
template <bool stochastic>
inline Words codes_of(const Floats& x, const Floats& inverse, const Floats& least, const Words& random) {
  const Floats t = x * inverse;
  if constexpr (stochastic) {
    return stochastic_integers(larger(least, t), random);
  } else {
    return bits_of<Words>(t + 0x1.8p23f);
  }
}

/// Stores words below 2^8 as bytes.
inline void store_bytes(const Words& x, std::uint8_t* target, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  store(_mm512_cvtepi32_epi8(bits_of<__m512i>(x)), target, stream);
#elif defined(__AVX2__)
  const __m256i v = bits_of<__m256i>(x);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const std::int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
  std::memcpy(target, &bytes, sizeof(bytes));
#else
  for (int lane = 0; lane < lanes; ++lane) {
    target[lane] = static_cast<std::uint8_t>(x[lane]);
  }
#endif
}

inline Words load_bytes(const std::uint8_t* source) {
#if defined(__AVX512F__)
  return bits_of<Words>(_mm512_cvtepu8_epi32(load<__m128i>(source)));
#elif defined(__AVX2__)
  return bits_of<Words>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<std::int64_t>(source))));
#else
  Words result;
  for (int lane = 0; lane < lanes; ++lane) {
    result[lane] = source[lane];
  }
  return result;
#endif
}

/// Stores the codes of a pair of vectors.
template <int bits>
inline void store_codes(const Words& even, const Words& odd, std::uint8_t* target, bool stream) {
  const Words joined = (even & std::uint32_t{max_code(bits)}) | (odd & std::uint32_t{max_code(bits)}) << bits;
  if constexpr (bits == 8) {
    store(to_halves(joined), target, stream);
  } else {
    store_bytes(joined, target, stream);
  }
}

/// Encodes pair_elements elements.
template <int bits, bool stochastic, class T>
inline void encode_pair(
    const T* x, const Floats& inverse, const std::uint16_t* random, std::uint8_t* codes, bool stream) {
  const Floats least = broadcast(static_cast<float>(-largest_code(bits)));
  Words words{};
  if constexpr (stochastic) {
    words = load<Words>(random);
  }
  const FloatPair values = load_even_and_odd(x);
  const Words even = codes_of<stochastic>(values.first, inverse, least, words << 7);
  const Words odd = codes_of<stochastic>(values.second, inverse, least, words >> 9);
  store_codes<bits>(even, odd, codes, stream);
}

/// The same for fewer elements. (By a call: it runs once per tensor, or per group if groups are short.)
template <int bits, bool stochastic, class T>
[[gnu::noinline]] void encode_part(
    const T* x, std::int64_t count, float inverse, const std::uint16_t* random, std::uint8_t* codes) {
  T elements[pair_elements] = {};
  std::uint8_t bytes[pair_elements * bits / 8];
  for (std::int64_t i = 0; i < count; ++i) {
    elements[i] = x[i];
  }
  encode_pair<bits, stochastic>(elements, broadcast(inverse), random, bytes, false);
  for (std::int64_t i = 0; i < packed_bytes(count, bits); ++i) {
    codes[i] = bytes[i];
  }
}

/// Elements that are encoded together. First come the scales of all their groups, each of which waits for a long chain
/// of instructions, and all random numbers, whose keys fill the registers.
constexpr std::int64_t batch_elements = max_scale_group;

/// Encodes at most that many elements, which begin with a group.
template <int bits, bool stochastic, class T>
inline void encode_batch(
    const T* x, std::int64_t n, std::int64_t group, const std::uint16_t* random, std::uint8_t* codes, bfloat16* scales,
    bool stream) {
  float inverses[batch_elements / min_scale_group];
  for (std::int64_t begin = 0, g = 0; begin < n; begin += group, ++g) {
    const std::int64_t count = n - begin < group ? n - begin : group;
    scales[g] = group_scale(largest_magnitude(x + begin, count), bits);
    inverses[g] = group_inverse(scales[g]);
  }
  for (std::int64_t begin = 0, g = 0; begin < n; begin += group, ++g) {
    const std::int64_t end = n - begin < group ? n : begin + group;
    if (has_no_codes(scales[g])) {
      std::memset(codes + begin * bits / 8, 0, static_cast<std::size_t>(packed_bytes(end - begin, bits)));
      continue;
    }
    const Floats inverse = broadcast(inverses[g]);
    std::int64_t i = begin;
    for (; i + pair_elements <= end; i += pair_elements) {
      encode_pair<bits, stochastic>(x + i, inverse, random + i, codes + i * bits / 8, stream);
    }
    if (i < end) {
      encode_part<bits, stochastic>(x + i, end - i, inverses[g], random + i, codes + i * bits / 8);
    }
  }
}

/// The random bits of n <= batch_elements elements, and of some more.
[[gnu::noinline]] void store_random(RoundingBits source, std::int64_t first, std::int64_t n, std::uint16_t* halves) {
  const RandomWords random(source);
  for (std::int64_t i = 0; i < n; i += 2 * block_elements) {
    random.store_at(first + i, halves + i);
  }
}

template <int bits, bool stochastic, class T>
[[gnu::noinline]] void encode_groups(
    const T* x, std::int64_t first, std::int64_t n, std::int64_t group, RoundingBits source, std::uint8_t* codes,
    bfloat16* scales, bool stream) {
  const bool streams = stream && is_aligned(codes, pair_elements * bits / 8);
  static_assert(batch_elements % (2 * block_elements) == 0);
  alignas(64) std::uint16_t random[batch_elements + pair_elements];  // a last part reads a whole pair of vectors
  for (std::int64_t begin = 0; begin < n; begin += batch_elements) {
    const std::int64_t count = n - begin < batch_elements ? n - begin : batch_elements;
    if constexpr (stochastic) {
      store_random(source, first + begin, count, random);
    }
    encode_batch<bits, stochastic>(
        x + begin, count, group, random, codes + begin * bits / 8, scales + begin / group, streams);
  }
  if (streams) {
    stream_fence();
  }
}

// Values -------------------------------------------------------------------------------------------------------------

/// The dither of random bits at the same place as in stochastic_integers: 1 + u, without rounding, and less.
inline Floats dither_of(const Words& random) {
  return bits_of<Floats>((random & 0x007fff80u) | 0x3f800040u) - 1.5f;
}

/// Decodes pair_elements elements.
template <int bits, bool dithered, class T>
inline void decode_pair(
    const std::uint8_t* codes, const Floats& scale, const Floats& limit, const std::uint16_t* random, T* y,
    bool stream) {
  Words joined;
  if constexpr (bits == 8) {
    joined = to_words(load<Halves>(codes));
  } else {
    joined = load_bytes(codes);
  }
  Words words{};
  if constexpr (dithered) {
    words = load<Words>(random);
  }
  const auto value = [&](const Words& at_the_top, const Words& bits_of_u) {
    Floats code = __builtin_convertvector(bits_of<Ints>(at_the_top) >> (32 - bits), Floats);
    if constexpr (dithered) {
      code += dither_of(bits_of_u);
    }
    return smaller(limit, larger(-limit, code * scale));
  };
  store_even_and_odd<T>(
      {value(joined << (32 - bits), words << 7), value(joined << (32 - 2 * bits), words >> 9)}, y, stream);
}

/// The same for fewer elements.
template <int bits, bool dithered, class T>
[[gnu::noinline]] void decode_part(
    const std::uint8_t* codes, std::int64_t count, const Floats& scale, const Floats& limit,
    const std::uint16_t* random, T* y) {
  std::uint8_t bytes[pair_elements * bits / 8] = {};
  T elements[pair_elements];
  for (std::int64_t i = 0; i < packed_bytes(count, bits); ++i) {
    bytes[i] = codes[i];
  }
  decode_pair<bits, dithered>(bytes, scale, limit, random, elements, false);
  for (std::int64_t i = 0; i < count; ++i) {
    y[i] = elements[i];
  }
}

/// Decodes at most batch_elements elements, which begin with a group.
template <int bits, bool dithered, class T>
inline void decode_batch(
    const std::uint8_t* codes, const bfloat16* scales, std::int64_t n, std::int64_t group, const std::uint16_t* random,
    T* y, bool stream) {
  for (std::int64_t begin = 0; begin < n; begin += group) {
    const std::int64_t end = n - begin < group ? n : begin + group;
    const Floats scale = broadcast(to_compute(*scales));
    const Floats limit = broadcast(value_limit<T>(*scales++));
    std::int64_t i = begin;
    for (; i + pair_elements <= end; i += pair_elements) {
      decode_pair<bits, dithered>(codes + i * bits / 8, scale, limit, random + i, y + i, stream);
    }
    if (i < end) {
      decode_part<bits, dithered>(codes + i * bits / 8, end - i, scale, limit, random + i, y + i);
    }
  }
}

template <int bits, bool dithered, class T>
[[gnu::noinline]] void decode_groups(
    const std::uint8_t* codes, const bfloat16* scales, std::int64_t first, std::int64_t n, std::int64_t group,
    RoundingBits source, T* y, bool stream) {
  const bool streams = stream && is_aligned(y, lanes * sizeof(T) < 64 ? 2 * lanes * sizeof(T) : 64);
  alignas(64) std::uint16_t random[batch_elements + pair_elements];  // a last part reads a whole pair of vectors
  for (std::int64_t begin = 0; begin < n; begin += batch_elements) {
    const std::int64_t count = n - begin < batch_elements ? n - begin : batch_elements;
    if constexpr (dithered) {
      store_random(source, first + begin, count, random);
    }
    decode_batch<bits, dithered>(
        codes + begin * bits / 8, scales + begin / group, count, group, random, y + begin, streams);
  }
  if (streams) {
    stream_fence();
  }
}

void group_encode(
    DType dtype, const void* x, std::int64_t first, std::int64_t n, const GroupFormat& format,
    const RoundingBits* random, std::uint8_t* codes, bfloat16* scales, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    visit_group_bits(format.bits, [&](auto width) {
      constexpr int bits = decltype(width)::value;
      const auto* elements = static_cast<const T*>(x);
      if (random == nullptr) {
        encode_groups<bits, false>(elements, first, n, format.group, RoundingBits{0, 0}, codes, scales, stream);
      } else {
        encode_groups<bits, true>(elements, first, n, format.group, *random, codes, scales, stream);
      }
    });
  });
}

void group_decode(
    DType dtype, const std::uint8_t* codes, const bfloat16* scales, std::int64_t first, std::int64_t n,
    const GroupFormat& format, const RoundingBits* random, void* y, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    visit_group_bits(format.bits, [&](auto width) {
      constexpr int bits = decltype(width)::value;
      auto* elements = static_cast<T*>(y);
      if (random == nullptr) {
        decode_groups<bits, false>(codes, scales, first, n, format.group, RoundingBits{0, 0}, elements, stream);
      } else {
        decode_groups<bits, true>(codes, scales, first, n, format.group, *random, elements, stream);
      }
    });
  });
}

}  // namespace
}  // namespace lomem::cpu
