// Gated units: activation(gate) * up. Names, and values and derivatives of the activations for gradients: by functions
// of the library, or for vectors of floats on a CPU.
#pragma once

#include <lomem/config.h>
#include <lomem/core/activation.h>
#include <lomem/core/dtype.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

namespace lomem {

/// The activation of the gate.
enum class GatedActivation : std::uint8_t { silu, gelu, gelu_tanh, relu, sigmoid };

/// Where gate and up are in the last dimension of one tensor that holds both.
enum class GatedLayout : std::uint8_t {
  gate_up,      ///< First gate, then up.
  up_gate,      ///< First up, then gate.
  interleaved,  ///< Gate at even places, up at odd ones.
};

/// The activation called `name`, if there is one.
constexpr std::optional<GatedActivation> gated_activation(std::string_view name) {
  return name == "silu"        ? std::optional(GatedActivation::silu)
         : name == "gelu"      ? std::optional(GatedActivation::gelu)
         : name == "gelu_tanh" ? std::optional(GatedActivation::gelu_tanh)
         : name == "relu"      ? std::optional(GatedActivation::relu)
         : name == "sigmoid"   ? std::optional(GatedActivation::sigmoid)
                               : std::nullopt;
}

/// The layout called `name`, if there is one.
constexpr std::optional<GatedLayout> gated_layout(std::string_view name) {
  return name == "gate_up"       ? std::optional(GatedLayout::gate_up)
         : name == "up_gate"     ? std::optional(GatedLayout::up_gate)
         : name == "interleaved" ? std::optional(GatedLayout::interleaved)
                                 : std::nullopt;
}

/// The gradient of the gate. `product` is grad_output * up. A derivative of ReLU is 0 or 1: where it is 0, so is the
/// gradient, whatever the product is.
template <class Function, class V>
LOMEM_HOST_DEVICE inline V gate_gradient(V product, V slope) {
  if constexpr (std::is_same_v<Function, ReLU>) {
    return slope == V{} ? V{} : product;
  } else {
    return product * slope;
  }
}

/// Value and derivative of an activation, for gradients: the value may differ from Function::value in the last bits.
template <class V>
struct ValueAndSlope {
  V value;
  V slope;
};

/// Functions of the library, for float and double.
template <class C>
struct LibraryMath {
  using Scalar = C;

  LOMEM_HOST_DEVICE static C magnitude(C x) {
    return std::fabs(x);
  }
  /// e^-u for u >= 0.
  LOMEM_HOST_DEVICE static C exp_of_negative(C u) {
    return std::exp(-u);
  }
  /// The standard normal distribution function. `density` is e^(-x^2 / 2).
  LOMEM_HOST_DEVICE static C normal_cdf(C x, C /*density*/) {
    constexpr C sqrt_half = C(0.70710678118654752440);
    return C(0.5) * (C(1) + std::erf(x * sqrt_half));
  }
};

/// a * b + c for one float, rounded once.
struct FusedFloat {
  LOMEM_HOST_DEVICE static float multiply_add(float a, float b, float c) {
    return std::fma(a, b, c);
  }
};

/// The same in float32 without functions of exponentials: V is float, or a vector of floats of GCC's or Clang's vector
/// extensions, and Words the same of std::uint32_t. Elementary operations in a fixed order, so that every vector length
/// gives the same bits.
///
/// For results of type T: where they are rounded to 16 bits, a relative error of 1e-5 is a fiftieth of the rounding.
/// Fewer terms do, by fused multiply-adds (`Fused`, as FusedFloat for V).
template <class T, class V, class Words, class Fused = FusedFloat>
struct PolynomialMath {
  using Scalar = float;
  static constexpr bool short_results = sizeof(T) == 2;

  /// a * b + c. The last two may be constants.
  template <class B, class C>
  LOMEM_HOST_DEVICE static V multiply_add(V a, B b, C c) {
    if constexpr (short_results) {
      return Fused::multiply_add(a, vector(b), vector(c));
    } else {
      return a * b + c;
    }
  }
  template <class X>
  LOMEM_HOST_DEVICE static V vector(X x) {
    if constexpr (std::is_same_v<X, V>) {
      return x;
    } else {
      return V{} + x;
    }
  }

  LOMEM_HOST_DEVICE static V magnitude(V x) {
    return __builtin_bit_cast(V, __builtin_bit_cast(Words, x) & 0x7fffffffu);
  }

  /// e^-u for u >= 0, to one unit in the last place; 0 where that is not a normal number.
  LOMEM_HOST_DEVICE static V exp_of_negative(V u) {
    // -u = k log(2) + r. Adding `rounder` leaves k in the low bits of the sum.
    constexpr float rounder = 0x1.8p23f;
    constexpr float log2_e = 1.44269504f;
    const V sum = multiply_add(u, -log2_e, rounder);
    const V k = sum - rounder;
    const Words shifted = __builtin_bit_cast(Words, sum) << 23;
    V result;
    if constexpr (short_results) {
      // 2^f, where f = r / log(2), fitted to a relative error of 2.6e-6.
      const V f = multiply_add(u, -log2_e, -k);
      V p = multiply_add(f, 9.5700691e-3f, 5.5917794e-2f);
      p = multiply_add(p, f, 2.4024745e-1f);
      p = multiply_add(p, f, 6.9312182e-1f);
      p = multiply_add(p, f, 9.9999926e-1f);
      result = __builtin_bit_cast(V, __builtin_bit_cast(Words, p) + shifted);  // adds k to the exponent
    } else {
      // The first part of log(2) has few bits, so that its product with k is exact. The coefficients are those of
      // Cephes (Moshier, 1989).
      constexpr float log_2_high = 0.693359375f;
      constexpr float log_2_low = -2.12194440e-4f;
      const V r = (-u - k * log_2_high) - k * log_2_low;
      V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
      p = p * r + 8.3334519073e-3f;
      p = p * r + 4.1665795894e-2f;
      p = p * r + 1.6666665459e-1f;
      p = p * r + 5.0000001201e-1f;
      p = p * (r * r) + r + 1.0f;
      result = p * __builtin_bit_cast(V, shifted + 0x3f800000u);  // (a NaN stays one)
    }
    return u > V{} + 87.0f ? V{} : result;
  }

