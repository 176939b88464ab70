// Storage in groups against its definition in double.
#include <gtest/gtest.h>
#include <lomem/core/storage.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "elements.h"

namespace {

using lomem::bfloat16;

float value(bfloat16 x) {
  return lomem::to_compute(x);
}

std::uint32_t bits_of(float x) {
  return __builtin_bit_cast(std::uint32_t, x);
}

float from_bits(std::uint32_t x) {
  return __builtin_bit_cast(float, x);
}

TEST(Storage, Sizes) {
  static_assert(lomem::largest_code(8) == 127 && lomem::largest_code(4) == 7);
  static_assert(lomem::scale_count(0, 128) == 0 && lomem::scale_count(1, 128) == 1);
  static_assert(lomem::scale_count(128, 128) == 1 && lomem::scale_count(129, 128) == 2);
  for (std::int64_t group = -3; group < 5000; ++group) {
    const bool power =
        group == 16 || group == 32 || group == 64 || group == 128 || group == 256 || group == 512 || group == 1024;
    EXPECT_EQ(lomem::is_scale_group(group), power) << group;
  }
}

/// The smallest bfloat16 that is large enough, from 2^-126 on.
TEST(Storage, ScalesAreTheSmallestThatClipNothing) {
  std::mt19937 generator(1);
  std::vector<std::uint32_t> magnitudes = {1, 2, 0x007fffff, 0x00800000, 0x00800001, 0x7f7fffff, 0x3f800000};
  for (int bits : {4, 8}) {
    // Products of scales, and their neighbors.
    for (std::uint32_t up = 0x80; up < 0x7e00; up += 7) {
      const float product = value({static_cast<std::uint16_t>(up)}) * static_cast<float>(lomem::largest_code(bits));
      if (std::isfinite(product)) {
        magnitudes.insert(magnitudes.end(), {bits_of(product) - 1, bits_of(product), bits_of(product) + 1});
      }
    }
  }
  for (int i = 0; i < 200000; ++i) {
    magnitudes.push_back(static_cast<std::uint32_t>(generator() % 0x7f800000u));
  }
  for (int bits : {4, 8}) {
    const double q = lomem::largest_code(bits);
    for (const std::uint32_t magnitude : magnitudes) {
      if (magnitude == 0 || magnitude >= 0x7f800000u) {
        continue;
      }
      const bfloat16 scale = lomem::group_scale(magnitude, bits);
      const double m = from_bits(magnitude);
      ASSERT_GE(value(scale) * q, m);
      ASSERT_GE(value(scale), 0x1p-126f);
      const bfloat16 below{static_cast<std::uint16_t>(scale.bits - 1)};
      ASSERT_TRUE(value(below) * q < m || scale.bits == 0x0080) << magnitude;
      ASSERT_TRUE(std::isnormal(lomem::group_inverse(scale)));
      // The largest element has the largest code.
      const auto limit = static_cast<float>(q);
      const float t = lomem::scaled(from_bits(magnitude), lomem::group_inverse(scale), limit);
      ASSERT_LE(t, limit);
      ASSERT_TRUE(scale.bits == 0x0080 || lomem::nearest_integer(t) > limit * 0.98f) << magnitude;
    }
    EXPECT_EQ(lomem::group_scale(0, bits).bits, 0);
    EXPECT_EQ(lomem::group_scale(0x7f800000u, bits).bits, 0x7fc0);
    EXPECT_EQ(lomem::group_scale(0x7f800001u, bits).bits, 0x7fc0);
    EXPECT_EQ(lomem::group_scale(0x7fffffffu, bits).bits, 0x7fc0);
  }
}

TEST(Storage, NearestIntegers) {
  static_assert(lomem::nearest_integer(0.5f) == 0.0f && lomem::nearest_integer(1.5f) == 2.0f);
  static_assert(lomem::nearest_integer(-2.5f) == -2.0f && lomem::nearest_integer(-0.75f) == -1.0f);
  std::mt19937 generator(2);
  std::uniform_real_distribution<float> uniform(-127, 127);
  for (int i = 0; i < 100000; ++i) {
    const float t = uniform(generator);
    ASSERT_EQ(lomem::nearest_integer(t), std::nearbyint(t)) << t;
    const float half = std::nearbyint(t) + 0.5f;
    ASSERT_EQ(lomem::nearest_integer(half), std::nearbyint(half)) << half;
  }
}

/// All 65536 random numbers: how often t is rounded up.
TEST(Storage, StochasticIntegersAreUnbiased) {
  std::mt19937 generator(3);
  std::uniform_real_distribution<float> uniform(-127, 127);
  std::vector<float> numbers = {0.0f, 1.0f, -1.0f, 127.0f, -127.0f, 0.5f, -0.5f, 1e-10f, -1e-10f, -0.99999994f};
  for (int i = 0; i < 60; ++i) {
    numbers.push_back(uniform(generator));
  }
  // Fractions of multiples of 2^-17, which are ties of a sum t + u.
  for (int i = 0; i < 20; ++i) {
    numbers.push_back(126.0f + static_cast<float>(2 * i + 1) * 0x1p-17f);
    numbers.push_back(-126.0f + static_cast<float>(2 * i + 1) * 0x1p-17f);
  }
  for (const float t : numbers) {
    const double below = std::floor(static_cast<double>(t));
    int up = 0;
    for (std::uint32_t random = 0; random < 65536; ++random) {
      const float integer = lomem::stochastic_integer(t, random);
      // (A negative number next to 0 is rounded up with a probability that is rounded to 1.)
      ASSERT_TRUE(integer == below || integer == below + 1) << t;
      up += integer == below ? 0 : 1;
    }
    ASSERT_LE(std::abs(up * 0x1p-16 - (t - below)), 0x1p-17 + 0x1p-24) << t;
  }
}

TEST(Storage, RandomBitsAreHalvesOfTheStream) {
  const lomem::RoundingBits random{0x299f31d0a4093822, 0};
  for (std::int64_t i : {std::int64_t{0}, std::int64_t{8}, std::int64_t{1} << 40}) {
    const auto block = random.block(i);
    for (int j = 0; j < 8; ++j) {
      const std::uint32_t word =
          lomem::philox_word<7>(random.seed, static_cast<std::uint64_t>(i) / 2 + static_cast<unsigned>(j) / 2);
      EXPECT_EQ(lomem::random_of(block, j), j % 2 == 0 ? word & 0xffffu : word >> 16);
    }
  }
  // A stream for each offset, of 64 bits.
  const auto first = lomem::philox_block(5, 7);
  for (std::uint64_t offset : {std::uint64_t{1}, std::uint64_t{1} << 32, std::uint64_t{1} << 62}) {
    const auto other = lomem::philox_block(5, 7, offset);
    EXPECT_NE(static_cast<std::uint32_t>(first.first), static_cast<std::uint32_t>(other.first)) << offset;
  }
}

TEST(Storage, CodesOfBits) {
  for (int bits : {4, 8}) {
    const int q = lomem::largest_code(bits);
    for (int code = -q; code <= q; ++code) {
      const std::uint8_t word = lomem::code_bits(static_cast<float>(code), bits);
      EXPECT_LE(word, lomem::max_code(bits));
      EXPECT_EQ(lomem::code_of_bits(word, bits), code);
      EXPECT_EQ(lomem::code_of_bits(word | 0xffffff00u, bits), code);  // (what is above them is ignored)
    }
  }
}

/// Relative error of one rounding of a number that is not subnormal.
template <class T>
constexpr double half_spacing = sizeof(T) >= 4                ? 0x1p-24
                                : std::is_same_v<T, bfloat16> ? 0x1p-8
                                                              : 0x1p-11;

template <int bits, class T>
void check_round_trip(const std::vector<T>& x, const lomem::RoundingBits* random) {
  const auto n = static_cast<std::int64_t>(x.size());
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(lomem::packed_bytes(n, bits)), 0xee);
  const bfloat16 scale = lomem::encode_group<bits>(x.data(), 128, n, random, codes.data());
  std::vector<T> y(x.size());
  lomem::decode_group<bits>(codes.data(), n, scale, y.data());
  const double step = value(scale);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double want = lomem::to_compute(x[i]);
    const double got = lomem::to_compute(y[i]);
    ASSERT_TRUE(std::isfinite(got));
    // Codes are rounded to the nearest integer, or to one next to it; the scaled element has an error of 2^-23 of
    // itself, and the result is rounded: half_spacing of itself, for numbers that are not subnormal.
    const double rounding = std::abs(got) * half_spacing<T> + std::abs(want) * 0x1p-22;
    const double subnormal = std::is_same_v<T, lomem::float16> ? 0x1p-25 : 0;
    ASSERT_LE(std::abs(got - want), (random == nullptr ? 0.5 : 1.0) * step + rounding + subnormal) << i;
  }
  if (random != nullptr) {
    lomem::decode_group<bits>(codes.data(), n, scale, y.data(), random, 128);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double want = lomem::to_compute(x[i]);
      const double got = lomem::to_compute(y[i]);
      const double rounding = std::abs(got) * half_spacing<T> + std::abs(want) * 0x1p-22;
      const double subnormal = std::is_same_v<T, lomem::float16> ? 0x1p-25 : 0;
      ASSERT_LE(std::abs(got - want), 0.5 * step + rounding + subnormal) << i;
    }
  }
  if (n % 2 == 1 && bits == 4) {
    EXPECT_EQ(codes.back() >> 4, 0);  // padding
  }
}

