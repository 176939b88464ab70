// Step activations: codes of inputs, gradients from codes, and the fast forward.
#pragma once

#include <lomem/core/fast_forward.h>
#include <lomem/core/packing.h>
#include <lomem/core/step.h>

#include "../kernel_table.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

// Codes ----------------------------------------------------------------------------------------------

/// Maps the bits of a 16-bit float to an integer with the same order: a > b as floats if and only if key(a) > key(b),
/// except for -0, which is below 0, and NaN, which is beyond the infinities.
constexpr std::int16_t key(std::uint16_t bits) {
  return static_cast<std::int16_t>(bits < 0x8000u ? bits : bits ^ 0x7fffu);
}

/// The key such that exactly the elements above the boundary c have greater keys.
template <class T>
constexpr std::int16_t key_of_largest_not_above(float c) {
  const std::uint16_t bits = largest_not_above<T>(c).bits;
  return key(bits == 0x8000u ? 0 : bits);
}

template <class Step, class T>
constexpr std::int16_t key_of_boundary(int i) {
  return key_of_largest_not_above<T>(static_cast<float>(Step::boundary(i)));
}

template <class T>
constexpr std::int16_t key_of_infinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;

#if defined(__AVX512F__)

/// 32 codes from their low and high bits.
inline std::uint64_t interleave(std::uint32_t low, std::uint32_t high) {
  return _pdep_u64(low, 0x5555555555555555u) | _pdep_u64(high, 0xaaaaaaaaaaaaaaaau);
}

/// Bits of the codes of 16 elements. Comparing x with the middle boundary gives the high bit, which selects the
/// boundary whose comparison gives the low bit.
struct CodeBits {
  __mmask16 low;
  __mmask16 high;
};

template <class Step>
inline CodeBits encode_16(__m512 x) {
  const auto boundary = [](int i) { return _mm512_set1_ps(static_cast<float>(Step::boundary(i))); };
  const __mmask16 high = _mm512_cmp_ps_mask(x, boundary(1), _CMP_GT_OQ);
  const __m512 other = _mm512_mask_blend_ps(high, boundary(0), boundary(2));
  return {_mm512_cmp_ps_mask(x, other, _CMP_GT_OQ), high};
}

/// 32 codes of two vectors.
template <class Step>
inline std::uint64_t encode_32(__m512 first, __m512 second) {
  const CodeBits a = encode_16<Step>(first);
  const CodeBits b = encode_16<Step>(second);
  const auto join = [](__mmask16 low, __mmask16 high) { return low | static_cast<std::uint32_t>(high) << 16; };
  return interleave(join(a.low, b.low), join(a.high, b.high));
}

template <class Step, class T>
inline std::uint64_t encode_32(const T* x) {
  if constexpr (sizeof(T) == 2) {
    const __m512i bits = _mm512_loadu_si512(x);
    const __m512i keys =
        _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7fff)));
    const auto boundary = [](int i) { return _mm512_set1_epi16(key_of_boundary<Step, T>(i)); };
    const __mmask32 number = _mm512_cmple_epi16_mask(keys, _mm512_set1_epi16(key_of_infinity<T>));
    const __mmask32 high = _mm512_mask_cmpgt_epi16_mask(number, keys, boundary(1));
    const __m512i other = _mm512_mask_blend_epi16(high, boundary(0), boundary(2));
    return interleave(_mm512_mask_cmpgt_epi16_mask(number, keys, other), high);
  } else if constexpr (sizeof(T) == 4) {
    return encode_32<Step>(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16));
  } else {
    std::uint32_t low = 0;
    std::uint32_t high = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512d values = _mm512_loadu_pd(x + 8 * part);
      const auto boundary = [](int i) { return _mm512_set1_pd(Step::boundary(i)); };
      const __mmask8 above = _mm512_cmp_pd_mask(values, boundary(1), _CMP_GT_OQ);
      const __m512d other = _mm512_mask_blend_pd(above, boundary(0), boundary(2));
      high |= static_cast<std::uint32_t>(above) << (8 * part);
      low |= static_cast<std::uint32_t>(_mm512_cmp_pd_mask(values, other, _CMP_GT_OQ)) << (8 * part);
    }
    return interleave(low, high);
  }
}

#elif defined(__AVX2__)

/// Packs 32 codes, one per byte, into 8 bytes. (Avoids pdep, which is slow on CPUs that have AVX2 but not AVX-512.)
inline std::uint64_t pack_32(__m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0401));
  const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
  const __m256i bytes = _mm256_shuffle_epi8(
      quads, _mm256_setr_epi8(
                 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const auto low = static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(bytes)));
  const auto high = static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1)));
  return low | static_cast<std::uint64_t>(high) << 32;
}

