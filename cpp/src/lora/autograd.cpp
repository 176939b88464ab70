// Gradients of low-rank adapters. Casts of the input and what dropout leaves of it are computed again in the backward
// pass.
#include "../autograd.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops.h"

namespace lomem::detail {
namespace {

/// at::linear(input, lora_a), by the ops that it calls above autograd: there it sees whether its weight, which is
/// transposed, requires a gradient.
at::Tensor product_with(const at::Tensor& lora_a, const at::Tensor& input) {
  if (!lora_a.requires_grad()) {
    return at::linear(input, lora_a);
  }
  return at::_unsafe_view_symint(as_rows(input).mm(lora_a.t()), with_last(input.sym_sizes(), lora_a.sym_size(0)));
}

at::Tensor tensor_if(bool needed, const at::Tensor& tensor) {
  return needed ? tensor : at::Tensor();
}

/// The product with lora_a is an output too: it is saved, and second derivatives go through it.
struct Lora : torch::autograd::Function<Lora> {
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b,
      const OptionalTensor& bias, double scaling, double p, at::ScalarType dtype) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    at::Tensor product, mask;
    {
      Dropped dropped = drop(input, p, dtype, lora_a.scalar_type());
      mask = std::move(dropped.mask);
      product = product_with(lora_a, dropped.input);
    }
    const bool needs_input = input.requires_grad();
    const bool needs_a = lora_a.requires_grad();
    // The input as it is given: its producer, or other layers, may save the same tensor.
    ctx->save_for_backward(
        {tensor_if(needs_a, input), tensor_if(lora_b.requires_grad(), product), tensor_if(needs_input || needs_a, mask),
         tensor_if(needs_input, lora_a), tensor_if(needs_input || needs_a, lora_b)});
    ctx->saved_data["has_bias"] = has_tensor(bias);
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["p"] = p;
    ctx->saved_data["dtype"] = static_cast<int64_t>(dtype);
    ctx->saved_data["input_dtype"] = static_cast<int64_t>(input.scalar_type());
    ctx->set_materialize_grads(false);
    return {scaled_update(product, lora_b, bias, scaling), product};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto& [input, product, mask, lora_a, lora_b] = std::tie(saved[0], saved[1], saved[2], saved[3], saved[4]);
    const double p = ctx->saved_data["p"].toDouble();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const bool wants_input = ctx->needs_input_grad(0);
    const bool wants_a = ctx->needs_input_grad(1);
    variable_list gradients(7);
    at::Tensor grad_product;  // of both outputs
    const auto add = [&](const at::Tensor& grad) {
      grad_product = grad_product.defined() ? grad_product + grad : grad;
    };
    if (grad_outputs[0].defined()) {
      const at::Tensor grad = scaled(as_rows(grad_outputs[0]), ctx->saved_data["scaling"].toDouble());
      if (ctx->needs_input_grad(2)) {
        gradients[2] = grad.t().mm(as_rows(product));
      }
      // (needs_input_grad counts only the tensors that are present.)
      if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3)) {
        gradients[3] = grad.sum(0);
      }
      if (wants_input || wants_a) {
        add(grad.mm(lora_b));
      }
    }
    if (grad_outputs[1].defined()) {
      add(as_rows(grad_outputs[1]));
    }
    if (!grad_product.defined()) {
      return gradients;
    }
    if (wants_a) {
      gradients[1] =
          ops::lora_weight_grad(grad_product, input, mask.defined() ? OptionalTensor(mask) : std::nullopt, p, dtype);
    }
    if (wants_input) {
      const auto input_dtype = static_cast<at::ScalarType>(ctx->saved_data["input_dtype"].toInt());
      const at::Tensor& grad = grad_outputs[0].defined() ? grad_outputs[0] : grad_outputs[1];
      gradients[0] = dropped_again(grad_product.mm(lora_a), mask, p, dtype, input_dtype)
                         .view_symint(with_last(grad.sym_sizes(), lora_a.sym_size(1)));
    }
    return gradients;
  }
};

at::Tensor lora_autograd(
    const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const OptionalTensor& bias, double p, OptionalDtype dtype) {
  constexpr const char* op = ops::lora.name;
  check_lora(op, input, lora_a, lora_b, scaling, bias, p, dtype);
  check_no_tangent(op, "input", input);
  check_no_tangent(op, "lora_a", lora_a);
  check_no_tangent(op, "lora_b", lora_b);
  check_no_tangent(op, "bias", bias);
  if (needs_grad(input, lora_a, lora_b, bias)) {
    return Lora::apply(input, lora_a, lora_b, bias, scaling, p, dtype.value_or(lora_a.scalar_type()))[0];
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::lora(input, lora_a, lora_b, scaling, bias, p, dtype);
}

// The gradient of lora_a
// -----------------------------------------------------------------------------------------------

at::Tensor weight_grad(
    const at::Tensor& grad_product, const at::Tensor& input, const OptionalTensor& mask, double p,
    at::ScalarType dtype) {
  const at::Tensor dropped = dropped_again(input, mask.value_or(at::Tensor()), p, dtype, grad_product.scalar_type());
  return as_rows(grad_product).t().mm(as_rows(dropped));
}

at::Tensor lora_weight_grad_value(
    const at::Tensor& grad_product, const at::Tensor& input, const OptionalTensor& mask, double p,
    at::ScalarType dtype) {
  check_lora_weight_grad(ops::lora_weight_grad.name, grad_product, input, mask, p, dtype);
  return weight_grad(grad_product, input, mask, p, dtype);
}

at::Tensor lora_weight_grad_autograd(
    const at::Tensor& grad_product, const at::Tensor& input, const OptionalTensor& mask, double p,
    at::ScalarType dtype) {
  constexpr const char* op = ops::lora_weight_grad.name;
  check_lora_weight_grad(op, grad_product, input, mask, p, dtype);
  check_no_tangent(op, "grad_product", grad_product);
  check_no_tangent(op, "input", input);
  if (needs_grad(grad_product, input)) {
    return weight_grad(grad_product, input, mask, p, dtype);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::lora_weight_grad(grad_product, input, mask, p, dtype);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("lora_weight_grad", &lora_weight_grad_value);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("lora", &lora_autograd);
  m.impl("lora_weight_grad", &lora_weight_grad_autograd);
}

}  // namespace
}  // namespace lomem::detail
