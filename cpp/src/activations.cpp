#include "activations.h"

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
#include <lomem/core/dtype.h>
#include <lomem/core/packing.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "checks.h"
#include "step_refits.h"
#include "subnormals.h"

namespace lomem::detail {
namespace {

using Parameters = at::ArrayRef<double>;

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double quick_gelu_scale = 1.702;

// What torch computes ---------------------------------------------------------------------------------

const Activation activations[] = {
    {"gelu", "", [](const at::Tensor& x, Parameters) { return at::gelu(x, "none"); }, nullptr},
    {"gelu_tanh", "", [](const at::Tensor& x, Parameters) { return at::gelu(x, "tanh"); }, nullptr},
    {"quick_gelu", "", [](const at::Tensor& x, Parameters) { return x * at::sigmoid(quick_gelu_scale * x); }, nullptr},
    {"silu", "", [](const at::Tensor& x, Parameters) { return at::silu(x); }, nullptr},
    {"mish", "", [](const at::Tensor& x, Parameters) { return at::mish(x); }, nullptr},
    {"sigmoid", "", [](const at::Tensor& x, Parameters) { return at::sigmoid(x); }, nullptr},
    {"tanh", "", [](const at::Tensor& x, Parameters) { return at::tanh(x); }, nullptr},
    {"tanhshrink", "", [](const at::Tensor& x, Parameters) { return x - at::tanh(x); }, nullptr},
    {"softplus", "beta threshold", [](const at::Tensor& x, Parameters p) { return at::softplus(x, p[0], p[1]); },
     [](const char* op, Parameters p) {
       TORCH_CHECK_VALUE(p[0] > 0 && std::isfinite(p[0]), op, ": beta is ", p[0], ", expected a positive number");
       TORCH_CHECK_VALUE(p[1] > -infinity, op, ": threshold is ", p[1], ", expected a number");
     }},
    {"softsign", "", [](const at::Tensor& x, Parameters) { return x / (at::abs(x) + 1); }, nullptr},
    {"logsigmoid", "", [](const at::Tensor& x, Parameters) { return at::log_sigmoid(x); }, nullptr},
    {"elu", "alpha", [](const at::Tensor& x, Parameters p) { return at::elu(x, p[0]); },
     [](const char* op, Parameters p) {
       TORCH_CHECK_VALUE(std::isfinite(p[0]), op, ": alpha is ", p[0], ", expected a finite number");
     }},
    {"celu", "alpha", [](const at::Tensor& x, Parameters p) { return at::celu(x, p[0]); },
     [](const char* op, Parameters p) {
       TORCH_CHECK_VALUE(p[0] > 0 && std::isfinite(p[0]), op, ": alpha is ", p[0], ", expected a positive number");
     }},
    {"selu", "", [](const at::Tensor& x, Parameters) { return at::selu(x); }, nullptr},
    {"hardswish", "", [](const at::Tensor& x, Parameters) { return at::hardswish(x); }, nullptr},
};

// Step functions --------------------------------------------------------------------------------------

/// That of a h(x / width) where `steps` is that of h: the levels scale with a / width.
StepFunction scaled(StepFunction steps, double width, double level_scale) {
  for (double& boundary : steps.boundaries) {
    boundary *= width;
  }
  for (double& level : steps.levels) {
    level *= level_scale;
  }
  return steps;
}

StepFunction steps_of(std::string_view name, Parameters p, std::string_view criterion, int64_t bits) {
  if (name == "quick_gelu") {  // silu(1.702 x) / 1.702
    return scaled(shipped_steps("silu", criterion, bits), 1 / quick_gelu_scale, 1);
  }
  if (name == "tanh" || name == "tanhshrink") {  // tanh(x) = 2 sigmoid(2 x) - 1
    StepFunction steps = scaled(shipped_steps("sigmoid", criterion, bits), 0.5, 4);
    if (name == "tanhshrink") {
      std::transform(steps.levels.begin(), steps.levels.end(), steps.levels.begin(), [](double l) { return 1 - l; });
    }
    return steps;
  }
  if (name == "softplus") {  // log(1 + exp(beta x)) / beta; x where beta x > threshold
    return scaled(softplus_steps(p[1], criterion, bits), 1 / p[0], 1);
  }
  if (name == "logsigmoid") {  // -softplus(-x)
    StepFunction steps = scaled(shipped_steps("softplus", criterion, bits), -1, 1);
    std::reverse(steps.boundaries.begin(), steps.boundaries.end());
    std::reverse(steps.levels.begin(), steps.levels.end());
    return steps;
  }
  if (name == "elu") {
    StepFunction steps = elu_steps(p[0], criterion, bits);
    for (double& boundary : steps.boundaries) {  // the one at the kink, which the search misses by a rounding
      boundary = std::abs(boundary) < 1e-12 ? 0 : boundary;
    }
    return steps;
  }
  if (name == "celu") {  // alpha elu(x / alpha)
    return scaled(shipped_steps("elu", criterion, bits), p[0], 1);
  }
  StepFunction steps = shipped_steps(name, criterion, bits);
  if (name == "hardswish") {
    // At 3 torch's derivative is that of the piece on the right. An input at a boundary has the level on the left, so
    // this one lies below 3, as float32 inputs are compared.
    const auto jump = std::find(steps.boundaries.begin(), steps.boundaries.end(), 3.0);
    if (jump != steps.boundaries.end()) {
      *jump = std::nextafter(3.0f, 0.0f);
    }
  }
  return steps;
}

void check_criterion(const char* op, std::string_view criterion) {
  TORCH_CHECK_VALUE(
      criterion == "primitive" || criterion == "derivative", op, ": criterion is '", criterion,
      "', expected 'primitive' or 'derivative'");
}

// Straight pieces -------------------------------------------------------------------------------------

// Comparisons happen in the arithmetic type, in which x > c is x >= the next number above c.

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

/// A parameter of the element type.
double rounded(double x, at::ScalarType dtype) {
  return visit_dtype(to_dtype(dtype), [&](auto element) {
    using T = typename decltype(element)::type;
    return static_cast<double>(to_compute(from_compute<T>(static_cast<compute_t<T>>(x))));
  });
}

Band threshold_band(Parameters p, at::ScalarType dtype, bool cuda) {
  // torch's CPU kernel compares with the float32 threshold, its CUDA kernel with that of the element type.
  return {-infinity, cuda ? rounded(p[0], dtype) : p[0], 0, 1};
}

Band between(double low, double high, double inside, at::ScalarType dtype) {
  return {above(low, dtype), below(high, dtype), inside, 0};
}

Band shrink_band(Parameters p, at::ScalarType dtype, bool /*cuda*/) {
  const double lambda = rounded(p[0], dtype);
  return {-lambda, lambda, 0, 1};
}

const HardActivation hard_activations[] = {
    {"relu", "", [](const at::Tensor& x, Parameters) { return at::relu(x); },
     [](Parameters, at::ScalarType, bool) { return Band{-infinity, 0, 0, 1}; }},
    {"leaky_relu", "negative_slope", [](const at::Tensor& x, Parameters p) { return at::leaky_relu(x, p[0]); },
     [](Parameters p, at::ScalarType dtype, bool) { return Band{above(0, dtype), infinity, 1, p[0]}; }},
    {"relu6", "", [](const at::Tensor& x, Parameters) { return at::relu6(x); },
     [](Parameters, at::ScalarType dtype, bool) { return between(0, 6, 1, dtype); }},
    {"threshold", "threshold value", [](const at::Tensor& x, Parameters p) { return at::threshold(x, p[0], p[1]); },
     threshold_band},
    {"hardtanh", "min_val max_val", [](const at::Tensor& x, Parameters p) { return at::hardtanh(x, p[0], p[1]); },
     [](Parameters p, at::ScalarType dtype, bool) { return between(p[0], p[1], 1, dtype); }},
    {"hardsigmoid", "", [](const at::Tensor& x, Parameters) { return at::hardsigmoid(x); },
     [](Parameters, at::ScalarType dtype, bool) { return between(-3, 3, 1.0f / 6.0f, dtype); }},  // (torch: of float32)
    {"hardshrink", "lambd", [](const at::Tensor& x, Parameters p) { return at::hardshrink(x, p[0]); }, shrink_band},
    {"softshrink", "lambd", [](const at::Tensor& x, Parameters p) { return at::softshrink(x, p[0]); }, shrink_band},
};

// Looking up ------------------------------------------------------------------------------------------

size_t count_words(std::string_view text) {
  return text.empty() ? 0 : static_cast<size_t>(std::count(text.begin(), text.end(), ' ')) + 1;
}

template <class Entry, size_t count>
const Entry& find(const Entry (&entries)[count], const char* op, std::string_view name, Parameters parameters) {
  const Entry* const end = entries + count;
  const Entry* entry = std::find_if(entries, end, [&](const Entry& e) { return e.name == name; });
  if (entry == end) {
    std::string names;
    for (const Entry& e : entries) {
      names += (names.empty() ? "" : ", ") + std::string(e.name);
    }
    TORCH_CHECK_VALUE(false, op, ": function is '", name, "', expected one of ", names);
  }
  const size_t wanted = count_words(entry->parameters);
  TORCH_CHECK_VALUE(
      parameters.size() == wanted, op, ": parameters has ", parameters.size(), " entries, expected ", wanted, " (",
      entry->parameters.empty() ? "none" : entry->parameters, ") for ", name);
  return *entry;
}

}  // namespace

const Activation& find_activation(const char* op, std::string_view name, Parameters parameters) {
  const Activation& activation = find(activations, op, name, parameters);
  if (activation.check != nullptr) {
    activation.check(op, parameters);
  }
  return activation;
}

const HardActivation& find_hard_activation(const char* op, std::string_view name, Parameters parameters) {
  return find(hard_activations, op, name, parameters);
}

Band band_of(const HardActivation& activation, Parameters parameters, at::ScalarType dtype, bool cuda) {
  const SubnormalsScope next_to_zero_is_not_zero(Subnormals::kept());
  return activation.band(parameters, dtype, cuda);
}

void check_steps(const char* op, Parameters boundaries, Parameters levels, int64_t bits) {
  check_boundaries(op, boundaries, bits);
  TORCH_CHECK_VALUE(
      levels.size() == boundaries.size() + 1, op, ": levels has ", levels.size(), " entries, expected ",
      boundaries.size() + 1, ", one more than boundaries");
}

StepFunction choose_steps(
    const char* op, const Activation& activation, Parameters parameters, int64_t bits, std::string_view criterion,
    const std::optional<Parameters>& boundaries, const std::optional<Parameters>& levels) {
  check_bits(op, bits);
  check_criterion(op, criterion);
  TORCH_CHECK_VALUE(
      boundaries.has_value() == levels.has_value(), op, ": ", boundaries ? "levels" : "boundaries",
      " is None, expected both boundaries and levels, or neither");
  if (!boundaries) {
    return steps_of(activation.name, parameters, criterion, bits);
  }
  check_steps(op, *boundaries, *levels, bits);
  StepFunction steps{filled_boundaries(*boundaries, bits), levels->vec()};
  steps.levels.resize(size_t{1} << bits, steps.levels.back());
  return steps;
}

}  // namespace lomem::detail

namespace lomem {

StepFunction step_function(
    std::string_view function, int64_t bits, std::string_view criterion, const std::vector<double>& parameters) {
  constexpr const char* op = "lomem::step_function";
  const detail::Activation& activation = detail::find_activation(op, function, parameters);
  return detail::choose_steps(op, activation, parameters, bits, criterion, std::nullopt, std::nullopt);
}

}  // namespace lomem
