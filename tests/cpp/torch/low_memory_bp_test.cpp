// The names of LowMemoryBP: GELU and SiLU with the step functions of its paper, as functions and as modules.
#include <gtest/gtest.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <sstream>

#include "helpers.h"

namespace {

/// The gradient that autograd itself finds for sum_i a_i * relu(x - c_i), in float64.
torch::Tensor step_gradient(const torch::Tensor& input, const double (&c)[3], const double (&a)[3]) {
  auto x = input.detach().to(torch::kDouble).requires_grad_();
  auto y = torch::zeros_like(x);
  for (int i = 0; i < 3; ++i) {
    y = y + a[i] * torch::relu(x - c[i]);
  }
  return torch::autograd::grad({y.sum()}, {x})[0];
}

TEST(LowMemoryBP, ReGELU2ForwardIsGelu) {
  for (const auto dtype : dtypes) {
    for (int64_t n = 0; n <= 70; ++n) {
      const auto x = leaf({n}, dtype);
      EXPECT_TRUE(torch::equal(lomem::regelu2(x), torch::gelu(x, "none")));
      EXPECT_TRUE(torch::equal(lomem::regelu2(x, "tanh"), torch::gelu(x, "tanh")));
    }
  }
}

TEST(LowMemoryBP, ReSiLU2ForwardIsSilu) {
  for (const auto dtype : dtypes) {
    for (int64_t n = 0; n <= 70; ++n) {
      const auto x = leaf({n}, dtype);
      EXPECT_TRUE(torch::equal(lomem::resilu2(x), torch::silu(x)));
    }
  }
}

TEST(LowMemoryBP, GradientsAreThoseOfTheReLUs) {
  auto x = (torch::randn({5, 33}, torch::kDouble) * 5).requires_grad_();
  lomem::regelu2(x).sum().backward();
  EXPECT_TRUE(
      torch::allclose(
          x.grad(),
          step_gradient(
              x, {-3.1858810036855245, -0.001178821281161997, 3.190832613414926},
              {-0.04922261145617846, 1.0979632065417297, -0.048740595085551286}),
          /*rtol=*/1e-14, /*atol=*/1e-15));
  x.mutable_grad().reset();
  lomem::resilu2(x).sum().backward();
  EXPECT_TRUE(
      torch::allclose(
          x.grad(),
          step_gradient(
              x, {-6.3050461001646445, -0.0008684942046214787, 6.325815242089708},
              {-0.04060357190528599, 1.080925428529668, 1 - (-0.04060357190528599 + 1.080925428529668)}),
          /*rtol=*/1e-14, /*atol=*/1e-15));
}

TEST(LowMemoryBP, LevelsMakeTheGradientOfTheHalves) {
  const auto x = torch::randn({6, 11});
  const auto codes = std::get<1>(lomem::step_activation_forward(x, "gelu_tanh", {}, {.bits = 2, .criterion = "paper"}));
  const double levels[] = {0, -0.04922261145617846, 1.0487405950855511, 1};
  const auto got = lomem::step_activation_backward(torch::ones_like(x), codes, levels, 2);
  auto y = x.clone().requires_grad_();
  lomem::regelu2(y, "tanh").sum().backward();
  EXPECT_TRUE(torch::allclose(got, y.grad(), 1e-6));
}

TEST(LowMemoryBP, IsTheCriterionPaper) {
  const lomem::FewBit paper{.bits = 2, .criterion = "paper"};
  const auto x = leaf({3, 101});
  const auto gradient = [&](const torch::Tensor& y) { return torch::autograd::grad({y.sum()}, {x})[0]; };
  EXPECT_TRUE(torch::equal(gradient(lomem::regelu2(x)), gradient(lomem::gelu(x, "none", paper))));
  EXPECT_TRUE(torch::equal(gradient(lomem::regelu2(x, "tanh")), gradient(lomem::gelu(x, "tanh", paper))));
  EXPECT_TRUE(torch::equal(gradient(lomem::resilu2(x)), gradient(lomem::silu(x, paper))));
}

TEST(LowMemoryBP, HasShapesOnTheMetaDevice) {
  const auto x = torch::empty({2, 3, 8}, torch::TensorOptions(torch::kMeta).dtype(torch::kBFloat16));
  EXPECT_EQ(lomem::regelu2(x).sizes(), x.sizes());
  EXPECT_EQ(lomem::resilu2(x).scalar_type(), torch::kBFloat16);
}

TEST(LowMemoryBP, KeepsNothingWithoutGradient) {
  EXPECT_FALSE(lomem::regelu2(torch::randn({4, 8})).requires_grad());
}

TEST(LowMemoryBP, ErrorsNameOpArgumentAndBothValues) {
  const auto x = torch::randn({4, 8});
  EXPECT_EQ(
      error_of([&] { lomem::regelu2(x, "exact"); }),
      "lomem::regelu2: approximate is 'exact', expected 'none' or 'tanh'");
  EXPECT_EQ(
      error_of([&] { lomem::resilu2(x.to(torch::kInt)); }),
      "lomem::resilu2: input has dtype int32, expected float64, float32, bfloat16 or float16");
}

TEST(LowMemoryBPModules, TrainInSequential) {
  torch::nn::Sequential net(
      torch::nn::Linear(8, 16), lomem::nn::ReGELU2(), torch::nn::Linear(16, 8), lomem::nn::ReSiLU2());
  net->forward(torch::randn({5, 8})).square().sum().backward();
  for (const auto& parameter : net->named_parameters()) {
    ASSERT_TRUE(parameter.value().grad().defined()) << parameter.key();
    EXPECT_TRUE(torch::isfinite(parameter.value().grad()).all().item<bool>()) << parameter.key();
  }
}

TEST(LowMemoryBPModules, HonourTheirOptions) {
  const auto x = torch::randn({5, 8});
  lomem::nn::ReGELU2 tanh(lomem::nn::ReGELU2Options().approximate("tanh"));
  EXPECT_TRUE(torch::equal(tanh->forward(x), torch::gelu(x, "tanh")));
}

TEST(LowMemoryBPModules, PrintThemselves) {
  std::stringstream stream;
  stream << *lomem::nn::ReGELU2() << "; " << *lomem::nn::ReSiLU2();
  EXPECT_EQ(stream.str(), "lomem::nn::ReGELU2(approximate=none); lomem::nn::ReSiLU2()");
}

}  // namespace
