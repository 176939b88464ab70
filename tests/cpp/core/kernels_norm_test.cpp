// Norm kernels of every instruction set: against the definition in long double, within tolerances that
// have a reason, and byte for byte against the default kernels.
#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "guarded.h"
#include "kernel_tables.h"

namespace {

using lomem::DType;
using lomem::Norm;

class NormKernels : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(NormKernels);

Table default_table() {
  return {&lomem::cpu::default_kernels};
}

/// Guarded elements of a dtype that is known at run time.
class GuardedArray {
 public:
  GuardedArray(DType dtype, std::size_t count, std::size_t misalignment = 0)
      : dtype_(dtype), size_(lomem::element_size(dtype)), count_(count), bytes_(count * size_, misalignment * size_) {}

  /// Rounds each value once.
  void assign(const std::vector<double>& values) {
    ASSERT_EQ(values.size(), count_);
    lomem::cpu::store(values.data(), static_cast<std::int64_t>(count_), mutable_array(), 0);
  }

  std::vector<double> values() {
    std::vector<double> result;
    lomem::visit_dtype(dtype_, [&](auto element) {
      const auto* data = reinterpret_cast<const typename decltype(element)::type*>(bytes_.data());
      for (std::size_t i = 0; i < count_; ++i) {
        result.push_back(lomem::to_compute(data[i]));
      }
    });
    return result;
  }

  lomem::Array array() {
    return {bytes_.data(), dtype_};
  }
  lomem::MutableArray mutable_array() {
    return {bytes_.data(), dtype_};
  }
  double* doubles() {
    return reinterpret_cast<double*>(bytes_.data());
  }
  /// With one NaN for all: which of several NaN a sum keeps depends on the order of operands, which is
  /// the compiler's.
  std::vector<std::uint8_t> bytes() {
    auto result = bytes_.values();
    lomem::visit_dtype(dtype_, [&](auto element) {
      const auto nan = Element<typename decltype(element)::type>::from(std::nan(""));
      const auto numbers = values();
      for (std::size_t i = 0; i < count_; ++i) {
        if (std::isnan(numbers[i])) {
          std::memcpy(&result[i * size_], &nan, size_);
        }
      }
    });
    return result;
  }
  void expect_intact() const {
    bytes_.expect_intact();
  }

 private:
  DType dtype_;
  std::size_t size_;
  std::size_t count_;
  Guarded<std::uint8_t> bytes_;
};

struct NormDTypes {
  DType input;
  DType output;
  DType weight;

  DType rstd() const {
    return input == DType::float64 ? DType::float64 : DType::float32;
  }
};

constexpr NormDTypes same(DType dtype) {
  return {dtype, dtype, dtype};
}

// The kernels have code of their own for each of the first four, and for rows of two dtypes.
constexpr NormDTypes dtypes_of_norms[] = {
    same(DType::float64),
    same(DType::float32),
    same(DType::bfloat16),
    same(DType::float16),
    {DType::bfloat16, DType::bfloat16, DType::float32},
    {DType::float16, DType::float16, DType::float32},
    {DType::float32, DType::bfloat16, DType::bfloat16},
    {DType::float32, DType::float16, DType::float32},
    {DType::bfloat16, DType::float32, DType::float32},
    {DType::float32, DType::float32, DType::float64},
    {DType::bfloat16, DType::bfloat16, DType::float64},
    {DType::float64, DType::float32, DType::float32},
};

/// Which of weight and bias there are.
enum class Affine { none, weight, bias, both };

struct NormCase {
  Norm norm = Norm::layer;
  NormDTypes dtypes = same(DType::float32);
  Affine affine = Affine::none;
  std::size_t rows = 1;
  std::size_t cols = 1;
  std::size_t misalignment = 0;
  bool stream = false;
  /// Where the kernels are called again: a multiple of 2 or not, so that blocks of rows begin at both.
  std::vector<std::size_t> splits = {};
  double eps = 1e-5;

