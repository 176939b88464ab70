// Storage in groups: codes and scales of elements, and elements of codes and scales.
#pragma once

#include <lomem/core/storage.h>

#include "vector.h"

namespace lomem::cpu {
namespace {

void group_encode(
    DType dtype, const void* x, std::int64_t first, std::int64_t n, const GroupFormat& format,
    const GroupRandom* random, std::uint8_t* codes, bfloat16* scales, bool /*stream*/) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    visit_group_bits(format.bits, [&](auto width) {
      constexpr int bits = decltype(width)::value;
      for (std::int64_t begin = 0; begin < n; begin += format.group) {
        const std::int64_t count = n - begin < format.group ? n - begin : format.group;
        *scales++ = encode_group<bits>(
            static_cast<const T*>(x) + begin, first + begin, count, random, codes + begin * bits / 8);
      }
    });
  });
}

void group_decode(
    DType dtype, const std::uint8_t* codes, const bfloat16* scales, std::int64_t n, const GroupFormat& format, void* y,
    bool /*stream*/) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    visit_group_bits(format.bits, [&](auto width) {
      constexpr int bits = decltype(width)::value;
      for (std::int64_t begin = 0; begin < n; begin += format.group) {
        const std::int64_t count = n - begin < format.group ? n - begin : format.group;
        decode_group<bits>(codes + begin * bits / 8, count, *scales++, static_cast<T*>(y) + begin);
      }
    });
  });
}

}  // namespace
}  // namespace lomem::cpu
