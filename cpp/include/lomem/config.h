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
#else
#define LOMEM_HOST_DEVICE
#endif
