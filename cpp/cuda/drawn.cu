// Codes drawn at random on CUDA: instantiations of lomem/cuda/drawn.cuh.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/drawn.cuh>

namespace lomem::cuda {

cudaError_t drawn_encode(
    DType dtype, const DrawnTable& table, const void* x, std::int64_t n, int bits, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, cudaStream_t stream) {
  return drawn_encode_by(
      dtype, table, x, n, bits, {seed, offset}, codes, [&](const auto& body) { return launch(body, stream); });
}

cudaError_t drawn_backward(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const DrawnLevels<double>& levels, int bits,
    std::int64_t n, const std::int64_t* seed, std::uint64_t offset, void* grad_input, cudaStream_t stream) {
  return drawn_backward_by(
      dtype, grad_output, codes, levels, bits, n, {seed, offset}, grad_input,
      [&](const auto& body) { return launch(body, stream); });
}

}  // namespace lomem::cuda
