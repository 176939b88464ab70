// Activation functions, evaluated as torch's CUDA kernels do: the same operations in the same order and type, so that a
// kernel that fuses them with other work returns the same bits. (ATen evaluates 16-bit inputs in float32. Its CPU
// kernels use other formulas, so on the CPU the torch op itself is called.)
//
// PublishedSteps is the published step function; kernels that compute values and codes in one pass are compiled for it.
#pragma once

#include <lomem/config.h>
#include <lomem/core/step.h>

#include <cmath>

namespace lomem {

/// x * Phi(x), where Phi is the standard normal distribution function.
struct GELU {
  using PublishedSteps = ReGELU2;

  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    constexpr C sqrt_half = C(0.70710678118654752440);
    return x * C(0.5) * (C(1) + std::erf(x * sqrt_half));
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
    const C cube = x * x * x;
    const C inner = C(beta) * (x + C(kappa) * cube);
    return C(0.5) * x * (C(1) + std::tanh(inner));
  }
};

/// x * sigmoid(x).
struct SiLU {
  using PublishedSteps = ReSiLU2;

  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return x / (C(1) + std::exp(-x));
  }
};

/// max(x, 0).
struct ReLU {
  /// (-0 gives 0, as the GPU's maximum does.)
  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return x <= C(0) ? C(0) : x;
  }
};

/// 1 / (1 + e^-x).
struct Sigmoid {
  template <class C>
  LOMEM_HOST_DEVICE static C value(C x) {
    return C(1) / (C(1) + std::exp(-x));
  }
};

}  // namespace lomem
