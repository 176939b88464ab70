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
    if (aligned && (block + 1) * block_groups * group_size <= n) {
      Vector<std::uint8_t, group_size> unit[groups_per_thread];
      for (int g = 0; g < groups_per_thread; ++g) {
        unit[g] = load_vector<group_size>(codes + (block * block_groups + g * threads_per_block + thread) * group_size);
      }
      std::uint8_t any = 0;
      for (int g = 0; g < groups_per_thread; ++g) {
        const std::int64_t group = block * block_groups + g * threads_per_block + thread;
        store_bytes<bits>(packed + group * bits, pack_word<bits>(unit[g].values));
        for (int j = 0; j < group_size; ++j) {
          any |= unit[g][j];
        }
      }
      check_fits(any);
    } else {
      for (int g = 0; g < groups_per_thread; ++g) {
        one_by_one(block * block_groups + g * threads_per_block + thread);
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE void one_by_one(std::int64_t group) const {
    const std::int64_t begin = group * group_size;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < group_size ? n - begin : group_size);
    std::uint64_t word = 0;
    std::uint8_t any = 0;
    for (int j = 0; j < count; ++j) {
      const std::uint8_t code = codes[begin + j];
      any |= code;
      word |= pack_word<bits>(&code, 1) << (bits * j);
    }
    for (int b = 0; b < packed_bytes(count, bits); ++b) {
      packed[group * bits + b] = static_cast<std::uint8_t>(word >> (8 * b));
    }
    check_fits(any);
  }

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
    if (aligned && (block + 1) * block_groups * group_size <= n) {
      std::uint64_t word[groups_per_thread];
      for (int g = 0; g < groups_per_thread; ++g) {
        word[g] = load_bytes<bits>(packed + (block * block_groups + g * threads_per_block + thread) * bits);
      }
      for (int g = 0; g < groups_per_thread; ++g) {
        const std::int64_t group = block * block_groups + g * threads_per_block + thread;
        Vector<std::uint8_t, group_size> unit;
        for (int j = 0; j < group_size; ++j) {
          unit[j] = unpack_word<bits>(word[g], j);
        }
        store_vector(codes + group * group_size, unit);
      }
    } else {
      for (int g = 0; g < groups_per_thread; ++g) {
        one_by_one(block * block_groups + g * threads_per_block + thread);
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE void one_by_one(std::int64_t group) const {
    const std::int64_t begin = group * group_size;
    if (begin >= n) {
      return;
    }
    const int count = static_cast<int>(n - begin < group_size ? n - begin : group_size);
    std::uint64_t word = 0;
    for (int b = 0; b < packed_bytes(count, bits); ++b) {
      word |= std::uint64_t{packed[group * bits + b]} << (8 * b);
    }
    for (int j = 0; j < count; ++j) {
      codes[begin + j] = unpack_word<bits>(word, j);
    }
  }
};

}  // namespace lomem::cuda
