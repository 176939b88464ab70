// Gradients of gated units.
#pragma once

#include <lomem/core/gated.h>

#include "../kernel_table.h"
#include "vector.h"

namespace lomem::cpu {
namespace {

/// The gradients of `lanes` elements, of which all or the first ones are read and written.
template <class Function, class T, class Part>
inline void gated_backward_vector(
    const T* grad_output, const T* gate, const T* up, T* grad_gate, T* grad_up, bool stream, Part part) {
  const Floats grad = load_as<float>(grad_output, part);
  const auto [value, slope] = ByPolynomials<Function, Floats, Words>::at(load_as<float>(gate, part));
  if (grad_gate != nullptr) {
    store_as<float>(
        gate_gradient<Function>(grad * load_as<float>(up, part), slope), grad_gate, stream, part);
  }
  if (grad_up != nullptr) {
    store_as<float>(grad * value, grad_up, stream, part);
  }
}

template <class Function, class T>
void gated_backward_elements(
    const T* grad_output, const T* gate, const T* up, std::int64_t n, T* grad_gate, T* grad_up, bool stream) {
  const auto moved = [](T* target, std::int64_t i) { return target == nullptr ? nullptr : target + i; };
  if constexpr (sizeof(T) == sizeof(double)) {
    for (std::int64_t i = 0; i < n; ++i) {
      const auto [value, slope] = Function::value_and_slope(gate[i]);
      if (grad_gate != nullptr) {
        grad_gate[i] = gate_gradient<Function>(grad_output[i] * up[i], slope);
      }
      if (grad_up != nullptr) {
        grad_up[i] = grad_output[i] * value;
      }
    }
  } else {
    const bool streams =
        stream && is_aligned(grad_gate, lanes * sizeof(T)) && is_aligned(grad_up, lanes * sizeof(T));
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      gated_backward_vector<Function>(
          grad_output + i, gate + i, up + i, moved(grad_gate, i), moved(grad_up, i), streams, Full{});
    }
    if (i < n) {
      gated_backward_vector<Function>(
          grad_output + i, gate + i, up + i, moved(grad_gate, i), moved(grad_up, i), false,
          Partial{static_cast<int>(n - i)});
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
