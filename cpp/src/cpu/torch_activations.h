// torch's activations on the CPU, run in tiles where that gives the same bits.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp_min_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu_cpu_dispatch.h>
#include <ATen/ops/relu_cpu_dispatch.h>
#include <ATen/ops/sigmoid_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>
#include <lomem/core/activation.h>
#include <lomem/core/dtype.h>

#include <algorithm>

#include "parallel.h"

namespace lomem::detail {

// Runs the torch op in tiles, so that what else is done with a tile is done while it is in the cache, and x is read
// from memory only once. A tile must give the same bits as a single call. Most of torch's kernels evaluate the
// remainder at the end of a thread's range by another formula, so the last bits depend on where ranges end. Exceptions:
//   - GELU of float32 and, on CPUs with AVX-512, of bfloat16 is oneDNN's, which treats every element alike (except in a
//     call with only one element);
//   - SiLU of 16-bit types: the formulas differ by less than rounding shows, for all 65,536 inputs;
//   - ReLU rounds nothing;
//   - one thread: there is only one range, and with tiles that are multiples of every vector length, the only remainder
//     is that of the range itself.
// This holds for x86, where the tests check it.

struct Tiling {
  bool with_threads;     // if false, only with one thread
  int64_t largest_tile;  // in elements
  int64_t least_input;   // smaller inputs, which stay in the last-level cache, are faster untiled
};

inline constexpr int64_t smallest_tile = int64_t{1} << 16;

/// Tiles that fit in a core's cache.
constexpr Tiling by_vectors(bool with_threads) {
  return {with_threads, int64_t{1} << 17, int64_t{1} << 19};
}

/// Large tiles: a call of oneDNN costs as much as about 30,000 elements.
inline constexpr Tiling by_onednn{true, int64_t{1} << 19, int64_t{1} << 23};

/// Whether torch has oneDNN compute bfloat16. (Where that is not known it is not, which is never wrong here.)
inline bool onednn_takes_bfloat16() {
#if defined(__x86_64__)
  static const bool takes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return takes;
#else
  return false;
#endif
}

inline bool is_onednn(at::ScalarType dtype) {
  return (dtype == at::kFloat || (dtype == at::kBFloat16 && onednn_takes_bfloat16())) && at::hasMKLDNN() &&
         at::globalContext().userEnabledMkldnn();
}

/// Grain of the loop over threads in torch's GELU.
inline int64_t grain_of_gelu(int64_t n) {
  return n / at::get_num_threads();
}

// (These bypass the dispatcher. `alike` says whether torch is known to compute all elements by one formula, and `grain`
// is that of its at::parallel_for over n elements, a large number.)

struct GELUValues {
  static bool alike(at::ScalarType dtype) {
    return is_onednn(dtype);
  }
  static int64_t grain(int64_t n) {
    return grain_of_gelu(n);
  }
  static Tiling tiling(at::ScalarType dtype) {
    return is_onednn(dtype) ? by_onednn : by_vectors(false);
  }
  static at::Tensor value(const at::Tensor& input) {
    return at::cpu::gelu(input, "none");
  }
  static void value_out(at::Tensor& output, const at::Tensor& input) {
    at::cpu::gelu_out(output, input, "none");
  }
};

struct GELUTanhValues {
  static bool alike(at::ScalarType /*dtype*/) {
    return false;
  }
  static int64_t grain(int64_t n) {
    return grain_of_gelu(n);
  }
  static Tiling tiling(at::ScalarType /*dtype*/) {
    return by_vectors(false);
  }
  static at::Tensor value(const at::Tensor& input) {
    return at::cpu::gelu(input, "tanh");
  }
  static void value_out(at::Tensor& output, const at::Tensor& input) {
    at::cpu::gelu_out(output, input, "tanh");
  }
};

struct SiLUValues {
  static bool alike(at::ScalarType /*dtype*/) {
    return false;
  }
  static int64_t grain(int64_t /*n*/) {
    return at::internal::GRAIN_SIZE;
  }
  static Tiling tiling(at::ScalarType dtype) {
    return by_vectors(dtype == at::kBFloat16 || dtype == at::kHalf);
  }
  static at::Tensor value(const at::Tensor& input) {
    return at::cpu::silu(input);
  }
  static void value_out(at::Tensor& output, const at::Tensor& input) {
    at::cpu::silu_out(output, input);
  }
};

struct ReLUValues {
  static bool alike(at::ScalarType /*dtype*/) {
    return true;
  }
  static int64_t grain(int64_t /*n*/) {
    return at::internal::GRAIN_SIZE;
  }
  static Tiling tiling(at::ScalarType /*dtype*/) {
    return by_vectors(true);
  }
  static at::Tensor value(const at::Tensor& input) {
    return at::cpu::relu(input);
  }
  static void value_out(at::Tensor& output, const at::Tensor& input) {
    at::cpu::clamp_min_out(output, input, 0);  // (which is what torch's relu calls)
  }
};

struct SigmoidValues {
  static bool alike(at::ScalarType /*dtype*/) {
    return false;
  }
  static int64_t grain(int64_t /*n*/) {
    return at::internal::GRAIN_SIZE;
  }
  static Tiling tiling(at::ScalarType /*dtype*/) {
    return by_vectors(false);
  }
  static at::Tensor value(const at::Tensor& input) {
    return at::cpu::sigmoid(input);
  }
  static void value_out(at::Tensor& output, const at::Tensor& input) {
    at::cpu::sigmoid_out(output, input);
  }
};

inline GELUValues values_of(Type<GELU> /*function*/) {
  return {};
}
inline GELUTanhValues values_of(Type<GELUTanh> /*function*/) {
  return {};
}
inline SiLUValues values_of(Type<SiLU> /*function*/) {
  return {};
}
inline ReLUValues values_of(Type<ReLU> /*function*/) {
  return {};
}
inline SigmoidValues values_of(Type<Sigmoid> /*function*/) {
  return {};
}

template <class Function>
using Values = decltype(values_of(Type<Function>{}));

/// Whether to tile an input of `n` elements that are contiguous, or rows of such.
inline bool may_tile([[maybe_unused]] int64_t n, [[maybe_unused]] const Tiling& tiling) {
#if defined(LOMEM_X86_KERNELS)
  if (n < tiling.least_input) {
    return false;
  }
  return tiling.with_threads || at::get_num_threads() == 1 || at::in_parallel_region();
#else
  return false;
#endif
}

inline int64_t tile_elements(int64_t n, const Tiling& tiling) {
  const int64_t several_a_thread = n / (4 * at::get_num_threads());
  return std::clamp(several_a_thread, smallest_tile, tiling.largest_tile) / cache_line_elements * cache_line_elements;
}

/// A 1-D tensor of `count` elements at `data`, which it does not own.
inline at::Tensor view_of(void* data, int64_t count, const at::Tensor& like) {
  return at::from_blob(data, {count}, at::TensorOptions().dtype(like.scalar_type()));
}

}  // namespace lomem::detail
