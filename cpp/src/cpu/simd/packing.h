// Packing and unpacking: a group of eight codes is a 64-bit word whose bytes are squeezed to `bits` bits each, or
// spread again.
#pragma once

#include <lomem/core/packing.h>

#include "vector.h"

namespace lomem::cpu {
namespace {

#if defined(__AVX512F__)  // every CPU with AVX-512 has a fast pext

constexpr std::uint64_t every_byte = 0x0101010101010101u;

/// Squeezes eight codes, one per byte, into 8 * bits bits. Bits of a code beyond the lowest `bits` are ignored.
template <int bits>
inline std::uint64_t squeeze(std::uint64_t codes) {
  return _pext_u64(codes, every_byte * max_code(bits));
}

/// The inverse of squeeze. Bits of `word` above 8 * bits are ignored.
template <int bits>
inline std::uint64_t spread(std::uint64_t word) {
  return _pdep_u64(word, every_byte * max_code(bits));
}

#else

/// Mask of the lowest `width` bits of each part of a word; parts have 2 * `half` bits.
template <int half, int width>
constexpr std::uint64_t lowest =
    ~std::uint64_t{0} / (~std::uint64_t{0} >> (64 - 2 * half)) * ((std::uint64_t{1} << width) - 1u);

/// In each such part, moves `width` bits of the upper half next to those of the lower half.
template <int half, int width>
inline std::uint64_t join(std::uint64_t x) {
  return (x & lowest<half, width>) | (x >> (half - width) & lowest<half, width> << width);
}

/// The inverse of join.
template <int half, int width>
inline std::uint64_t separate(std::uint64_t x) {
  return (x & lowest<half, width>) | (x & lowest<half, width> << width) << (half - width);
}

template <int bits>
inline std::uint64_t squeeze(std::uint64_t codes) {
  return join<32, 4 * bits>(join<16, 2 * bits>(join<8, bits>(codes)));
}

template <int bits>
inline std::uint64_t spread(std::uint64_t word) {
  return separate<8, bits>(separate<16, 2 * bits>(separate<32, 4 * bits>(word)));
}

#endif

template <int bits>
inline std::uint8_t pack_groups(const std::uint8_t* codes, std::int64_t n, std::uint8_t* packed) {
  std::uint64_t any = 0;
  std::int64_t i = 0;
  // Whole words are stored; the next group overwrites the excess bytes. The last groups are stored exactly.
  for (; i + 2 * 64 <= n; i += group_size) {
    const auto group = load<std::uint64_t>(codes + i);
    any |= group;
    const std::uint64_t word = squeeze<bits>(group);
    std::memcpy(packed + i / group_size * bits, &word, sizeof(word));
  }
  for (; i + group_size <= n; i += group_size) {
    const auto group = load<std::uint64_t>(codes + i);
    any |= group;
    const std::uint64_t word = squeeze<bits>(group);
    std::memcpy(packed + i / group_size * bits, &word, bits);
  }
  for (std::int64_t j = i; j < n; ++j) {
    any |= codes[j];
  }
  if (i < n) {
    lomem::pack_group<bits>(codes + i, static_cast<int>(n - i), packed + i / group_size * bits);
  }
  any |= any >> 32;
  any |= any >> 16;
  return static_cast<std::uint8_t>(any | any >> 8);
}

template <int bits>
inline void unpack_groups(const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
  std::int64_t i = 0;
  for (; i + 2 * 64 <= n; i += group_size) {
    const std::uint64_t group = spread<bits>(load<std::uint64_t>(packed + i / group_size * bits));
    std::memcpy(codes + i, &group, sizeof(group));
  }
  for (; i + group_size <= n; i += group_size) {
    std::uint64_t word = 0;
    std::memcpy(&word, packed + i / group_size * bits, bits);
    const std::uint64_t group = spread<bits>(word);
    std::memcpy(codes + i, &group, sizeof(group));
  }
  if (i < n) {
    lomem::unpack_group<bits>(packed + i / group_size * bits, static_cast<int>(n - i), codes + i);
  }
}

std::uint8_t pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed) {
  std::uint8_t any = 0;
  visit_bits(bits, [&](auto width) { any = pack_groups<decltype(width)::value>(codes, n, packed); });
  return any;
}

void unpack_bits(const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes) {
  visit_bits(bits, [&](auto width) { unpack_groups<decltype(width)::value>(packed, n, codes); });
}

}  // namespace
}  // namespace lomem::cpu
