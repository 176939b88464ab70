// What the ops say of tensors that they have no kernels for: nested, sparse, quantized, of oneDNN's layout, and on
// devices that the library does not know. torch's own error names the op and two pages of backends.
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <string_view>

#include "checks.h"

namespace lomem::detail {
namespace {

/// The rule of checks.cpp that an argument of this name is under.
void check_argument(const char* op, const std::string& name, const at::Tensor& tensor) {
  if (name == "codes" || name == "packed") {
    check_byte_tensor(op, name.c_str(), tensor);
  } else if (name == "seed" || name == "indices") {
    check_strided(op, name.c_str(), tensor);
  } else {
    check_float_tensor(op, name.c_str(), tensor);
  }
}

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto values = torch::jit::last(*stack, schema.arguments().size());
  const at::Tensor* first = nullptr;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].isTensor() && values[i].toTensor().defined()) {
      first = first == nullptr ? &values[i].toTensor() : first;
      check_argument(schema.name().c_str(), schema.arguments()[i].name(), values[i].toTensor());
    }
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, schema.name(), ": got a tensor on ", first == nullptr ? "no device" : first->device().str(),
      ", expected cpu, cuda or meta");
}

void refuse_all(torch::Library& m, std::initializer_list<const char*> ops) {
  for (const char* op : ops) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

// Behind every backend that has a kernel of its own.
TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  refuse_all(
      m, {"regelu2_forward", "resilu2_forward", "step_codes", "band_codes", "step_activation_backward", "ms_layer_norm",
          "ms_layer_norm_forward", "ms_layer_norm_backward", "ms_rms_norm", "ms_rms_norm_forward",
          "ms_rms_norm_backward", "pack_bits", "unpack_bits"});
}

// Nested tensors are behind none: torch keeps them apart.

void refuse_nested(torch::Library& m) {
  refuse_all(
      m, {"regelu2",
          "regelu2_forward",
          "resilu2",
          "resilu2_forward",
          "step_activation",
          "step_activation_forward",
          "hard_activation",
          "hard_activation_forward",
          "step_codes",
          "band_codes",
          "step_activation_backward",
          "ms_layer_norm",
          "ms_layer_norm_forward",
          "ms_layer_norm_backward",
          "ms_rms_norm",
          "ms_rms_norm_forward",
          "ms_rms_norm_backward",
          "randomized_linear",
          "randomized_linear_forward",
          "randomized_linear_weight_grad",
          "pack_bits",
          "unpack_bits"});
}

TORCH_LIBRARY_IMPL(lomem, NestedTensorCPU, m) {
  refuse_nested(m);
}

TORCH_LIBRARY_IMPL(lomem, NestedTensorCUDA, m) {
  refuse_nested(m);
}

TORCH_LIBRARY_IMPL(lomem, AutogradNestedTensor, m) {
  refuse_nested(m);
}

}  // namespace
}  // namespace lomem::detail
