// The family of activations with few-bit derivatives, for C++ users: functions and torch::nn modules.
#include <gtest/gtest.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "helpers.h"

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

/// Those that have a published step function, by the names that ops call them.
std::vector<Case> published() {
  const lomem::FewBit paper{.bits = 2, .criterion = "paper"};
  return {
      {"gelu", [=](const Tensor& x) { return lomem::gelu(x, "none", paper); },
       [](const Tensor& x) { return torch::gelu(x, "none"); }},
      {"gelu_tanh", [=](const Tensor& x) { return lomem::gelu(x, "tanh", paper); },
       [](const Tensor& x) { return torch::gelu(x, "tanh"); }},
      {"quick_gelu", [=](const Tensor& x) { return lomem::quick_gelu(x, paper); },
       [](const Tensor& x) { return x * torch::sigmoid(1.702 * x); }},
      {"silu", [=](const Tensor& x) { return lomem::silu(x, paper); }, [](const Tensor& x) { return torch::silu(x); }},
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

TEST(Activations, GradientsDoNotDependOnStrides) {
  const auto x = torch::randn({7, 5}) * 3;
  for (const auto& cases : {smooth(), straight(), published()}) {
    for (const Case& c : cases) {
      const auto transposed = [&](const Tensor& t) { return c.ours(t.t()).t(); };
      EXPECT_TRUE(torch::equal(gradient(transposed, x), gradient(c.ours, x))) << c.name;
    }
  }
}

TEST(Activations, OfThePaperAreThoseOfTheTable) {
  std::set<std::string> expected;
  for (const auto& facts : lomem::detail::activation_facts()) {
    if (facts.is_published) {
      expected.insert(facts.name);
    }
  }
  std::set<std::string> tested;
  for (const Case& c : published()) {
    tested.insert(c.name);
  }
  EXPECT_EQ(tested, expected);
}

TEST(Activations, OfThePaperAreTorchsBitForBit) {
  for (const Case& c : published()) {
    for (const auto dtype : dtypes) {
      for (int64_t n = 0; n <= 70; ++n) {
        const auto x = (torch::randn({n}) * 3).to(dtype);
        EXPECT_TRUE(torch::equal(c.ours(x), c.torchs(x))) << c.name;
        EXPECT_TRUE(torch::equal(c.ours(x.clone().requires_grad_()), c.torchs(x))) << c.name;
      }
    }
  }
}

TEST(Activations, OfThePaperSaveTwoBitsAnElement) {
  for (const Case& c : published()) {
    for (const auto dtype : dtypes) {
      for (const int64_t n : {1, 4, 5, 1001}) {
        const auto x = torch::randn({n}).to(dtype);
        EXPECT_EQ(saved_bytes(c.ours, x), (2 * n + 7) / 8) << c.name;
      }
    }
  }
}

TEST(Activations, SaveTheBitsAskedFor) {
  const auto x = torch::randn({1001});
  for (int64_t bits = 1; bits <= 8; ++bits) {
    const auto function = [&](const Tensor& t) { return lomem::mish(t, {.bits = bits}); };
    EXPECT_EQ(saved_bytes(function, x), (bits * 1001 + 7) / 8);
  }
  for (const Case& c : straight()) {
    EXPECT_EQ(saved_bytes(c.ours, x), (1001 + 7) / 8) << c.name;
  }
}

TEST(Activations, OfThePaperHaveTheLevelsOfTheirSteps) {
  const auto x = torch::randn({4001}, torch::kDouble) * 4;
  for (const Case& c : published()) {
    const auto steps = lomem::step_function(c.name, 2, "paper");
    ASSERT_EQ(steps.levels.size(), 4) << c.name;
    Tensor want = torch::full_like(x, steps.levels[0]);
    for (size_t i = 0; i < steps.boundaries.size(); ++i) {
      want = torch::where(x > steps.boundaries[i], steps.levels[i + 1], want);
    }
    EXPECT_TRUE(torch::equal(gradient(c.ours, x), want)) << c.name;
  }
}

TEST(Activations, HalvesMakeUpTheOp) {
  const auto x = torch::randn({6, 11});
  for (const Case& c : published()) {
    const lomem::FewBit paper{.bits = 2, .criterion = "paper"};
    const auto [output, codes] = lomem::step_activation_forward(x, c.name, {}, paper);
    EXPECT_TRUE(torch::equal(output, c.torchs(x))) << c.name;
    EXPECT_EQ(codes.numel(), (66 + 3) / 4) << c.name;
    const auto steps = lomem::step_function(c.name, 2, "paper");
    const auto got = lomem::step_activation_backward(torch::ones_like(x), codes, steps.levels, 2);
    EXPECT_TRUE(torch::equal(got, gradient(c.ours, x))) << c.name;
  }
}

TEST(Activations, HaveShapesOnTheMetaDevice) {
  const auto x = torch::empty({2, 3, 8}, torch::TensorOptions(torch::kMeta).dtype(torch::kBFloat16));
  for (const auto& cases : {smooth(), straight(), published()}) {
    for (const Case& c : cases) {
      // (In a program without Python, torch lacks the shapes of a few ops, of abs for one.)
      if (error_of([&] { c.torchs(x); }) == "no error") {
        EXPECT_EQ(c.ours(x).sizes(), x.sizes()) << c.name;
        EXPECT_EQ(c.ours(x).scalar_type(), x.scalar_type()) << c.name;
      }
    }
  }
  for (const Case& c : published()) {
    const auto codes = std::get<1>(lomem::step_activation_forward(x, c.name, {}, {.bits = 2, .criterion = "paper"}));
    EXPECT_EQ(codes.numel(), 12) << c.name;
  }
}

TEST(Activations, KeepNothingWithoutGradient) {
  for (const auto& cases : {smooth(), straight(), published()}) {
    for (const Case& c : cases) {
      EXPECT_FALSE(c.ours(torch::randn({4, 8})).requires_grad()) << c.name;
    }
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

/// Parameters that the library has no table for: it searches.
TEST(Activations, FindAStepFunctionOnce) {
  const auto x = torch::linspace(-5, 5, 2001);
  const auto elu = [](const Tensor& t) { return lomem::elu(t, 0.3); };
  const auto first = gradient(elu, x);
  const auto steps = lomem::step_function("elu", 3, "derivative", {0.3});
  const auto again = lomem::step_function("elu", 3, "derivative", {0.3});
  EXPECT_EQ(steps.boundaries, again.boundaries);
  EXPECT_EQ(steps.levels, again.levels);
  EXPECT_TRUE(torch::equal(gradient(elu, x), first));
  std::set<float> levels;
  for (const double level : steps.levels) {
    levels.insert(static_cast<float>(level));
  }
  for (const float slope : std::vector<float>(first.const_data_ptr<float>(), first.const_data_ptr<float>() + 2001)) {
    EXPECT_EQ(levels.count(slope), 1) << slope;
  }
}

TEST(Activations, FindAStepFunctionInSeveralThreadsAtOnce) {
  std::vector<lomem::StepFunction> found(4);
  std::vector<std::thread> threads;
  threads.reserve(found.size());
  for (auto& steps : found) {
    threads.emplace_back([&steps] { steps = lomem::step_function("elu", 4, "primitive", {0.7}); });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(found[0].levels.size(), 16);
  for (const auto& steps : found) {
    EXPECT_EQ(steps.boundaries, found[0].boundaries);
    EXPECT_EQ(steps.levels, found[0].levels);
  }
}

TEST(Activations, HaveStepsOfThePaperOnlyWhereItPublishesThem) {
  const auto x = torch::ones({3});
  const std::string no_steps =
      ": criterion is 'paper', expected 'derivative' or 'primitive' for mish, which has no published step function";
  const std::string no_bits =
      ": bits is 3, expected 2 for criterion 'paper', whose published step functions all have that many bits";
  for (const auto& input : {x, x.clone().requires_grad_()}) {
    EXPECT_EQ(
        error_of([&] { lomem::mish(input, {.bits = 2, .criterion = "paper"}); }), "lomem::step_activation" + no_steps);
    EXPECT_EQ(
        error_of([&] { lomem::silu(input, {.bits = 3, .criterion = "paper"}); }), "lomem::step_activation" + no_bits);
  }
  EXPECT_EQ(
      error_of([&] { lomem::step_activation_forward(x, "mish", {}, {.bits = 2, .criterion = "paper"}); }),
      "lomem::step_activation_forward" + no_steps);
  EXPECT_EQ(error_of([] { lomem::step_function("silu", 3, "paper"); }), "lomem::step_function" + no_bits);
}

TEST(Activations, ErrorsNameOpArgumentAndBothValues) {
  const auto x = torch::randn({4, 8});
  EXPECT_EQ(
      error_of([&] { lomem::gelu(x, "exact"); }), "lomem::gelu: approximate is 'exact', expected 'none' or 'tanh'");
  EXPECT_EQ(
      error_of([&] { lomem::silu(x, {.criterion = "best"}); }),
      "lomem::step_activation: criterion is 'best', expected 'derivative', 'primitive' or 'paper'");
  EXPECT_EQ(
      error_of([&] {
        lomem::step_activation_backward(x, torch::zeros({7}, torch::kByte), std::vector<double>{0, 1, 2, 3}, 2);
      }),
      "lomem::step_activation_backward: codes has 7 bytes, expected 8 for 32 elements of 2 bits");
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
