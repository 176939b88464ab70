// Step activations: bodies of CUDA kernels (see launch.cuh), and building blocks to fuse codes into other kernels.
//
// A thread works on units: the smallest number of consecutive elements that fill 16 bytes and whole bytes of codes. So
// no two threads touch the same byte, and every access is one vector.
#pragma once

#include <lomem/core/activation.h>
#include <lomem/core/packing.h>
#include <lomem/core/step.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/vector.cuh>

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lomem::cuda {
namespace detail {

constexpr int unit_elements(int element_bytes, int bits) {
  int elements = max_access / element_bytes;
  while (elements * bits % 8 != 0) {
    elements *= 2;
  }
  return elements;
}

}  // namespace detail

template <class T, int bits>
struct Unit {
  static constexpr int elements = detail::unit_elements(sizeof(T), bits);
  static constexpr int bytes = elements * bits / 8;
  static_assert(elements <= group_size);
};

/// Number of independent loads that a thread has in flight.
inline constexpr int units_per_thread = 2;

/// How units are distributed: neighboring threads take neighboring units.
template <class T, int bits>
struct UnitGrid {
  static constexpr int elements = Unit<T, bits>::elements;
  static constexpr std::int64_t block_units = units_per_thread * threads_per_block;
  static constexpr std::int64_t block_elements = elements * block_units;

  LOMEM_HOST_DEVICE static constexpr std::int64_t blocks(std::int64_t n) {
    return (n + block_elements - 1) / block_elements;
  }
  /// Index of unit number `u` of a thread.
  LOMEM_HOST_DEVICE static constexpr std::int64_t unit(std::int64_t block, int thread, int u) {
    return block * block_units + u * threads_per_block + thread;
  }
  LOMEM_HOST_DEVICE static constexpr bool is_full(std::int64_t block, std::int64_t n) {
    return (block + 1) * block_elements <= n;
  }
};

namespace detail {

/// Whether one instruction compares two elements: bfloat16 on Hopper and later.
template <class T>
LOMEM_HOST_DEVICE constexpr bool compares_pairs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return std::is_same_v<T, float16>;
#else
  return std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>;
#endif
}

/// 0xffff in each half of `pair` that is greater than `boundary`, otherwise 0. NaN is not greater.
template <class T>
LOMEM_HOST_DEVICE inline std::uint32_t greater_mask(std::uint32_t pair, T boundary) {
#if defined(__CUDA_ARCH__)
  const std::uint32_t both = boundary.bits | static_cast<std::uint32_t>(boundary.bits) << 16;
  if constexpr (std::is_same_v<T, float16>) {
    __half2 a, b;
    memcpy(&a, &pair, sizeof(a));
    memcpy(&b, &both, sizeof(b));
    return __hgt2_mask(a, b);
  } else {
    __nv_bfloat162 a, b;
    memcpy(&a, &pair, sizeof(a));
    memcpy(&b, &both, sizeof(b));
    return __hgt2_mask(a, b);
  }
#else
  const T low{static_cast<std::uint16_t>(pair)};
  const T high{static_cast<std::uint16_t>(pair >> 16)};
  const auto c = to_compute(boundary);
  return (to_compute(low) > c ? 0xffffu : 0u) | (to_compute(high) > c ? 0xffff0000u : 0u);
#endif
}

/// Eight 2-bit codes of 16-bit elements, two elements per instruction.
template <class Step, class T>
LOMEM_HOST_DEVICE inline std::uint64_t encode_pairs(const Vector<T, 8>& x) {
  // For c between two neighboring values of T, x > c is equivalent to x > the lower of them.
  constexpr T c1 = largest_not_above<T>(static_cast<float>(Step::boundary(0)));
  constexpr T c2 = largest_not_above<T>(static_cast<float>(Step::boundary(1)));
  constexpr T c3 = largest_not_above<T>(static_cast<float>(Step::boundary(2)));
  // Element 0 uses bits 0 and 1 of the low half, element 1 uses bits 2 and 3 of the high half; pair p is shifted by
  // 4 * p bits.
  constexpr std::uint32_t low_bits = 0x00040001u;
  constexpr std::uint32_t high_bits = low_bits << 1;
  std::uint32_t halves = 0;
  for (int p = 0; p < 4; ++p) {
    const std::uint32_t pair = x[2 * p].bits | static_cast<std::uint32_t>(x[2 * p + 1].bits) << 16;
    const std::uint32_t m1 = greater_mask(pair, c1);
    const std::uint32_t m2 = greater_mask(pair, c2);
    const std::uint32_t m3 = greater_mask(pair, c3);
    // Number of masks that are set, in binary: m1 includes m2, which includes m3.
    halves |= ((m1 ^ m2 ^ m3) & (low_bits << (4 * p))) | (m2 & (high_bits << (4 * p)));
  }
  return (halves | halves >> 16) & 0xffffu;
}

}  // namespace detail

