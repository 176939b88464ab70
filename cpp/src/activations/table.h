// The table of activations: what each one computes, and what stands in for its derivative.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>
#include <lomem/ops/step_function.h>

#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

namespace lomem::detail {

using Doubles = at::ArrayRef<double>;

/// A parameter of an activation, in the order in which its op takes them.
struct Parameter {
  std::string_view name;
  double default_value;  // NaN where there is none
};

inline constexpr double no_default = std::numeric_limits<double>::quiet_NaN();

/// Which step function stands in for a smooth derivative.
enum class Criterion {
  derivative,  ///< The one that is nearest to the derivative in the mean square over the line (arXiv:2202.00441).
  primitive,   ///< The one whose integral is nearest to the activation (arXiv:2406.16282).
  paper,       ///< The published one of arXiv:2406.16282, of 2 bits. Not every activation has one.
};

std::string_view name_of(Criterion criterion);

/// A derivative of two values: one for low <= x <= high, another one elsewhere.
struct Band {
  double low;
  double high;
  double inside;
  double outside;
};

struct Activation {
  std::string_view name;
  std::vector<Parameter> parameters = {};
  /// What torch computes. Autocast is off: an activation keeps its input's dtype.
  at::Tensor (*value)(const at::Tensor& input, Doubles parameters);
  /// Raises where a parameter has no derivative that makes sense. May be null.
  void (*check)(const char* op, Doubles parameters) = nullptr;

  /// Of a smooth activation: the step function of 1 to 8 bits for "derivative" and "primitive".
  StepFunction (*steps)(Criterion criterion, int64_t bits, Doubles parameters) = nullptr;
  /// The one for "paper". May be null.
  StepFunction (*paper)() = nullptr;
  /// Whether fused_activation_forward knows it. Others are the torch op, and codes of its input.
  bool fused = false;

  /// Of an activation whose derivative has two values, null for others: the band as torch's backward kernels for this
  /// dtype and device compare.
  Band (*band)(Doubles parameters, at::ScalarType dtype, bool cuda) = nullptr;

  bool is_exact() const {
    return band != nullptr;
  }
};

/// All of them.
const std::vector<Activation>& activations();

/// The smooth activation that is called `name`, with its parameters checked. Errors name op and argument.
const Activation& find_activation(const char* op, std::string_view name, Doubles parameters);

/// The activation of that name whose derivative has two values.
const Activation& find_hard_activation(const char* op, std::string_view name, Doubles parameters);

Band band_of(const Activation& activation, Doubles parameters, at::ScalarType dtype, bool cuda);

/// A step function at full width: 2^bits - 1 boundaries and 2^bits levels.
struct ResolvedSteps {
  explicit ResolvedSteps(StepFunction steps);

  StepFunction steps;
  /// The levels once more, as autograd saves them without a copy.
  c10::List<double> saved_levels;
};

/// Which step function an op is asked for: arguments of the op, as they come.
struct StepArguments {
  int64_t bits;
  std::string_view criterion;
  std::optional<Doubles> boundaries;
  std::optional<Doubles> levels;
};

/// Raises where the arguments name no step function. Resolves none.
void check_step_arguments(const char* op, const Activation& activation, const StepArguments& arguments);

/// The library's step function, or the caller's where boundaries and levels are given. Those that the library has are
/// made once.
std::shared_ptr<const ResolvedSteps> resolve_steps(
    const char* op, const Activation& activation, Doubles parameters, const StepArguments& arguments);

/// boundaries: 2^bits - 1 at most, ascending; levels: one more. Raises otherwise.
void check_steps(const char* op, Doubles boundaries, Doubles levels, int64_t bits);

}  // namespace lomem::detail
