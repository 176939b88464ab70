// Gradients of dropout, computed from its mask.
#include "../autograd.h"

namespace lomem::detail {
namespace {

struct Dropout : torch::autograd::Function<Dropout> {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "DropoutBackward";

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, double p) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, mask] = ops::dropout_forward(input, p);
    ctx->save_for_backward({mask});
    ctx->saved_data["p"] = p;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    if (!grad_outputs[0].defined()) {
      return {at::Tensor()};
    }
    return {ops::dropout_apply(grad_outputs[0], ctx->get_saved_variables()[0], ctx->saved_data["p"].toDouble())};
  }
};

at::Tensor dropout_autograd(const at::Tensor& input, double p, std::string_view saves) {
  constexpr const char* op = ops::dropout.name;
  check_dropout(op, input, p);
  check_dropout_options(op, p, saves);
  check_no_tangent(op, "input", input);
  if (!needs_grad(input)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return ops::dropout(input, p, saves);
  }
  return p == 0 ? input.clone() : apply_function<Dropout>(input, p);
}

/// input -> dropout_apply(input, mask) is linear and self-adjoint, so it is its own backward pass.
struct DropoutApply : torch::autograd::Function<DropoutApply> {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "DropoutApplyBackward";

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& mask, double p) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({mask});
    ctx->saved_data["p"] = p;
    return ops::dropout_apply(input, mask, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    return Dropout::backward(ctx, grad_outputs);
  }
};

at::Tensor dropout_apply_autograd(const at::Tensor& input, const at::Tensor& mask, double p) {
  constexpr const char* op = ops::dropout_apply.name;
  check_dropout_apply(op, input, mask, p);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    return apply_function<DropoutApply>(input, mask, p);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::dropout_apply(input, mask, p);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("dropout", &dropout_autograd);
  m.impl("dropout_apply", &dropout_apply_autograd);
}

}  // namespace
}  // namespace lomem::detail
