// The activations with few-bit derivatives: what each computes, and its step function.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/step_function.h>

#include <optional>
#include <string_view>

namespace lomem::detail {

/// An activation of the family, by name: errors name op and argument.
struct Activation {
  std::string_view name;
  /// Of its parameters, separated by spaces.
  std::string_view parameters;
  /// What torch computes. Autocast is off: an activation keeps its input's dtype.
  at::Tensor (*value)(const at::Tensor& input, at::ArrayRef<double> parameters);
  /// Raises where a parameter has no derivative that makes sense. May be null.
  void (*check)(const char* op, at::ArrayRef<double> parameters);
};

/// The activation with a smooth derivative that is called `name`, and its parameters checked.
const Activation& find_activation(const char* op, std::string_view name, at::ArrayRef<double> parameters);

/// The library's step function, or the caller's where boundaries and levels are given; 2^bits levels.
StepFunction choose_steps(
    const char* op, const Activation& activation, at::ArrayRef<double> parameters, int64_t bits,
    std::string_view criterion, const std::optional<at::ArrayRef<double>>& boundaries,
    const std::optional<at::ArrayRef<double>>& levels);

/// boundaries: 2^bits - 1 at most, ascending; levels: one more. Raises else.
void check_steps(const char* op, at::ArrayRef<double> boundaries, at::ArrayRef<double> levels, int64_t bits);

/// An activation of straight pieces: its derivative has one value for low <= x <= high and another one elsewhere.
struct Band {
  double low;
  double high;
  double inside;
  double outside;
};

struct HardActivation {
  std::string_view name;
  std::string_view parameters;
  at::Tensor (*value)(const at::Tensor& input, at::ArrayRef<double> parameters);
  /// See band_of.
  Band (*band)(at::ArrayRef<double> parameters, at::ScalarType dtype, bool cuda);
};

/// The band as torch's backward kernels for this dtype and device compare.
Band band_of(const HardActivation& activation, at::ArrayRef<double> parameters, at::ScalarType dtype, bool cuda);

const HardActivation& find_hard_activation(const char* op, std::string_view name, at::ArrayRef<double> parameters);

}  // namespace lomem::detail
