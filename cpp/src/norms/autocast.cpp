// Autocast of the norms: they compute in float32 from any input dtype and return the autocast dtype. torch's own policy
// for norms returns float32; every following linear layer would then save its own cast copy, and nothing would be
// shared.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../op.h"

namespace lomem::detail {
namespace {

/// An explicit dtype argument wins. As everywhere in autocast, float64 is left unchanged.
OptionalDtype output_dtype(const at::Tensor& input, OptionalDtype dtype, at::DeviceType device) {
  if (dtype || !input.is_floating_point() || input.scalar_type() == at::kDouble) {
    return dtype;
  }
  return at::autocast::get_autocast_dtype(device);
}

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor ms_layer_norm_autocast(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return ops::ms_layer_norm(input, normalized_shape, weight, bias, eps, output_dtype(input, dtype, device));
}

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor ms_rms_norm_autocast(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return ops::ms_rms_norm(input, normalized_shape, weight, eps, output_dtype(input, dtype, device));
}

template <c10::DispatchKey key, at::DeviceType device>
void emit_autocast_dtype(torch::Library& m) {
  m.impl("ms_layer_norm", &ms_layer_norm_autocast<key, device>);
  m.impl("ms_rms_norm", &ms_rms_norm_autocast<key, device>);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  emit_autocast_dtype<c10::DispatchKey::AutocastCPU, at::kCPU>(m);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  emit_autocast_dtype<c10::DispatchKey::AutocastCUDA, at::kCUDA>(m);
}

}  // namespace
}  // namespace lomem::detail
