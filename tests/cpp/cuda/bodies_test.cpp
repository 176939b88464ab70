// The bodies of the CUDA kernels, executed on the CPU over whole grids: every size around units and
// blocks, misaligned bases, sentinels, every dtype and tiling, against the definitions. What a GPU
// adds (shuffles, shared memory, launches) is tested in device_test.cpp.
#include <gtest/gtest.h>
#include <lomem/cuda/norm_plan.h>
#include <lomem/cuda/packing.cuh>
#include <lomem/cuda/step.cuh>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <tuple>

#include "../core/elements.h"
#include "../core/fused_functions.h"
#include "../core/guarded.h"

namespace {

using lomem::DType;
using namespace lomem::cuda;

template <class T>
class Bodies : public testing::Test {};
using Elements = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(Bodies, Elements);

/// All sizes up to a few units, and those around blocks.
std::vector<std::int64_t> sizes(std::int64_t block) {
  std::vector<std::int64_t> result;
  for (std::int64_t n = 0; n <= 40; ++n) {
    result.push_back(n);
  }
  for (const std::int64_t base : {block, 2 * block}) {
    for (const std::int64_t n : {base - 9, base - 1, base, base + 1, base + 13}) {
      result.push_back(n);
    }
  }
  return result;
}

/// Rounding of the result to T, and the few roundings before it: 1 + erf(u) and 1 + tanh(u) lose
/// digits that the size of x bounds.
template <class T>
double forward_tolerance(double x, double y) {
  const double arithmetic = 4 * (sizeof(T) == sizeof(double) ? spacing<double>() : spacing<float>());
  return spacing<T>() * std::fabs(y) + arithmetic * std::fabs(x) + (sizeof(T) == 2 ? std::ldexp(1, -24) : 0);
}

template <class Function, class T>
void check_forward() {
  using Step = typename Function::PublishedSteps;
  using Body = StepForward<Function, Step, T>;
  for (const std::int64_t n : sizes(Body::Grid::block_elements)) {
    // Aligned; then each of the three bases misaligned.
    for (int misaligned = -1; misaligned < 3; ++misaligned) {
      Guarded<T> x(n, misaligned == 0 ? 1 : 0);
      x.assign(random_elements<T>(n, 4, static_cast<unsigned>(n)));
      Guarded<T> y(n, misaligned == 1 ? 1 : 0);
      Guarded<std::uint8_t> codes(lomem::packed_bytes(n, Step::bits), misaligned == 2 ? 1 : 0);
      const Body body(x.data(), n, y.data(), codes.data());
      execute_on_host(body);
      x.expect_intact();
      y.expect_intact();
      codes.expect_intact();
      std::vector<std::uint8_t> want;
      const auto inputs = x.values();
      const auto outputs = y.values();
      for (std::int64_t i = 0; i < n; ++i) {
        want.push_back(Step::code(inputs[i]));
        const double value = lomem::to_compute(inputs[i]);
        const double result = Fused<Function>::definition(value);
        ASSERT_NEAR(lomem::to_compute(outputs[i]), result, forward_tolerance<T>(value, result)) << i << " of " << n;
      }
      ASSERT_EQ(codes.values(), oracle::pack(want, Step::bits)) << n << ", misaligned " << misaligned;
    }
  }
}

TYPED_TEST(Bodies, StepForward) {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check_forward<Function, TypeParam>();
  });
}

template <class T, class Step>
void check_all_patterns(oracle::Format format) {
  // Every 16-bit value, in every position of a unit: the packed comparison against the definition.
  for (int shift = 0; shift < 8; ++shift) {
    for (int first = 0; first < 0x10000; first += 8) {
      Vector<T, 8> x;
      std::vector<std::uint8_t> codes;
      for (int j = 0; j < 8; ++j) {
        x[j].bits = static_cast<std::uint16_t>(first + (j + shift) % 8);
        codes.push_back(
            static_cast<std::uint8_t>(oracle::code<T>(
                oracle::decode(x[j].bits, format), Step::boundary(0), Step::boundary(1), Step::boundary(2))));
      }
      const auto packed = oracle::pack(codes, 2);
      ASSERT_EQ((encode<Step>(x)), packed[0] | packed[1] << 8) << first;
    }
  }
}

