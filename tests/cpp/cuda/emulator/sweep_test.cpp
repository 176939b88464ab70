// All kernels on random sizes, alignments and mixes of dtypes, against the definitions in float64: on an emulator,
// which also checks each access. LOMEM_SWEEP_CASES is the number of norms, and of activations per function (default:
// 300).
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>

#include "../../core/drawn_cases.h"
#include "../../core/elements.h"
#include "../../core/fused_functions.h"
#include "../../core/gates.h"
#include "emulator.h"

namespace {

using lomem::Array;
using lomem::DType;
using lomem::MutableArray;
using lomem::Norm;
using namespace lomem::cuda;

int number_of_cases() {
  const char* value = std::getenv("LOMEM_SWEEP_CASES");
  return value != nullptr && *value != 0 ? std::atoi(value) : 300;
}

/// Calls visitor(Type<T>{}) with the type of a dtype.
template <class Visitor>
decltype(auto) visit(DType dtype, Visitor&& visitor) {
  return lomem::visit_dtype(dtype, std::forward<Visitor>(visitor));
}

/// Distance of x from the next larger number of a dtype.
double spacing_at(DType dtype, double x) {
  return visit(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int smallest = std::is_same_v<T, double> ? -1022 : std::is_same_v<T, lomem::float16> ? -14 : -126;
    return std::ldexp(spacing<T>(), std::isfinite(x) && x != 0 ? std::max(std::ilogb(x), smallest) : smallest);
  });
}

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  /// In [0, n).
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(generator_() % static_cast<std::uint64_t>(n));
  }
  bool one_in(int n) {
    return below(n) == 0;
  }
  double normal(double scale = 1) {
    return std::normal_distribution<double>(0, scale)(generator_);
  }

 private:
  std::mt19937 generator_;
};

/// An array on the device, with what is in it as float64. It begins some elements after an aligned address.
class DeviceArray {
 public:
  DeviceArray(DType dtype, std::int64_t n, std::int64_t misalignment = 0)
      : dtype_(dtype), values_(n), size_(static_cast<std::int64_t>(lomem::element_size(dtype))) {
    EXPECT_EQ(cudaMalloc(&memory_, (n + misalignment) * size_ + 1), cudaSuccess);
    data_ = static_cast<std::uint8_t*>(memory_) + misalignment * size_;
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() {
    cudaFree(memory_);
  }

  /// Writes values(i), rounded to the dtype, and keeps what that gives.
  template <class Values>
  void assign(Values&& values) {
    visit(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      std::vector<T> elements;
      for (std::size_t i = 0; i < values_.size(); ++i) {
        elements.push_back(Element<T>::from(values(static_cast<std::int64_t>(i))));
        values_[i] = lomem::to_compute(elements.back());
      }
      cudaMemcpy(data_, elements.data(), elements.size() * sizeof(T), cudaMemcpyHostToDevice);
    });
  }
  /// Reads what a kernel wrote.
  const std::vector<double>& read() {
    visit(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      std::vector<T> elements(values_.size());
      cudaMemcpy(elements.data(), data_, elements.size() * sizeof(T), cudaMemcpyDeviceToHost);
      for (std::size_t i = 0; i < values_.size(); ++i) {
        values_[i] = lomem::to_compute(elements[i]);
      }
    });
    return values_;
  }

  double operator[](std::int64_t i) const {
    return values_[i];
  }
  DType dtype() const {
    return dtype_;
  }
  void* data() const {
    return data_;
  }
  Array array() const {
    return {data_, dtype_};
  }
  MutableArray mutable_array() const {
    return {data_, dtype_};
  }

 private:
  DType dtype_;
  std::vector<double> values_;
  std::int64_t size_;
  void* memory_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

