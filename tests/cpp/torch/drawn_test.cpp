// Activations whose codes are drawn at random, through torch's dispatcher.
#include <gtest/gtest.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "helpers.h"

// (A namespace of its own, as several files are compiled as one.)
namespace drawn_test {
namespace {

using torch::Tensor;
using Doubles = at::ArrayRef<double>;
using OptionalTensor = std::optional<Tensor>;

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor drawn(
    const Tensor& x, const std::string& function, int64_t bits, const OptionalTensor& seed, int64_t offset = 0,
    Doubles parameters = {}) {
  using Signature = Tensor(const Tensor&, std::string_view, Doubles, int64_t, const OptionalTensor&, int64_t);
  return op<Signature>("lomem::drawn_activation").call(x, function, parameters, bits, seed, offset);
}

Tensor seed_of(int64_t number) {
  return at::full({}, number, at::kLong);
}

struct Case {
  std::vector<double> parameters;
  std::function<Tensor(const Tensor&)> torchs;
};

/// By the names that ops call them.
std::map<std::string, Case> smooth() {
  return {
      {"gelu", {{}, [](const Tensor& x) { return torch::gelu(x); }}},
      {"gelu_tanh", {{}, [](const Tensor& x) { return torch::gelu(x, "tanh"); }}},
      {"quick_gelu", {{}, [](const Tensor& x) { return x * torch::sigmoid(1.702 * x); }}},
      {"silu", {{}, [](const Tensor& x) { return torch::silu(x); }}},
      {"mish", {{}, [](const Tensor& x) { return torch::mish(x); }}},
      {"sigmoid", {{}, [](const Tensor& x) { return torch::sigmoid(x); }}},
      {"tanh", {{}, [](const Tensor& x) { return torch::tanh(x); }}},
      {"tanhshrink", {{}, [](const Tensor& x) { return x - torch::tanh(x); }}},
      {"softplus", {{2, 3}, [](const Tensor& x) { return torch::softplus(x, 2, 3); }}},
      {"softsign", {{}, [](const Tensor& x) { return x / (1 + x.abs()); }}},
      {"logsigmoid", {{}, [](const Tensor& x) { return torch::log_sigmoid(x); }}},
      {"elu", {{0.5}, [](const Tensor& x) { return torch::elu(x, 0.5); }}},
      {"celu", {{0.5}, [](const Tensor& x) { return torch::celu(x, 0.5); }}},
      {"selu", {{}, [](const Tensor& x) { return torch::selu(x); }}},
      {"hardswish", {{}, [](const Tensor& x) { return torch::hardswish(x); }}},
  };
}

Tensor gradient(const std::function<Tensor(const Tensor&)>& function, const Tensor& input) {
  const Tensor x = input.detach().clone().requires_grad_();
  function(x).sum().backward();
  return x.grad();
}

TEST(DrawnActivations, AreAllSmoothOnes) {
  std::set<std::string> expected;
  for (const auto& facts : lomem::detail::activation_facts()) {
    if (!facts.is_exact) {
      expected.insert(facts.name);
    }
  }
  std::set<std::string> tested;
  for (const auto& [name, c] : smooth()) {
    tested.insert(name);
  }
  EXPECT_EQ(tested, expected);
}

TEST(DrawnActivations, AreTorchsBitForBit) {
  for (const auto& [name, c] : smooth()) {
    for (const auto dtype : dtypes) {
      for (const int64_t n : {0, 1, 7, 8, 33, 1001}) {
        const Tensor x = (torch::randn({n}) * 3).to(dtype);
        const Tensor want = c.torchs(x);
        EXPECT_TRUE(torch::equal(drawn(x, name, 2, std::nullopt, 0, c.parameters), want)) << name;
        EXPECT_TRUE(torch::equal(drawn(x.clone().requires_grad_(), name, 2, seed_of(1), 0, c.parameters), want))
            << name;
      }
    }
  }
}

/// Each gradient is within half the distance of two levels of the exact one, whatever the random numbers are, and the
/// mean of many is the exact one.
TEST(DrawnActivations, GradientsAreRightInTheMean) {
  constexpr int64_t draws = 1000;
  const auto as_double = torch::TensorOptions().dtype(at::kDouble);
  // Where derivatives have their extrema, limits included.
  const Tensor everywhere =
      torch::cat({torch::linspace(-40, 40, 400001, as_double), torch::tensor({-1e9, 1e-9, 1e9}, as_double)});
  for (const auto& [name, c] : smooth()) {
    const Tensor derivatives = gradient(c.torchs, everywhere);
    const double range = (derivatives.max() - derivatives.min()).item<double>();
    // (Float32, as which the kernels read elements, has exactly these.)
    const Tensor points =
        torch::cat({torch::arange(-96, 96, as_double) / 8 + 1.0 / 64, torch::arange(-3, 4, as_double)});
    const Tensor exact = gradient(c.torchs, points);
    const Tensor many = points.expand({draws, points.numel()}).contiguous();
    for (const int64_t bits : {1, 2, 4, 8}) {
      const double step = range / static_cast<double>((1 << bits) - 1);
      const Tensor got =
          gradient([&, &of = c](const Tensor& x) { return drawn(x, name, bits, seed_of(7), 3, of.parameters); }, many);
      // Pieces of polynomials are off by less than 4e-6 of the range, those of mish, whose poles are nearest to the
      // line, by less than 5e-6; targets are multiples of 2^-16 steps, code and dither float32.
      const double near = (name == "mish" ? 5e-6 : 4e-6) * range + 2 * 0x1p-16 * step;
      EXPECT_LE((got - exact).abs().max().item<double>(), step / 2 + near) << name << ", bits " << bits;
      // 5.5 standard deviations of the mean, of 199 means.
      const double deviation = 5.5 * step / std::sqrt(12.0 * draws);
      EXPECT_LE((got.mean(0) - exact).abs().max().item<double>(), deviation + near) << name << ", bits " << bits;
    }
  }
}

TEST(DrawnActivations, SaveCodesAndASeed) {
  for (const auto dtype : dtypes) {
    for (const int64_t n : {1, 5, 1001, 4096}) {
      for (int64_t bits = 1; bits <= 8; ++bits) {
        const auto function = [&](const Tensor& x) { return drawn(x, "silu", bits, std::nullopt); };
        EXPECT_EQ(saved_bytes(function, torch::randn({n}).to(dtype)), (bits * n + 7) / 8 + 8) << bits;
      }
    }
  }
}

TEST(DrawnActivations, SeedsAndOffsetsAreStreams) {
  for (const auto dtype : dtypes) {
    // (Of several threads.)
    const Tensor x = torch::randn({300001}).to(dtype);
    const auto of = [&](const OptionalTensor& seed, int64_t offset) {
      return gradient([&](const Tensor& t) { return drawn(t, "gelu", 2, seed, offset); }, x);
    };
    EXPECT_TRUE(torch::equal(of(seed_of(1), 2), of(seed_of(1), 2)));
    EXPECT_FALSE(torch::equal(of(seed_of(1), 2), of(seed_of(2), 2)));
    EXPECT_FALSE(torch::equal(of(seed_of(1), 2), of(seed_of(1), 3)));
    EXPECT_FALSE(torch::equal(of(std::nullopt, 0), of(std::nullopt, 0)));
  }
}

/// The forward op, which may compute tile by tile, and the op of the codes alone.
TEST(DrawnActivations, CodesAreThoseOfTheirOp) {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, std::string_view, Doubles, int64_t, const OptionalTensor&, int64_t);
  using Codes = Tensor(const Tensor&, std::string_view, Doubles, int64_t, const Tensor&, int64_t);
  for (const auto& [name, c] : smooth()) {
    for (const auto dtype : dtypes) {
      for (const int64_t n : {9, 300001}) {
        const Tensor x = torch::randn({n}).to(dtype);
        const auto [output, codes, seed] =
            op<Forward>("lomem::drawn_activation_forward").call(x, name, c.parameters, 3, seed_of(5), 6);
        EXPECT_EQ(codes.numel(), (3 * n + 7) / 8);
        EXPECT_EQ(seed.item<int64_t>(), 5);
        EXPECT_TRUE(torch::equal(output, c.torchs(x))) << name;
        const Tensor alone = op<Codes>("lomem::drawn_codes").call(x, name, c.parameters, 3, seed_of(5), 6);
        EXPECT_TRUE(torch::equal(codes, alone)) << name;
      }
    }
  }
}

TEST(DrawnActivations, Errors) {
  const Tensor x = torch::ones({4});
  EXPECT_THROW(drawn(x, "gelu", 0, std::nullopt), c10::Error);
  EXPECT_THROW(drawn(x, "gelu", 9, std::nullopt), c10::Error);
  EXPECT_THROW(drawn(x, "relu", 2, std::nullopt), c10::Error);
  EXPECT_THROW(drawn(x.to(at::kInt), "gelu", 2, std::nullopt), c10::Error);
  EXPECT_THROW(drawn(x, "gelu", 2, torch::ones({1}, at::kLong)), c10::Error);
  EXPECT_THROW(drawn(x, "gelu", 2, seed_of(1), -1), c10::Error);
}

/// As C++ training code calls them: functions, modules, and the halves of both.
TEST(DrawnActivations, HaveACppInterface) {
  const lomem::FewBit draws{.bits = 3, .rounding = "stochastic", .seed = seed_of(9)};
  const Tensor x = torch::randn({50, 7});
  const auto by_function = gradient([&](const Tensor& t) { return lomem::gelu(t, "tanh", draws); }, x);
  EXPECT_TRUE(
      torch::equal(by_function, gradient([&](const Tensor& t) { return drawn(t, "gelu_tanh", 3, seed_of(9)); }, x)));
  const auto [output, codes, seed] = lomem::drawn_activation_forward(x, "gelu_tanh", {}, draws);
  const lomem::DrawnLevels<double> levels = lomem::drawn_levels("gelu_tanh", 3);
  EXPECT_TRUE(torch::equal(output, torch::gelu(x, "tanh")));
  EXPECT_TRUE(
      torch::equal(by_function, lomem::drawn_activation_backward(torch::ones_like(output), codes, seed, levels, 3)));

  // A module draws another seed in each call, the same ones if it is built at the same position of torch's generator.
  std::vector<Tensor> grads;
  for (int run = 0; run < 2; ++run) {
    torch::manual_seed(4);
    lomem::nn::SiLU module(lomem::FewBit{.bits = 2, .rounding = "stochastic"});
    grads.push_back(gradient([&](const Tensor& t) { return module(t); }, x));
    grads.push_back(gradient([&](const Tensor& t) { return module(t); }, x));
  }
  EXPECT_FALSE(torch::equal(grads[0], grads[1]));
  EXPECT_TRUE(torch::equal(grads[0], grads[2]));
  EXPECT_TRUE(torch::equal(grads[1], grads[3]));
  std::ostringstream text;
  text << lomem::nn::SiLU(draws);
  EXPECT_EQ(text.str(), "lomem::nn::SiLU(bits=3, rounding=stochastic)");
}

TEST(DrawnActivations, ErrorsOfTheCppInterface) {
  const Tensor x = torch::ones({4});
  const auto message = [&](const lomem::FewBit& few_bit) { return error_of([&] { lomem::silu(x, few_bit); }); };
  EXPECT_EQ(
      message({.rounding = "up"}), "lomem::drawn_activation: rounding is 'up', expected 'nearest' or 'stochastic'");
  EXPECT_EQ(
      message({.seed = seed_of(1)}),
      "lomem::drawn_activation: seed is given, expected none with rounding 'nearest', which draws nothing");
  EXPECT_EQ(
      message({.criterion = "primitive", .rounding = "stochastic"}),
      "lomem::drawn_activation: criterion is 'primitive', expected 'derivative' with rounding 'stochastic', which has "
      "no step function");
  EXPECT_EQ(
      message({.steps = lomem::StepFunction{{0}, {0, 1}}, .rounding = "stochastic"}),
      "lomem::drawn_activation: steps are given, expected none with rounding 'stochastic', which has no step function");
  EXPECT_EQ(
      error_of([&] { lomem::step_activation_forward(x, "silu", {}, {.rounding = "stochastic"}); }),
      "lomem::step_activation_forward: rounding is 'stochastic', expected 'nearest', or a call of "
      "drawn_activation_forward");
  EXPECT_EQ(
      error_of([&] { lomem::drawn_activation_forward(x, "silu", {}, {}); }),
      "lomem::drawn_activation_forward: rounding is 'nearest', expected 'stochastic'");
}

}  // namespace
}  // namespace drawn_test