TEST(Storage, NothingClips) {
  const lomem::RoundingBits random{9, 4};
  const auto check = [&](auto element, double scale, std::size_t n) {
    using T = typename decltype(element)::type;
    const auto x = random_elements<T>(n, scale, static_cast<unsigned>(n));
    check_round_trip<8>(x, nullptr);
    check_round_trip<8>(x, &random);
    check_round_trip<4>(x, nullptr);
    check_round_trip<4>(x, &random);
  };
  for (std::size_t n : {1, 2, 7, 8, 9, 127, 128}) {
    for (double scale : {1e-6, 1.0, 1000.0}) {
      check(lomem::Type<double>{}, scale, n);
      check(lomem::Type<float>{}, scale, n);
      check(lomem::Type<bfloat16>{}, scale, n);
      check(lomem::Type<lomem::float16>{}, scale, n);
    }
    for (double scale : {1e-43, 1e-40, 1e-38, 1e-30, 1e30}) {
      check(lomem::Type<double>{}, scale, n);
      check(lomem::Type<float>{}, scale, n);
      check(lomem::Type<bfloat16>{}, scale, n);
    }
  }
}

TEST(Storage, TheLargestNumbersStayFinite) {
  const lomem::RoundingBits random{3, 5};
  for (const lomem::RoundingBits* source : {static_cast<const lomem::RoundingBits*>(nullptr), &random}) {
    for (const float sign : {1.0f, -1.0f}) {
      const float most = sign * std::numeric_limits<float>::max();
      const bfloat16 most_of_bfloat16{static_cast<std::uint16_t>(sign > 0 ? 0x7f7f : 0xff7f)};
      const auto most_of_float16 = Element<lomem::float16>::from(sign * 65504.0);
      check_round_trip<8>(std::vector<float>(13, most), source);
      check_round_trip<4>(std::vector<float>(13, most), source);
      check_round_trip<8>(std::vector<bfloat16>(13, most_of_bfloat16), source);
      check_round_trip<4>(std::vector<bfloat16>(13, most_of_bfloat16), source);
      check_round_trip<8>(std::vector<lomem::float16>(13, most_of_float16), source);
      check_round_trip<4>(std::vector<lomem::float16>(13, most_of_float16), source);
      check_round_trip<8>(std::vector<double>(13, static_cast<double>(most)), source);
    }
  }
}

