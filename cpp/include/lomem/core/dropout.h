// Dropout: kept elements are multiplied by 1 / (1 - p), the others by 0.
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>
#include <lomem/core/packing.h>

#include <cstdint>

namespace lomem {

/// 1 / (1 - p) in the arithmetic type of T, by which torch multiplies on CUDA.
template <class T>
LOMEM_HOST_DEVICE constexpr compute_t<T> dropout_scale(double p) {
  using C = compute_t<T>;
  return C(1) / static_cast<C>(1.0 - p);
}

/// The same rounded to T, by which torch multiplies on the CPU, where its mask has the dtype of the input.
template <class T>
LOMEM_HOST_DEVICE constexpr compute_t<T> rounded_dropout_scale(double p) {
  return to_compute(from_compute<T>(dropout_scale<T>(p)));
}

/// x * scale or x * 0, rounded once. As in torch, that is NaN for an infinity or NaN that is not kept.
template <class T>
LOMEM_HOST_DEVICE constexpr T scaled_if(bool kept, T x, compute_t<T> scale) {
  return from_compute<T>(to_compute(x) * (kept ? scale : compute_t<T>(0)));
}

/// product[i] = x[i] * (bit i of mask ? scale : 0), for i in [0, n). The mask is in the layout of packing.h, with 1
/// bit.
template <class T>
LOMEM_HOST_DEVICE constexpr void mask_multiply(
    const T* x, const std::uint8_t* mask, compute_t<T> scale, std::int64_t n, T* product) {
  for (std::int64_t begin = 0; begin < n; begin += group_size) {
    const int count = static_cast<int>(n - begin < group_size ? n - begin : group_size);
    for (int j = 0; j < count; ++j) {
      product[begin + j] = scaled_if(unpack_word<1>(mask[begin / group_size], j) != 0, x[begin + j], scale);
    }
  }
}

}  // namespace lomem
