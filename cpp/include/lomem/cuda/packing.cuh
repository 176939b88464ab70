// Packing of codes of 1 to 8 bits: bodies of CUDA kernels (see launch.cuh). A thread works on groups of eight codes,
// which take whole bytes.
#pragma once

#include <lomem/core/packing.h>
#include <lomem/cuda/launch.cuh>
#include <lomem/cuda/vector.cuh>

#include <cassert>
#include <cstdint>

namespace lomem::cuda {

/// How groups are distributed: neighboring threads take neighboring groups.
struct GroupGrid {
  /// Number of independent loads that a thread has in flight.
  static constexpr int groups_per_thread = 2;
  static constexpr std::int64_t block_groups = std::int64_t{groups_per_thread} * threads_per_block;
  static constexpr std::int64_t block_codes = block_groups * group_size;

  LOMEM_HOST_DEVICE static constexpr std::int64_t blocks(std::int64_t n) {
    return (n + block_codes - 1) / block_codes;
  }
  /// Index of group number `g` of a thread.
  LOMEM_HOST_DEVICE static constexpr std::int64_t group(std::int64_t block, int thread, int g) {
    return block * block_groups + g * threads_per_block + thread;
  }
  LOMEM_HOST_DEVICE static constexpr bool is_full(std::int64_t block, std::int64_t n) {
    return (block + 1) * block_codes <= n;
  }
  /// Number of codes in a group: fewer in the last one, none beyond it.
  LOMEM_HOST_DEVICE static constexpr int count(std::int64_t group, std::int64_t n) {
    const std::int64_t rest = n - group * group_size;
    return static_cast<int>(rest < 0 ? 0 : rest < group_size ? rest : group_size);
  }
};

/// Packs n codes. Codes that do not fit in `bits` bits stop the kernel with an assertion, like an index out of bounds
/// in torch: a result could only be reported to the caller by waiting for the device. (Executed on the CPU, for tests,
/// it drops the excess bits.)
template <int bits>
struct PackBits {
  using Grid = GroupGrid;
  using Shared = Nothing;

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
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    std::uint8_t any = 0;
    if (aligned && Grid::is_full(block, n)) {
      Vector<std::uint8_t, group_size> unit[Grid::groups_per_thread];
      for (int g = 0; g < Grid::groups_per_thread; ++g) {
        unit[g] = load_vector<group_size>(codes + Grid::group(block, thread, g) * group_size);
      }
      for (int g = 0; g < Grid::groups_per_thread; ++g) {
        store_bytes<bits>(packed + Grid::group(block, thread, g) * bits, pack_word<bits>(unit[g].values));
        for (int j = 0; j < group_size; ++j) {
          any |= unit[g][j];
        }
      }
    } else {
      for (int g = 0; g < Grid::groups_per_thread; ++g) {
        any |= one_by_one(Grid::group(block, thread, g));
      }
    }
    check_fits(any);
  }

 private:
  LOMEM_HOST_DEVICE std::uint8_t one_by_one(std::int64_t group) const {
    const int count = Grid::count(group, n);
    std::uint64_t word = 0;
    std::uint8_t any = 0;
    for (int j = 0; j < count; ++j) {
      const std::uint8_t code = codes[group * group_size + j];
      any |= code;
      word |= pack_word<bits>(&code, 1) << (bits * j);
    }
    for (int b = 0; b < packed_bytes(count, bits); ++b) {
      packed[group * bits + b] = static_cast<std::uint8_t>(word >> (8 * b));
    }
    return any;
  }

  LOMEM_HOST_DEVICE static void check_fits([[maybe_unused]] std::uint8_t any) {
#if defined(__CUDA_ARCH__)
    if constexpr (bits < max_bits) {
      if (any > max_code(bits)) {
        // Not assert(): this check stays in release builds.
        __assert_fail("lomem::pack_bits: every code fits in the given number of bits", __FILE__, __LINE__, "pack_bits");
      }
    }
#endif
  }
};

/// Unpacks n codes.
template <int bits>
struct UnpackBits {
  using Grid = GroupGrid;
  using Shared = Nothing;

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
    return Grid::blocks(n);
  }
  LOMEM_HOST_DEVICE void prepare(std::int64_t /*block*/, int /*thread*/, Shared&) const {}

  LOMEM_HOST_DEVICE void operator()(std::int64_t block, int thread, const Shared&) const {
    if (aligned && Grid::is_full(block, n)) {
      std::uint64_t word[Grid::groups_per_thread];
      for (int g = 0; g < Grid::groups_per_thread; ++g) {
        word[g] = load_bytes<bits>(packed + Grid::group(block, thread, g) * bits);
      }
      for (int g = 0; g < Grid::groups_per_thread; ++g) {
        Vector<std::uint8_t, group_size> unit;
        for (int j = 0; j < group_size; ++j) {
          unit[j] = unpack_word<bits>(word[g], j);
        }
        store_vector(codes + Grid::group(block, thread, g) * group_size, unit);
      }
    } else {
      for (int g = 0; g < Grid::groups_per_thread; ++g) {
        one_by_one(Grid::group(block, thread, g));
      }
    }
  }

 private:
  LOMEM_HOST_DEVICE void one_by_one(std::int64_t group) const {
    const int count = Grid::count(group, n);
    std::uint64_t word = 0;
    for (int b = 0; b < packed_bytes(count, bits); ++b) {
      word |= std::uint64_t{packed[group * bits + b]} << (8 * b);
    }
    for (int j = 0; j < count; ++j) {
      codes[group * group_size + j] = unpack_word<bits>(word, j);
    }
  }
};

}  // namespace lomem::cuda
