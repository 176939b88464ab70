// fused_activation_forward: torch's values, and the codes that step_codes makes of the same elements, whatever the step
// function, the layout and the dtype are.
#include <gtest/gtest.h>
#include <lomem/ops.h>
#include <torch/torch.h>

#include <utility>

#include "../../../cpp/src/op.h"
#include "../core/fused_functions.h"
#include "helpers.h"

namespace {

using lomem::detail::ops::fused_activation_forward;
using torch::Tensor;

Tensor torchs_value(lomem::Type<lomem::GELU> /*function*/, const Tensor& x) {
  return torch::gelu(x, "none");
}
Tensor torchs_value(lomem::Type<lomem::GELUTanh> /*function*/, const Tensor& x) {
  return torch::gelu(x, "tanh");
}
Tensor torchs_value(lomem::Type<lomem::SiLU> /*function*/, const Tensor& x) {
  return torch::silu(x);
}

template <class Function>
std::vector<double> published_boundaries() {
  using Steps = typename Function::PublishedSteps;
  std::vector<double> result;
  for (int i = 0; i + 1 < Steps::levels; ++i) {
    result.push_back(Steps::boundary(i));
  }
  return result;
}

/// Step functions of every number of bits, some with fewer boundaries than their codes could tell; the published one
/// at its own number of bits and at others.
template <class Function>
std::vector<std::pair<std::vector<double>, int64_t>> step_functions() {
  std::vector<std::pair<std::vector<double>, int64_t>> result;
  for (int64_t bits = 1; bits <= 8; ++bits) {
    result.emplace_back(lomem::step_function(Fused<Function>::name, bits).boundaries, bits);
    result.emplace_back(std::vector<double>{0.25}, bits);
    if (bits >= Function::PublishedSteps::bits) {
      result.emplace_back(published_boundaries<Function>(), bits);
    }
  }
  auto nearly = published_boundaries<Function>();
  nearly.back() += 1;
  result.emplace_back(nearly, Function::PublishedSteps::bits);
  return result;
}

std::vector<std::pair<const char*, Tensor>> layouts(torch::ScalarType dtype) {
  const Tensor x = (torch::randn({3, 4, 6, 5}) * 4).to(dtype);
  return {
      {"row-major", x},
      {"transposed", x.transpose(0, 3)},
      {"permuted", x.permute({2, 0, 3, 1})},
      {"channels last", x.contiguous(torch::MemoryFormat::ChannelsLast)},
      {"every second column", x.slice(3, 0, 5, 2)},
      {"every second row, transposed", x.slice(2, 0, 6, 2).transpose(1, 2)},
      {"begins off a boundary", x.flatten().slice(0, 1)},
      {"expanded", x.slice(1, 0, 1).expand({3, 4, 6, 5})},
      {"one channel", x.slice(1, 0, 1).contiguous(torch::MemoryFormat::ChannelsLast)},
      {"of no dimension", x[0][0][0][0]},
      {"empty", x.slice(2, 0, 0)},
  };
}

/// Codes of `input` in the memory order of `output`, by step_codes.
Tensor expected_codes(const Tensor& input, const Tensor& output, const std::vector<double>& boundaries, int64_t bits) {
  const Tensor in_memory_order = torch::empty_like(output).copy_(input);
  return lomem::step_codes(in_memory_order.as_strided({input.numel()}, {1}), boundaries, bits);
}

template <class Function>
void check(const Tensor& input, const std::vector<double>& boundaries, int64_t bits) {
  SCOPED_TRACE(testing::Message() << bits << " bits, " << boundaries.size() << " boundaries");
  const char* const name = Fused<Function>::name;
  const Tensor want = torchs_value(lomem::Type<Function>{}, input);
  const auto [output, codes] = fused_activation_forward(input, name, boundaries, bits, /*fast=*/false);
  EXPECT_TRUE(torch::equal(output, want));
  EXPECT_EQ(output.strides(), want.strides());
  EXPECT_TRUE(torch::equal(codes, expected_codes(input, output, boundaries, bits)));

  const auto [fast_output, fast_codes] = fused_activation_forward(input, name, boundaries, bits, /*fast=*/true);
  EXPECT_EQ(fast_output.strides(), want.strides());
  EXPECT_TRUE(torch::equal(fast_codes, expected_codes(input, fast_output, boundaries, bits)));
  // The fast values are the same whatever the codes are.
  const auto published = published_boundaries<Function>();
  EXPECT_TRUE(
      torch::equal(fast_output, std::get<0>(fused_activation_forward(input, name, published, 2, /*fast=*/true))));
  EXPECT_TRUE(torch::allclose(fast_output.to(torch::kDouble), want.to(torch::kDouble), 1e-2, 1e-4));
}

TEST(FusedActivation, HasTheCodesOfStepCodesInEveryLayoutAndDtype) {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    for (const auto dtype : dtypes) {
      for (const auto& [layout, input] : layouts(dtype)) {
        SCOPED_TRACE(testing::Message() << layout << ", " << dtype);
        for (const auto& [boundaries, bits] : step_functions<Function>()) {
          check<Function>(input, boundaries, bits);
        }
      }
    }
  });
}

