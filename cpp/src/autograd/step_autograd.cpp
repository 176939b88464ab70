// Gradients of the step activations.
#include "../step_ops.h"
#include "codes_autograd.h"

namespace lomem::detail {
namespace {

template <class Op, class... Args>
struct StepActivation : torch::autograd::Function<StepActivation<Op, Args...>> {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = Op::node_name;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const Args&... args) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, codes] = Op::forward(input, args...);
    save_codes(ctx, codes, output);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static constexpr auto levels = step_levels<typename Op::Step>();
    if (!grad_outputs[0].defined()) {
      return {at::Tensor()};
    }
    return {gradient_from_codes(ctx, grad_outputs[0], levels, Op::Step::bits)};
  }
};

template <class Op, class... Args>
at::Tensor step_activation_autograd(const at::Tensor& input, Args... args) {
  check_float_tensor(Op::name, "input", input);
  Op::check(Op::name, args...);
  check_no_tangent(Op::name, "input", input);
  if (needs_grad(input)) {
    return apply_function<StepActivation<Op, Args...>>(input, args...);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return Op::call(input, args...);
}

/// grad_output -> grad_output * levels[codes] is linear and its own adjoint, so that it is its own
/// backward pass.
struct StepActivationBackward : torch::autograd::Function<StepActivationBackward> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels,
      int64_t bits) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({codes});
    ctx->saved_data["levels"] = levels.vec();
    ctx->saved_data["bits"] = bits;
    return step_activation_backward(grad_output, codes, levels, bits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const at::Tensor codes = ctx->get_saved_variables()[0];
    const std::vector<double> levels = ctx->saved_data["levels"].toDoubleVector();
    return {
        step_activation_backward(grad_outputs[0], codes, levels, ctx->saved_data["bits"].toInt()), at::Tensor(),
        at::Tensor(), at::Tensor()};
  }
};

at::Tensor step_activation_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_no_tangent("lomem::step_activation_backward", "grad_output", grad_output);
  if (needs_grad(grad_output)) {
    return StepActivationBackward::apply(grad_output, codes, levels, bits);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return step_activation_backward(grad_output, codes, levels, bits);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("regelu2", &step_activation_autograd<ReGELU2Op, std::string_view, bool>);
  m.impl("resilu2", &step_activation_autograd<ReSiLU2Op, bool>);
  m.impl("step_activation_backward", &step_activation_backward_autograd);
  m.impl("regelu2_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("resilu2_forward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace lomem::detail
