// LayerNorm on CUDA: instantiations of lomem/cuda/norm.cuh.
#include "norms.cuh"

namespace lomem::cuda {

template LOMEM_API cudaError_t norm_forward<Norm::layer>(const NormForward&, std::int64_t, cudaStream_t);
template LOMEM_API cudaError_t
norm_backward<Norm::layer>(const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);

std::int64_t norm_backward_workspace(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters) {
  return norm_backward_bytes(args, rows, parameters, multiprocessor_count());
}

}  // namespace lomem::cuda
