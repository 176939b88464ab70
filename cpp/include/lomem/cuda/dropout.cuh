// Dropout: bodies of CUDA kernels (see launch.cuh). Like step activations of 1 bit (step.cuh), in units of eight
// elements.
#pragma once

#include <lomem/core/dropout.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/step.cuh>
#include <lomem/cuda/vector.cuh>

#include <cstdint>

namespace lomem::cuda {

/// A mask in memory, with a byte for each unit.
struct StoredMask {
  const std::uint8_t* bits;

  LOMEM_HOST_DEVICE std::uint8_t at(std::int64_t unit) const {
    return bits[unit];
  }
};

/// The mask of a seed in device memory.
struct SeededMask {
  const std::int64_t* seed;
  std::uint32_t bound;

  LOMEM_HOST_DEVICE std::uint8_t at(std::int64_t unit) const {
    return mask_of_seed(static_cast<std::uint64_t>(*seed), static_cast<std::uint64_t>(unit), bound);
  }
};

/// product = x * (scale or 0).
template <class T, class Mask>
struct MaskedMultiply {
  using C = compute_t<T>;
  using Grid = UnitGrid<T, 1>;
  using Shared = Nothing;
  static constexpr int elements = Grid::elements;
  static_assert(elements == group_size);

  const T* x;
  Mask mask;
  C scale;
  T* product;
  std::int64_t n;
  bool aligned;

  /// `scale_` is rounded once.
  MaskedMultiply(const T* x_, const Mask& mask_, double scale_, std::int64_t n_, T* product_)
      : x(x_),
        mask(mask_),
        scale(static_cast<C>(scale_)),
        product(product_),
        n(n_),
        aligned(is_aligned(x, max_access) && is_aligned(product, max_access)) {}

  std::int64_t blocks() const {
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    if (aligned && Grid::is_full(block, n)) {
      Vector<T, elements> values[units_per_thread];
      std::uint8_t kept[units_per_thread];
      for (int u = 0; u < units_per_thread; ++u) {
        const std::int64_t unit = Grid::unit(block, thread, u);
        values[u] = load_vector<elements>(x + unit * elements);
        kept[u] = mask.at(unit);
      }
      for (int u = 0; u < units_per_thread; ++u) {
        for (int j = 0; j < elements; ++j) {
          values[u][j] = scaled_if(unpack_word<1>(kept[u], j) != 0, values[u][j], scale);
        }
        store_vector(product + Grid::unit(block, thread, u) * elements, values[u]);
      }
    } else {
      for (int u = 0; u < units_per_thread; ++u) {
        one_by_one(Grid::unit(block, thread, u));
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE void one_by_one(std::int64_t unit) const {
    const std::int64_t begin = unit * elements;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < elements ? n - begin : elements);
    const std::uint8_t kept = mask.at(unit);
    for (int j = 0; j < count; ++j) {
      product[begin + j] = scaled_if(unpack_word<1>(kept, j) != 0, x[begin + j], scale);
    }
  }
};

}  // namespace lomem::cuda
