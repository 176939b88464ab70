// The norms for C++ users: functions and torch::nn modules.
#include <gtest/gtest.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <sstream>

#include "helpers.h"

namespace {

TEST(Norms, MatchTorch) {
  const auto x = leaf({4, 3, 10}, torch::kDouble);
  const auto weight = (torch::rand({3, 10}, torch::kDouble) + 0.5).requires_grad_();
  const auto bias = leaf({3, 10}, torch::kDouble);
  const auto grad = torch::randn({4, 3, 10}, torch::kDouble);
  const auto check = [&](const torch::Tensor& got, const torch::Tensor& want, std::vector<torch::Tensor> inputs) {
    EXPECT_TRUE(torch::allclose(got, want, 1e-12, 1e-13));
    const auto got_gradients = torch::autograd::grad({got}, inputs, {grad});
    const auto want_gradients = torch::autograd::grad({want}, inputs, {grad});
    for (size_t i = 0; i < inputs.size(); ++i) {
      EXPECT_TRUE(torch::allclose(got_gradients[i], want_gradients[i], 1e-11, 1e-12)) << i;
    }
  };
  check(lomem::ms_layer_norm(x, {3, 10}, weight, bias), torch::layer_norm(x, {3, 10}, weight, bias), {x, weight, bias});
  check(lomem::ms_layer_norm(x, {10}), torch::layer_norm(x, {10}), {x});
  check(lomem::ms_rms_norm(x, {3, 10}, weight, 1e-6), torch::rms_norm(x, {3, 10}, weight, 1e-6), {x, weight});
  check(lomem::ms_rms_norm(x, {10}), torch::rms_norm(x, {10}), {x});
}

TEST(Norms, EmitTheDtypeAskedFor) {
  const auto x = leaf({4, 10});
  const auto y = lomem::ms_layer_norm(x, {10}, std::nullopt, std::nullopt, 1e-5, torch::kBFloat16);
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  y.sum().backward();
  EXPECT_EQ(x.grad().scalar_type(), torch::kFloat);
}

TEST(Norms, HaveShapesOnTheMetaDevice) {
  const auto x = torch::empty({2, 3, 8}, torch::TensorOptions(torch::kMeta).dtype(torch::kBFloat16));
  const auto y = lomem::ms_layer_norm(x, {8}, {}, {}, 1e-5, torch::kFloat);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(y.scalar_type(), torch::kFloat);
}

TEST(Norms, KeepNothingWithoutGradient) {
  torch::NoGradGuard no_grad;
  EXPECT_FALSE(lomem::ms_layer_norm(leaf({4, 8}), {8}).requires_grad());
}

TEST(Norms, ErrorsNameOpArgumentAndBothValues) {
  const auto x = torch::randn({4, 8});
  EXPECT_EQ(
      error_of([&] { lomem::ms_layer_norm(x, {7}); }),
      "lomem::ms_layer_norm: input has shape [4, 8], expected one that ends with normalized_shape [7]");
  EXPECT_EQ(
      error_of([&] { lomem::ms_rms_norm(x, {8}, {}, -1.0); }),
      "lomem::ms_rms_norm: eps is -1, expected a finite number >= 0");
}

TEST(Norms, ResultsDoNotDependOnTheNumberOfThreads) {
  const auto x = torch::randn({257, 1031});
  const auto weight = torch::rand({1031}) + 0.5;
  const auto run = [&](int threads) {
    at::set_num_threads(threads);
    auto input = x.clone().requires_grad_();
    auto gamma = weight.clone().requires_grad_();
    auto bias = torch::zeros({1031}).requires_grad_();
    const auto normal = lomem::ms_layer_norm(input, {1031}, gamma, bias);
    lomem::gelu(normal, "none", {.bits = 2, .criterion = "paper"}).square().sum().backward();
    return std::vector<torch::Tensor>{input.grad(), gamma.grad(), bias.grad()};
  };
  const int before = at::get_num_threads();
  const auto one = run(1);
  for (const int threads : {2, 3, 7}) {
    const auto many = run(threads);
    for (size_t i = 0; i < one.size(); ++i) {
      EXPECT_TRUE(torch::equal(one[i], many[i])) << threads << " threads, gradient " << i;
    }
  }
  at::set_num_threads(before);
}

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(
      torch::nn::Linear(8, 16), lomem::nn::MSLayerNorm(lomem::nn::MSLayerNormOptions({16}).elementwise_affine(true)),
      lomem::nn::GELU(), torch::nn::Linear(16, 8), lomem::nn::MSRMSNorm(8), lomem::nn::SiLU(),
      lomem::nn::MSRMSNorm(lomem::nn::MSRMSNormOptions({8}).elementwise_affine(true).eps(1e-6)));
}

