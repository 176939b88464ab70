// Gradients of the family of activations with few-bit derivatives.
#include "../activations.h"
#include "codes_autograd.h"

namespace lomem::detail {
namespace {

using Parameters = at::ArrayRef<double>;
using OptionalDoubles = std::optional<at::ArrayRef<double>>;

/// `levels` of `bits` bits from the forward's arguments, kept beside the codes.
struct FromLevels {
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    if (!grad_outputs[0].defined()) {
      return {at::Tensor()};
    }
    const std::vector<double> levels = ctx->saved_data["levels"].toDoubleVector();
    return {gradient_from_codes(ctx, grad_outputs[0], levels, ctx->saved_data["bits"].toInt())};
  }

  static void save(
      AutogradContext* ctx, const at::Tensor& output, const at::Tensor& codes, const std::vector<double>& levels,
      int64_t bits) {
    save_codes(ctx, codes, output);
    ctx->saved_data["levels"] = levels;
    ctx->saved_data["bits"] = bits;
  }
};

struct FamilyActivation : torch::autograd::Function<FamilyActivation>, FromLevels {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "StepActivationBackward";
  using FromLevels::backward;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, std::string_view function, Parameters parameters, int64_t bits,
      std::string_view criterion, const OptionalDoubles& boundaries, const OptionalDoubles& levels,
      const StepFunction& steps) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // The step function is spelled out: compilers keep what they trace, and a later version of the library, whose
    // tables may differ, must not meet the levels of this one with boundaries of its own.
    auto [output, codes] = step_activation_forward(
        input, function, parameters, bits, criterion, boundaries.value_or(steps.boundaries),
        levels.value_or(steps.levels));
    save(ctx, output, codes, steps.levels, bits);
    return output;
  }
};

at::Tensor step_activation_autograd(
    const at::Tensor& input, std::string_view function, Parameters parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels) {
  constexpr const char* op = "lomem::step_activation";
  check_float_tensor(op, "input", input);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    const Activation& activation = find_activation(op, function, parameters);
    const StepFunction steps = choose_steps(op, activation, parameters, bits, criterion, boundaries, levels);
    return apply_function<FamilyActivation>(input, function, parameters, bits, criterion, boundaries, levels, steps);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return step_activation(input, function, parameters, bits, criterion, boundaries, levels);
}

struct FamilyHardActivation : torch::autograd::Function<FamilyHardActivation>, FromLevels {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "HardActivationBackward";
  using FromLevels::backward;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, std::string_view function, Parameters parameters,
      const Band& band) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, codes] = hard_activation_forward(input, function, parameters);
    save(ctx, output, codes, {band.outside, band.inside}, 1);
    return output;
  }
};

at::Tensor hard_activation_autograd(const at::Tensor& input, std::string_view function, Parameters parameters) {
  constexpr const char* op = "lomem::hard_activation";
  check_float_tensor(op, "input", input);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    const HardActivation& activation = find_hard_activation(op, function, parameters);
    const Band band = band_of(activation, parameters, input.scalar_type(), input.is_cuda());
    return apply_function<FamilyHardActivation>(input, function, parameters, band);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return hard_activation(input, function, parameters);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("step_activation", &step_activation_autograd);
  m.impl("hard_activation", &hard_activation_autograd);
  for (const char* op : {"step_activation_forward", "hard_activation_forward", "step_codes", "band_codes"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace
}  // namespace lomem::detail