/// The packed codes of `count` = 1, 2, 4 or 8 elements, with code 0 in the lowest bits. (For fewer elements than a
/// vector, use Step::code for each, and pack_group.)
template <class Step, class T, int count>
LOMEM_HOST_DEVICE std::uint64_t encode(const Vector<T, count>& x) {
  static_assert(
      std::is_same_v<T, double> || std::is_same_v<T, float> || std::is_same_v<T, bfloat16> ||
          std::is_same_v<T, float16>,
      "elements are double, float, lomem::bfloat16 or lomem::float16 (to which __half* may be cast)");
  if constexpr (detail::compares_pairs<T>() && count == 8 && Step::bits == 2) {
    return detail::encode_pairs<Step, T>(x);
  } else {
    std::uint8_t codes[count];
    for (int j = 0; j < count; ++j) {
      codes[j] = Step::template code<T>(x[j]);
    }
    return pack_word<Step::bits>(codes, count);
  }
}

/// output = Function(input), and the codes of the input.
template <class Function, class Step, class T>
struct StepForward {
  using Grid = UnitGrid<T, Step::bits>;
  using Shared = Nothing;
  static constexpr int elements = Grid::elements;
  static constexpr int code_bytes = Unit<T, Step::bits>::bytes;

  const T* input;
  T* output;
  std::uint8_t* codes;
  std::int64_t n;
  bool aligned;

  StepForward(const T* input_, std::int64_t n_, T* output_, std::uint8_t* codes_)
      : input(input_),
        output(output_),
        codes(codes_),
        n(n_),
        aligned(
            is_aligned(input, max_access) && is_aligned(output, max_access) &&
            is_aligned(codes, bytes_alignment<code_bytes>)) {}

