// Codes among boundaries known at run time, and codes of bands.
#pragma once

#include <lomem/core/packing.h>
#include <lomem/core/step.h>

#include "packing.h"
#include "step.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

#if defined(__AVX2__)

// A binary search in registers. Comparison s = 0, 1, ... decides bit bits-1-s of the code; which boundary it uses
// depends on the previous comparisons. Their results are stored lowest bit first, so that they form the index into the
// 2^s boundaries of comparison s, which permutations look up. The resulting path is the code with its bits reversed.

/// The boundary used by comparison `step` after the results `path`.
constexpr int boundary_of_path(int bits, int step, int path) {
  int code = 0;
  for (int s = 0; s < step; ++s) {
    code |= ((path >> s) & 1) << (bits - 1 - s);
  }
  return code + (1 << (bits - 1 - step)) - 1;
}

#if defined(__AVX512F__)

/// Elements that are compared as float32.
struct FloatLanes {
  using Boundary = float;
  using Integers = __m512i;
  using Mask = __mmask16;
  static constexpr int log_count = 4;
  static constexpr int most_looked_up = 8;

  __m512 x;

  template <class T>
  explicit FloatLanes(const T* from) : x(bits_of<__m512>(load_as<float>(from))) {}

  template <class T>
  static Boundary boundary(double c) {
    return static_cast<float>(c);
  }

  /// Adds `value` to the path where x is above the boundaries.
  Integers join_where_above(Integers path, Integers boundaries, int value, Mask& above) const {
    above = _mm512_cmp_ps_mask(x, _mm512_castsi512_ps(boundaries), _CMP_GT_OQ);
    return _mm512_mask_or_epi32(path, above, path, _mm512_set1_epi32(value));
  }
  static Integers load(const Boundary* table) {
    return _mm512_load_si512(table);
  }
  static Integers look_up(const Boundary* table, Integers path) {
    return _mm512_permutexvar_epi32(path, load(table));
  }
  static Integers look_up_in_two(const Boundary* table, Integers path, Mask /*upper*/) {
    return _mm512_permutex2var_epi32(load(table), path, load(table + 16));
  }
  static Integers choose(Mask upper, Integers low, Integers high) {
    return _mm512_mask_blend_epi32(upper, low, high);
  }
  /// The low bytes of paths[0], paths[1], ...
  static __m512i bytes(const Integers (&paths)[4]) {
    const auto low = [](Integers path) { return _mm512_cvtepi32_epi8(path); };
    __m512i result = _mm512_castsi128_si512(low(paths[0]));
    result = _mm512_inserti32x4(result, low(paths[1]), 1);
    result = _mm512_inserti32x4(result, low(paths[2]), 2);
    return _mm512_inserti32x4(result, low(paths[3]), 3);
  }
};

/// 16-bit elements, which are compared as integers computed by key().
template <class T>
struct HalfLanes {
  using Boundary = std::int16_t;
  using Integers = __m512i;
  using Mask = __mmask32;
  static constexpr int log_count = 5;
  static constexpr int most_looked_up = 8;

  __m512i keys;
  __mmask32 number;

  explicit HalfLanes(const T* from) {
    const __m512i bits = _mm512_loadu_si512(from);
    keys = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7fff)));
    number = _mm512_cmple_epi16_mask(keys, _mm512_set1_epi16(key_of_infinity<T>));
  }

  template <class Element>
  static Boundary boundary(double c) {
    return key_of_largest_not_above<Element>(static_cast<float>(c));
  }

  Integers join_where_above(Integers path, Integers boundaries, int value, Mask& above) const {
    above = _mm512_mask_cmpgt_epi16_mask(number, keys, boundaries);
    return _mm512_or_si512(path, _mm512_maskz_set1_epi16(above, static_cast<short>(value)));
  }
  static Integers load(const Boundary* table) {
    return _mm512_load_si512(table);
  }
  static Integers look_up(const Boundary* table, Integers path) {
    return _mm512_permutexvar_epi16(path, load(table));
  }
  static Integers look_up_in_two(const Boundary* table, Integers path, Mask /*upper*/) {
    return _mm512_permutex2var_epi16(load(table), path, load(table + 32));
  }
  static Integers choose(Mask upper, Integers low, Integers high) {
    return _mm512_mask_blend_epi16(upper, low, high);
  }
  static __m512i bytes(const Integers (&paths)[2]) {
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm512_cvtepi16_epi8(paths[0])), _mm512_cvtepi16_epi8(paths[1]), 1);
  }
};

