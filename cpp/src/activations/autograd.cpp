// Gradients of the activations, computed from codes. Codes are in the memory order of the forward's output.
#include "../autograd.h"

#include <array>
#include <vector>

#include "fused.h"
#include "ops.h"
#include "order.h"

namespace lomem::detail {
namespace {

int64_t bits_of(size_t levels) {
  int64_t bits = 0;
  while ((size_t{1} << bits) < levels) {
    ++bits;
  }
  return bits;
}

/// grad_output * levels[codes], by differentiable operations, for gradients of gradients.
variable_list gradient_from_codes(AutogradContext* ctx, const at::Tensor& grad_output, Doubles levels) {
  const at::Tensor codes = ctx->get_saved_variables()[0];
  const int64_t bits = bits_of(levels.size());
  return {in_saved_order(ctx, grad_output, [&](const at::Tensor& grad) {
    return ops::step_activation_backward(grad, codes, levels, bits);
  })};
}

/// An activation whose derivative is levels[code], with the levels saved beside the codes.
template <class Function>
struct FewBitFunction : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;

  static void save(
      AutogradContext* ctx, const at::Tensor& codes, const at::Tensor& output, const c10::List<double>& levels) {
    ctx->save_for_backward({codes});
    save_order(ctx, output);
    ctx->saved_data["levels"] = levels;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    if (!grad_outputs[0].defined()) {
      return {at::Tensor()};
    }
    return gradient_from_codes(ctx, grad_outputs[0], ctx->saved_data["levels"].toDoubleVector());
  }
};

/// GELU or SiLU with its published step function, which is known at compile time: nothing is looked up, and no levels
/// are saved. That makes a small activation faster.
template <class Activated>
struct PublishedActivation : torch::autograd::Function<PublishedActivation<Activated>> {
  using Steps = typename Activated::PublishedSteps;
  static constexpr bool is_traceable = true;
  static constexpr const char* name = "StepActivationBackward";

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, std::string_view function, bool fast) {
    static constexpr auto boundaries = [] {
      std::array<double, Steps::levels - 1> result{};
      for (int i = 0; i + 1 < Steps::levels; ++i) {
        result[i] = Steps::boundary(i);
      }
      return result;
    }();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, codes] = ops::fused_activation_forward(input, function, boundaries, Steps::bits, fast);
    ctx->save_for_backward({codes});
    save_order(ctx, output);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static constexpr auto levels = [] {
      std::array<double, Steps::levels> result{};
      for (int code = 0; code < Steps::levels; ++code) {
        result[code] = Steps::level(code);
      }
      return result;
    }();
    if (!grad_outputs[0].defined()) {
      return {at::Tensor()};
    }
    return gradient_from_codes(ctx, grad_outputs[0], levels);
  }
};

struct StepActivation : FewBitFunction<StepActivation> {
  static constexpr const char* name = "StepActivationBackward";

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const Activation& activation, Doubles parameters, int64_t bits,
      std::string_view criterion, const ResolvedSteps& steps, bool fast) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // The step function is passed explicitly: compilers save what they trace, and a later version of the library, whose
    // tables may differ, must not combine the levels of this version with its own boundaries.
    const Doubles boundaries = steps.steps.boundaries;
    // (A fused activation skips a call of the dispatcher, which costs as much as a small activation.)
    auto [output, codes] =
        activation.fused
            ? ops::fused_activation_forward(input, activation.name, boundaries, bits, fast)
            : ops::step_activation_forward(
                  input, activation.name, parameters, bits, criterion, boundaries, Doubles(steps.steps.levels), fast);
    save(ctx, codes, output, steps.saved_levels);
    return output;
  }
};

at::Tensor step_activation_autograd(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool fast) {
  constexpr const char* op = ops::step_activation.name;
  check_float_tensor(op, "input", input);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    const Activation& activation = find_activation(op, function, parameters);
    if (activation.fused && bits == 2 && !boundaries && !levels && criterion == name_of(Criterion::paper)) {
      return visit_fused(function, [&](auto type) {
        return apply_function<PublishedActivation<typename decltype(type)::type>>(input, function, fast);
      });
    }
    const auto steps = resolve_steps(op, activation, parameters, {bits, criterion, boundaries, levels});
    return apply_function<StepActivation>(input, activation, parameters, bits, criterion, *steps, fast);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::step_activation(input, function, parameters, bits, criterion, boundaries, levels, fast);
}

struct HardActivation : FewBitFunction<HardActivation> {
  static constexpr const char* name = "HardActivationBackward";

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, std::string_view function, Doubles parameters, const Band& band) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, codes] = ops::hard_activation_forward(input, function, parameters);
    save(ctx, codes, output, {band.outside, band.inside});
    return output;
  }
};

at::Tensor hard_activation_autograd(const at::Tensor& input, std::string_view function, Doubles parameters) {
  constexpr const char* op = ops::hard_activation.name;
  check_float_tensor(op, "input", input);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    const Activation& activation = find_exact(op, function, parameters);
    const Band band = band_of(activation, parameters, input.scalar_type(), input.is_cuda());
    return apply_function<HardActivation>(input, function, parameters, band);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::hard_activation(input, function, parameters);
}

/// grad_output -> grad_output * levels[codes] is linear and self-adjoint, so it is its own backward pass.
struct StepActivationBackward : torch::autograd::Function<StepActivationBackward> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& codes, Doubles levels, int64_t bits) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({codes});
    ctx->saved_data["levels"] = levels.vec();
    ctx->saved_data["bits"] = bits;
    return ops::step_activation_backward(grad_output, codes, levels, bits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const at::Tensor codes = ctx->get_saved_variables()[0];
    const std::vector<double> levels = ctx->saved_data["levels"].toDoubleVector();
    return {
        ops::step_activation_backward(grad_outputs[0], codes, levels, ctx->saved_data["bits"].toInt()), at::Tensor(),
        at::Tensor(), at::Tensor()};
  }
};

at::Tensor step_activation_backward_autograd(
    const at::Tensor& grad_output, const at::Tensor& codes, Doubles levels, int64_t bits) {
  check_no_tangent(ops::step_activation_backward.name, "grad_output", grad_output);
  if (needs_grad(grad_output)) {
    return StepActivationBackward::apply(grad_output, codes, levels, bits);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return ops::step_activation_backward(grad_output, codes, levels, bits);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("step_activation", &step_activation_autograd);
  m.impl("hard_activation", &hard_activation_autograd);
  m.impl("step_activation_backward", &step_activation_backward_autograd);
}

}  // namespace
}  // namespace lomem::detail
