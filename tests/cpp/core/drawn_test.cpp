// Codes drawn at random against their definition in double.
#include <gtest/gtest.h>
#include <lomem/core/drawn.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "drawn_cases.h"
#include "elements.h"

namespace {

using lomem::DrawnTable;
using lomem::RoundingBits;

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Places where the tables change, and random elements of every size.
std::vector<double> elements_of(const drawn::Case& of) {
  std::vector<double> result = drawn::places(of);
  std::mt19937 generator(1);
  std::normal_distribution<double> normal(0, 3);
  for (int i = 0; i < 50000; ++i) {
    result.push_back(static_cast<float>(normal(generator)));
    result.push_back(std::ldexp(normal(generator), i % 120 - 60));
  }
  return result;
}

TEST(Drawn, Values) {
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    for (const double x : elements_of(of)) {
      const float s = lomem::drawn_value(of.table, static_cast<float>(x));
      ASSERT_GE(s, 0.0f) << x;
      ASSERT_LE(s, 1.0f) << x;
      ASSERT_NEAR(s, drawn::value(of, x), drawn::tolerance) << x;
    }
  }
}

/// Bounds and origins belong to one side: to the smaller distance there is a piece, to the bound itself none.
TEST(Drawn, Jumps) {
  const DrawnTable exponential = drawn::exponential().table;
  EXPECT_EQ(lomem::drawn_value(exponential, -4.0f), 0.0f);
  EXPECT_NEAR(lomem::drawn_value(exponential, std::nextafter(-4.0f, 0.0f)), std::exp(-4.0), drawn::tolerance);
  EXPECT_EQ(lomem::drawn_value(exponential, 0.0f), 1.0f);
  EXPECT_EQ(lomem::drawn_value(exponential, -0.0f), 1.0f);
  EXPECT_EQ(lomem::drawn_value(exponential, std::numeric_limits<float>::denorm_min()), 0.625f);
  const DrawnTable waves = drawn::waves().table;
  EXPECT_EQ(lomem::drawn_value(waves, 0.75f), 0.5f);
  EXPECT_EQ(lomem::drawn_value(waves, std::nextafter(0.75f, 1.0f)), 1.0f);
  EXPECT_EQ(lomem::drawn_value(waves, 6.75f), 1.0f);
  EXPECT_EQ(lomem::drawn_value(waves, -5.25f), 0.25f);
  EXPECT_NEAR(lomem::drawn_value(waves, std::nextafter(-5.25f, 0.0f)), 0.5 + 0.5 * std::sin(6.0), drawn::tolerance);
}

/// NaN is on the left, beyond all pieces.
TEST(Drawn, SpecialValues) {
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    const auto value = [&](double x) { return lomem::drawn_value(of.table, static_cast<float>(x)); };
    EXPECT_EQ(value(std::nan("")), of.table.sides[0].beyond);
    EXPECT_EQ(value(-std::nan("")), of.table.sides[0].beyond);
    EXPECT_EQ(value(-infinity), of.table.sides[0].beyond);
    EXPECT_EQ(value(infinity), of.table.sides[1].beyond);
    EXPECT_EQ(value(std::numeric_limits<float>::max()), of.table.sides[1].beyond);
    EXPECT_EQ(value(std::numeric_limits<float>::lowest()), of.table.sides[0].beyond);
  }
}