/// n bytes on the device, some bytes after an aligned address.
class Bytes {
 public:
  explicit Bytes(std::int64_t n, std::int64_t misalignment = 0) : misalignment_(misalignment), size_(n) {
    EXPECT_EQ(cudaMalloc(&memory_, n + misalignment + 1), cudaSuccess);
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() {
    cudaFree(memory_);
  }

  std::uint8_t* data() const {
    return static_cast<std::uint8_t*>(memory_) + misalignment_;
  }
  std::vector<std::uint8_t> read() const {
    std::vector<std::uint8_t> bytes(size_);
    cudaMemcpy(bytes.data(), data(), bytes.size(), cudaMemcpyDeviceToHost);
    return bytes;
  }

 private:
  std::int64_t misalignment_;
  std::int64_t size_;
  void* memory_ = nullptr;
};

constexpr DType dtypes[] = {DType::float64, DType::float32, DType::bfloat16, DType::float16};

DType pick_dtype(Random& random) {
  return dtypes[random.below(4)];
}

std::string name_of(DType dtype) {
  return std::string(
      dtype == DType::float64    ? "f64"
      : dtype == DType::float32  ? "f32"
      : dtype == DType::bfloat16 ? "bf16"
                                 : "f16");
}

// Activations ---------------------------------------------------------------------------------------------------------

/// Boundaries as the kernels compare: rounded to float32, but for float64.
double as_compared(DType dtype, double boundary) {
  return dtype == DType::float64 ? boundary : static_cast<double>(static_cast<float>(boundary));
}

std::vector<std::uint8_t> expected_codes(
    const DeviceArray& x, std::int64_t n, const std::vector<double>& boundaries, int bits) {
  std::vector<std::uint8_t> codes(n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (const double boundary : boundaries) {
      codes[i] += x[i] > as_compared(x.dtype(), boundary) ? 1 : 0;
    }
  }
  return oracle::pack(codes, bits);
}

std::int64_t pick_size(Random& random) {
  return random.one_in(3) ? random.below(40) : random.one_in(4) ? random.below(9000) : random.below(2100);
}

template <class Function>
void sweep_forward(Random& random) {
  using Steps = typename Function::PublishedSteps;
  const DType dtype = pick_dtype(random);
  const std::int64_t n = pick_size(random);
  DeviceArray x(dtype, n, random.one_in(3) ? random.below(8) : 0);
  DeviceArray y(dtype, n, random.one_in(3) ? random.below(8) : 0);
  Bytes codes(lomem::packed_bytes(n, Steps::bits), random.one_in(3) ? random.below(4) : 0);
  SCOPED_TRACE(name_of(dtype) + " " + std::to_string(n));
  x.assign([&](std::int64_t) { return random.normal(4); });
  ASSERT_EQ(step_forward<Function>(dtype, x.data(), n, y.data(), codes.data(), nullptr), cudaSuccess);
  y.read();
  for (std::int64_t i = 0; i < n; ++i) {
    const double want = Fused<Function>::definition(x[i]);
    // One rounding of the result, and of 1 + erf and the like a few in float32, which the size of x bounds.
    const double compute = dtype == DType::float64 ? std::ldexp(1, -52) : std::ldexp(1, -23);
    const double tolerance = spacing_at(dtype, want) + 8 * compute * std::fabs(x[i]);
    ASSERT_NEAR(y[i], want, tolerance) << "x = " << x[i];
  }
  const std::vector<double> boundaries = {Steps::boundary(0), Steps::boundary(1), Steps::boundary(2)};
  EXPECT_EQ(codes.read(), expected_codes(x, n, boundaries, Steps::bits));
}

void sweep_encode(Random& random) {
  const DType dtype = pick_dtype(random);
  const std::int64_t n = pick_size(random);
  const int bits = static_cast<int>(random.below(8)) + 1;
  const std::int64_t packed = lomem::packed_bytes(n, bits);
  SCOPED_TRACE(name_of(dtype) + " " + std::to_string(n) + ", bits " + std::to_string(bits));
  std::vector<double> boundaries;
  for (int k = 1; k < 1 << bits; ++k) {
    boundaries.push_back(random.normal(2));
  }
  std::sort(boundaries.begin(), boundaries.end());
  DeviceArray x(dtype, n, random.one_in(3) ? random.below(8) : 0);
  // Some elements are boundaries, which count as not above themselves.
  x.assign([&](std::int64_t) {
    return random.one_in(4) ? boundaries[random.below(static_cast<std::int64_t>(boundaries.size()))] : random.normal(2);
  });
  Bytes codes(packed, random.one_in(3) ? random.below(4) : 0);
  ASSERT_EQ(step_encode(dtype, x.data(), n, boundaries.data(), bits, codes.data(), nullptr), cudaSuccess);
  EXPECT_EQ(codes.read(), expected_codes(x, n, boundaries, bits));

  Bytes band(lomem::packed_bytes(n, 1), random.below(4));
  ASSERT_EQ(band_encode(dtype, x.data(), n, boundaries[0], boundaries.back(), band.data(), nullptr), cudaSuccess);
  std::vector<std::uint8_t> inside(n);
  for (std::int64_t i = 0; i < n; ++i) {
    inside[i] = as_compared(dtype, boundaries[0]) <= x[i] && x[i] <= as_compared(dtype, boundaries.back()) ? 1 : 0;
  }
  EXPECT_EQ(band.read(), oracle::pack(inside, 1));
}

void sweep_backward(Random& random) {
  const DType dtype = pick_dtype(random);
  const std::int64_t n = pick_size(random);
  const int bits = static_cast<int>(random.below(8)) + 1;
  const std::int64_t packed = lomem::packed_bytes(n, bits);
  SCOPED_TRACE(name_of(dtype) + " " + std::to_string(n) + ", bits " + std::to_string(bits));
  std::vector<double> levels;
  for (int k = 0; k < 1 << bits; ++k) {
    levels.push_back(random.normal());
  }
  std::vector<std::uint8_t> codes(n);
  for (std::uint8_t& code : codes) {
    code = static_cast<std::uint8_t>(random.below(1 << bits));
  }
  // Through the kernels for packing, and back.
  Bytes code_bytes(n, random.below(4));
  Bytes packed_bytes(packed, random.one_in(3) ? random.below(4) : 0);
  cudaMemcpy(code_bytes.data(), codes.data(), codes.size(), cudaMemcpyHostToDevice);
  ASSERT_EQ(pack_bits(code_bytes.data(), n, bits, packed_bytes.data(), nullptr), cudaSuccess);
  EXPECT_EQ(packed_bytes.read(), oracle::pack(codes, bits));
  Bytes unpacked(n, random.below(4));
  ASSERT_EQ(unpack_bits(packed_bytes.data(), n, bits, unpacked.data(), nullptr), cudaSuccess);
  EXPECT_EQ(unpacked.read(), codes);

  DeviceArray grad_output(dtype, n, random.one_in(3) ? random.below(8) : 0);
  DeviceArray grad_input(dtype, n, random.one_in(3) ? random.below(8) : 0);
  grad_output.assign([&](std::int64_t) { return random.normal(); });
  ASSERT_EQ(
      step_backward(dtype, grad_output.data(), packed_bytes.data(), levels.data(), bits, n, grad_input.data(), nullptr),
      cudaSuccess);
  grad_input.read();
  for (std::int64_t i = 0; i < n; ++i) {
    // The level is rounded to the type that computes, the product to it and to the dtype.
    const double want = grad_output[i] * as_compared(dtype, levels[codes[i]]);
    const double compute = dtype == DType::float64 ? std::ldexp(1, -53) : std::ldexp(1, -24);
    ASSERT_NEAR(grad_input[i], want, spacing_at(dtype, want) / 2 + compute * std::fabs(want)) << i;
  }
}

/// Products with a mask in memory, and with that of a seed.
void sweep_dropout(Random& random) {
  const DType dtype = pick_dtype(random);
  const std::int64_t n = pick_size(random);
  SCOPED_TRACE(name_of(dtype) + " " + std::to_string(n));
  const double scale = 1 + std::fabs(random.normal());
  const std::int64_t seed = random.below(1 << 30) * 0x123456789 - 12345;
  const auto bound = static_cast<std::uint32_t>(random.below(std::int64_t{1} << 32));
  std::vector<std::uint8_t> bits(n);
  for (std::uint8_t& bit : bits) {
    bit = static_cast<std::uint8_t>(random.below(2));
  }
  const std::vector<std::uint8_t> packed = oracle::pack(bits, 1);
  Bytes mask(static_cast<std::int64_t>(packed.size()), random.below(4));
  cudaMemcpy(mask.data(), packed.data(), packed.size(), cudaMemcpyHostToDevice);
  Bytes seed_bytes(sizeof(seed));
  cudaMemcpy(seed_bytes.data(), &seed, sizeof(seed), cudaMemcpyHostToDevice);
  DeviceArray x(dtype, n, random.one_in(3) ? random.below(8) : 0);
  x.assign([&](std::int64_t) { return random.normal(); });
  for (const bool seeded : {false, true}) {
    DeviceArray product(dtype, n, random.one_in(3) ? random.below(8) : 0);
    ASSERT_EQ(
        seeded ? seed_multiply(
                     dtype, x.data(), reinterpret_cast<const std::int64_t*>(seed_bytes.data()), bound, scale, n,
                     product.data(), nullptr)
               : mask_multiply(dtype, x.data(), mask.data(), scale, n, product.data(), nullptr),
        cudaSuccess);
    product.read();
    for (std::int64_t i = 0; i < n; ++i) {
      const bool kept =
          seeded ? lomem::philox_word(static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(i)) >= bound
                 : bits[i] != 0;
      // The scale is rounded to the type that computes, the product to it and to the dtype.
      const double want = kept ? x[i] * as_compared(dtype, scale) : 0;
      const double compute = dtype == DType::float64 ? std::ldexp(1, -53) : std::ldexp(1, -24);
      ASSERT_NEAR(product[i], want, kept ? spacing_at(dtype, want) / 2 + compute * std::fabs(want) : 0) << i;
    }
  }
}

/// Storage in groups, against the definition in double: scales that clip nothing and are as small as that, codes next
/// to the quotients, which those of nearest rounding are nearest to, and products.
void sweep_storage(Random& random) {
  const DType dtype = pick_dtype(random);
  const std::int64_t n = pick_size(random);
  const int bits = random.one_in(2) ? 8 : 4;
  const lomem::GroupFormat format{bits, 16 << random.below(7)};
  const bool stochastic = random.one_in(2);
  const bool dithered = stochastic && random.one_in(2);
  SCOPED_TRACE(
      name_of(dtype) + " " + std::to_string(n) + ", bits " + std::to_string(bits) + ", groups of " +
      std::to_string(format.group));
  const std::int64_t seed = random.below(1 << 30) * 0x123456789 - 12345;
  const auto offset = static_cast<std::uint64_t>(random.below(1 << 30)) << random.below(33);
  Bytes seed_bytes(sizeof(seed));
  cudaMemcpy(seed_bytes.data(), &seed, sizeof(seed), cudaMemcpyHostToDevice);
  DeviceArray x(dtype, n, random.one_in(3) ? random.below(8) : 0);
  x.assign([&](std::int64_t) { return random.normal(); });
  const std::int64_t groups = lomem::scale_count(n, format.group);
  Bytes codes(lomem::packed_bytes(n, bits), random.one_in(3) ? random.below(4) : 0);
  DeviceArray scales(DType::bfloat16, groups, random.below(2));
  DeviceArray y(dtype, n, random.one_in(3) ? random.below(8) : 0);
  const auto* device_seed = reinterpret_cast<const std::int64_t*>(seed_bytes.data());
  ASSERT_EQ(
      group_encode(
          dtype, x.data(), n, format, stochastic ? device_seed : nullptr, offset, codes.data(),
          static_cast<lomem::bfloat16*>(scales.data()), nullptr),
      cudaSuccess);
  ASSERT_EQ(
      group_decode(
          dtype, codes.data(), static_cast<const lomem::bfloat16*>(scales.data()), n, format,
          dithered ? device_seed : nullptr, offset, y.data(), nullptr),
      cudaSuccess);
  scales.read();
  y.read();
  const std::vector<std::uint8_t> bytes = codes.read();
  const double q = bits == 8 ? 127 : 7;
  for (std::int64_t begin = 0; begin < n; begin += format.group) {
    const double scale = scales[begin / format.group];
    double largest = 0;
    for (std::int64_t i = begin; i < std::min<std::int64_t>(begin + format.group, n); ++i) {
      largest = std::max(largest, std::fabs(x[i]));
    }
    // (As float32, of a double.)
    ASSERT_GE(scale * q, largest * (1 - std::ldexp(1, -24)));
    ASSERT_LE(scale * q, largest * (1 + std::ldexp(1, -7)));
    for (std::int64_t i = begin; i < std::min<std::int64_t>(begin + format.group, n); ++i) {
      const int code = lomem::code_of_bits(bytes[i * bits / 8] >> (i * bits % 8), bits);
      const double quotient = scale == 0 ? 0 : x[i] / scale;
      // Two roundings of the quotient in float32, and one of a double.
      const double rounding = std::ldexp(std::fabs(quotient), -22);
      ASSERT_LE(std::fabs(code - quotient), (stochastic ? 1 : 0.5) + rounding) << i;
      const auto block =
          lomem::philox_block<7>(static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(i) / 8, offset);
      const double u = (lomem::random_of(block, static_cast<int>(i % 8)) + 0.5) / 65536;
      const double value = (code + (dithered ? u - 0.5 : 0)) * scale;
      // With dither, the product has more digits than float32.
      const double single = dithered ? std::ldexp(std::fabs(value), -24) : 0;
      ASSERT_NEAR(y[i], value, spacing_at(dtype, value) / 2 + single) << i;
      if (dithered) {
        ASSERT_LE(std::fabs(value / (scale == 0 ? 1 : scale) - quotient), 0.5 + rounding) << i;
      }
      if (stochastic) {
        const double fraction = quotient - std::floor(quotient);
        if (std::fabs(fraction - u) > 2 * rounding && std::fabs(fraction - 0.5) < 0.5 - 2 * rounding) {
          ASSERT_EQ(code, std::floor(quotient) + (fraction > u ? 1 : 0)) << i;
        }
      }
    }
  }
}

/// Codes drawn at random, and gradients from them, against the definition in double.
void sweep_drawn(Random& random) {
  const DType dtype = pick_dtype(random);
  const std::int64_t n = pick_size(random);
  const int bits = static_cast<int>(random.below(8)) + 1;
  const drawn::Case of = drawn::cases()[random.below(4)];
  SCOPED_TRACE(name_of(dtype) + " " + std::to_string(n) + ", bits " + std::to_string(bits) + ", " + of.name);
  const std::int64_t seed = random.below(1 << 30) * 0x123456789 - 12345;
  const auto offset = static_cast<std::uint64_t>(random.below(1 << 30)) << random.below(33);
  Bytes seed_bytes(sizeof(seed));
  cudaMemcpy(seed_bytes.data(), &seed, sizeof(seed), cudaMemcpyHostToDevice);
  const auto* device_seed = reinterpret_cast<const std::int64_t*>(seed_bytes.data());
  DeviceArray x(dtype, n, random.one_in(3) ? random.below(8) : 0);
  const std::vector<double> places = drawn::places(of);
  x.assign([&](std::int64_t) {
    return random.one_in(4) ? places[random.below(static_cast<std::int64_t>(places.size()))] : random.normal(3);
  });
  DeviceArray grad_output(dtype, n, random.one_in(3) ? random.below(8) : 0);
  grad_output.assign([&](std::int64_t) { return random.normal(); });
  DeviceArray grad_input(dtype, n, random.one_in(3) ? random.below(8) : 0);
  Bytes codes(lomem::packed_bytes(n, bits), random.one_in(3) ? random.below(8) : 0);
  const int q = (1 << bits) - 1;
  const lomem::DrawnLevels<double> levels{random.normal(), random.normal() / q};
  ASSERT_EQ(drawn_encode(dtype, of.table, x.data(), n, bits, device_seed, offset, codes.data(), nullptr), cudaSuccess);
  ASSERT_EQ(
      drawn_backward(
          dtype, grad_output.data(), codes.data(), levels, bits, n, device_seed, offset, grad_input.data(), nullptr),
      cudaSuccess);
  grad_input.read();
  const std::vector<std::uint8_t> bytes = codes.read();
  std::vector<std::uint8_t> unpacked;
  for (std::int64_t i = 0; i < n; ++i) {
    const int code = drawn::unpack(bytes, i, bits);
    unpacked.push_back(static_cast<std::uint8_t>(code));
    const double place = code + (drawn::random_bits({static_cast<std::uint64_t>(seed), offset}, i) + 0.5) / 65536 - 0.5;
    // t is rounded to a multiple of 2^-16; from 2^22 * 2^-16 on, in two steps.
    ASSERT_LE(std::fabs(place - q * drawn::value(of, x[i])), 0.5 + q * drawn::tolerance + 0x1p-16) << x[i];
    // Low and step are rounded, code and dither (to float32), their product with the step, the sum, and the gradient.
    const double level = levels.low + levels.step * place;
    const double compute = dtype == DType::float64 ? std::ldexp(1, -53) : std::ldexp(1, -24);
    const double near = 4 * compute * (std::fabs(levels.low) + std::fabs(levels.step * place)) +
                        std::ldexp(std::fabs(levels.step), -17);
    const double want = grad_output[i] * level;
    ASSERT_NEAR(grad_input[i], want, spacing_at(dtype, want) / 2 + 2 * near * std::fabs(grad_output[i])) << i;
  }
  // Bits behind the last code are 0.
  EXPECT_EQ(bytes, oracle::pack(unpacked, bits));
}

/// A gated unit whose operands are apart, halves or pairs, of rows that are some elements apart.
void sweep_gated(Random& random) {
  const DType dtype = pick_dtype(random);
  const lomem::GatedActivation activation = gates[random.below(5)];
  const Operands form = all_operands[random.below(3)];
  const std::int64_t unit = 16 / static_cast<std::int64_t>(lomem::element_size(dtype));
  const std::int64_t cols = random.one_in(2) ? random.below(70) : unit * random.below(40);
  const std::int64_t rows = random.one_in(3) ? 1 : random.below(1 + 2000 / (cols + 1));
  const std::int64_t n = rows * cols;
  const auto misaligned = [&] { return random.one_in(4) ? random.below(8) : 0; };
  DeviceArray both(dtype, 2 * n, misaligned());
  DeviceArray grad(dtype, n, misaligned());
  DeviceArray y(dtype, n, misaligned());
  DeviceArray again(dtype, n, misaligned());
  DeviceArray gradients(dtype, 2 * n, misaligned());
  SCOPED_TRACE(
      name_of(dtype) + " " + std::to_string(rows) + " x " + std::to_string(cols) + ", activation " +
      std::to_string(static_cast<int>(activation)) + ", form " + std::to_string(static_cast<int>(form)));
  both.assign([&](std::int64_t) { return random.normal(2); });
  grad.assign([&](std::int64_t) { return random.normal(); });
  visit(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto operands = operands_in(form, activation, static_cast<const T*>(both.data()), rows, cols);
    ASSERT_EQ(gated_forward(operands, y.data(), nullptr), cudaSuccess);
    auto targets = gradients_in(form, static_cast<T*>(gradients.data()), rows, cols, static_cast<T*>(again.data()));
    ASSERT_EQ(gated_backward(operands, grad.data(), targets, nullptr), cudaSuccess);
    y.read();
    again.read();
    gradients.read();
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at_gate = operand_index(form, 0, i / cols, i % cols, rows, cols);
      const std::int64_t at_up = operand_index(form, 1, i / cols, i % cols, rows, cols);
      const auto [want, tolerance] = expected_result<T>(activation, both[at_gate], both[at_up]);
      ASSERT_NEAR(y[i], want, tolerance) << both[at_gate] << ", " << both[at_up];
      ASSERT_EQ(y[i], again[i]);
      const auto expected = expected_gradient<T>(activation, grad[i], both[at_gate], both[at_up]);
      ASSERT_NEAR(gradients[at_gate], expected.of_gate, expected.gate_tolerance) << both[at_gate];
      ASSERT_NEAR(gradients[at_up], expected.of_up, expected.up_tolerance) << both[at_gate];
    }
    if constexpr (sizeof(T) == 2) {
      // The activation is rounded before the product: nearly all results are what two roundings give. (Where it is
      // negative, differences lose more digits than the rounding hides.)
      std::int64_t others = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const double gate = both[operand_index(form, 0, i / cols, i % cols, rows, cols)];
        const double up = both[operand_index(form, 1, i / cols, i % cols, rows, cols)];
        const double value = lomem::to_compute(Element<T>::from(gate_definition(activation, gate).value));
        others += gate > 0 && y[i] != lomem::to_compute(Element<T>::from(value * up)) ? 1 : 0;
      }
      EXPECT_NEAR(static_cast<double>(others), 0, static_cast<double>(3 + n / 100));
    }
    // What is not asked for is not written.
    const std::int64_t left_out = random.below(3);
    (left_out == 0 ? targets.gate : left_out == 1 ? targets.up : targets.output) = nullptr;
    gradients.assign([](std::int64_t) { return 77.0; });
    again.assign([](std::int64_t) { return 77.0; });
    ASSERT_EQ(gated_backward(operands, grad.data(), targets, nullptr), cudaSuccess);
    gradients.read();
    again.read();
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at_up = operand_index(form, 1, i / cols, i % cols, rows, cols);
      const bool writes_up = form == Operands::pairs ? left_out != 0 : left_out != 1;
      ASSERT_EQ(again[i], left_out == 2 ? 77.0 : y[i]);
      ASSERT_EQ(gradients[at_up] == 77.0, !writes_up);
    }
  });
}

