// Low-rank adapters, from C++.
#include <gtest/gtest.h>
#include <lomem/nn/lora.h>
#include <lomem/ops/lora.h>

#include <sstream>

#include "helpers.h"

namespace {

/// By torch's ops.
torch::Tensor expected(
    const torch::Tensor& input, const torch::Tensor& a, const torch::Tensor& b, double scaling,
    const std::optional<torch::Tensor>& bias, double p) {
  const auto dropped = torch::dropout(input.to(a.scalar_type()), p, /*train=*/true);
  return torch::linear(torch::linear(dropped, a), b, bias) * scaling;
}

TEST(LoRA, IsWhatTorchReturnsWithItsGradients) {
  for (const torch::ScalarType dtype : dtypes) {
    for (const torch::ScalarType adapter_dtype : dtypes) {
      for (const double p : {0.0, 0.25}) {
        const auto input = leaf({3, 5, 16}, dtype);
        const auto a = leaf({4, 16}, adapter_dtype);
        const auto b = leaf({7, 4}, adapter_dtype);
        const auto bias = leaf({7}, adapter_dtype);
        torch::manual_seed(1);
        const auto got = lomem::lora(input, a, b, 0.5, bias, p);
        torch::manual_seed(1);
        const auto want = expected(input, a, b, 0.5, bias, p);
        EXPECT_EQ(got.scalar_type(), adapter_dtype);
        EXPECT_TRUE(torch::equal(got, want)) << dtype << " " << adapter_dtype;
        const auto grad = torch::linspace(-1, 1, got.numel()).view_as(got).to(adapter_dtype);
        const auto got_gradients = torch::autograd::grad({got}, {input, a, b, bias}, {grad});
        const auto want_gradients = torch::autograd::grad({want}, {input, a, b, bias}, {grad});
        for (size_t i = 0; i < 4; ++i) {
          EXPECT_TRUE(torch::equal(got_gradients[i], want_gradients[i])) << dtype << " " << adapter_dtype << " " << i;
        }
      }
    }
  }
}

TEST(LoRA, SavesNoCopyOfItsInput) {
  const auto input = torch::randn({64, 32}).to(torch::kBFloat16);
  const auto a = torch::randn({4, 32}, torch::requires_grad());
  const auto b = torch::randn({8, 4}, torch::requires_grad());
  const auto saved = [&](double p, const torch::Tensor& a, const torch::Tensor& b) {
    return saved_bytes([&](const torch::Tensor& x) { return lomem::lora(x, a, b, 2, std::nullopt, p); }, input);
  };
  constexpr int64_t product = 64 * 4 * 4;
  constexpr int64_t mask = 64 * 32 / 8;
  EXPECT_EQ(saved(0, a, b), product);
  EXPECT_EQ(saved(0.5, a, b), product + mask);
  EXPECT_EQ(saved(0.5, a, b.detach()), mask);
  EXPECT_EQ(saved(0, a, b.detach()), 0);
}

TEST(LoRA, Module) {
  const torch::nn::Linear base(16, 7);
  lomem::nn::LoRALinear layer(base, lomem::nn::LoRALinearOptions(4).alpha(6).dropout(0.5).bias(true));
  EXPECT_EQ(layer->scaling(), 1.5);
  std::vector<std::string> trained;
  for (const auto& parameter : layer->named_parameters()) {
    if (parameter.value().requires_grad()) {
      trained.push_back(parameter.key());
    }
  }
  EXPECT_EQ(trained, (std::vector<std::string>{"lora_A.weight", "lora_B.weight", "lora_B.bias"}));
  const auto x = torch::randn({3, 16});
  EXPECT_TRUE(torch::equal(layer(x), torch::nn::Linear(base)(x)));
  {
    const torch::NoGradGuard no_grad;
    layer->lora_b->weight.normal_();
  }
  const auto& a = layer->lora_a->weight;
  const auto& b = layer->lora_b->weight;
  torch::manual_seed(2);
  const auto got = layer(x);
  torch::manual_seed(2);
  EXPECT_TRUE(torch::equal(got, torch::nn::Linear(base)(x) + expected(x, a, b, 1.5, layer->lora_b->bias, 0.5)));
  layer->eval();
  EXPECT_TRUE(torch::equal(layer(x), torch::nn::Linear(base)(x) + expected(x, a, b, 1.5, layer->lora_b->bias, 0)));
  EXPECT_EQ(lomem::nn::LoRALinear(base, lomem::nn::LoRALinearOptions(4).use_rslora(true))->scaling(), 0.5);
  std::ostringstream text;
  text << *layer;
  EXPECT_EQ(
      text.str().substr(0, text.str().find('\n')),
      "lomem::nn::LoRALinear(in_features=16, out_features=7, r=4, alpha=6, dropout=0.5, use_rslora=false, bias=true)(");
}

TEST(LoRA, ModuleHasTheDtypeOfItsBase) {
  torch::nn::Linear base(16, 7);
  base->to(torch::kBFloat16);
  lomem::nn::LoRALinear layer(base, 2);
  EXPECT_EQ(layer->lora_a->weight.scalar_type(), torch::kFloat);
  EXPECT_EQ(layer(torch::randn({3, 16}).to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
}

TEST(LoRA, ModuleIsCloned) {
  lomem::nn::LoRALinear layer(torch::nn::Linear(16, 7), 2);
  torch::nn::Sequential layers(layer);
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(layers->clone());
  const auto x = torch::randn({3, 16});
  EXPECT_TRUE(torch::equal(copy->forward(x), layer(x)));
  const auto parameters = layer->named_parameters();
  const auto copies = copy->named_parameters();
  ASSERT_EQ(copies.size(), parameters.size());
  for (const auto& parameter : parameters) {
    const auto& of_copy = copies["0." + parameter.key()];
    EXPECT_EQ(of_copy.requires_grad(), parameter.value().requires_grad()) << parameter.key();
    EXPECT_FALSE(of_copy.is_same(parameter.value()));
  }
}

TEST(LoRA, ErrorsNameOpArgumentAndBothValues) {
  EXPECT_EQ(
      error_of([] { lomem::lora(torch::zeros({3, 4}), torch::zeros({2, 4}), torch::zeros({5, 3})); }),
      "lomem::lora: lora_b has shape [5, 3], expected rank 2, that of lora_a");
  EXPECT_EQ(
      error_of([] { lomem::nn::LoRALinear(torch::nn::Linear(3, 2), 0); }),
      "lomem::nn::LoRALinear: r is 0, expected at least 1");
  EXPECT_EQ(
      error_of([] { lomem::nn::LoRALinear(torch::nn::Linear(3, 2), lomem::nn::LoRALinearOptions(1).dropout(1)); }),
      "lomem::lora: p is 1, expected a number in [0, 1)");
}

}  // namespace
