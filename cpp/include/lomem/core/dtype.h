// Floating-point element types, their arithmetic types and conversions between them.
#pragma once

#include <lomem/config.h>

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// In device code, outside constant expressions, conversions use the hardware's instructions: one where the portable
// form takes ten. Both round to nearest even; they differ only in the bits of a NaN.
#if defined(__CUDA_ARCH__)
#define LOMEM_CONVERT_IN_HARDWARE(result)   \
  if (!__builtin_is_constant_evaluated()) { \
    return result;                          \
  }
#else
#define LOMEM_CONVERT_IN_HARDWARE(result)
#endif

namespace lomem {

/// The element types that every kernel accepts.
enum class DType : std::uint8_t { float64, float32, bfloat16, float16 };

/// A 16-bit element as stored. Arithmetic happens after `to_compute`. Pointers to CUDA's __half and __nv_bfloat16, or
/// to c10's types, may be cast to pointers to these types: the bits are the same.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

/// Type in which elements are compared and multiplied: double for double, float for all others.
template <class T>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute_type<T>::type;

LOMEM_HOST_DEVICE constexpr std::size_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

/// Smallest normal number. Smaller numbers lose precision.
LOMEM_HOST_DEVICE constexpr double smallest_normal(DType dtype) {
  return dtype == DType::float64 ? 0x1p-1022 : dtype == DType::float16 ? 0x1p-14 : 0x1p-126;
}

/// An element type as a value, so that a runtime dtype can select a template.
template <class T>
struct Type {
  using type = T;
};

/// Calls visitor(Type<T>{}) with the element type of `dtype`. Host only, like visit_bits.
template <class Visitor>
constexpr decltype(auto) visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::float64: return visitor(Type<double>{});
    case DType::float32: return visitor(Type<float>{});
    case DType::bfloat16: return visitor(Type<bfloat16>{});
    default: return visitor(Type<float16>{});
  }
}

/// A row-major array whose element type is known at run time.
struct Array {
  const void* data = nullptr;
  DType dtype = DType::float32;
};
struct MutableArray {
  void* data = nullptr;
  DType dtype = DType::float32;
};

/// Exact upcasts.
LOMEM_HOST_DEVICE constexpr double to_compute(double x) {
  return x;
}
LOMEM_HOST_DEVICE constexpr float to_compute(float x) {
  return x;
}
LOMEM_HOST_DEVICE constexpr float to_compute(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}
LOMEM_HOST_DEVICE constexpr float to_compute(float16 x) {
  LOMEM_CONVERT_IN_HARDWARE(__half2float(__ushort_as_half(x.bits)))
  // Selects instead of branches, so that loops vectorize; integer operations, so that flush-to-zero modes cannot affect
  // subnormal inputs.
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  constexpr std::uint32_t rebias = (127u - 15u) << 23;
  const std::uint32_t subnormal =
      __builtin_bit_cast(std::uint32_t, static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  const std::uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  return __builtin_bit_cast(float, sign | (magnitude < 0x0400u ? subnormal : normal));
}

/// Rounds once, to nearest even. NaN stays NaN and keeps its sign and as much of its payload as fits, like the x86 and
/// Arm instructions.
template <class T>
LOMEM_HOST_DEVICE constexpr T from_compute(compute_t<T> x);

template <>
LOMEM_HOST_DEVICE constexpr double from_compute<double>(double x) {
  return x;
}
template <>
LOMEM_HOST_DEVICE constexpr float from_compute<float>(float x) {
  return x;
}
template <>
LOMEM_HOST_DEVICE constexpr bfloat16 from_compute<bfloat16>(float x) {
  LOMEM_CONVERT_IN_HARDWARE(bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))})
  const std::uint32_t u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return bfloat16{static_cast<std::uint16_t>(nan ? (u >> 16) | 0x0040u : rounded)};
}
template <>
LOMEM_HOST_DEVICE constexpr float16 from_compute<float16>(float x) {
  LOMEM_CONVERT_IN_HARDWARE(float16{__half_as_ushort(__float2half_rn(x))})
  const std::uint32_t u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  // Below 2^-14 the result counts units of 2^-24, the spacing of floats in [0.5, 1): adding 0.5 rounds to that spacing.
  // (Above 2^-14 this result is not selected; its input is clamped there to keep the sum finite.)
  const std::uint32_t small = magnitude < 0x38800000u ? magnitude : 0u;
  const std::uint32_t subnormal =
      __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, small) + 0.5f) - 0x3f000000u;
  constexpr std::uint32_t rebias = (127u - 15u) << 23;
  const std::uint32_t normal = (magnitude - rebias + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x03ffu) : 0x7c00u;
  return float16{static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
}

/// Rounds a double to T once. Going through float would round 16-bit types twice.
template <class T>
LOMEM_HOST_DEVICE constexpr T from_double(double x) {
  if constexpr (sizeof(T) >= sizeof(float)) {
    return static_cast<T>(x);
  } else {
    // First round to 14 significant bits by rounding to odd: towards zero, with the last bit set if the result is
    // inexact. That bit tells the second rounding on which side of a tie x was. 14 bits are exact in float down to half
    // the smallest subnormal of either type, and integer operations vectorize.
    constexpr std::uint64_t dropped = (std::uint64_t{1} << (52 - 13)) - 1;
    const std::uint64_t u = __builtin_bit_cast(std::uint64_t, x);
    const std::uint64_t odd = (u | ((u & dropped) + dropped)) & ~dropped;
    return from_compute<T>(static_cast<float>(__builtin_bit_cast(double, odd)));
  }
}

/// The largest value of a 16-bit T that is not above x. For every t of type T, t > x if and only if
/// t > largest_not_above(x).
template <class T>
LOMEM_HOST_DEVICE constexpr T largest_not_above(float x) {
  const T nearest = from_compute<T>(x);
  if (!(to_compute(nearest) > x)) {
    return nearest;
  }
  const bool negative = (nearest.bits & 0x8000u) != 0;
  const bool zero = (nearest.bits & 0x7fffu) == 0;
  return T{static_cast<std::uint16_t>(zero ? 0x8001u : negative ? nearest.bits + 1u : nearest.bits - 1u)};
}

}  // namespace lomem