  bool centred() const {
    return norm == Norm::layer;
  }
  bool has_weight() const {
    return affine == Affine::weight || affine == Affine::both;
  }
  bool has_bias() const {
    return affine == Affine::bias || affine == Affine::both;
  }
  bool in_double() const {
    return dtypes.input == DType::float64 || dtypes.output == DType::float64 ||
           (affine != Affine::none && dtypes.weight == DType::float64);
  }
};

std::ostream& operator<<(std::ostream& stream, const NormCase& c) {
  const auto bits = [](DType dtype) {
    return dtype == DType::bfloat16  ? "bfloat16"
           : dtype == DType::float16 ? "float16"
           : dtype == DType::float32 ? "float32"
                                     : "float64";
  };
  stream << (c.centred() ? "layer norm, " : "RMS norm, ") << c.rows << " x " << c.cols << ", " << bits(c.dtypes.input)
         << " to " << bits(c.dtypes.output);
  if (c.has_weight() || c.has_bias()) {
    stream << (c.has_weight() ? ", weight" : "") << (c.has_bias() ? ", bias" : "") << " " << bits(c.dtypes.weight);
  }
  return stream << ", misaligned by " << c.misalignment << ", stream " << c.stream;
}

/// Inputs, as rounded to their dtypes.
struct NormInputs {
  std::vector<double> x;
  std::vector<double> grad;
  std::vector<double> gamma;  // 0.5 <= |gamma| <= 1.25; 1 where there is no weight
  std::vector<double> beta;   // |beta| <= 0.5; 0 where there is no bias
};

std::vector<double> rounded(const std::vector<double>& values, DType dtype) {
  GuardedArray array(dtype, values.size());
  array.assign(values);
  return array.values();
}

NormInputs random_inputs(const NormCase& c) {
  NormInputs result;
  const std::size_t n = c.rows * c.cols;
  const auto seed = static_cast<unsigned>(c.cols);
  result.x = rounded(random_elements<double>(n, 2, seed), c.dtypes.input);
  result.grad = rounded(random_elements<double>(n, 1, seed + 1), c.dtypes.output);
  for (std::size_t j = 0; j < c.cols; ++j) {
    // Exact in every dtype.
    const double gamma = (j % 2 == 0 ? 1 : -1) * (0.5 + static_cast<double>(j % 7) / 8);
    const double beta = static_cast<double>(j % 5) / 4 - 0.5;
    result.gamma.push_back(c.has_weight() ? gamma : 1);
    result.beta.push_back(c.has_bias() ? beta : 0);
  }
  return result;
}

constexpr double sums_before = 0.25;  // kernels add to what is there

/// What the kernels wrote, as bytes and as numbers.
struct NormResult {
  std::vector<std::uint8_t> output_bytes;
  std::vector<std::uint8_t> rstd_bytes;
  std::vector<std::uint8_t> grad_input_bytes;
  std::vector<std::uint8_t> grad_weight_bytes;
  std::vector<std::uint8_t> grad_bias_bytes;
  std::vector<double> output;
  std::vector<double> rstd;
  std::vector<double> grad_input;
  std::vector<double> grad_weight;
  std::vector<double> grad_bias;
};

NormResult run(const Table& table, const NormCase& c, const NormInputs& inputs) {
  const std::size_t n = c.rows * c.cols;
  GuardedArray x(c.dtypes.input, n, c.misalignment);
  x.assign(inputs.x);
  GuardedArray weight(c.dtypes.weight, c.cols, c.misalignment);
  weight.assign(inputs.gamma);
  GuardedArray bias(c.dtypes.weight, c.cols, c.misalignment);
  bias.assign(inputs.beta);
  GuardedArray output(c.dtypes.output, n, c.misalignment);
  GuardedArray rstd(c.dtypes.rstd(), c.rows);
  lomem::NormForward forward;
  forward.input = x.array();
  forward.output = output.mutable_array();
  forward.rstd = rstd.mutable_array();
  forward.weight = c.has_weight() ? weight.array() : lomem::Array{};
  forward.bias = c.has_bias() ? bias.array() : lomem::Array{};
  forward.cols = static_cast<std::int64_t>(c.cols);
  forward.eps = c.eps;

  GuardedArray grad(c.dtypes.output, n, c.misalignment);
  grad.assign(inputs.grad);
  GuardedArray grad_input(c.dtypes.input, n, c.misalignment);
  GuardedArray grad_weight(DType::float64, c.cols);
  GuardedArray grad_bias(DType::float64, c.cols);
  grad_weight.assign(std::vector<double>(c.cols, sums_before));
  grad_bias.assign(std::vector<double>(c.cols, sums_before));
  lomem::NormBackward backward;
  backward.grad_output = grad.array();
  backward.output = output.array();
  backward.rstd = rstd.array();
  backward.weight = forward.weight;
  backward.bias = forward.bias;
  backward.grad_input = grad_input.mutable_array();
  backward.cols = forward.cols;

  const auto run_forward = c.centred() ? table->layer_norm_forward : table->rms_norm_forward;
  const auto run_backward = c.centred() ? table->layer_norm_backward : table->rms_norm_backward;
  auto ends = c.splits;
  ends.push_back(c.rows);
  std::size_t begin = 0;
  for (const std::size_t end : ends) {
    const auto first = static_cast<std::int64_t>(begin);
    const auto last = static_cast<std::int64_t>(end);
    spoil_stack();
    run_forward(forward, first, last, c.stream);
    spoil_stack();
    run_backward(backward, first, last, grad_weight.doubles(), grad_bias.doubles(), c.stream);
    begin = end;
  }
  for (const auto* array : {&x, &weight, &bias, &output, &rstd, &grad, &grad_input, &grad_weight, &grad_bias}) {
    array->expect_intact();
  }
  return {output.bytes(),  rstd.bytes(),  grad_input.bytes(),  grad_weight.bytes(),  grad_bias.bytes(),
          output.values(), rstd.values(), grad_input.values(), grad_weight.values(), grad_bias.values()};
}

void expect_same_rows(const NormResult& got, const NormResult& want) {
  EXPECT_TRUE(same_bytes(got.output_bytes, want.output_bytes)) << "output";
  EXPECT_TRUE(same_bytes(got.rstd_bytes, want.rstd_bytes)) << "rstd";
  EXPECT_TRUE(same_bytes(got.grad_input_bytes, want.grad_input_bytes)) << "grad_input";
}

void expect_same_bytes(const NormResult& got, const NormResult& want) {
  expect_same_rows(got, want);
  EXPECT_TRUE(same_bytes(got.grad_weight_bytes, want.grad_weight_bytes)) << "grad_weight";
  EXPECT_TRUE(same_bytes(got.grad_bias_bytes, want.grad_bias_bytes)) << "grad_bias";
}

double spacing_of(DType dtype) {
  double result = 0;
  lomem::visit_dtype(dtype, [&](auto element) { result = spacing<typename decltype(element)::type>(); });
  return result;
}

/// How far a result may be from the exact one.
class Tolerance {
 public:
  explicit Tolerance(const NormCase& c) : arithmetic_(c.in_double() ? 8 * 0x1p-53 : 4 * 0x1p-24) {}

