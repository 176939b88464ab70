// What the gated units are apart from their backends: the C++ functions, the linear layer behind a unit, and the shapes
// of results with symbolic sizes.
#include "ops.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <lomem/ops/gated.h>
#include <torch/library.h>

namespace lomem {

at::Tensor gated(
    const at::Tensor& gate, const std::optional<at::Tensor>& up, std::string_view activation, std::string_view layout) {
  return detail::ops::gated(gate, up, activation, layout);
}

at::Tensor gated_linear(
    const at::Tensor& gate, const std::optional<at::Tensor>& up, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, std::string_view activation, std::string_view layout) {
  return detail::ops::gated_linear(gate, up, weight, bias, activation, layout);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward(
    const at::Tensor& grad_output, const at::Tensor& gate, const std::optional<at::Tensor>& up,
    std::string_view activation, std::string_view layout, std::array<bool, 3> output_mask) {
  return detail::ops::gated_backward(grad_output, gate, up, activation, layout, output_mask);
}

namespace detail {

at::Tensor gate_value(GatedActivation activation, const at::Tensor& gate) {
  switch (activation) {
    case GatedActivation::silu: return at::silu(gate);
    case GatedActivation::gelu: return at::gelu(gate);
    case GatedActivation::gelu_tanh: return at::gelu(gate, "tanh");
    case GatedActivation::relu: return at::relu(gate);
    default: return at::sigmoid(gate);
  }
}

namespace {

/// Used if no gradient is needed.
at::Tensor gated_linear_value(
    const at::Tensor& gate, const OptionalTensor& up, const at::Tensor& weight, const OptionalTensor& bias,
    std::string_view activation, std::string_view layout) {
  check_gated_linear(ops::gated_linear.name, gate, up, weight, bias, activation, layout);
  return at::linear(ops::gated(gate, up, activation, layout).to(weight.scalar_type()), weight, bias);
}

// Shapes --------------------------------------------------------------------------------------------------------------

/// (By torch's ops, so that the strides are theirs.)
at::Tensor gated_meta(
    const at::Tensor& gate, const OptionalTensor& up, std::string_view activation, std::string_view layout) {
  const GatedKind kind = check_gated(ops::gated.name, gate, up, activation, layout);
  const GatedHalves operands = operands_of(gate, up, kind.layout);
  return gate_value(kind.activation, operands.gate).mul(operands.up);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& gate, const OptionalTensor& up, std::string_view activation,
    std::string_view layout, std::array<bool, 3> output_mask) {
  check_gated_backward(ops::gated_backward.name, grad_output, gate, up, activation, layout);
  const auto result = [&](bool wanted, c10::SymIntArrayRef sizes) {
    return wanted ? at::empty_symint(sizes, gate.options()) : at::Tensor();
  };
  return {
      result(output_mask[0], gate.sym_sizes()), result(output_mask[1] && has_tensor(up), gate.sym_sizes()),
      result(output_mask[2], grad_output.sym_sizes())};
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("gated_linear", &gated_linear_value);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("gated", &gated_meta);
  m.impl("gated_backward", &gated_backward_meta);
}

// Under autocast, the linear layer casts its operands as torch's does. The unit keeps its dtype, and the autograd
// kernel casts its result to that of weight.

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor gated_linear_autocast(
    const at::Tensor& gate, const OptionalTensor& up, const at::Tensor& weight, const OptionalTensor& bias,
    std::string_view activation, std::string_view layout) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ops::gated_linear(
      gate, up, at::autocast::cached_cast(dtype, weight, device), at::autocast::cached_cast(dtype, bias, device),
      activation, layout);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  m.impl("gated_linear", &gated_linear_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  m.impl("gated_linear", &gated_linear_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace
}  // namespace detail
}  // namespace lomem
