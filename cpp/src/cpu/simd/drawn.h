// Codes drawn at random, and gradients from them. With the results of lomem::drawn_encode and drawn_decode_multiply,
// byte for byte.
#pragma once

#include <lomem/core/drawn.h>
#include <lomem/core/packing.h>

#include "packing.h"
#include "step.h"
#include "storage.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

/// Elements whose random numbers are drawn together.
constexpr std::int64_t drawn_batch = batch_elements;

/// Elements that become float32.
template <class T>
inline Floats load_floats(const T* x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return to_floats(load_as<double>(x));
  } else {
    return load_as<float>(x);
  }
}

/// Random bits as dither_of takes them.
inline Words load_random(const std::uint16_t* halves) {
  return to_words(load<Halves>(halves)) << 7;
}

/// The codes of n elements, one per byte, as a bit stream, and back.
inline void pack(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed) {
  visit_bits(bits, [&](auto width) { pack_groups<decltype(width)::value>(codes, n, packed); });
}
inline void unpack(const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes) {
  visit_bits(bits, [&](auto width) { unpack_groups<decltype(width)::value>(packed, n, codes); });
}

/// row[piece] of DrawnTable::pieces entries.
inline Floats look_up(const float* row, const Words& piece) {
  static_assert(DrawnTable::pieces == 32);
#if defined(__AVX512F__)
  return bits_of<Floats>(
      _mm512_permutex2var_ps(_mm512_loadu_ps(row), bits_of<__m512i>(piece), _mm512_loadu_ps(row + 16)));
#elif defined(__AVX2__)
  const __m256i index = bits_of<__m256i>(piece);
  const auto eight = [&](int i) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(row + 8 * i), index); };
  // The bits that tell which eight and sixteen, as signs.
  const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
  return bits_of<Floats>(
      _mm256_blendv_ps(_mm256_blendv_ps(eight(0), eight(1), odd), _mm256_blendv_ps(eight(2), eight(3), odd), upper));
#else
  Floats result;
  for (int lane = 0; lane < lanes; ++lane) {
    result[lane] = row[piece[lane]];
  }
  return result;
#endif
}

/// x where a comparison of vectors holds, y elsewhere.
template <class Mask>
inline Floats select(const Mask& holds, const Floats& x, const Floats& y) {
  return holds ? x : y;
}

/// lomem::drawn_value of each lane.
template <bool rational>
inline Floats drawn_values(const DrawnTable& table, const Floats& x) {
  const Floats zero{};
  const Floats d = x - table.origin;
  const auto right = d > zero;
  Floats m = bits_of<Floats>(bits_of<Words>(d) & 0x7fffffffu);
  if constexpr (rational) {
    const Floats finite = smaller(m, broadcast(0x1p100f));
    m = finite / (1.0f + finite);
  }
  const auto of_side = [&](float left_value, float right_value) {
    return select(right, broadcast(right_value), broadcast(left_value));
  };
  const Floats q = m * of_side(table.sides[0].density, table.sides[1].density);
  // (NaN becomes the last piece.)
  const Floats capped = smaller(q, broadcast(static_cast<float>(DrawnTable::side_pieces - 1)));
  const Ints place = __builtin_convertvector(capped, Ints);
  const Floats v = q - __builtin_convertvector(place, Floats);
  const Words piece = bits_of<Words>(place) + (bits_of<Words>(right) & std::uint32_t{DrawnTable::side_pieces});
  Floats p = look_up(table.coefficients[DrawnTable::degree], piece);
  for (int k = DrawnTable::degree - 1; k >= 0; --k) {
    p = p * v + look_up(table.coefficients[k], piece);
  }
  const Floats s = select(
      m < of_side(table.sides[0].bound, table.sides[1].bound), p,
      of_side(table.sides[0].beyond, table.sides[1].beyond));
  return smaller(larger(s, zero), broadcast(1.0f));
}

/// lomem::drawn_target of each lane.
inline Words targets_of(const Floats& s, int bits) {
  const float scale = static_cast<float>(max_code(bits)) * 0x1p16f;
  return bits_of<Words>(__builtin_convertvector(s * scale + nearly_half, Ints));
}

/// Computes t of `lanes` elements.
template <bool rational>
struct ComputedTargets {
  const DrawnTable& table;
  int bits;

  template <class T>
  Words at(const T* x) const {
    return targets_of(drawn_values<rational>(table, load_floats(x)), bits);
  }
};

/// Looks t up.
struct StoredTargets {
  const std::uint32_t* targets;

  template <class T>
  Words at(const T* x) const {
#if defined(__AVX512F__)
    return bits_of<Words>(
        _mm512_i32gather_epi32(bits_of<__m512i>(to_words(load<Halves>(x))), static_cast<const void*>(targets), 4));
#endif
    std::uint32_t found[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      found[lane] = targets[x[lane].bits];
    }
    return load<Words>(found);
  }
};

/// Codes of n elements, a multiple of `lanes`, one per byte.
template <class Targets, class T>
inline void draw_codes(
    const Targets& targets, const T* x, std::int64_t n, const std::uint16_t* random, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; i += lanes) {
    const Words up = to_words(load<Halves>(random + i)) ^ 0xffffu;
    store_bytes((targets.at(x + i) + up) >> 16, codes + i, false);
  }
}

