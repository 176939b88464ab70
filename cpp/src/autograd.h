// Helpers shared by the autograd kernels.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "checks.h"
#include "op.h"

namespace lomem::detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool requires_grad(const at::Tensor& tensor) {
  return tensor.requires_grad();
}

inline bool requires_grad(const OptionalTensor& tensor) {
  return has_tensor(tensor) && tensor->requires_grad();
}

/// Whether a call must record its backward pass. If not, the op below autograd is called and nothing is saved.
template <class... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

/// Raises for a tensor with a forward-mode tangent, which would otherwise be dropped silently.
inline void check_no_tangent(const char* op, const char* argument, const OptionalTensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tensor(tensor) || !tensor->_fw_grad(/*level=*/0).defined(), op, ": ", argument,
      " has a forward-mode tangent, expected none: forward-mode automatic differentiation is not supported");
}

/// A tensor as a matrix: all dimensions but the last are rows.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  return tensor.reshape_symint({leading_rows(tensor), tensor.sym_size(-1)});
}

/// The sizes of a tensor with another last one.
inline c10::SymDimVector with_last(c10::SymIntArrayRef sizes, const c10::SymInt& last) {
  c10::SymDimVector result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

using NodePointer = decltype(torch::autograd::Edge::function);

/// The node of a torch::autograd::Function, with a fixed name: torch's own node demangles its type name at every call.
template <class F>
struct FunctionNode : torch::autograd::CppNode<F> {
  std::string name() const override {
    return F::name;
  }

  /// (In older versions of torch, nodes are held by std::shared_ptr.)
  template <class Pointer = NodePointer>
  static auto make() {
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
      return std::shared_ptr<FunctionNode>(new FunctionNode, [](auto* node) { deleteNode(node); });
    } else {
      return c10::make_intrusive<FunctionNode>();
    }
  }
};

/// torch::autograd::Function::apply for functions of one tensor whose output is neither their input nor a view of it:
/// the other cases that torch's version handles cost more than a small activation. F::backward receives an undefined
/// gradient as is, and returns one gradient.
template <class F, class... Args>
at::Tensor apply_function(const at::Tensor& input, const Args&... args) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (functorch) {
    functorch->checkSupportsCppAutogradFunction();
  }
  auto node = FunctionNode<F>::make();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(input));
  node->is_variable_input_ = {true};
  node->ctx_.set_materialize_grads(false);
  const at::Tensor output = F::forward(&node->ctx_, input, args...);
  torch::autograd::set_history(output, node);
  node->save_variables_to_ctx();
  return output;
}

}  // namespace lomem::detail
