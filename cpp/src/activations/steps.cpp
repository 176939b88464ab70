// Selects the step function of an activation: the library's, computed once, or a user-supplied one.
#include <algorithm>
#include <string>
#include <tuple>

#include "../checks.h"
#include "cache.h"
#include "table.h"

namespace lomem::detail {
namespace {

constexpr int64_t published_bits = 2;

Criterion parse_criterion(const char* op, const Activation& activation, std::string_view criterion, int64_t bits) {
  if (criterion == name_of(Criterion::derivative)) {
    return Criterion::derivative;
  }
  if (criterion == name_of(Criterion::primitive)) {
    return Criterion::primitive;
  }
  TORCH_CHECK_VALUE(
      criterion == name_of(Criterion::paper), op, ": criterion is '", criterion,
      "', expected 'derivative', 'primitive' or 'paper'");
  TORCH_CHECK_VALUE(
      activation.paper != nullptr, op, ": criterion is 'paper', expected 'derivative' or 'primitive' for ",
      activation.name, ", which has no published step function");
  TORCH_CHECK_VALUE(
      bits == published_bits, op, ": bits is ", bits, ", expected ", published_bits,
      " for criterion 'paper', whose published step functions all have that many bits");
  return Criterion::paper;
}

StepFunction make_steps(const Activation& activation, Criterion criterion, int64_t bits, Doubles parameters) {
  return criterion == Criterion::paper ? activation.paper() : activation.steps(criterion, bits, parameters);
}

c10::List<double> as_list(const std::vector<double>& values) {
  c10::List<double> result;
  result.reserve(values.size());
  for (const double value : values) {
    result.push_back(value);
  }
  return result;
}

}  // namespace

std::string_view name_of(Criterion criterion) {
  switch (criterion) {
    case Criterion::derivative: return "derivative";
    case Criterion::primitive: return "primitive";
    case Criterion::paper: return "paper";
  }
  return {};
}

ResolvedSteps::ResolvedSteps(StepFunction resolved) : steps(std::move(resolved)), saved_levels(as_list(steps.levels)) {}

void check_steps(const char* op, Doubles boundaries, Doubles levels, int64_t bits) {
  check_boundaries(op, boundaries, bits);
  TORCH_CHECK_VALUE(
      levels.size() == boundaries.size() + 1, op, ": levels has ", levels.size(), " entries, expected ",
      boundaries.size() + 1, ", one more than boundaries");
}

void check_step_arguments(const char* op, const Activation& activation, const StepArguments& arguments) {
  const auto& [bits, criterion, boundaries, levels] = arguments;
  check_bits(op, bits);
  parse_criterion(op, activation, criterion, bits);
  TORCH_CHECK_VALUE(
      boundaries.has_value() == levels.has_value(), op, ": ", boundaries ? "levels" : "boundaries",
      " is None, expected both boundaries and levels, or neither");
  if (boundaries) {
    check_steps(op, *boundaries, *levels, bits);
  }
}

std::shared_ptr<const ResolvedSteps> resolve_steps(
    const char* op, const Activation& activation, Doubles parameters, const StepArguments& arguments) {
  const auto& [bits, criterion, boundaries, levels] = arguments;
  if (!boundaries && !levels) {
    check_bits(op, bits);
    // (For some parameters finding a step function takes a third of a second.)
    using Key = std::tuple<const Activation*, Criterion, int64_t, double, double>;
    static Cache<Key, ResolvedSteps, 4096> cache;
    const Criterion known = parse_criterion(op, activation, criterion, bits);
    const Key key{
        &activation, known, bits, parameters.empty() ? 0 : parameters[0], parameters.size() < 2 ? 0 : parameters[1]};
    return cache.get(key, [&] { return ResolvedSteps(make_steps(activation, known, bits, parameters)); });
  }
  check_step_arguments(op, activation, arguments);
  StepFunction steps{filled_boundaries(*boundaries, bits), levels->vec()};
  steps.levels.resize(size_t{1} << bits, steps.levels.back());
  return std::make_shared<const ResolvedSteps>(std::move(steps));
}

}  // namespace lomem::detail

namespace lomem {

StepFunction step_function(
    std::string_view function, int64_t bits, std::string_view criterion, const std::vector<double>& parameters) {
  constexpr const char* op = "lomem::step_function";
  const detail::Activation& activation = detail::find_activation(op, function, parameters);
  return detail::resolve_steps(op, activation, parameters, {bits, criterion, std::nullopt, std::nullopt})->steps;
}

}  // namespace lomem
