// Autocast of the randomized linear layer: as for torch's linear layers, all arguments are cast to the autocast dtype.
// The rows are then compressed and saved in that dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../op.h"

namespace lomem::detail {
namespace {

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor randomized_linear_autocast(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, std::string_view matmul,
    std::optional<int64_t> proj_dim, std::optional<double> proj_dim_ratio, std::optional<int64_t> proj_dim_min,
    std::optional<int64_t> proj_dim_max, const OptionalTensor& seed) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& argument) { return at::autocast::cached_cast(dtype, argument, device); };
  return ops::randomized_linear(
      cast(input), cast(weight), cast(bias), matmul, proj_dim, proj_dim_ratio, proj_dim_min, proj_dim_max, seed);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  m.impl("randomized_linear", &randomized_linear_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  m.impl("randomized_linear", &randomized_linear_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace
}  // namespace lomem::detail