  std::int64_t blocks() const {
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    if (aligned && Grid::is_full(block, n)) {
      Vector<T, elements> x[units_per_thread];
      for (int u = 0; u < units_per_thread; ++u) {
        x[u] = load_vector<elements>(input + Grid::unit(block, thread, u) * elements);
      }
      for (int u = 0; u < units_per_thread; ++u) {
        const std::int64_t unit = Grid::unit(block, thread, u);
        store_bytes<code_bytes>(codes + unit * code_bytes, encode<Step>(x[u]));
        Vector<T, elements> y;
        for (int j = 0; j < elements; ++j) {
          y[j] = value(x[u][j]);
        }
        store_vector(output + unit * elements, y);
      }
    } else {
      for (int u = 0; u < units_per_thread; ++u) {
        one_by_one(Grid::unit(block, thread, u));
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE static T value(T x) {
    return from_compute<T>(Function::value(to_compute(x)));
  }

  LOMEM_HOST_DEVICE void one_by_one(std::int64_t unit) const {
    const std::int64_t begin = unit * elements;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < elements ? n - begin : elements);
    std::uint64_t word = 0;
    for (int j = 0; j < count; ++j) {
      const T x = input[begin + j];
      const std::uint8_t code = Step::template code<T>(x);
      word |= pack_word<Step::bits>(&code, 1) << (Step::bits * j);
      output[begin + j] = value(x);
    }
    const int bytes = packed_bytes(count, Step::bits);
    for (int b = 0; b < bytes; ++b) {
      codes[unit * code_bytes + b] = static_cast<std::uint8_t>(word >> (8 * b));
    }
  }
};

/// Codes among 2^bits - 1 ascending boundaries known at run time.
template <class T, int bits_>
struct SearchCoder {
  static constexpr int bits = bits_;
  using C = compute_t<T>;

  // (Searched in shared memory: threads' look-ups in constant memory would be serialized.)
  struct Shared {
    C values[max_code(bits)];
  };
  Shared boundaries{};

  /// Each boundary is rounded once.
  explicit SearchCoder(const double* boundaries_) {
    for (int i = 0; i < max_code(bits); ++i) {
      boundaries.values[i] = static_cast<C>(boundaries_[i]);
    }
  }

  LOMEM_HOST_DEVICE void prepare(int thread, Shared& shared) const {
    static_assert(max_code(bits) <= threads_per_block);
    if (thread < max_code(bits)) {
      shared.values[thread] = boundaries.values[thread];
    }
  }
  LOMEM_HOST_DEVICE std::uint8_t code(T x, const Shared& shared) const {
    return search_code<bits>(to_compute(x), shared.values);
  }
};

/// One-bit codes: whether low <= x <= high.
template <class T>
struct BandCoder {
  static constexpr int bits = 1;
  using Shared = Nothing;
  compute_t<T> low;
  compute_t<T> high;

  BandCoder(double low_, double high_) : low(static_cast<compute_t<T>>(low_)), high(static_cast<compute_t<T>>(high_)) {}

  LOMEM_HOST_DEVICE void prepare(int /*thread*/, Shared& /*shared*/) const {}
  LOMEM_HOST_DEVICE std::uint8_t code(T x, const Shared& /*shared*/) const {
    return band_code(to_compute(x), low, high);
  }
};

/// Computes only the packed codes of the input.
template <class Coder, class T>
struct StepEncode {
  using Grid = UnitGrid<T, Coder::bits>;
  using Shared = typename Coder::Shared;
  static constexpr int elements = Grid::elements;
  static constexpr int code_bytes = Unit<T, Coder::bits>::bytes;

  Coder coder;
  const T* input;
  std::uint8_t* codes;
  std::int64_t n;
  bool aligned;

  StepEncode(const Coder& coder_, const T* input_, std::int64_t n_, std::uint8_t* codes_)
      : coder(coder_),
        input(input_),
        codes(codes_),
        n(n_),
        aligned(is_aligned(input, max_access) && is_aligned(codes, bytes_alignment<code_bytes>)) {}

  std::int64_t blocks() const {
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int thread, Shared& shared) const {
    coder.prepare(thread, shared);
  }

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared& shared) const {
    if (aligned && Grid::is_full(block, n)) {
      Vector<T, elements> x[units_per_thread];
      LOMEM_UNROLL
      for (int u = 0; u < units_per_thread; ++u) {
        x[u] = load_vector<elements>(input + Grid::unit(block, thread, u) * elements);
      }
      LOMEM_UNROLL
      for (int u = 0; u < units_per_thread; ++u) {
        std::uint64_t word = 0;
        LOMEM_UNROLL
        for (int j = 0; j < elements; ++j) {
          const std::uint8_t code = coder.code(x[u][j], shared);
          word |= pack_word<Coder::bits>(&code, 1) << (Coder::bits * j);
        }
        store_bytes<code_bytes>(codes + Grid::unit(block, thread, u) * code_bytes, word);
      }
    } else {
      for (int u = 0; u < units_per_thread; ++u) {
        one_by_one(Grid::unit(block, thread, u), shared);
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE void one_by_one(std::int64_t unit, const Shared& shared) const {
    const std::int64_t begin = unit * elements;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < elements ? n - begin : elements);
    // (No array: its index is known only at run time, so it would be placed in local memory.)
    std::uint64_t word = 0;
    for (int j = 0; j < count; ++j) {
      const std::uint8_t code = coder.code(input[begin + j], shared);
      word |= pack_word<Coder::bits>(&code, 1) << (Coder::bits * j);
    }
    const int bytes = packed_bytes(count, Coder::bits);
    for (int b = 0; b < bytes; ++b) {
      codes[unit * code_bytes + b] = static_cast<std::uint8_t>(word >> (8 * b));
    }
  }
};

/// grad_input = grad_output * level of code.
template <class T, int bits>
struct StepBackward {
  using C = compute_t<T>;
  using Grid = UnitGrid<T, bits>;
  static constexpr int elements = Grid::elements;
  static constexpr int code_bytes = Unit<T, bits>::bytes;
  static constexpr int level_count = 1 << bits;

  struct Levels {
    C values[level_count];
  };
  // With up to four levels, the level is selected in registers. More are looked up in shared memory; constant memory
  // would serialize the look-ups.
  static constexpr bool looked_up = bits > 2;
  using Shared = std::conditional_t<looked_up, Levels, Nothing>;

  const T* grad_output;
  const std::uint8_t* codes;
  T* grad_input;
  std::int64_t n;
  bool aligned;
  Levels levels;

  /// `levels_` has 2^bits entries, each rounded once.
  StepBackward(
      const T* grad_output_, const std::uint8_t* codes_, const double* levels_, std::int64_t n_, T* grad_input_)
      : grad_output(grad_output_),
        codes(codes_),
        grad_input(grad_input_),
        n(n_),
        aligned(
            is_aligned(grad_output, max_access) && is_aligned(grad_input, max_access) &&
            is_aligned(codes, bytes_alignment<code_bytes>)),
        levels{} {
    for (int code = 0; code < level_count; ++code) {
      levels.values[code] = static_cast<C>(levels_[code]);
    }
  }

  std::int64_t blocks() const {
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int thread, Shared& shared) const {
    if constexpr (looked_up) {
      static_assert(level_count <= threads_per_block);
      if (thread < level_count) {
        shared.values[thread] = levels.values[thread];
      }
    }
  }

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared& shared) const {
    if (aligned && Grid::is_full(block, n)) {
      Vector<T, elements> grad[units_per_thread];
      std::uint64_t word[units_per_thread];
      for (int u = 0; u < units_per_thread; ++u) {
        const std::int64_t unit = Grid::unit(block, thread, u);
        grad[u] = load_vector<elements>(grad_output + unit * elements);
        word[u] = load_bytes<code_bytes>(codes + unit * code_bytes);
      }
      for (int u = 0; u < units_per_thread; ++u) {
        for (int j = 0; j < elements; ++j) {
          grad[u][j] = step_gradient<bits, T>(grad[u][j], level(unpack_word<bits>(word[u], j), shared));
        }
        store_vector(grad_input + Grid::unit(block, thread, u) * elements, grad[u]);
      }
    } else {
      for (int u = 0; u < units_per_thread; ++u) {
        one_by_one(Grid::unit(block, thread, u), shared);
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE C level(int code, const Shared& shared) const {
    if constexpr (looked_up) {
      return shared.values[code];
    } else if constexpr (bits == 2) {
      const C low = (code & 1) != 0 ? levels.values[1] : levels.values[0];
      const C high = (code & 1) != 0 ? levels.values[3] : levels.values[2];
      return (code & 2) != 0 ? high : low;
    } else {
      return code != 0 ? levels.values[1] : levels.values[0];
    }
  }

  LOMEM_HOST_DEVICE void one_by_one(std::int64_t unit, const Shared& shared) const {
    const std::int64_t begin = unit * elements;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < elements ? n - begin : elements);
    std::uint64_t word = 0;
    const int bytes = packed_bytes(count, bits);
    for (int b = 0; b < bytes; ++b) {
      word |= std::uint64_t{codes[unit * code_bytes + b]} << (8 * b);
    }
    for (int j = 0; j < count; ++j) {
      const C factor = level(unpack_word<bits>(word, j), shared);
      grad_input[begin + j] = step_gradient<bits, T>(grad_output[begin + j], factor);
    }
  }
};

}  // namespace lomem::cuda