TEST(NormModules, TrainInSequential) {
  auto net = make_net();
  const auto x = torch::randn({5, 8});
  net->forward(x).square().sum().backward();
  for (const auto& parameter : net->named_parameters()) {
    ASSERT_TRUE(parameter.value().grad().defined()) << parameter.key();
    EXPECT_TRUE(torch::isfinite(parameter.value().grad()).all().item<bool>()) << parameter.key();
  }
}

TEST(NormModules, HaveNamedParameters) {
  const auto net = make_net();
  std::vector<std::string> names;
  for (const auto& parameter : net->named_parameters()) {
    names.push_back(parameter.key());
  }
  EXPECT_EQ(
      names, (std::vector<std::string>{"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "6.weight"}));
}

TEST(NormModules, SaveAndLoad) {
  auto net = make_net();
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : net->parameters()) {
      parameter.uniform_(0.5, 1.5);
    }
  }
  std::stringstream stream;
  torch::save(net, stream);
  auto loaded = make_net();
  torch::load(loaded, stream);
  const auto x = torch::randn({5, 8});
  EXPECT_TRUE(torch::equal(net->forward(x), loaded->forward(x)));
}

TEST(NormModules, CloneOwnsItsParameters) {
  lomem::nn::MSLayerNorm norm(lomem::nn::MSLayerNormOptions({4}).elementwise_affine(true));
  const auto copy = std::dynamic_pointer_cast<lomem::nn::MSLayerNormImpl>(norm->clone());
  {
    torch::NoGradGuard no_grad;
    norm->weight.fill_(3);
  }
  EXPECT_TRUE(torch::equal(copy->weight, torch::ones({4})));
  EXPECT_TRUE(torch::equal(copy->bias, torch::zeros({4})));
}

TEST(NormModules, HonourTheirOptions) {
  const auto x = torch::randn({5, 8});
  lomem::nn::MSLayerNorm no_bias(lomem::nn::MSLayerNormOptions({8}).elementwise_affine(true).bias(false).eps(0.1));
  EXPECT_EQ(no_bias->parameters().size(), 1);
  EXPECT_TRUE(torch::allclose(no_bias->forward(x), torch::layer_norm(x, {8}, {}, {}, 0.1), 1e-5, 1e-6));
  lomem::nn::MSRMSNorm half(lomem::nn::MSRMSNormOptions({8}).output_dtype(torch::kHalf));
  EXPECT_EQ(half->forward(x).scalar_type(), torch::kHalf);
}

TEST(NormModules, TakeOneSizeOrSeveral) {
  const auto x = torch::randn({5, 3, 8});
  EXPECT_TRUE(
      torch::allclose(
          lomem::nn::MSLayerNorm(std::vector<int64_t>{3, 8})->forward(x), torch::layer_norm(x, {3, 8}), 1e-5, 1e-6));
  EXPECT_TRUE(
      torch::allclose(
          lomem::nn::MSRMSNorm(lomem::nn::MSRMSNormOptions({3, 8}))->forward(x), torch::rms_norm(x, {3, 8}), 1e-5,
          1e-6));
  EXPECT_TRUE(torch::allclose(lomem::nn::MSLayerNorm(8)->forward(x), torch::layer_norm(x, {8}), 1e-5, 1e-6));
  EXPECT_TRUE(torch::allclose(lomem::nn::MSRMSNorm(8)->forward(x), torch::rms_norm(x, {8}), 1e-5, 1e-6));
}

TEST(NormModules, PrintThemselves) {
  std::stringstream stream;
  stream << *lomem::nn::MSLayerNorm(8) << "; " << *lomem::nn::MSRMSNorm(8);
  EXPECT_EQ(
      stream.str(),
      "lomem::nn::MSLayerNorm([8], eps=1e-05, elementwise_affine=false); "
      "lomem::nn::MSRMSNorm([8], eps=machine epsilon, elementwise_affine=false)");
}

}  // namespace