TEST(Encode, AllSixteenBitPatterns) {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check_all_patterns<lomem::bfloat16, typename Function::PublishedSteps>(oracle::bfloat16);
    check_all_patterns<lomem::float16, typename Function::PublishedSteps>(oracle::float16);
  });
}

/// Codes of run-time boundaries, and of a band, against the definition.
template <class T, class Coder, class Expected>
void check_encode(const Coder& coder, const Expected& expected) {
  using Body = StepEncode<Coder, T>;
  for (const std::int64_t n : sizes(Body::Grid::block_elements)) {
    for (int misaligned = -1; misaligned < 2; ++misaligned) {
      Guarded<T> x(n, misaligned == 0 ? 1 : 0);
      auto values = random_elements<T>(n, 3, static_cast<unsigned>(n));
      if (n > 3) {
        values[1] = Element<T>::from(std::numeric_limits<double>::quiet_NaN());
        values[2] = Element<T>::from(std::numeric_limits<double>::infinity());
      }
      x.assign(values);
      Guarded<std::uint8_t> codes(lomem::packed_bytes(n, Coder::bits), misaligned == 1 ? 1 : 0);
      execute_on_host(Body(coder, x.data(), n, codes.data()));
      codes.expect_intact();
      std::vector<std::uint8_t> want;
      for (const T value : values) {
        want.push_back(static_cast<std::uint8_t>(expected(lomem::to_compute(value))));
      }
      ASSERT_EQ(codes.values(), oracle::pack(want, Coder::bits)) << Coder::bits << " bits, " << n;
    }
  }
}

template <class T, int bits>
void check_search() {
  using C = lomem::compute_t<T>;
  std::vector<double> boundaries((1 << bits) - 1);
  for (std::size_t i = 0; i < boundaries.size(); ++i) {
    boundaries[i] = std::sinh(5.0 * static_cast<double>(i + 1) / static_cast<double>(boundaries.size() + 1) - 2.4);
  }
  boundaries.back() = std::numeric_limits<double>::infinity();
  check_encode<T>(SearchCoder<T, bits>(boundaries.data()), [&](C x) {
    return std::count_if(boundaries.begin(), boundaries.end(), [&](double c) { return x > static_cast<C>(c); });
  });
}

TYPED_TEST(Bodies, SearchEncode) {
  check_search<TypeParam, 1>();
  check_search<TypeParam, 2>();
  check_search<TypeParam, 3>();
  check_search<TypeParam, 4>();
  check_search<TypeParam, 5>();
  check_search<TypeParam, 6>();
  check_search<TypeParam, 7>();
  check_search<TypeParam, 8>();
}

TYPED_TEST(Bodies, BandEncode) {
  using C = lomem::compute_t<TypeParam>;
  check_encode<TypeParam>(BandCoder<TypeParam>(-1.5, 2), [](C x) { return C(-1.5) <= x && x <= C(2) ? 1 : 0; });
}

TEST(StepBackward, OneBitOfLevelZeroGivesZero) {
  const double infinity = std::numeric_limits<double>::infinity();
  const float grad[4] = {static_cast<float>(infinity), std::numeric_limits<float>::quiet_NaN(), -1, 2};
  const std::uint8_t codes[1] = {0b1000};
  const double levels[2] = {0, 3};
  float result[4];
  execute_on_host(StepBackward<float, 1>(grad, codes, levels, 4, result));
  EXPECT_EQ(result[0], 0);
  EXPECT_EQ(result[1], 0);
  EXPECT_EQ(result[2], 0);
  EXPECT_FALSE(std::signbit(result[2]));
  EXPECT_EQ(result[3], 6);
}

