// The activations of gated units, what they are by definition, and where the operands of a unit can be.
#pragma once

#include <lomem/core/gated.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "elements.h"

inline constexpr lomem::GatedActivation gates[] = {
    lomem::GatedActivation::silu, lomem::GatedActivation::gelu, lomem::GatedActivation::gelu_tanh,
    lomem::GatedActivation::relu, lomem::GatedActivation::sigmoid};

/// Value and derivative in double, without cancellation.
inline lomem::ValueAndSlope<double> gate_definition(lomem::GatedActivation activation, double x) {
  const auto logistic = [](double z) { return 1 / (1 + std::exp(-z)); };
  switch (activation) {
    case lomem::GatedActivation::silu: return {x * logistic(x), logistic(x) + x * logistic(x) * logistic(-x)};
    case lomem::GatedActivation::gelu: {
      const double cdf = std::erfc(-x / std::sqrt(2.0)) / 2;
      return {x * cdf, cdf + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0))};
    }
    case lomem::GatedActivation::gelu_tanh: {
      // (1 + tanh(u)) / 2 is the logistic function at 2 u.
      const double factor = 2 * std::sqrt(2 / std::acos(-1.0));
      const double s = logistic(factor * (x + 0.044715 * x * x * x));
      const double t = logistic(-factor * (x + 0.044715 * x * x * x));
      return {x * s, s + x * s * t * factor * (1 + 3 * 0.044715 * x * x)};
    }
    case lomem::GatedActivation::relu: return {std::max(x, 0.0), x > 0 ? 1.0 : 0.0};
    default: return {logistic(x), logistic(x) * logistic(-x)};
  }
}

/// Where the operands are, and of the same form the gradients: two contiguous arrays, halves of the rows of one, or
/// pairs.
enum class Operands { apart, halves, pairs };

inline constexpr Operands all_operands[] = {Operands::apart, Operands::halves, Operands::pairs};

/// Index of an operand (0: gate, 1: up) of element `col` of row `row` in an array that holds both; arrays apart are one
/// after the other.
inline std::int64_t operand_index(
    Operands form, int which, std::int64_t row, std::int64_t col, std::int64_t rows, std::int64_t cols) {
  switch (form) {
    case Operands::apart: return (which * rows + row) * cols + col;
    case Operands::halves: return row * 2 * cols + which * cols + col;
    default: return 2 * (row * cols + col) + which;
  }
}

/// The arguments of a kernel for an array that holds both operands.
template <class T>
lomem::GatedOperands operands_in(
    Operands form, lomem::GatedActivation activation, const T* both, std::int64_t rows, std::int64_t cols) {
  lomem::GatedOperands operands;
  operands.activation = activation;
  operands.dtype = Element<T>::dtype;
  operands.rows = rows;
  operands.cols = cols;
  operands.gate = both;
  operands.up = both + operand_index(form, 1, 0, 0, rows, cols);
  operands.gate_stride = operands.up_stride = form == Operands::apart ? cols : 2 * cols;
  operands.interleaved = form == Operands::pairs;
  return operands;
}

/// The same for gradients.
template <class T>
lomem::GatedGradients gradients_in(Operands form, T* both, std::int64_t rows, std::int64_t cols, T* output) {
  lomem::GatedGradients gradients;
  gradients.gate = both;
  gradients.up = both + operand_index(form, 1, 0, 0, rows, cols);
  gradients.stride = form == Operands::apart ? cols : 2 * cols;
  gradients.output = output;
  return gradients;
}

/// Gradients by definition, and how far from them results of type T may be: one rounding, and a few of the arithmetic,
/// whose terms are as large as the gate.
struct ExpectedGradient {
  double of_gate;
  double of_up;
  double gate_tolerance;
  double up_tolerance;
};

template <class T>
ExpectedGradient expected_gradient(lomem::GatedActivation activation, double grad, double gate, double up) {
  const auto [value, slope] = gate_definition(activation, gate);
  const double arithmetic = 8 * (sizeof(T) == sizeof(double) ? spacing<double>() : spacing<float>());
  const double smallest = sizeof(T) == 2 ? std::ldexp(1, -24) : 0;
  ExpectedGradient expected{grad * up * slope, grad * value, 0, 0};
  expected.gate_tolerance = spacing<T>() * std::fabs(expected.of_gate) + arithmetic * std::fabs(grad * up) + smallest;
  expected.up_tolerance =
      spacing<T>() * std::fabs(expected.of_up) + arithmetic * std::fabs(grad) * (1 + std::fabs(gate)) + smallest;
  return expected;
}

/// The same for the result of the unit, in which the activation is rounded first.
template <class T>
std::pair<double, double> expected_result(lomem::GatedActivation activation, double gate, double up) {
  const double value = gate_definition(activation, gate).value;
  const double arithmetic = 8 * (sizeof(T) == sizeof(double) ? spacing<double>() : spacing<float>());
  const double smallest = sizeof(T) == 2 ? std::ldexp(1, -23) : 0;
  return {
      value * up, 2 * spacing<T>() * std::fabs(value * up) + arithmetic * (1 + std::fabs(gate)) * std::fabs(up) +
                      smallest * (1 + std::fabs(up))};
}

template <class T>
struct GateGradients {
  std::vector<T> of_gate;
  std::vector<T> of_up;
};

/// By the formulas that the CPU kernels use, one element after another.
template <class T>
GateGradients<T> gradients_by_formulas(
    lomem::GatedActivation activation, const std::vector<T>& grad, const std::vector<T>& gate,
    const std::vector<T>& up) {
  using C = lomem::compute_t<T>;
  GateGradients<T> result;
  lomem::visit_gated(activation, [&](auto function) {
    using Function = typename decltype(function)::type;
    for (std::size_t i = 0; i < grad.size(); ++i) {
      const C x = lomem::to_compute(gate[i]);
      const C g = lomem::to_compute(grad[i]);
      lomem::ValueAndSlope<C> at;
      if constexpr (sizeof(C) == sizeof(float)) {
        at = lomem::value_and_slope<Function, lomem::PolynomialMath<T, float, std::uint32_t>>(x);
      } else {
        at = lomem::value_and_slope<Function, lomem::LibraryMath<double>>(x);
      }
      const C product = g * lomem::to_compute(up[i]);
      result.of_gate.push_back(lomem::from_compute<T>(lomem::gate_gradient<Function>(product, at.slope)));
      result.of_up.push_back(lomem::from_compute<T>(g * at.value));
    }
  });
  return result;
}
