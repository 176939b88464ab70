// The family of activations with few-bit derivatives, for C++ users: functions and torch::nn modules.
#include <gtest/gtest.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace {

using torch::Tensor;

struct Case {
  std::string name;
  std::function<Tensor(const Tensor&)> ours;
  std::function<Tensor(const Tensor&)> torchs;
};

template <class Module, class Plain>
Case modules(const std::string& name, Module module, Plain plain) {
  return {
      name, [module](const Tensor& x) mutable { return module->forward(x); },
      [plain](const Tensor& x) mutable { return plain->forward(x); }};
}

std::vector<Case> smooth() {
  namespace nn = lomem::nn;
  namespace t = torch::nn;
  const lomem::FewBit four{.bits = 4};
  return {
      {"gelu", [](const Tensor& x) { return lomem::gelu(x); }, [](const Tensor& x) { return torch::gelu(x); }},
      modules(
          "GELU", nn::GELU(t::GELUOptions().approximate("tanh"), four), t::GELU(t::GELUOptions().approximate("tanh"))),
      {"QuickGELU", [=](const Tensor& x) mutable { return nn::QuickGELU(four)->forward(x); },
       [](const Tensor& x) { return x * torch::sigmoid(1.702 * x); }},
      modules("SiLU", nn::SiLU(four), t::SiLU()),
      modules("Mish", nn::Mish(four), t::Mish()),
      modules("Sigmoid", nn::Sigmoid(four), t::Sigmoid()),
      modules("Tanh", nn::Tanh(four), t::Tanh()),
      modules("Tanhshrink", nn::Tanhshrink(four), t::Tanhshrink()),
      modules("Softplus", nn::Softplus(t::SoftplusOptions().beta(2)), t::Softplus(t::SoftplusOptions().beta(2))),
      modules("Softsign", nn::Softsign(four), t::Softsign()),
      modules("LogSigmoid", nn::LogSigmoid(four), t::LogSigmoid()),
      modules("ELU", nn::ELU(t::ELUOptions().alpha(0.5), four), t::ELU(t::ELUOptions().alpha(0.5))),
      modules("CELU", nn::CELU(t::CELUOptions().alpha(0.5), four), t::CELU(t::CELUOptions().alpha(0.5))),
      modules("SELU", nn::SELU(four), t::SELU()),
      {"Hardswish", [=](const Tensor& x) { return nn::Hardswish(four)->forward(x); },
       [](const Tensor& x) { return torch::hardswish(x); }},
  };
}

std::vector<Case> straight() {
  namespace nn = lomem::nn;
  namespace t = torch::nn;
  const auto hardtanh = t::HardtanhOptions().min_val(-0.3).max_val(0.7);
  return {
      modules("ReLU", nn::ReLU(), t::ReLU()),
      modules(
          "LeakyReLU", nn::LeakyReLU(t::LeakyReLUOptions().negative_slope(0.2)),
          t::LeakyReLU(t::LeakyReLUOptions().negative_slope(0.2))),
      modules("ReLU6", nn::ReLU6(), t::ReLU6()),
      modules("Threshold", nn::Threshold(t::ThresholdOptions(0.1, 20)), t::Threshold(0.1, 20)),
      modules("Hardtanh", nn::Hardtanh(hardtanh), t::Hardtanh(hardtanh)),
      {"Hardsigmoid", [](const Tensor& x) { return nn::Hardsigmoid()->forward(x); },
       [](const Tensor& x) { return torch::hardsigmoid(x); }},
      modules("Hardshrink", nn::Hardshrink(), t::Hardshrink()),
      modules("Softshrink", nn::Softshrink(), t::Softshrink()),
  };
}

Tensor gradient(const std::function<Tensor(const Tensor&)>& f, const Tensor& x) {
  const Tensor leaf = x.clone().requires_grad_();
  return torch::autograd::grad({f(leaf).sum()}, {leaf})[0];
}

TEST(Activations, AreTorchsBitForBit) {
  const auto x = torch::randn({5, 333}) * 3;
  for (const auto& cases : {smooth(), straight()}) {
    for (const Case& c : cases) {
      EXPECT_TRUE(torch::equal(c.ours(x), c.torchs(x))) << c.name;
      EXPECT_TRUE(torch::equal(c.ours(x.clone().requires_grad_()), c.torchs(x))) << c.name;
    }
  }
}

