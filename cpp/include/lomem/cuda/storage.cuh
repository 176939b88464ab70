// Storage in groups: bodies of CUDA kernels (see launch.cuh).
#pragma once

#include <lomem/core/storage.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/step.cuh>
#include <lomem/cuda/vector.cuh>

#include <cstdint>

namespace lomem::cuda {

/// Rounding to nearest, and codes without dither.
struct NearestRounding {
  static constexpr bool is_random = false;

  LOMEM_HOST_DEVICE RoundingBits random() const {
    return {0, 0};
  }
};

/// Stochastic rounding, or the dither of its codes, with a seed in device memory.
struct StochasticRounding {
  static constexpr bool is_random = true;

  const std::int64_t* seed;
  std::uint64_t offset;

  LOMEM_HOST_DEVICE RoundingBits random() const {
    return {static_cast<std::uint64_t>(*seed), offset};
  }
};

/// Codes and scales of x. A thread works on a unit of eight elements, which take whole bytes and one block of random
/// numbers. Each thread finds the largest magnitude of its unit; then each looks through those of its
/// group, which lies within a block, and reads its elements again, from the caches.
template <class T, int bits, class Rounding>
struct GroupEncode {
  static constexpr int unit = group_size;
  static constexpr std::int64_t block_elements = std::int64_t{unit} * threads_per_block;
  static_assert(block_elements % max_scale_group == 0);

  struct alignas(max_access) Shared {
    std::uint32_t largest[threads_per_block];
  };

  const T* x;
  Rounding rounding;
  std::uint8_t* codes;
  bfloat16* scales;
  std::int64_t n;
  int group_units;
  bool aligned;

  GroupEncode(
      const T* x_, std::int64_t n_, int group, const Rounding& rounding_, std::uint8_t* codes_, bfloat16* scales_)
      : x(x_),
        rounding(rounding_),
        codes(codes_),
        scales(scales_),
        n(n_),
        group_units(group / unit),
        aligned(is_aligned(x, max_access) && is_aligned(codes, bytes_alignment<bits>)) {}

  std::int64_t blocks() const {
    return (n + block_elements - 1) / block_elements;
  }