template <class Targets, class T>
[[gnu::noinline]] void drawn_encode_elements(
    const Targets& targets, const T* x, std::int64_t first, std::int64_t n, int bits, const RoundingBits& source,
    std::uint8_t* packed) {
  alignas(64) std::uint16_t random[drawn_batch];
  alignas(64) std::uint8_t codes[drawn_batch];
  const RandomWords numbers(source);
  const std::int64_t whole = n - n % pair_elements;
  for (std::int64_t begin = 0; begin < whole; begin += drawn_batch) {
    const std::int64_t count = whole - begin < drawn_batch ? whole - begin : drawn_batch;
    // (A block of random numbers waits for multiplications, a look-up for memory: together they take less time.)
    for (std::int64_t i = 0; i < count; i += 2 * block_elements) {
      numbers.store_at(first + begin + i, random + i);
      draw_codes(
          targets, x + begin + i, count - i < 2 * block_elements ? count - i : 2 * block_elements, random + i,
          codes + i);
    }
    pack(codes, count, bits, packed + begin / group_size * bits);
  }
  if (whole < n) {
    T rest[pair_elements] = {};
    for (std::int64_t i = whole; i < n; ++i) {
      rest[i - whole] = x[i];
    }
    store_random(source, first + whole, pair_elements, random);
    draw_codes(targets, rest, pair_elements, random, codes);
    pack(codes, n - whole, bits, packed + whole / group_size * bits);
  }
}

void drawn_encode(
    DType dtype, const DrawnTable& table, const std::uint32_t* targets, const void* x, std::int64_t first,
    std::int64_t n, int bits, const RoundingBits& random, std::uint8_t* packed) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto* elements = static_cast<const T*>(x);
    if constexpr (sizeof(T) == 2) {
      if (targets != nullptr) {
        return drawn_encode_elements(StoredTargets{targets}, elements, first, n, bits, random, packed);
      }
    }
    if (table.rational) {
      drawn_encode_elements(ComputedTargets<true>{table, bits}, elements, first, n, bits, random, packed);
    } else {
      drawn_encode_elements(ComputedTargets<false>{table, bits}, elements, first, n, bits, random, packed);
    }
  });
}

template <class Targets, class T>
[[gnu::noinline]] void store_targets(const Targets& source, T /*type*/, std::uint32_t* targets) {
  for (int i = 0; i < drawn_target_count; i += lanes) {
    T x[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      x[lane] = T{static_cast<std::uint16_t>(i + lane)};
    }
    const Words values = source.at(x);
    std::memcpy(targets + i, &values, sizeof(values));
  }
}

void drawn_targets(DType dtype, const DrawnTable& table, int bits, std::uint32_t* targets) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    if constexpr (sizeof(T) == 2) {
      if (table.rational) {
        store_targets(ComputedTargets<true>{table, bits}, T{}, targets);
      } else {
        store_targets(ComputedTargets<false>{table, bits}, T{}, targets);
      }
    }
  });
}

// Gradients -----------------------------------------------------------------------------------------------------------

/// grad * level, for codes and random numbers of one vector.
template <class T>
inline void multiply_by_levels(
    const T* grad_output, const std::uint8_t* codes, const std::uint16_t* random,
    const DrawnLevels<compute_t<T>>& levels, T* grad_input, bool stream) {
  using C = compute_t<T>;
  const Floats place =
      __builtin_convertvector(bits_of<Ints>(load_bytes(codes)), Floats) + dither_of(load_random(random));
  Vector<C> level;
  if constexpr (sizeof(C) == sizeof(double)) {
    level = broadcast(levels.low) + broadcast(levels.step) * to_doubles(place);
  } else {
    level = levels.low + levels.step * place;
  }
  store_as<C>(load_as<C>(grad_output) * level, grad_input, stream);
}

template <class T>
[[gnu::noinline]] void drawn_decode_multiply_elements(
    const T* grad_output, const std::uint8_t* packed, const DrawnLevels<compute_t<T>>& levels, int bits,
    std::int64_t first, std::int64_t n, const RoundingBits& source, T* grad_input, bool stream) {
  const bool streams = stream && is_aligned(grad_input, lanes * sizeof(T) < 64 ? lanes * sizeof(T) : 64);
  alignas(64) std::uint16_t random[drawn_batch];
  alignas(64) std::uint8_t codes[drawn_batch];
  const std::int64_t whole = n - n % pair_elements;
  for (std::int64_t begin = 0; begin < whole; begin += drawn_batch) {
    const std::int64_t count = whole - begin < drawn_batch ? whole - begin : drawn_batch;
    store_random(source, first + begin, count, random);
    unpack(packed + begin / group_size * bits, count, bits, codes);
    for (std::int64_t i = 0; i < count; i += lanes) {
      multiply_by_levels(grad_output + begin + i, codes + i, random + i, levels, grad_input + begin + i, streams);
    }
  }
  if (whole < n) {
    T rest[pair_elements] = {};
    for (std::int64_t i = whole; i < n; ++i) {
      rest[i - whole] = grad_output[i];
    }
    store_random(source, first + whole, pair_elements, random);
    std::memset(codes, 0, pair_elements);
    unpack(packed + whole / group_size * bits, n - whole, bits, codes);
    for (std::int64_t i = 0; i < pair_elements; i += lanes) {
      multiply_by_levels(rest + i, codes + i, random + i, levels, rest + i, false);
    }
    for (std::int64_t i = whole; i < n; ++i) {
      grad_input[i] = rest[i - whole];
    }
  }
  if (streams) {
    stream_fence();
  }
}

void drawn_decode_multiply(
    DType dtype, const void* grad_output, const std::uint8_t* packed, const DrawnLevels<double>& levels, int bits,
    std::int64_t first, std::int64_t n, const RoundingBits& random, void* grad_input, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using C = compute_t<T>;
    const DrawnLevels<C> rounded{static_cast<C>(levels.low), static_cast<C>(levels.step)};
    drawn_decode_multiply_elements(
        static_cast<const T*>(grad_output), packed, rounded, bits, first, n, random, static_cast<T*>(grad_input),
        stream);
  });
}

}  // namespace
}  // namespace lomem::cpu
