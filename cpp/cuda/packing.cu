// Packing on CUDA: instantiations of lomem/cuda/packing.cuh.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/packing.cuh>

namespace lomem::cuda {

cudaError_t pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed, cudaStream_t stream) {
  return visit_bits(
      bits, [&](auto width) { return launch(PackBits<decltype(width)::value>(codes, n, packed), stream); });
}

cudaError_t unpack_bits(
    const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes, cudaStream_t stream) {
  return visit_bits(
      bits, [&](auto width) { return launch(UnpackBits<decltype(width)::value>(packed, n, codes), stream); });
}

}  // namespace lomem::cuda