/// The piece, and how far along it, of distances that float32 can tell apart from all others.
TEST(Drawn, Places) {
  const DrawnTable table = drawn::exponential().table;  // pieces of 1/4
  for (int p = 0; p < DrawnTable::side_pieces; ++p) {
    for (const float v : {0.0f, 0.5f, 1 - 0x1p-19f}) {
      const auto place = lomem::drawn_place(table, -(static_cast<float>(p) + v) / 4);
      EXPECT_EQ(place.piece, p);
      EXPECT_EQ(place.v, v);
      EXPECT_EQ(place.side, 0);
      EXPECT_FALSE(place.beyond);
    }
  }
  const DrawnTable slow = drawn::slow().table;  // pieces of 1/16 of m / (1 + m)
  for (const float x : {1.0f, 3.0f, 7.0f}) {
    const auto right = lomem::drawn_place(slow, x);
    EXPECT_EQ(right.piece, DrawnTable::side_pieces + static_cast<int>(16 * x / (1 + x)));
    EXPECT_EQ(right.side, 1);
    EXPECT_EQ(lomem::drawn_place(slow, -x).piece, static_cast<int>(16 * x / (1 + x)));
    EXPECT_EQ(right.v, 0.0f);
  }
  for (const drawn::Case& of : drawn::cases()) {
    for (const double x : elements_of(of)) {
      const auto place = lomem::drawn_place(of.table, static_cast<float>(x));
      ASSERT_GE(place.piece, place.side * DrawnTable::side_pieces);
      ASSERT_LT(place.piece, (place.side + 1) * DrawnTable::side_pieces);
      ASSERT_TRUE(place.beyond || (place.v >= 0 && place.v <= 1)) << x;
    }
  }
}

/// The nearest integer to the float32 product; the larger one of two.
TEST(Drawn, Targets) {
  std::mt19937 generator(2);
  std::vector<float> values = {0.0f, 1.0f, 0.5f, 0x1p-24f, 0x1p-149f, 1 - 0x1p-24f, 1 - 0x1p-23f, 0.5f + 0x1p-24f};
  for (int i = 0; i < 200000; ++i) {
    values.push_back(static_cast<float>(generator() % 0x1000001u) * 0x1p-24f);
    values.push_back(
        static_cast<float>(generator()) * 0x1p-32f * std::ldexp(1.0f, -static_cast<int>(generator() % 40)));
  }
  for (int bits = 1; bits <= 8; ++bits) {
    const double scale = ((1 << bits) - 1) * 65536.0;
    EXPECT_EQ(lomem::drawn_target(0, bits), 0u);
    EXPECT_EQ(lomem::drawn_target(1, bits), scale);
    for (const float s : values) {
      const double product = s * scale;
      const auto target = static_cast<double>(lomem::drawn_target(s, bits));
      ASSERT_EQ(target, std::floor(static_cast<float>(product) + 0.5)) << s;
      // From 2^22 on, float32 has no digits below 1/2, and rounds to these first.
      ASSERT_LE(std::fabs(target - product), product < 4194304 ? 0.5 + 0.125 : 0.75) << s;
    }
  }
}

/// All 65536 random numbers.
TEST(Drawn, TheMeanOfCodeAndDitherIsTheTarget) {
  std::mt19937 generator(3);
  for (int bits = 1; bits <= 8; ++bits) {
    const int q = (1 << bits) - 1;
    const auto largest = static_cast<std::uint32_t>(q) << 16;
    std::vector<std::uint32_t> targets = {0,      1,           0x7fff,      0x8000,          0x8001,
                                          0xffff, largest / 2, largest - 1, largest - 65535, largest};
    for (int i = 0; i < 40; ++i) {
      targets.push_back(static_cast<std::uint32_t>(generator() % (largest + 1)));
    }
    for (int i = 0; i <= q; i += 1 + q / 20) {
      targets.push_back(static_cast<std::uint32_t>(i) << 16);
    }
    for (const std::uint32_t target : targets) {
      const double t = target / 65536.0;
      double sum = 0;
      double squares = 0;
      for (std::uint32_t random = 0; random < 65536; ++random) {
        const double u = (random + 0.5) / 65536;
        const int code = lomem::drawn_code(target, random);
        ASSERT_EQ(code, std::ceil(t - u)) << target << ", " << random;
        ASSERT_GE(code, 0);
        ASSERT_LE(code, q);
        const double error = code + u - 0.5 - t;
        ASSERT_LE(std::fabs(error), 0.5);
        sum += error;
        squares += error * error;
      }
      // Multiples of 2^-17 and of 2^-34 below 2^16: their sums in double are exact. The errors are the midpoints of
      // 2^16 equal parts of [-1/2, 1/2], in some order.
      ASSERT_EQ(sum, 0) << target;
      ASSERT_EQ(squares / 65536, (1 - 0x1p-32) / 12) << target;
    }
  }
}