TEST(Sweep, Gated) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(3000 + k);
    sweep_gated(random);
  }
}

TEST(Sweep, Dropout) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(4000 + k);
    sweep_dropout(random);
  }
}

TEST(Sweep, Storage) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(5000 + k);
    sweep_storage(random);
  }
}

TEST(Sweep, Drawn) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(6000 + k);
    sweep_drawn(random);
  }
}

TEST(Sweep, Activations) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(k);
    FusedFunctions::for_each([&](auto function) {
      SCOPED_TRACE(Fused<typename decltype(function)::type>::name);
      sweep_forward<typename decltype(function)::type>(random);
    });
    sweep_encode(random);
    sweep_backward(random);
  }
}

// Norms ---------------------------------------------------------------------------------------------------------------

struct NormCase {
  std::int64_t rows;
  std::int64_t cols;
  bool weight;
  bool bias;
  bool mixed;  // every array has a dtype of its own
};

std::int64_t pick_cols(Random& random, int k) {
  // Around the sizes at which another kernel is chosen.
  static const std::int64_t edges[] = {0,    1,    2,    3,     7,     8,     9,     31,    32,    33,
                                       64,   65,   255,  256,   257,   264,   504,   512,   513,   520,
                                       768,  1000, 1024, 1025,  1032,  2048,  2056,  4096,  4104,  8184,
                                       8192, 8193, 8200, 12288, 16376, 16384, 16385, 16392, 20000, 24576};
  constexpr int count = sizeof(edges) / sizeof(edges[0]);
  return k % 2 == 0 ? edges[k / 2 % count] : random.one_in(4) ? random.below(3000) : 8 * random.below(300);
}

