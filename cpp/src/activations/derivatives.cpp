#include "derivatives.h"

#include <cmath>

namespace lomem::detail {
namespace {

// Reaches: where the derivative is nearer than 4e-7 to its limit; mish's on the left than 4e-6, because there its poles
// are so near to the line that pieces must be shorter.
constexpr double gelu_reach = 6;
constexpr double sigmoid_reach = 16;
constexpr double silu_reach = 18;
constexpr double tanh_reach = 8.5;
constexpr double mish_left_reach = 15.2;
constexpr double mish_right_reach = 9.5;

double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}

double square(double x) {
  return x * x;
}

}  // namespace

Derivative gelu_derivative() {
  return {
      .at =
          [](double x) {
            constexpr double sqrt_half = 0.70710678118654752440;
            constexpr double inverse_sqrt_2pi = 0.39894228040143267794;
            return 0.5 * std::erfc(-x * sqrt_half) + x * inverse_sqrt_2pi * std::exp(-0.5 * x * x);
          },
      .left = {gelu_reach, 0},
      .right = {gelu_reach, 1}};
}

Derivative gelu_tanh_derivative() {
  return {
      .at =
          [](double x) {
            constexpr double beta = 0.79788456080286535588;  // sqrt(2 / pi)
            constexpr double kappa = 0.044715;
            const double t = std::tanh(beta * (x + kappa * x * x * x));
            return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * beta * (1 + 3 * kappa * x * x);
          },
      .left = {gelu_reach, 0},
      .right = {gelu_reach, 1}};
}

Derivative silu_derivative(double scale) {
  return {
      .at =
          [scale](double x) {
            const double s = logistic(scale * x);
            return s * (1 + scale * x * (1 - s));
          },
      .left = {silu_reach / scale, 0},
      .right = {silu_reach / scale, 1}};
}

Derivative mish_derivative() {
  return {
      .at =
          [](double x) {
            const double t = std::tanh(std::log1p(std::exp(x)));
            return t + x * (1 - t * t) * logistic(x);
          },
      .left = {mish_left_reach, 0},
      .right = {mish_right_reach, 1}};
}

Derivative sigmoid_derivative() {
  return {
      .at = [](double x) { return logistic(x) * logistic(-x); },
      .left = {sigmoid_reach, 0},
      .right = {sigmoid_reach, 0}};
}

Derivative tanh_derivative() {
  return {.at = [](double x) { return square(1 / std::cosh(x)); }, .left = {tanh_reach, 0}, .right = {tanh_reach, 0}};
}

Derivative tanhshrink_derivative() {
  return {.at = [](double x) { return square(std::tanh(x)); }, .left = {tanh_reach, 1}, .right = {tanh_reach, 1}};
}

Derivative logistic_derivative(double slope, double end) {
  Derivative derivative{
      .at = [slope](double x) { return logistic(slope * x); },
      .left = {sigmoid_reach / slope, 0},
      .right = {sigmoid_reach / slope, 1}};
  // Beyond it is 1: a jump, of which less than 4e-7 is left far out.
  constexpr double far = 15;
  if (end < far) {
    derivative.origin = end / slope;
    derivative.left.reach = end > -far ? (far + end) / slope : 0;
    derivative.right.reach = 0;
  }
  return derivative;
}

Derivative softsign_derivative() {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return {
      .at = [](double x) { return square(1 / (1 + std::abs(x))); },
      .left = {infinity, 0},
      .right = {infinity, 0},
      .slow = true};
}

Derivative logsigmoid_derivative() {
  return {.at = [](double x) { return logistic(-x); }, .left = {sigmoid_reach, 1}, .right = {sigmoid_reach, 0}};
}

Derivative exponential_derivative(double alpha, double width, double scale) {
  const double slope = scale * alpha / width;
  return {
      .at = [slope, width](double x) { return slope * std::exp(x / width); },
      .left = {sigmoid_reach * width, 0},
      .right = {0, scale}};
}

Derivative hardswish_derivative() {
  return {.at = [](double x) { return x / 3 + 0.5; }, .left = {3, 0}, .right = {3, 1}};
}

}  // namespace lomem::detail
