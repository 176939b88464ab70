// Vectors of the instruction set that a file is compiled for, using the vector extensions of GCC and Clang, and
// intrinsics for instructions that the extensions cannot express.
//
// Every instruction set gives the same bytes: elementwise operations follow IEEE 754, sums have a fixed order (norm.h),
// and nothing is contracted to a fused multiply-add by the compiler.
//
// Only for the files of this folder. They are compiled once per instruction set, so everything they instantiate must
// have internal linkage: the linker could pick a weak symbol compiled for AVX-512 on a CPU without it. Hence the
// anonymous namespaces, no functions of the standard library, and core functions that are always inlined
// (LOMEM_HOST_DEVICE in config.h). A test checks the symbols.
#pragma once

#include <lomem/core/dtype.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lomem::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

/// `lanes` elements in one register.
typedef float Floats __attribute__((vector_size(lanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(lanes * 2)));

typedef double HalfDoubles __attribute__((vector_size(lanes * 4)));
typedef float HalfFloats __attribute__((vector_size(lanes * 2)));

/// `lanes` elements in two registers.
struct Doubles {
  HalfDoubles first;
  HalfDoubles second;

  Doubles operator+(const Doubles& x) const {
    return {first + x.first, second + x.second};
  }
  Doubles operator-(const Doubles& x) const {
    return {first - x.first, second - x.second};
  }
  Doubles operator*(const Doubles& x) const {
    return {first * x.first, second * x.second};
  }
  Doubles& operator+=(const Doubles& x) {
    return *this = *this + x;
  }
};

template <class C>
struct vector_of;
template <>
struct vector_of<double> {
  using type = Doubles;
};
template <>
struct vector_of<float> {
  using type = Floats;
};
template <class C>
using Vector = typename vector_of<C>::type;

template <class V>
inline V load(const void* source) {
  V v;
  std::memcpy(&v, source, sizeof(V));
  return v;
}

template <class To, class From>
inline To bits_of(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &v, sizeof(To));
  return result;
}

inline Floats broadcast(float x) {
  return x - Floats{};
}

inline Doubles broadcast(double x) {
  return {x - HalfDoubles{}, x - HalfDoubles{}};
}

inline Doubles to_doubles(const Floats& x) {
#if defined(__AVX512F__)
  const __m512 v = bits_of<__m512>(x);
  return {
      bits_of<HalfDoubles>(_mm512_cvtps_pd(_mm512_castps512_ps256(v))),
      bits_of<HalfDoubles>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)))};
#elif defined(__AVX__)
  const __m256 v = bits_of<__m256>(x);
  return {
      bits_of<HalfDoubles>(_mm256_cvtps_pd(_mm256_castps256_ps128(v))),
      bits_of<HalfDoubles>(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)))};
#else
  HalfFloats halves[2];
  std::memcpy(halves, &x, sizeof(x));
  return {__builtin_convertvector(halves[0], HalfDoubles), __builtin_convertvector(halves[1], HalfDoubles)};
#endif
}

inline Doubles as_doubles(const Floats& x) {
  return to_doubles(x);
}

inline Doubles as_doubles(const Doubles& x) {
  return x;
}

inline Doubles load_doubles(const float* x) {
#if defined(__AVX512F__)
  return {
      bits_of<HalfDoubles>(_mm512_cvtps_pd(_mm256_loadu_ps(x))),
      bits_of<HalfDoubles>(_mm512_cvtps_pd(_mm256_loadu_ps(x + lanes / 2)))};
#elif defined(__AVX__)
  return {
      bits_of<HalfDoubles>(_mm256_cvtps_pd(_mm_loadu_ps(x))),
      bits_of<HalfDoubles>(_mm256_cvtps_pd(_mm_loadu_ps(x + lanes / 2)))};
#else
  return to_doubles(load<Floats>(x));
#endif
}

/// Rounds to float.
inline Floats to_floats(const Doubles& x) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_insertf32x8(
      _mm512_castps256_ps512(_mm512_cvtpd_ps(bits_of<__m512d>(x.first))), _mm512_cvtpd_ps(bits_of<__m512d>(x.second)),
      1));
#elif defined(__AVX__)
  return bits_of<Floats>(
      _mm256_set_m128(_mm256_cvtpd_ps(bits_of<__m256d>(x.second)), _mm256_cvtpd_ps(bits_of<__m256d>(x.first))));
#else
  const HalfFloats halves[2] = {
      __builtin_convertvector(x.first, HalfFloats), __builtin_convertvector(x.second, HalfFloats)};
  return load<Floats>(halves);
#endif
}

/// a * b + c, rounded once. Without such an instruction, as a sum in double that is rounded to float: that differs, by
/// one unit, about once in 2^29 results.
inline Floats fused_multiply_add(const Floats& a, const Floats& b, const Floats& c) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_fmadd_ps(bits_of<__m512>(a), bits_of<__m512>(b), bits_of<__m512>(c)));
#elif defined(__FMA__)
  return bits_of<Floats>(_mm256_fmadd_ps(bits_of<__m256>(a), bits_of<__m256>(b), bits_of<__m256>(c)));
