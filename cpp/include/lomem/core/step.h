// Step functions: few-bit derivatives of activation functions (Approx-BP).
//
// The derivative of an activation h is replaced by that of h~(x) = sum_i a_i max(x - c_i, 0), a step function with 2^k
// levels. For each element, the backward pass needs only
//     code(x) = #{i : x > c_i}                 (k bits; ties count as not greater, NaN has code 0)
// and computes grad_input = grad_output * level[code], with level[j] = a_1 + ... + a_j.
//
// Source: Yang et al., "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation", ICML
// 2024, arXiv:2406.16282. The constants minimize the integral of (h - h~)^2 over the real line under sum a_i = 1 and
// sum a_i c_i = 0 (to within 1e-4 of its value; the tests check this).
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>
#include <lomem/core/packing.h>

#include <cstdint>

namespace lomem {

/// A step function with three boundaries and four levels, at two bits per element.
///
/// `Constants` has the double members c1 < c2 < c3 and a1, a2, a3. (Scalars instead of arrays: a constexpr array member
/// indexed at run time has no definition in device code.)
template <class Constants>
struct TwoBitStep {
  static constexpr int bits = 2;
  static constexpr int levels = 4;

  /// Number of boundaries below x. float64 is compared with the boundaries as given, the other dtypes with the
  /// boundaries rounded to float32; 16-bit inputs are upcast exactly.
  template <class T>
  LOMEM_HOST_DEVICE static constexpr std::uint8_t code(T x) {
    using C = compute_t<T>;
    const C value = to_compute(x);
    return static_cast<std::uint8_t>(
        (value > static_cast<C>(Constants::c1)) + (value > static_cast<C>(Constants::c2)) +
        (value > static_cast<C>(Constants::c3)));
  }

  /// Boundary i = 0..2.
  LOMEM_HOST_DEVICE static constexpr double boundary(int i) {
    return i == 0 ? Constants::c1 : i == 1 ? Constants::c2 : Constants::c3;
  }

  /// Derivative of step `code` (0..3), summed in double.
  LOMEM_HOST_DEVICE static constexpr double level(int code) {
    return (code > 0 ? Constants::a1 : 0.0) + (code > 1 ? Constants::a2 : 0.0) + (code > 2 ? Constants::a3 : 0.0);
  }

  /// h~(x), the sum of ReLUs whose derivative is the step function.
  LOMEM_HOST_DEVICE static constexpr double primitive(double x) {
    return Constants::a1 * relu(x - Constants::c1) + Constants::a2 * relu(x - Constants::c2) +
           Constants::a3 * relu(x - Constants::c3);
  }

 private:
  LOMEM_HOST_DEVICE static constexpr double relu(double x) {
    return x > 0.0 ? x : 0.0;
  }

  static constexpr double moment =
      Constants::a1 * Constants::c1 + Constants::a2 * Constants::c2 + Constants::a3 * Constants::c3;
  static_assert(Constants::c1 < Constants::c2 && Constants::c2 < Constants::c3, "boundaries ascend");
  static_assert(Constants::a1 + Constants::a2 + Constants::a3 == 1.0, "h~ has slope 1 at +infinity");
  static_assert(-1e-6 < moment && moment < 1e-6, "h~(x) - x vanishes at +infinity");
};

/// Optimal three-ReLU approximation of GELU (arXiv:2406.16282, ReGELU2).
struct ReGELU2Constants {
  static constexpr double c1 = -3.1858810036855245;
  static constexpr double c2 = -0.001178821281161997;
  static constexpr double c3 = 3.190832613414926;
  static constexpr double a1 = -0.04922261145617846;
  static constexpr double a2 = 1.0979632065417297;
  static constexpr double a3 = -0.048740595085551286;
};

/// Optimal three-ReLU approximation of SiLU (arXiv:2406.16282, ReSiLU2).
struct ReSiLU2Constants {
  static constexpr double c1 = -6.3050461001646445;
  static constexpr double c2 = -0.0008684942046214787;
  static constexpr double c3 = 6.325815242089708;
  static constexpr double a1 = -0.04060357190528599;
  static constexpr double a2 = 1.080925428529668;
  static constexpr double a3 = 1.0 - (a1 + a2);
};

using ReGELU2 = TwoBitStep<ReGELU2Constants>;
using ReSiLU2 = TwoBitStep<ReSiLU2Constants>;

/// Code of x among boundaries known at run time: #{i : x > boundaries[i]}, found in `bits` branchless comparisons.
/// There are 2^bits - 1 ascending `boundaries`; duplicates and infinities are allowed (so that fewer boundaries can be
/// padded with +infinity).
template <int bits, class C>
LOMEM_HOST_DEVICE constexpr std::uint8_t search_code(C x, const C* boundaries) {
  int code = 0;
  for (int half = 1 << (bits - 1); half > 0; half /= 2) {
    code += x > boundaries[code + half - 1] ? half : 0;
  }
  return static_cast<std::uint8_t>(code);
}

/// One-bit code of a function whose derivative has one value inside an interval and another one outside (relu
/// and others): 1 for low <= x <= high. NaN has code 0.
template <class C>
LOMEM_HOST_DEVICE constexpr std::uint8_t band_code(C x, C low, C high) {
  return static_cast<std::uint8_t>(static_cast<int>(x >= low) & static_cast<int>(x <= high));
}

/// grad_output * level: a product in the arithmetic type, then one rounding to T. For float64 and float32 that is the
/// product rounded once. For 16-bit T the float32 product is rounded again; for the levels of ReGELU2 and ReSiLU2 the
/// result is the exact product rounded once for every bfloat16 and float16 gradient (the tests enumerate them).
///
/// With one bit, a level of 0 gives 0 for every gradient, even infinite or NaN, like the derivatives of torch's relu
/// and similar functions.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr T step_gradient(T grad_output, compute_t<T> level) {
  using C = compute_t<T>;
  if constexpr (bits == 1) {
    return from_compute<T>(level == C(0) ? C(0) : to_compute(grad_output) * level);
  } else {
    return from_compute<T>(to_compute(grad_output) * level);
  }
}