template <class Step, class T>
inline std::uint64_t encode_32(const T* x) {
  if constexpr (sizeof(T) == 2) {
    // -code in each lane, because a comparison gives -1.
    const auto negated = [&](const T* from) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i keys =
          _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi16(bits, 15), _mm256_set1_epi16(0x7fff)));
      const auto above = [&](int i) {
        return _mm256_cmpgt_epi16(keys, _mm256_set1_epi16(key_of_boundary<Step, T>(i)));
      };
      const __m256i nan = _mm256_cmpgt_epi16(keys, _mm256_set1_epi16(key_of_infinity<T>));
      return _mm256_andnot_si256(nan, _mm256_add_epi16(above(0), _mm256_add_epi16(above(1), above(2))));
    };
    const __m256i both = _mm256_packs_epi16(negated(x), negated(x + 16));
    return pack_32(_mm256_sub_epi8(_mm256_setzero_si256(), _mm256_permute4x64_epi64(both, 0xd8)));
  } else {
    static_assert(sizeof(T) == 4);
    const auto negated = [&](const T* from) {
      const __m256 values = _mm256_loadu_ps(from);
      const auto above = [&](int i) {
        return _mm256_castps_si256(
            _mm256_cmp_ps(values, _mm256_set1_ps(static_cast<float>(Step::boundary(i))), _CMP_GT_OQ));
      };
      return _mm256_add_epi32(above(0), _mm256_add_epi32(above(1), above(2)));
    };
    const __m256i low = _mm256_packs_epi32(negated(x), negated(x + 8));
    const __m256i high = _mm256_packs_epi32(negated(x + 16), negated(x + 24));
    // Packing works within halves of a register: groups of four come out in the order 0 2 4 6 1 3 5 7.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i codes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    return pack_32(_mm256_sub_epi8(_mm256_setzero_si256(), codes));
  }
}

#endif

template <class Step, class T>
void step_encode_elements(const T* x, std::int64_t n, std::uint8_t* packed) {
  static_assert(Step::bits == 2);
  std::int64_t i = 0;
#if defined(__AVX512F__)
  constexpr bool vectors = true;
#elif defined(__AVX2__)
  constexpr bool vectors = sizeof(T) < 8;
#else
  constexpr bool vectors = false;
#endif
  if constexpr (vectors) {
    for (; i + 32 <= n; i += 32) {
      prefetch_ahead(x + i, 32 * sizeof(T));
      const std::uint64_t codes = encode_32<Step>(x + i);
      std::memcpy(packed + i / 4, &codes, sizeof(codes));
    }
  }
  lomem::step_encode<Step>(x + i, n - i, packed + i / 4);
}

template <class Step>
void step_encode(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    step_encode_elements<Step>(static_cast<const T*>(x), n, packed);
  });
}

// Gradients ------------------------------------------------------------------------------------------

#if defined(__AVX2__)

/// For each of `lanes` codes of `bits` bits: the byte of their stream in which it starts (and the next byte, if it may
/// extend into it), and the starting bit.
template <int bits>
struct CodePlaces {
  alignas(64) std::int8_t bytes[lanes * 4];
  alignas(64) std::int32_t shifts[lanes];

  constexpr CodePlaces() : bytes(), shifts() {
    for (int lane = 0; lane < lanes; ++lane) {
      const int first = lane * bits / 8;
      shifts[lane] = lane * bits % 8;
      bytes[4 * lane] = static_cast<std::int8_t>(first);
      bytes[4 * lane + 1] = static_cast<std::int8_t>(shifts[lane] + bits > 8 ? first + 1 : -1);
      bytes[4 * lane + 2] = -1;
      bytes[4 * lane + 3] = -1;
    }
  }
};

/// Number of bytes loaded for `lanes` codes, for any `bits`.
constexpr int code_bytes_loaded = lanes;

#if defined(__AVX512F__)
using Register = __m512;
using IntegerRegister = __m512i;

/// Codes in the low bits of the lanes. The bits above are not cleared.
template <int bits>
inline IntegerRegister load_codes(const std::uint8_t* packed) {
  static constexpr CodePlaces<bits> places;
  if constexpr (bits == 2) {
    return _mm512_srlv_epi32(
        _mm512_set1_epi32(load<int>(packed)),
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
  }
  const __m512i stream = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  return _mm512_srlv_epi32(
      _mm512_shuffle_epi8(stream, _mm512_load_si512(places.bytes)), _mm512_load_si512(places.shifts));
}

/// Looks up levels[code] in registers.
template <int bits>
class Levels {
 public:
  explicit Levels(const float* levels) {
    for (int i = 0; i < 16 * registers; ++i) {
      table_[i] = levels[i % (1 << bits)];
    }
  }

  Register at(IntegerRegister codes) const {
    if constexpr (bits <= 4) {
      return _mm512_permutexvar_ps(codes, get(0));
    } else {
      return among<bits>(codes, 0);
    }
  }

 private:
  static constexpr int registers = bits <= 4 ? 1 : 1 << (bits - 4);

  Register get(int i) const {
    return _mm512_load_ps(table_ + 16 * i);
  }

  /// Looks up the level among the 2^width levels starting at register `first`.
  template <int width>
  Register among(IntegerRegister codes, int first) const {
    if constexpr (width == 5) {
      return _mm512_permutex2var_ps(get(first), codes, get(first + 1));
    } else {
      const __mmask16 upper = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(1 << (width - 1)));
      return _mm512_mask_blend_ps(
          upper, among<width - 1>(codes, first), among<width - 1>(codes, first + (1 << (width - 5))));
    }
  }

  alignas(64) float table_[16 * registers];
};

