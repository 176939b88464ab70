// CPU kernels on plain pointers: every size around the tiles, misaligned bases, sentinels, every
// dtype, against the definitions. No torch.
#include <gtest/gtest.h>
#include <lomem/kernels.h>

#include <cmath>
#include <random>

#include "elements.h"
#include "guarded.h"
#include "oracle.h"

namespace {

using lomem::DType;

std::vector<std::size_t> sizes() {
  std::vector<std::size_t> result;
  for (std::size_t n = 0; n <= 70; ++n) {
    result.push_back(n);
  }
  for (const std::size_t n : {255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2051}) {
    result.push_back(n);
  }
  return result;
}

template <class T>
class Kernels : public testing::Test {};
using Elements = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(Kernels, Elements);

template <class Step, class T>
void check_encode() {
  for (const std::size_t n : sizes()) {
    Guarded<T> x(n, n % 4);
    x.assign(random_elements<T>(n, 4, static_cast<unsigned>(n)));
    Guarded<std::uint8_t> packed(lomem::packed_bytes(n, Step::bits), n % 5);
    lomem::cpu::step_encode<Step>(Element<T>::dtype, x.data(), static_cast<std::int64_t>(n), packed.data());
    std::vector<std::uint8_t> codes;
    for (const T value : x.values()) {
      codes.push_back(Step::code(value));
    }
    EXPECT_EQ(packed.values(), oracle::pack(codes, Step::bits)) << n;
    packed.expect_intact();
    x.expect_intact();
  }
}

TYPED_TEST(Kernels, StepEncode) {
  check_encode<lomem::ReGELU2, TypeParam>();
  check_encode<lomem::ReSiLU2, TypeParam>();
}

TYPED_TEST(Kernels, StepDecodeMultiply) {
  using C = lomem::compute_t<TypeParam>;
  for (int bits = 1; bits <= 8; ++bits) {
    std::vector<double> levels(std::size_t{1} << bits);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      levels[i] = std::sin(static_cast<double>(i) + 0.1);
    }
    for (const std::size_t n : sizes()) {
      const auto grad = random_elements<TypeParam>(n, 1, static_cast<unsigned>(n + 1));
      std::vector<std::uint8_t> codes(n);
      for (std::size_t i = 0; i < n; ++i) {
        codes[i] = static_cast<std::uint8_t>((i * 37 + n) % levels.size());
      }
      const auto packed = oracle::pack(codes, bits);
      Guarded<TypeParam> source(n, n % 4);
      source.assign(grad);
      Guarded<TypeParam> result(n, n % 3);
      lomem::cpu::step_decode_multiply(
          Element<TypeParam>::dtype, source.data(), packed.data(), levels.data(), bits, static_cast<std::int64_t>(n),
          result.data());
      const auto got = result.values();
      for (std::size_t i = 0; i < n; ++i) {
        const auto want = lomem::step_gradient(grad[i], static_cast<C>(levels[codes[i]]));
        EXPECT_EQ(lomem::to_compute(got[i]), lomem::to_compute(want)) << bits << " bits, " << i << " of " << n;
      }
      result.expect_intact();
    }
  }
}

TEST(PackingKernel, ReportsCodesThatDoNotFit) {
  const std::vector<std::uint8_t> codes = {1, 2, 9, 0, 3};
  std::vector<std::uint8_t> packed(2);
  EXPECT_EQ(lomem::cpu::pack_bits(codes.data(), 5, 2, packed.data()), 1 | 2 | 9 | 3);
  EXPECT_EQ(lomem::cpu::pack_bits(codes.data(), 0, 2, packed.data()), 0);
}

TEST(FindBelow, ReturnsTheFirst) {
  std::vector<float> values(3000, 1);
  values[7] = -0.5F;
  const lomem::Array array{values.data(), DType::float32};
  EXPECT_EQ(lomem::cpu::find_below(array, 3000, 0.25), -1);
  EXPECT_EQ(lomem::cpu::find_below(array, 3000, 0.5), -1);
  values[2999] = -0.0F;
  EXPECT_EQ(lomem::cpu::find_below(array, 3000, 0.25), 2999);
  values[1024] = 0.125F;
  EXPECT_EQ(lomem::cpu::find_below(array, 3000, 0.25), 1024);
  EXPECT_EQ(lomem::cpu::find_below(array, 3000, 0.75), 7);
  EXPECT_EQ(lomem::cpu::find_below(array, 0, 0.25), -1);
}

/// One rounding of x to T is half of spacing * |x|. The arithmetic before it is in double, whose
/// own errors, of values of order 1 that may cancel, are the second term.
template <class T>
double tolerance(double x) {
  return spacing<T>() / 2 * std::fabs(x) * (1 + 1e-6) + 8 * spacing<double>() +
         (Element<T>::dtype == DType::float16 ? std::ldexp(1, -25) : 0);  // float16 subnormals
}