  /// One rounding of `value` to its dtype, after what arithmetic() allows.
  double of(double value, double scale, DType dtype) const {
    return spacing_of(dtype) / 2 * std::fabs(value) + arithmetic(scale) +
           (dtype == DType::float16 ? 0x1p-25 : 0);  // half a subnormal
  }

  /// Four roundings in float32, or eight in float64, of numbers of the size of `scale`: a few operations
  /// an element, and sums. (The roundings of up to 32 terms of a partial sum partly cancel, as do those of
  /// the partial sums; what is left in these tests is 2.9 of float32's and 4.3 of float64's.)
  double arithmetic(double scale) const {
    return arithmetic_ * scale;
  }

 private:
  double arithmetic_;
};

void expect_near_definition(const NormCase& c, const NormInputs& inputs, const NormResult& result) {
  const Tolerance tolerance(c);
  const std::size_t cols = c.cols;
  const auto n = static_cast<double>(cols);
  std::vector<double> want_weight(cols, sums_before);
  std::vector<double> want_bias(cols, sums_before);
  std::vector<double> size_weight(cols, 0);
  std::vector<double> size_bias(cols, 0);
  for (std::size_t row = 0; row < c.rows; ++row) {
    const double* x = inputs.x.data() + row * cols;
    const double* grad = inputs.grad.data() + row * cols;
    const double* z = result.output.data() + row * cols;
    const auto want = expected_row(x, inputs.gamma.data(), inputs.beta.data(), grad, cols, c.centred(), c.eps);
    ASSERT_NEAR(result.rstd[row], want.rstd, tolerance.of(want.rstd, want.rstd, c.dtypes.rstd())) << "row " << row;

    // The backward pass from output and rstd as they are.
    std::vector<long double> y(cols);
    std::vector<double> size_y(cols);  // of y, and of the terms that it is a difference of
    long double mean_g = 0;
    long double mean_gy = 0;
    double size_g = 0;
    double size_gy = 0;
    for (std::size_t j = 0; j < cols; ++j) {
      const double gamma = inputs.gamma[j];
      const double beta = inputs.beta[j];
      ASSERT_NEAR(
          z[j], want.z[j],
          tolerance.of(want.z[j], std::fabs(gamma) + std::fabs(want.z[j]) + std::fabs(beta), c.dtypes.output))
          << "output " << row << ", " << j;
      y[j] = (static_cast<long double>(z[j]) - beta) / gamma;
      size_y[j] = (std::fabs(z[j]) + std::fabs(beta)) / std::fabs(gamma);
      const double g = grad[j] * gamma;
      mean_g += c.centred() ? g / n : 0;
      mean_gy += g * y[j] / n;
      size_g += std::fabs(g) / n;
      size_gy += std::fabs(g) * size_y[j] / n;
      want_weight[j] += static_cast<double>(grad[j] * y[j]);
      want_bias[j] += grad[j];
      size_weight[j] += std::fabs(grad[j]) * size_y[j];
      size_bias[j] += std::fabs(grad[j]);
    }
    const double rstd = result.rstd[row];
    double largest = 0;
    for (std::size_t j = 0; j < cols; ++j) {
      const double g = grad[j] * inputs.gamma[j];
      const auto grad_x = static_cast<double>(rstd * (g - mean_g - y[j] * mean_gy));
      const double got = result.grad_input[row * cols + j];
      ASSERT_NEAR(
          got, grad_x, tolerance.of(grad_x, rstd * (std::fabs(g) + size_g + size_y[j] * size_gy), c.dtypes.input))
          << "grad_input " << row << ", " << j;
      largest = std::max(largest, std::fabs(want.grad_x[j]));
    }
    for (std::size_t j = 0; j < cols; ++j) {
      // From the exact y. That of the backward pass is off by the rounding of z, divided by gamma, and
      // is multiplied by means of products: |gamma| >= 0.5 and |z| < 8 here.
      const double from_output = 32 * spacing_of(c.dtypes.output) * (largest + want.rstd);
      ASSERT_NEAR(
          result.grad_input[row * cols + j], want.grad_x[j],
          from_output + tolerance.of(want.grad_x[j], largest + want.rstd, c.dtypes.input))
          << "grad_input " << row << ", " << j;
    }
  }
  for (std::size_t j = 0; j < cols; ++j) {
    ASSERT_NEAR(result.grad_weight[j], want_weight[j], tolerance.arithmetic(sums_before + size_weight[j])) << j;
    ASSERT_NEAR(result.grad_bias[j], want_bias[j], tolerance.arithmetic(sums_before + size_bias[j])) << j;
  }
}

void check(const Table& table, const NormCase& c) {
  SCOPED_TRACE(testing::Message() << c);
  const auto inputs = random_inputs(c);
  const auto result = run(table, c, inputs);
  expect_near_definition(c, inputs, result);
  if (table.kernels != default_table().kernels) {
    expect_same_bytes(result, run(default_table(), c, inputs));
  }
}

/// Calls body(case) for both norms, all dtypes, with and without parameters.
template <class Body>
void for_each_kind_of_norm(Body&& body) {
  for (const Norm norm : {Norm::layer, Norm::rms}) {
    for (const NormDTypes& dtypes : dtypes_of_norms) {
      for (const Affine affine : {Affine::none, Affine::weight, Affine::both, Affine::bias}) {
        if (norm == Norm::rms && (affine == Affine::both || affine == Affine::bias)) {
          continue;
        }
        NormCase c;
        c.norm = norm;
        c.dtypes = dtypes;
        c.affine = affine;
        body(c);
      }
    }
  }
}

TEST_P(NormKernels, ShortRows) {
  for_each_kind_of_norm([](NormCase c) {
    for (c.cols = 1; c.cols <= 70; ++c.cols) {
      c.rows = 1 + c.cols % 5;
      c.misalignment = c.cols % 3;
      check(GetParam(), c);
    }
  });
}

TEST_P(NormKernels, LongRows) {
  // Around blocks of a sum (1024), and around the longest rows that are kept between passes (4096).
  for_each_kind_of_norm([](NormCase c) {
    for (const std::size_t cols : {127, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 5000}) {
      c.cols = cols;
      c.rows = 1 + (cols + static_cast<std::size_t>(c.dtypes.input) + static_cast<std::size_t>(c.affine)) % 3;
      c.misalignment = cols % 3;
      check(GetParam(), c);
    }
  });
}

TEST_P(NormKernels, RowsDoNotDependOnHowTheyAreSplit) {
  for_each_kind_of_norm([](NormCase c) {
    for (const std::size_t cols : {37, 4100}) {
      c.cols = cols;
      c.rows = 5;
      c.splits = {};
      SCOPED_TRACE(testing::Message() << c);
      const auto inputs = random_inputs(c);
      const auto at_once = run(GetParam(), c, inputs);
      for (const auto& splits : {std::vector<std::size_t>{1}, {2, 3}, {1, 2, 3, 4}, {0, 3, 5}}) {
        c.splits = splits;
        expect_same_rows(run(GetParam(), c, inputs), at_once);
      }
    }
  });
}

TEST_P(NormKernels, StreamedOutputsAreTheSame) {
  for_each_kind_of_norm([](NormCase c) {
    for (const std::size_t cols : {4, 8, 16, 32, 40, 48, 64, 72, 4096, 4112}) {
      for (const std::size_t misalignment : {0, 1}) {
        c.cols = cols;
        c.rows = 3;
        c.misalignment = misalignment;
        c.stream = false;
        SCOPED_TRACE(testing::Message() << c);
        const auto inputs = random_inputs(c);
        const auto kept = run(GetParam(), c, inputs);
        c.stream = true;
        expect_same_bytes(run(GetParam(), c, inputs), kept);
      }
    }
  });
}

/// Rows whose squares leave the range of float32, among ordinary ones: the results of each are those of
/// the definition, as if it were alone.
TEST_P(NormKernels, HugeAndTinyRows) {
  for_each_kind_of_norm([](NormCase c) {
    if (c.dtypes.input == DType::float16 || c.dtypes.output == DType::float16) {
      return;  // has no such numbers, or no such gradients
    }
    // Gradients of rows of order 1e-30 are of order 1e30, far from where bfloat16 and float32 end.
    for (const double scale : {1e30, 1e18, 1e-15, 1e-30}) {
      for (const std::size_t cols : {7, 64, 4100}) {
        c.cols = cols;
        c.rows = 5;
        c.eps = 0;
        SCOPED_TRACE(testing::Message() << c << ", scale " << scale);
        auto inputs = random_inputs(c);
        for (std::size_t i = 0; i < inputs.x.size(); ++i) {
          const std::size_t row = i / cols;
          inputs.x[i] *= row == 1 || row == 4 ? scale : 1;
        }
        inputs.x = rounded(inputs.x, c.dtypes.input);
        const auto result = run(GetParam(), c, inputs);
        expect_near_definition(c, inputs, result);
        expect_same_bytes(result, run(default_table(), c, inputs));
      }
    }
  });
}

/// Where the mean is large for the standard deviation, float32 sums alone would lose it.
TEST_P(NormKernels, RowsFarFromZero) {
  for (const DType dtype : {DType::float64, DType::float32}) {
    for (const std::size_t cols : {5, 33, 768, 4096, 4097}) {
      NormCase c;
      c.dtypes = same(dtype);
      c.rows = 3;
      c.cols = cols;
      SCOPED_TRACE(testing::Message() << c);
      auto inputs = random_inputs(c);
      for (double& x : inputs.x) {
        x += 10000;
      }
      inputs.x = rounded(inputs.x, dtype);
      const auto result = run(GetParam(), c, inputs);
      if (dtype == DType::float32) {
        expect_near_definition(c, inputs, result);
      }
      expect_same_bytes(result, run(default_table(), c, inputs));
    }
  }
}

TEST_P(NormKernels, ConstantRowsGiveZero) {
  for_each_kind_of_norm([](NormCase c) {
    if (!c.centred() || c.has_bias()) {
      return;
    }
    for (const std::size_t cols : {1, 2, 3, 31, 32, 33, 100, 1025, 4096, 5000}) {
      for (const double value : {0.1, -3.0, 1000.0 / 3, 60000.0}) {
        c.cols = cols;
        c.rows = 3;
        auto inputs = random_inputs(c);
        inputs.x = rounded(std::vector<double>(c.rows * cols, value), c.dtypes.input);
        const auto result = run(GetParam(), c, inputs);
        for (const double z : result.output) {
          ASSERT_EQ(z, 0) << c << ", value " << value;
        }
      }
    }
  });
}

/// A NaN or an infinity spoils its row and no other.
TEST_P(NormKernels, RowsThatAreNotNumbers) {
  const double infinity = std::numeric_limits<double>::infinity();
  for_each_kind_of_norm([&](NormCase c) {
    for (const double poison : {std::nan(""), -std::nan(""), infinity, -infinity}) {
      for (const std::size_t cols : {3, 50, 4100}) {
        c.cols = cols;
        c.rows = 4;
        SCOPED_TRACE(testing::Message() << c << ", poison " << poison);
        auto inputs = random_inputs(c);
        const auto clean = run(GetParam(), c, inputs);
        inputs.x[cols + cols / 2] = poison;
        const auto result = run(GetParam(), c, inputs);
        const auto spoilt = [&](std::size_t i) { return i / cols == 1; };
        for (std::size_t i = 0; i < inputs.x.size(); ++i) {
          if (spoilt(i)) {
            // (RMS norm: a number divided by infinity is 0.)
            const bool number_by_infinity = !c.centred() && std::isinf(poison) && i != cols + cols / 2;
            ASSERT_TRUE(std::isnan(result.output[i]) != number_by_infinity) << i;
          } else {
            ASSERT_EQ(result.output[i], clean.output[i]) << i;
            ASSERT_EQ(result.grad_input[i], clean.grad_input[i]) << i;
          }
        }
        expect_same_bytes(result, run(default_table(), c, inputs));
      }
    }
  });
}

/// The backward pass cannot divide by a weight that left no digits in the output: NaN, not a number
/// that is wrong.
TEST_P(NormKernels, WeightsThatAreTooSmall) {
  for (const NormDTypes& dtypes : dtypes_of_norms) {
    for (const std::size_t cols : {9, 4100}) {
      NormCase c;
      c.dtypes = dtypes;
      c.affine = Affine::both;
      c.rows = 3;
      c.cols = cols;
      auto inputs = random_inputs(c);
      inputs.gamma[2] = 0;
      inputs.gamma[5] = -lomem::smallest_normal(dtypes.output) / 2;
      const auto result = run(GetParam(), c, inputs);
      EXPECT_TRUE(std::isnan(result.grad_weight[2])) << c;
      EXPECT_TRUE(std::isnan(result.grad_weight[5])) << c;
      EXPECT_FALSE(std::isnan(result.grad_weight[3])) << c;
      EXPECT_FALSE(std::isnan(result.output[2])) << c;
      expect_same_bytes(result, run(default_table(), c, inputs));
    }
  }
}

/// Many rows: a float32 sum over all of them would lose every 1.
TEST_P(NormKernels, ParameterGradientsAreAddedInDouble) {
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16}) {
    for (const std::size_t cols : {3, 40, 4100}) {
      NormCase c;
      c.norm = Norm::rms;
      c.dtypes = same(dtype);
      c.rows = 32 + 300;
      c.cols = cols;
      c.eps = 0;
      auto inputs = random_inputs(c);
      std::fill(inputs.x.begin(), inputs.x.end(), 1.0);  // so that y is 1
      std::fill(inputs.grad.begin(), inputs.grad.end(), 1.0);
      std::fill(inputs.grad.begin(), inputs.grad.begin() + static_cast<std::ptrdiff_t>(32 * cols), 0x1p30);
      const auto result = run(GetParam(), c, inputs);
      for (std::size_t j = 0; j < cols; ++j) {
        ASSERT_EQ(result.grad_bias[j], sums_before + 0x1p35 + 300) << c;
        ASSERT_EQ(result.grad_weight[j], sums_before + 0x1p35 + 300) << c;
      }
    }
  }
}

