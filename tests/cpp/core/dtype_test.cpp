// Conversions of the 16-bit types against an independent codec: every pattern, and every float at
// which rounding changes its mind.
#include <gtest/gtest.h>
#include <lomem/core/dtype.h>

#include <algorithm>
#include <cmath>

#include "oracle.h"

namespace {

template <class T>
struct FormatOf;
template <>
struct FormatOf<lomem::bfloat16> {
  static constexpr oracle::Format value = oracle::bfloat16;
};
template <>
struct FormatOf<lomem::float16> {
  static constexpr oracle::Format value = oracle::float16;
};

template <class T>
class SixteenBit : public testing::Test {
 protected:
  static constexpr oracle::Format format = FormatOf<T>::value;

  static void expect_rounding(float x) {
    const std::uint16_t got = lomem::from_compute<T>(x).bits;
    const std::uint16_t want = oracle::encode(x, format);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(oracle::decode(got, format))) << x;
    } else {
      EXPECT_EQ(got, want) << "of " << std::hexfloat << x;
    }
  }
};
using SixteenBitTypes = testing::Types<lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(SixteenBit, SixteenBitTypes);

TYPED_TEST(SixteenBit, UpcastsEveryPatternExactly) {
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const TypeParam value{static_cast<std::uint16_t>(pattern)};
    const double want = oracle::decode(value.bits, this->format);
    const double got = lomem::to_compute(value);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << pattern;
    } else {
      EXPECT_EQ(got, want) << pattern;
      EXPECT_EQ(std::signbit(got), std::signbit(want)) << pattern;
    }
  }
}

TYPED_TEST(SixteenBit, RoundTripsEveryPattern) {
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const TypeParam value{static_cast<std::uint16_t>(pattern)};
    this->expect_rounding(lomem::to_compute(value));
  }
}

TYPED_TEST(SixteenBit, RoundsToNearestEvenAroundEveryMidpoint) {
  for (int pattern = 0; pattern < 65535; ++pattern) {
    const double low = oracle::decode(static_cast<std::uint16_t>(pattern), this->format);
    const double high = oracle::decode(static_cast<std::uint16_t>(pattern + 1), this->format);
    if (!std::isfinite(low) || !std::isfinite(high)) {
      continue;
    }
    const float midpoint = static_cast<float>((low + high) / 2);
    ASSERT_EQ(midpoint, (low + high) / 2);
    for (const float x : {midpoint, std::nextafter(midpoint, -INFINITY), std::nextafter(midpoint, INFINITY)}) {
      this->expect_rounding(x);
    }
  }
}

TYPED_TEST(SixteenBit, RoundsExtremes) {
  for (const float magnitude :
       {65503.99F, 65504.F, 65519.996F, 65520.F, 65536.F, 3.38953e38F, 3.3961775e38F, 3.4028235e38F, INFINITY, 0.F,
        1e-45F, 2.9802322e-8F, 2.9802326e-8F, 5.9604645e-8F, 1.1754944e-38F, 9.1835e-41F, NAN}) {
    this->expect_rounding(magnitude);
    this->expect_rounding(-magnitude);
  }
}

TYPED_TEST(SixteenBit, RoundsDoublesOnce) {
  // Around every midpoint, by less than a float can tell: two roundings would see a tie.
  for (int pattern = 0; pattern < 65535; ++pattern) {
    const double low = oracle::decode(static_cast<std::uint16_t>(pattern), this->format);
    const double high = oracle::decode(static_cast<std::uint16_t>(pattern + 1), this->format);
    if (!std::isfinite(low) || !std::isfinite(high)) {
      continue;
    }
    const double midpoint = (low + high) / 2;
    for (const double x :
         {low, midpoint, midpoint * (1 - 1e-12), midpoint * (1 + 1e-12), midpoint * (1 - 1e-4),
          midpoint * (1 + 1e-4)}) {
      EXPECT_EQ(lomem::from_double<TypeParam>(x).bits, oracle::encode(x, this->format)) << std::hexfloat << x;
    }
  }
  for (const double x : {0.0, 1e-300, 1e-46, 65519.999999999, 65520.0, 3.4e38, 3.5e38, 1e300, double{INFINITY}}) {
    EXPECT_EQ(lomem::from_double<TypeParam>(x).bits, oracle::encode(x, this->format)) << x;
    EXPECT_EQ(lomem::from_double<TypeParam>(-x).bits, oracle::encode(-x, this->format)) << -x;
  }
  EXPECT_TRUE(std::isnan(lomem::to_compute(lomem::from_double<TypeParam>(double{NAN}))));
}

TYPED_TEST(SixteenBit, LargestNotAboveKeepsEveryComparison) {
  std::vector<float> boundaries = {0.0F,        -0.0F,     1e-30F, -1e-30F, 3.1858811F,
                                   -3.1858811F, 6.325815F, -1e-3F, 7e4F,    -7e4F};
  for (int bits = 0; bits < 0x10000; bits += 97) {
    const double value = oracle::decode(static_cast<std::uint16_t>(bits), this->format);
    if (std::isfinite(value)) {
      boundaries.push_back(static_cast<float>(value));
      boundaries.push_back(std::nextafter(static_cast<float>(value), INFINITY));
      boundaries.push_back(std::nextafter(static_cast<float>(value), -INFINITY));
    }
  }
  for (const float boundary : boundaries) {
    const double rounded = oracle::decode(lomem::largest_not_above<TypeParam>(boundary).bits, this->format);
    for (int bits = 0; bits < 0x10000; ++bits) {
      const double value = oracle::decode(static_cast<std::uint16_t>(bits), this->format);
      ASSERT_EQ(value > rounded, value > double{boundary}) << value << " " << boundary;
    }
  }
}

TEST(Dtype, RoundsDoublesToFloatAndDouble) {
  EXPECT_EQ(lomem::from_double<float>(0.1), 0.1F);
  EXPECT_EQ(lomem::from_double<double>(0.1), 0.1);
}

TEST(Dtype, SmallestNormals) {
  EXPECT_EQ(lomem::smallest_normal(lomem::DType::float64), std::numeric_limits<double>::min());
  EXPECT_EQ(lomem::smallest_normal(lomem::DType::float32), std::numeric_limits<float>::min());
  EXPECT_EQ(lomem::smallest_normal(lomem::DType::bfloat16), oracle::decode(1 << 7, oracle::bfloat16));
  EXPECT_EQ(lomem::smallest_normal(lomem::DType::float16), oracle::decode(1 << 10, oracle::float16));
}

TEST(Dtype, ElementSizes) {
  EXPECT_EQ(lomem::element_size(lomem::DType::float64), sizeof(double));
  EXPECT_EQ(lomem::element_size(lomem::DType::float32), sizeof(float));
  EXPECT_EQ(lomem::element_size(lomem::DType::bfloat16), sizeof(lomem::bfloat16));
  EXPECT_EQ(lomem::element_size(lomem::DType::float16), sizeof(lomem::float16));
}

static_assert(lomem::to_compute(lomem::float16{0x3c00}) == 1.0F, "usable in constant expressions");
static_assert(lomem::from_compute<lomem::bfloat16>(1.0F).bits == 0x3f80, "usable in constant expressions");

}  // namespace
