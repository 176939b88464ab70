// The CUDA ops on the CPU: a library that, loaded after lomem, replaces the CPU kernels of the ops by the CUDA
// adapters. What the adapters launch is linked with it: the bodies of the kernels, executed on the CPU
// (bodies_on_host.cpp), or the kernels themselves on an emulator (emulator/emulator.h). So the Python tests run where
// there is no GPU
// (`make pytest-on-host`, `make cuda-emulate`).
#define LOMEM_CUDA_CALL_H  // in place of cpp/cuda/call.h

#include <ATen/core/Tensor.h>
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>

namespace lomem::detail {

struct CudaScope {
  explicit CudaScope(const at::Tensor& /*tensor*/) {}
};

inline cudaStream_t current_stream(const at::Tensor& /*tensor*/) {
  return nullptr;
}

inline void check_launch(const char* op, const at::Tensor& /*tensor*/, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": CUDA error ", static_cast<int>(error));
}

}  // namespace lomem::detail

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <ATen/ops/gelu.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include "../../../cpp/src/activations/fused.h"
#include "../../../cpp/src/checks.h"
#include "../../../cpp/src/gated/halves.h"
#include "../../../cpp/src/gated/rows.h"
#include "../../../cpp/src/norms/backend.h"

namespace lomem::detail {
namespace {

/// An op that is composed of others on CUDA, as on all devices that have no kernel of their own for it; but the CPU
/// has.
void composed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), stack);
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("drawn_activation_forward", torch::CppFunction::makeFromBoxedFunction<&composed>());
}

}  // namespace
}  // namespace lomem::detail

// Registered under the other name: the tensors are on the CPU.
#define CUDA CPU
#include "../../../cpp/cuda/activations.cpp"
#include "../../../cpp/cuda/drawn.cpp"
#include "../../../cpp/cuda/dropout.cpp"
#include "../../../cpp/cuda/gated.cpp"
#include "../../../cpp/cuda/norms.cpp"
#include "../../../cpp/cuda/packing.cpp"
#include "../../../cpp/cuda/storage.cpp"
