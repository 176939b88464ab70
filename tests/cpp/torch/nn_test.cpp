// torch::nn modules: in Sequential, with parameters, saved and loaded.
#include <gtest/gtest.h>
#include <lomem/nn.h>
#include <torch/torch.h>

#include <sstream>

namespace {

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(
      torch::nn::Linear(8, 16), lomem::nn::MSLayerNorm(lomem::nn::MSLayerNormOptions({16}).elementwise_affine(true)),
      lomem::nn::ReGELU2(), torch::nn::Linear(16, 8), lomem::nn::MSRMSNorm(8), lomem::nn::ReSiLU2(),
      lomem::nn::MSRMSNorm(lomem::nn::MSRMSNormOptions({8}).elementwise_affine(true).eps(1e-6)));
}

TEST(Modules, TrainInSequential) {
  auto net = make_net();
  const auto x = torch::randn({5, 8});
  net->forward(x).square().sum().backward();
  for (const auto& parameter : net->named_parameters()) {
    ASSERT_TRUE(parameter.value().grad().defined()) << parameter.key();
    EXPECT_TRUE(torch::isfinite(parameter.value().grad()).all().item<bool>()) << parameter.key();
  }
}

TEST(Modules, HaveNamedParameters) {
  const auto net = make_net();
  std::vector<std::string> names;
  for (const auto& parameter : net->named_parameters()) {
    names.push_back(parameter.key());
  }
  EXPECT_EQ(
      names, (std::vector<std::string>{"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "6.weight"}));
}

TEST(Modules, SaveAndLoad) {
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

TEST(Modules, CloneOwnsItsParameters) {
  lomem::nn::MSLayerNorm norm(lomem::nn::MSLayerNormOptions({4}).elementwise_affine(true));
  const auto copy = std::dynamic_pointer_cast<lomem::nn::MSLayerNormImpl>(norm->clone());
  {
    torch::NoGradGuard no_grad;
    norm->weight.fill_(3);
  }
  EXPECT_TRUE(torch::equal(copy->weight, torch::ones({4})));
  EXPECT_TRUE(torch::equal(copy->bias, torch::zeros({4})));
}

TEST(Modules, HonourTheirOptions) {
  const auto x = torch::randn({5, 8});
  lomem::nn::ReGELU2 tanh(lomem::nn::ReGELU2Options().approximate("tanh"));
  EXPECT_TRUE(torch::equal(tanh->forward(x), torch::gelu(x, "tanh")));
  lomem::nn::MSLayerNorm no_bias(lomem::nn::MSLayerNormOptions({8}).elementwise_affine(true).bias(false).eps(0.1));
  EXPECT_EQ(no_bias->parameters().size(), 1);
  EXPECT_TRUE(torch::allclose(no_bias->forward(x), torch::layer_norm(x, {8}, {}, {}, 0.1), 1e-5, 1e-6));
  lomem::nn::MSRMSNorm half(lomem::nn::MSRMSNormOptions({8}).output_dtype(torch::kHalf));
  EXPECT_EQ(half->forward(x).scalar_type(), torch::kHalf);
}

TEST(Modules, TakeOneSizeOrSeveral) {
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

TEST(Modules, PrintThemselves) {
  std::stringstream stream;
  stream << *lomem::nn::ReGELU2() << "; " << *lomem::nn::ReSiLU2() << "; " << *lomem::nn::MSLayerNorm(8) << "; "
         << *lomem::nn::MSRMSNorm(8);
  EXPECT_EQ(
      stream.str(),
      "lomem::nn::ReGELU2(approximate=none); lomem::nn::ReSiLU2(); "
      "lomem::nn::MSLayerNorm([8], eps=1e-05, elementwise_affine=false); "
      "lomem::nn::MSRMSNorm([8], eps=machine epsilon, elementwise_affine=false)");
}

}  // namespace
