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

}  // namespace