  /// Phi(-a) e^(a^2 / 2) is a polynomial in t = 1 / (1 + c a) for 0 <= a <= 14, fitted to a relative error of 4.6e-6 or
  /// 3.2e-8; beyond, the density is 0.
  LOMEM_HOST_DEVICE static V normal_cdf(V x, V density) {
    constexpr float c = short_results ? 0.31f : 0.35f;
    const V t = 1.0f / multiply_add(magnitude(x), c, 1.0f);
    V p;
    if constexpr (short_results) {
      p = multiply_add(t, -0.07392936f, 0.18045098f);
      p = multiply_add(p, t, 0.01574401f);
      p = multiply_add(p, t, 0.13343013f);
      p = multiply_add(p, t, 0.12044120f);
      p = multiply_add(p, t, 0.12386071f);
    } else {
      p = t * -0.02914613f + 0.14397268f;
      p = p * t - 0.25571628f;
      p = p * t + 0.15917643f;
      p = p * t - 0.02311138f;
      p = p * t + 0.10550864f;
      p = p * t + 0.11983271f;
      p = p * t + 0.13986189f;
      p = p * t + 0.13962140f;
    }
    const V tail = density * (p * t);
    return x >= V{} ? 1.0f - tail : tail;
  }
};

namespace detail {

/// 1 / (1 + e^-z) and 1 - value, each with a small relative error.
template <class V>
struct Logistic {
  V value;
  V rest;
};

template <class Math, class V>
LOMEM_HOST_DEVICE inline Logistic<V> logistic(V z) {
  constexpr auto one = typename Math::Scalar(1);
  const V e = Math::exp_of_negative(Math::magnitude(z));
  const V large = one / (one + e);
  const V small = e * large;
  return {z >= V{} ? large : small, z >= V{} ? small : large};
}

}  // namespace detail

/// Value and derivative of `Function`, with errors of a few units in the last place of the largest term. Finite where
/// torch's are.
template <class Function, class Math, class V>
LOMEM_HOST_DEVICE inline ValueAndSlope<V> value_and_slope(V x) {
  using Scalar = typename Math::Scalar;
  constexpr auto one = Scalar(1);
  if constexpr (std::is_same_v<Function, SiLU>) {
    const auto [factor, rest] = detail::logistic<Math>(x);
    const V value = x * factor;
    return {value, factor + value * rest};
  } else if constexpr (std::is_same_v<Function, GELU>) {
    constexpr auto inverse_sqrt_two_pi = Scalar(0.39894228040143267794);
    const V density = Math::exp_of_negative(x * x * Scalar(0.5));
    const V cdf = Math::normal_cdf(x, density);
    return {x * cdf, cdf + x * (density * inverse_sqrt_two_pi)};
  } else if constexpr (std::is_same_v<Function, GELUTanh>) {
    // (1 + tanh(z)) / 2 is the logistic function at 2 z.
    constexpr auto linear = Scalar(2 * GELUTanh::beta);
    constexpr auto cubic = Scalar(2 * GELUTanh::beta * GELUTanh::kappa);
    const auto [factor, rest] = detail::logistic<Math>(x * (linear + cubic * (x * x)));
    const V value = x * factor;
    // (Where x is greater, factor or rest is 0, but the square may overflow.)
    const V bounded = Math::magnitude(x) > V{} + Scalar(20) ? V{} + Scalar(20) : x;
    return {value, factor + value * rest * (linear + Scalar(3) * cubic * (bounded * bounded))};
  } else if constexpr (std::is_same_v<Function, ReLU>) {
    return {x <= V{} ? V{} : x, x <= V{} ? V{} : V{} + one};
  } else {
    static_assert(std::is_same_v<Function, Sigmoid>);
    const auto [value, rest] = detail::logistic<Math>(x);
    return {value, value * rest};
  }
}

/// The operands of a gated unit: rows * cols elements each. In row-major order within a row; rows are some elements
/// apart.
struct GatedOperands {
  GatedActivation activation = GatedActivation::silu;
  DType dtype = DType::float32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const void* gate = nullptr;
  const void* up = nullptr;
  std::int64_t gate_stride = 0;
  std::int64_t up_stride = 0;
  /// If so, `gate` holds pairs of gate and up, and `up` is not read.
  bool interleaved = false;
};

/// Where the gradients of the operands go, each of which may be null, in rows that are `stride` elements apart; and the
/// result of the unit, contiguous, if not null. If the operands are interleaved, so are their gradients, in `gate`.
struct GatedGradients {
  void* gate = nullptr;
  void* up = nullptr;
  std::int64_t stride = 0;
  void* output = nullptr;
};

/// Calls visitor(Type<SiLU>{}) or similar. Host only.
template <class Visitor>
constexpr decltype(auto) visit_gated(GatedActivation activation, Visitor&& visitor) {
  switch (activation) {
    case GatedActivation::silu: return visitor(Type<SiLU>{});
    case GatedActivation::gelu: return visitor(Type<GELU>{});
    case GatedActivation::gelu_tanh: return visitor(Type<GELUTanh>{});
    case GatedActivation::relu: return visitor(Type<ReLU>{});
    default: return visitor(Type<Sigmoid>{});
  }
}

}  // namespace lomem
