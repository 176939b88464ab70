// The C++ functions of the activations: each names its op's function and parameters.
#include <lomem/activations.h>
#include <torch/csrc/autograd/custom_function.h>

#include "activations.h"
#include "dispatch.h"

namespace lomem {
namespace {

at::Tensor call(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, const FewBit& few_bit) {
  if (!few_bit.steps) {
    return detail::step_activation(
        input, function, parameters, few_bit.bits, few_bit.criterion, std::nullopt, std::nullopt);
  }
  const StepFunction& steps = *few_bit.steps;
  return detail::step_activation(
      input, function, parameters, few_bit.bits, few_bit.criterion, at::ArrayRef<double>(steps.boundaries),
      at::ArrayRef<double>(steps.levels));
}

int64_t bits_for(size_t levels) {
  int64_t bits = 1;
  while ((size_t{1} << bits) < levels) {
    ++bits;
  }
  return bits;
}

/// A function of the caller's. Its codes are in row-major order, as its gradient is read.
struct UserActivation : torch::autograd::Function<UserActivation> {
  static at::Tensor forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& input,
      const std::function<at::Tensor(const at::Tensor&)>& function, const StepFunction& steps) {
    const int64_t bits = bits_for(steps.levels.size());
    ctx->save_for_backward({detail::step_codes(input, steps.boundaries, bits)});
    std::vector<double> levels = steps.levels;
    levels.resize(size_t{1} << bits, levels.back());
    ctx->saved_data["levels"] = levels;
    ctx->saved_data["bits"] = bits;
    at::Tensor output = function(input.detach());
    TORCH_CHECK_VALUE(
        output.sym_sizes() == input.sym_sizes(), "lomem::step_activation: function returns shape ", output.sym_sizes(),
        ", expected that of its argument, ", input.sym_sizes());
    // (What shares memory with the input would be taken for it.)
    return output.is_alias_of(input) ? output.clone() : output;
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const std::vector<double> levels = ctx->saved_data["levels"].toDoubleVector();
    return {
        detail::step_activation_backward(
            grad_outputs[0], ctx->get_saved_variables()[0], levels, ctx->saved_data["bits"].toInt()),
        at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor gelu(const at::Tensor& input, std::string_view approximate, const FewBit& few_bit) {
  TORCH_CHECK_VALUE(
      approximate == "none" || approximate == "tanh", "lomem::gelu: approximate is '", approximate,
      "', expected 'none' or 'tanh'");
  return call(input, approximate == "tanh" ? "gelu_tanh" : "gelu", {}, few_bit);
}

at::Tensor quick_gelu(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "quick_gelu", {}, few_bit);
}

at::Tensor silu(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "silu", {}, few_bit);
}

at::Tensor mish(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "mish", {}, few_bit);
}

at::Tensor sigmoid(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "sigmoid", {}, few_bit);
}

at::Tensor tanh(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "tanh", {}, few_bit);
}

at::Tensor tanhshrink(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "tanhshrink", {}, few_bit);
}

at::Tensor softplus(const at::Tensor& input, double beta, double threshold, const FewBit& few_bit) {
  return call(input, "softplus", {beta, threshold}, few_bit);
}

at::Tensor softsign(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "softsign", {}, few_bit);
}

at::Tensor logsigmoid(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "logsigmoid", {}, few_bit);
}

at::Tensor elu(const at::Tensor& input, double alpha, const FewBit& few_bit) {
  return call(input, "elu", {alpha}, few_bit);
}

at::Tensor celu(const at::Tensor& input, double alpha, const FewBit& few_bit) {
  return call(input, "celu", {alpha}, few_bit);
}

at::Tensor selu(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "selu", {}, few_bit);
}

at::Tensor hardswish(const at::Tensor& input, const FewBit& few_bit) {
  return call(input, "hardswish", {}, few_bit);
}

at::Tensor relu(const at::Tensor& input) {
  return detail::hard_activation(input, "relu", {});
}

at::Tensor leaky_relu(const at::Tensor& input, double negative_slope) {
  return detail::hard_activation(input, "leaky_relu", {negative_slope});
}

at::Tensor relu6(const at::Tensor& input) {
  return detail::hard_activation(input, "relu6", {});
}

at::Tensor threshold(const at::Tensor& input, double threshold, double value) {
  return detail::hard_activation(input, "threshold", {threshold, value});
}

at::Tensor hardtanh(const at::Tensor& input, double min_val, double max_val) {
  return detail::hard_activation(input, "hardtanh", {min_val, max_val});
}

at::Tensor hardsigmoid(const at::Tensor& input) {
  return detail::hard_activation(input, "hardsigmoid", {});
}

at::Tensor hardshrink(const at::Tensor& input, double lambda) {
  return detail::hard_activation(input, "hardshrink", {lambda});
}

at::Tensor softshrink(const at::Tensor& input, double lambda) {
  return detail::hard_activation(input, "softshrink", {lambda});
}

at::Tensor step_activation(
    const at::Tensor& input, const std::function<at::Tensor(const at::Tensor&)>& function, const StepFunction& steps) {
  detail::check_steps("lomem::step_activation", steps.boundaries, steps.levels, bits_for(steps.levels.size()));
  return UserActivation::apply(input, function, steps);
}

at::Tensor step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  return detail::step_codes(input, boundaries, bits);
}

}  // namespace lomem
