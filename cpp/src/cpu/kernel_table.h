// The kernels of one instruction set. There is one table per instruction set that the compiler supports; the one to use
// is chosen at run time (kernels.cpp).
#pragma once

#include <lomem/core/drawn.h>
#include <lomem/core/dtype.h>
#include <lomem/core/gated.h>
#include <lomem/core/mersenne.h>
#include <lomem/core/norm.h>
#include <lomem/core/storage.h>

#include <cstdint>

namespace lomem::cpu {

/// Pointers to the kernels that kernels.h declares. With `stream`, stores bypass the caches.
struct KernelTable {
  using Encode = void (*)(DType, const void* x, std::int64_t n, std::uint8_t* packed);
  /// Null if the instruction set has no fused multiply-add. `packed` may be null. Not for float64.
  using FastForward = void (*)(DType, const void* x, std::int64_t n, void* y, std::uint8_t* packed, bool stream);
  using NormForwardRows = void (*)(const NormForward&, std::int64_t begin, std::int64_t end, bool stream);
  using NormBackwardRows = void (*)(
      const NormBackward&, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias, bool stream);

  /// For an activation whose values can be computed together with the codes of its published step function.
  struct Fused {
    Encode encode;
    FastForward fast_forward;
  };

  const char* capability;
  Fused gelu;
  Fused gelu_tanh;
  Fused silu;
#define LOMEM_DEFAULT(value)
#define LOMEM_KERNEL(name, Result, parameters, arguments) Result(*name) parameters;
#include <lomem/cpu/kernels.def>
#undef LOMEM_KERNEL
#undef LOMEM_DEFAULT
  NormForwardRows layer_norm_forward;
  NormForwardRows rms_norm_forward;
  NormBackwardRows layer_norm_backward;
  NormBackwardRows rms_norm_backward;
};

extern const KernelTable default_kernels;
#if defined(LOMEM_X86_KERNELS)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const KernelTable avx512_bf16_kernels;
#endif

/// Tables that this CPU can run, best first, terminated by null.
const KernelTable* const* runnable_kernels();

/// The table in use: the best one, or the one that ATEN_CPU_CAPABILITY selects.
const KernelTable& kernels();

}  // namespace lomem::cpu
