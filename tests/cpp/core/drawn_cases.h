// Tables of codes drawn at random, made by hand from functions whose derivatives are known, and what codes and levels
// are by the definition, in double.
#pragma once

#include <lomem/core/drawn.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "oracle.h"

namespace drawn {

/// A table and the function that it is of.
struct Case {
  const char* name;
  lomem::DrawnTable table;
  /// s of the distance d = x - origin, rounded to float32: without pieces, polynomials, float32. d may be infinite or
  /// NaN.
  double (*s)(double d);
};

/// How far s may be from the function. Taylor polynomials of degree 5 of a sine on [0, 3/8] are off by
/// (3/8)^6 / 6! / 2 < 2e-6. Horner's scheme in float32 is off by less than 12 roundings of numbers up to 1, 8e-7; three
/// roundings of q, which is below 16, move v by 3e-6, and s by a fifth of that.
inline constexpr double tolerance = 4e-6;

/// Sets the coefficients of one piece, of v^k.
template <class Coefficient>
void set_piece(lomem::DrawnTable& table, int piece, const Coefficient& coefficient) {
  for (int k = 0; k <= lomem::DrawnTable::degree; ++k) {
    table.coefficients[k][piece] = static_cast<float>(coefficient(k));
  }
}

inline double factorial(int k) {
  return std::tgamma(k + 1.0);
}

/// e^d on the left up to -4, where it jumps to 0; 5/8 on the right, where there are no pieces.
inline Case exponential() {
  Case result{"exponential", {}, [](double d) { return d > 0 ? 0.625 : d > -4 ? std::exp(d) : 0.0; }};
  result.table.sides[0] = {4, 4, 0};
  result.table.sides[1] = {0, 0, 0.625f};
  for (int p = 0; p < lomem::DrawnTable::side_pieces; ++p) {
    set_piece(result.table, p, [&](int k) { return std::exp(-p / 4.0) * std::pow(-0.25, k) / factorial(k); });
  }
  return result;
}

/// Waves, which reach both 0 and 1, on either side of 3/4, where there is a jump, and jumps 6 away from there.
inline Case waves() {
  Case result{"waves", {}, [](double d) {
                const double m = std::fabs(d);
                return !(m < 6) ? (d > 0 ? 1.0 : 0.25) : 0.5 + 0.5 * (d > 0 ? std::cos(d) : std::sin(m));
              }};
  result.table.origin = 0.75f;
  constexpr double width = 6.0 / lomem::DrawnTable::side_pieces;
  result.table.sides[0] = {6, static_cast<float>(1 / width), 0.25f};
  result.table.sides[1] = {6, static_cast<float>(1 / width), 1};
  for (int p = 0; p < lomem::DrawnTable::pieces; ++p) {
    const int place = p % lomem::DrawnTable::side_pieces;
    const double quarter = p < lomem::DrawnTable::side_pieces ? 0 : 1;
    set_piece(result.table, p, [&](int k) {
      // Derivative k of a sine is the sine k quarters of a turn further on.
      const double derivative = std::sin(place * width + (quarter + k) * std::acos(0.0));
      return (k == 0 ? 0.5 : 0) + 0.5 * derivative * std::pow(width, k) / factorial(k);
    });
  }
  return result;
}

/// Of y = |d| / (1 + |d|): 1 - y on the left, (1 - y)^2 / 2 on the right. All numbers are within the last pieces.
inline Case slow() {
  Case result{"slow", {}, [](double d) {
                const double rest = 1 / (1 + std::fabs(d));
                return std::isnan(d) ? 0 : d > 0 ? 0.5 * rest * rest : rest;
              }};
  result.table.rational = true;
  constexpr double width = 1.0 / lomem::DrawnTable::side_pieces;
  result.table.sides[0] = {1, 16, 0};
  result.table.sides[1] = {1, 16, 0};
  for (int p = 0; p < lomem::DrawnTable::side_pieces; ++p) {
    const double rest = 1 - p * width;
    set_piece(result.table, p, [&](int k) { return k == 0 ? rest : k == 1 ? -width : 0; });
    set_piece(result.table, p + lomem::DrawnTable::side_pieces, [&](int k) {
      return k == 0 ? 0.5 * rest * rest : k == 1 ? -width * rest : k == 2 ? 0.5 * width * width : 0;
    });
  }
  return result;
}

/// A step, without pieces.
inline Case step() {
  Case result{"step", {}, [](double d) { return d > 0 ? 1.0 : 0.0; }};
  result.table.origin = -1;
  result.table.sides[0] = {0, 0, 0};
  result.table.sides[1] = {0, 0, 1};
  return result;
}

inline std::vector<Case> cases() {
  return {exponential(), waves(), slow(), step()};
}

/// s of x, which is rounded to float32 first. (A difference of two float32 in double, rounded, is that in float32.)
inline double value(const Case& of, double x) {
  return of.s(static_cast<float>(double{static_cast<float>(x)} - of.table.origin));
}

/// The 16 random bits of element i: those of each block of eight elements are halves of four words, low halves first.
inline std::uint32_t random_bits(const lomem::RoundingBits& random, std::int64_t i) {
  const auto block = lomem::philox_block<7>(random.seed, static_cast<std::uint64_t>(i) / 8, random.offset);
  const std::uint64_t words[] = {block.first, block.second, block.third, block.fourth};
  return static_cast<std::uint32_t>(words[i % 8 / 2] >> (i % 2 == 0 ? 0 : 16)) & 0xffffu;
}

/// Code i of a little-endian bit stream.
inline int unpack(const std::vector<std::uint8_t>& packed, std::int64_t i, int bits) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const std::int64_t position = i * bits + b;
    code |= (packed[position / 8] >> (position % 8) & 1) << b;
  }
  return code;
}

/// Elements at and around the places where a table changes, as double.
inline std::vector<double> places(const Case& of) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  std::vector<double> result = {0.0, -0.0, infinity, -infinity, std::nan(""), 3e38, -3e38, 65504.0, 1e-45, -1e-45};
  for (int i = 0; i < 2; ++i) {
    const auto& side = of.table.sides[i];
    for (int p = 0; p <= lomem::DrawnTable::side_pieces; ++p) {
      const double m = side.density > 0 ? p / double{side.density} : 0;
      const double distance = of.table.rational ? m / (1 - m) : m;
      const auto x = static_cast<float>(of.table.origin + (i == 0 ? -distance : distance));
      result.insert(result.end(), {std::nextafter(x, -HUGE_VALF), x, std::nextafter(x, HUGE_VALF)});
    }
  }
  return result;
}

}  // namespace drawn
