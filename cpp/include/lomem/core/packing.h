// k-bit codes, k = 1..8, packed into bytes.
//
// Layout: element i occupies bits [k*i, k*i + k) of a little-endian bit stream, in which bit b is bit b % 8 of
// byte b / 8. For k = 2, that is bits [2*(i%4), 2*(i%4) + 1] of byte i/4. n codes take ceil(k*n / 8) bytes; padding
// bits of the last byte are 0.
//
// Eight codes take exactly k bytes, so a group of eight starts on a byte boundary for every k: ranges that begin at a
// multiple of `group_size` can be packed and unpacked independently.
#pragma once

#include <lomem/config.h>

#include <cstdint>

namespace lomem {

inline constexpr int min_bits = 1;
inline constexpr int max_bits = 8;
inline constexpr int group_size = 8;

/// Number of bytes of `numel` packed codes. `Int` is int64_t or a symbolic integer.
template <class Int>
LOMEM_HOST_DEVICE constexpr Int packed_bytes(Int numel, int bits) {
  return (numel * bits + 7) / 8;
}

/// Largest code that fits in `bits` bits.
LOMEM_HOST_DEVICE constexpr std::uint8_t max_code(int bits) {
  return static_cast<std::uint8_t>((1u << bits) - 1u);
}

/// Bit stream of `count` <= 8 codes, with code 0 in the lowest bits. Bits of a code beyond the lowest `bits` are
/// ignored.
template <int bits>
LOMEM_HOST_DEVICE constexpr std::uint64_t pack_word(const std::uint8_t* codes, int count = group_size) {
  static_assert(min_bits <= bits && bits <= max_bits);
  std::uint64_t word = 0;
  for (int j = 0; j < count; ++j) {
    word |= static_cast<std::uint64_t>(codes[j] & max_code(bits)) << (bits * j);
  }
  return word;
}

/// Code j = 0..7 of a stream made by pack_word.
template <int bits>
LOMEM_HOST_DEVICE constexpr std::uint8_t unpack_word(std::uint64_t word, int j) {
  static_assert(min_bits <= bits && bits <= max_bits);
  return static_cast<std::uint8_t>((word >> (bits * j)) & max_code(bits));
}

/// Packs `count` <= 8 codes; writes exactly packed_bytes(count, bits) bytes. Bits of a code beyond the lowest `bits`
/// are ignored.
template <int bits>
LOMEM_HOST_DEVICE constexpr void pack_group(const std::uint8_t* codes, int count, std::uint8_t* packed) {
  const std::uint64_t word = pack_word<bits>(codes, count);
  const int bytes = packed_bytes(count, bits);
  for (int b = 0; b < bytes; ++b) {
    packed[b] = static_cast<std::uint8_t>(word >> (8 * b));
  }
}

/// Packs four 2-bit codes into one byte.
LOMEM_HOST_DEVICE constexpr std::uint8_t pack2(std::uint8_t c0, std::uint8_t c1, std::uint8_t c2, std::uint8_t c3) {
  return static_cast<std::uint8_t>((c0 & 3u) | (c1 & 3u) << 2 | (c2 & 3u) << 4 | (c3 & 3u) << 6);
}

/// Code j = 0..3 of a byte of 2-bit codes.
LOMEM_HOST_DEVICE constexpr std::uint8_t unpack2(std::uint8_t packed, int j) {
  return static_cast<std::uint8_t>((packed >> (2 * j)) & 3u);
}

/// Unpacks `count` <= 8 codes; reads exactly packed_bytes(count, bits) bytes.
template <int bits>
LOMEM_HOST_DEVICE constexpr void unpack_group(const std::uint8_t* packed, int count, std::uint8_t* codes) {
  const int bytes = packed_bytes(count, bits);
  std::uint64_t word = 0;
  for (int b = 0; b < bytes; ++b) {
    word |= static_cast<std::uint64_t>(packed[b]) << (8 * b);
  }
  for (int j = 0; j < count; ++j) {
    codes[j] = unpack_word<bits>(word, j);
  }
}

/// Packs n codes into packed_bytes(n, bits) bytes.
template <int bits>
LOMEM_HOST_DEVICE constexpr void pack(const std::uint8_t* codes, std::int64_t n, std::uint8_t* packed) {
  std::int64_t i = 0;
  if constexpr (bits == 2) {
    for (; i + 4 <= n; i += 4) {
      packed[i / 4] = pack2(codes[i], codes[i + 1], codes[i + 2], codes[i + 3]);
    }
  } else {
    for (; i + group_size <= n; i += group_size) {
      pack_group<bits>(codes + i, group_size, packed + i / group_size * bits);
    }
  }
  if (i < n) {
    pack_group<bits>(codes + i, static_cast<int>(n - i), packed + i * bits / 8);
  }
}

/// Unpacks n codes from packed_bytes(n, bits) bytes.
template <int bits>
LOMEM_HOST_DEVICE constexpr void unpack(const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
  std::int64_t i = 0;
  if constexpr (bits == 2) {
    for (; i + 4 <= n; i += 4) {
      for (int j = 0; j < 4; ++j) {
        codes[i + j] = unpack2(packed[i / 4], j);
      }
    }
  } else {
    for (; i + group_size <= n; i += group_size) {
      unpack_group<bits>(packed + i / group_size * bits, group_size, codes + i);
    }
  }
  if (i < n) {
    unpack_group<bits>(packed + i * bits / 8, static_cast<int>(n - i), codes + i);
  }
}

/// A number of bits as a type, so that a run-time value can select a template.
template <int bits_>
struct Bits {
  static constexpr int value = bits_;
};

/// Calls visitor(Bits<bits>{}). Precondition: bits in [1, 8]. Host only: it selects template instantiations, including
/// kernels.
template <class Visitor>
constexpr decltype(auto) visit_bits(int bits, Visitor&& visitor) {
  switch (bits) {
    case 1: return visitor(Bits<1>{});
    case 2: return visitor(Bits<2>{});
    case 3: return visitor(Bits<3>{});
    case 4: return visitor(Bits<4>{});
    case 5: return visitor(Bits<5>{});
    case 6: return visitor(Bits<6>{});
    case 7: return visitor(Bits<7>{});
    default: return visitor(Bits<8>{});
  }
}

}  // namespace lomem
