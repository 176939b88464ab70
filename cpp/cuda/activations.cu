// Step activations on CUDA: instantiations of lomem/cuda/step.cuh.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/step.cuh>

namespace lomem::cuda {

template <class Function>
cudaError_t step_forward(
    DType dtype, const void* input, std::int64_t n, void* output, std::uint8_t* codes, cudaStream_t stream) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const StepForward<Function, typename Function::PublishedSteps, T> body(
        static_cast<const T*>(input), n, static_cast<T*>(output), codes);
    return launch(body, stream);
  });
}

template LOMEM_API cudaError_t step_forward<GELU>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
template LOMEM_API cudaError_t
step_forward<GELUTanh>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
template LOMEM_API cudaError_t step_forward<SiLU>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);

cudaError_t step_encode(
    DType dtype, const void* input, std::int64_t n, const double* boundaries, int bits, std::uint8_t* codes,
    cudaStream_t stream) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_bits(bits, [&](auto width) {
      const SearchCoder<T, decltype(width)::value> coder(boundaries);
      return launch(StepEncode(coder, static_cast<const T*>(input), n, codes), stream);
    });
  });
}

cudaError_t band_encode(
    DType dtype, const void* input, std::int64_t n, double low, double high, std::uint8_t* codes, cudaStream_t stream) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return launch(StepEncode(BandCoder<T>(low, high), static_cast<const T*>(input), n, codes), stream);
  });
}

cudaError_t step_backward(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const double* levels, int bits, std::int64_t n,
    void* grad_input, cudaStream_t stream) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_bits(bits, [&](auto width) {
      const StepBackward<T, decltype(width)::value> body(
          static_cast<const T*>(grad_output), codes, levels, n, static_cast<T*>(grad_input));
      return launch(body, stream);
    });
  });
}

}  // namespace lomem::cuda