template <Norm norm>
void sweep_norm(Random& random, int k) {
  constexpr bool centred = norm == Norm::layer;
  NormCase c{};
  c.cols = pick_cols(random, k);
  c.rows = c.cols > 4096 ? random.below(4) : c.cols > 600 ? random.below(14) : random.below(70);
  c.weight = random.one_in(2);
  c.bias = centred && random.one_in(2);
  c.mixed = random.one_in(2);
  const DType base = random.one_in(6) ? DType::float64 : dtypes[1 + random.below(3)];
  const auto dtype = [&] {
    if (!c.mixed) {
      return base;
    }
    return random.one_in(8) ? DType::float64 : dtypes[1 + random.below(3)];
  };
  const auto misaligned = [&] { return random.one_in(8) ? 1 : 0; };
  const std::int64_t n = c.rows * c.cols;

  DeviceArray x(dtype(), n, misaligned());
  DeviceArray z(dtype(), n, misaligned());
  DeviceArray weight(random.one_in(2) ? dtype() : DType::float32, c.cols, misaligned());
  DeviceArray bias(random.one_in(2) ? dtype() : DType::float32, c.cols, misaligned());
  DeviceArray rstd(random.one_in(2) || base == DType::float64 ? DType::float64 : DType::float32, c.rows);
  x.assign([&](std::int64_t) { return 0.3 + random.normal(1.5); });
  weight.assign(
      [&](std::int64_t) { return (random.one_in(2) ? 1 : -1) * (0.5 + static_cast<double>(random.below(8)) / 8); });
  bias.assign([&](std::int64_t) { return static_cast<double>(random.below(5)) / 4 - 0.5; });

  lomem::NormForward forward;
  forward.input = x.array();
  forward.output = z.mutable_array();
  forward.rstd = rstd.mutable_array();
  forward.cols = c.cols;
  forward.eps = random.one_in(2) ? 1e-5 : 1e-2;
  if (c.weight) {
    forward.weight = weight.array();
  }
  if (c.bias) {
    forward.bias = bias.array();
  }
  const auto describe = [&](const NormPlan& plan) {
    return std::string(centred ? "layer" : "rms") + " norm " + std::to_string(c.rows) + " x " + std::to_string(c.cols) +
           ", input " + name_of(x.dtype()) + ", output " + name_of(z.dtype()) +
           (c.weight ? ", weight " + name_of(weight.dtype()) : "") + (c.bias ? ", bias " + name_of(bias.dtype()) : "") +
           ", rstd " + name_of(rstd.dtype()) + ", width " + std::to_string(plan.width) + ", elements " +
           std::to_string(plan.elements) + ", threads " + std::to_string(plan.threads);
  };
  const auto gamma = [&](std::int64_t j) { return c.weight ? weight[j] : 1.0; };
  const auto beta = [&](std::int64_t j) { return c.bias ? bias[j] : 0.0; };
  const auto rounding = [](bool in_double) { return std::ldexp(1, in_double ? -52 : -23); };
  {
    const NormPlan plan = plan_forward(forward);
    SCOPED_TRACE(describe(plan));
    ASSERT_EQ(norm_forward<norm>(forward, c.rows, nullptr), cudaSuccess);
    z.read();
    rstd.read();
    const double unit = rounding(plan.in_double);
    for (std::int64_t r = 0; r < c.rows && c.cols > 0; ++r) {
      long double mean = 0;
      long double moment = 0;
      for (std::int64_t j = 0; j < c.cols && centred; ++j) {
        mean += x[r * c.cols + j] / static_cast<long double>(c.cols);
      }
      for (std::int64_t j = 0; j < c.cols; ++j) {
        const long double d = x[r * c.cols + j] - mean;
        moment += d * d / static_cast<long double>(c.cols);
      }
      const auto want_rstd = static_cast<double>(1 / std::sqrt(moment + forward.eps));
      // A sum of squares (each term positive), a division and a root: a few roundings.
      ASSERT_NEAR(
          rstd[r], want_rstd, 16 * std::max(unit, rstd.dtype() == DType::float32 ? rounding(false) : 0) * want_rstd);
      for (std::int64_t j = 0; j < c.cols; ++j) {
        const auto y = static_cast<double>((x[r * c.cols + j] - mean) * want_rstd);
        const double want = y * gamma(j) + beta(j);
        // Roundings of y, of the mean relative to the spread, and of the affine part; then one of the result.
        const double size =
            std::fabs(gamma(j)) * (std::fabs(y) + std::fabs(static_cast<double>(mean)) * want_rstd + 1) +
            std::fabs(beta(j));
        ASSERT_NEAR(z[r * c.cols + j], want, spacing_at(z.dtype(), want) + 8 * unit * size) << r << ", " << j;
      }
    }
  }

  DeviceArray grad_output(dtype(), n, misaligned());
  DeviceArray grad_input(dtype(), n, misaligned());
  DeviceArray grad_weight(c.mixed ? dtype() : weight.dtype(), c.cols, misaligned());
  DeviceArray grad_bias(c.mixed ? dtype() : bias.dtype(), c.cols, misaligned());
  grad_output.assign([&](std::int64_t) { return random.normal(); });
  lomem::NormBackward backward;
  backward.grad_output = grad_output.array();
  backward.output = z.array();
  backward.rstd = rstd.array();
  backward.weight = forward.weight;
  backward.bias = forward.bias;
  backward.cols = c.cols;
  const bool needs_input = !random.one_in(5);
  if (needs_input) {
    backward.grad_input = grad_input.mutable_array();
  }
  NormParameterGradients parameters;
  if (c.weight && !random.one_in(6)) {
    parameters.grad_weight = grad_weight.mutable_array();
  }
  if (c.bias && !random.one_in(6)) {
    parameters.grad_bias = grad_bias.mutable_array();
  }
  const std::int64_t workspace_bytes = norm_backward_workspace(backward, c.rows, parameters);
  Bytes workspace(workspace_bytes);
  parameters.workspace = workspace.data();
  const NormPlan plan = plan_backward(backward, parameters.needed());
  SCOPED_TRACE(
      describe(plan) + ", backward, gradients " + name_of(grad_output.dtype()) + " to " + name_of(grad_input.dtype()) +
      (needs_input ? "" : " (not needed)") + (parameters.needed() ? ", of parameters" : ""));
  ASSERT_EQ(norm_backward<norm>(backward, c.rows, parameters, nullptr), cudaSuccess);
  if (needs_input) {
    grad_input.read();
  }
  const double unit = rounding(plan.in_double);
  std::vector<double> want_weight(c.cols), want_bias(c.cols), size_weight(c.cols), size_bias(c.cols);
  for (std::int64_t r = 0; r < c.rows && c.cols > 0; ++r) {
    std::vector<double> y(c.cols), g(c.cols);
    long double mean_g = 0;
    long double mean_gy = 0;
    for (std::int64_t j = 0; j < c.cols; ++j) {
      const double grad = grad_output[r * c.cols + j];
      y[j] = (z[r * c.cols + j] - beta(j)) / gamma(j);
      g[j] = grad * gamma(j);
      mean_g += centred ? g[j] / static_cast<long double>(c.cols) : 0;
      mean_gy += static_cast<long double>(g[j]) * y[j] / static_cast<long double>(c.cols);
      want_weight[j] += grad * y[j];
      size_weight[j] += std::fabs(grad) * (std::fabs(y[j]) + std::fabs(beta(j) / gamma(j)));
      want_bias[j] += grad;
      size_bias[j] += std::fabs(grad);
    }
    for (std::int64_t j = 0; j < c.cols && needs_input; ++j) {
      const auto want = static_cast<double>(rstd[r] * (g[j] - mean_g - y[j] * mean_gy));
      // Roundings of the recovered y (which the bias makes larger), of the means and of the three terms.
      const double size = rstd[r] * (std::fabs(g[j]) + 2 +
                                     (std::fabs(y[j]) + 1 + std::fabs(beta(j) / gamma(j))) *
                                         (2 + std::fabs(static_cast<double>(mean_gy))));
      ASSERT_NEAR(grad_input[r * c.cols + j], want, spacing_at(grad_input.dtype(), want) + 16 * unit * size)
          << r << ", " << j;
    }
  }
  // Sums over rows, compensated: roundings of the terms, and one of the result.
  const auto check_sums = [&](const MutableArray& needed, DeviceArray& got, const auto& want, const auto& size) {
    if (needed.data == nullptr) {
      return;
    }
    got.read();
    for (std::int64_t j = 0; j < c.cols; ++j) {
      ASSERT_NEAR(got[j], want[j], spacing_at(got.dtype(), want[j]) + 8 * unit * (size[j] + 1)) << j;
    }
  };
  check_sums(parameters.grad_weight, grad_weight, want_weight, size_weight);
  check_sums(parameters.grad_bias, grad_bias, want_bias, size_bias);
}

TEST(Sweep, LayerNorms) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(1000 + k);
    sweep_norm<Norm::layer>(random, k);
  }
}

TEST(Sweep, RMSNorms) {
  for (int k = 0; k < number_of_cases(); ++k) {
    Random random(2000 + k);
    sweep_norm<Norm::rms>(random, k);
  }
}

}  // namespace
