// The table of activations: what each one computes, and which step function approximates its derivative.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <lomem/ops/step_function.h>

#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "derivatives.h"

namespace lomem::detail {

using Doubles = at::ArrayRef<double>;

/// A parameter of an activation, in the op's argument order.
struct Parameter {
  std::string_view name;
  double default_value;  // NaN if there is none
};

inline constexpr double no_default = std::numeric_limits<double>::quiet_NaN();

/// Which step function approximates a smooth derivative.
enum class Criterion {
  derivative,  ///< The one closest to the derivative in the mean square over the line (arXiv:2202.00441).
  primitive,   ///< The one whose integral is closest to the activation (arXiv:2406.16282).
  paper,       ///< The one published in arXiv:2406.16282, with 2 bits. Not every activation has one.
};

std::string_view name_of(Criterion criterion);

/// A derivative with two values: one for low <= x <= high, another one elsewhere.
struct Band {
  double low;
  double high;
  double inside;
  double outside;
};

struct Activation {
  std::string_view name;
  std::vector<Parameter> parameters = {};
  /// Computes what torch computes. Runs with autocast off: an activation keeps its input's dtype.
  at::Tensor (*value)(const at::Tensor& input, Doubles parameters);
  /// Raises if a parameter has no meaningful derivative. May be null.
  void (*check)(const char* op, Doubles parameters) = nullptr;

  /// For smooth activations: the step function of 1 to 8 bits for "derivative" and "primitive".
  StepFunction (*steps)(Criterion criterion, int64_t bits, Doubles parameters) = nullptr;
  /// For smooth activations: the derivative itself, as what codes drawn at random are made of.
  Derivative (*derivative)(Doubles parameters) = nullptr;
  /// The step function for "paper". May be null.
  StepFunction (*paper)() = nullptr;
  /// Whether fused_activation_forward supports it. Otherwise the op runs the torch op and then encodes its input.
  bool fused = false;

  /// For activations whose derivative has two values, null for others: the band, with the comparisons of torch's
  /// backward kernels for this dtype and device.
  Band (*band)(Doubles parameters, at::ScalarType dtype, bool cuda) = nullptr;

  bool is_exact() const {
    return band != nullptr;
  }
};

/// All activations.
const std::vector<Activation>& activations();

/// Returns the smooth activation called `name` and checks its parameters. Errors name op and argument.
const Activation& find_activation(const char* op, std::string_view name, Doubles parameters);

/// The same for activations whose derivative has two values.
const Activation& find_exact(const char* op, std::string_view name, Doubles parameters);

Band band_of(const Activation& activation, Doubles parameters, at::ScalarType dtype, bool cuda);

/// A step function of full width: 2^bits - 1 boundaries and 2^bits levels.
struct ResolvedSteps {
  explicit ResolvedSteps(StepFunction steps);

  StepFunction steps;
  /// A copy of the levels in the form in which autograd saves them without copying.
  c10::List<double> saved_levels;
};

/// Arguments of an op that select a step function, as passed by the user.
struct StepArguments {
  int64_t bits;
  std::string_view criterion;
  std::optional<Doubles> boundaries;
  std::optional<Doubles> levels;
};

/// Raises if the arguments do not select a step function. Does not compute one.
void check_step_arguments(const char* op, const Activation& activation, const StepArguments& arguments);

/// The library's step function, or a user-supplied one if boundaries and levels are given. The library's step functions
/// are computed once.
std::shared_ptr<const ResolvedSteps> resolve_steps(
    const char* op, const Activation& activation, Doubles parameters, const StepArguments& arguments);

/// Raises unless there are at most 2^bits - 1 ascending boundaries and one more level than boundaries.
void check_steps(const char* op, Doubles boundaries, Doubles levels, int64_t bits);

}  // namespace lomem::detail
