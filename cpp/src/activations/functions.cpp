// Implementation of the activations' C++ functions.
#include <lomem/ops/activations.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "../checks.h"
#include "../op.h"
#include "drawn.h"
#include "table.h"

namespace lomem {
namespace {

int64_t bits_for(size_t levels) {
  int64_t bits = 1;
  while ((size_t{1} << bits) < levels) {
    ++bits;
  }
  return bits;
}

/// A user-supplied function. Its codes are in row-major order, the order in which its gradient is read.
struct UserActivation : torch::autograd::Function<UserActivation> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& input,
      const std::function<at::Tensor(const at::Tensor&)>& function, const StepFunction& steps) {
    const int64_t bits = bits_for(steps.levels.size());
    ctx->save_for_backward({detail::ops::step_codes(input, steps.boundaries, bits)});
    std::vector<double> levels = steps.levels;
    levels.resize(size_t{1} << bits, levels.back());
    ctx->saved_data["levels"] = levels;
    ctx->saved_data["bits"] = bits;
    at::Tensor output = function(input.detach());
    TORCH_CHECK_VALUE(
        output.sym_sizes() == input.sym_sizes(), "lomem::step_activation: function returns shape ", output.sym_sizes(),
        ", expected that of its argument, ", input.sym_sizes());
    // (An output that shares memory with the input would be mistaken for it.)
    return output.is_alias_of(input) ? output.clone() : output;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const std::vector<double> levels = ctx->saved_data["levels"].toDoubleVector();
    return {
        detail::ops::step_activation_backward(
            grad_outputs[0], ctx->get_saved_variables()[0], levels, ctx->saved_data["bits"].toInt()),
        at::Tensor(), at::Tensor()};
  }
};

/// Whether codes are drawn at random.
bool draws(const char* op, const FewBit& few_bit) {
  if (few_bit.rounding == "nearest") {
    TORCH_CHECK_VALUE(
        !detail::has_tensor(few_bit.seed), op,
        ": seed is given, expected none with rounding 'nearest', which draws nothing");
    return false;
  }
  TORCH_CHECK_VALUE(
      few_bit.rounding == "stochastic", op, ": rounding is '", few_bit.rounding,
      "', expected 'nearest' or 'stochastic'");
  TORCH_CHECK_VALUE(
      !few_bit.steps, op, ": steps are given, expected none with rounding 'stochastic', which has no step function");
  TORCH_CHECK_VALUE(
      few_bit.criterion == "derivative", op, ": criterion is '", few_bit.criterion,
      "', expected 'derivative' with rounding 'stochastic', which has no step function");
  return true;
}

/// Calls an op with the arguments that select the step function.
template <class Op>
auto call(
    const Op& op, const at::Tensor& input, std::string_view function, detail::Doubles parameters,
    const FewBit& few_bit) {
  detail::OptionalDoubles boundaries, levels;
  if (few_bit.steps) {
    boundaries = few_bit.steps->boundaries;
    levels = few_bit.steps->levels;
  }
  return op(input, function, parameters, few_bit.bits, few_bit.criterion, boundaries, levels, few_bit.fast);
}

}  // namespace

namespace detail {

at::Tensor few_bit_activation(
    const at::Tensor& input, std::string_view function, Doubles parameters, const FewBit& few_bit) {
  if (draws(ops::drawn_activation.name, few_bit)) {
    return ops::drawn_activation(input, function, parameters, few_bit.bits, few_bit.seed, 0);
  }
  return call(ops::step_activation, input, function, parameters, few_bit);
}

at::Tensor few_bit_activation(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    bool fast) {
  return ops::step_activation(input, function, parameters, bits, criterion, std::nullopt, std::nullopt, fast);
}

at::Tensor published_activation(const char* op, const at::Tensor& input, std::string_view function, bool fast) {
  check_float_tensor(op, "input", input);
  return ops::step_activation(input, function, {}, 2, name_of(Criterion::paper), std::nullopt, std::nullopt, fast);
}

at::Tensor exact_activation(const at::Tensor& input, std::string_view function, Doubles parameters) {
  return ops::hard_activation(input, function, parameters);
}

std::string_view gelu_function(const char* op, std::string_view approximate) {
  TORCH_CHECK_VALUE(
      approximate == "none" || approximate == "tanh", op, ": approximate is '", approximate,
      "', expected 'none' or 'tanh'");
  return approximate == "tanh" ? "gelu_tanh" : "gelu";
}

std::vector<ActivationFacts> activation_facts() {
  std::vector<ActivationFacts> facts;
  for (const Activation& activation : activations()) {
    ActivationFacts row{std::string(activation.name), {}, activation.is_exact(), activation.paper != nullptr};
    for (const auto& [name, value] : activation.parameters) {
      row.parameters.emplace_back(name, std::isnan(value) ? std::nullopt : std::optional(value));
    }
    facts.push_back(std::move(row));
  }
  return facts;
}

}  // namespace detail

at::Tensor step_activation(
    const at::Tensor& input, const std::function<at::Tensor(const at::Tensor&)>& function, const StepFunction& steps) {
  detail::check_steps("lomem::step_activation", steps.boundaries, steps.levels, bits_for(steps.levels.size()));
  return UserActivation::apply(input, function, steps);
}

std::tuple<at::Tensor, at::Tensor> step_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, const FewBit& few_bit) {
  constexpr const char* op = detail::ops::step_activation_forward.name;
  TORCH_CHECK_VALUE(
      !draws(op, few_bit), op, ": rounding is 'stochastic', expected 'nearest', or a call of drawn_activation_forward");
  return call(detail::ops::step_activation_forward, input, function, parameters, few_bit);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> drawn_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, const FewBit& few_bit) {
  constexpr const char* op = detail::ops::drawn_activation_forward.name;
  TORCH_CHECK_VALUE(draws(op, few_bit), op, ": rounding is 'nearest', expected 'stochastic'");
  return detail::ops::drawn_activation_forward(input, function, parameters, few_bit.bits, few_bit.seed, 0);
}

at::Tensor drawn_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, const DrawnLevels<double>& levels,
    int64_t bits) {
  return detail::ops::drawn_activation_backward(grad_output, codes, seed, levels.low, levels.step, bits, 0);
}

DrawnLevels<double> drawn_levels(std::string_view function, int64_t bits, const std::vector<double>& parameters) {
  constexpr const char* op = "lomem::drawn_levels";
  const detail::Activation& activation = detail::find_activation(op, function, parameters);
  detail::check_bits(op, bits);
  const auto drawn = detail::resolve_drawn(activation, parameters);
  return {drawn->low(), drawn->step(bits)};
}

at::Tensor step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  return detail::ops::step_codes(input, boundaries, bits);
}

at::Tensor step_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  return detail::ops::step_activation_backward(grad_output, codes, levels, bits);
}

}  // namespace lomem
