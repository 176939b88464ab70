// What the gradients from codes share: codes follow the memory order of the forward's output.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "autograd.h"

namespace lomem::detail {

/// The permutation that makes a dense tensor row-major, or nothing where it is already.
inline std::vector<int64_t> memory_order(const at::Tensor& dense) {
  // Sizes may be symbolic and depend on data. Where they leave it open whether the tensor is
  // row-major, the strides are sorted: the order that comes out is right either way.
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

/// Saves codes, and of the output only how it lies in memory: that is the order of the codes. (Row-major is
/// not said: an entry costs more than a small activation.)
inline void save_codes(AutogradContext* ctx, const at::Tensor& codes, const at::Tensor& output) {
  ctx->save_for_backward({codes});
  const std::vector<int64_t> order = memory_order(output);
  if (!order.empty()) {
    ctx->saved_data["order"] = order;
  }
}

/// grad_output * levels[code], by differentiable operations, for gradients of gradients.
inline at::Tensor gradient_from_codes(
    AutogradContext* ctx, const at::Tensor& grad_output, at::ArrayRef<double> levels, int64_t bits) {
  const at::Tensor codes = ctx->get_saved_variables()[0];
  const auto saved_order = ctx->saved_data.find("order");
  if (saved_order == ctx->saved_data.end()) {
    return step_activation_backward(grad_output, codes, levels, bits);
  }
  const std::vector<int64_t> order = saved_order->second.toIntVector();
  return step_activation_backward(grad_output.permute(order), codes, levels, bits).permute(inverse(order));
}

}  // namespace lomem::detail
