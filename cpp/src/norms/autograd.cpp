// Gradients of the norms.
#include "../autograd.h"

namespace lomem::detail {
namespace {

/// Which of up to three leading tensor arguments need a gradient. autograd counts only the tensors that are present.
template <size_t count>
std::array<bool, count> gradient_mask(AutogradContext* ctx, const std::array<bool, count>& present) {
  std::array<bool, count> mask{};
  size_t edge = 0;
  for (size_t i = 0; i < count; ++i) {
    mask[i] = present[i] && ctx->needs_input_grad(edge);
    edge += present[i] ? 1 : 0;
  }
  return mask;
}

at::Tensor tensor_or_undefined(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? *tensor : at::Tensor();
}

OptionalTensor optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct MSLayerNorm : torch::autograd::Function<MSLayerNorm> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps, OptionalDtype dtype) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, rstd] = ops::ms_layer_norm_forward(input, normalized_shape, weight, bias, eps, dtype);
    // Save the output, not the input: the next linear layer saves the same storage, so this costs nothing.
    ctx->save_for_backward({output, rstd, tensor_or_undefined(weight), tensor_or_undefined(bias)});
    ctx->saved_data["normalized_shape"] = normalized_shape.vec();
    ctx->saved_data["input_dtype"] = input.scalar_type();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<3>(ctx, {true, saved[2].defined(), saved[3].defined()});
    auto [grad_input, grad_weight, grad_bias] = ops::ms_layer_norm_backward(
        grad_outputs[0], saved[0], saved[1], ctx->saved_data["normalized_shape"].toSymIntVector(),
        optional_tensor(saved[2]), optional_tensor(saved[3]), ctx->saved_data["input_dtype"].toScalarType(), mask);
    return {grad_input, at::Tensor(), grad_weight, grad_bias, at::Tensor(), at::Tensor()};
  }
};

struct MSRMSNorm : torch::autograd::Function<MSRMSNorm> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      std::optional<double> eps, OptionalDtype dtype) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, rstd] = ops::ms_rms_norm_forward(input, normalized_shape, weight, eps, dtype);
    ctx->save_for_backward({output, rstd, tensor_or_undefined(weight)});
    ctx->saved_data["normalized_shape"] = normalized_shape.vec();
    ctx->saved_data["input_dtype"] = input.scalar_type();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<2>(ctx, {true, saved[2].defined()});
    auto [grad_input, grad_weight] = ops::ms_rms_norm_backward(
        grad_outputs[0], saved[0], saved[1], ctx->saved_data["normalized_shape"].toSymIntVector(),
        optional_tensor(saved[2]), ctx->saved_data["input_dtype"].toScalarType(), mask);
    return {grad_input, at::Tensor(), grad_weight, at::Tensor(), at::Tensor()};
  }
};

at::Tensor ms_layer_norm_autograd(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype) {
  constexpr const char* op = "lomem::ms_layer_norm";
  check_norm_forward(op, input, normalized_shape, weight, bias, eps, dtype);
  check_no_tangent(op, "input", input);
  check_no_tangent(op, "weight", weight);
  check_no_tangent(op, "bias", bias);
  if (needs_grad(input, weight, bias)) {
    return MSLayerNorm::apply(input, normalized_shape, weight, bias, eps, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::ms_layer_norm(input, normalized_shape, weight, bias, eps, dtype);
}

at::Tensor ms_rms_norm_autograd(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype) {
  constexpr const char* op = "lomem::ms_rms_norm";
  check_norm_forward(op, input, normalized_shape, weight, std::nullopt, eps, dtype);
  check_no_tangent(op, "input", input);
  check_no_tangent(op, "weight", weight);
  if (needs_grad(input, weight)) {
    return MSRMSNorm::apply(input, normalized_shape, weight, eps, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::ms_rms_norm(input, normalized_shape, weight, eps, dtype);
}

// The norms have no second derivative: differentiating their backward ops raises an error (ops.def).
TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("ms_layer_norm", &ms_layer_norm_autograd);
  m.impl("ms_rms_norm", &ms_rms_norm_autograd);
}

}  // namespace
}  // namespace lomem::detail
