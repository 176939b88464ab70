// Macros that every other header needs. No includes: usable from host and device code.
#pragma once

#if defined(_WIN32)
#define LOMEM_API
#else
// The library is compiled with hidden visibility; what is marked LOMEM_API is its interface.
#define LOMEM_API __attribute__((visibility("default")))
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LOMEM_HOST_DEVICE __host__ __device__
#elif defined(LOMEM_CPU_CAPABILITY)
// Kernels that are compiled once for each instruction set: no symbol of a function in a header may be
// left, of which the linker would keep one for all CPUs.
#define LOMEM_HOST_DEVICE __attribute__((always_inline))
#else
#define LOMEM_HOST_DEVICE
#endif

/// Before a loop of device code whose body indexes arrays: unrolled for certain, else these lie in memory.
/// (The compiler of nvcc's host pass does not know the pragma.)
#if defined(__CUDA_ARCH__)
#define LOMEM_UNROLL _Pragma("unroll")
#else
#define LOMEM_UNROLL
#endif