template <class T, int bits>
void check_backward() {
  using Body = StepBackward<T, bits>;
  using C = lomem::compute_t<T>;
  std::vector<double> levels(std::size_t{1} << bits);
  for (std::size_t i = 0; i < levels.size(); ++i) {
    levels[i] = std::sin(static_cast<double>(i) + 0.1);
  }
  for (const std::int64_t n : sizes(Body::Grid::block_elements)) {
    std::vector<std::uint8_t> codes(n);
    for (std::int64_t i = 0; i < n; ++i) {
      codes[i] = static_cast<std::uint8_t>((i * 37 + n) % static_cast<std::int64_t>(levels.size()));
    }
    for (int misaligned = -1; misaligned < 3; ++misaligned) {
      Guarded<T> grad(n, misaligned == 0 ? 1 : 0);
      grad.assign(random_elements<T>(n, 1, static_cast<unsigned>(n)));
      Guarded<std::uint8_t> packed(lomem::packed_bytes(n, bits), misaligned == 1 ? 1 : 0);
      packed.assign(oracle::pack(codes, bits));
      Guarded<T> result(n, misaligned == 2 ? 1 : 0);
      const Body body(grad.data(), packed.data(), levels.data(), n, result.data());
      execute_on_host(body);
      result.expect_intact();
      const auto gradients = grad.values();
      const auto got = result.values();
      for (std::int64_t i = 0; i < n; ++i) {
        const T want = lomem::step_gradient<bits>(gradients[i], static_cast<C>(levels[codes[i]]));
        ASSERT_EQ(lomem::to_compute(got[i]), lomem::to_compute(want)) << bits << " bits, " << i << " of " << n;
      }
    }
  }
}

TYPED_TEST(Bodies, StepBackward) {
  check_backward<TypeParam, 1>();
  check_backward<TypeParam, 2>();
  check_backward<TypeParam, 3>();
  check_backward<TypeParam, 4>();
  check_backward<TypeParam, 5>();
  check_backward<TypeParam, 6>();
  check_backward<TypeParam, 7>();
  check_backward<TypeParam, 8>();
}

template <int bits>
void check_packing() {
  for (const std::int64_t n : sizes(GroupGrid::block_codes)) {
    std::vector<std::uint8_t> codes(n);
    for (std::int64_t i = 0; i < n; ++i) {
      codes[i] = static_cast<std::uint8_t>((i * 151 + n) & lomem::max_code(bits));
    }
    for (int misaligned = -1; misaligned < 2; ++misaligned) {
      Guarded<std::uint8_t> source(n, misaligned == 0 ? 1 : 0);
      source.assign(codes);
      Guarded<std::uint8_t> packed(lomem::packed_bytes(n, bits), misaligned == 1 ? 1 : 0);
      const PackBits<bits> pack(source.data(), n, packed.data());
      execute_on_host(pack);
      packed.expect_intact();
      ASSERT_EQ(packed.values(), oracle::pack(codes, bits)) << bits << " bits, " << n;

      Guarded<std::uint8_t> unpacked(n, misaligned == 0 ? 1 : 0);
      const UnpackBits<bits> unpack(packed.data(), n, unpacked.data());
      execute_on_host(unpack);
      unpacked.expect_intact();
      ASSERT_EQ(unpacked.values(), codes) << bits << " bits, " << n;
    }
  }
}

TEST(Packing, AllWidths) {
  check_packing<1>();
  check_packing<2>();
  check_packing<3>();
  check_packing<4>();
  check_packing<5>();
  check_packing<6>();
  check_packing<7>();
  check_packing<8>();
}

/// Also checks that there are kernels for what it executes.
struct CheckingRunner : HostRunner {
  template <class Work>
  Error groups(const Work& work, std::int64_t count, int threads) const {
    EXPECT_GT(count, 0);
    EXPECT_TRUE(threads == warp_size ? Work::by_warps : Work::by_blocks) << "work that gets no kernel";
    EXPECT_TRUE(threads % warp_size == 0 && threads <= max_block_threads) << threads;
    return HostRunner::groups(work, count, threads);
  }
};
constexpr CheckingRunner runner{{3}};

