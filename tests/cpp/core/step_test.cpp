// Step functions: codes from the definition for every 16-bit input and around every boundary,
// levels from the slopes, gradients against exact products rounded once.
#include <gtest/gtest.h>
#include <lomem/core/step.h>

#include <cmath>
#include <limits>

#include "oracle.h"

namespace {

template <class Step_, class Constants_>
struct Case {
  using Step = Step_;
  using Constants = Constants_;
};

template <class T>
class StepFunction : public testing::Test {};
using StepFunctions =
    testing::Types<Case<lomem::ReGELU2, lomem::ReGELU2Constants>, Case<lomem::ReSiLU2, lomem::ReSiLU2Constants>>;
TYPED_TEST_SUITE(StepFunction, StepFunctions);

template <class Param, class T>
int expected_code(double x) {
  using Constants = typename Param::Constants;
  return oracle::code<T>(x, Constants::c1, Constants::c2, Constants::c3);
}

TYPED_TEST(StepFunction, CodesOfEverySixteenBitPattern) {
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const auto bits = static_cast<std::uint16_t>(pattern);
    EXPECT_EQ(
        TypeParam::Step::code(lomem::bfloat16{bits}),
        (expected_code<TypeParam, lomem::bfloat16>(oracle::decode(bits, oracle::bfloat16))))
        << pattern;
    EXPECT_EQ(
        TypeParam::Step::code(lomem::float16{bits}),
        (expected_code<TypeParam, lomem::float16>(oracle::decode(bits, oracle::float16))))
        << pattern;
  }
}

template <class Param, class T>
void check_around_boundaries() {
  using Constants = typename Param::Constants;
  const T infinity = std::numeric_limits<T>::infinity();
  for (const double c : {Constants::c1, Constants::c2, Constants::c3}) {
    const T boundary = static_cast<T>(c);
    const int below = expected_code<Param, T>(std::nextafter(boundary, -infinity));
    EXPECT_EQ(Param::Step::code(std::nextafter(boundary, -infinity)), below);
    EXPECT_EQ(Param::Step::code(boundary), below) << "a tie is not greater";
    EXPECT_EQ(Param::Step::code(std::nextafter(boundary, infinity)), below + 1);
  }
  for (const T x : {T(0), -T(0), T(1), T(-1), T(100), T(-100)}) {
    EXPECT_EQ(Param::Step::code(x), (expected_code<Param, T>(x)));
  }
  EXPECT_EQ(Param::Step::code(infinity), 3);
  EXPECT_EQ(Param::Step::code(-infinity), 0);
  EXPECT_EQ(Param::Step::code(std::numeric_limits<T>::quiet_NaN()), 0);
}

TYPED_TEST(StepFunction, CodesAroundBoundaries) {
  check_around_boundaries<TypeParam, float>();
  check_around_boundaries<TypeParam, double>();
}

TYPED_TEST(StepFunction, LevelsAreTheSlopesOfThePrimitive) {
  using Constants = typename TypeParam::Constants;
  const double points[] = {
      Constants::c1 - 1, (Constants::c1 + Constants::c2) / 2, (Constants::c2 + Constants::c3) / 2, Constants::c3 + 1};
  for (const double x : points) {
    const double slope = (TypeParam::Step::primitive(x + 0.25) - TypeParam::Step::primitive(x - 0.25)) / 0.5;
    // Differences of values up to 10: 10 * 2^-53 / 0.5, with a margin.
    EXPECT_NEAR(slope, TypeParam::Step::level(TypeParam::Step::code(x)), 1e-14);
  }
  EXPECT_EQ(TypeParam::Step::level(0), 0.0);
  EXPECT_EQ(TypeParam::Step::level(3), 1.0);
}

