// The functions that fused_activation_forward supports.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/core/activation.h>
#include <lomem/core/dtype.h>

#include <string_view>

#include "../checks.h"
#include "../op.h"

namespace lomem::detail {

/// Calls visit(Type<GELU>{}) or similar with the function of that name.
template <class Visitor>
auto visit_fused(std::string_view function, Visitor&& visit) {
  if (function == "gelu") {
    return visit(Type<GELU>{});
  }
  if (function == "gelu_tanh") {
    return visit(Type<GELUTanh>{});
  }
  TORCH_CHECK_VALUE(
      function == "silu", ops::fused_activation_forward.name, ": function is '", function,
      "', expected one of gelu, gelu_tanh, silu");
  return visit(Type<SiLU>{});
}

inline void check_fused_forward(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  constexpr const char* op = ops::fused_activation_forward.name;
  check_float_tensor(op, "input", input);
  check_boundaries(op, boundaries, bits);
}

/// Whether `boundaries` are those of the step function that the kernels of `Function` are compiled for.
template <class Function>
bool are_published_boundaries(at::ArrayRef<double> boundaries, int64_t bits) {
  using Steps = typename Function::PublishedSteps;
  if (bits != Steps::bits || boundaries.size() != Steps::levels - 1) {
    return false;
  }
  for (int i = 0; i + 1 < Steps::levels; ++i) {
    if (boundaries[i] != Steps::boundary(i)) {
      return false;
    }
  }
  return true;
}

}  // namespace lomem::detail
