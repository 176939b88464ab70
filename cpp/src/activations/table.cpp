// What each activation computes, and which step function approximates its derivative.
#include "table.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/celu.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/hardshrink.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/mish.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/selu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/softshrink.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/threshold.h>
#include <c10/util/StringUtil.h>
#include <lomem/core/activation.h>
#include <lomem/core/dtype.h>
#include <lomem/core/step.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "../checks.h"
#include "../cpu/subnormals.h"
#include "refits.h"

namespace lomem::detail {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double quick_gelu_scale = 1.702;
constexpr double selu_alpha = 1.6732632423543772848170429916717;
constexpr double selu_scale = 1.0507009873554804934193349852946;

// Step functions ------------------------------------------------------------------------------------------------------

/// The step function of a h(x / width), given the `steps` of h: the levels scale with a / width.
StepFunction scaled(StepFunction steps, double width, double level_scale) {
  for (double& boundary : steps.boundaries) {
    boundary *= width;
  }
  for (double& level : steps.levels) {
    level *= level_scale;
  }
  return steps;
}

template <class Function>
StepFunction published() {
  using Steps = typename Function::PublishedSteps;
  StepFunction steps;
  for (int i = 0; i + 1 < Steps::levels; ++i) {
    steps.boundaries.push_back(Steps::boundary(i));
  }
  for (int code = 0; code < Steps::levels; ++code) {
    steps.levels.push_back(Steps::level(code));
  }
  return steps;
}

/// silu(1.702 x) / 1.702
StepFunction as_quick_gelu(StepFunction silu) {
  return scaled(std::move(silu), 1 / quick_gelu_scale, 1);
}

/// tanh(x) = 2 sigmoid(2 x) - 1
StepFunction tanh_steps(Criterion criterion, int64_t bits) {
  return scaled(shipped_steps("sigmoid", criterion, bits), 0.5, 4);
}

StepFunction tanhshrink_steps(Criterion criterion, int64_t bits, Doubles /*parameters*/) {
  StepFunction steps = tanh_steps(criterion, bits);
  std::transform(steps.levels.begin(), steps.levels.end(), steps.levels.begin(), [](double l) { return 1 - l; });
  return steps;
}

/// -softplus(-x)
StepFunction logsigmoid_steps(Criterion criterion, int64_t bits, Doubles /*parameters*/) {
  StepFunction steps = scaled(shipped_steps("softplus", criterion, bits), -1, 1);
  std::reverse(steps.boundaries.begin(), steps.boundaries.end());
  std::reverse(steps.levels.begin(), steps.levels.end());
  return steps;
}

StepFunction elu_row_steps(Criterion criterion, int64_t bits, Doubles p) {
  StepFunction steps = elu_steps(p[0], criterion, bits);
  for (double& boundary : steps.boundaries) {  // the search is off by a rounding at the kink
    boundary = std::abs(boundary) < 1e-12 ? 0 : boundary;
  }
  return steps;
}

StepFunction hardswish_steps(Criterion criterion, int64_t bits, Doubles /*parameters*/) {
  StepFunction steps = shipped_steps("hardswish", criterion, bits);
  // At 3 torch's derivative is that of the piece on the right. An input at a boundary gets the level on the left, so
  // this boundary must be below 3 in float32, in which inputs are compared.
  const auto jump = std::find(steps.boundaries.begin(), steps.boundaries.end(), 3.0);
  if (jump != steps.boundaries.end()) {
    *jump = std::nextafter(3.0f, 0.0f);
  }
  return steps;
}

void check_positive(const char* op, const char* parameter, double value) {
  TORCH_CHECK_VALUE(
      value > 0 && std::isfinite(value), op, ": ", parameter, " is ", value, ", expected a positive number");
}

// Bands ---------------------------------------------------------------------------------------------------------------

// Comparisons happen in the arithmetic type, in which x > c is equivalent to x >= the next number above c.

double next(double x, double towards, at::ScalarType dtype) {
  return dtype == at::kDouble ? std::nextafter(x, towards)
                              : std::nextafter(static_cast<float>(x), static_cast<float>(towards));
}

double above(double x, at::ScalarType dtype) {
  return next(x, infinity, dtype);
}

double below(double x, at::ScalarType dtype) {
  return next(x, -infinity, dtype);
}

/// A parameter rounded to the element type.
double rounded(double x, at::ScalarType dtype) {
  return visit_dtype(to_dtype(dtype), [&](auto element) {
    using T = typename decltype(element)::type;
    return static_cast<double>(to_compute(from_compute<T>(static_cast<compute_t<T>>(x))));
  });
}

Band threshold_band(Doubles p, at::ScalarType dtype, bool cuda) {
  // torch's CPU kernel compares with the float32 threshold, its CUDA kernel with the threshold in the element type.
  return {-infinity, cuda ? rounded(p[0], dtype) : p[0], 0, 1};
}

Band between(double low, double high, double inside, at::ScalarType dtype) {
  return {above(low, dtype), below(high, dtype), inside, 0};
}

Band shrink_band(Doubles p, at::ScalarType dtype, bool /*cuda*/) {
  const double lambda = rounded(p[0], dtype);
  return {-lambda, lambda, 0, 1};
}

// The table -----------------------------------------------------------------------------------------------------------

using Tensor = at::Tensor;

std::vector<Activation> make_table() {
  return {
      {.name = "gelu",
       .value = [](const Tensor& x, Doubles) { return at::gelu(x, "none"); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("gelu", c, bits); },
       .derivative = [](Doubles) { return gelu_derivative(); },
       .paper = published<GELU>,
       .fused = true},
      {.name = "gelu_tanh",
       .value = [](const Tensor& x, Doubles) { return at::gelu(x, "tanh"); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("gelu_tanh", c, bits); },
       .derivative = [](Doubles) { return gelu_tanh_derivative(); },
       .paper = published<GELUTanh>,
       .fused = true},
      {.name = "quick_gelu",
       .value = [](const Tensor& x, Doubles) { return x * at::sigmoid(quick_gelu_scale * x); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return as_quick_gelu(shipped_steps("silu", c, bits)); },
       .derivative = [](Doubles) { return silu_derivative(quick_gelu_scale); },
       .paper = [] { return as_quick_gelu(published<SiLU>()); }},
      {.name = "silu",
       .value = [](const Tensor& x, Doubles) { return at::silu(x); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("silu", c, bits); },
       .derivative = [](Doubles) { return silu_derivative(1); },
       .paper = published<SiLU>,
       .fused = true},
      {.name = "mish",
       .value = [](const Tensor& x, Doubles) { return at::mish(x); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("mish", c, bits); },
       .derivative = [](Doubles) { return mish_derivative(); }},
      {.name = "sigmoid",
       .value = [](const Tensor& x, Doubles) { return at::sigmoid(x); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("sigmoid", c, bits); },
       .derivative = [](Doubles) { return sigmoid_derivative(); }},
      {.name = "tanh",
       .value = [](const Tensor& x, Doubles) { return at::tanh(x); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return tanh_steps(c, bits); },
       .derivative = [](Doubles) { return tanh_derivative(); }},
      {.name = "tanhshrink",
       .value = [](const Tensor& x, Doubles) { return x - at::tanh(x); },
       .steps = tanhshrink_steps,
       .derivative = [](Doubles) { return tanhshrink_derivative(); }},
      {.name = "softplus",
       .parameters = {{"beta", 1}, {"threshold", 20}},
       .value = [](const Tensor& x, Doubles p) { return at::softplus(x, p[0], p[1]); },
       .check =
           [](const char* op, Doubles p) {
             check_positive(op, "beta", p[0]);
             TORCH_CHECK_VALUE(p[1] > -infinity, op, ": threshold is ", p[1], ", expected a number");
           },
       // log(1 + exp(beta x)) / beta; x where beta x > threshold
       .steps = [](Criterion c, int64_t bits, Doubles p) { return scaled(softplus_steps(p[1], c, bits), 1 / p[0], 1); },
       .derivative = [](Doubles p) { return logistic_derivative(p[0], p[1]); }},
      {.name = "softsign",
       .value = [](const Tensor& x, Doubles) { return x / (at::abs(x) + 1); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("softsign", c, bits); },
       .derivative = [](Doubles) { return softsign_derivative(); }},
      {.name = "logsigmoid",
       .value = [](const Tensor& x, Doubles) { return at::log_sigmoid(x); },
       .steps = logsigmoid_steps,
       .derivative = [](Doubles) { return logsigmoid_derivative(); }},
      {.name = "elu",
       .parameters = {{"alpha", 1}},
       .value = [](const Tensor& x, Doubles p) { return at::elu(x, p[0]); },
       .check =
           [](const char* op, Doubles p) {
             TORCH_CHECK_VALUE(std::isfinite(p[0]), op, ": alpha is ", p[0], ", expected a finite number");
           },
       .steps = elu_row_steps,
       .derivative = [](Doubles p) { return exponential_derivative(p[0], 1, 1); }},
      {.name = "celu",
       .parameters = {{"alpha", 1}},
       .value = [](const Tensor& x, Doubles p) { return at::celu(x, p[0]); },
       .check = [](const char* op, Doubles p) { check_positive(op, "alpha", p[0]); },
       // alpha elu(x / alpha)
       .steps = [](Criterion c, int64_t bits, Doubles p) { return scaled(shipped_steps("elu", c, bits), p[0], 1); },
       .derivative = [](Doubles p) { return exponential_derivative(p[0], p[0], 1); }},
      {.name = "selu",
       .value = [](const Tensor& x, Doubles) { return at::selu(x); },
       .steps = [](Criterion c, int64_t bits, Doubles) { return shipped_steps("selu", c, bits); },
       .derivative = [](Doubles) { return exponential_derivative(selu_alpha, 1, selu_scale); }},
      {.name = "hardswish",
       .value = [](const Tensor& x, Doubles) { return at::hardswish(x); },
       .steps = hardswish_steps,
       .derivative = [](Doubles) { return hardswish_derivative(); }},

      {.name = "relu",
       .value = [](const Tensor& x, Doubles) { return at::relu(x); },
       .band = [](Doubles, at::ScalarType, bool) { return Band{-infinity, 0, 0, 1}; }},
      {.name = "leaky_relu",
       .parameters = {{"negative_slope", 0.01}},
       .value = [](const Tensor& x, Doubles p) { return at::leaky_relu(x, p[0]); },
       .band = [](Doubles p, at::ScalarType dtype, bool) { return Band{above(0, dtype), infinity, 1, p[0]}; }},
      {.name = "relu6",
       .value = [](const Tensor& x, Doubles) { return at::relu6(x); },
       .band = [](Doubles, at::ScalarType dtype, bool) { return between(0, 6, 1, dtype); }},
      {.name = "threshold",
       .parameters = {{"threshold", no_default}, {"value", no_default}},
       .value = [](const Tensor& x, Doubles p) { return at::threshold(x, p[0], p[1]); },
       .band = threshold_band},
      {.name = "hardtanh",
       .parameters = {{"min_val", -1}, {"max_val", 1}},
       .value = [](const Tensor& x, Doubles p) { return at::hardtanh(x, p[0], p[1]); },
       .band = [](Doubles p, at::ScalarType dtype, bool) { return between(p[0], p[1], 1, dtype); }},
      {.name = "hardsigmoid",
       .value = [](const Tensor& x, Doubles) { return at::hardsigmoid(x); },
       // (torch computes with 1/6 in float32.)
       .band = [](Doubles, at::ScalarType dtype, bool) { return between(-3, 3, 1.0f / 6.0f, dtype); }},
      {.name = "hardshrink",
       .parameters = {{"lambd", 0.5}},
       .value = [](const Tensor& x, Doubles p) { return at::hardshrink(x, p[0]); },
       .band = shrink_band},
      {.name = "softshrink",
       .parameters = {{"lambd", 0.5}},
       .value = [](const Tensor& x, Doubles p) { return at::softshrink(x, p[0]); },
       .band = shrink_band},
  };
}

const Activation& find(const char* op, std::string_view name, Doubles parameters, bool exact) {
  const std::vector<Activation>& table = activations();
  const auto row = std::find_if(
      table.begin(), table.end(), [&](const Activation& a) { return a.name == name && a.is_exact() == exact; });
  if (row == table.end()) {
    std::vector<std::string_view> names;
    for (const Activation& a : table) {
      if (a.is_exact() == exact) {
        names.push_back(a.name);
      }
    }
    TORCH_CHECK_VALUE(false, op, ": function is '", name, "', expected one of ", c10::Join(", ", names));
  }
  if (parameters.size() != row->parameters.size()) {
    std::vector<std::string_view> names;
    for (const Parameter& parameter : row->parameters) {
      names.push_back(parameter.name);
    }
    TORCH_CHECK_VALUE(
        false, op, ": parameters has ", parameters.size(), " entries, expected ", names.size(), " (",
        names.empty() ? "none" : c10::Join(" ", names), ") for ", name);
  }
  return *row;
}

}  // namespace

const std::vector<Activation>& activations() {
  static const std::vector<Activation> table = make_table();
  return table;
}

const Activation& find_activation(const char* op, std::string_view name, Doubles parameters) {
  const Activation& activation = find(op, name, parameters, false);
  if (activation.check != nullptr) {
    activation.check(op, parameters);
  }
  return activation;
}

const Activation& find_exact(const char* op, std::string_view name, Doubles parameters) {
  return find(op, name, parameters, true);
}

Band band_of(const Activation& activation, Doubles parameters, at::ScalarType dtype, bool cuda) {
  const SubnormalsScope next_to_zero_is_not_zero(Subnormals::kept());
  return activation.band(parameters, dtype, cuda);
}

}  // namespace lomem::detail
