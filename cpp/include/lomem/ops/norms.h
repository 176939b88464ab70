// Norms whose backward pass saves their output, which the next linear layer saves anyway. Differentiable, and the same ops
// as torch.ops.lomem in Python.
//
// Every function raises c10::Error that names op, argument, the value it got and the value it wants.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <optional>

namespace lomem {

/// Layer normalisation over the last dimensions, whose backward pass keeps its output, which the
/// next linear layer keeps anyway, and one float a row (arXiv:2406.16282, MS-LayerNorm).
///
/// `weight`, `bias`: of shape `normalized_shape`, of any floating-point dtype; with a gradient,
/// no element of `weight` may be 0. `dtype`: of the output; by default the autocast dtype where
/// autocast is on, else the input's.
LOMEM_API at::Tensor ms_layer_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
    std::optional<at::ScalarType> dtype = std::nullopt);

/// RMS normalisation over the last dimensions; keeps what ms_layer_norm keeps (arXiv:2406.16282,
/// MS-RMSNorm). `eps`: by default machine epsilon of float32 (float64 for a float64 input).
LOMEM_API at::Tensor ms_rms_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight = std::nullopt,
    std::optional<double> eps = std::nullopt, std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace lomem
