// Norm formulas: the gradient in y against finite differences of the norm itself.
#include <gtest/gtest.h>
#include <lomem/core/norm.h>

#include <vector>

namespace {

using Row = std::vector<long double>;

Row normalize(const Row& x, bool centred, long double eps, long double* rstd_out = nullptr) {
  const auto n = static_cast<long double>(x.size());
  long double mean = 0;
  for (const auto value : x) {
    mean += centred ? value / n : 0;
  }
  long double moment = 0;
  for (const auto value : x) {
    moment += (value - mean) * (value - mean) / n;
  }
  const long double rstd = lomem::norm_rstd(moment, eps);
  if (rstd_out != nullptr) {
    *rstd_out = rstd;
  }
  Row y;
  for (const auto value : x) {
    y.push_back(lomem::norm_value(value, mean, rstd));
  }
  return y;
}

class NormFormula : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Norms, NormFormula, testing::Bool(), [](const auto& info) {
  return info.param ? "layer" : "rms";
});

TEST_P(NormFormula, GradientMatchesFiniteDifferences) {
  const bool centred = GetParam();
  const Row x = {0.3L, -1.7L, 2.2L, 0.9L, -0.4L};
  const Row g = {1.1L, -0.2L, 0.5L, -1.3L, 0.8L};
  const long double eps = 1e-3L;
  const auto n = static_cast<long double>(x.size());
  long double rstd = 0;
  const Row y = normalize(x, centred, eps, &rstd);
  long double mean_g = 0;
  long double mean_gy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    mean_g += centred ? g[i] / n : 0;
    mean_gy += g[i] * y[i] / n;
  }
  for (std::size_t i = 0; i < x.size(); ++i) {
    constexpr long double h = 1e-6L;
    Row up = x;
    Row down = x;
    up[i] += h;
    down[i] -= h;
    const Row y_up = normalize(up, centred, eps);
    const Row y_down = normalize(down, centred, eps);
    long double difference = 0;
    for (std::size_t j = 0; j < x.size(); ++j) {
      difference += g[j] * (y_up[j] - y_down[j]) / (2 * h);
    }
    // Central differences in long double: h^2 truncation, 1e-19 / h rounding.
    EXPECT_NEAR(
        static_cast<double>(lomem::norm_gradient(g[i], y[i], rstd, mean_g, mean_gy)), static_cast<double>(difference),
        1e-10);
  }
}

TEST(NormFormula, AffineIsInvertible) {
  const double y = 0.7;
  for (const double gamma : {2.0, -0.5}) {
    for (const double beta : {0.0, 3.0}) {
      EXPECT_NEAR(lomem::norm_recover(lomem::norm_affine(y, gamma, beta), 1 / gamma, beta), y, 1e-15);
    }
  }
}

TEST(NormFormula, VarianceCorrectsTheMean) {
  // Deviations from a mean that is off by 0.25: the variance must not notice.
  const double deviations[] = {-1.25, -0.25, 0.75};
  double sum = 0;
  double squares = 0;
  for (const double d : deviations) {
    sum += d;
    squares += d * d;
  }
  EXPECT_DOUBLE_EQ(lomem::norm_variance(squares, sum, 3.0), 2.0 / 3.0);
}

}  // namespace