#else
using Register = __m256;
using IntegerRegister = __m256i;

template <int bits>
inline IntegerRegister load_codes(const std::uint8_t* packed) {
  static constexpr CodePlaces<bits> places;
  const __m256i stream = _mm256_set1_epi64x(load<long long>(packed));
  return _mm256_srlv_epi32(
      _mm256_shuffle_epi8(stream, _mm256_load_si256(reinterpret_cast<const __m256i*>(places.bytes))),
      _mm256_load_si256(reinterpret_cast<const __m256i*>(places.shifts)));
}

template <int bits>
class Levels {
 public:
  explicit Levels(const float* levels) {
    for (int i = 0; i < entries; ++i) {
      table_[i] = levels[i % (1 << bits)];
    }
  }

  Register at(IntegerRegister codes) const {
    if constexpr (bits <= 3) {
      return _mm256_permutevar8x32_ps(_mm256_load_ps(table_), codes);
    } else if constexpr (bits == 4) {
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
      return _mm256_blendv_ps(
          _mm256_permutevar8x32_ps(_mm256_load_ps(table_), codes),
          _mm256_permutevar8x32_ps(_mm256_load_ps(table_ + 8), codes), upper);
    } else {
      return _mm256_i32gather_ps(table_, _mm256_and_si256(codes, _mm256_set1_epi32(max_code(bits))), 4);
    }
  }

 private:
  static constexpr int entries = bits <= 3 ? 8 : 1 << bits;

  alignas(32) float table_[entries];
};
#endif

#endif

template <int bits, class T>
void step_decode_multiply_elements(
    const T* grad_output, const std::uint8_t* packed, const compute_t<T>* levels, std::int64_t n, T* grad_input,
    [[maybe_unused]] bool stream) {
  std::int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) <= 4) {
    const Levels<bits> table(levels);
    const bool streams = stream && is_aligned(grad_input, lanes * sizeof(T));
    // Codes are loaded in whole registers, which must not extend beyond the codes.
    const std::int64_t loadable = packed_bytes(n, bits) - code_bytes_loaded;
    const std::int64_t most = loadable < 0 ? 0 : loadable / (lanes / 8 * bits) + 1;
    const std::int64_t vectors = n / lanes < most ? n / lanes : most;
    constexpr int vector_bytes = lanes / 8 * bits;
    const std::uint8_t* codes = packed;
    const auto gradient = [&](std::int64_t at, const std::uint8_t* from) __attribute__((always_inline)) {
      const Floats level = bits_of<Floats>(table.at(load_codes<bits>(from)));
      const Floats product = load_as<float>(grad_output + at) * level;
      if constexpr (bits == 1) {
        return level == 0.0f ? Floats{} : product;
      } else {
        return product;
      }
    };
    for (; i + 2 * lanes <= vectors * lanes; i += 2 * lanes, codes += 2 * vector_bytes) {
      store_two(gradient(i, codes), gradient(i + lanes, codes + vector_bytes), grad_input + i, streams);
    }
    if (i < vectors * lanes) {
      store_as<float>(gradient(i, codes), grad_input + i, streams);
      i += lanes;
    }
    if (streams) {
      stream_fence();
    }
  }
#endif
  static_assert(lanes % 8 == 0 || lanes == 4);
  lomem::step_decode_multiply<bits>(grad_output + i, packed + i / 8 * bits, levels, n - i, grad_input + i);
}

void step_decode_multiply(
    DType dtype, const void* grad_output, const std::uint8_t* packed, const double* levels, int bits, std::int64_t n,
    void* grad_input, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    compute_t<T> rounded[1 << max_bits] = {};
    for (int code = 0; code <= max_code(bits); ++code) {
      rounded[code] = static_cast<compute_t<T>>(levels[code]);
    }
    visit_bits(bits, [&](auto width) {
      step_decode_multiply_elements<decltype(width)::value>(
          static_cast<const T*>(grad_output), packed, rounded, n, static_cast<T*>(grad_input), stream);
    });
  });
}

// Fast forward ---------------------------------------------------------------------------------------