// Error of the primitive against the function, by the midpoint rule on [-20, 20]; beyond, both
// agree with their asymptotes to 1e-7.
template <class Function>
double squared_error(double a1, double a2, double c1, double c2, double c3, Function&& function) {
  const double a3 = 1 - a1 - a2;
  const auto relu = [](double x) { return x > 0 ? x : 0.0; };
  double error = 0;
  constexpr double step = 1.0 / 512;
  for (double x = -20 + step / 2; x < 20; x += step) {
    const double d = function(x) - (a1 * relu(x - c1) + a2 * relu(x - c2) + a3 * relu(x - c3));
    error += d * d * step;
  }
  return error;
}

// The constants are a local minimum of the integral under sum a = 1 and sum a c = 0 (c3 follows
// from the other four), up to 1e-4 of its value: the published digits stop a little short of the
// minimum, and moves of c1 by 1e-2 still gain 5e-5 of it (SiLU).
template <class Param, class Function>
void check_optimal(Function&& function) {
  using Constants = typename Param::Constants;
  const double start[4] = {Constants::a1, Constants::a2, Constants::c1, Constants::c2};
  const auto error = [&](const double* p) {
    const double c3 = -(p[0] * p[2] + p[1] * p[3]) / (1 - p[0] - p[1]);
    return squared_error(p[0], p[1], p[2], p[3], c3, function);
  };
  const double best = error(start);
  for (int parameter = 0; parameter < 4; ++parameter) {
    for (const double change : {-1e-1, -1e-2, -1e-3, 1e-3, 1e-2, 1e-1}) {
      double moved[4] = {start[0], start[1], start[2], start[3]};
      moved[parameter] += change;
      const double allowed_gain = std::fabs(change) < 0.1 ? 1e-4 * best : 0;
      EXPECT_GT(error(moved), best - allowed_gain) << "parameter " << parameter << ", change " << change;
    }
  }
}

TEST(StepConstants, ReGELU2IsALocalMinimum) {
  check_optimal<Case<lomem::ReGELU2, lomem::ReGELU2Constants>>(
      [](double x) { return x * std::erfc(-x / std::sqrt(2.0)) / 2; });
}

TEST(StepConstants, ReSiLU2IsALocalMinimum) {
  check_optimal<Case<lomem::ReSiLU2, lomem::ReSiLU2Constants>>([](double x) { return x / (1 + std::exp(-x)); });
}

// A 16-bit gradient times a float32 level is exact in double, so that the oracle rounds once.
TYPED_TEST(StepFunction, SixteenBitGradientsAreExactProductsRoundedOnce) {
  for (int code = 0; code < 4; ++code) {
    const auto level = static_cast<float>(TypeParam::Step::level(code));
    for (int pattern = 0; pattern < 65536; ++pattern) {
      const auto bits = static_cast<std::uint16_t>(pattern);
      const double b = oracle::decode(bits, oracle::bfloat16);
      const double h = oracle::decode(bits, oracle::float16);
      const std::uint16_t got_b = lomem::step_gradient<2>(lomem::bfloat16{bits}, level).bits;
      const std::uint16_t got_h = lomem::step_gradient<2>(lomem::float16{bits}, level).bits;
      if (!std::isnan(b * level)) {
        EXPECT_EQ(got_b, oracle::encode(b * level, oracle::bfloat16)) << pattern << " * " << level;
      } else {
        EXPECT_TRUE(std::isnan(oracle::decode(got_b, oracle::bfloat16)));
      }
      if (!std::isnan(h * level)) {
        EXPECT_EQ(got_h, oracle::encode(h * level, oracle::float16)) << pattern << " * " << level;
      } else {
        EXPECT_TRUE(std::isnan(oracle::decode(got_h, oracle::float16)));
      }
    }
  }
}

TYPED_TEST(StepFunction, FloatGradientsAreExactProductsRoundedOnce) {
  const auto level = static_cast<float>(TypeParam::Step::level(2));
  float grad = 1e-30F;
  for (int i = 0; i < 1000; ++i, grad *= 1.1371F) {
    EXPECT_EQ(lomem::step_gradient<2>(grad, level), static_cast<float>(static_cast<double>(grad) * level));
  }
}

}  // namespace
