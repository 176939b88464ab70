// What a build without CUDA kernels says when it is given CUDA tensors.
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace lomem::detail {
namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(), ": got a tensor on cuda, expected cpu: this lomem was built without CUDA kernels ",
      "(build it again beside a CUDA build of torch, with nvcc, or with LOMEM_CUDA=ON)");
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  for (const char* op :
       {"regelu2_forward", "resilu2_forward", "step_activation_forward", "hard_activation_forward", "step_codes",
        "band_codes", "step_activation_backward", "ms_layer_norm", "ms_layer_norm_forward", "ms_layer_norm_backward",
        "ms_rms_norm", "ms_rms_norm_forward", "ms_rms_norm_backward", "pack_bits", "unpack_bits"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace
}  // namespace lomem::detail
