// Memory access by whole vectors of up to 16 bytes per instruction.
//
// Everything in lomem/cuda is a template for host and device, so that the bodies of kernels can be executed and tested
// without a GPU.
#pragma once

#include <lomem/config.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lomem::cuda {

/// Size of the widest load and store in bytes.
inline constexpr int max_access = 16;

/// `count` elements, aligned for the widest access that they fill.
template <class T, int count>
struct alignas(sizeof(T) * count < max_access ? sizeof(T) * count : max_access) Vector {
  static_assert((count & (count - 1)) == 0, "a vector has a power of two of elements");
  T values[count];

  LOMEM_HOST_DEVICE T& operator[](int i) {
    return values[i];
  }
  LOMEM_HOST_DEVICE const T& operator[](int i) const {
    return values[i];
  }
};

/// Whether `pointer` allows vector access, or is null.
LOMEM_HOST_DEVICE inline bool is_aligned(const void* pointer, int alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(alignment) == 0;
}

template <int bytes>
using Unsigned = std::conditional_t<
    bytes == 1, std::uint8_t,
    std::conditional_t<bytes == 2, std::uint16_t, std::conditional_t<bytes == 4, std::uint32_t, std::uint64_t>>>;

/// Precondition: `source` is aligned like Vector<T, count>.
template <int count, class T>
LOMEM_HOST_DEVICE Vector<T, count> load_vector(const T* source) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Vector<T, count>*>(source);
#else
  Vector<T, count> vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
#endif
}

/// Precondition: `target` is aligned like Vector<T, count>.
template <int count, class T>
LOMEM_HOST_DEVICE void store_vector(T* target, const Vector<T, count>& vector) {
#if defined(__CUDA_ARCH__)
  constexpr int width = alignof(Vector<T, count>);
  if constexpr (width >= 4) {
    // The intrinsic keeps the store whole, which the compiler might otherwise split into elements.
    using Word = std::conditional_t<width == max_access, uint4, std::conditional_t<width == 8, uint2, unsigned>>;
    Word words[sizeof(vector) / width];
    memcpy(words, &vector, sizeof(vector));
    for (int i = 0; i < static_cast<int>(sizeof(vector)) / width; ++i) {
      __stwb(reinterpret_cast<Word*>(target) + i, words[i]);
    }
  } else {
    *reinterpret_cast<Vector<T, count>*>(target) = vector;
  }
#else
  std::memcpy(target, &vector, sizeof(vector));
#endif
}

/// Alignment that store_bytes<bytes> and load_bytes<bytes> require: the widest access that divides `bytes`.
template <int bytes>
inline constexpr int bytes_alignment = bytes & -bytes;

/// Writes the low `bytes` = 1..8 bytes of `word`.
template <int bytes>
LOMEM_HOST_DEVICE void store_bytes(std::uint8_t* target, std::uint64_t word) {
  constexpr int width = bytes_alignment<bytes>;
  for (int b = 0; b < bytes; b += width) {
    Vector<Unsigned<width>, 1> part{{static_cast<Unsigned<width>>(word >> (8 * b))}};
#if defined(__CUDA_ARCH__)
    *reinterpret_cast<Unsigned<width>*>(target + b) = part[0];
#else
    std::memcpy(target + b, &part, width);
#endif
  }
}

/// Reads `bytes` = 1..8 bytes.
template <int bytes>
LOMEM_HOST_DEVICE std::uint64_t load_bytes(const std::uint8_t* source) {
  constexpr int width = bytes_alignment<bytes>;
  std::uint64_t word = 0;
  for (int b = 0; b < bytes; b += width) {
    Unsigned<width> part;
#if defined(__CUDA_ARCH__)
    part = *reinterpret_cast<const Unsigned<width>*>(source + b);
#else
    std::memcpy(&part, source + b, width);
#endif
    word |= static_cast<std::uint64_t>(part) << (8 * b);
  }
  return word;
}

}  // namespace lomem::cuda
