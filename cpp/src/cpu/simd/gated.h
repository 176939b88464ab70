// Gated units: products, and gradients.
#pragma once

#include <lomem/core/gated.h>

#include "../kernel_table.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

// Products -------------------------------------------------------------------------------------------

template <class T>
void multiply_elements(const T* a, const T* b, std::int64_t n, T* product, bool stream) {
  std::int64_t i = 0;
  if constexpr (sizeof(T) < sizeof(double)) {
    const bool streams = stream && is_aligned(product, lanes * sizeof(T) * 2);
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const FloatPair x = load_pair(a + i);
      const FloatPair y = load_pair(b + i);
      store_pair<T>({x.first * y.first, x.second * y.second}, product + i, streams);
    }
    if (streams) {
      stream_fence();
    }
  }
  for (; i < n; ++i) {
    product[i] = from_compute<T>(to_compute(a[i]) * to_compute(b[i]));
  }
}

void multiply(DType dtype, const void* a, const void* b, std::int64_t n, void* product, bool stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    multiply_elements(static_cast<const T*>(a), static_cast<const T*>(b), n, static_cast<T*>(product), stream);
  });
}

// Gradients ------------------------------------------------------------------------------------------

struct FusedFloats {
  static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return fused_multiply_add(a, b, c);
  }
};

struct GatedFloats {
  Floats of_gate;
  Floats of_up;
};

template <class Function, class T>
inline GatedFloats gated_gradients(const Floats& grad, const Floats& gate, const Floats& up) {
  const auto [value, slope] = value_and_slope<Function, PolynomialMath<T, Floats, Words, FusedFloats>>(gate);
  return {gate_gradient<Function>(grad * up, slope), grad * value};
}

/// Of the first elements of vectors.
template <class Function, class T>
[[gnu::noinline]] void gated_backward_part(
    const T* grad_output, const T* gate, const T* up, T* grad_gate, T* grad_up, Partial part) {
  const GatedFloats gradients = gated_gradients<Function, T>(
      load_as<float>(grad_output, part), load_as<float>(gate, part), load_as<float>(up, part));
  if (grad_gate != nullptr) {
    store_as<float>(gradients.of_gate, grad_gate, false, part);
  }
  if (grad_up != nullptr) {
    store_as<float>(gradients.of_up, grad_up, false, part);
  }
}

template <class Function, class T>
void gated_backward_elements(
    const T* grad_output, const T* gate, const T* up, std::int64_t n, T* grad_gate, T* grad_up, bool stream) {
  if constexpr (sizeof(T) == sizeof(double)) {
    for (std::int64_t i = 0; i < n; ++i) {
      const auto [value, slope] = value_and_slope<Function, LibraryMath<double>>(gate[i]);
      if (grad_gate != nullptr) {
        grad_gate[i] = gate_gradient<Function>(grad_output[i] * up[i], slope);
      }
      if (grad_up != nullptr) {
        grad_up[i] = grad_output[i] * value;
      }
    }
  } else {
    constexpr std::size_t bytes = 2 * lanes * sizeof(T);
    const bool streams = stream && is_aligned(grad_gate, bytes) && is_aligned(grad_up, bytes);
    std::int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const FloatPair grad = load_pair(grad_output + i);
      const FloatPair x = load_pair(gate + i);
      const FloatPair factor = load_pair(up + i);
      const GatedFloats first = gated_gradients<Function, T>(grad.first, x.first, factor.first);
      const GatedFloats second = gated_gradients<Function, T>(grad.second, x.second, factor.second);
      if (grad_gate != nullptr) {
        store_pair<T>({first.of_gate, second.of_gate}, grad_gate + i, streams);
      }
      if (grad_up != nullptr) {
        store_pair<T>({first.of_up, second.of_up}, grad_up + i, streams);
      }
    }
    for (; i < n; i += lanes) {
      gated_backward_part<Function>(
          grad_output + i, gate + i, up + i, grad_gate == nullptr ? nullptr : grad_gate + i,
          grad_up == nullptr ? nullptr : grad_up + i, Partial{n - i < lanes ? static_cast<int>(n - i) : lanes});
    }
    if (streams) {
      stream_fence();
    }
  }
}

void gated_backward(
    GatedActivation activation, DType dtype, const void* grad_output, const void* gate, const void* up, std::int64_t n,
    void* grad_gate, void* grad_up, bool stream) {
  visit_gated(activation, [&](auto function) {
    visit_dtype(dtype, [&](auto element) {
      using T = typename decltype(element)::type;
      gated_backward_elements<typename decltype(function)::type>(
          static_cast<const T*>(grad_output), static_cast<const T*>(gate), static_cast<const T*>(up), n,
          static_cast<T*>(grad_gate), static_cast<T*>(grad_up), stream);
    });
  });
}

}  // namespace
}  // namespace lomem::cpu