template <class T>
void check_special(double special) {
  for (const bool stochastic : {false, true}) {
    const lomem::RoundingBits random{1, 1};
    std::vector<T> x(9, Element<T>::from(1.0));
    x[3] = Element<T>::from(special);
    std::uint8_t codes[9];
    const bfloat16 scale = lomem::encode_group<8>(x.data(), 0, 9, stochastic ? &random : nullptr, codes);
    EXPECT_EQ(scale.bits, 0x7fc0);
    T y[9];
    lomem::decode_group<8>(codes, 9, scale, y);
    T dithered[9];
    lomem::decode_group<8>(codes, 9, scale, dithered, &random);
    for (int i = 0; i < 9; ++i) {
      EXPECT_EQ(codes[i], 0);
      EXPECT_TRUE(std::isnan(lomem::to_compute(y[i])));
      EXPECT_TRUE(std::isnan(lomem::to_compute(dithered[i])));
    }
  }
}

TEST(Storage, AGroupThatIsNotFiniteIsNotANumber) {
  for (const double special : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
    check_special<double>(special);
    check_special<float>(special);
    check_special<bfloat16>(special);
    check_special<lomem::float16>(special);
  }
  check_special<double>(1e300);
  check_special<double>(-3.4028236e38);  // rounds to an infinity
}