/// Which kernels of a norm were executed: (backward, the plan's list of tilings, the plan's index in it).
using Kernels = std::set<std::tuple<bool, bool, int>>;

/// What a norm is computed with, apart from the dtypes.
struct NormCase {
  std::int64_t rows;
  std::int64_t cols;
  bool affine;
  bool misaligned;
  bool parameters;
};

/// 0.5 <= |gamma| <= 1.25, |beta| <= 0.5.
void fill_parameters(std::vector<double>& gamma, std::vector<double>& beta, bool centred) {
  for (std::size_t j = 0; j < gamma.size(); ++j) {
    gamma[j] = (j % 2 == 0 ? 1 : -1) * (0.5 + static_cast<double>(j % 7) / 8);
    beta[j] = centred ? static_cast<double>(j % 5) / 4 - 0.5 : 0;
  }
}

/// Rounding of a value to T, after arithmetic of the given spacing at 1: 8 roundings of values of the size of
/// `scale`. (Each sum in the kernels' order has the relative error of a few roundings: a thread
/// adds up to 32 terms, threads are then added by halving.)
template <class T>
double norm_tolerance(double value, double scale, double arithmetic) {
  return spacing<T>() / 2 * std::fabs(value) + 8 * arithmetic / 2 * scale +
         (Element<T>::dtype == DType::float16 ? std::ldexp(1, -25) : 0);
}

