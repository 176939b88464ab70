// Slow, independent versions of what the core does, from the definitions.
#pragma once

#include <lomem/core.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace oracle {

/// A 16-bit floating-point format by the widths of its fields.
struct Format {
  int exponent_bits;
  int fraction_bits;
};
inline constexpr Format bfloat16{8, 7};
inline constexpr Format float16{5, 10};

inline double decode(std::uint16_t bits, Format format) {
  const int exponent_mask = (1 << format.exponent_bits) - 1;
  const int bias = exponent_mask / 2;
  const int exponent = (bits >> format.fraction_bits) & exponent_mask;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == exponent_mask) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) {
    return sign * std::ldexp(fraction, 1 - bias - format.fraction_bits);
  }
  return sign * std::ldexp(fraction + (1 << format.fraction_bits), exponent - bias - format.fraction_bits);
}

/// x rounded once, to nearest, ties to even.
inline std::uint16_t encode(double x, Format format) {
  const int exponent_mask = (1 << format.exponent_bits) - 1;
  const int bias = exponent_mask / 2;
  const std::uint16_t infinity = static_cast<std::uint16_t>(exponent_mask << format.fraction_bits);
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    return static_cast<std::uint16_t>(sign | infinity | 1 << (format.fraction_bits - 1));
  }
  if (std::isinf(x)) {
    return static_cast<std::uint16_t>(sign | infinity);
  }
  int exponent = 0;
  std::frexp(std::fabs(x), &exponent);  // |x| in [2^(exponent-1), 2^exponent)
  const int unit = std::max(exponent - 1, 1 - bias) - format.fraction_bits;
  // nearbyint rounds ties to even. A carry into the next binade comes out right by itself.
  const double count = std::nearbyint(std::ldexp(std::fabs(x), -unit));
  const double rounded = std::ldexp(count, unit);
  if (rounded >= std::ldexp(1.0, exponent_mask - bias)) {
    return static_cast<std::uint16_t>(sign | infinity);
  }
  if (rounded < std::ldexp(1.0, 1 - bias)) {
    return static_cast<std::uint16_t>(sign | static_cast<int>(count));
  }
  std::frexp(rounded, &exponent);
  const auto fraction =
      static_cast<int>(std::ldexp(rounded, format.fraction_bits - exponent + 1)) - (1 << format.fraction_bits);
  return static_cast<std::uint16_t>(sign | (exponent - 1 + bias) << format.fraction_bits | fraction);
}

/// Code i in bits [k*i, k*i + k) of a little-endian bit stream, one bit at a time.
inline std::vector<std::uint8_t> pack(const std::vector<std::uint8_t>& codes, int bits) {
  std::vector<std::uint8_t> packed((codes.size() * bits + 7) / 8, 0);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    for (int b = 0; b < bits; ++b) {
      const std::size_t position = i * bits + b;
      packed[position / 8] |= static_cast<std::uint8_t>(((codes[i] >> b) & 1) << (position % 8));
    }
  }
  return packed;
}

/// Number of boundaries below x, from the definition; the boundaries in the precision of T.
template <class T>
int code(double x, double c1, double c2, double c3) {
  int result = 0;
  for (const double c : {c1, c2, c3}) {
    result += x > static_cast<double>(static_cast<lomem::compute_t<T>>(c)) ? 1 : 0;
  }
  return result;
}

}  // namespace oracle