template <class C>
void check_levels(double low, double step) {
  const lomem::DrawnLevels<C> levels{static_cast<C>(low), static_cast<C>(step)};
  const double rounding = sizeof(C) == sizeof(double) ? 0x1p-53 : 0x1p-24;
  for (int code = 0; code < 256; ++code) {
    for (std::uint32_t random = 0; random < 65536; random += 13) {
      const double place = code + (random + 0.5) / 65536 - 0.5;
      // Code and dither are rounded to float32 (from 128 on, they have a digit too many), then the product and the sum.
      const double want = low + step * place;
      const double near =
          std::fabs(step) * (code < 128 ? 0 : 0x1p-17) + rounding * (2 * std::fabs(low) + 4 * std::fabs(step * place));
      ASSERT_NEAR(lomem::drawn_level(levels, code, random), want, near) << code << ", " << random;
    }
  }
}

TEST(Drawn, Levels) {
  for (const auto& [low, step] :
       {std::pair{-0.125, 0.25}, {0.0, 1.0}, {-0.1, 1.2 / 3}, {1.0, -1.0 / 255}, {0.3, 0.0}}) {
    check_levels<float>(low, step);
    check_levels<double>(low, step);
  }
  static_assert(lomem::drawn_level(lomem::DrawnLevels<double>{0, 1}, 3, 0x8000) == 3 + 0x1p-17);
  static_assert(lomem::drawn_level(lomem::DrawnLevels<float>{-1, 2}, 0, 0) == -2 + 0x1p-16f);
}

/// The means of the levels over all random numbers are s * Q, also where code and dither are rounded.
TEST(Drawn, TheMeanOfLevelsIsTheTarget) {
  const lomem::DrawnLevels<double> levels{0, 1};
  for (const std::uint32_t target : {0u, 0x12345u, 0x7fffffu, 0x800000u, 0xc0ffeeu, 0xfe8001u, 0xff0000u}) {
    double sum = 0;
    for (std::uint32_t random = 0; random < 65536; ++random) {
      sum += lomem::drawn_level(levels, lomem::drawn_code(target, random), random);
    }
    // Ties to even go up and down in turn: all but one of them cancel, at either code.
    EXPECT_NEAR(sum / 65536, target / 65536.0, 2 * 0x1p-17 / 65536) << target;
  }
}

/// Codes and gradients of elements of which the first is number `first`, by the definition.
template <int bits, class T>
void check(const drawn::Case& of, const std::vector<T>& x, std::int64_t first, const RoundingBits& random) {
  const auto n = static_cast<std::int64_t>(x.size());
  std::vector<std::uint8_t> packed(x.size() * bits / 8 + (x.size() * bits % 8 != 0), 0x5a);
  lomem::drawn_encode<bits>(of.table, x.data(), first, n, random, packed.data());
  std::vector<std::uint8_t> codes;
  constexpr int q = (1 << bits) - 1;
  for (std::int64_t i = 0; i < n; ++i) {
    const double u = (drawn::random_bits(random, first + i) + 0.5) / 65536;
    const int code = drawn::unpack(packed, i, bits);
    codes.push_back(static_cast<std::uint8_t>(code));
    // t is rounded to a multiple of 2^-16; from 2^22 * 2^-16 on, in two steps.
    const double t = q * drawn::value(of, static_cast<double>(lomem::to_compute(x[i])));
    ASSERT_LE(std::fabs(code + u - 0.5 - t), 0.5 + q * drawn::tolerance + 0x1p-16) << i << " of " << n;
  }
  // Bits behind the last code are 0.
  ASSERT_EQ(packed, oracle::pack(codes, bits));

  using C = lomem::compute_t<T>;
  const lomem::DrawnLevels<C> levels{static_cast<C>(-0.1), static_cast<C>(1.2 / q)};
  const auto grad = random_elements<T>(x.size(), 2, 77);
  std::vector<T> grad_input(x.size());
  lomem::drawn_decode_multiply<bits>(grad.data(), packed.data(), levels, first, n, random, grad_input.data());
  for (std::int64_t i = 0; i < n; ++i) {
    const C level = lomem::drawn_level(levels, codes[i], drawn::random_bits(random, first + i));
    const auto want = Element<T>::from(static_cast<C>(lomem::to_compute(grad[i]) * level));
    ASSERT_EQ(lomem::to_compute(grad_input[i]), lomem::to_compute(want)) << i << " of " << n;
  }

  // Ranges that begin with whole bytes, by themselves.
  for (std::int64_t begin = 0; begin < n; begin += 40) {
    const std::int64_t count = std::min<std::int64_t>(40, n - begin);
    std::vector<std::uint8_t> part(lomem::packed_bytes(count, bits));
    lomem::drawn_encode<bits>(of.table, x.data() + begin, first + begin, count, random, part.data());
    ASSERT_EQ(
        std::vector<std::uint8_t>(
            packed.begin() + begin * bits / 8,
            packed.begin() + begin * bits / 8 + static_cast<std::int64_t>(part.size())),
        part);
    std::vector<T> grad_part(count);
    lomem::drawn_decode_multiply<bits>(
        grad.data() + begin, part.data(), levels, first + begin, count, random, grad_part.data());
    for (std::int64_t i = 0; i < count; ++i) {
      ASSERT_EQ(lomem::to_compute(grad_part[i]), lomem::to_compute(grad_input[begin + i]));
    }
  }
}