template <lomem::Norm norm, class In, class Out, class Weight>
void check_norm(const NormCase& c, Kernels& seen) {
  constexpr bool centred = norm == lomem::Norm::layer;
  const bool in_double = sizeof(In) == 8 || sizeof(Out) == 8 || (c.affine && sizeof(Weight) == 8);
  const double arithmetic = in_double ? spacing<double>() : spacing<float>();
  using Statistic = lomem::compute_t<In>;
  SCOPED_TRACE(
      testing::Message() << c.rows << " x " << c.cols << (c.affine ? " affine" : "")
                         << (c.misaligned ? " misaligned" : "") << " element sizes " << sizeof(In) << " " << sizeof(Out)
                         << " " << sizeof(Weight));
  const std::size_t cols = c.cols;
  const std::size_t n = c.rows * cols;
  const double eps = 1e-5;
  const std::size_t shift = c.misaligned ? 1 : 0;
  Guarded<In> x(n, shift);
  x.assign(random_elements<In>(n, 2, static_cast<unsigned>(cols)));
  Guarded<Out> grad(n, shift);
  grad.assign(random_elements<Out>(n, 1, static_cast<unsigned>(cols + 1)));
  std::vector<double> gamma(cols, 1);
  std::vector<double> beta(cols, 0);
  Guarded<Weight> weight(cols);
  Guarded<Weight> bias(cols);
  if (c.affine) {
    fill_parameters(gamma, beta, centred);  // exact in every dtype
    std::vector<Weight> rounded;
    std::transform(gamma.begin(), gamma.end(), std::back_inserter(rounded), Element<Weight>::from);
    weight.assign(rounded);
    rounded.clear();
    std::transform(beta.begin(), beta.end(), std::back_inserter(rounded), Element<Weight>::from);
    bias.assign(rounded);
  }
  Guarded<Out> output(n, shift);
  Guarded<Statistic> rstd(c.rows);
  lomem::NormForward forward;
  forward.input = {x.data(), Element<In>::dtype};
  forward.output = {output.data(), Element<Out>::dtype};
  forward.rstd = {rstd.data(), Element<Statistic>::dtype};
  if (c.affine) {
    forward.weight = {weight.data(), Element<Weight>::dtype};
    forward.bias = centred ? lomem::Array{bias.data(), Element<Weight>::dtype} : lomem::Array{};
  }
  forward.cols = c.cols;
  forward.eps = eps;
  EXPECT_TRUE(run_norm_forward<norm>(forward, c.rows, runner));
  output.expect_intact();
  rstd.expect_intact();
  seen.insert({false, false, plan_forward(forward).tiling});

  Guarded<In> grad_input(n, shift);
  Guarded<Weight> grad_weight(cols);
  Guarded<Weight> grad_bias(cols);
  lomem::NormBackward backward;
  backward.grad_output = {grad.data(), Element<Out>::dtype};
  backward.output = {output.data(), Element<Out>::dtype};
  backward.rstd = {rstd.data(), Element<Statistic>::dtype};
  backward.weight = forward.weight;
  backward.bias = forward.bias;
  backward.grad_input = {grad_input.data(), Element<In>::dtype};
  backward.cols = c.cols;
  NormParameterGradients parameters;
  if (c.affine && c.parameters) {
    parameters.grad_weight = {grad_weight.data(), Element<Weight>::dtype};
    if (centred) {
      parameters.grad_bias = {grad_bias.data(), Element<Weight>::dtype};
    }
  }
  Guarded<float> workspace(norm_backward_bytes(backward, c.rows, parameters, runner.multiprocessors) / 4);
  parameters.workspace = workspace.data();
  EXPECT_TRUE(run_norm_backward<norm>(backward, c.rows, parameters, runner));
  for (const auto* guarded : {&grad_weight, &grad_bias}) {
    guarded->expect_intact();
  }
  grad_input.expect_intact();
  workspace.expect_intact();
  const NormPlan backward_plan = plan_backward(backward, parameters.needed());
  seen.insert({true, backward_plan.parameters, backward_plan.tiling});

  std::vector<double> grads;
  for (const Out g : grad.values()) {
    grads.push_back(lomem::to_compute(g));
  }
  const auto z = output.values();
  const auto grad_x = grad_input.values();
  std::vector<double> want_weight(cols, 0);
  std::vector<double> want_bias(cols, 0);
  std::vector<double> size_weight(cols, 0);
  std::vector<double> size_bias(cols, 0);
  for (std::int64_t row = 0; row < c.rows; ++row) {
    const auto want =
        expected_row(x.data() + row * cols, gamma.data(), beta.data(), grads.data() + row * cols, cols, centred, eps);
    ASSERT_NEAR(rstd.values()[row], want.rstd, norm_tolerance<Statistic>(want.rstd, want.rstd, arithmetic));
    double scale = 0;
    for (std::size_t j = 0; j < cols; ++j) {
      const std::size_t i = row * cols + j;
      ASSERT_NEAR(
          lomem::to_compute(z[i]), want.z[j],
          norm_tolerance<Out>(want.z[j], std::fabs(gamma[j]) + std::fabs(want.z[j]) + std::fabs(beta[j]), arithmetic))
          << j;
      const double y = (lomem::to_compute(z[i]) - beta[j]) / gamma[j];
      want_weight[j] += grads[i] * y;
      size_weight[j] += std::fabs(grads[i] * y) + std::fabs(grads[i] * beta[j] / gamma[j]);
      want_bias[j] += grads[i];
      size_bias[j] += std::fabs(grads[i]);
      scale = std::max(scale, std::fabs(want.grad_x[j]));
    }
    for (std::size_t j = 0; j < cols; ++j) {
      // The backward pass starts from z as rounded to Out, whose rounding is divided by gamma and
      // multiplied by means of products: |gamma| >= 0.5, |z| < 8 here.
      const double from_output = 32 * spacing<Out>() * (scale + want.rstd);
      ASSERT_NEAR(
          lomem::to_compute(grad_x[row * cols + j]), want.grad_x[j],
          from_output + norm_tolerance<In>(want.grad_x[j], scale + want.rstd, arithmetic))
          << j;
    }
  }
  if (parameters.needed()) {
    const auto got_weight = grad_weight.values();
    const auto got_bias = grad_bias.values();
    for (std::size_t j = 0; j < cols; ++j) {
      ASSERT_NEAR(
          lomem::to_compute(got_weight[j]), want_weight[j],
          norm_tolerance<Weight>(want_weight[j], size_weight[j], arithmetic))
          << j;
      if (centred) {
        ASSERT_NEAR(
            lomem::to_compute(got_bias[j]), want_bias[j],
            norm_tolerance<Weight>(want_bias[j], size_bias[j], arithmetic))
            << j;
      }
    }
  }
}

