// Gated units on CUDA: instantiations of lomem/cuda/gated.cuh.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/gated.cuh>

namespace lomem::cuda {

cudaError_t gated_forward(const GatedOperands& operands, void* output, cudaStream_t stream) {
  return gated_forward_by(operands, output, [&](const auto& body) { return launch(body, stream); });
}

cudaError_t gated_backward(
    const GatedOperands& operands, const void* grad_output, const GatedGradients& gradients, cudaStream_t stream) {
  return gated_backward_by(operands, grad_output, gradients, [&](const auto& body) { return launch(body, stream); });
}

}  // namespace lomem::cuda
