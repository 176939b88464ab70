// The launchers of the CUDA kernels (lomem/cuda/kernels.h) with the bodies of the kernels executed on the CPU.
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>
#include <lomem/cuda/drawn.cuh>
#include <lomem/cuda/dropout.cuh>
#include <lomem/cuda/gated.cuh>
#include <lomem/cuda/packing.cuh>
#include <lomem/cuda/step.cuh>
#include <lomem/cuda/storage.cuh>

namespace lomem::cuda {

namespace {

constexpr HostRunner host{4};

cudaError_t status(HostRunner::Error result) {
  return result == HostRunner::ok ? cudaSuccess : cudaErrorUnknown;
}

}  // namespace

template <class Function>
cudaError_t step_forward(
    DType dtype, const void* input, std::int64_t n, void* output, std::uint8_t* codes, cudaStream_t /*stream*/) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return status(host.body(
        StepForward<Function, typename Function::PublishedSteps, T>(
            static_cast<const T*>(input), n, static_cast<T*>(output), codes)));
  });
}

cudaError_t step_encode(
    DType dtype, const void* input, std::int64_t n, const double* boundaries, int bits, std::uint8_t* codes,
    cudaStream_t /*stream*/) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_bits(bits, [&](auto width) {
      const SearchCoder<T, decltype(width)::value> coder(boundaries);
      return status(host.body(StepEncode(coder, static_cast<const T*>(input), n, codes)));
    });
  });
}

cudaError_t band_encode(
    DType dtype, const void* input, std::int64_t n, double low, double high, std::uint8_t* codes,
    cudaStream_t /*stream*/) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return status(host.body(StepEncode(BandCoder<T>(low, high), static_cast<const T*>(input), n, codes)));
  });
}

cudaError_t step_backward(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const double* levels, int bits, std::int64_t n,
    void* grad_input, cudaStream_t /*stream*/) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return visit_bits(bits, [&](auto width) {
      return status(host.body(
          StepBackward<T, decltype(width)::value>(
              static_cast<const T*>(grad_output), codes, levels, n, static_cast<T*>(grad_input))));
    });
  });
}

cudaError_t drawn_encode(
    DType dtype, const DrawnTable& table, const void* x, std::int64_t n, int bits, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, cudaStream_t /*stream*/) {
  return drawn_encode_by(
      dtype, table, x, n, bits, {seed, offset}, codes, [](const auto& body) { return status(host.body(body)); });
}

cudaError_t drawn_backward(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const DrawnLevels<double>& levels, int bits,
    std::int64_t n, const std::int64_t* seed, std::uint64_t offset, void* grad_input, cudaStream_t /*stream*/) {
  return drawn_backward_by(
      dtype, grad_output, codes, levels, bits, n, {seed, offset}, grad_input,
      [](const auto& body) { return status(host.body(body)); });
}

cudaError_t mask_multiply(
    DType dtype, const void* x, const std::uint8_t* mask, double scale, std::int64_t n, void* product,
    cudaStream_t /*stream*/) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return status(
        host.body(MaskedMultiply(static_cast<const T*>(x), StoredMask{mask}, scale, n, static_cast<T*>(product))));
  });
}

cudaError_t seed_multiply(
    DType dtype, const void* x, const std::int64_t* seed, std::uint32_t bound, double scale, std::int64_t n,
    void* product, cudaStream_t /*stream*/) {
  return visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    return status(host.body(
        MaskedMultiply(static_cast<const T*>(x), SeededMask{seed, bound}, scale, n, static_cast<T*>(product))));
  });
}

cudaError_t group_encode(
    DType dtype, const void* x, std::int64_t n, const GroupFormat& format, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, bfloat16* scales, cudaStream_t /*stream*/) {
  return group_encode_by(
      dtype, x, n, format, seed, offset, codes, scales, [](const auto& body) { return status(host.body(body)); });
}

cudaError_t group_decode(
    DType dtype, const std::uint8_t* codes, const bfloat16* scales, std::int64_t n, const GroupFormat& format,
    const std::int64_t* seed, std::uint64_t offset, void* y, cudaStream_t /*stream*/) {
  return group_decode_by(
      dtype, codes, scales, n, format, seed, offset, y, [](const auto& body) { return status(host.body(body)); });
}

cudaError_t gated_forward(const GatedOperands& operands, void* output, cudaStream_t /*stream*/) {
  return gated_forward_by(operands, output, [](const auto& body) { return status(host.body(body)); });
}

cudaError_t gated_backward(
    const GatedOperands& operands, const void* grad_output, const GatedGradients& gradients, cudaStream_t /*stream*/) {
  return gated_backward_by(operands, grad_output, gradients, [](const auto& body) { return status(host.body(body)); });
}

cudaError_t pack_bits(
    const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed, cudaStream_t /*stream*/) {
  return visit_bits(
      bits, [&](auto width) { return status(host.body(PackBits<decltype(width)::value>(codes, n, packed))); });
}

cudaError_t unpack_bits(
    const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes, cudaStream_t /*stream*/) {
  return visit_bits(
      bits, [&](auto width) { return status(host.body(UnpackBits<decltype(width)::value>(packed, n, codes))); });
}

template <Norm norm>
cudaError_t norm_forward(const NormForward& args, std::int64_t rows, cudaStream_t /*stream*/) {
  return status(run_norm_forward<norm>(args, rows, host));
}

std::int64_t norm_backward_workspace(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters) {
  return norm_backward_bytes(args, rows, parameters, host.multiprocessors);
}

template <Norm norm>
cudaError_t norm_backward(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, cudaStream_t /*stream*/) {
  return status(run_norm_backward<norm>(args, rows, parameters, host));
}

template cudaError_t step_forward<GELU>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
template cudaError_t step_forward<GELUTanh>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
template cudaError_t step_forward<SiLU>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
template cudaError_t norm_forward<Norm::layer>(const NormForward&, std::int64_t, cudaStream_t);
template cudaError_t norm_forward<Norm::rms>(const NormForward&, std::int64_t, cudaStream_t);
template cudaError_t norm_backward<Norm::layer>(
    const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);
template cudaError_t norm_backward<Norm::rms>(
    const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);

}  // namespace lomem::cuda
