// Gradients of the norms.
#include "../autograd.h"
#include "ops.h"

namespace lomem::detail {
namespace {

/// Which of up to three leading tensor arguments need a gradient. autograd counts only the tensors that are present.
std::array<bool, 3> gradient_mask(AutogradContext* ctx, const std::array<bool, 3>& present) {
  std::array<bool, 3> mask{};
  size_t edge = 0;
  for (size_t i = 0; i < mask.size(); ++i) {
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

template <class Op>
struct NormFunction : torch::autograd::Function<NormFunction<Op>> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, std::optional<double> eps, OptionalDtype dtype) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, rstd] = Op::call(Op::forward_op, {input, normalized_shape, weight, bias, eps, dtype});
    // Save the output, not the input: the next linear layer saves the same storage, so this costs nothing.
    if constexpr (Op::has_bias) {
      ctx->save_for_backward({output, rstd, tensor_or_undefined(weight), tensor_or_undefined(bias)});
    } else {
      ctx->save_for_backward({output, rstd, tensor_or_undefined(weight)});
    }
    ctx->saved_data["normalized_shape"] = normalized_shape.vec();
    ctx->saved_data["input_dtype"] = input.scalar_type();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor weight = optional_tensor(saved[2]);
    const OptionalTensor bias = Op::has_bias ? optional_tensor(saved[3]) : std::nullopt;
    const auto normalized_shape = ctx->saved_data["normalized_shape"].toSymIntVector();
    auto [grad_input, grad_weight, grad_bias] = Op::call_backward(
        {grad_outputs[0], saved[0], saved[1], normalized_shape, weight, bias,
         ctx->saved_data["input_dtype"].toScalarType(),
         gradient_mask(ctx, {true, weight.has_value(), bias.has_value()})});
    return {grad_input, at::Tensor(), grad_weight, grad_bias, at::Tensor(), at::Tensor()};
  }
};

template <class Op>
at::Tensor norm_autograd(const NormArguments& args) {
  constexpr const char* op = Op::op.name;
  const auto& [input, normalized_shape, weight, bias, eps, dtype] = args;
  check_norm_forward(op, input, normalized_shape, weight, bias, eps, dtype);
  check_no_tangent(op, "input", input);
  check_no_tangent(op, "weight", weight);
  check_no_tangent(op, "bias", bias);
  if (needs_grad(input, weight, bias)) {
    return NormFunction<Op>::apply(input, normalized_shape, weight, bias, eps, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return Op::call(Op::op, args);
}

// The norms have no second derivative: differentiating their backward ops raises an error (ops.def).
TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  for_each_norm([&](auto type) {
    using Op = typename decltype(type)::type;
    m.impl(Op::op.name, &Op::template kernel<&norm_autograd<Op>>);
  });
}

}  // namespace
}  // namespace lomem::detail