#if defined(__FMA__)

struct VectorLanes {
  using Floats = cpu::Floats;
  using Words = cpu::Words;

  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return fused_multiply_add(a, b, c);
  }
#if defined(__AVX512F__)
  static Floats min_magnitude(const Floats& a, const Floats& b) {
    // The smaller magnitude, without sign; if one operand is NaN, the other one.
    return bits_of<Floats>(_mm512_range_ps(bits_of<__m512>(a), bits_of<__m512>(b), 0b1010));
  }
  static Floats max(const Floats& a, const Floats& b) {
    return bits_of<Floats>(_mm512_max_ps(bits_of<__m512>(a), bits_of<__m512>(b)));
  }

  class Table {
   public:
    /// (Hides from the compiler that these are constants: it would otherwise load them again at every use.)
    explicit Table(const float (&entries)[32]) : low_(_mm512_loadu_ps(entries)), high_(_mm512_loadu_ps(entries + 16)) {
      asm("" : "+v"(low_), "+v"(high_));
    }

    Floats at(const Words& row) const {
      return bits_of<Floats>(_mm512_permutex2var_ps(low_, bits_of<__m512i>(row), high_));
    }

   private:
    __m512 low_;
    __m512 high_;
  };
#else
  static Floats min_magnitude(const Floats& a, const Floats& b) {
    const Floats magnitude = bits_of<Floats>(bits(a) & 0x7fffffffu);
    return bits_of<Floats>(_mm256_min_ps(bits_of<__m256>(magnitude), bits_of<__m256>(b)));
  }
  static Floats max(const Floats& a, const Floats& b) {
    return bits_of<Floats>(_mm256_max_ps(bits_of<__m256>(a), bits_of<__m256>(b)));
  }

  class Table {
   public:
    explicit Table(const float (&entries)[32]) : entries_(entries) {}

    Floats at(const Words& row) const {
      // (A gather takes twice as long.)
      const __m256i index = bits_of<__m256i>(row);
      const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
      const auto among_8 = [&](int from) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(entries_ + from), index); };
      const __m256 low = _mm256_blendv_ps(among_8(0), among_8(8), bit3);
      const __m256 high = _mm256_blendv_ps(among_8(16), among_8(24), bit3);
      return bits_of<Floats>(_mm256_blendv_ps(low, high, bit4));
    }

   private:
    const float* entries_;
  };
#endif
  static Words bits(const Floats& a) {
    return bits_of<Words>(a);
  }
};

/// y = Function(x) and, if `codes`, the codes of x.
template <class Function, class Step, bool codes, class T>
void fast_forward_elements(const T* x, std::int64_t n, T* y, std::uint8_t* packed, bool stream) {
  const bool streams = stream && is_aligned(y, lanes * sizeof(T));
  const auto function = Function::template on<VectorLanes>();
  constexpr std::int64_t tile = 2048;
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const std::int64_t end = n - begin < tile ? n : begin + tile;
    std::int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      const Floats low = load_as<float>(x + i);
      const Floats high = load_as<float>(x + i + lanes);
      store_two(function(low), function(high), y + i, streams);
#if defined(__AVX512F__)
      if constexpr (codes) {
        const std::uint64_t word = encode_32<Step>(bits_of<__m512>(low), bits_of<__m512>(high));
        std::memcpy(packed + i / 4, &word, sizeof(word));
      }
#endif
    }
#if defined(__AVX512F__)
    const std::int64_t encoded = i;
#else
    const std::int64_t encoded = begin;  // the whole tile, which was just read
#endif
    for (; i < end; i += lanes) {
      const Partial part{end - i < lanes ? static_cast<int>(end - i) : lanes};
      store_as<float>(function(load_as<float>(x + i, part)), y + i, false, part);
    }
    if constexpr (codes) {
      step_encode_elements<Step>(x + encoded, end - encoded, packed + encoded / 4);
    }
  }
  if (streams) {
    stream_fence();
  }
}

template <class Function, class Step>
void fast_forward(DType dtype, const void* x, std::int64_t n, void* y, std::uint8_t* packed, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    if constexpr (sizeof(T) < sizeof(double)) {
      const T* from = static_cast<const T*>(x);
      if (packed != nullptr) {
        fast_forward_elements<Function, Step, true>(from, n, static_cast<T*>(y), packed, stream);
      } else {
        fast_forward_elements<Function, Step, false>(from, n, static_cast<T*>(y), packed, stream);
      }
    }
  });
}

template <class Function, class Step>
constexpr KernelTable::FastForward fast_forward_kernel = &fast_forward<Function, Step>;

#else

/// There are no kernels without fused multiply-add: torch's own are faster there.
template <class Function, class Step>
constexpr KernelTable::FastForward fast_forward_kernel = nullptr;

#endif

}  // namespace
}  // namespace lomem::cpu
