// Autocast of the norms: they compute in float32 from any input dtype and return the autocast dtype. torch's own policy
// for norms returns float32; every following linear layer would then save its own cast copy, and nothing would be
// shared.
#include <ATen/autocast_mode.h>

#include "ops.h"

namespace lomem::detail {
namespace {

/// An explicit dtype argument wins. As everywhere in autocast, float64 is left unchanged.
OptionalDtype output_dtype(const at::Tensor& input, OptionalDtype dtype, at::DeviceType device) {
  if (dtype || !input.is_floating_point() || input.scalar_type() == at::kDouble) {
    return dtype;
  }
  return at::autocast::get_autocast_dtype(device);
}

template <class Op, c10::DispatchKey key, at::DeviceType device>
at::Tensor norm_autocast(const NormArguments& args) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  NormArguments cast = args;
  cast.dtype = output_dtype(args.input, args.dtype, device);
  return Op::call(Op::op, cast);
}

template <c10::DispatchKey key, at::DeviceType device>
void emit_autocast_dtype(torch::Library& m) {
  for_each_norm([&](auto type) {
    using Op = typename decltype(type)::type;
    m.impl(Op::op.name, &Op::template kernel<&norm_autocast<Op, key, device>>);
  });
}

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  emit_autocast_dtype<c10::DispatchKey::AutocastCPU, at::kCPU>(m);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  emit_autocast_dtype<c10::DispatchKey::AutocastCUDA, at::kCUDA>(m);
}

}  // namespace
}  // namespace lomem::detail