  LOMEM_HOST_DEVICE void prepare(std::int64_t block, int thread, Shared& shared) const {
    const std::int64_t begin = block * block_elements + std::int64_t{thread} * unit;
    std::uint32_t largest = 0;
    if (begin < n) {
      const Vector<T, unit> values = load(begin);
      LOMEM_UNROLL
      for (int j = 0; j < unit; ++j) {
        largest = larger(largest, magnitude_bits(to_float(values[j])));
      }
    }
    shared.largest[thread] = largest;
  }

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared& shared) const {
    const std::int64_t begin = block * block_elements + std::int64_t{thread} * unit;
    if (begin >= n) {
      return;
    }
    const int place = thread & (group_units - 1);
    const bfloat16 scale = group_scale(largest_of(shared.largest + (thread - place)), bits);
    if (place == 0) {
      scales[begin / unit / group_units] = scale;
    }
    std::uint64_t word = 0;
    if (!has_no_codes(scale)) {
      const Vector<T, unit> values = load(begin);
      const RoundingBits random = rounding.random();
      word =
          encode_eight<bits>(values.values, unit, group_inverse(scale), Rounding::is_random ? &random : nullptr, begin);
    }
    if (aligned && begin + unit <= n) {
      store_bytes<bits>(codes + begin / unit * bits, word);
    } else {
      const int count = static_cast<int>(n - begin < unit ? n - begin : unit);
      for (int b = 0; b < packed_bytes(count, bits); ++b) {
        codes[begin / unit * bits + b] = static_cast<std::uint8_t>(word >> (8 * b));
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE static std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
    return a > b ? a : b;
  }

  /// The elements of a unit, with zeros beyond the last element. (Zeros have codes 0.)
  LOMEM_HOST_DEVICE Vector<T, unit> load(std::int64_t begin) const {
    if (aligned && begin + unit <= n) {
      return load_vector<unit>(x + begin);
    }
    Vector<T, unit> values{};
    LOMEM_UNROLL
    for (int j = 0; j < unit; ++j) {
      if (begin + j < n) {
        values[j] = x[begin + j];
      }
    }
    return values;
  }

  LOMEM_HOST_DEVICE std::uint32_t largest_of(const std::uint32_t* units) const {
    constexpr int width = max_access / static_cast<int>(sizeof(std::uint32_t));
    std::uint32_t largest = 0;
    if (group_units < width) {  // the smallest groups, of two units
      return larger(units[0], units[1]);
    }
    for (int i = 0; i < group_units; i += width) {
      const Vector<std::uint32_t, width> four = load_vector<width>(units + i);
      largest = larger(larger(largest, larger(four[0], four[1])), larger(four[2], four[3]));
    }
    return largest;
  }
};

/// y = codes * scales, with dither or without. A thread works on units that fill 16 bytes (see step.cuh).
template <class T, int bits, class Rounding>
struct GroupDecode {
  using Grid = UnitGrid<T, bits>;
  static constexpr int elements = Grid::elements;
  static constexpr int bytes = Unit<T, bits>::bytes;
  using Shared = Nothing;
  static_assert(min_scale_group % elements == 0);

  const std::uint8_t* codes;
  const bfloat16* scales;
  Rounding rounding;
  T* y;
  std::int64_t n;
  /// A group has 2^shift units.
  int shift = 0;
  bool aligned;

  GroupDecode(
      const std::uint8_t* codes_, const bfloat16* scales_, std::int64_t n_, int group, const Rounding& rounding_, T* y_)
      : codes(codes_),
        scales(scales_),
        rounding(rounding_),
        y(y_),
        n(n_),
        aligned(is_aligned(y, max_access) && is_aligned(codes, bytes_alignment<bytes>)) {
    while (elements << shift < group) {
      ++shift;
    }
  }

  std::int64_t blocks() const {
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    const RoundingBits random = rounding.random();
    if (aligned && Grid::is_full(block, n)) {
      std::uint64_t word[units_per_thread];
      bfloat16 scale[units_per_thread];
      LOMEM_UNROLL
      for (int u = 0; u < units_per_thread; ++u) {
        const std::int64_t unit = Grid::unit(block, thread, u);
        word[u] = load_bytes<bytes>(codes + unit * bytes);
        scale[u] = scales[unit >> shift];
      }
      LOMEM_UNROLL
      for (int u = 0; u < units_per_thread; ++u) {
        const std::int64_t begin = Grid::unit(block, thread, u) * elements;
        store_vector(y + begin, values_of(word[u], scale[u], random, begin));
      }
    } else {
      for (int u = 0; u < units_per_thread; ++u) {
        one_by_one(Grid::unit(block, thread, u), random);
      }
    }
  }

 private:
  /// The elements of a unit, of which the first is number `begin`.
  LOMEM_HOST_DEVICE static Vector<T, elements> values_of(
      std::uint64_t word, bfloat16 scale, const RoundingBits& random, std::int64_t begin) {
    static_assert(group_size % elements == 0);  // so that they share a block of random numbers
    PhiloxBlock<std::uint64_t> numbers{};
    if constexpr (Rounding::is_random) {
      numbers = random.block(begin);
    }
    const int place = elements == group_size ? 0 : static_cast<int>(begin % group_size);
    Vector<T, elements> values;
    LOMEM_UNROLL
    for (int j = 0; j < elements; ++j) {
      float code = code_of_word<bits>(word, j);
      if constexpr (Rounding::is_random) {
        code += dither(random_of(numbers, place + j));
      }
      values[j] = decoded<T>(code, to_compute(scale), value_limit<T>(scale));
    }
    return values;
  }

  LOMEM_HOST_DEVICE void one_by_one(std::int64_t unit, const RoundingBits& random) const {
    const std::int64_t begin = unit * elements;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < elements ? n - begin : elements);
    std::uint64_t word = 0;
    for (int b = 0; b < packed_bytes(count, bits); ++b) {
      word |= std::uint64_t{codes[unit * bytes + b]} << (8 * b);
    }
    const Vector<T, elements> values = values_of(word, scales[unit >> shift], random, begin);
    LOMEM_UNROLL
    for (int j = 0; j < elements; ++j) {
      if (j < count) {
        y[begin + j] = values[j];
      }
    }
  }
};

/// Calls run(body) with the body that encodes: for the launchers, on a GPU and on the CPU. Without `seed`, rounding to
/// nearest.
template <class Run>
auto group_encode_by(
    DType dtype, const void* x, std::int64_t n, const GroupFormat& format, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, bfloat16* scales, const Run& run) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_group_bits(format.bits, [&](auto width) {
      constexpr int bits = decltype(width)::value;
      const auto* elements = static_cast<const T*>(x);
      if (seed == nullptr) {
        return run(GroupEncode<T, bits, NearestRounding>(elements, n, format.group, NearestRounding{}, codes, scales));
      }
      return run(
          GroupEncode<T, bits, StochasticRounding>(
              elements, n, format.group, StochasticRounding{seed, offset}, codes, scales));
    });
  });
}

/// The same for decoding. With `seed`, dither is subtracted.
template <class Run>
auto group_decode_by(
    DType dtype, const std::uint8_t* codes, const bfloat16* scales, std::int64_t n, const GroupFormat& format,
    const std::int64_t* seed, std::uint64_t offset, void* y, const Run& run) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_group_bits(format.bits, [&](auto width) {
      constexpr int bits = decltype(width)::value;
      auto* elements = static_cast<T*>(y);
      if (seed == nullptr) {
        return run(GroupDecode<T, bits, NearestRounding>(codes, scales, n, format.group, NearestRounding{}, elements));
      }
      return run(
          GroupDecode<T, bits, StochasticRounding>(
              codes, scales, n, format.group, StochasticRounding{seed, offset}, elements));
    });
  });
}

}  // namespace lomem::cuda
