// Selects the kernels, and defines small ones that do not depend on the instruction set.
#include <lomem/cpu/kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#include "kernel_table.h"

#if defined(LOMEM_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace lomem::cpu {
namespace {

#if defined(LOMEM_X86_KERNELS)
/// (Not every Clang knows __builtin_cpu_supports("f16c").)
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

struct Runnable {
  const KernelTable* tables[5] = {};

  Runnable() {
    int count = 0;
#if defined(LOMEM_X86_KERNELS)
    __builtin_cpu_init();
    if (has_avx512_bf16()) {
      tables[count++] = &avx512_bf16_kernels;
    }
    if (has_avx512()) {
      tables[count++] = &avx512_kernels;
    }
    if (has_avx2()) {
      tables[count++] = &avx2_kernels;
    }
#endif
    tables[count] = &default_kernels;
  }
};

/// The best table or, if ATEN_CPU_CAPABILITY names a lower one, the best up to that one, as torch does for its own
/// kernels.
const KernelTable& choose() {
  const KernelTable* const* table = runnable_kernels();
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view wanted = variable == nullptr ? "" : variable;
  if (wanted == "default") {
    return default_kernels;
  }
#if defined(LOMEM_X86_KERNELS)
  if (wanted == "avx2") {
    while (*table != &avx2_kernels && *table != &default_kernels) {
      ++table;
    }
  }
#endif
  return **table;
}

/// Cache size as reported by the system, in bytes; 0 if it reports none. (sysconf may report the sum over all sockets.)
std::size_t read_cache_bytes() {
#if defined(__linux__)
  std::size_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    std::size_t size = 0;
    char unit = ' ';
    if (file >> size) {
      file >> unit;
      largest = std::max(largest, size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0));
    }
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (largest == 0) {
    largest = static_cast<std::size_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
  }
#endif
  return largest;
#else
  return 0;
#endif
}

bool run(
    KernelTable::FastForward kernel, DType dtype, const void* x, std::int64_t n, void* y, std::uint8_t* packed,
    bool stream) {
  if (kernel == nullptr || dtype == DType::float64) {
    return false;
  }
  kernel(dtype, x, n, y, packed, stream);
  return true;
}

}  // namespace

const KernelTable* const* runnable_kernels() {
  static const Runnable runnable;
  return runnable.tables;
}

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

const char* capability() {
  return kernels().capability;
}

bool should_stream(std::size_t output_bytes) {
  constexpr std::size_t usual = std::size_t{32} << 20;
  static const std::size_t cache = [] {
    const std::size_t bytes = read_cache_bytes();
    return bytes == 0 ? usual : bytes;
  }();
  return output_bytes > cache;
}

#define LOMEM_DEFAULT(value)
#define LOMEM_KERNEL(name, Result, parameters, arguments) \
  Result name parameters {                                \
    return kernels().name arguments;                      \
  }
#include <lomem/cpu/kernels.def>
#undef LOMEM_KERNEL
#undef LOMEM_DEFAULT

template <>
LOMEM_API void step_encode<GELU>(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed) {
  kernels().gelu.encode(dtype, x, n, packed);
}

template <>
LOMEM_API void step_encode<GELUTanh>(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed) {
  kernels().gelu_tanh.encode(dtype, x, n, packed);
}

template <>
LOMEM_API void step_encode<SiLU>(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed) {
  kernels().silu.encode(dtype, x, n, packed);
}

template <>
LOMEM_API bool fast_forward<GELU>(
    DType dtype, const void* x, std::int64_t n, void* y, std::uint8_t* packed, bool stream) {
  return run(kernels().gelu.fast_forward, dtype, x, n, y, packed, stream);
}

template <>
LOMEM_API bool fast_forward<GELUTanh>(
    DType dtype, const void* x, std::int64_t n, void* y, std::uint8_t* packed, bool stream) {
  return run(kernels().gelu_tanh.fast_forward, dtype, x, n, y, packed, stream);
}

template <>
LOMEM_API bool fast_forward<SiLU>(
    DType dtype, const void* x, std::int64_t n, void* y, std::uint8_t* packed, bool stream) {
  return run(kernels().silu.fast_forward, dtype, x, n, y, packed, stream);
}

template <>
LOMEM_API void norm_forward<Norm::layer>(const NormForward& args, std::int64_t begin, std::int64_t end, bool stream) {
  kernels().layer_norm_forward(args, begin, end, stream);
}

template <>
LOMEM_API void norm_forward<Norm::rms>(const NormForward& args, std::int64_t begin, std::int64_t end, bool stream) {
  kernels().rms_norm_forward(args, begin, end, stream);
}

template <>
LOMEM_API void norm_backward<Norm::layer>(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias,
    bool stream) {
  kernels().layer_norm_backward(args, begin, end, grad_weight, grad_bias, stream);
}

template <>
LOMEM_API void norm_backward<Norm::rms>(
    const NormBackward& args, std::int64_t begin, std::int64_t end, double* grad_weight, double* grad_bias,
    bool stream) {
  kernels().rms_norm_backward(args, begin, end, grad_weight, grad_bias, stream);
}

std::int64_t find_below(const Array& array, std::int64_t n, double magnitude) {
  std::int64_t found = -1;
  visit_dtype(array.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const T* first = static_cast<const T*>(array.data);
    const T* small = std::find_if(first, first + n, [&](T x) { return std::fabs(to_compute(x)) < magnitude; });
    found = small == first + n ? -1 : small - first;
  });
  return found;
}

void store(const double* values, std::int64_t n, MutableArray target, std::int64_t offset) {
  visit_dtype(target.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    T* destination = static_cast<T*>(target.data) + offset;
    for (std::int64_t j = 0; j < n; ++j) {
      destination[j] = from_double<T>(values[j]);
    }
  });
}

}  // namespace lomem::cpu