template <class T>
using SearchLanes = std::conditional_t<sizeof(T) == 2, HalfLanes<T>, FloatLanes>;

#else

/// Elements that are compared as float32.
struct FloatLanes {
  using Boundary = float;
  using Integers = __m256i;
  using Mask = __m256i;
  static constexpr int log_count = 3;
  /// With more than 2^most_looked_up boundaries, a gather is faster than looking up.
  static constexpr int most_looked_up = 4;

  __m256 x;

  template <class T>
  explicit FloatLanes(const T* from) : x(bits_of<__m256>(load_as<float>(from))) {}

  template <class T>
  static Boundary boundary(double c) {
    return static_cast<float>(c);
  }

  Integers join_where_above(Integers path, Integers boundaries, int value, Mask& above) const {
    above = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_castsi256_ps(boundaries), _CMP_GT_OQ));
    return _mm256_or_si256(path, _mm256_and_si256(above, _mm256_set1_epi32(value)));
  }
  static Integers load(const Boundary* table) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
  }
  static Integers look_up(const Boundary* table, Integers path) {
    return _mm256_permutevar8x32_epi32(load(table), path);
  }
  static Integers look_up_in_two(const Boundary* table, Integers path, Mask upper) {
    return choose(upper, look_up(table, path), look_up(table + 8, path));
  }
  static Integers gather(const Boundary* table, Integers path) {
    return _mm256_castps_si256(_mm256_i32gather_ps(table, path, 4));
  }
  static Integers choose(Mask upper, Integers low, Integers high) {
    return _mm256_blendv_epi8(low, high, upper);
  }
  /// The low bytes of paths[0], paths[1], ...
  static __m256i bytes(const Integers (&paths)[4]) {
    // Packing works within halves of a register: groups of four come out in the order 0 2 4 6 1 3 5 7.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(
        _mm256_packus_epi16(_mm256_packus_epi32(paths[0], paths[1]), _mm256_packus_epi32(paths[2], paths[3])), order);
  }
};

template <class T>
using SearchLanes = FloatLanes;

#endif

/// The boundaries of all comparisons, in path order.
template <int bits, class Lanes>
class SearchTable {
 public:
  template <class T>
  SearchTable(Type<T> /*element*/, const double* boundaries) {
    for (int step = 0; step < bits; ++step) {
      for (int i = 0; i < entries(step); ++i) {
        // (Entries repeat if they do not fill a register.)
        const int path = i % (1 << step);
        table_[first(step) + i] = Lanes::template boundary<T>(boundaries[boundary_of_path(bits, step, path)]);
      }
    }
  }

  using Integers = typename Lanes::Integers;
  using Mask = typename Lanes::Mask;

  /// The codes of a register of elements, with their bits reversed.
  Integers paths(const Lanes& x) const {
    Mask above[bits];
    return paths(x, above);
  }

  /// Also returns the results of the comparisons.
  Integers paths(const Lanes& x, Mask (&above)[bits]) const {
    Integers path{};
    search<0>(x, path, above);
    return path;
  }

 private:
  static constexpr int count = 1 << Lanes::log_count;

  static constexpr int entries(int step) {
    return step <= Lanes::log_count ? count : 1 << step;
  }
  static constexpr int first(int step) {
    int result = 0;
    for (int s = 0; s < step; ++s) {
      result += entries(s);
    }
    return result;
  }

  template <int step>
  void search(const Lanes& x, Integers& path, Mask* above) const {
    path = x.join_where_above(path, among<step>(path, table_ + first(step), above), 1 << step, above[step]);
    if constexpr (step + 1 < bits) {
      search<step + 1>(x, path, above);
    }
  }

