// What low-rank adapters are apart from their gradients: the C++ function, the value by torch's ops, which run on every
// device and know symbolic sizes, and autocast.
#include "ops.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <c10/core/ScalarType.h>
#include <lomem/ops/lora.h>
#include <torch/library.h>

#include "../checks.h"

namespace lomem {

at::Tensor lora(
    const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const std::optional<at::Tensor>& bias, double p) {
  return detail::ops::lora(input, lora_a, lora_b, scaling, bias, p, std::nullopt);
}

namespace detail {
namespace {

/// tensor.to(dtype), or the tensor itself. (Ops below autograd must not return their arguments, as `to` does.)
at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

/// input.to(dtype).to(result): in one cast, or none, where the first one would be exact.
at::Tensor rounded(const at::Tensor& input, at::ScalarType dtype, at::ScalarType result) {
  const bool is_exact = c10::promoteTypes(input.scalar_type(), dtype) == dtype;
  return cast(is_exact ? input : cast(input, dtype), result);
}

}  // namespace

Dropped drop(const at::Tensor& input, double p, at::ScalarType dtype, at::ScalarType result) {
  if (p == 0) {
    return {rounded(input, dtype, result), at::Tensor()};
  }
  auto [output, mask] = ops::dropout_forward(cast(input, dtype), p);
  return {cast(output, result), mask};
}

at::Tensor dropped_again(
    const at::Tensor& input, const at::Tensor& mask, double p, at::ScalarType dtype, at::ScalarType result) {
  return mask.defined() ? cast(ops::dropout_apply(cast(input, dtype), mask, p), result) : rounded(input, dtype, result);
}

at::Tensor scaled(const at::Tensor& tensor, double scaling) {
  return scaling == 1 ? tensor : at::mul(tensor, scaling);
}

at::Tensor scaled_update(
    const at::Tensor& product, const at::Tensor& lora_b, const OptionalTensor& bias, double scaling) {
  return scaled(at::linear(product, lora_b, bias), scaling);
}

namespace {

/// Used if no gradient is needed.
at::Tensor lora_value(
    const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const OptionalTensor& bias, double p, OptionalDtype dtype) {
  check_lora(ops::lora.name, input, lora_a, lora_b, scaling, bias, p, dtype);
  const at::ScalarType result = lora_a.scalar_type();
  const at::ScalarType dropped_in = dtype.value_or(result);
  const at::Tensor dropped =
      p == 0 ? rounded(input, dropped_in, result) : cast(ops::dropout(cast(input, dropped_in), p, "mask"), result);
  return scaled_update(at::linear(dropped, lora_a), lora_b, bias, scaling);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("lora", &lora_value);
}

// Under autocast, the weights are cast as those of torch's linear layers. The input is not: it is saved as it is given.

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor lora_autocast(
    const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const OptionalTensor& bias, double p, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto cast_weight = [](const auto& weight) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), weight, device);
  };
  return ops::lora(
      input, cast_weight(lora_a), cast_weight(lora_b), scaling, cast_weight(bias), p,
      dtype.value_or(lora_a.scalar_type()));
}

// torch.func.vmap has a say in what is random: torch's ops ask it, and a loop over calls of this one would not.
at::Tensor lora_vmap(
    const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling,
    const OptionalTensor& bias, double p, OptionalDtype dtype) {
  TORCH_CHECK_NOT_IMPLEMENTED(p == 0, ops::lora.name, ": p is ", p, " inside torch.func.vmap, expected 0");
  c10::impl::ExcludeDispatchKeyGuard outside(c10::DispatchKey::FuncTorchVmapMode);
  return ops::lora(input, lora_a, lora_b, scaling, bias, p, dtype);
}

TORCH_LIBRARY_IMPL(lomem, FuncTorchVmapMode, m) {
  m.impl("lora", &lora_vmap);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  m.impl("lora", &lora_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  m.impl("lora", &lora_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace
}  // namespace detail
}  // namespace lomem
