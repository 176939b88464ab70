// Dropout, from C++.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <lomem/nn/dropout.h>
#include <lomem/ops/dropout.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "helpers.h"

namespace {

torch::Tensor generator_state() {
  return at::detail::getDefaultCPUGenerator().get_state();
}

TEST(Dropout, IsTorchsBitForBit) {
  for (const torch::ScalarType dtype : dtypes) {
    for (const double p : {0.1, 0.5, 0.9}) {
      const auto x = leaf({5, 33}, dtype);
      for (const auto& input : {x, x.t(), x.slice(1, 1, 20), x.detach()}) {
        torch::manual_seed(7);
        const auto want = torch::dropout(input, p, true);
        const auto state = generator_state();
        torch::manual_seed(7);
        const auto got = lomem::dropout(input, p);
        EXPECT_TRUE(torch::equal(got, want)) << dtype << ", " << p;
        EXPECT_EQ(got.strides(), want.strides());
        EXPECT_TRUE(torch::equal(generator_state(), state)) << dtype << ", " << p;
        if (input.requires_grad()) {
          const auto grad = torch::randn_like(want);
          EXPECT_TRUE(
              torch::equal(torch::autograd::grad({got}, {x}, {grad})[0], torch::autograd::grad({want}, {x}, {grad})[0]))
              << dtype << ", " << p;
        }
      }
    }
  }
}

TEST(Dropout, SavesOneBitPerElement) {
  for (const torch::ScalarType dtype : dtypes) {
    EXPECT_LE(
        saved_bytes([](const torch::Tensor& x) { return lomem::dropout(x, 0.1); }, torch::randn({64, 64}).to(dtype)),
        64 * 64 / 8 + 64);  // (An allocation is rounded up.)
  }
  EXPECT_EQ(saved_bytes([](const torch::Tensor& x) { return lomem::dropout(x, 0.0).clone(); }, torch::ones({64})), 0);
}

TEST(Dropout, GivesTheSameAgainFromItsMask) {
  const auto x = torch::randn({5, 33}).to(torch::kBFloat16);
  const auto [output, mask] = lomem::dropout_forward(x, 0.3);
  EXPECT_EQ(mask.sizes(), torch::IntArrayRef({(5 * 33 + 7) / 8}));
  EXPECT_TRUE(torch::equal(lomem::dropout_apply(x, mask, 0.3), output));
  EXPECT_TRUE(torch::equal(lomem::dropout_apply(x.t().contiguous().t(), mask, 0.3), output));
}

TEST(Dropout, OfASeedSavesTheSeed) {
  for (const torch::ScalarType dtype : dtypes) {
    const auto x = torch::randn({64, 64}).to(dtype);
    EXPECT_LE(saved_bytes([](const torch::Tensor& x) { return lomem::dropout(x, 0.1, true, "seed"); }, x), 64);
    const auto leaf = x.detach().requires_grad_();
    const auto output = lomem::dropout(leaf, 0.3, true, "seed");
    const auto gradient = torch::autograd::grad({output.sum()}, {leaf})[0];
    EXPECT_TRUE(torch::equal(gradient != 0, output != 0)) << dtype;
    const double rate = (output == 0).to(torch::kDouble).mean().item<double>();
    EXPECT_NEAR(rate, 0.3, 6 * std::sqrt(0.3 * 0.7 / 4096)) << dtype;  // six standard deviations
  }
}

TEST(Dropout, GivesTheSameAgainFromItsSeed) {
  const auto x = torch::randn({5, 33}).to(torch::kHalf);
  torch::manual_seed(3);
  const auto [output, seed] = lomem::seeded_dropout_forward(x, 0.3);
  EXPECT_TRUE(torch::equal(lomem::seeded_dropout_apply(x, seed, 0.3), output));
  EXPECT_TRUE(torch::equal(lomem::seeded_dropout_apply(x.t().contiguous().t(), seed, 0.3), output));
  EXPECT_FALSE(torch::equal(std::get<0>(lomem::seeded_dropout_forward(x, 0.3)), output));
  torch::manual_seed(3);
  EXPECT_TRUE(torch::equal(lomem::dropout(x, 0.3, true, "seed"), output));
}

TEST(Dropout, DoesNothingInEvaluation) {
  const auto x = torch::randn({4, 5});
  EXPECT_TRUE(lomem::dropout(x, 0.5, false).is_same(x));
  EXPECT_TRUE(lomem::dropout(x, 0.0).is_same(x));
}

TEST(Dropout, Module) {
  lomem::nn::Dropout module(lomem::nn::DropoutOptions(0.25));
  const auto x = torch::randn({64, 16});
  torch::manual_seed(3);
  const auto got = module(x);
  torch::manual_seed(3);
  EXPECT_TRUE(torch::equal(got, torch::dropout(x, 0.25, true)));
  module->eval();
  EXPECT_TRUE(torch::equal(module(x), x));
  torch::nn::Sequential layers(torch::nn::Linear(4, 16), lomem::nn::Dropout());
  EXPECT_EQ(layers->forward(torch::randn({3, 4})).sizes(), torch::IntArrayRef({3, 16}));
  std::ostringstream text;
  text << module;
  EXPECT_EQ(text.str(), "lomem::nn::Dropout(p=0.25, saves=mask)");
  lomem::nn::Dropout with_seed(lomem::nn::DropoutOptions(0.25).saves("seed"));
  torch::manual_seed(5);
  const auto want = with_seed(x);
  torch::manual_seed(5);
  EXPECT_TRUE(torch::equal(lomem::dropout(x, 0.25, true, "seed"), want));
}

TEST(Dropout, ErrorsNameOpArgumentAndBothValues) {
  const auto x = torch::zeros({3, 4});
  EXPECT_EQ(error_of([&] { lomem::dropout(x, 1.0); }), "lomem::dropout: p is 1, expected a number in [0, 1)");
  EXPECT_EQ(
      error_of([&] { lomem::dropout(x, std::numeric_limits<double>::quiet_NaN(), false); }),
      "lomem::dropout: p is nan, expected a number in [0, 1)");
  EXPECT_EQ(
      error_of([&] { lomem::dropout(x, 0.5, true, "bits"); }),
      "lomem::dropout: saves is 'bits', expected 'mask' or 'seed'");
  EXPECT_EQ(
      error_of([&] { lomem::seeded_dropout_apply(x, torch::zeros({3}), 0.5); }),
      "lomem::seeded_dropout_apply: seed is of dtype float32 and shape [3], expected int64 and []");
  EXPECT_EQ(
      error_of([&] { lomem::dropout(x.to(torch::kInt)); }),
      "lomem::dropout: input has dtype int32, expected float64, float32, bfloat16 or float16");
  EXPECT_EQ(
      error_of([&] { lomem::dropout_apply(x, torch::zeros({3}, torch::kByte), 0.5); }),
      "lomem::dropout_apply: mask has 3 bytes, expected 2 for 12 elements of 1 bits");
}

}  // namespace
