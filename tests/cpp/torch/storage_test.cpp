// Storage in groups from C++.
#include <gtest/gtest.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

namespace {

at::Tensor seed_of(int64_t number) {
  return at::full({}, number, at::kLong);
}

TEST(Storage, RoundTrips) {
  torch::manual_seed(1);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t bits : {8, 4}) {
      for (const bool stochastic : {false, true}) {
        const at::Tensor x = at::randn({3, 5, 40}, at::kDouble).to(dtype).transpose(0, 2);
        const auto seed = stochastic ? std::optional(seed_of(7)) : std::nullopt;
        const auto [codes, scales] = lomem::quantize_groups(x, bits, seed, 2);
        EXPECT_EQ(codes.scalar_type(), at::kByte);
        EXPECT_EQ(codes.numel(), 600 * bits / 8);
        EXPECT_EQ(scales.scalar_type(), at::kBFloat16);
        EXPECT_EQ(scales.numel(), 5);
        const at::Tensor y = lomem::dequantize_groups(codes, scales, x.sizes(), x.strides(), dtype, bits);
        EXPECT_EQ(y.strides(), x.strides());
        EXPECT_EQ(y.scalar_type(), dtype);
        // A step of the largest scale, and a rounding to the dtype.
        const double step = scales.max().item<double>() * (stochastic ? 1 : 0.5);
        EXPECT_LE((y.to(at::kDouble) - x.to(at::kDouble)).abs().max().item<double>(), step * 1.001 + 0.02);
      }
    }
  }
}

TEST(Storage, SubtractsDither) {
  const at::Tensor x = at::randn({40, 30}).t();
  for (const int64_t bits : {8, 4}) {
    const auto [codes, scales] = lomem::quantize_groups(x, bits, seed_of(7), 2);
    const auto decoded = [&](const std::optional<at::Tensor>& seed, int64_t offset) {
      return lomem::dequantize_groups(codes, scales, x.sizes(), x.strides(), at::kFloat, bits, seed, offset);
    };
    const auto error = [&](const at::Tensor& y) { return (y - x).abs().max().item<float>(); };
    // Half a step of the largest scale, and roundings of float32; without the dither, or with another one, up to a
    // step.
    const float half = scales.max().item<float>() * 0.50001f;
    EXPECT_LE(error(decoded(seed_of(7), 2)), half);
    EXPECT_GT(error(decoded(std::nullopt, 0)), half);
    EXPECT_GT(error(decoded(seed_of(7), 3)), half);
    EXPECT_GT(error(decoded(seed_of(8), 2)), half);
  }
}

TEST(Storage, TheDefaults) {
  const at::Tensor x = at::randn({300});
  const auto [codes, scales] = lomem::quantize_groups(x);
  const auto [same_codes, same_scales] = lomem::quantize_groups(x, 8, std::nullopt, 0, 128);
  EXPECT_TRUE(codes.equal(same_codes));
  EXPECT_TRUE(scales.equal(same_scales));
  const at::Tensor y = lomem::dequantize_groups(codes, scales, {20, 15}, std::nullopt, at::kFloat);
  EXPECT_TRUE(y.is_contiguous());
  EXPECT_LE((y.flatten() - x).abs().max().item<float>(), scales.max().item<float>() * 0.5001);
}

TEST(Storage, SeedsAndOffsetsAreStreams) {
  const at::Tensor x = at::randn({4096});
  const auto codes = [&](int64_t seed, int64_t offset) {
    return std::get<0>(lomem::quantize_groups(x, 8, seed_of(seed), offset));
  };
  EXPECT_TRUE(codes(1, 2).equal(codes(1, 2)));
  EXPECT_FALSE(codes(1, 2).equal(codes(1, 3)));
  EXPECT_FALSE(codes(1, 2).equal(codes(2, 2)));
}

TEST(Storage, Errors) {
  EXPECT_THROW(lomem::quantize_groups(at::ones({4}), 5), c10::Error);
  EXPECT_THROW(lomem::quantize_groups(at::ones({4}), 8, std::nullopt, 0, 100), c10::Error);
  EXPECT_THROW(lomem::quantize_groups(at::ones({4}, at::kInt)), c10::Error);
  const auto [codes, scales] = lomem::quantize_groups(at::ones({4}));
  EXPECT_THROW(lomem::dequantize_groups(codes, scales, {5}, std::nullopt, at::kFloat), c10::Error);
  EXPECT_THROW(
      lomem::dequantize_groups(codes, scales, {4}, std::nullopt, at::kFloat, 8, at::ones({1}, at::kLong)), c10::Error);
  EXPECT_THROW(lomem::dequantize_groups(codes, scales, {4}, std::nullopt, at::kFloat, 8, seed_of(1), -1), c10::Error);
  EXPECT_THROW(lomem::dequantize_groups(codes, scales, {2, 2}, {{3, 1}}, at::kFloat), c10::Error);
}

}  // namespace
