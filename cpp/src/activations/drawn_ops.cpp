// Activations whose codes are drawn at random, apart from their backends: values, gradients, and the shapes of results
// with symbolic sizes.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../linear/random_seed.h"
#include "drawn.h"
#include "ops.h"
#include "order.h"

namespace lomem::detail {

const Activation& check_drawn_activation(
    const char* op, const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits,
    const OptionalTensor& seed, int64_t offset) {
  check_drawing(op, input, bits, seed, offset);
  return find_activation(op, function, parameters);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> drawn_activation_forward_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const OptionalTensor& seed,
    int64_t offset) {
  constexpr const char* op = ops::drawn_activation_forward.name;
  const Activation& activation = check_drawn_activation(op, input, function, parameters, bits, seed, offset);
  const at::Tensor output = activation_value(activation, input, parameters);
  // (Ops return no argument, so a given seed is copied.)
  const at::Tensor used_seed = has_tensor(seed) ? seed->clone() : draw_seed(op, input.device());
  const at::Tensor codes =
      ops::drawn_codes(in_memory_order(input, output), function, parameters, bits, used_seed, offset);
  return {output, codes, used_seed};
}

namespace {

/// Without a gradient: the torch op itself. Nothing is drawn.
at::Tensor drawn_activation_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const OptionalTensor& seed,
    int64_t offset) {
  const Activation& activation =
      check_drawn_activation(ops::drawn_activation.name, input, function, parameters, bits, seed, offset);
  return activation_value(activation, input, parameters);
}

// Gradients -----------------------------------------------------------------------------------------------------------

/// What the backward pass needs beside codes and seed.
void save_levels(AutogradContext* ctx, double low, double step, int64_t bits, int64_t offset) {
  ctx->saved_data["low"] = low;
  ctx->saved_data["step"] = step;
  ctx->saved_data["bits"] = bits;
  ctx->saved_data["offset"] = offset;
}

at::Tensor gradient_from_draw(AutogradContext* ctx, const at::Tensor& grad_output) {
  const variable_list saved = ctx->get_saved_variables();
  return ops::drawn_activation_backward(
      grad_output, saved[0], saved[1], ctx->saved_data["low"].toDouble(), ctx->saved_data["step"].toDouble(),
      ctx->saved_data["bits"].toInt(), ctx->saved_data["offset"].toInt());
}

struct DrawnActivation : torch::autograd::Function<DrawnActivation> {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "DrawnActivationBackward";

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const Activation& activation, Doubles parameters, int64_t bits,
      const OptionalTensor& seed, int64_t offset) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, codes, used_seed] =
        ops::drawn_activation_forward(input, activation.name, parameters, bits, seed, offset);
    ctx->save_for_backward({codes, used_seed});
    save_order(ctx, output);
    const auto function = resolve_drawn(activation, parameters);
    save_levels(ctx, function->low(), function->step(bits), bits, offset);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    if (!grad_outputs[0].defined()) {
      return {at::Tensor()};
    }
    return {
        in_saved_order(ctx, grad_outputs[0], [&](const at::Tensor& grad) { return gradient_from_draw(ctx, grad); })};
  }
};

at::Tensor drawn_activation_autograd(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const OptionalTensor& seed,
    int64_t offset) {
  constexpr const char* op = ops::drawn_activation.name;
  const Activation& activation = check_drawn_activation(op, input, function, parameters, bits, seed, offset);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    prepare_seeds(input.device());
    return apply_function<DrawnActivation>(input, activation, parameters, bits, seed, offset);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::drawn_activation(input, function, parameters, bits, seed, offset);
}

/// Linear and self-adjoint, so it is its own backward pass: with the same draw.
struct DrawnActivationBackward : torch::autograd::Function<DrawnActivationBackward> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, double low,
      double step, int64_t bits, int64_t offset) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({codes, seed});
    save_levels(ctx, low, step, bits, offset);
    return ops::drawn_activation_backward(grad_output, codes, seed, low, step, bits, offset);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list gradients(7);
    gradients[0] = gradient_from_draw(ctx, grad_outputs[0]);
    return gradients;
  }
};

at::Tensor drawn_activation_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, double low, double step,
    int64_t bits, int64_t offset) {
  check_no_tangent(ops::drawn_activation_backward.name, "grad_output", grad_output);
  if (needs_grad(grad_output)) {
    return DrawnActivationBackward::apply(grad_output, codes, seed, low, step, bits, offset);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::drawn_activation_backward(grad_output, codes, seed, low, step, bits, offset);
}

// Shapes --------------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor, at::Tensor> drawn_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const OptionalTensor& seed,
    int64_t offset) {
  constexpr const char* op = ops::drawn_activation_forward.name;
  const Activation& activation = check_drawn_activation(op, input, function, parameters, bits, seed, offset);
  return {
      activation_value(activation, input, parameters), empty_codes_like(input, bits),
      at::empty({}, input.options().dtype(at::kLong))};
}

at::Tensor drawn_activation_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, double /*low*/, double /*step*/,
    int64_t bits, int64_t offset) {
  check_drawn_backward(ops::drawn_activation_backward.name, grad_output, codes, seed, bits, offset);
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

at::Tensor drawn_codes_meta(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const at::Tensor& seed,
    int64_t offset) {
  check_drawn_activation(ops::drawn_codes.name, input, function, parameters, bits, seed, offset);
  return empty_codes_like(input, bits);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("drawn_activation", &drawn_activation_value);
  m.impl("drawn_activation_forward", &drawn_activation_forward_value);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("drawn_activation", &drawn_activation_autograd);
  m.impl("drawn_activation_backward", &drawn_activation_backward_autograd);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("drawn_activation_forward", &drawn_activation_forward_meta);
  m.impl("drawn_activation_backward", &drawn_activation_backward_meta);
  m.impl("drawn_codes", &drawn_codes_meta);
}

}  // namespace
}  // namespace lomem::detail
