// The formulas of gated units: names, and values and derivatives against the definitions in double.
#include <gtest/gtest.h>
#include <lomem/core/gated.h>

#include <cmath>
#include <limits>

#include "gates.h"

namespace {

using lomem::GatedActivation;
using FloatMath = lomem::PolynomialMath<float, float, std::uint32_t>;
using ShortMath = lomem::PolynomialMath<lomem::bfloat16, float, std::uint32_t>;

/// Value and derivative of one float, as the CPU kernels compute them.
template <class Math = FloatMath>
lomem::ValueAndSlope<float> by_polynomials(GatedActivation activation, float x) {
  return lomem::visit_gated(
      activation, [&](auto function) { return lomem::value_and_slope<typename decltype(function)::type, Math>(x); });
}

template <class C>
lomem::ValueAndSlope<C> by_library(GatedActivation activation, C x) {
  return lomem::visit_gated(activation, [&](auto function) {
    return lomem::value_and_slope<typename decltype(function)::type, lomem::LibraryMath<C>>(x);
  });
}

TEST(Gated, Names) {
  EXPECT_EQ(lomem::gated_activation("silu"), GatedActivation::silu);
  EXPECT_EQ(lomem::gated_activation("gelu"), GatedActivation::gelu);
  EXPECT_EQ(lomem::gated_activation("gelu_tanh"), GatedActivation::gelu_tanh);
  EXPECT_EQ(lomem::gated_activation("relu"), GatedActivation::relu);
  EXPECT_EQ(lomem::gated_activation("sigmoid"), GatedActivation::sigmoid);
  EXPECT_EQ(lomem::gated_activation("tanh"), std::nullopt);
  EXPECT_EQ(lomem::gated_layout("gate_up"), lomem::GatedLayout::gate_up);
  EXPECT_EQ(lomem::gated_layout("up_gate"), lomem::GatedLayout::up_gate);
  EXPECT_EQ(lomem::gated_layout("interleaved"), lomem::GatedLayout::interleaved);
  EXPECT_EQ(lomem::gated_layout(""), std::nullopt);
}

TEST(Gated, TheExponentialIsExactToOneUnit) {
  for (int i = 0; i <= 870'000; ++i) {
    const auto u = static_cast<float>(i * 1e-4);
    const double want = std::exp(-static_cast<double>(u));
    ASSERT_NEAR(FloatMath::exp_of_negative(u), want, 1.2e-7 * want) << u;
  }
  EXPECT_EQ(FloatMath::exp_of_negative(0.0f), 1.0f);
  EXPECT_EQ(FloatMath::exp_of_negative(88.0f), 0.0f);
  EXPECT_EQ(FloatMath::exp_of_negative(std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_TRUE(std::isnan(FloatMath::exp_of_negative(std::numeric_limits<float>::quiet_NaN())));
  for (int i = 0; i <= 870'000; ++i) {
    const auto u = static_cast<float>(i * 1e-4);
    const double want = std::exp(-static_cast<double>(u));
    ASSERT_NEAR(ShortMath::exp_of_negative(u), want, 1e-5 * want) << u;
  }
  EXPECT_EQ(ShortMath::exp_of_negative(std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_TRUE(std::isnan(ShortMath::exp_of_negative(std::numeric_limits<float>::quiet_NaN())));
}

/// Errors in units of the last place of a float at 1, relative to the largest of 1 and, for the value, |x|.
template <class Formula>
void expect_close(const Formula& formula, double units) {
  const double unit = std::ldexp(1, -23);
  for (const GatedActivation activation : gates) {
    for (int i = -400'000; i <= 400'000; ++i) {
      const auto x = static_cast<float>(i * 1e-4);
      const auto [value, slope] = formula(activation, x);
      const auto want = gate_definition(activation, x);
      ASSERT_NEAR(value, want.value, units * unit * std::max(1.0f, std::fabs(x))) << x;
      ASSERT_NEAR(slope, want.slope, units * unit) << x << ", activation " << static_cast<int>(activation);
    }
  }
}

TEST(Gated, ValuesAndDerivativesByPolynomials) {
  expect_close(by_polynomials<FloatMath>, 2.5);
  // For 16 bits: a hundredth of what the rounding to float16 may change.
  expect_close(by_polynomials<ShortMath>, 64);
}

TEST(Gated, ValuesAndDerivativesByLibraryFunctions) {
  expect_close(by_library<float>, 4);
  for (const GatedActivation activation : gates) {
    for (int i = -400; i <= 400; ++i) {
      const double x = i * 0.1;
      const auto [value, slope] = by_library(activation, x);
      const auto want = gate_definition(activation, x);
      ASSERT_NEAR(value, want.value, 1e-14 * std::max(1.0, std::fabs(x))) << x;
      ASSERT_NEAR(slope, want.slope, 1e-14) << x;
    }
  }
}

TEST(Gated, TailsKeepTheirDigits) {
  // Where the value is small, its relative error is that of e^-u for a large u.
  for (const GatedActivation activation : {GatedActivation::silu, GatedActivation::gelu, GatedActivation::sigmoid}) {
    for (float x = -12; x < -1; x += 0.001f) {
      const double want = gate_definition(activation, x).value;
      ASSERT_NEAR(by_polynomials(activation, x).value, want, 1e-5 * std::fabs(want)) << x;
      ASSERT_NEAR(by_polynomials<ShortMath>(activation, x).value, want, 2e-5 * std::fabs(want)) << x;
    }
  }
}

TEST(Gated, LargeAndSpecialNumbers) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const GatedActivation activation : gates) {
    SCOPED_TRACE(static_cast<int>(activation));
    const bool bounded = activation == GatedActivation::sigmoid;
    for (const float x : {20.0f, 88.0f, 200.0f, 1e4f, 1e19f, 1e20f, 1e30f, std::numeric_limits<float>::max()}) {
      const auto above = by_polynomials(activation, x);
      EXPECT_FLOAT_EQ(above.value, bounded ? 1.0f : x);
      EXPECT_FLOAT_EQ(by_polynomials<ShortMath>(activation, x).value, bounded ? 1.0f : x);
      EXPECT_NEAR(by_polynomials<ShortMath>(activation, -x).slope, 0.0f, 1e-7f) << x;
      EXPECT_NEAR(above.slope, bounded ? 0.0f : 1.0f, 1e-6f) << x;
      const auto below = by_polynomials(activation, -x);
      EXPECT_NEAR(below.value, 0.0f, 1e-7f) << x;
      EXPECT_NEAR(below.slope, 0.0f, 1e-7f) << x;
    }
    EXPECT_EQ(by_polynomials(activation, infinity).value, bounded ? 1.0f : infinity);
    EXPECT_TRUE(std::isnan(by_polynomials(activation, nan).value));
    EXPECT_TRUE(std::isnan(by_polynomials<ShortMath>(activation, nan).value));
    EXPECT_TRUE(std::isnan(by_polynomials(activation, nan).slope) || activation == GatedActivation::relu);
    // As torch's: negative infinity times 0.
    const bool multiplies = !bounded && activation != GatedActivation::relu;
    EXPECT_EQ(std::isnan(by_polynomials(activation, -infinity).value), multiplies);
  }
}

TEST(Gated, TheGradientOfReLUIsSelected) {
  EXPECT_EQ((lomem::gate_gradient<lomem::ReLU>(std::numeric_limits<float>::infinity(), 0.0f)), 0.0f);
  EXPECT_EQ((lomem::gate_gradient<lomem::ReLU>(3.0f, 1.0f)), 3.0f);
  EXPECT_EQ((lomem::gate_gradient<lomem::SiLU>(3.0f, 0.5f)), 1.5f);
}

}  // namespace
