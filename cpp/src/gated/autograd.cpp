// Gradients of the gated units. They save their operands.
#include "../autograd.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <string>

#include "ops.h"

namespace lomem::detail {
namespace {

at::Tensor tensor_or_undefined(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? *tensor : at::Tensor();
}

OptionalTensor optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct Gated : torch::autograd::Function<Gated> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& gate, const OptionalTensor& up, std::string_view activation,
      std::string_view layout) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate, tensor_or_undefined(up)});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["layout"] = std::string(layout);
    return ops::gated(gate, up, activation, layout);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor up = optional_tensor(saved[1]);
    // (needs_input_grad counts only the tensors that are present.)
    auto [grad_gate, grad_up, output] = ops::gated_backward(
        grad_outputs[0], saved[0], up, ctx->saved_data["activation"].toStringRef(),
        ctx->saved_data["layout"].toStringRef(),
        {ctx->needs_input_grad(0), up.has_value() && ctx->needs_input_grad(1), false});
    return {grad_gate, grad_up, at::Tensor(), at::Tensor()};
  }
};

at::Tensor gated_autograd(
    const at::Tensor& gate, const OptionalTensor& up, std::string_view activation, std::string_view layout) {
  constexpr const char* op = ops::gated.name;
  check_gated(op, gate, up, activation, layout);
  check_no_tangent(op, "gate", gate);
  check_no_tangent(op, "up", up);
  if (needs_grad(gate, up)) {
    return Gated::apply(gate, up, activation, layout);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::gated(gate, up, activation, layout);
}

// Gradients of gradients ----------------------------------------------------------------------------------------------

/// grad * activation'(gate), by differentiable ops.
at::Tensor gate_gradient(GatedActivation activation, const at::Tensor& grad, const at::Tensor& gate) {
  switch (activation) {
    case GatedActivation::silu: {
      // (torch's silu_backward is not differentiable.)
      const at::Tensor sigmoid = at::sigmoid(gate);
      return grad * sigmoid * (1 + gate * (1 - sigmoid));
    }
    case GatedActivation::gelu: return at::gelu_backward(grad, gate);
    case GatedActivation::gelu_tanh: return at::gelu_backward(grad, gate, "tanh");
    case GatedActivation::relu: return at::threshold_backward(grad, gate, 0);
    default: return at::sigmoid_backward(grad, at::sigmoid(gate));
  }
}

/// The tensor whose halves these are.
at::Tensor joined(const at::Tensor& gate, const at::Tensor& up, GatedLayout layout) {
  switch (layout) {
    case GatedLayout::gate_up: return at::cat({gate, up}, -1);
    case GatedLayout::up_gate: return at::cat({up, gate}, -1);
    default: return at::stack({gate, up}, -1).flatten(-2);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& gate, const OptionalTensor& up, std::string_view activation,
    std::string_view layout, std::array<bool, 3> output_mask) {
  constexpr const char* op = ops::gated_backward.name;
  const GatedKind kind = check_gated_backward(op, grad_output, gate, up, activation, layout);
  check_no_tangent(op, "grad_output", grad_output);
  check_no_tangent(op, "gate", gate);
  check_no_tangent(op, "up", up);
  if (!needs_grad(grad_output, gate, up)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return ops::gated_backward(grad_output, gate, up, activation, layout, output_mask);
  }
  const auto& [wants_gate, wants_up, wants_output] = output_mask;
  const bool fused = !has_tensor(up);
  const GatedHalves operands = operands_of(gate, up, kind.layout);
  const at::Tensor value = gate_value(kind.activation, operands.gate);
  at::Tensor grad_gate, grad_up, output;
  if (wants_gate) {
    grad_gate = gate_gradient(kind.activation, grad_output * operands.up, operands.gate);
  }
  if (fused ? wants_gate : wants_up) {
    grad_up = grad_output * value;
  }
  if (wants_output) {
    output = value * operands.up;
  }
  if (fused && wants_gate) {
    return {joined(grad_gate, grad_up, kind.layout), at::Tensor(), output};
  }
  return {grad_gate, grad_up, output};
}

// The linear layer behind a unit --------------------------------------------------------------------------------------

struct GatedLinear : torch::autograd::Function<GatedLinear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& gate, const OptionalTensor& up, const at::Tensor& weight,
      const OptionalTensor& bias, std::string_view activation, std::string_view layout) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate, tensor_or_undefined(up), weight});
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["layout"] = std::string(layout);
    ctx->saved_data["has_bias"] = has_tensor(bias);
    return ops::gated_linear(gate, up, weight, bias, activation, layout);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& gate = saved[0];
    const OptionalTensor up = optional_tensor(saved[1]);
    const at::Tensor& weight = saved[2];
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    const std::string& layout = ctx->saved_data["layout"].toStringRef();
    // (needs_input_grad counts only the tensors that are present.)
    const bool wants_gate = ctx->needs_input_grad(0);
    const bool wants_up = up.has_value() && ctx->needs_input_grad(1);
    const size_t weight_edge = up.has_value() ? 2 : 1;
    const bool wants_weight = ctx->needs_input_grad(weight_edge);
    const bool wants_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(weight_edge + 1);

    const at::Tensor grad_rows = as_rows(grad_outputs[0]);
    at::Tensor grad_gate, grad_up, output, grad_weight, grad_bias;
    if (wants_gate || wants_up) {
      const at::Tensor grad = grad_rows.mm(weight).view_symint(gated_sizes(gate, up)).to(gate.scalar_type());
      std::tie(grad_gate, grad_up, output) =
          ops::gated_backward(grad, gate, up, activation, layout, {wants_gate, wants_up, wants_weight});
    } else if (wants_weight) {
      output = ops::gated(gate, up, activation, layout);
    }
    if (wants_weight) {
      grad_weight = grad_rows.t().mm(as_rows(output.to(weight.scalar_type())));
    }
    if (wants_bias) {
      grad_bias = grad_rows.sum(0);
    }
    return {grad_gate, grad_up, grad_weight, grad_bias, at::Tensor(), at::Tensor()};
  }
};

at::Tensor gated_linear_autograd(
    const at::Tensor& gate, const OptionalTensor& up, const at::Tensor& weight, const OptionalTensor& bias,
    std::string_view activation, std::string_view layout) {
  constexpr const char* op = ops::gated_linear.name;
  check_gated_linear(op, gate, up, weight, bias, activation, layout);
  check_no_tangent(op, "gate", gate);
  check_no_tangent(op, "up", up);
  check_no_tangent(op, "weight", weight);
  check_no_tangent(op, "bias", bias);
  if (needs_grad(gate, up, weight, bias)) {
    return GatedLinear::apply(gate, up, weight, bias, activation, layout);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::gated_linear(gate, up, weight, bias, activation, layout);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("gated", &gated_autograd);
  m.impl("gated_backward", &gated_backward_autograd);
  m.impl("gated_linear", &gated_linear_autograd);
}

}  // namespace
}  // namespace lomem::detail
