// Packing of codes of 1 to 8 bits: bodies of CUDA kernels (see launch.cuh). A thread works on
// groups of eight codes, which take whole bytes.
#pragma once

#include <lomem/core/packing.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/vector.cuh>

#include <cassert>
#include <cstdint>

namespace lomem::cuda {

inline constexpr int groups_per_thread = 2;

/// Packs n codes. Codes that do not fit in `bits` bits stop the kernel with an assertion, as an
/// index out of bounds does in torch: there is no result that a caller could be given without
/// waiting for the device.
template <int bits>
struct PackBits {
  using Shared = Nothing;
  static constexpr std::int64_t block_groups = std::int64_t{groups_per_thread} * threads_per_block;

  const std::uint8_t* codes;
  std::uint8_t* packed;
  std::int64_t n;
  bool aligned;

  PackBits(const std::uint8_t* codes_, std::int64_t n_, std::uint8_t* packed_)
      : codes(codes_),
        packed(packed_),
        n(n_),
        aligned(is_aligned(codes, group_size) && is_aligned(packed, bytes_alignment<bits>)) {}

  std::int64_t blocks() const {
    return ((n + group_size - 1) / group_size + block_groups - 1) / block_groups;
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    for (int g = 0; g < groups_per_thread; ++g) {
      const std::int64_t group = block * block_groups + std::int64_t{g} * threads_per_block + thread;
      const std::int64_t begin = group * group_size;
      if (begin >= n) {
        return;
      }
      std::uint8_t* target = packed + group * bits;
      const int count = static_cast<int>(n - begin < group_size ? n - begin : group_size);
      Vector<std::uint8_t, group_size> unit{};
      if (aligned && count == group_size) {
        unit = load_vector<group_size>(codes + begin);
        store_bytes<bits>(target, pack_word<bits>(unit.values));
      } else {
        for (int j = 0; j < count; ++j) {
          unit[j] = codes[begin + j];
        }
        pack_group<bits>(unit.values, count, target);
      }
      std::uint8_t any = 0;
      for (int j = 0; j < group_size; ++j) {
        any |= unit[j];
      }
      check_fits(any);
    }
  }

 private:
  LOMEM_HOST_DEVICE static void check_fits([[maybe_unused]] std::uint8_t any) {
#if defined(__CUDA_ARCH__)
    if constexpr (bits < max_bits) {
      if (any > max_code(bits)) {
        // Not assert(): release builds keep this one.
        __assert_fail("lomem::pack_bits: every code fits in the given number of bits", __FILE__, __LINE__, "pack_bits");
      }
    }
#endif
  }
};

/// Unpacks n codes.
template <int bits>
struct UnpackBits {
  using Shared = Nothing;
  static constexpr std::int64_t block_groups = std::int64_t{groups_per_thread} * threads_per_block;

  const std::uint8_t* packed;
  std::uint8_t* codes;
  std::int64_t n;
  bool aligned;

  UnpackBits(const std::uint8_t* packed_, std::int64_t n_, std::uint8_t* codes_)
      : packed(packed_),
        codes(codes_),
        n(n_),
        aligned(is_aligned(codes, group_size) && is_aligned(packed, bytes_alignment<bits>)) {}

  std::int64_t blocks() const {
    return ((n + group_size - 1) / group_size + block_groups - 1) / block_groups;
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    for (int g = 0; g < groups_per_thread; ++g) {
      const std::int64_t group = block * block_groups + std::int64_t{g} * threads_per_block + thread;
      const std::int64_t begin = group * group_size;
      if (begin >= n) {
        return;
      }
      const std::uint8_t* source = packed + group * bits;
      const int count = static_cast<int>(n - begin < group_size ? n - begin : group_size);
      if (aligned && count == group_size) {
        const std::uint64_t word = load_bytes<bits>(source);
        Vector<std::uint8_t, group_size> unit;
        for (int j = 0; j < group_size; ++j) {
          unit[j] = unpack_word<bits>(word, j);
        }
        store_vector(codes + begin, unit);
      } else {
        unpack_group<bits>(source, count, codes + begin);
      }
    }
  }
};

}  // namespace lomem::cuda