  /// Looks up the boundary among the 2^width boundaries starting at `table`.
  template <int width>
  Integers among(Integers path, const typename Lanes::Boundary* table, const Mask* above) const {
    if constexpr (width == 0) {
      return Lanes::load(table);
    } else if constexpr (width <= Lanes::log_count) {
      return Lanes::look_up(table, path);
    } else if constexpr (width > Lanes::most_looked_up) {
      return Lanes::gather(table, path);
    } else if constexpr (width == Lanes::log_count + 1) {
      return Lanes::look_up_in_two(table, path, above[width - 1]);
    } else {
      return Lanes::choose(
          above[width - 1], among<width - 1>(path, table, above),
          among<width - 1>(path, table + (1 << (width - 1)), above));
    }
  }

  alignas(64) typename Lanes::Boundary table_[first(bits)];
};

/// Reverses the lowest `bits` bits of a byte by looking up its nibbles.
template <int bits>
struct ReversedBits {
  alignas(16) std::uint8_t low[16] = {};
  alignas(16) std::uint8_t high[16] = {};

  constexpr ReversedBits() {
    for (int value = 0; value < 16; ++value) {
      int reversed = 0;
      for (int b = 0; b < 4; ++b) {
        reversed |= ((value >> b) & 1) << (7 - b);
      }
      low[value] = static_cast<std::uint8_t>(reversed >> (8 - bits));
      high[value] = static_cast<std::uint8_t>(reversed >> 4 >> (8 - bits));
    }
  }
};

/// For each byte, the table's entry for its lowest four bits. The upper four bits must be 0.
inline Words look_up_nibbles(const std::uint8_t (&table)[16], const Words& index) {
  const __m128i entries = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
#if defined(__AVX512F__)
  return bits_of<Words>(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), bits_of<__m512i>(index)));
#else
  return bits_of<Words>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), bits_of<__m256i>(index)));
#endif
}

/// Reverses the lowest `bits` bits of each byte. The other bits must be 0.
template <int bits>
inline Words reverse_bits(const Words& bytes) {
  static constexpr ReversedBits<bits> tables;
  constexpr std::uint32_t nibbles = 0x0f0f0f0fu;
  const Words low = look_up_nibbles(tables.low, bytes & nibbles);
  if constexpr (bits <= 4) {
    return low;
  } else {
    return low | look_up_nibbles(tables.high, (bytes >> 4) & nibbles);
  }
}

#if defined(__AVX512F__)

/// Stores the codes of as many elements as a mask has bits: comparison s gives bit bits-1-s of each code.
template <int bits, class Mask>
inline void store_codes(const Mask (&above)[bits], std::uint8_t* packed) {
  constexpr int chunk = 16;  // number of elements whose codes fit in a word
  static_assert(chunk * bits <= 64);
  constexpr std::uint64_t lowest = [] {
    std::uint64_t result = 0;
    for (int i = 0; i < chunk; ++i) {
      result |= std::uint64_t{1} << (i * bits);
    }
    return result;
  }();
  for (int begin = 0; begin < static_cast<int>(8 * sizeof(Mask)); begin += chunk) {
    std::uint64_t word = 0;
    for (int s = 0; s < bits; ++s) {
      word |= _pdep_u64(static_cast<std::uint64_t>(above[s]) >> begin, lowest << (bits - 1 - s));
    }
    std::memcpy(packed + begin / group_size * bits, &word, chunk / group_size * bits);
  }
}

#endif

/// Codes of 64 elements, one per byte. (Assembled in registers, because a load of data stored in parts stalls.)
template <int bits, class Lanes, class T>
inline void search_64(const SearchTable<bits, Lanes>& table, const T* x, std::uint8_t* codes) {
  constexpr int count = 1 << Lanes::log_count;
  constexpr int bytes = sizeof(typename Lanes::Integers);
  for (int i = 0; i < 64; i += bytes) {
    typename Lanes::Integers paths[bytes / count];
    for (int part = 0; part < bytes / count; ++part) {
      paths[part] = table.paths(Lanes(x + i + part * count));
    }
    const Words result = reverse_bits<bits>(bits_of<Words>(Lanes::bytes(paths)));
    std::memcpy(codes + i, &result, bytes);
  }
}