/// Packed codes of x[0, n): Step::bits bits per element in the layout of packing.h.
template <class Step, class T>
LOMEM_HOST_DEVICE constexpr void step_encode(const T* x, std::int64_t n, std::uint8_t* packed) {
  // Codes go through a small buffer so that both loops vectorize.
  constexpr int tile = 256;
  static_assert(tile % group_size == 0);
  std::uint8_t codes[tile] = {};
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const int count = static_cast<int>(n - begin < tile ? n - begin : tile);
    for (int j = 0; j < count; ++j) {
      codes[j] = Step::template code<T>(x[begin + j]);
    }
    pack<Step::bits>(codes, count, packed + begin / group_size * Step::bits);
  }
}

/// Packed codes of x[0, n) among 2^bits - 1 ascending boundaries.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr void step_search_encode(
    const T* x, std::int64_t n, const compute_t<T>* boundaries, std::uint8_t* packed) {
  constexpr int tile = 256;
  static_assert(tile % group_size == 0);
  std::uint8_t codes[tile] = {};
  compute_t<T> values[tile] = {};
  std::int32_t below[tile] = {};
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const int count = static_cast<int>(n - begin < tile ? n - begin : tile);
    for (int j = 0; j < count; ++j) {
      values[j] = to_compute(x[begin + j]);
      below[j] = 0;
    }
    // search_code of all elements at once, so that these loops vectorize.
    for (int half = 1 << (bits - 1); half > 0; half /= 2) {
      for (int j = 0; j < count; ++j) {
        below[j] += values[j] > boundaries[below[j] + half - 1] ? half : 0;
      }
    }
    for (int j = 0; j < count; ++j) {
      codes[j] = static_cast<std::uint8_t>(below[j]);
    }
    pack<bits>(codes, count, packed + begin / group_size * bits);
  }
}

/// Packed one-bit codes of x[0, n): whether low <= x <= high.
template <class T>
LOMEM_HOST_DEVICE constexpr void band_encode(
    const T* x, std::int64_t n, compute_t<T> low, compute_t<T> high, std::uint8_t* packed) {
  for (std::int64_t begin = 0; begin < n; begin += group_size) {
    const int count = static_cast<int>(n - begin < group_size ? n - begin : group_size);
    unsigned byte = 0;
    for (int j = 0; j < count; ++j) {
      byte |= static_cast<unsigned>(band_code(to_compute(x[begin + j]), low, high)) << j;
    }
    packed[begin / group_size] = static_cast<std::uint8_t>(byte);
  }
}

/// grad_input[i] = grad_output[i] * levels[code i], for i in [0, n). `levels` has 2^bits entries.
template <int bits, class T>
LOMEM_HOST_DEVICE constexpr void step_decode_multiply(
    const T* grad_output, const std::uint8_t* packed, const compute_t<T>* levels, std::int64_t n, T* grad_input) {
  constexpr int tile = 256;
  static_assert(tile % group_size == 0);
  std::uint8_t codes[tile] = {};
  for (std::int64_t begin = 0; begin < n; begin += tile) {
    const int count = static_cast<int>(n - begin < tile ? n - begin : tile);
    unpack<bits>(packed + begin / group_size * bits, count, codes);
    for (int j = 0; j < count; ++j) {
      grad_input[begin + j] = step_gradient<bits, T>(grad_output[begin + j], levels[codes[j]]);
    }
  }
}

}  // namespace lomem
