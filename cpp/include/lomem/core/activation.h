// Activation functions, evaluated as torch's CUDA kernels do: the same operations in the same order and type, so that a
// kernel that fuses them with other work returns the same bits. (ATen evaluates 16-bit inputs in float32. Its CPU
// kernels use other formulas, so on the CPU the torch op itself is called.) value_and_slope
// is for gradients: the value may differ from value() in the last bits.
//
// PublishedSteps is the published step function; kernels that compute values and codes in one pass are compiled for it.
#pragma once

#include <lomem/config.h>
#include <lomem/core/step.h>

#include <cmath>

namespace lomem {

/// Value and derivative of an activation.
template <class C>
struct ValueAndSlope {
  C value;
  C slope;
};

/// x * Phi(x), where Phi is the standard normal distribution function.
struct GELU {
  using PublishedSteps = ReGELU2;

  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    constexpr C sqrt_half = C(0.70710678118654752440);
    return x * C(0.5) * (C(1) + std::erf(x * sqrt_half));
  }

  template <class C>
  LOMEM_HOST_DEVICE static ValueAndSlope<C> value_and_slope(C x) {
    constexpr C sqrt_half = C(0.70710678118654752440);
    constexpr C inverse_sqrt_two_pi = C(0.39894228040143267794);
    const C cdf = C(0.5) * (C(1) + std::erf(x * sqrt_half));
    return {x * cdf, cdf + x * (inverse_sqrt_two_pi * std::exp(C(-0.5) * x * x))};
  }
};

/// GELU with tanh instead of erf (approximate="tanh").
struct GELUTanh {
  using PublishedSteps = ReGELU2;

  static constexpr double sqrt_2 = 1.41421356237309504880;
  static constexpr double two_over_sqrt_pi = 1.12837916709551257390;
  static constexpr double beta = sqrt_2 * two_over_sqrt_pi * 0.5;
  static constexpr double kappa = 0.044715;

  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return C(0.5) * x * (C(1) + std::tanh(inner(x)));
  }

  template <class C>
  LOMEM_HOST_DEVICE static ValueAndSlope<C> value_and_slope(C x) {
    const C tanh = std::tanh(inner(x));
    const C factor = C(0.5) * (C(1) + tanh);
    const C inner_slope = C(beta) * (C(1) + C(3) * C(kappa) * x * x);
    // (Where tanh is +-1, that may overflow.)
    const C tanh_slope = C(1) - tanh * tanh;
    return {x * factor, factor + (tanh_slope == C(0) ? C(0) : C(0.5) * x * tanh_slope * inner_slope)};
  }

 private:
  template <class C>
  LOMEM_HOST_DEVICE static C inner(C x) {
    const C cube = x * x * x;
    return C(beta) * (x + C(kappa) * cube);
  }
};

/// x * sigmoid(x).
struct SiLU {
  using PublishedSteps = ReSiLU2;

  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return x / (C(1) + std::exp(-x));
  }

  template <class C>
  LOMEM_HOST_DEVICE static ValueAndSlope<C> value_and_slope(C x) {
    const C sigmoid = C(1) / (C(1) + std::exp(-x));
    return {x * sigmoid, sigmoid * (C(1) + x * (C(1) - sigmoid))};
  }
};

/// max(x, 0).
struct ReLU {
  /// (-0 gives 0, as the GPU's maximum does.)
  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return x <= C(0) ? C(0) : x;
  }

  template <class C>
  LOMEM_HOST_DEVICE static ValueAndSlope<C> value_and_slope(C x) {
    return {value(x), x <= C(0) ? C(0) : C(1)};
  }
};

/// 1 / (1 + e^-x).
struct Sigmoid {
  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return C(1) / (C(1) + std::exp(-x));
  }

  template <class C>
  LOMEM_HOST_DEVICE static ValueAndSlope<C> value_and_slope(C x) {
    const C sigmoid = value(x);
    return {sigmoid, sigmoid * (C(1) - sigmoid)};
  }
};

}  // namespace lomem