template <class In, class Out, class Weight>
void check_norms(const NormCase& c, Kernels& seen) {
  check_norm<lomem::Norm::layer, In, Out, Weight>(c, seen);
  check_norm<lomem::Norm::rms, In, Out, Weight>(c, seen);
}

TEST(Norms, EveryTilingAndMixOfDtypes) {
  using lomem::bfloat16;
  using lomem::float16;
  Kernels seen;
  for (const std::int64_t cols :
       {1,   2,    3,    7,    8,    31,   32,   33,   64,   255,  256,  257,  264,   512,   513,   520,
        768, 1000, 1024, 1025, 1032, 2048, 2056, 4096, 4097, 4104, 8192, 8200, 16384, 16392, 20001, 20008}) {
    for (const bool affine : {false, true}) {
      const std::int64_t rows = cols > 1024 ? 2 : 5;
      const NormCase aligned{rows, cols, affine, false, true};
      check_norms<float, float, float>(aligned, seen);
      check_norms<bfloat16, bfloat16, bfloat16>(aligned, seen);
      check_norms<float16, float16, float16>(aligned, seen);
      check_norms<double, double, double>(aligned, seen);
      // Autocast, and a residual stream in float32.
      check_norms<float, bfloat16, float>(aligned, seen);
      check_norms<bfloat16, float, bfloat16>(aligned, seen);
      check_norms<bfloat16, bfloat16, float>(aligned, seen);
      check_norms<float16, float16, double>(aligned, seen);
      check_norms<double, float16, float>(aligned, seen);
      check_norms<bfloat16, bfloat16, bfloat16>({rows, cols, affine, true, true}, seen);
      check_norms<float, float, float>({rows, cols, affine, false, false}, seen);
      check_norms<bfloat16, bfloat16, float>({rows, cols, affine, false, false}, seen);
    }
  }
  // Every tiling that there is a kernel for was executed.
  Kernels all;
  for (int tiling = 0; tiling < RowTilings::size; ++tiling) {
    all.insert({false, false, tiling});
    all.insert({true, false, tiling});
  }
  for (int tiling = 0; tiling < StripTilings::size; ++tiling) {
    all.insert({true, true, tiling});
  }
  EXPECT_EQ(seen, all);
}

TEST(Norms, ManyRowsInStrips) {
  Kernels seen;
  for (const std::int64_t cols : {24, 400, 900, 5000, 33}) {
    for (const std::int64_t rows : {1, 3, 4, 7, 8, 63, 300}) {
      check_norms<float, float, float>({rows, cols, true, false, true}, seen);
      check_norms<lomem::bfloat16, lomem::bfloat16, float>({rows, cols, true, false, true}, seen);
    }
  }
  check_norms<double, double, double>({300, 6, true, false, true}, seen);
}

TEST(Norms, StripsCoverAllRowsOnce) {
  for (const std::int64_t rows : {0, 1, 5, 64, 1000}) {
    for (const std::int64_t strips : {1, 2, 3, 7, 64}) {
      EXPECT_EQ(strip_begin(0, strips, rows), 0);
      EXPECT_EQ(strip_begin(strips, strips, rows), rows);
      for (std::int64_t s = 0; s < strips; ++s) {
        const std::int64_t size = strip_begin(s + 1, strips, rows) - strip_begin(s, strips, rows);
        EXPECT_GE(size, rows / strips);
        EXPECT_LE(size, rows / strips + 1);
      }
    }
  }
  // Near the largest sizes nothing overflows.
  constexpr std::int64_t many = std::int64_t{1} << 61;
  EXPECT_EQ(strip_begin(2000, 2000, many), many);
}

