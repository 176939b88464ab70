// Gated units: activation(gate) * up. Names, and the gradients: formulas for vectors of floats on a CPU, which need no
// library function. (For doubles, and on a GPU, core/activation.h has formulas.)
#pragma once

#include <lomem/config.h>
#include <lomem/core/activation.h>
#include <lomem/core/dtype.h>

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

/// Value and derivative in float32, without library functions: V is float, or a vector of floats of GCC's or Clang's
/// vector extensions, and Words the same of std::uint32_t. Additions, multiplications and divisions alone, in a fixed
/// order, so that every vector length gives the same bits. The errors are a few units in the last place of the largest
/// term; so are those of exp, and the results are finite where the exact ones are.
template <class Function, class V, class Words>
struct ByPolynomials {
  LOMEM_HOST_DEVICE static ValueAndSlope<V> at(V x) {
    if constexpr (std::is_same_v<Function, SiLU>) {
      const Logistic logistic = logistic_of(x);
      return {x * logistic.value, logistic.value * (1.0f + x * logistic.rest)};
    } else if constexpr (std::is_same_v<Function, GELU>) {
      constexpr float inverse_sqrt_two_pi = 0.398942280f;
      const V density = exp_of_negative(x * x * 0.5f);
      const V tail = density * tail_ratio(magnitude(x));
      const V cdf = x >= V{} ? 1.0f - tail : tail;
      return {x * cdf, cdf + x * (density * inverse_sqrt_two_pi)};
    } else if constexpr (std::is_same_v<Function, GELUTanh>) {
      // (1 + tanh(z)) / 2 is the logistic function at 2 z.
      constexpr auto linear = static_cast<float>(2 * GELUTanh::beta);
      constexpr auto cubic = static_cast<float>(2 * GELUTanh::beta * GELUTanh::kappa);
      const Logistic logistic = logistic_of(x * (linear + cubic * (x * x)));
      // (Where x is greater, logistic.rest or logistic.value is 0, but the square may overflow.)
      const V bounded = magnitude(x) > V{} + 20.0f ? V{} + 20.0f : x;
      const V slope = linear + 3.0f * cubic * (bounded * bounded);
      return {x * logistic.value, logistic.value + x * (logistic.value * logistic.rest) * slope};
    } else if constexpr (std::is_same_v<Function, ReLU>) {
      return {x <= V{} ? V{} : x, x <= V{} ? V{} : V{} + 1.0f};
    } else {
      static_assert(std::is_same_v<Function, Sigmoid>);
      const Logistic logistic = logistic_of(x);
      return {logistic.value, logistic.value * logistic.rest};
    }
  }

  /// e^-u for u >= 0: 0 where the result is not a normal number.
  LOMEM_HOST_DEVICE static V exp_of_negative(V u) {
    // -u = k log(2) + r. Adding `rounder` leaves k in the low bits of the sum. The first part of log(2) has few bits, so
    // that its product with k is exact.
    constexpr float rounder = 0x1.8p23f;
    constexpr float log2_e = 1.44269504f;
    constexpr float log_2_high = 0.693359375f;
    constexpr float log_2_low = -2.12194440e-4f;
    const V sum = u * -log2_e + rounder;
    const V k = sum - rounder;
    const V r = (-u - k * log_2_high) - k * log_2_low;
    // The coefficients are those of Cephes (Moshier, 1989).
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Words scale = (__builtin_bit_cast(Words, sum) << 23) + 0x3f800000u;  // 2^k
    return u > V{} + 87.0f ? V{} : p * __builtin_bit_cast(V, scale);
  }

 private:
  /// 1 / (1 + e^-z) and 1 - value, each with a small relative error.
  struct Logistic {
    V value;
    V rest;
  };

  LOMEM_HOST_DEVICE static Logistic logistic_of(V z) {
    const V e = exp_of_negative(magnitude(z));
    const V large = 1.0f / (1.0f + e);
    const V small = e * large;
    return {z >= V{} ? large : small, z >= V{} ? small : large};
  }

  LOMEM_HOST_DEVICE static V magnitude(V x) {
    return __builtin_bit_cast(V, __builtin_bit_cast(Words, x) & 0x7fffffffu);
  }

  /// Phi(-a) e^(a^2 / 2) for 0 <= a <= 14, where Phi is the standard normal distribution function: a polynomial in
  /// t = 1 / (1 + 0.35 a), fitted to a relative error of 3.2e-8. It tends to 0 beyond.
  LOMEM_HOST_DEVICE static V tail_ratio(V a) {
    const V t = 1.0f / (1.0f + 0.35f * a);
    V p = t * -0.02914613f + 0.14397268f;
    p = p * t - 0.25571628f;
    p = p * t + 0.15917643f;
    p = p * t - 0.02311138f;
    p = p * t + 0.10550864f;
    p = p * t + 0.11983271f;
    p = p * t + 0.13986189f;
    p = p * t + 0.13962140f;
    return p * t;
  }
};

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
