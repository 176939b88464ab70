// Storage in groups on CUDA: instantiations of lomem/cuda/storage.cuh.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/storage.cuh>

namespace lomem::cuda {

cudaError_t group_encode(
    DType dtype, const void* x, std::int64_t n, const GroupFormat& format, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, bfloat16* scales, cudaStream_t stream) {
  return group_encode_by(
      dtype, x, n, format, seed, offset, codes, scales, [&](const auto& body) { return launch(body, stream); });
}

cudaError_t group_decode(
    DType dtype, const std::uint8_t* codes, const bfloat16* scales, std::int64_t n, const GroupFormat& format,
    const std::int64_t* seed, std::uint64_t offset, void* y, cudaStream_t stream) {
  return group_decode_by(
      dtype, codes, scales, n, format, seed, offset, y, [&](const auto& body) { return launch(body, stream); });
}

}  // namespace lomem::cuda
