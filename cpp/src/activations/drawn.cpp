#include "drawn.h"

#include <lomem/cpu/kernels.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <tuple>

#include "../cpu/subnormals.h"
#include "cache.h"

namespace lomem::detail {
namespace {

constexpr int coefficient_count = DrawnTable::degree + 1;
using Polynomial = std::array<double, coefficient_count>;

/// The polynomial of v that interpolates f(v) at the Chebyshev nodes of [0, 1], which is nearly the best.
template <class Function>
Polynomial interpolate(const Function& f) {
  std::array<double, coefficient_count> nodes{};
  std::array<double, coefficient_count> differences{};
  for (int i = 0; i < coefficient_count; ++i) {
    nodes[i] = 0.5 - 0.5 * std::cos(std::numbers::pi * (i + 0.5) / coefficient_count);
    differences[i] = f(nodes[i]);
  }
  for (int order = 1; order < coefficient_count; ++order) {
    for (int i = coefficient_count - 1; i >= order; --i) {
      differences[i] = (differences[i] - differences[i - 1]) / (nodes[i] - nodes[i - order]);
    }
  }
  // Newton's form, expanded from the inside out.
  Polynomial result{};
  for (int i = coefficient_count - 1; i >= 0; --i) {
    for (int k = coefficient_count - 1; k > 0; --k) {
      result[k] = result[k - 1] - nodes[i] * result[k];
    }
    result[0] = differences[i] - nodes[i] * result[0];
  }
  return result;
}

/// The sides of a table, as the derivative's pieces lie in memory: x <= origin first.
struct Pieces {
  const Derivative& derivative;

  const Derivative::Side& side(int i) const {
    return i == 0 ? derivative.left : derivative.right;
  }
  /// Where pieces end, as a distance or, of a slow derivative, as m / (1 + m).
  double bound(int i) const {
    return derivative.slow ? 1 : side(i).reach;
  }
  /// x at v of a piece.
  double x(int i, int piece, double v) const {
    const double m = bound(i) * (piece + v) / DrawnTable::side_pieces;
    const double distance = derivative.slow ? m / (1 - m) : m;
    return derivative.origin + (i == 0 ? -distance : distance);
  }
  double value(int i, int piece, double v) const {
    return derivative.slow && piece + v == DrawnTable::side_pieces ? side(i).beyond : derivative.at(x(i, piece, v));
  }
};

/// Calls visit(h'(x)) for x so close to each other that extrema are found to about 2e-7 of the range.
template <class Visit>
void visit_values(const Pieces& pieces, const Visit& visit) {
  constexpr int samples = 1024;
  for (int i = 0; i < 2; ++i) {
    visit(pieces.side(i).beyond);
    if (pieces.bound(i) > 0) {
      for (int piece = 0; piece < DrawnTable::side_pieces; ++piece) {
        for (int sample = 0; sample <= samples; ++sample) {
          visit(pieces.value(i, piece, static_cast<double>(sample) / samples));
        }
      }
    }
  }
}

}  // namespace

DrawnFunction::DrawnFunction(const Derivative& derivative)
    : low_(derivative.right.beyond), high_(derivative.right.beyond) {
  const Pieces pieces{derivative};
  visit_values(pieces, [&](double value) {
    low_ = std::min(low_, value);
    high_ = std::max(high_, value);
  });
  const double range = high_ - low_;
  const auto scaled = [&](double value) { return range > 0 ? (value - low_) / range : 0; };

  table_.origin = static_cast<float>(derivative.origin);
  table_.rational = derivative.slow;
  for (int i = 0; i < 2; ++i) {
    const double bound = pieces.bound(i);
    table_.sides[i] = {
        static_cast<float>(bound), static_cast<float>(bound > 0 ? DrawnTable::side_pieces / bound : 0),
        static_cast<float>(scaled(pieces.side(i).beyond))};
    if (bound == 0) {
      continue;
    }
    for (int piece = 0; piece < DrawnTable::side_pieces; ++piece) {
      const Polynomial polynomial = interpolate([&](double v) { return scaled(pieces.value(i, piece, v)); });
      for (int k = 0; k < coefficient_count; ++k) {
        table_.coefficients[k][i * DrawnTable::side_pieces + piece] = static_cast<float>(polynomial[k]);
      }
    }
  }
}

const uint32_t* DrawnFunction::targets(DType dtype, int64_t bits) const {
  if (element_size(dtype) != 2) {
    return nullptr;
  }
  Targets& targets = targets_[dtype == DType::float16 ? 1 : 0][bits - 1];
  std::call_once(targets.once, [&] {
    const SubnormalsScope as_they_are(Subnormals::kept());
    targets.values = std::make_unique<uint32_t[]>(drawn_target_count);
    cpu::drawn_targets(dtype, table_, static_cast<int>(bits), targets.values.get());
  });
  return targets.values.get();
}

std::shared_ptr<const DrawnFunction> resolve_drawn(const Activation& activation, Doubles parameters) {
  using Key = std::tuple<const Activation*, double, double>;
  static Cache<Key, DrawnFunction, 32> cache;
  const Key key{&activation, parameters.empty() ? 0 : parameters[0], parameters.size() < 2 ? 0 : parameters[1]};
  return cache.get(key, [&] { return DrawnFunction(activation.derivative(parameters)); });
}

DrawnTable drawn_table(const char* op, std::string_view function, Doubles parameters) {
  return resolve_drawn(find_activation(op, function, parameters), parameters)->table();
}

}  // namespace lomem::detail
