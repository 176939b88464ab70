// CUDA kernels on plain device pointers: no torch types, no allocation. Each call enqueues work on `stream`, which
// belongs to the current device, and returns without waiting.
#pragma once

#include <lomem/config.h>
#include <lomem/core/activation.h>
#include <lomem/core/drawn.h>
#include <lomem/core/dtype.h>
#include <lomem/core/gated.h>
#include <lomem/core/norm.h>
#include <lomem/core/storage.h>

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lomem::cuda {

/// Architectures that the kernels were compiled for, in the notation of TORCH_CUDA_ARCH_LIST: "8.0 9.0+PTX".
LOMEM_API const char* compiled_archs();

/// output = Function(input) and the packed codes of its published step function, for n elements. Function is GELU,
/// GELUTanh or SiLU.
template <class Function>
LOMEM_API cudaError_t
step_forward(DType dtype, const void* input, std::int64_t n, void* output, std::uint8_t* codes, cudaStream_t stream);

extern template cudaError_t step_forward<GELU>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
extern template cudaError_t step_forward<GELUTanh>(
    DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);
extern template cudaError_t step_forward<SiLU>(DType, const void*, std::int64_t, void*, std::uint8_t*, cudaStream_t);

/// Codes of n elements among 2^bits - 1 ascending boundaries in host memory, each rounded once to the arithmetic type
/// of `dtype`. bits = 1..8.
LOMEM_API cudaError_t step_encode(
    DType dtype, const void* input, std::int64_t n, const double* boundaries, int bits, std::uint8_t* codes,
    cudaStream_t stream);

/// One-bit codes: whether low <= x <= high.
LOMEM_API cudaError_t band_encode(
    DType dtype, const void* input, std::int64_t n, double low, double high, std::uint8_t* codes, cudaStream_t stream);

/// grad_input[i] = grad_output[i] * levels[code i] for i in [0, n). `levels`, in host memory, has 2^bits entries, each
/// rounded once to the arithmetic type of `dtype`. bits = 1..8; with one bit, a level of 0 gives 0 for every gradient.
LOMEM_API cudaError_t step_backward(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const double* levels, int bits, std::int64_t n,
    void* grad_input, cudaStream_t stream);

/// Codes drawn at random, as lomem::drawn_encode (core/drawn.h). `table` is in host memory, `seed` in device memory.
/// bits = 1..8.
LOMEM_API cudaError_t drawn_encode(
    DType dtype, const DrawnTable& table, const void* x, std::int64_t n, int bits, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, cudaStream_t stream);

/// Gradients from such codes, as drawn_decode_multiply. `levels` are rounded once to the arithmetic type of `dtype`.
LOMEM_API cudaError_t drawn_backward(
    DType dtype, const void* grad_output, const std::uint8_t* codes, const DrawnLevels<double>& levels, int bits,
    std::int64_t n, const std::int64_t* seed, std::uint64_t offset, void* grad_input, cudaStream_t stream);

/// product[i] = x[i] * (bit i of mask ? scale : 0) for n elements. `scale` is rounded once to the arithmetic type of
/// `dtype`.
LOMEM_API cudaError_t mask_multiply(
    DType dtype, const void* x, const std::uint8_t* mask, double scale, std::int64_t n, void* product,
    cudaStream_t stream);

/// The same with the mask of a seed in device memory (core/dropout.h).
LOMEM_API cudaError_t seed_multiply(
    DType dtype, const void* x, const std::int64_t* seed, std::uint32_t bound, double scale, std::int64_t n,
    void* product, cudaStream_t stream);

/// output = activation(gate) * up, contiguous. The activation is rounded to the dtype before the product.
LOMEM_API cudaError_t gated_forward(const GatedOperands& operands, void* output, cudaStream_t stream);

/// Writes the gradients that are not null, and the result of gated_forward, bit for bit, if its pointer is not null.
/// `grad_output` is contiguous.
LOMEM_API cudaError_t gated_backward(
    const GatedOperands& operands, const void* grad_output, const GatedGradients& gradients, cudaStream_t stream);

/// Packs n codes of `bits` = 1..8 bits. A code that does not fit stops the kernel with a device-side assertion.
LOMEM_API cudaError_t
pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed, cudaStream_t stream);

/// Unpacks n codes of `bits` = 1..8 bits.
LOMEM_API cudaError_t
unpack_bits(const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes, cudaStream_t stream);

/// Codes and scales of n elements in groups, as encode_group (core/storage.h). `seed` is in device memory; without one,
/// rounded to nearest.
LOMEM_API cudaError_t group_encode(
    DType dtype, const void* x, std::int64_t n, const GroupFormat& format, const std::int64_t* seed,
    std::uint64_t offset, std::uint8_t* codes, bfloat16* scales, cudaStream_t stream);

/// y[0, n) of codes and scales, as decode_group. With `seed`, that of the codes, dither is subtracted.
LOMEM_API cudaError_t group_decode(
    DType dtype, const std::uint8_t* codes, const bfloat16* scales, std::int64_t n, const GroupFormat& format,
    const std::int64_t* seed, std::uint64_t offset, void* y, cudaStream_t stream);

/// Computes output and rstd of `rows` rows. RMSNorm has no bias: with one, nothing is computed and the result is
/// cudaErrorInvalidValue, here and in norm_backward.
template <Norm norm>
LOMEM_API cudaError_t norm_forward(const NormForward& args, std::int64_t rows, cudaStream_t stream);

extern template cudaError_t norm_forward<Norm::layer>(const NormForward&, std::int64_t, cudaStream_t);
extern template cudaError_t norm_forward<Norm::rms>(const NormForward&, std::int64_t, cudaStream_t);

struct NormParameterGradients;  // norm_plan.h

/// Number of bytes of workspace that norm_backward needs on the current device for exactly these arguments.
LOMEM_API std::int64_t norm_backward_workspace(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters);

/// Computes grad_input of `rows` rows and the gradients of weight and bias. A weight too small to divide by makes all
/// of grad_input NaN: see norm_inverse.
template <Norm norm>
LOMEM_API cudaError_t norm_backward(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, cudaStream_t stream);

extern template cudaError_t norm_backward<Norm::layer>(
    const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);
extern template cudaError_t norm_backward<Norm::rms>(
    const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);

}  // namespace lomem::cuda
