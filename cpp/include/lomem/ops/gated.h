// Gated units, activation(gate) * up (arXiv:2002.05202), that save gate and up alone. They are differentiable, and the
// same ops as torch.ops.lomem in Python.
//
// `activation` is "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" (ReGLU) or "sigmoid" (GLU). Without `up`, the
// last dimension of `gate` holds both operands, in the order that `layout` names: "gate_up", "up_gate" or "interleaved"
// (gate at even places, up at odd ones).
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace lomem {

/// activation(gate) * up, bit for bit what the two torch ops return. float64, float32, bfloat16 or float16; gate and up
/// have the same shape and dtype. Second derivatives are exact.
LOMEM_API at::Tensor gated(
    const at::Tensor& gate, const std::optional<at::Tensor>& up = std::nullopt, std::string_view activation = "silu",
    std::string_view layout = "gate_up");

/// at::linear(gated(gate, up), weight, bias), which saves gate, up and weight: the backward pass computes the input of
/// the linear layer again. `weight` has shape (out_features, in_features); if its dtype is another one than gate's, the
/// result of the unit is rounded to it.
LOMEM_API at::Tensor gated_linear(
    const at::Tensor& gate, const std::optional<at::Tensor>& up, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias = std::nullopt, std::string_view activation = "silu",
    std::string_view layout = "gate_up");

/// The gradients of gate and up, and the result of gated again, each if `output_mask` asks for it. Without `up`, the
/// gradient of gate is that of both operands, in the same layout. All results are row-major.
LOMEM_API std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward(
    const at::Tensor& grad_output, const at::Tensor& gate, const std::optional<at::Tensor>& up,
    std::string_view activation, std::string_view layout = "gate_up",
    std::array<bool, 3> output_mask = {true, true, false});

}  // namespace lomem
