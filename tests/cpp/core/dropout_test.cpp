// Dropout's formulas.
#include <gtest/gtest.h>
#include <lomem/core/dropout.h>

#include <cmath>
#include <limits>

#include "elements.h"

namespace {

TEST(Dropout, ScalesAreThoseOfTorch) {
  // (Powers of two are exact in every dtype.)
  static_assert(lomem::dropout_scale<double>(0.5) == 2.0);
  static_assert(lomem::rounded_dropout_scale<lomem::bfloat16>(0.75) == 4.0f);
  static_assert(lomem::dropout_scale<float>(0.0) == 1.0f);
  EXPECT_EQ(lomem::dropout_scale<double>(0.1), 1.0 / (1.0 - 0.1));
  EXPECT_EQ(lomem::dropout_scale<float>(0.1), 1.0f / 0.9f);
  EXPECT_EQ(lomem::dropout_scale<lomem::bfloat16>(0.1), 1.0f / 0.9f);
  EXPECT_EQ(lomem::rounded_dropout_scale<float>(0.1), 1.0f / 0.9f);
  EXPECT_EQ(lomem::rounded_dropout_scale<lomem::bfloat16>(0.1), 1.109375f);    // nearest to 1.111 with 8 bits
  EXPECT_EQ(lomem::rounded_dropout_scale<lomem::float16>(0.1), 1.111328125f);  // with 11 bits
}

TEST(Dropout, DropsByMultiplication) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(lomem::scaled_if(true, 3.0f, 2.0f), 6.0f);
  EXPECT_EQ(lomem::scaled_if(true, infinity, 2.0f), infinity);
  EXPECT_FALSE(std::signbit(lomem::scaled_if(false, 3.0f, 2.0f)));
  EXPECT_TRUE(std::signbit(lomem::scaled_if(false, -3.0f, 2.0f)));
  EXPECT_TRUE(std::isnan(lomem::scaled_if(false, infinity, 2.0f)));
  EXPECT_TRUE(std::isnan(lomem::scaled_if(false, std::nanf(""), 2.0f)));
}

TEST(Dropout, BoundsAreProbabilities) {
  static_assert(lomem::dropout_bound(0.0) == 0);
  static_assert(lomem::dropout_bound(0.5) == 0x80000000u);
  static_assert(lomem::dropout_bound(0.1) == 429496730u);
  static_assert(lomem::dropout_bound(1 - 0x1p-53) == 0xffffffffu);
  static_assert(lomem::dropout_bound(0x1p-33) == 1);
  static_assert(lomem::dropout_bound(0x1p-34) == 0);
}

TEST(Dropout, TheMaskOfASeedHasAWordForEachElement) {
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{0x299f31d0a4093822}, ~std::uint64_t{0}}) {
    for (const std::uint32_t bound : {0u, 1u, 0x1999999au, 0x80000000u, 0xffffffffu}) {
      for (const std::uint64_t group : {std::uint64_t{0}, std::uint64_t{3}, std::uint64_t{1} << 40}) {
        const std::uint8_t mask = lomem::mask_of_seed(seed, group, bound);
        for (std::uint64_t j = 0; j < 8; ++j) {
          EXPECT_EQ((mask >> j & 1) != 0, lomem::philox_word(seed, 8 * group + j) >= bound);
        }
      }
    }
  }
}

}  // namespace
