// RMSNorm on CUDA: instantiations of lomem/cuda/norm.cuh.
#include "norms.cuh"

namespace lomem::cuda {

template LOMEM_API cudaError_t norm_forward<Norm::rms>(const NormForward&, std::int64_t, cudaStream_t);
template LOMEM_API cudaError_t
norm_backward<Norm::rms>(const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);

}  // namespace lomem::cuda