template <int bits, class T>
void step_search_encode_elements(const T* x, std::int64_t n, const double* boundaries, std::uint8_t* packed) {
  using Lanes = SearchLanes<T>;
  const SearchTable<bits, Lanes> table(Type<T>{}, boundaries);
  std::int64_t whole = 0;
#if defined(__AVX512F__)
  if constexpr (bits <= 4) {  // with more bits, going through bytes is faster
    constexpr int count = 1 << Lanes::log_count;
    for (; whole + count <= n; whole += count) {
      prefetch_ahead(x + whole, count * sizeof(T));
      typename Lanes::Mask above[bits];
      table.paths(Lanes(x + whole), above);
      store_codes<bits>(above, packed + whole / group_size * bits);
    }
  }
#endif
  constexpr std::int64_t tile = 1024;
  std::uint8_t codes[tile];
  for (std::int64_t begin = whole; begin < n; begin += tile) {
    const std::int64_t count = n - begin < tile ? n - begin : tile;
    std::int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      search_64(table, x + begin + i, codes + i);
    }
    if (i < count) {
      T rest[64] = {};
      std::memcpy(rest, x + begin + i, static_cast<std::size_t>(count - i) * sizeof(T));
      search_64(table, rest, codes + i);
    }
    std::uint8_t* target = packed + begin / group_size * bits;
    if constexpr (bits == 8) {
      std::memcpy(target, codes, static_cast<std::size_t>(count));
    } else {
      pack_groups<bits>(codes, count, target);
    }
  }
}

#endif

void step_search_encode(
    DType dtype, const void* x, std::int64_t n, const double* boundaries, int bits, std::uint8_t* packed) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const T* from = static_cast<const T*>(x);
    visit_bits(bits, [&](auto width) {
      constexpr int k = decltype(width)::value;
#if defined(__AVX2__)
      if constexpr (sizeof(T) < sizeof(double)) {
        return step_search_encode_elements<k>(from, n, boundaries, packed);
      }
#endif
      compute_t<T> rounded[max_code(k)];
      for (int i = 0; i < max_code(k); ++i) {
        rounded[i] = static_cast<compute_t<T>>(boundaries[i]);
      }
      lomem::step_search_encode<k>(from, n, rounded, packed);
    });
  });
}

template <class T>
void band_encode_elements(const T* x, std::int64_t n, compute_t<T> low, compute_t<T> high, std::uint8_t* packed) {
  std::int64_t i = 0;
#if defined(__AVX__)
  if constexpr (sizeof(T) < sizeof(double)) {
    for (; i + lanes <= n; i += lanes) {
      const Floats v = load_as<float>(x + i);
#if defined(__AVX512F__)
      const __mmask16 above = _mm512_cmp_ps_mask(bits_of<__m512>(v), _mm512_set1_ps(low), _CMP_GE_OQ);
      const std::uint16_t bits = _mm512_mask_cmp_ps_mask(above, bits_of<__m512>(v), _mm512_set1_ps(high), _CMP_LE_OQ);
#else
      const __m256 above = _mm256_cmp_ps(bits_of<__m256>(v), _mm256_set1_ps(low), _CMP_GE_OQ);
      const __m256 below = _mm256_cmp_ps(bits_of<__m256>(v), _mm256_set1_ps(high), _CMP_LE_OQ);
      const auto bits = static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_and_ps(above, below)));
#endif
      std::memcpy(packed + i / group_size, &bits, sizeof(bits));
    }
  }
#endif
  lomem::band_encode(x + i, n - i, low, high, packed + i / group_size);
}

void band_encode(DType dtype, const void* x, std::int64_t n, double low, double high, std::uint8_t* packed) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using C = compute_t<T>;
    band_encode_elements(static_cast<const T*>(x), n, static_cast<C>(low), static_cast<C>(high), packed);
  });
}

}  // namespace
}  // namespace lomem::cpu
