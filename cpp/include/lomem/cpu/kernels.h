// Kernels on plain pointers: no torch types, no allocation, no threads. The caller splits the work over threads;
// results do not depend on the split.
#pragma once

#include <lomem/config.h>
#include <lomem/core/activation.h>
#include <lomem/core/drawn.h>
#include <lomem/core/dtype.h>
#include <lomem/core/gated.h>
#include <lomem/core/mersenne.h>
#include <lomem/core/norm.h>
#include <lomem/core/storage.h>

#include <cstddef>
#include <cstdint>

namespace lomem::cpu {

/// Instruction set that the kernels use: DEFAULT (the compiler's baseline), AVX2, AVX512 or AVX512_BF16. This is the
/// best one that the CPU has; as with torch's kernels, the environment variable ATEN_CPU_CAPABILITY (default, avx2,
/// avx512) can select a lower one. All of them produce the same bytes.
LOMEM_API const char* capability();

/// Whether an output of this size should be stored past the caches, because it would not stay in them. Pass the result
/// as `stream` to the kernels that take it; results do not depend on it.
LOMEM_API bool should_stream(std::size_t output_bytes);

// Kernels that are plain functions; each has its comment in the list.
#define LOMEM_DEFAULT(value) = value
#define LOMEM_KERNEL(name, Result, parameters, arguments) LOMEM_API Result name parameters;
#include "kernels.def"
#undef LOMEM_KERNEL
#undef LOMEM_DEFAULT

/// packed[0, packed_bytes(n, 2)) = codes of x[0, n) for the published step function of an activation. Function is GELU,
/// GELUTanh or SiLU.
template <class Function>
LOMEM_API void step_encode(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed);

template <>
LOMEM_API void step_encode<GELU>(DType, const void*, std::int64_t, std::uint8_t*);
template <>
LOMEM_API void step_encode<GELUTanh>(DType, const void*, std::int64_t, std::uint8_t*);
template <>
LOMEM_API void step_encode<SiLU>(DType, const void*, std::int64_t, std::uint8_t*);

/// y[i] = Function(x[i]) by fast_forward.h and, if `packed` is not null, the codes of step_encode<Function> in the same
/// pass. Results of 16-bit types are the float32 result rounded once. Returns false and does nothing for float64 and on
/// CPUs without fused multiply-add.
template <class Function>
LOMEM_API bool fast_forward(
    DType dtype, const void* x, std::int64_t n, void* y, std::uint8_t* packed, bool stream = false);

template <>
LOMEM_API bool fast_forward<GELU>(DType, const void*, std::int64_t, void*, std::uint8_t*, bool);
template <>
LOMEM_API bool fast_forward<GELUTanh>(DType, const void*, std::int64_t, void*, std::uint8_t*, bool);
template <>
LOMEM_API bool fast_forward<SiLU>(DType, const void*, std::int64_t, void*, std::uint8_t*, bool);

/// Computes output and rstd of rows [begin, end).
template <Norm norm>
LOMEM_API void norm_forward(const NormForward& args, std::int64_t begin, std::int64_t end, bool stream = false);

template <>
LOMEM_API void norm_forward<Norm::layer>(const NormForward&, std::int64_t, std::int64_t, bool);
template <>
LOMEM_API void norm_forward<Norm::rms>(const NormForward&, std::int64_t, std::int64_t, bool);

/// Computes grad_input of rows [begin, end). Adds these rows' contributions to the weight and bias gradients to
/// grad_weight[0, cols) and grad_bias[0, cols); either may be null.
template <Norm norm>
LOMEM_API void norm_backward(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias,
    bool stream = false);

template <>
LOMEM_API void norm_backward<Norm::layer>(const NormBackward&, std::int64_t, std::int64_t, double*, double*, bool);
template <>
LOMEM_API void norm_backward<Norm::rms>(const NormBackward&, std::int64_t, std::int64_t, double*, double*, bool);

/// Index of the first of n elements whose magnitude is below `magnitude`, or -1.
LOMEM_API std::int64_t find_below(const Array& array, std::int64_t n, double magnitude);

/// Rounds n doubles into target[offset, offset + n).
LOMEM_API void store(const double* values, std::int64_t n, MutableArray target, std::int64_t offset);

}  // namespace lomem::cpu