#else
  return to_floats(to_doubles(a) * to_doubles(b) + to_doubles(c));
#endif
}

/// Sum of all lanes, adding halves first.
inline double sum_of_lanes(const Doubles& x) {
  const HalfDoubles sum = x.first + x.second;
#if defined(__AVX512F__)
  const __m512d v = bits_of<__m512d>(sum);
  const __m256d quarter = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
#elif defined(__AVX__)
  const __m256d quarter = bits_of<__m256d>(sum);
#endif
#if defined(__AVX__)
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(quarter), _mm256_extractf128_pd(quarter, 1));
  return pair[0] + pair[1];
#else
  return sum[0] + sum[1];
#endif
}

inline bool is_aligned(const void* pointer, std::size_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

/// Stores a vector. With `stream`, the store bypasses the caches, which requires an address that is a multiple of the
/// vector's size, and a stream_fence() before another thread reads it.
template <class V>
inline void store(const V& v, void* target, bool stream) {
  if (stream) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      return _mm512_stream_si512(static_cast<__m512i*>(target), bits_of<__m512i>(v));
    }
#endif
#if defined(__AVX__)
    if constexpr (sizeof(V) == 32) {
      return _mm256_stream_si256(static_cast<__m256i*>(target), bits_of<__m256i>(v));
    }
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(V) == 16) {
      return _mm_stream_si128(static_cast<__m128i*>(target), bits_of<__m128i>(v));
    }
#endif
  }
  std::memcpy(target, &v, sizeof(V));
}

