// Packing on the CPU: instantiations of core/packing.h.
#include <lomem/kernels.h>

namespace lomem::cpu {

const char* capability() {
  return "DEFAULT";
}

std::uint8_t pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed) {
  visit_bits(bits, [&](auto width) { lomem::pack<decltype(width)::value>(codes, n, packed); });
  std::uint8_t any = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    any |= codes[i];
  }
  return any;
}

void unpack_bits(const std::uint8_t* packed, std::int64_t n, int bits, std::uint8_t* codes) {
  visit_bits(bits, [&](auto width) { lomem::unpack<decltype(width)::value>(packed, n, codes); });
}

}  // namespace lomem::cpu
