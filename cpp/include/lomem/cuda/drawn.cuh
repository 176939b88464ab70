// Codes drawn at random: bodies of CUDA kernels (see launch.cuh).
//
// A thread works on eight elements, which take whole bytes of codes and one block of random numbers.
#pragma once

#include <lomem/core/drawn.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/vector.cuh>

#include <cstdint>

namespace lomem::cuda {

/// Random bits of a seed in device memory.
struct DeviceRounding {
  const std::int64_t* seed;
  std::uint64_t offset;

  LOMEM_HOST_DEVICE RoundingBits bits() const {
    return {static_cast<std::uint64_t>(*seed), offset};
  }
};

/// Codes of x.
template <class T, int bits>
struct DrawnEncode {
  static constexpr int unit = group_size;

  // (In shared memory, where the pieces of a row lie in different banks; constant memory would serialize look-ups.)
  struct Shared {
    float coefficients[DrawnTable::degree + 1][DrawnTable::pieces];
  };

  DrawnTable table;
  DeviceRounding rounding;
  const T* x;
  std::uint8_t* codes;
  std::int64_t n;
  bool aligned;

  DrawnEncode(
      const DrawnTable& table_, const T* x_, std::int64_t n_, const DeviceRounding& rounding_, std::uint8_t* codes_)
      : table(table_),
        rounding(rounding_),
        x(x_),
        codes(codes_),
        n(n_),
        aligned(is_aligned(x, max_access) && is_aligned(codes, bytes_alignment<bits>)) {}

  std::int64_t blocks() const {
    return (n + unit * threads_per_block - 1) / (unit * threads_per_block);
  }

  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int thread, Shared& shared) const {
    constexpr int rows = threads_per_block / DrawnTable::pieces;
    const int piece = thread % DrawnTable::pieces;
    for (int k = thread / DrawnTable::pieces; k <= DrawnTable::degree; k += rows) {
      shared.coefficients[k][piece] = table.coefficients[k][piece];
    }
  }

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared& shared) const {
    const std::int64_t begin = (block * threads_per_block + thread) * unit;
    if (begin >= n) {
      return;
    }
    const PhiloxBlock<std::uint64_t> random = rounding.bits().block(begin);
    if (aligned && begin + unit <= n) {
      const Vector<T, unit> values = load_vector<unit>(x + begin);
      std::uint64_t word = 0;
      LOMEM_UNROLL
      for (int j = 0; j < unit; ++j) {
        word |= std::uint64_t{code(values[j], random_of(random, j), shared)} << (bits * j);
      }
      store_bytes<bits>(codes + begin / unit * bits, word);
    } else {
      const int count = static_cast<int>(n - begin < unit ? n - begin : unit);
      std::uint64_t word = 0;
      for (int j = 0; j < count; ++j) {
        word |= std::uint64_t{code(x[begin + j], random_of(random, j), shared)} << (bits * j);
      }
      for (int b = 0; b < packed_bytes(count, bits); ++b) {
        codes[begin / unit * bits + b] = static_cast<std::uint8_t>(word >> (8 * b));
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE std::uint8_t code(T element, std::uint32_t random, const Shared& shared) const {
    const DrawnPlace place = drawn_place(table, static_cast<float>(to_compute(element)));
    const float s = drawn_value(table, place, [&](int k) { return shared.coefficients[k]; });
    return drawn_code(drawn_target(s, bits), random);
  }
};

/// grad_input = grad_output * level of code.
template <class T, int bits>
struct DrawnBackward {
  using C = compute_t<T>;
  using Shared = Nothing;
  static constexpr int unit = group_size;

  DrawnLevels<C> levels;
  DeviceRounding rounding;
  const T* grad_output;
  const std::uint8_t* codes;
  T* grad_input;
  std::int64_t n;
  bool aligned;

  /// `levels_` are rounded once.
  DrawnBackward(
      const T* grad_output_, const std::uint8_t* codes_, const DrawnLevels<double>& levels_, std::int64_t n_,
      const DeviceRounding& rounding_, T* grad_input_)
      : levels{static_cast<C>(levels_.low), static_cast<C>(levels_.step)},
        rounding(rounding_),
        grad_output(grad_output_),
        codes(codes_),
        grad_input(grad_input_),
        n(n_),
        aligned(
            is_aligned(grad_output, max_access) && is_aligned(grad_input, max_access) &&
            is_aligned(codes, bytes_alignment<bits>)) {}

  std::int64_t blocks() const {
    return (n + unit * threads_per_block - 1) / (unit * threads_per_block);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    const std::int64_t begin = (block * threads_per_block + thread) * unit;
    if (begin >= n) {
      return;
    }
    const PhiloxBlock<std::uint64_t> random = rounding.bits().block(begin);
    if (aligned && begin + unit <= n) {
      Vector<T, unit> grad = load_vector<unit>(grad_output + begin);
      const std::uint64_t word = load_bytes<bits>(codes + begin / unit * bits);
      LOMEM_UNROLL
      for (int j = 0; j < unit; ++j) {
        grad[j] = gradient(grad[j], word, j, random);
      }
      store_vector(grad_input + begin, grad);
    } else {
      const int count = static_cast<int>(n - begin < unit ? n - begin : unit);
      std::uint64_t word = 0;
      for (int b = 0; b < packed_bytes(count, bits); ++b) {
        word |= std::uint64_t{codes[begin / unit * bits + b]} << (8 * b);
      }
      for (int j = 0; j < count; ++j) {
        grad_input[begin + j] = gradient(grad_output[begin + j], word, j, random);
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE T gradient(T grad, std::uint64_t word, int j, const PhiloxBlock<std::uint64_t>& random) const {
    const C level = drawn_level(levels, unpack_word<bits>(word, j), random_of(random, j));
    return from_compute<T>(to_compute(grad) * level);
  }
};

/// Calls run(body) with the body that draws codes: for the launchers, on a GPU and on the CPU.
template <class Run>
auto drawn_encode_by(
    DType dtype, const DrawnTable& table, const void* x, std::int64_t n, int bits, const DeviceRounding& rounding,
    std::uint8_t* codes, const Run& run) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_bits(bits, [&](auto width) {
      return run(DrawnEncode<T, decltype(width)::value>(table, static_cast<const T*>(x), n, rounding, codes));
    });
  });
}

/// The same for the gradient.
template <class Run>
auto drawn_backward_by(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const DrawnLevels<double>& levels, int bits,
    std::int64_t n, const DeviceRounding& rounding, void* grad_input, const Run& run) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_bits(bits, [&](auto width) {
      return run(
          DrawnBackward<T, decltype(width)::value>(
              static_cast<const T*>(grad_output), codes, levels, n, rounding, static_cast<T*>(grad_input)));
    });
  });
}

}  // namespace lomem::cuda