TEST(Activations, SmoothOnesHaveNearlyTheGradient) {
  const auto x = torch::linspace(-4, 4, 10001, torch::kDouble);
  for (const Case& c : smooth()) {
    const Tensor exact = gradient(c.torchs, x);
    // Of 3 and 4 bits: far nearer than the mean. (A step is at most the derivative's range / 3 wide.)
    EXPECT_LT((gradient(c.ours, x) - exact).norm().item<double>(), 0.35 * (exact.norm()).item<double>()) << c.name;
  }
}

TEST(Activations, StraightOnesHaveTheGradient) {
  const auto x =
      torch::cat({torch::linspace(-8, 8, 10001), torch::tensor({0.0F, 6.0F, -3.0F, 3.0F, 0.5F, -0.5F, 0.1F})});
  for (const Case& c : straight()) {
    EXPECT_TRUE(torch::equal(gradient(c.ours, x), gradient(c.torchs, x))) << c.name;
  }
}

TEST(Activations, TakeStepsOfTheUser) {
  const lomem::StepFunction steps{{-1, 1}, {0.25, 0.5, 2}};
  const auto x = torch::tensor({-2.0F, 0.0F, 3.0F});
  const auto want = torch::tensor({0.25F, 0.5F, 2.0F});
  const auto known = [&](const Tensor& t) { return lomem::silu(t, {.bits = 2, .steps = steps}); };
  EXPECT_TRUE(torch::equal(gradient(known, x), want));
  const auto own = [&](const Tensor& t) {
    return lomem::step_activation(t, [](const Tensor& u) { return u.sin(); }, steps);
  };
  EXPECT_TRUE(torch::equal(own(x), x.sin()));
  EXPECT_TRUE(torch::equal(gradient(own, x), want));
  const auto identity = [&](const Tensor& t) {
    return lomem::step_activation(t, [](const Tensor& u) { return u; }, steps);
  };
  EXPECT_TRUE(torch::equal(gradient(identity, x), want));
}

TEST(Activations, TellTheirStepFunctions) {
  for (int64_t bits = 1; bits <= 8; ++bits) {
    const auto steps = lomem::step_function("mish", bits, "derivative");
    EXPECT_EQ(steps.levels.size(), size_t{1} << bits);
    EXPECT_EQ(steps.boundaries.size() + 1, steps.levels.size());
    EXPECT_TRUE(std::is_sorted(steps.boundaries.begin(), steps.boundaries.end()));
  }
}

TEST(Activations, RefuseBadArguments) {
  const auto x = torch::ones({3});
  EXPECT_THROW(lomem::gelu(x, "none", {.bits = 9}), c10::ValueError);
  EXPECT_THROW(lomem::gelu(x, "exact"), c10::ValueError);
  EXPECT_THROW(lomem::gelu(x, "none", {.criterion = "best"}), c10::ValueError);
  EXPECT_THROW(lomem::step_function("relu", 3), c10::ValueError);
  const auto sine = [](const Tensor& t) { return t.sin(); };
  EXPECT_THROW(lomem::step_activation(x, sine, {{1, 0}, {0, 1, 2}}), c10::ValueError);
  EXPECT_THROW(lomem::step_activation(x, sine, {{}, {}}), c10::ValueError);
  const auto sum = [](const Tensor& t) { return t.sum(); };
  EXPECT_THROW(lomem::step_activation(x, sum, {{0}, {0, 1}}), c10::ValueError);
}

TEST(ActivationModules, WorkInSequential) {
  torch::nn::Sequential net(
      torch::nn::Linear(8, 16), lomem::nn::GELU(lomem::FewBit{.bits = 3}), torch::nn::Linear(16, 8),
      lomem::nn::LeakyReLU());
  net->forward(torch::randn({5, 8})).square().sum().backward();
  for (const auto& parameter : net->named_parameters()) {
    EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
  }
  std::ostringstream text;
  text << net;
  EXPECT_NE(text.str().find("lomem::nn::GELU(bits=3)"), std::string::npos) << text.str();
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  const auto x = torch::randn({2, 8});
  EXPECT_TRUE(torch::equal(copy->forward(x), net->forward(x)));
}

TEST(ActivationModules, InPlace) {
  auto x = torch::randn({6});
  const auto want = torch::relu(x);
  lomem::nn::ReLU relu(torch::nn::ReLUOptions(true));
  const auto y = relu->forward(x);
  EXPECT_EQ(y.data_ptr(), x.data_ptr());
  EXPECT_TRUE(torch::equal(x, want));
}

}  // namespace
