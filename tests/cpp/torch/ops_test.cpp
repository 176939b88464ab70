// The ops from C++: results, gradients, errors, with no Python.
#include <gtest/gtest.h>
#include <lomem/ops.h>
#include <lomem/version.h>
#include <torch/torch.h>

namespace {

const torch::ScalarType dtypes[] = {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf};

torch::Tensor leaf(torch::IntArrayRef sizes, torch::ScalarType dtype = torch::kFloat) {
  return torch::randn(sizes).to(dtype).requires_grad_();
}

/// The gradient that autograd itself finds for sum_i a_i * relu(x - c_i), in float64.
torch::Tensor step_gradient(const torch::Tensor& input, const double (&c)[3], const double (&a)[3]) {
  auto x = input.detach().to(torch::kDouble).requires_grad_();
  auto y = torch::zeros_like(x);
  for (int i = 0; i < 3; ++i) {
    y = y + a[i] * torch::relu(x - c[i]);
  }
  return torch::autograd::grad({y.sum()}, {x})[0];
}

TEST(Ops, ReGELU2ForwardIsGelu) {
  for (const auto dtype : dtypes) {
    for (int64_t n = 0; n <= 70; ++n) {
      const auto x = leaf({n}, dtype);
      EXPECT_TRUE(torch::equal(lomem::regelu2(x), torch::gelu(x, "none")));
      EXPECT_TRUE(torch::equal(lomem::regelu2(x, "tanh"), torch::gelu(x, "tanh")));
    }
  }
}

TEST(Ops, ReSiLU2ForwardIsSilu) {
  for (const auto dtype : dtypes) {
    for (int64_t n = 0; n <= 70; ++n) {
      const auto x = leaf({n}, dtype);
      EXPECT_TRUE(torch::equal(lomem::resilu2(x), torch::silu(x)));
    }
  }
}

TEST(Ops, StepGradientsAreThoseOfTheReLUs) {
  auto x = (torch::randn({5, 33}, torch::kDouble) * 5).requires_grad_();
  lomem::regelu2(x).sum().backward();
  EXPECT_TRUE(
      torch::allclose(
          x.grad(),
          step_gradient(
              x, {-3.1858810036855245, -0.001178821281161997, 3.190832613414926},
              {-0.04922261145617846, 1.0979632065417297, -0.048740595085551286}),
          /*rtol=*/1e-14, /*atol=*/1e-15));
  x.mutable_grad().reset();
  lomem::resilu2(x).sum().backward();
  EXPECT_TRUE(
      torch::allclose(
          x.grad(),
          step_gradient(
              x, {-6.3050461001646445, -0.0008684942046214787, 6.325815242089708},
              {-0.04060357190528599, 1.080925428529668, 1 - (-0.04060357190528599 + 1.080925428529668)}),
          /*rtol=*/1e-14, /*atol=*/1e-15));
}

TEST(Ops, StepGradientOfATransposedInput) {
  const auto x = leaf({7, 5});
  const auto transposed = x.t();
  const auto grad = torch::randn({5, 7});
  const auto got = torch::autograd::grad({lomem::regelu2(transposed)}, {x}, {grad})[0];
  const auto want = torch::autograd::grad({lomem::regelu2(transposed.contiguous())}, {x}, {grad})[0];
  EXPECT_TRUE(torch::equal(got, want));
}

TEST(Ops, NormsMatchTorch) {
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

TEST(Ops, NormEmitsTheDtypeAskedFor) {
  const auto x = leaf({4, 10});
  const auto y = lomem::ms_layer_norm(x, {10}, std::nullopt, std::nullopt, 1e-5, torch::kBFloat16);
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  y.sum().backward();
  EXPECT_EQ(x.grad().scalar_type(), torch::kFloat);
}

TEST(Ops, PackingRoundTrips) {
  for (int64_t bits = 1; bits <= 8; ++bits) {
    const auto codes = torch::randint(0, int64_t{1} << bits, {3, 41}, torch::kByte);
    const auto packed = lomem::pack_bits(codes, bits);
    EXPECT_EQ(packed.numel(), (bits * codes.numel() + 7) / 8);
    EXPECT_TRUE(torch::equal(lomem::unpack_bits(packed, bits, codes.numel()), codes.flatten()));
  }
}

TEST(Ops, HalvesMakeUpTheOp) {
  const auto x = torch::randn({6, 11});
  const auto [output, codes] = lomem::regelu2_forward(x, "tanh");
  EXPECT_EQ(codes.numel(), (66 + 3) / 4);
  const double levels[] = {0, -0.04922261145617846, 1.0487405950855511, 1};
  const auto got = lomem::step_activation_backward(torch::ones_like(x), codes, levels, 2);
  auto y = x.clone().requires_grad_();
  lomem::regelu2(y, "tanh").sum().backward();
  EXPECT_TRUE(torch::allclose(got, y.grad(), 1e-6));
  EXPECT_TRUE(torch::equal(std::get<0>(lomem::resilu2_forward(x)), torch::silu(x)));
}

TEST(Ops, ShapesOnTheMetaDevice) {
  const auto x = torch::empty({2, 3, 8}, torch::TensorOptions(torch::kMeta).dtype(torch::kBFloat16));
  EXPECT_EQ(lomem::regelu2(x).sizes(), x.sizes());
  EXPECT_EQ(std::get<1>(lomem::resilu2_forward(x)).numel(), 12);
  EXPECT_EQ(lomem::ms_layer_norm(x, {8}, {}, {}, 1e-5, torch::kFloat).scalar_type(), torch::kFloat);
  EXPECT_EQ(lomem::unpack_bits(torch::empty({3}, x.options().dtype(torch::kByte)), 3, 8).numel(), 8);
}

TEST(Ops, KeepNothingWithoutGradient) {
  const auto x = torch::randn({4, 8});
  EXPECT_FALSE(lomem::regelu2(x).requires_grad());
  torch::NoGradGuard no_grad;
  EXPECT_FALSE(lomem::ms_layer_norm(leaf({4, 8}), {8}).requires_grad());
}

/// The message of the error that `function` throws.
template <class Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(Ops, ErrorsNameOpArgumentAndBothValues) {
  const auto x = torch::randn({4, 8});
  EXPECT_EQ(
      error_of([&] { lomem::regelu2(x, "exact"); }),
      "lomem::regelu2: approximate is 'exact', expected 'none' or 'tanh'");
  EXPECT_EQ(
      error_of([&] { lomem::resilu2(x.to(torch::kInt)); }),
      "lomem::resilu2: input has dtype int32, expected float64, float32, bfloat16 or float16");
  EXPECT_EQ(
      error_of([&] { lomem::ms_layer_norm(x, {7}); }),
      "lomem::ms_layer_norm: input has shape [4, 8], expected one that ends with normalized_shape [7]");
  EXPECT_EQ(
      error_of([&] { lomem::ms_rms_norm(x, {8}, {}, -1.0); }),
      "lomem::ms_rms_norm: eps is -1, expected a finite number >= 0");
  EXPECT_EQ(
      error_of([&] { lomem::pack_bits(torch::zeros({3}, torch::kByte), 9); }),
      "lomem::pack_bits: bits is 9, expected 1 to 8");
  EXPECT_EQ(
      error_of([&] {
        lomem::step_activation_backward(x, torch::zeros({7}, torch::kByte), std::vector<double>{0, 1, 2, 3}, 2);
      }),
      "lomem::step_activation_backward: codes has 7 bytes, expected 8 for 32 elements of 2 bits");
}

TEST(Ops, ResultsDoNotDependOnTheNumberOfThreads) {
  const auto x = torch::randn({257, 1031});
  const auto weight = torch::rand({1031}) + 0.5;
  const auto run = [&](int threads) {
    at::set_num_threads(threads);
    auto leaf = x.clone().requires_grad_();
    auto gamma = weight.clone().requires_grad_();
    auto bias = torch::zeros({1031}).requires_grad_();
    lomem::regelu2(lomem::ms_layer_norm(leaf, {1031}, gamma, bias)).square().sum().backward();
    return std::vector<torch::Tensor>{leaf.grad(), gamma.grad(), bias.grad()};
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

}  // namespace
