// How the output of an activation lies in memory, which is the order of its codes.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../autograd.h"

namespace lomem::detail {

/// The permutation that makes a dense tensor row-major, or nothing if it already is.
inline std::vector<int64_t> memory_order(const at::Tensor& dense) {
  // Sizes may be symbolic and data-dependent. If they leave open whether the tensor is row-major, the strides are
  // sorted: the resulting order is right either way.
  if (dense.is_contiguous_or_false()) {
    return {};
  }
  const auto strides = dense.sym_strides();
  std::vector<int64_t> order(strides.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

inline std::vector<int64_t> inverse(const std::vector<int64_t>& order) {
  std::vector<int64_t> result(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    result[order[i]] = static_cast<int64_t>(i);
  }
  return result;
}

/// Saves of an output only how it lies in memory.
inline void save_order(AutogradContext* ctx, const at::Tensor& output) {
  // (A row-major order is not saved: an entry costs more than a small activation.)
  const std::vector<int64_t> order = memory_order(output);
  if (!order.empty()) {
    ctx->saved_data["order"] = order;
  }
}

/// gradient(grad_output), for a gradient that takes its argument in row-major order to be that of the codes.
template <class Gradient>
at::Tensor in_saved_order(AutogradContext* ctx, const at::Tensor& grad_output, const Gradient& gradient) {
  const auto saved_order = ctx->saved_data.find("order");
  if (saved_order == ctx->saved_data.end()) {
    return gradient(grad_output);
  }
  const std::vector<int64_t> order = saved_order->second.toIntVector();
  return gradient(grad_output.permute(order)).permute(inverse(order));
}

}  // namespace lomem::detail
