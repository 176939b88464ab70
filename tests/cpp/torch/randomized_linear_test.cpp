// The randomized linear layer from C++: function and module, with no Python.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <lomem/nn.h>
#include <lomem/ops.h>
#include <torch/torch.h>

#include <cmath>
#include <sstream>

namespace {

const char* const matmuls[] = {"gaussian", "rademacher", "dct", "dft", "crs", "wta-crs"};

TEST(RandomizedLinear, IsLinearButForTheGradientOfTheWeight) {
  const auto x = torch::randn({4, 5, 6}).requires_grad_();
  const auto weight = torch::randn({3, 6}).requires_grad_();
  const auto bias = torch::randn({3}).requires_grad_();
  const auto grad = torch::randn({4, 5, 3});
  const auto exact = torch::linear(x, weight, bias);
  const auto want = torch::autograd::grad({exact}, {x, weight, bias}, {grad});
  for (const char* matmul : matmuls) {
    const auto y = lomem::randomized_linear(x, weight, bias, {.matmul = matmul, .proj_dim_ratio = 0.3});
    EXPECT_TRUE(torch::equal(y, exact)) << matmul;
    const auto got = torch::autograd::grad({y}, {x, weight, bias}, {grad});
    EXPECT_TRUE(torch::equal(got[0], want[0])) << matmul;
    EXPECT_FALSE(torch::allclose(got[1], want[1])) << matmul;
    EXPECT_TRUE(torch::equal(got[2], want[2])) << matmul;
  }
}

TEST(RandomizedLinear, EstimatesWithoutBias) {
  torch::manual_seed(0);
  const auto x = torch::randn({12, 4}, torch::kDouble);
  const auto weight = torch::randn({3, 4}, torch::kDouble).requires_grad_();
  const auto grad = torch::randn({12, 3}, torch::kDouble);
  const auto exact = grad.t().mm(x);
  constexpr int64_t count = 2000;
  for (const char* matmul : matmuls) {
    std::vector<torch::Tensor> estimates;
    for (int64_t i = 0; i < count; ++i) {
      const auto y = lomem::randomized_linear(x, weight, {}, {.matmul = matmul, .proj_dim = 4});
      estimates.push_back(torch::autograd::grad({y}, {weight}, {grad})[0]);
    }
    const auto errors = torch::stack(estimates) - exact;
    // Each mean within 5 of its standard errors.
    const auto z = errors.mean(0) / (errors.std(0) / std::sqrt(static_cast<double>(count)));
    EXPECT_LT(z.abs().max().item<double>(), 5) << matmul;
  }
}

TEST(RandomizedLinear, FollowsFromTheSeeds) {
  const auto x = torch::randn({20, 6});
  lomem::nn::RandomizedLinear layer(lomem::nn::RandomizedLinearOptions(6, 3).proj_dim_ratio(0.2).matmul("dct"));
  const auto gradient = [&] { return torch::autograd::grad({layer->forward(x).square().sum()}, {layer->weight})[0]; };
  const auto with_seeds = [&](uint64_t torchs, uint64_t lomems) {
    torch::manual_seed(torchs);
    lomem::manual_seed(lomems);
    return gradient();
  };
  EXPECT_TRUE(torch::equal(with_seeds(1, 2), with_seeds(1, 2)));
  EXPECT_FALSE(torch::equal(with_seeds(1, 2), with_seeds(1, 3)));
  EXPECT_FALSE(torch::equal(with_seeds(1, 2), with_seeds(2, 2)));
  const auto state = lomem::random_state();
  const auto next = gradient();
  EXPECT_FALSE(torch::equal(gradient(), next));
  lomem::set_random_state(state);
  EXPECT_TRUE(torch::equal(gradient(), next));
  // A seed of the caller's.
  const auto given = [&](int64_t seed) {
    const auto y = lomem::randomized_linear(
        x, layer->weight, {}, {.matmul = "crs", .proj_dim = 4, .seed = torch::tensor(seed, torch::kLong)});
    return torch::autograd::grad({y.square().sum()}, {layer->weight})[0];
  };
  EXPECT_TRUE(torch::equal(given(5), given(5)));
  EXPECT_FALSE(torch::equal(given(5), given(6)));
}

TEST(RandomizedLinear, ShiftsNobodyElsesNumbers) {
  const auto generator = at::detail::getDefaultCPUGenerator();
  const auto before = generator.get_state();
  const auto x = torch::ones({20, 6});
  const auto weight = torch::ones({3, 6}).requires_grad_();
  for (const char* matmul : matmuls) {
    const auto y = lomem::randomized_linear(x, weight, {}, {.matmul = matmul, .proj_dim = 4});
    torch::autograd::grad({y.sum()}, {weight});
    EXPECT_TRUE(torch::equal(generator.get_state(), before)) << matmul;
  }
}

TEST(RandomizedLinear, TrainsAlikeWhereItIsBuiltAlike) {
  const auto x = torch::randn({20, 6});
  const auto train = [&] {
    torch::manual_seed(4);
    lomem::nn::RandomizedLinear layer(lomem::nn::RandomizedLinearOptions(6, 6).proj_dim(3));
    for (int i = 0; i < 3; ++i) {
      layer->forward(layer->forward(x)).sum().backward();
    }
    return layer->weight.grad();
  };
  const auto first = train();
  EXPECT_TRUE(torch::equal(train(), first));
}

TEST(RandomizedLinear, IsExactInEvaluationAndWithAllRows) {
  const auto x = torch::randn({20, 6});
  lomem::nn::RandomizedLinear layer(lomem::nn::RandomizedLinearOptions(6, 3).proj_dim(2));
  layer->eval();
  const auto exact = torch::ones({3, 20}).mm(x);
  EXPECT_TRUE(torch::allclose(torch::autograd::grad({layer->forward(x).sum()}, {layer->weight})[0], exact, 1e-5, 1e-5));
  lomem::nn::RandomizedLinear all(lomem::nn::RandomizedLinearOptions(6, 3).proj_dim_ratio(1).bias(false));
  EXPECT_FALSE(all->bias.defined());
  EXPECT_TRUE(torch::allclose(torch::autograd::grad({all->forward(x).sum()}, {all->weight})[0], exact, 1e-5, 1e-5));
}

TEST(RandomizedLinear, HasTheParametersOfLinear) {
  torch::manual_seed(3);
  torch::nn::Linear plain(6, 3);
  torch::manual_seed(3);
  lomem::nn::RandomizedLinear layer(lomem::nn::RandomizedLinearOptions(6, 3).proj_dim_ratio(0.25));
  EXPECT_TRUE(torch::equal(plain->weight, layer->weight));
  EXPECT_TRUE(torch::equal(plain->bias, layer->bias));
  std::stringstream archive;
  torch::save(layer, archive);
  torch::nn::Linear loaded(6, 3);
  torch::load(loaded, archive);
  EXPECT_TRUE(torch::equal(loaded->weight, layer->weight));
  const auto copy = std::dynamic_pointer_cast<lomem::nn::RandomizedLinearImpl>(layer->clone());
  {
    torch::NoGradGuard no_grad;
    layer->weight.zero_();
  }
  EXPECT_TRUE(torch::equal(copy->weight, plain->weight));
  std::stringstream text;
  text << *copy;
  EXPECT_EQ(
      text.str(),
      "lomem::nn::RandomizedLinear(in_features=6, out_features=3, bias=true, matmul=gaussian, proj_dim_ratio=0.25)");
}

TEST(RandomizedLinear, RefusesNonsense) {
  const auto x = torch::randn({4, 6});
  const auto weight = torch::randn({3, 6});
  const auto error_of = [&](const lomem::RandomizedLinearArgs& args) -> std::string {
    try {
      lomem::randomized_linear(x, weight, {}, args);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  EXPECT_EQ(
      error_of({}), "lomem::randomized_linear: proj_dim and proj_dim_ratio are both missing, expected one of them");
  EXPECT_EQ(
      error_of({.proj_dim_ratio = 2.0}), "lomem::randomized_linear: proj_dim_ratio is 2, expected a number in (0, 1]");
  EXPECT_EQ(
      error_of({.matmul = "fft", .proj_dim = 2}),
      "lomem::randomized_linear: matmul is 'fft', expected 'gaussian', 'rademacher', 'dct', 'dft', 'crs' or 'wta-crs'");
}

}  // namespace
