// Macros used by all other headers. No includes: usable in host and device code.
#pragma once

#if defined(_WIN32)
#define LOMEM_API
#else
// The library is compiled with hidden visibility; LOMEM_API marks its interface.
#define LOMEM_API __attribute__((visibility("default")))
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LOMEM_HOST_DEVICE __host__ __device__
#elif defined(LOMEM_CPU_CAPABILITY)
// For kernels that are compiled once per instruction set: header functions must leave no symbols, because the linker
// would keep one copy and use it on all CPUs.
#define LOMEM_HOST_DEVICE __attribute__((always_inline))
#else
#define LOMEM_HOST_DEVICE
#endif

/// Precedes a loop in device code whose body indexes arrays: it must be unrolled, otherwise the arrays end up in local
/// memory. (The compiler of nvcc's host pass does not know the pragma.)
#if defined(__CUDA_ARCH__)
#define LOMEM_UNROLL _Pragma("unroll")
#else
#define LOMEM_UNROLL
#endif
