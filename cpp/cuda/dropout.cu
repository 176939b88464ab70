// Dropout on CUDA: instantiations of lomem/cuda/dropout.cuh.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/dropout.cuh>

namespace lomem::cuda {

cudaError_t mask_multiply(
    DType dtype, const void* x, const std::uint8_t* mask, double scale, std::int64_t n, void* product,
    cudaStream_t stream) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(
        MaskedMultiply(static_cast<const T*>(x), StoredMask{mask}, scale, n, static_cast<T*>(product)), stream);
  });
}

cudaError_t seed_multiply(
    DType dtype, const void* x, const std::int64_t* seed, std::uint32_t bound, double scale, std::int64_t n,
    void* product, cudaStream_t stream) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(
        MaskedMultiply(static_cast<const T*>(x), SeededMask{seed, bound}, scale, n, static_cast<T*>(product)), stream);
  });
}

}  // namespace lomem::cuda
