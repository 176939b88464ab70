// The mixing function behind all random numbers of this folder: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014,
// with Stafford's 13th set of constants), a bijection of 64-bit words that turns a counter into random words.
#pragma once

#include <cstdint>

namespace lomem::detail {

/// x ^= x >> shift, then x *= multiplier.
struct MixStep {
  int shift;
  uint64_t multiplier;
};
constexpr MixStep mix_steps[] = {{30, 0xbf58476d1ce4e5b9}, {27, 0x94d049bb133111eb}, {31, 1}};

/// The golden ratio as an odd fraction of 2^64: its multiples are evenly spread.
constexpr uint64_t golden_step = 0x9e3779b97f4a7c15;

constexpr uint64_t mix(uint64_t word) {
  for (const auto& [shift, multiplier] : mix_steps) {
    word = (word ^ (word >> shift)) * multiplier;
  }
  return word;
}

}  // namespace lomem::detail
