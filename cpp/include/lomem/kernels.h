// Kernels on plain pointers: no torch types, no allocation, no threads of their own. A caller
// splits the work over threads; results do not depend on the split.
#pragma once

#include <lomem/config.h>
#include <lomem/core/dtype.h>
#include <lomem/core/norm.h>
#include <lomem/core/step.h>

#include <cstdint>

namespace lomem::cpu {

/// Instruction set that the kernels run with, by ATen's names: "DEFAULT" is the compiler's baseline.
LOMEM_API const char* capability();

/// packed[0, packed_bytes(n, Step::bits)) = codes of x[0, n). Step is ReGELU2 or ReSiLU2.
template <class Step>
LOMEM_API void step_encode(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed);

extern template void step_encode<ReGELU2>(DType, const void*, std::int64_t, std::uint8_t*);
extern template void step_encode<ReSiLU2>(DType, const void*, std::int64_t, std::uint8_t*);

/// grad_input[i] = grad_output[i] * levels[code i] for i in [0, n). `levels` has 2^bits entries,
/// of which each is rounded once to the arithmetic type of `dtype`. bits = 1..8.
LOMEM_API void step_decode_multiply(
    DType dtype, const void* grad_output, const std::uint8_t* packed, const double* levels, int bits, std::int64_t n,
    void* grad_input);

/// Packs n codes of `bits` = 1..8 bits. Returns the bitwise or of all codes, so that a caller can
/// refuse codes that do not fit.
LOMEM_API std::uint8_t pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed);

/// Unpacks n codes of `bits` = 1..8 bits.
LOMEM_API void unpack_bits(const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes);

/// output and rstd of rows [begin, end).
template <Norm norm>
LOMEM_API void norm_forward(const NormForward& args, std::int64_t begin, std::int64_t end);

extern template void norm_forward<Norm::layer>(const NormForward&, std::int64_t, std::int64_t);
extern template void norm_forward<Norm::rms>(const NormForward&, std::int64_t, std::int64_t);

/// grad_input of rows [begin, end). Adds the rows' share of the weight and bias gradients to
/// grad_weight[0, cols) and grad_bias[0, cols); either may be null.
template <Norm norm>
LOMEM_API void norm_backward(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias);

extern template void norm_backward<Norm::layer>(const NormBackward&, std::int64_t, std::int64_t, double*, double*);
extern template void norm_backward<Norm::rms>(const NormBackward&, std::int64_t, std::int64_t, double*, double*);

/// Index of the first of n elements that is below `magnitude` in absolute value, or -1.
LOMEM_API std::int64_t find_below(const Array& array, std::int64_t n, double magnitude);

/// Rounds n doubles into target[offset, offset + n).
LOMEM_API void store(const double* values, std::int64_t n, MutableArray target, std::int64_t offset);

}  // namespace lomem::cpu