/// What is made in tiles: large inputs, with one thread and with several.
TEST(FusedActivation, HasTheCodesOfStepCodesInLargeTensors) {
  const Tensor x = torch::randn({(int64_t{1} << 19) + 4099}) * 4;
  const int before = at::get_num_threads();
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    FusedFunctions::for_each([&](auto function) {
      using Function = typename decltype(function)::type;
      SCOPED_TRACE(testing::Message() << Fused<Function>::name << ", " << threads << " threads");
      for (const auto dtype : dtypes) {
        SCOPED_TRACE(dtype);
        check<Function>(x.to(dtype), published_boundaries<Function>(), Function::PublishedSteps::bits);
        check<Function>(x.to(dtype), lomem::step_function(Fused<Function>::name, 3).boundaries, 3);
      }
    });
  }
  at::set_num_threads(before);
}

/// Large enough for tiles of oneDNN's.
TEST(FusedActivation, HasTheCodesOfStepCodesInVeryLargeTensors) {
  const Tensor x = torch::randn({(int64_t{1} << 23) + 4099}) * 4;
  FusedFunctions::for_each([&](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check<Function>(x, lomem::step_function(Fused<Function>::name, 3).boundaries, 3);
  });
}

TEST(FusedActivation, IsTheForwardOfTheStepActivation) {
  const Tensor x = torch::randn({4, 33});
  FusedFunctions::for_each([&](auto function) {
    using Function = typename decltype(function)::type;
    const char* const name = Fused<Function>::name;
    for (const bool fast : {false, true}) {
      const auto got = lomem::step_activation_forward(x, name, {}, {.bits = 2, .criterion = "paper", .fast = fast});
      const auto want = fused_activation_forward(x, name, published_boundaries<Function>(), 2, fast);
      EXPECT_TRUE(torch::equal(std::get<0>(got), std::get<0>(want))) << name;
      EXPECT_TRUE(torch::equal(std::get<1>(got), std::get<1>(want))) << name;
    }
  });
}

TEST(FusedActivation, TakesThePublishedBoundariesWithMoreBits) {
  const Tensor x = torch::randn({1001}) * 4;
  FusedFunctions::for_each([&](auto function) {
    using Function = typename decltype(function)::type;
    const char* const name = Fused<Function>::name;
    const auto steps = lomem::step_function(name, 2, "paper");
    for (int64_t bits = 2; bits <= 8; ++bits) {
      const auto codes = std::get<1>(lomem::step_activation_forward(x, name, {}, {.bits = bits, .steps = steps}));
      EXPECT_TRUE(torch::equal(codes, lomem::step_codes(x, steps.boundaries, bits))) << name << ", " << bits;
    }
  });
}

TEST(FusedActivation, RefusesOtherFunctions) {
  const Tensor x = torch::randn({5});
  for (const auto& input : {x, x.to(torch::kMeta)}) {
    EXPECT_EQ(
        error_of([&] { fused_activation_forward(input, "tanh", {0.0}, 1, false); }),
        "lomem::fused_activation_forward: function is 'tanh', expected one of gelu, gelu_tanh, silu");
    EXPECT_EQ(
        error_of([&] { fused_activation_forward(input, "silu", {0.0}, 9, false); }),
        "lomem::fused_activation_forward: bits is 9, expected 1 to 8");
  }
}

}  // namespace
