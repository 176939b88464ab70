// Arithmetic of PTX on register contents: 64 bits, of which a type uses the lower ones.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "ptx.h"

namespace emulator {

inline std::uint64_t truncated(std::uint64_t bits, int bytes) {
  return bytes >= 8 ? bits : bits & ((std::uint64_t{1} << (8 * bytes)) - 1);
}
inline std::int64_t sign_extended(std::uint64_t bits, int bytes) {
  const int shift = 64 - 8 * bytes;
  return static_cast<std::int64_t>(bits << shift) >> shift;
}

template <class F>
F decode(std::uint64_t bits);
template <>
inline float decode<float>(std::uint64_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits));
}
template <>
inline double decode<double>(std::uint64_t bits) {
  return std::bit_cast<double>(bits);
}

/// In float32 a GPU returns a single NaN pattern; in float64 it keeps the payload of an operand.
inline std::uint64_t encode(float x) {
  return std::isnan(x) ? 0x7fffffffU : std::bit_cast<std::uint32_t>(x);
}
inline std::uint64_t encode(double x) {
  return std::bit_cast<std::uint64_t>(x);
}

/// Subnormal numbers as 0, for instructions with .ftz.
template <class F>
F flushed(F x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(F{0}, x) : x;
}

std::uint16_t to_float16(float x);
float from_float16(std::uint16_t bits);
std::uint16_t to_bfloat16(float x);
float from_bfloat16(std::uint16_t bits);

template <class T>
bool compare(Comparison comparison, T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case Comparison::eq: return !unordered && a == b;
    case Comparison::ne: return !unordered && a != b;
    case Comparison::lt: return a < b;
    case Comparison::le: return a <= b;
    case Comparison::gt: return a > b;
    case Comparison::ge: return a >= b;
    case Comparison::equ: return unordered || a == b;
    case Comparison::neu: return unordered || a != b;
    case Comparison::ltu: return unordered || a < b;
    case Comparison::leu: return unordered || a <= b;
    case Comparison::gtu: return unordered || a > b;
    case Comparison::geu: return unordered || a >= b;
    case Comparison::num: return !unordered;
    case Comparison::nan: return unordered;
  }
  return false;
}

/// The result of a `cvt` instruction.
std::uint64_t convert(const Instruction& instruction, std::uint64_t bits);

using Mask = std::uint32_t;
constexpr Mask all_lanes = 0xffffffffU;

/// Calls f(lane) for the lanes of the mask.
template <class F>
void for_lanes(Mask mask, F f) {
  if (mask == all_lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      f(lane);
    }
  } else {
    for (Mask rest = mask; rest != 0; rest &= rest - 1) {
      f(std::countr_zero(rest));
    }
  }
}

/// Contents of the operands and the result of an instruction, for all lanes.
struct Operands {
  const std::uint64_t* a;
  const std::uint64_t* b;
  const std::uint64_t* c;
  const std::uint64_t* d;
};

/// Computes an instruction that reads and writes nothing but registers, and writes one: all that have a result, except
/// pack, unpack, special, selp, ld and shfl. Returns lanes that divided an integer by zero.
Mask compute(const Instruction& instruction, Mask mask, const Operands& operands, std::uint64_t* result);

}  // namespace emulator