/// Rows whose mean is much larger than their spread, and rows without spread.
TEST(Norms, LargeMeans) {
  for (const std::int64_t cols : {64, 1000, 20001}) {
    for (const float mean : {100.0F, -3e4F}) {
      std::vector<float> x(cols);
      for (std::int64_t j = 0; j < cols; ++j) {
        x[j] = mean + static_cast<float>(j % 16) / 8;  // exact
      }
      const std::vector<double> ones(cols, 1);
      const std::vector<double> zeros(cols, 0);
      const auto want = expected_row(x.data(), ones.data(), zeros.data(), zeros.data(), cols, true, 1e-5L);
      std::vector<float> y(cols);
      float rstd = 0;
      lomem::NormForward args;
      args.input = {x.data(), DType::float32};
      args.output = {y.data(), DType::float32};
      args.rstd = {&rstd, DType::float32};
      args.cols = cols;
      args.eps = 1e-5;
      EXPECT_TRUE(run_norm_forward<lomem::Norm::layer>(args, 1, runner));
      for (std::int64_t j = 0; j < cols; ++j) {
        // As for small means: the mean is known to twice the digits of a float.
        ASSERT_NEAR(y[j], want.z[j], norm_tolerance<float>(want.z[j], 1, spacing<float>())) << mean << " " << j;
      }
      std::fill(x.begin(), x.end(), mean);
      EXPECT_TRUE(run_norm_forward<lomem::Norm::layer>(args, 1, runner));
      EXPECT_EQ(y, std::vector<float>(cols, 0.0F)) << "a constant row";
    }
  }
}

/// Gradients of a norm whose weights are 1 except in column 3, for inputs without NaN.
struct NormGradients {
  std::vector<float> input;
  std::vector<float> weight;
  std::vector<float> bias;
};

template <lomem::Norm norm>
NormGradients gradients_with_weight(float weight, DType output, std::int64_t rows, std::int64_t cols, bool aligned) {
  // (Elements of 2 and of 4 bytes: 0.5 in both.)
  std::vector<lomem::float16> halves(rows * cols + 8, Element<lomem::float16>::from(0.5));
  std::vector<float> floats(rows * cols + 8, 0.5F);
  const std::vector<float> grad(rows * cols + 8, 1.0F);
  const std::vector<float> rstd(rows, 1.0F);
  const std::vector<float> beta(cols, 0.25F);
  std::vector<float> gamma(cols, 1.0F);
  gamma[3] = weight;
  NormGradients result{std::vector<float>(rows * cols), std::vector<float>(cols), std::vector<float>(cols)};
  const std::size_t shift = aligned ? 0 : 1;
  lomem::NormBackward args;
  args.grad_output = {grad.data() + shift, DType::float32};
  args.output = output == DType::float16 ? lomem::Array{halves.data(), output} : lomem::Array{floats.data(), output};
  args.rstd = {rstd.data(), DType::float32};
  args.weight = {gamma.data(), DType::float32};
  args.grad_input = {result.input.data(), DType::float32};
  args.cols = cols;
  NormParameterGradients parameters;
  parameters.grad_weight = {result.weight.data(), DType::float32};
  if (lomem::has_bias(norm)) {
    args.bias = {beta.data(), DType::float32};
    parameters.grad_bias = {result.bias.data(), DType::float32};
  }
  std::vector<double> workspace(norm_backward_bytes(args, rows, parameters, runner.multiprocessors) / 8 + 1);
  parameters.workspace = workspace.data();
  EXPECT_TRUE(run_norm_backward<norm>(args, rows, parameters, runner));
  return result;
}

