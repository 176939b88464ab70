// Registers what follows from the list of ops alone: schemas, and the default behavior of ops.
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <lomem/ops/registration.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string>

#include "checks.h"

namespace lomem::detail {
namespace {

enum Traits : unsigned {
  none = 0,
  kernels = 1,
  composite = 2,
  not_differentiable = 4,
  keeps_dtype = 8,
  strided = 16,
  random = 32,
};

struct OpEntry {
  const char* name;
  const char* schema;
  unsigned traits;

  bool has(Traits trait) const {
    return (traits & trait) != 0;
  }
};

constexpr OpEntry entries[] = {
#define LOMEM_OP(name, traits, schema, ...) {#name, #name schema, traits},
#include "ops.def"
#undef LOMEM_OP
};

std::vector<at::Tag> tags(const OpEntry& op) {
  std::vector<at::Tag> result = {at::Tag::pt2_compliant_tag};
  if (op.has(strided)) {
    result.push_back(at::Tag::needs_exact_strides);
  }
  if (op.has(random)) {
    result.push_back(at::Tag::nondeterministic_seeded);
  }
  return result;
}

template <class Kernel>
void implement(torch::Library& m, Traits trait, const Kernel& kernel) {
  for (const OpEntry& op : entries) {
    if (op.has(trait)) {
      m.impl(op.name, kernel());
    }
  }
}

// Handles tensors without kernels: nested, sparse, quantized, in oneDNN's layout, or on unknown devices. torch's own
// error names the op and two pages of backends.

/// Applies the check of checks.cpp for an argument of this name.
void check_argument(const char* op, const std::string& name, const at::Tensor& tensor) {
  if (name == "codes" || name == "packed" || name == "mask") {
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

torch::CppFunction refusal() {
  return torch::CppFunction::makeFromBoxedFunction<&refuse>();
}

#if !defined(LOMEM_WITH_CUDA)

void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(), ": got a tensor on cuda, expected cpu: this lomem was built without CUDA kernels ",
      "(rebuild it against a CUDA build of torch, with nvcc, or with LOMEM_CUDA=ON)");
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  implement(m, kernels, [] { return torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>(); });
}

#endif

TORCH_LIBRARY(lomem, m) {
  for (const OpEntry& op : entries) {
    const std::vector<at::Tag> op_tags = tags(op);  // (An rvalue would be mistaken for a kernel.)
    m.def(op.schema, op_tags);
  }
}

// Fallback for backends without kernels.
TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  for (const OpEntry& op : entries) {
    if (op.has(kernels) && !op.has(composite)) {
      m.impl(op.name, refusal());
    }
  }
}

// Nested tensors do not reach that fallback: torch has separate keys for them.

void refuse_nested(torch::Library& m) {
  for (const OpEntry& op : entries) {
    m.impl(op.name, refusal());
  }
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

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  implement(m, not_differentiable, [] { return torch::autograd::autogradNotImplementedFallback(); });
}

// Activations keep the dtype of their input under autocast, like torch's. Registered explicitly so as not to rely on a
// default.

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  implement(m, keeps_dtype, [] { return torch::CppFunction::makeFallthrough(); });
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  implement(m, keeps_dtype, [] { return torch::CppFunction::makeFallthrough(); });
}

}  // namespace

const int registration = 0;

}  // namespace lomem::detail
