#include "refits.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "data.h"

namespace lomem::detail {
namespace {

/// Zero of f, which has opposite signs at both ends, to the last digit.
template <class F>
double root(const F& f, double low, double high) {
  const bool rises = f(low) < f(high);
  for (;;) {
    const double middle = low + (high - low) / 2;
    if (!(low < middle && middle < high)) {
      return middle;
    }
    ((f(middle) < 0) == rises ? low : high) = middle;
  }
}

// ELU -------------------------------------------------------------------------------------------------

/// Endpoints of the straight line that is closest to a function on an interval, computed from the integrals of the
/// function and of the function times the distance from the start of the interval.
struct Line {
  double left;
  double right;
};

Line nearest_line(double length, double integral, double moment) {
  return {(4 * integral - 6 * moment / length) / length, (6 * moment / length - 2 * integral) / length};
}

/// The line closest to e^x from 0 to `length`.
Line line_to_exp(double length) {
  const double rise = std::expm1(length);
  return nearest_line(length, rise, length + (length - 1) * rise);
}

/// The line closest to an ELU from a < 0 to b > 0.
Line line_to_elu(double alpha, double a, double b) {
  const double below = alpha * (a - std::expm1(a));
  const double first = alpha * ((1 - a) * std::exp(a) - 1 + a * a / 2);  // the integral of x times the function
  return nearest_line(b - a, below + b * b / 2, first - a * below + b * b * (b / 3 - a / 2));
}

/// The knots of the best h~ for e^x, starting at the first one. Each knot is placed so that the line closest to e^x
/// between the previous knot and this one starts at the value at which the line before it ends. Values are in units of
/// e^x at the first knot.
struct Tail {
  std::vector<double> knots;
  std::vector<double> values;
};

Tail tail_of_exp(size_t pieces) {
  Tail tail{{0}, {0}};
  for (size_t i = 0; i < pieces; ++i) {
    const double unit = std::exp(tail.knots.back());
    const double value = tail.values.back() / unit;
    // (The line closest to a short piece starts at about 1 - length^2 / 12.)
    const double length = root(
        [&](double l) { return line_to_exp(l).left - value; }, std::sqrt(1 - value), 4 * std::sqrt(12 * (1 - value)));
    tail.knots.push_back(tail.knots.back() + length);
    tail.values.push_back(unit * line_to_exp(length).right);
  }
  return tail;
}

/// The squared error that a step function leaves for an ELU.
double elu_error(double alpha, const StepFunction& steps, bool primitive) {
  // Gauss-Legendre quadrature.
  constexpr double at[] = {-0.9061798459386640, -0.5384693101056831, 0, 0.5384693101056831, 0.9061798459386640};
  constexpr double weight[] = {
      0.2369268850561891, 0.4786286704993665, 0.5688888888888889, 0.4786286704993665, 0.2369268850561891};
  double low = steps.boundaries.front();
  double error = alpha * alpha * std::exp(2 * low) / 2;
  double value = -alpha;
  const auto add = [&](double high, double level) {
    for (int i = 0; i < 5; ++i) {
      const double x = (low + high) / 2 + at[i] * (high - low) / 2;
      const double exact = primitive ? (x < 0 ? alpha * std::expm1(x) : x) : (x < 0 ? alpha * std::exp(x) : 1);
      const double difference = exact - (primitive ? value + level * (x - low) : level);
      error += weight[i] * (high - low) / 2 * difference * difference;
    }
    value += level * (high - low);
    low = high;
  };
  for (size_t i = 0; i < steps.boundaries.size(); ++i) {
    const double high = i + 1 < steps.boundaries.size() ? steps.boundaries[i + 1] : std::max(low, 0.0);
    if (low < 0 && 0 < high) {
      add(0, steps.levels[i + 1]);
    }
    add(high, steps.levels[i + 1]);
  }
  return error;
}

/// Step function from the positions and values of the knots.
StepFunction from_knots(const std::vector<double>& knots, const std::vector<double>& values) {
  StepFunction steps{knots, {0}};
  for (size_t i = 1; i < knots.size(); ++i) {
    steps.levels.push_back((values[i] - values[i - 1]) / (knots[i] - knots[i - 1]));
  }
  steps.levels.push_back(1);
  return steps;
}

/// Zeros of f, searched in many equal parts of an interval.
template <class F>
std::vector<double> roots(const F& f, double low, double high) {
  constexpr int parts = 512;
  std::vector<double> found;
  double from = low, at_from = f(low);
  for (int i = 1; i <= parts; ++i) {
    const double to = low + (high - low) * i / parts, at_to = f(to);
    if ((at_from < 0) != (at_to < 0)) {
      found.push_back(root(f, from, to));
    }
    from = to;
    at_from = at_to;
  }
  return found;
}

/// Step functions for "primitive" whose h~ has no knot at 0.
std::vector<StepFunction> free_of_zero(double alpha, size_t boundaries) {
  const size_t last = boundaries - 1;
  const Tail tail = tail_of_exp(last);
  const auto value_of = [&](double begin, size_t i) { return alpha * (std::exp(begin) * tail.values[i] - 1); };

  std::vector<StepFunction> found;
  const auto add = [&](double begin, double end) {
    std::vector<double> knots, values;
    for (size_t i = 0; i < last; ++i) {
      knots.push_back(begin + tail.knots[i]);
      values.push_back(value_of(begin, i));
    }
    knots.push_back(end);
    values.push_back(end);
    found.push_back(from_knots(knots, values));
  };

  // If the last knot is below 0, h~ meets x there.
  const auto miss = [&](double begin) { return value_of(begin, last) - (begin + tail.knots[last]); };
  const double highest = -tail.knots[last];
  for (const double begin : roots(miss, highest - 4 - std::abs(std::log(alpha)), highest)) {
    add(begin, begin + tail.knots[last]);
  }

  // If the last knot is above 0, the line closest to the function between the previous knot and the last one ends on x.
  // There is such an end if alpha is above 1, and the previous knot must be where the line starts.
  const double piece = tail.knots[last] - tail.knots[last - 1];
  const auto end_of = [&](double a) -> std::optional<double> {
    const auto ends = roots([&](double b) { return line_to_elu(alpha, a, b).right - b; }, 0, 16 * piece);
    return ends.empty() ? std::nullopt : std::optional(ends.front());
  };
  const auto gap = [&](double begin) {
    const double a = begin + tail.knots[last - 1];
    const std::optional<double> b = end_of(a);
    return b ? line_to_elu(alpha, a, *b).left - value_of(begin, last - 1) : -1;
  };
  for (const double begin : roots(gap, highest - piece, -tail.knots[last - 1] - piece / 512)) {
    const std::optional<double> end = end_of(begin + tail.knots[last - 1]);
    if (end && std::abs(gap(begin)) < 1e-9) {  // (otherwise gap only jumps, where ends begin to exist)
      add(begin, *end);
    }
  }
  return found;
}

StepFunction find_elu(double alpha, Criterion criterion, int64_t bits) {
  const bool primitive = criterion == Criterion::primitive;
  if (primitive && bits == 1) {
    return {{-alpha}, {0, 1}};  // where the asymptotes meet
  }
  std::vector<StepFunction> candidates;
  candidates.push_back(shipped_steps("exp", criterion, bits));  // with a boundary at 0
  for (size_t i = 0; i + 1 < candidates[0].levels.size(); ++i) {
    candidates[0].levels[i] *= alpha;
  }
  if (alpha > 0 && primitive) {
    for (StepFunction& steps : free_of_zero(alpha, candidates[0].boundaries.size())) {
      candidates.push_back(std::move(steps));
    }
  } else if (alpha > 0) {
    // Below 0 the derivative is e^(x + log(alpha)), and the optimum up to the last boundary does not depend on how far
    // the exponential extends beyond it.
    StepFunction shifted = shipped_steps("elu", criterion, bits);
    for (double& boundary : shifted.boundaries) {
      boundary -= std::log(alpha);
    }
    if (shifted.boundaries.back() <= 0) {
      candidates.push_back(std::move(shifted));
    }
  }
  return *std::min_element(candidates.begin(), candidates.end(), [&](const StepFunction& a, const StepFunction& b) {
    return elu_error(alpha, a, primitive) < elu_error(alpha, b, primitive);
  });
}

// Softplus --------------------------------------------------------------------------------------------

double softplus(double x) {
  return std::log1p(std::exp(-std::abs(x))) + std::max(x, 0.0);
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

/// The squared error of a step function for Criterion::derivative, with its last boundary at or below the threshold.
double softplus_error(double threshold, const StepFunction& steps) {
  const double first = steps.boundaries.front();
  double error = softplus(first) - sigmoid(first);
  for (size_t i = 0; i < steps.boundaries.size(); ++i) {
    const double a = steps.boundaries[i];
    const double b = i + 1 < steps.boundaries.size() ? steps.boundaries[i + 1] : threshold;
    const double level = steps.levels[i + 1];
    error += (1 - 2 * level) * (softplus(b) - softplus(a)) - (sigmoid(b) - sigmoid(a)) + level * level * (b - a);
  }
  return error;
}

/// The best step function for Criterion::derivative with its last boundary at the threshold: a level is the mean of the
/// derivative between its boundaries, and at a boundary the derivative is the mean of two levels, so the first boundary
/// determines all others.
StepFunction ending_at(double threshold, size_t boundaries) {
  /// Empty if the last boundary would be above the threshold.
  const auto from = [&](double first) -> std::optional<StepFunction> {
    StepFunction steps{{first}, {0}};
    while (steps.boundaries.size() < boundaries) {
      const double a = steps.boundaries.back();
      const double level = 2 * sigmoid(a) - steps.levels.back();
      const auto excess = [&](double b) { return softplus(b) - softplus(a) - level * (b - a); };
      if (excess(threshold) < 0) {
        return std::nullopt;
      }
      // (The excess is 0 at a as well: it falls up to where the derivative equals the level.)
      const double lowest = level < 1 ? std::log(level / (1 - level)) : threshold;
      steps.levels.push_back(level);
      steps.boundaries.push_back(lowest < threshold ? root(excess, lowest, threshold) : threshold);
    }
    steps.levels.push_back(1);
    return steps;
  };
  if (boundaries == 1) {
    return {{threshold}, {0, 1}};
  }
  double low = threshold - 64, high = threshold;
  for (double middle = (low + high) / 2; low < middle && middle < high; middle = (low + high) / 2) {
    (from(middle) ? low : high) = middle;
  }
  StepFunction steps = from(low).value();
  steps.boundaries.back() = threshold;
  return steps;
}

StepFunction find_softplus(double threshold, int64_t bits) {
  if (threshold < -37) {  // up to there the derivative is e^x, to within rounding
    StepFunction steps = shipped_steps("exp", Criterion::derivative, bits);
    for (size_t i = 0; i < steps.boundaries.size(); ++i) {
      steps.boundaries[i] += threshold;
      steps.levels[i] *= std::exp(threshold);
    }
    return steps;
  }
  const StepFunction smooth = shipped_steps("softplus", Criterion::derivative, bits);
  StepFunction ending = ending_at(threshold, smooth.boundaries.size());
  // The optimum up to the last boundary does not depend on where beyond it the derivative becomes 1.
  const bool fits = smooth.boundaries.back() <= threshold;
  return fits && softplus_error(threshold, smooth) <= softplus_error(threshold, ending) ? smooth : ending;
}

}  // namespace

StepFunction shipped_steps(std::string_view function, Criterion criterion, int64_t bits) {
  for (int i = 0; i < step_table_count; ++i) {
    const StepTable& table = step_tables[i];
    if (table.bits == bits && table.function == function && table.criterion == name_of(criterion)) {
      const std::ptrdiff_t levels = std::ptrdiff_t{1} << bits;
      return {{table.boundaries, table.boundaries + levels - 1}, {table.levels, table.levels + levels}};
    }
  }
  TORCH_INTERNAL_ASSERT(false, "no step function of ", bits, " bits for ", function);
}

StepFunction elu_steps(double alpha, Criterion criterion, int64_t bits) {
  if (alpha == 1) {
    return shipped_steps("elu", criterion, bits);
  }
  return find_elu(alpha, criterion, bits);
}

StepFunction softplus_steps(double threshold, Criterion criterion, int64_t bits) {
  // For thresholds of at least 20, torch's default, the jump is below 2^-28.
  if (threshold >= 20 || criterion == Criterion::primitive) {
    return shipped_steps("softplus", criterion, bits);
  }
  return find_softplus(threshold, bits);
}

}  // namespace lomem::detail