/// Each of the three gradients is the same without the others.
TEST_P(NormKernels, GradientsThatAreNotWanted) {
  for_each_kind_of_norm([](NormCase c) {
    for (const std::size_t cols : {21, 4100}) {
      c.cols = cols;
      c.rows = 3;
      SCOPED_TRACE(testing::Message() << c);
      const auto inputs = random_inputs(c);
      const auto all = run(GetParam(), c, inputs);
      GuardedArray grad(c.dtypes.output, c.rows * cols);
      grad.assign(inputs.grad);
      GuardedArray output(c.dtypes.output, c.rows * cols);
      output.assign(all.output);
      GuardedArray rstd(c.dtypes.rstd(), c.rows);
      rstd.assign(all.rstd);
      GuardedArray weight(c.dtypes.weight, cols);
      weight.assign(inputs.gamma);
      GuardedArray bias(c.dtypes.weight, cols);
      bias.assign(inputs.beta);
      for (int wanted = 0; wanted < 8; ++wanted) {
        GuardedArray grad_input(c.dtypes.input, c.rows * cols);
        GuardedArray grad_weight(DType::float64, cols);
        GuardedArray grad_bias(DType::float64, cols);
        grad_weight.assign(std::vector<double>(cols, sums_before));
        grad_bias.assign(std::vector<double>(cols, sums_before));
        lomem::NormBackward backward;
        backward.grad_output = grad.array();
        backward.output = output.array();
        backward.rstd = rstd.array();
        backward.weight = c.has_weight() ? weight.array() : lomem::Array{};
        backward.bias = c.has_bias() ? bias.array() : lomem::Array{};
        backward.grad_input = (wanted & 1) != 0 ? grad_input.mutable_array() : lomem::MutableArray{};
        backward.cols = static_cast<std::int64_t>(cols);
        const auto run_backward = c.centred() ? GetParam()->layer_norm_backward : GetParam()->rms_norm_backward;
        spoil_stack();
        run_backward(
            backward, 0, static_cast<std::int64_t>(c.rows), (wanted & 2) != 0 ? grad_weight.doubles() : nullptr,
            (wanted & 4) != 0 ? grad_bias.doubles() : nullptr, false);
        if ((wanted & 1) != 0) {
          EXPECT_TRUE(same_bytes(grad_input.bytes(), all.grad_input_bytes)) << wanted;
        }
        if ((wanted & 2) != 0) {
          EXPECT_TRUE(same_bytes(grad_weight.bytes(), all.grad_weight_bytes)) << wanted;
        }
        if ((wanted & 4) != 0) {
          EXPECT_TRUE(same_bytes(grad_bias.bytes(), all.grad_bias_bytes)) << wanted;
        }
      }
    }
  });
}

TEST_P(NormKernels, NoRowsAndNoColumns) {
  for_each_kind_of_norm([](NormCase c) {
    for (const std::size_t rows : {0, 2}) {
      c.rows = rows;
      c.cols = rows == 0 ? 5 : 0;
      const auto result = run(GetParam(), c, random_inputs(c));
      expect_same_bytes(result, run(default_table(), c, random_inputs(c)));
      for (const double rstd : result.rstd) {
        EXPECT_NEAR(rstd, 1 / std::sqrt(c.eps), 1e-4);
      }
    }
  });
}

}  // namespace
