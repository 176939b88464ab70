// Derivatives of the smooth activations, from which the tables of drawn codes are made (core/drawn.h).
#pragma once

#include <functional>
#include <limits>

namespace lomem::detail {

/// A derivative that is smooth on either side of an origin, and constant far from it.
struct Derivative {
  /// One side of the origin.
  struct Side {
    /// Distance from the origin from which on the derivative is `beyond`. 0 if it is nowhere anything else.
    double reach;
    double beyond;
  };

  /// The derivative within reach.
  std::function<double(double)> at;
  /// x <= origin, within less than reach.
  Side left;
  /// x > origin.
  Side right;
  double origin = 0;
  /// Whether it falls so slowly that pieces of equal width would not do. Then reach is infinite.
  bool slow = false;
};

Derivative gelu_derivative();
Derivative gelu_tanh_derivative();
/// Of silu(scale * x) / scale.
Derivative silu_derivative(double scale);
Derivative mish_derivative();
Derivative sigmoid_derivative();
Derivative tanh_derivative();
Derivative tanhshrink_derivative();
/// Of log(1 + e^(slope * x)) / slope, and x where slope * x is above `end`.
Derivative logistic_derivative(double slope, double end);
Derivative softsign_derivative();
Derivative logsigmoid_derivative();
/// Of scale * x for positive x and scale * alpha * (e^(x / width) - 1) elsewhere.
Derivative exponential_derivative(double alpha, double width, double scale);
Derivative hardswish_derivative();

}  // namespace lomem::detail
