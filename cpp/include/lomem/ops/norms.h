// Norms that save their output for backward, which the next linear layer saves anyway. They are differentiable, and the
// same ops as torch.ops.lomem in Python.
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <optional>

namespace lomem {

/// Layer normalization over the last dimensions. Saves for backward its output, which the next linear layer saves
/// anyway, and one float per row (arXiv:2406.16282, MS-LayerNorm).
///
/// `weight` and `bias` have shape `normalized_shape` and any floating-point dtype. If a gradient is needed, no element
/// of `weight` may be smaller in magnitude than the smallest normal number of the output's dtype: on the CPU that
/// throws; on CUDA, one such element makes all of the input's gradient and its own NaN, and no other element of the
/// gradients of `weight` and `bias`. `dtype` is the dtype of the output; the default is the autocast dtype if autocast
/// is on, otherwise the input's dtype.
LOMEM_API at::Tensor ms_layer_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
    std::optional<at::ScalarType> dtype = std::nullopt);

/// RMS normalization over the last dimensions; saves the same as ms_layer_norm (arXiv:2406.16282, MS-RMSNorm), and
/// requires the same of `weight`. `eps` defaults to the machine epsilon of float32 (float64 for a float64 input).
LOMEM_API at::Tensor ms_rms_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight = std::nullopt,
    std::optional<double> eps = std::nullopt, std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace lomem