template <lomem::Norm norm>
void check_weight_too_small_to_divide_by(std::int64_t cols, bool aligned) {
  constexpr std::int64_t rows = 13;
  const auto finite = [](float x) { return std::isfinite(x); };
  for (const DType output : {DType::float16, DType::float32}) {
    SCOPED_TRACE(
        testing::Message() << cols << " columns" << (aligned ? "" : ", misaligned") << ", output of "
                           << lomem::element_size(output) << " bytes");
    const auto smallest = static_cast<float>(lomem::smallest_normal(output));
    for (const float weight : {0.0F, -0.0F, smallest / 2, -std::nextafter(smallest, 0.0F)}) {
      const auto grad = gradients_with_weight<norm>(weight, output, rows, cols, aligned);
      // Every row's mean of g * y contains that column.
      EXPECT_TRUE(std::none_of(grad.input.begin(), grad.input.end(), [](float x) { return !std::isnan(x); }));
      for (std::int64_t j = 0; j < cols; ++j) {
        ASSERT_EQ(std::isnan(grad.weight[j]), j == 3) << j;
      }
      EXPECT_TRUE(std::all_of(grad.bias.begin(), grad.bias.end(), finite));
      // The sums are over rows: no other gradient changes by a bit.
      const auto without = gradients_with_weight<norm>(1, output, rows, cols, aligned);
      for (std::int64_t j = 0; j < cols; ++j) {
        ASSERT_TRUE(j == 3 || grad.weight[j] == without.weight[j]) << j;
      }
      EXPECT_EQ(grad.bias, without.bias);
    }
    for (const float weight : {smallest, -smallest}) {
      const auto grad = gradients_with_weight<norm>(weight, output, rows, cols, aligned);
      EXPECT_TRUE(std::none_of(grad.input.begin(), grad.input.end(), [](float x) { return std::isnan(x); }));
      EXPECT_TRUE(std::none_of(grad.weight.begin(), grad.weight.end(), [](float x) { return std::isnan(x); }));
    }
  }
}

TEST(Norms, WeightsTooSmallToDivideByGiveNaNInTheWholeGradInputAndTheirColumnOfGradWeight) {
  // By a warp with sums; by a block with sums; by a block, with sums in a pass of their own; read again.
  for (const std::int64_t cols : {8, 520, 5000, 16392}) {
    for (const bool aligned : {true, false}) {
      check_weight_too_small_to_divide_by<lomem::Norm::layer>(cols, aligned);
      check_weight_too_small_to_divide_by<lomem::Norm::rms>(cols, aligned);
    }
  }
}

TEST(Norms, RMSNormRefusesABias) {
  const std::vector<float> values(8, 1.0F);
  std::vector<float> result(8);
  const lomem::Array array{values.data(), DType::float32};
  lomem::NormForward forward;
  forward.input = array;
  forward.output = {result.data(), DType::float32};
  forward.rstd = {result.data(), DType::float32};
  forward.cols = 8;
  EXPECT_EQ(run_norm_forward<lomem::Norm::rms>(forward, 0, runner), HostRunner::ok);
  forward.bias = array;
  EXPECT_EQ(run_norm_forward<lomem::Norm::layer>(forward, 0, runner), HostRunner::ok);
  EXPECT_EQ(run_norm_forward<lomem::Norm::rms>(forward, 0, runner), HostRunner::invalid);
  EXPECT_EQ(run_norm_forward<lomem::Norm::rms>(forward, 1, runner), HostRunner::invalid);

  lomem::NormBackward backward;
  EXPECT_EQ(run_norm_backward<lomem::Norm::rms>(backward, 0, {}, runner), HostRunner::ok);
  NormParameterGradients parameters;
  parameters.grad_bias = {result.data(), DType::float32};
  EXPECT_EQ(run_norm_backward<lomem::Norm::layer>(backward, 0, parameters, runner), HostRunner::ok);
  EXPECT_EQ(run_norm_backward<lomem::Norm::rms>(backward, 0, parameters, runner), HostRunner::invalid);
  backward.bias = array;
  EXPECT_EQ(run_norm_backward<lomem::Norm::layer>(backward, 0, {}, runner), HostRunner::ok);
  EXPECT_EQ(run_norm_backward<lomem::Norm::rms>(backward, 0, {}, runner), HostRunner::invalid);
  EXPECT_EQ(result, std::vector<float>(8)) << "nothing is computed";
}

}  // namespace