template <class T>
void check_all(const drawn::Case& of, const std::vector<T>& x, std::int64_t first, const RoundingBits& random) {
  for (int bits = 1; bits <= 8; ++bits) {
    SCOPED_TRACE(bits);
    lomem::visit_bits(bits, [&](auto width) { check<decltype(width)::value>(of, x, first, random); });
  }
}

template <class T>
class DrawnElements : public testing::Test {};
using ElementTypes = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(DrawnElements, ElementTypes);

TYPED_TEST(DrawnElements, RoundTrips) {
  using T = TypeParam;
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    for (const std::size_t n : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 39, 41, 100, 1000}) {
      check_all(of, random_elements<T>(n, 3, static_cast<unsigned>(n)), 0, RoundingBits{n * 0x9e3779b97f4a7c15, n});
    }
    std::vector<T> x;
    for (const double place : drawn::places(of)) {
      x.push_back(Element<T>::from(place));
    }
    for (const std::int64_t first : {std::int64_t{0}, (std::int64_t{1} << 35) - 64, std::int64_t{1} << 55}) {
      check_all(of, x, first, RoundingBits{~std::uint64_t{5}, (std::uint64_t{1} << 33) + 1});
    }
  }
}

/// All elements of 16 bits.
template <class T>
void check_patterns() {
  std::vector<T> x(0x10000);
  for (int i = 0; i < 0x10000; ++i) {
    x[i].bits = static_cast<std::uint16_t>(i);
  }
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    check<3>(of, x, 8, {1, 2});
  }
}

TEST(Drawn, EverySixteenBitPattern) {
  check_patterns<lomem::bfloat16>();
  check_patterns<lomem::float16>();
}

/// Seeds and offsets are streams of their own.
TEST(Drawn, SeedsAndOffsets) {
  const auto x = random_elements<float>(512, 1, 9);
  const auto codes = [&](std::uint64_t seed, std::uint64_t offset) {
    std::vector<std::uint8_t> packed(128);
    lomem::drawn_encode<2>(drawn::slow().table, x.data(), 0, 512, RoundingBits{seed, offset}, packed.data());
    return packed;
  };
  EXPECT_EQ(codes(1, 2), codes(1, 2));
  EXPECT_NE(codes(1, 2), codes(2, 2));
  EXPECT_NE(codes(1, 2), codes(1, 3));
  EXPECT_NE(codes(1, 2), codes(1, 2 + (std::uint64_t{1} << 32)));
  EXPECT_NE(codes(1, 2), codes(1 + (std::uint64_t{1} << 32), 2));
}

}  // namespace