TEST(Storage, Zeros) {
  const lomem::RoundingBits random{1, 1};
  const float x[3] = {0.0f, -0.0f, 0.0f};
  std::uint8_t codes[3] = {1, 2, 3};
  EXPECT_EQ((lomem::encode_group<8>(x, 0, 3, &random, codes).bits), 0);
  float y[3];
  lomem::decode_group<8>(codes, 3, bfloat16{0}, y);
  float dithered[3];
  lomem::decode_group<8>(codes, 3, bfloat16{0}, dithered, &random);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(bits_of(y[i]), 0u);
    EXPECT_EQ(dithered[i], 0.0f);
  }
}

/// Random bits and a code, so that nothing depends on Philox: the code is t - u rounded up, and what comes back is off
/// by less than half a step, whatever the bits are.
TEST(Storage, DitherOfAllRandomBits) {
  for (const float t : {-126.75f, -7.0f, -2.5f, -0.3f, 0.0f, 0.1f, 0.5f, 3.0f, 6.99f, 126.5f, 127.0f}) {
    double sum = 0;
    double squares = 0;
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const double u = (bits + 0.5) / 65536;
      EXPECT_EQ(lomem::dither(bits), u - 0.5);
      const float code = lomem::stochastic_integer(t, bits);
      EXPECT_EQ(code, std::ceil(double{t} - u));
      const double error = double{code} + lomem::dither(bits) - double{t};
      ASSERT_LE(std::abs(error), 0.5);
      sum += error;
      squares += error * error;
    }
    // t is a multiple of 2^-16 or is rounded to one: an error of 2^-17, and that of a sum in place of an integral.
    EXPECT_LE(std::abs(sum), 0.5);
    EXPECT_NEAR(squares / 0x10000, 1.0 / 12, 0x1p-16);
  }
}

TEST(Storage, LayoutOfFourBits) {
  const float x[5] = {7, -7, 1, -1, 3};
  std::uint8_t codes[3];
  EXPECT_EQ(value(lomem::encode_group<4>(x, 0, 5, nullptr, codes)), 1.0f);
  EXPECT_EQ(codes[0], 0x97);
  EXPECT_EQ(codes[1], 0xf1);
  EXPECT_EQ(codes[2], 0x03);
}

TEST(Storage, ScalesOfOthers) {
  // Infinite scales are no scales of encode_group; they are not limited.
  float y[2];
  const std::uint8_t codes[2] = {1, 0xff};
  lomem::decode_group<8>(codes, 2, bfloat16{0x7f80}, y);
  EXPECT_EQ(y[0], HUGE_VALF);
  EXPECT_EQ(y[1], -HUGE_VALF);
}

}  // namespace