/// Prefetches the lines 2 KiB beyond [from, from + bytes). The hardware prefetches too, but not beyond a page: where
/// there is little to compute and the last-level cache delivers the data, a quarter of the time was spent waiting
/// there.
inline void prefetch_ahead(const void* from, std::int64_t bytes) {
  // (Computed as an integer, because it may be beyond the array. Nothing is fetched then.)
  const auto ahead = reinterpret_cast<std::uintptr_t>(from) + 2048;
  for (std::int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
  }
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// (Each of these is one instruction, but compilers generate three.)

inline Words to_words(const Halves& x) {
#if defined(__AVX512F__)
  return bits_of<Words>(_mm512_cvtepu16_epi32(bits_of<__m256i>(x)));
#elif defined(__AVX2__)
  return bits_of<Words>(_mm256_cvtepu16_epi32(bits_of<__m128i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}

/// The low halves of words, which must be below 2^16.
inline Halves to_halves(const Words& x) {
#if defined(__AVX512F__)
  return bits_of<Halves>(_mm512_cvtepi32_epi16(bits_of<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i v = bits_of<__m256i>(x);
  return bits_of<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

// (Where an element takes dozens of instructions, a call costs next to nothing, and the compiler is spared inlining
// them at hundreds of places.)
#if defined(__F16C__)
#define LOMEM_FLOAT16_CONVERSION inline
#else
#define LOMEM_FLOAT16_CONVERSION [[gnu::noinline]]
#endif

/// Exact upcasts of `lanes` elements.
inline Floats to_floats(const Halves& x, bfloat16 /*type*/) {
  return bits_of<Floats>(to_words(x) << 16);
}

LOMEM_FLOAT16_CONVERSION Floats to_floats(const Halves& x, float16 /*type*/) {
#if defined(__AVX512F__)
  return bits_of<Floats>(_mm512_cvtph_ps(bits_of<__m256i>(x)));
#elif defined(__F16C__)
  return bits_of<Floats>(_mm256_cvtph_ps(bits_of<__m128i>(x)));
#else
  Floats result;
  for (int lane = 0; lane < lanes; ++lane) {
    result[lane] = to_compute(float16{x[lane]});
  }
  return result;
#endif
}

/// Rounded to bfloat16, in the upper halves of words; the lower ones hold anything.
inline Words rounded_to_bfloat16(const Floats& x) {
  const Words u = bits_of<Words>(x);
  const Words rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const Words quiet = u | 0x400000u;
  return (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

/// Round to nearest even, with the same results as from_compute.
inline Halves from_floats(const Floats& x, bfloat16 /*type*/) {
#if defined(__AVX512BF16__)
  // The instruction treats subnormal numbers as 0.
  if (__builtin_expect(_mm512_fpclass_ps_mask(bits_of<__m512>(x), 0x20) == 0, 1)) {
    return bits_of<Halves>(_mm512_cvtneps_pbh(bits_of<__m512>(x)));
  }
#endif
  return to_halves(rounded_to_bfloat16(x) >> 16);
}

LOMEM_FLOAT16_CONVERSION Halves from_floats(const Floats& x, float16 /*type*/) {
#if defined(__AVX512F__)
  return bits_of<Halves>(_mm512_cvtps_ph(bits_of<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits_of<Halves>(_mm256_cvtps_ph(bits_of<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  Halves result;
  for (int lane = 0; lane < lanes; ++lane) {
    result[lane] = from_compute<float16>(x[lane]).bits;
  }
  return result;
#endif
}

/// x[0, lanes) as C, which holds every T exactly.
template <class C, class T>
inline Vector<C> load_as(const T* x) {
  if constexpr (sizeof(T) == sizeof(C)) {
    return load<Vector<C>>(x);
  } else if constexpr (sizeof(T) == 4) {
    return load_doubles(x);
  } else if constexpr (sizeof(C) == 4) {
    return to_floats(load<Halves>(x), T{});
  } else {
    return to_doubles(to_floats(load<Halves>(x), T{}));
  }
}

/// Rounds each element once. (By a call, for the same reason.)
template <class T>
[[gnu::noinline]] void store_rounded(const Doubles& x, T* target) {
  double values[lanes];
  std::memcpy(values, &x, sizeof(values));
  for (int lane = 0; lane < lanes; ++lane) {
    target[lane] = from_double<T>(values[lane]);
  }
}

/// Rounds each element once.
template <class C, class T>
inline void store_as(const Vector<C>& x, T* target, bool stream) {
  if constexpr (sizeof(T) == 8) {
    store(x.first, target, stream);
    store(x.second, target + lanes / 2, stream);
  } else if constexpr (sizeof(T) == sizeof(C)) {
    store(x, target, stream);
  } else if constexpr (sizeof(C) == 4) {
    store(from_floats(x, T{}), target, stream);
  } else if constexpr (sizeof(T) == 4) {
    store(to_floats(x), target, stream);
  } else {
    store_rounded(x, target);
  }
}

/// Stores two vectors to consecutive places.
template <class T>
inline void store_two(const Floats& first, const Floats& second, T* target, bool stream) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m512 a = bits_of<__m512>(first);
    const __m512 b = bits_of<__m512>(second);
    // As in from_floats.
    if (__builtin_expect(_mm512_kor(_mm512_fpclass_ps_mask(a, 0x20), _mm512_fpclass_ps_mask(b, 0x20)) == 0, 1)) {
      store(bits_of<Floats>(_mm512_cvtne2ps_pbh(b, a)), target, stream);
      return;
    }
  }
#endif
  store_as<float>(first, target, stream);
  store_as<float>(second, target + lanes, stream);
}

/// 2 * lanes consecutive elements, in an order that is the same for every array of a type: for elementwise operations.
struct FloatPair {
  Floats first;
  Floats second;
};

template <class T>
inline FloatPair load_pair(const T* x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    // Elements at even places, and at odd ones: an instruction each.
    const Words both = load<Words>(x);
    return {bits_of<Floats>(both << 16), bits_of<Floats>(both & 0xffff0000u)};
  } else {
    return {load_as<float>(x), load_as<float>(x + lanes)};
  }
}

template <class T>
inline void store_pair(const FloatPair& x, T* target, bool stream) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BF16__)
    const __m512 first = bits_of<__m512>(x.first);
    const __m512 second = bits_of<__m512>(x.second);
    // As in from_floats.
    if (__builtin_expect(
            _mm512_kor(_mm512_fpclass_ps_mask(first, 0x20), _mm512_fpclass_ps_mask(second, 0x20)) == 0, 1)) {
      const __m512i halves = bits_of<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      const __m512i order = _mm512_setr_epi32(
          0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a,
          0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
      store(bits_of<Words>(_mm512_permutexvar_epi16(order, halves)), target, stream);
      return;
    }
#endif
    store((rounded_to_bfloat16(x.first) >> 16) | (rounded_to_bfloat16(x.second) & 0xffff0000u), target, stream);
  } else {
    store_as<float>(x.first, target, stream);
    store_as<float>(x.second, target + lanes, stream);
  }
}

/// Selects all lanes of a vector, or only the remaining ones.
struct Full {};
struct Partial {
  int count;
};

template <class C, class T>
inline Vector<C> load_as(const T* x, Full) {
  return load_as<C>(x);
}

template <class C, class T>
[[gnu::noinline]] Vector<C> load_as(const T* x, Partial part) {
  T buffer[lanes] = {};
  for (int lane = 0; lane < part.count; ++lane) {
    buffer[lane] = x[lane];
  }
  return load_as<C>(buffer);
}

template <class C, class T>
inline void store_as(const Vector<C>& x, T* target, bool stream, Full) {
  store_as<C>(x, target, stream);
}

template <class C, class T>
[[gnu::noinline]] void store_as(const Vector<C>& x, T* target, bool /*stream*/, Partial part) {
  T buffer[lanes];
  store_as<C>(x, buffer, false);
  for (int lane = 0; lane < part.count; ++lane) {
    target[lane] = buffer[lane];
  }
}

/// x, with 0 in the lanes that are not part of it.
template <class V>
inline V only(const V& x, Full) {
  return x;
}

template <class C, class V>
[[gnu::noinline]] V only_as(const V& x, Partial part) {
  C values[lanes] = {};
  C all[lanes];
  std::memcpy(all, &x, sizeof(all));
  for (int lane = 0; lane < part.count; ++lane) {
    values[lane] = all[lane];
  }
  return load<V>(values);
}

inline Floats only(const Floats& x, Partial part) {
  return only_as<float>(x, part);
}

inline Doubles only(const Doubles& x, Partial part) {
  return only_as<double>(x, part);
}

}  // namespace
}  // namespace lomem::cpu
