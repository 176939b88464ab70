// Norms whose backward pass needs their output instead of their input (MS-BP).
//
// y = (x - mean) * rstd (LayerNorm) or x * rstd (RMSNorm), with rstd = 1 / sqrt(m + eps), where m is the biased
// variance or the mean square of the row. In terms of y,
//     grad_x = rstd * (g - mean(g) - y * mean(g * y)),
// without the mean(g) term for RMSNorm. The next linear layer saves the norm's output anyway, so the norm itself only
// adds one rstd per row. With an affine output z = gamma * y + beta, y = (z - beta) / gamma and g = gamma * grad_z.
//
// Source: Yang et al., ICML 2024, arXiv:2406.16282 (memory-sharing backpropagation).
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>

#include <cmath>
#include <cstdint>

namespace lomem {

/// Layer normalization centers the row, RMS normalization does not.
enum class Norm { layer, rms };

/// Whether a norm can have a bias. RMS normalization cannot: neither do its kernels load one, nor do they keep sums for
/// its gradient.
LOMEM_HOST_DEVICE constexpr bool has_bias(Norm norm) {
  return norm == Norm::layer;
}

/// `moment` is the variance (LayerNorm) or the mean square (RMSNorm) of the row.
template <class C>
LOMEM_HOST_DEVICE inline C norm_rstd(C moment, C eps) {
  return C(1) / std::sqrt(moment + eps);
}

/// Variance of n elements from the sums of d = x - mean and of d^2. The second term corrects for the rounding error of
/// the mean. Rounding does not make the result negative; NaN stays NaN.
template <class C>
LOMEM_HOST_DEVICE constexpr C norm_variance(C sum_of_squares, C sum, C n) {
  const C variance = (sum_of_squares - sum * sum / n) / n;
  return variance < C(0) ? C(0) : variance;
}

/// y. For RMSNorm, pass mean = 0.
template <class C>
LOMEM_HOST_DEVICE constexpr C norm_value(C x, C mean, C rstd) {
  return (x - mean) * rstd;
}

/// z = gamma * y + beta.
template <class C>
LOMEM_HOST_DEVICE constexpr C norm_affine(C y, C gamma, C beta) {
  return y * gamma + beta;
}

/// y from the saved z. Requires gamma != 0. Loses precision where |beta| >> |gamma|. Takes 1 / gamma, which is the same
/// for every row.
template <class C>
LOMEM_HOST_DEVICE constexpr C norm_recover(C z, C inverse_gamma, C beta) {
  return (z - beta) * inverse_gamma;
}

/// 1 / gamma for `norm_recover`, or NaN if gamma is so small that z has no digits of y left: y of that column is then
/// NaN instead of silently wrong. So are the gradient of its weight and, because mean(g * y) is a sum over the whole
/// row, all elements of grad_x; the gradients of the other weights and of all biases do not depend on it. `smallest` is
/// the smallest normal number of z's dtype.
template <class C>
LOMEM_HOST_DEVICE inline C norm_inverse(C gamma, C smallest) {
  return std::fabs(gamma) < smallest ? static_cast<C>(NAN) : C(1) / gamma;
}

/// grad_x. For RMSNorm, pass mean_g = 0.
template <class C>
LOMEM_HOST_DEVICE constexpr C norm_gradient(C g, C y, C rstd, C mean_g, C mean_gy) {
  return rstd * (g - mean_g - y * mean_gy);
}

/// Rows of `cols` elements. `weight` and `bias` have `cols` elements, or no data if absent (RMSNorm has no bias). Each
/// of these arrays may have a different dtype. rstd has one element per row, is float32 or float64, and must be
/// present.
struct NormForward {
  Array input;
  Array weight;
  Array bias;
  MutableArray output;
  MutableArray rstd;
  std::int64_t cols = 0;
  double eps = 0;
};

/// `output` and `rstd` are the results of norm_forward. If `grad_input` has no data, it is not computed.
struct NormBackward {
  Array grad_output;
  Array output;
  Array rstd;
  Array weight;
  Array bias;
  MutableArray grad_input;
  std::int64_t cols = 0;
};

}  // namespace lomem
