// What the autograd kernels share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../checks.h"
#include "../dispatch.h"

namespace lomem::detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool requires_grad(const at::Tensor& tensor) {
  return tensor.requires_grad();
}

inline bool requires_grad(const OptionalTensor& tensor) {
  return has_tensor(tensor) && tensor->requires_grad();
}

/// Whether a call must record its backward pass. Where it need not, the op below autograd is
/// called and nothing is kept.
template <class... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

/// Raises for a tensor with a forward-mode tangent, which would else be dropped in silence.
inline void check_no_tangent(const char* op, const char* argument, const OptionalTensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tensor(tensor) || !tensor->_fw_grad(/*level=*/0).defined(), op, ": ", argument,
      " has a forward-mode tangent, expected none: forward-mode automatic differentiation is not supported");
}

}  // namespace lomem::detail
