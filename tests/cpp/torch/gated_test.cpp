// Gated units, from C++.
#include <gtest/gtest.h>
#include <lomem/nn/gated.h>
#include <lomem/ops/gated.h>

#include <sstream>

#include "helpers.h"

namespace {

torch::Tensor activated(const std::string& activation, const torch::Tensor& x) {
  return activation == "silu"        ? torch::silu(x)
         : activation == "gelu"      ? torch::gelu(x)
         : activation == "gelu_tanh" ? torch::gelu(x, "tanh")
         : activation == "relu"      ? torch::relu(x)
                                     : torch::sigmoid(x);
}

const std::string activations[] = {"silu", "gelu", "gelu_tanh", "relu", "sigmoid"};

TEST(Gated, IsWhatTorchReturns) {
  for (const torch::ScalarType dtype : dtypes) {
    for (const std::string& activation : activations) {
      const auto gate = leaf({5, 33}, dtype);
      const auto up = leaf({5, 33}, dtype);
      const auto want = activated(activation, gate) * up;
      EXPECT_TRUE(torch::equal(lomem::gated(gate, up, activation), want)) << activation;
      const auto both = torch::cat({gate, up}, -1).detach();
      EXPECT_TRUE(
          torch::equal(
              lomem::gated(both, std::nullopt, activation),
              activated(activation, both.slice(-1, 0, 33)) * both.slice(-1, 33)));
    }
  }
}

TEST(Gated, HasTorchsGradients) {
  for (const std::string& activation : activations) {
    const auto gate = leaf({5, 33}, torch::kDouble);
    const auto up = leaf({5, 33}, torch::kDouble);
    const auto want = torch::autograd::grad({(activated(activation, gate) * up).pow(2).sum()}, {gate, up});
    const auto got = torch::autograd::grad({lomem::gated(gate, up, activation).pow(2).sum()}, {gate, up});
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(torch::allclose(got[i], want[i], 1e-12, 1e-13)) << activation;
    }
  }
}

TEST(Gated, SavesItsOperandsAlone) {
  const auto up = torch::randn({64, 32});
  EXPECT_EQ(saved_bytes([&](const torch::Tensor& x) { return lomem::gated(x, up); }, torch::randn({64, 32})), 0);
  EXPECT_EQ(saved_bytes([](const torch::Tensor& x) { return lomem::gated(x); }, torch::randn({64, 64})), 0);
  const auto weight = torch::randn({8, 32}, torch::requires_grad());
  EXPECT_EQ(
      saved_bytes([&](const torch::Tensor& x) { return lomem::gated_linear(x, up, weight); }, torch::randn({64, 32})),
      0);
}

TEST(Gated, LinearHasTheGradientsOfLinear) {
  const auto both = leaf({2, 3, 16}, torch::kDouble);
  const auto weight = leaf({5, 8}, torch::kDouble);
  const auto bias = leaf({5}, torch::kDouble);
  const auto want = torch::linear(lomem::gated(both, std::nullopt, "gelu", "up_gate"), weight, bias);
  const auto got = lomem::gated_linear(both, std::nullopt, weight, bias, "gelu", "up_gate");
  EXPECT_TRUE(torch::equal(got, want));
  const auto want_gradients = torch::autograd::grad({want.pow(2).sum()}, {both, weight, bias});
  const auto got_gradients = torch::autograd::grad({got.pow(2).sum()}, {both, weight, bias});
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(torch::allclose(got_gradients[i], want_gradients[i], 1e-12, 1e-13)) << i;
  }
}

TEST(Gated, GivesTheResultAgain) {
  const auto gate = torch::randn({5, 33}).to(torch::kBFloat16);
  const auto up = torch::randn({5, 33}).to(torch::kBFloat16);
  const auto [grad_gate, grad_up, output] =
      lomem::gated_backward(gate, gate, up, "silu", "gate_up", {false, true, true});
  EXPECT_FALSE(grad_gate.defined());
  EXPECT_EQ(grad_up.sizes(), up.sizes());
  EXPECT_TRUE(torch::equal(output, lomem::gated(gate, up)));
}

TEST(Gated, Module) {
  lomem::nn::GatedUnit unit(lomem::nn::GatedUnitOptions("gelu").layout("interleaved"));
  const auto both = torch::randn({4, 16});
  EXPECT_TRUE(torch::equal(unit(both), lomem::gated(both, std::nullopt, "gelu", "interleaved")));
  EXPECT_TRUE(torch::equal(unit(both, both), lomem::gated(both, both, "gelu")));
  EXPECT_TRUE(torch::equal(lomem::nn::GatedUnit()(both), lomem::gated(both)));
  torch::nn::Sequential layers(torch::nn::Linear(4, 16), unit);
  EXPECT_EQ(layers->forward(torch::randn({3, 4})).sizes(), torch::IntArrayRef({3, 8}));
  std::ostringstream text;
  text << unit;
  EXPECT_EQ(text.str(), "lomem::nn::GatedUnit(activation=gelu, layout=interleaved)");
}

TEST(Gated, ErrorsNameOpArgumentAndBothValues) {
  EXPECT_EQ(
      error_of([] { lomem::gated(torch::zeros({3})); }),
      "lomem::gated: gate has shape [3], expected an even last dimension, which holds gate and up");
  EXPECT_EQ(
      error_of([] { lomem::gated(torch::zeros({3}), torch::zeros({4})); }),
      "lomem::gated: up has shape [4], expected [3], the shape of gate");
}

}  // namespace