template <lomem::Norm norm, class T>
void check_norm(bool affine) {
  constexpr bool centred = norm == lomem::Norm::layer;
  using Statistic = lomem::compute_t<T>;
  const double eps = 1e-5;
  for (const std::size_t cols : sizes()) {
    if (cols == 0) {
      continue;
    }
    const std::size_t rows = 3;
    Guarded<T> x(rows * cols, cols % 3);
    x.assign(random_elements<T>(rows * cols, 2, static_cast<unsigned>(cols)));
    const auto grad = random_elements<double>(rows * cols, 1, static_cast<unsigned>(cols + 1));
    std::vector<double> gamma(cols, 1);
    std::vector<double> beta(cols, 0);
    if (affine) {
      for (std::size_t j = 0; j < cols; ++j) {
        gamma[j] = (j % 2 == 0 ? 1 : -1) * (0.5 + static_cast<double>(j % 7) / 8);
        beta[j] = centred ? static_cast<double>(j % 5) / 4 - 0.5 : 0;
      }
    }
    Guarded<T> output(rows * cols, cols % 5);
    Guarded<Statistic> rstd(rows);
    lomem::NormForward forward;
    forward.input = {x.data(), Element<T>::dtype};
    forward.output = {output.data(), Element<T>::dtype};
    forward.rstd = {rstd.data(), Element<Statistic>::dtype};
    if (affine) {
      forward.weight = {gamma.data(), DType::float64};
      forward.bias = centred ? lomem::Array{beta.data(), DType::float64} : lomem::Array{};
    }
    forward.cols = static_cast<std::int64_t>(cols);
    forward.eps = eps;
    // In two parts: rows are independent.
    lomem::cpu::norm_forward<norm>(forward, 1, rows);
    lomem::cpu::norm_forward<norm>(forward, 0, 1);
    output.expect_intact();
    rstd.expect_intact();

    Guarded<double> grad_input(rows * cols);
    std::vector<double> grad_weight(cols, 0);
    std::vector<double> grad_bias(cols, 0);
    lomem::NormBackward backward;
    backward.grad_output = {grad.data(), DType::float64};
    backward.output = {output.data(), Element<T>::dtype};
    backward.rstd = {rstd.data(), Element<Statistic>::dtype};
    backward.weight = forward.weight;
    backward.bias = forward.bias;
    backward.grad_input = {grad_input.data(), DType::float64};
    backward.cols = forward.cols;
    lomem::cpu::norm_backward<norm>(backward, 0, 2, grad_weight.data(), grad_bias.data());
    lomem::cpu::norm_backward<norm>(backward, 2, rows, grad_weight.data(), grad_bias.data());
    grad_input.expect_intact();

    std::vector<double> want_weight(cols, 0);
    std::vector<double> want_bias(cols, 0);
    const auto z = output.values();
    const auto grad_x = grad_input.values();
    for (std::size_t row = 0; row < rows; ++row) {
      const auto want =
          expected_row(x.data() + row * cols, gamma.data(), beta.data(), grad.data() + row * cols, cols, centred, eps);
      EXPECT_NEAR(rstd.values()[row], want.rstd, tolerance<Statistic>(want.rstd));
      double scale = 0;
      for (std::size_t j = 0; j < cols; ++j) {
        const std::size_t i = row * cols + j;
        EXPECT_NEAR(lomem::to_compute(z[i]), want.z[j], tolerance<T>(want.z[j])) << cols;
        want_weight[j] += grad[i] * (want.z[j] - beta[j]) / gamma[j];
        want_bias[j] += grad[i];
        scale = std::max(scale, std::fabs(want.grad_x[j]));
      }
      for (std::size_t j = 0; j < cols; ++j) {
        // The backward pass starts from z as rounded to T; |gamma| >= 0.5 and |y| < 8 here.
        EXPECT_NEAR(grad_x[row * cols + j], want.grad_x[j], 64 * tolerance<T>(scale + want.rstd)) << cols;
      }
    }
    for (std::size_t j = 0; j < cols; ++j) {
      EXPECT_NEAR(grad_weight[j], want_weight[j], 64 * tolerance<T>(4)) << cols;
      EXPECT_NEAR(grad_bias[j], want_bias[j], 1e-12) << cols;
    }
  }
}

TYPED_TEST(Kernels, LayerNorm) {
  check_norm<lomem::Norm::layer, TypeParam>(false);
  check_norm<lomem::Norm::layer, TypeParam>(true);
}

TYPED_TEST(Kernels, RMSNorm) {
  check_norm<lomem::Norm::rms, TypeParam>(false);
  check_norm<lomem::Norm::rms, TypeParam>(true);
}

}  // namespace
