// The CUDA kernels on a device, through their launchers: the same bytes as their bodies give on the
// CPU (which bodies_test.cpp compares with the definitions), on side streams, in graphs, with
// misaligned bases and sentinels, on every device. No torch.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>
#include <lomem/cuda/dropout.cuh>
#include <lomem/cuda/gated.cuh>
#include <lomem/cuda/packing.cuh>
#include <lomem/cuda/step.cuh>
#include <lomem/cuda/storage.cuh>

#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "../core/elements.h"
#include "../core/fused_functions.h"
#include "../core/gates.h"
#include "device.h"

namespace {

using lomem::DType;
using namespace lomem::cuda;

template <class Function, class T>
void check_forward() {
  using Step = typename Function::PublishedSteps;
  for (const std::int64_t n : sizes()) {
    for (int misaligned = -1; misaligned < 3; ++misaligned) {
      const auto values = random_elements<T>(n, 4, static_cast<unsigned>(n));
      DeviceBuffer<T> x(n, misaligned == 0 ? 1 : 0);
      x.assign(values);
      DeviceBuffer<T> y(n, misaligned == 1 ? 1 : 0);
      DeviceBuffer<std::uint8_t> codes(lomem::packed_bytes(n, Step::bits), misaligned == 2 ? 1 : 0);
      std::vector<T> host_y(n);
      std::vector<std::uint8_t> host_codes(lomem::packed_bytes(n, Step::bits));
      const StepForward<Function, Step, T> body(values.data(), n, host_y.data(), host_codes.data());
      execute_on_host(body);
      on_all_streams(
          [&](cudaStream_t stream) {
            return step_forward<Function>(Element<T>::dtype, x.data(), n, y.data(), codes.data(), stream);
          },
          [&] {
            y.poison();
            codes.poison();
          },
          [&] {
            EXPECT_EQ(codes.values(), host_codes) << n;
            const auto got = y.values();
            for (std::int64_t i = 0; i < n; ++i) {
              // Host and device evaluate erf, tanh and exp by other formulas, each within a few
              // roundings; 1 + erf loses digits that the size of x bounds.
              const double input = std::fabs(static_cast<double>(lomem::to_compute(values[i])));
              const double want = lomem::to_compute(host_y[i]);
              const double tolerance = 2 * spacing<T>() * std::fabs(want) + 8 * spacing<lomem::compute_t<T>>() * input +
                                       (sizeof(T) == 2 ? std::ldexp(1, -23) : 0);
              ASSERT_NEAR(lomem::to_compute(got[i]), want, tolerance) << i << " of " << n;
            }
          });
    }
  }
}

template <class T>
void check_forwards() {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check_forward<Function, T>();
  });
}

/// Elements that differ by no more than what the library functions of host and device do, each within a few roundings;
/// what is multiplied by these is as large as `scale`.
template <class T>
void expect_nearly_same(const std::vector<T>& got, const std::vector<T>& want, double scale) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double value = lomem::to_compute(want[i]);
    const double tolerance = 2 * spacing<T>() * std::fabs(value) + 16 * spacing<lomem::compute_t<T>>() * scale +
                             (sizeof(T) == 2 ? std::ldexp(1, -23) * scale : 0);
    ASSERT_NEAR(lomem::to_compute(got[i]), value, tolerance) << i << " of " << want.size();
  }
}

template <class T>
void check_gated(
    Operands form, lomem::GatedActivation activation, std::int64_t rows, std::int64_t cols, int misaligned) {
  const std::int64_t n = rows * cols;
  const auto both = random_elements<T>(2 * n, 2, static_cast<unsigned>(n));
  const auto grad = random_elements<T>(n, 1, static_cast<unsigned>(n + 1));
  DeviceBuffer<T> x(2 * n, misaligned == 0 ? 1 : 0);
  x.assign(both);
  DeviceBuffer<T> g(n, misaligned == 1 ? 1 : 0);
  g.assign(grad);
  DeviceBuffer<T> y(n, misaligned == 2 ? 1 : 0);
  DeviceBuffer<T> again(n, misaligned == 2 ? 1 : 0);
  DeviceBuffer<T> gradients(2 * n, misaligned == 3 ? 1 : 0);
  std::vector<T> host_y(n), host_again(n), host_gradients(2 * n);
  const auto on_host = operands_in(form, activation, both.data(), rows, cols);
  gated_forward_by(on_host, host_y.data(), [](const auto& body) { execute_on_host(body); });
  gated_backward_by(
      on_host, grad.data(), gradients_in(form, host_gradients.data(), rows, cols, host_again.data()),
      [](const auto& body) { execute_on_host(body); });
  const auto on_device = operands_in(form, activation, static_cast<const T*>(x.data()), rows, cols);
  on_all_streams(
      [&](cudaStream_t stream) {
        const cudaError_t error = gated_forward(on_device, y.data(), stream);
        return error != cudaSuccess
                   ? error
                   : gated_backward(
                         on_device, g.data(), gradients_in(form, gradients.data(), rows, cols, again.data()), stream);
      },
      [&] {
        y.poison();
        again.poison();
        gradients.poison();
      },
      [&] {
        EXPECT_EQ(bytes_of(y.values()), bytes_of(again.values()));
        expect_nearly_same(y.values(), host_y, 64);
        expect_nearly_same(gradients.values(), host_gradients, 64);
      });
}

template <class T>
void check_dropout() {
  for (const std::int64_t n : sizes()) {
    for (int misaligned = -1; misaligned < 3; ++misaligned) {
      const auto values = random_elements<T>(n, 2, static_cast<unsigned>(n));
      std::vector<std::uint8_t> bits(lomem::packed_bytes(n, 1));
      for (std::size_t i = 0; i < bits.size(); ++i) {
        bits[i] = static_cast<std::uint8_t>(i * 151 + 7);
      }
      const std::vector<std::int64_t> seed = {0x123456789abcdef};
      DeviceBuffer<T> x(n, misaligned == 0 ? 1 : 0);
      x.assign(values);
      DeviceBuffer<std::uint8_t> mask(bits.size(), misaligned == 1 ? 1 : 0);
      mask.assign(bits);
      DeviceBuffer<std::int64_t> device_seed(1);
      device_seed.assign(seed);
      DeviceBuffer<T> masked(n, misaligned == 2 ? 1 : 0);
      DeviceBuffer<T> seeded(n, misaligned == 2 ? 1 : 0);
      std::vector<T> want_masked(n), want_seeded(n);
      const double scale = 1 / 0.7;
      const std::uint32_t bound = lomem::dropout_bound(0.3);
      execute_on_host(MaskedMultiply(values.data(), StoredMask{bits.data()}, scale, n, want_masked.data()));
      execute_on_host(MaskedMultiply(values.data(), SeededMask{seed.data(), bound}, scale, n, want_seeded.data()));
      on_all_streams(
          [&](cudaStream_t stream) {
            const cudaError_t error =
                mask_multiply(Element<T>::dtype, x.data(), mask.data(), scale, n, masked.data(), stream);
            return error != cudaSuccess
                       ? error
                       : seed_multiply(
                             Element<T>::dtype, x.data(), device_seed.data(), bound, scale, n, seeded.data(), stream);
          },
          [&] {
            masked.poison();
            seeded.poison();
          },
          [&] {
            EXPECT_EQ(bytes_of(masked.values()), bytes_of(want_masked)) << n;
            EXPECT_EQ(bytes_of(seeded.values()), bytes_of(want_seeded)) << n;
          });
    }
  }
}

TEST_F(EveryDevice, Dropout) {
  on_every_device([] {
    check_dropout<double>();
    check_dropout<float>();
    check_dropout<lomem::bfloat16>();
    check_dropout<lomem::float16>();
  });
}

template <class T>
void check_storage(int bits, int group, bool stochastic, std::int64_t n, int misaligned) {
  const lomem::GroupFormat format{bits, group};
  const auto values = random_elements<T>(n, 2, static_cast<unsigned>(n));
  const std::int64_t seed = 0x123456789abcdef;
  constexpr std::uint64_t offset = 0x987654321;
  std::vector<std::uint8_t> want(lomem::packed_bytes(n, bits));
  std::vector<lomem::bfloat16> want_scales(lomem::scale_count(n, group));
  std::vector<T> want_values(n);
  const auto on_host = [](const auto& body) {
    execute_on_host(body);
    return cudaSuccess;
  };
  group_encode_by(
      Element<T>::dtype, values.data(), n, format, stochastic ? &seed : nullptr, offset, want.data(),
      want_scales.data(), on_host);
  group_decode_by(
      Element<T>::dtype, want.data(), want_scales.data(), n, format, stochastic ? &seed : nullptr, offset,
      want_values.data(), on_host);
  DeviceBuffer<T> x(n, misaligned == 0 ? 1 : 0);
  x.assign(values);
  DeviceBuffer<std::int64_t> device_seed(1);
  device_seed.assign({seed});
  DeviceBuffer<std::uint8_t> codes(want.size(), misaligned == 1 ? 1 : 0);
  DeviceBuffer<lomem::bfloat16> scales(want_scales.size(), 0);
  DeviceBuffer<T> y(n, misaligned == 2 ? 1 : 0);
  on_all_streams(
      [&](cudaStream_t stream) {
        const cudaError_t error = group_encode(
            Element<T>::dtype, x.data(), n, format, stochastic ? device_seed.data() : nullptr, offset, codes.data(),
            scales.data(), stream);
        return error != cudaSuccess ? error
                                    : group_decode(
                                          Element<T>::dtype, codes.data(), scales.data(), n, format,
                                          stochastic ? device_seed.data() : nullptr, offset, y.data(), stream);
      },
      [&] {
        codes.poison();
        scales.poison();
        y.poison();
      },
      [&] {
        EXPECT_EQ(codes.values(), want) << n;
        EXPECT_EQ(bytes_of(scales.values()), bytes_of(want_scales)) << n;
        EXPECT_EQ(bytes_of(y.values()), bytes_of(want_values)) << n;
      });
}

TEST_F(EveryDevice, Storage) {
  on_every_device([] {
    int number = 0;
    for (const std::int64_t n : sizes()) {
      for (const int group : {16, 128, 1024}) {
        for (int kind = 0; kind < 4; ++kind) {
          SCOPED_TRACE(std::to_string(n) + " in groups of " + std::to_string(group));
          const int misaligned = number++ % 4 - 1;
          check_storage<double>(kind % 2 == 0 ? 8 : 4, group, kind < 2, n, misaligned);
          check_storage<float>(kind % 2 == 0 ? 8 : 4, group, kind < 2, n, misaligned);
          check_storage<lomem::bfloat16>(kind % 2 == 0 ? 8 : 4, group, kind < 2, n, misaligned);
          check_storage<lomem::float16>(kind % 2 == 0 ? 8 : 4, group, kind < 2, n, misaligned);
        }
      }
    }
  });
}

TEST_F(EveryDevice, Gated) {
  on_every_device([] {
    int number = 0;
    for (const auto& [rows, cols] :
         {std::pair<std::int64_t, std::int64_t>{0, 0},
          {1, 1},
          {1, 37},
          {1, 4095},
          {1, 8200},
          {3, 40},
          {5, 33},
          {300, 16},
          {7, 1024}}) {
      for (const Operands form : all_operands) {
        for (const lomem::GatedActivation activation : gates) {
          SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(cols) + ", number " + std::to_string(number));
          const int misaligned = number++ % 5 - 1;
          check_gated<double>(form, activation, rows, cols, misaligned);
          check_gated<float>(form, activation, rows, cols, misaligned);
          check_gated<lomem::bfloat16>(form, activation, rows, cols, misaligned);
          check_gated<lomem::float16>(form, activation, rows, cols, misaligned);
        }
      }
    }
  });
}

TEST_F(EveryDevice, StepForward) {
  on_every_device([] {
    check_forwards<double>();
    check_forwards<float>();
    check_forwards<lomem::bfloat16>();
    check_forwards<lomem::float16>();
  });
}

/// Codes of every 16-bit pattern: the device compares two at a time.
template <class T, class Function>
void check_all_patterns() {
  using Step = typename Function::PublishedSteps;
  constexpr std::int64_t n = 0x10000;
  std::vector<T> values(n);
  std::vector<std::uint8_t> want(lomem::packed_bytes(n, Step::bits));
  for (std::int64_t i = 0; i < n; ++i) {
    values[i].bits = static_cast<std::uint16_t>(i);
  }
  lomem::step_encode<Step>(values.data(), n, want.data());
  DeviceBuffer<T> x(n);
  x.assign(values);
  DeviceBuffer<T> y(n);
  DeviceBuffer<std::uint8_t> codes(want.size());
  check(step_forward<Function>(Element<T>::dtype, x.data(), n, y.data(), codes.data(), nullptr));
  EXPECT_EQ(codes.values(), want);
}

TEST_F(EveryDevice, CodesOfAllSixteenBitPatterns) {
  on_every_device([] {
    FusedFunctions::for_each([](auto function) {
      using Function = typename decltype(function)::type;
      SCOPED_TRACE(Fused<Function>::name);
      check_all_patterns<lomem::bfloat16, Function>();
      check_all_patterns<lomem::float16, Function>();
    });
  });
}

/// Codes of run-time boundaries, and of a band, against the core's on the host; NaN and infinities among the inputs.
template <class T>
void check_encode() {
  using C = lomem::compute_t<T>;
  for (int bits = 1; bits <= 8; ++bits) {
    std::vector<double> boundaries((std::size_t{1} << bits) - 1);
    for (std::size_t i = 0; i < boundaries.size(); ++i) {
      boundaries[i] = 6.0 * static_cast<double>(i + 1) / static_cast<double>(boundaries.size() + 1) - 2.9;
    }
    const std::vector<C> rounded(boundaries.begin(), boundaries.end());
    for (const std::int64_t n : sizes()) {
      auto values = random_elements<T>(n, 3, static_cast<unsigned>(n));
      if (n > 3) {
        values[1] = Element<T>::from(std::nan(""));
        values[2] = Element<T>::from(HUGE_VAL);
      }
      std::vector<std::uint8_t> want(lomem::packed_bytes(n, bits));
      std::vector<std::uint8_t> want_band(lomem::packed_bytes(n, 1));
      lomem::visit_bits(bits, [&](auto width) {
        lomem::step_search_encode<decltype(width)::value>(values.data(), n, rounded.data(), want.data());
      });
      lomem::band_encode(values.data(), n, C(-1.5), C(2), want_band.data());
      for (int misaligned = -1; misaligned < 2; ++misaligned) {
        DeviceBuffer<T> x(n, misaligned == 0 ? 1 : 0);
        x.assign(values);
        DeviceBuffer<std::uint8_t> codes(want.size(), misaligned == 1 ? 1 : 0);
        DeviceBuffer<std::uint8_t> band(want_band.size(), misaligned == 1 ? 1 : 0);
        on_all_streams(
            [&](cudaStream_t stream) {
              const cudaError_t error =
                  step_encode(Element<T>::dtype, x.data(), n, boundaries.data(), bits, codes.data(), stream);
              return error != cudaSuccess ? error
                                          : band_encode(Element<T>::dtype, x.data(), n, -1.5, 2, band.data(), stream);
            },
            [&] {
              codes.poison();
              band.poison();
            },
            [&] {
              EXPECT_EQ(codes.values(), want) << bits << " bits, " << n;
              EXPECT_EQ(band.values(), want_band) << n;
            });
      }
    }
  }
}

TEST_F(EveryDevice, StepEncode) {
  on_every_device([] {
    check_encode<double>();
    check_encode<float>();
    check_encode<lomem::bfloat16>();
    check_encode<lomem::float16>();
  });
}

template <class T>
void check_backward() {
  for (int bits = 1; bits <= 8; ++bits) {
    std::vector<double> levels(std::size_t{1} << bits);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      levels[i] = std::sin(static_cast<double>(i) + 0.1);
    }
    for (const std::int64_t n : sizes()) {
      std::vector<std::uint8_t> code_values(n);
      for (std::int64_t i = 0; i < n; ++i) {
        code_values[i] = static_cast<std::uint8_t>((i * 37 + n) % static_cast<std::int64_t>(levels.size()));
      }
      const auto packed_values = oracle::pack(code_values, bits);
      const auto gradients = random_elements<T>(n, 1, static_cast<unsigned>(n));
      std::vector<T> want(n);
      for (std::int64_t i = 0; i < n; ++i) {
        want[i] = lomem::step_gradient<8>(gradients[i], static_cast<lomem::compute_t<T>>(levels[code_values[i]]));
      }
      for (int misaligned = -1; misaligned < 3; ++misaligned) {
        DeviceBuffer<T> grad(n, misaligned == 0 ? 1 : 0);
        grad.assign(gradients);
        DeviceBuffer<std::uint8_t> packed(packed_values.size(), misaligned == 1 ? 1 : 0);
        packed.assign(packed_values);
        DeviceBuffer<T> result(n, misaligned == 2 ? 1 : 0);
        on_all_streams(
            [&](cudaStream_t stream) {
              return step_backward(
                  Element<T>::dtype, grad.data(), packed.data(), levels.data(), bits, n, result.data(), stream);
            },
            [&] { result.poison(); },
            [&] { EXPECT_EQ(bytes_of(result.values()), bytes_of(want)) << bits << " bits, " << n; });
      }
    }
  }
}

TEST_F(EveryDevice, StepBackward) {
  on_every_device([] {
    check_backward<double>();
    check_backward<float>();
    check_backward<lomem::bfloat16>();
    check_backward<lomem::float16>();
  });
}

TEST_F(EveryDevice, Packing) {
  on_every_device([] {
    for (int bits = 1; bits <= 8; ++bits) {
      for (const std::int64_t n : sizes()) {
        std::vector<std::uint8_t> values(n);
        for (std::int64_t i = 0; i < n; ++i) {
          values[i] = static_cast<std::uint8_t>((i * 151 + n) & lomem::max_code(bits));
        }
        const auto want = oracle::pack(values, bits);
        for (int misaligned = -1; misaligned < 2; ++misaligned) {
          DeviceBuffer<std::uint8_t> codes(n, misaligned == 0 ? 1 : 0);
          codes.assign(values);
          DeviceBuffer<std::uint8_t> packed(want.size(), misaligned == 1 ? 1 : 0);
          DeviceBuffer<std::uint8_t> unpacked(n, misaligned == 0 ? 1 : 0);
          on_all_streams(
              [&](cudaStream_t stream) {
                const cudaError_t error = pack_bits(codes.data(), n, bits, packed.data(), stream);
                return error != cudaSuccess ? error : unpack_bits(packed.data(), n, bits, unpacked.data(), stream);
              },
              [&] {
                packed.poison();
                unpacked.poison();
              },
              [&] {
                EXPECT_EQ(packed.values(), want) << bits << " bits, " << n;
                EXPECT_EQ(unpacked.values(), values) << bits << " bits, " << n;
              });
        }
      }
    }
  });
}

int multiprocessors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Same operations in the same order on both sides, but for fused multiply-adds: a few roundings
/// of values up to `scale`, and one of the result.
template <class T>
void expect_close(const std::vector<T>& got, const std::vector<T>& want, double scale, const char* what) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double value = lomem::to_compute(want[i]);
    ASSERT_NEAR(lomem::to_compute(got[i]), value, spacing<T>() * std::fabs(value) + 16 * spacing<float>() * scale)
        << what << " " << i;
  }
}

template <lomem::Norm norm, class T, class Weight>
void check_norm(std::int64_t rows, std::int64_t cols, bool affine, bool misaligned) {
  SCOPED_TRACE(
      testing::Message() << rows << " x " << cols << (affine ? " affine" : "") << " element sizes " << sizeof(T) << " "
                         << sizeof(Weight));
  constexpr bool centred = norm == lomem::Norm::layer;
  using Statistic = lomem::compute_t<T>;
  const std::size_t n = rows * cols;
  const std::size_t shift = misaligned ? 1 : 0;
  const auto x_values = random_elements<T>(n, 2, static_cast<unsigned>(cols));
  const auto grad_values = random_elements<T>(n, 1, static_cast<unsigned>(cols + 1));
  std::vector<Weight> gamma;
  std::vector<Weight> beta;
  for (std::int64_t j = 0; j < cols; ++j) {
    gamma.push_back(Element<Weight>::from((j % 2 == 0 ? 1 : -1) * (0.5 + static_cast<double>(j % 7) / 8)));
    beta.push_back(Element<Weight>::from(static_cast<double>(j % 5) / 4 - 0.5));
  }

  DeviceBuffer<T> x(n, shift);
  DeviceBuffer<T> grad(n, shift);
  DeviceBuffer<Weight> weight(cols);
  DeviceBuffer<Weight> bias(cols);
  x.assign(x_values);
  grad.assign(grad_values);
  weight.assign(gamma);
  bias.assign(beta);
  DeviceBuffer<T> output(n, shift);
  DeviceBuffer<Statistic> rstd(rows);
  DeviceBuffer<T> grad_input(n, shift);
  DeviceBuffer<Weight> grad_weight(cols);
  DeviceBuffer<Weight> grad_bias(cols);

  lomem::NormForward forward;
  forward.input = {x.data(), Element<T>::dtype};
  forward.output = {output.data(), Element<T>::dtype};
  forward.rstd = {rstd.data(), Element<Statistic>::dtype};
  forward.cols = cols;
  forward.eps = 1e-5;
  if (affine) {
    forward.weight = {weight.data(), Element<Weight>::dtype};
    forward.bias = centred ? lomem::Array{bias.data(), Element<Weight>::dtype} : lomem::Array{};
  }
  lomem::NormForward host_forward = forward;
  std::vector<T> host_output(n);
  std::vector<Statistic> host_rstd(rows);
  host_forward.input.data = x_values.data();
  host_forward.output.data = host_output.data();
  host_forward.rstd.data = host_rstd.data();
  if (affine) {
    host_forward.weight.data = gamma.data();
    host_forward.bias.data = centred ? beta.data() : nullptr;
  }
  const HostRunner host{multiprocessors()};
  run_norm_forward<norm>(host_forward, rows, host);
  on_all_streams(
      [&](cudaStream_t stream) { return norm_forward<norm>(forward, rows, stream); },
      [&] {
        output.poison();
        rstd.poison();
      },
      [&] {
        expect_close(output.values(), host_output, 4, "output");
        expect_close(rstd.values(), host_rstd, 1, "rstd");
      });

  // The backward pass starts from the same output on both sides.
  output.assign(host_output);
  rstd.assign(host_rstd);
  lomem::NormBackward backward;
  backward.grad_output = {grad.data(), Element<T>::dtype};
  backward.output = {output.data(), Element<T>::dtype};
  backward.rstd = {rstd.data(), Element<Statistic>::dtype};
  backward.weight = forward.weight;
  backward.bias = forward.bias;
  backward.grad_input = {grad_input.data(), Element<T>::dtype};
  backward.cols = cols;
  NormParameterGradients parameters;
  if (affine) {
    parameters.grad_weight = {grad_weight.data(), Element<Weight>::dtype};
    if (centred) {
      parameters.grad_bias = {grad_bias.data(), Element<Weight>::dtype};
    }
  }
  DeviceBuffer<std::uint8_t> workspace(norm_backward_workspace(backward, rows, parameters));
  parameters.workspace = workspace.data();

  lomem::NormBackward host_backward = backward;
  std::vector<T> host_grad_input(n);
  std::vector<Weight> host_grad_weight(cols);
  std::vector<Weight> host_grad_bias(cols);
  host_backward.grad_output.data = grad_values.data();
  host_backward.output.data = host_output.data();
  host_backward.rstd.data = host_rstd.data();
  host_backward.weight = host_forward.weight;
  host_backward.bias = host_forward.bias;
  host_backward.grad_input.data = host_grad_input.data();
  NormParameterGradients host_parameters = parameters;
  if (affine) {
    host_parameters.grad_weight.data = host_grad_weight.data();
    host_parameters.grad_bias.data = centred ? host_grad_bias.data() : nullptr;
  }
  // Sized for the host's own plan: its arrays are aligned even if the device's are not, so that it may take other
  // strips.
  const std::int64_t host_bytes = norm_backward_bytes(host_backward, rows, host_parameters, host.multiprocessors);
  std::vector<double> host_workspace(host_bytes / sizeof(double) + 1);
  host_parameters.workspace = host_workspace.data();
  run_norm_backward<norm>(host_backward, rows, host_parameters, host);
  std::vector<std::uint8_t> first;
  on_all_streams(
      [&](cudaStream_t stream) { return norm_backward<norm>(backward, rows, parameters, stream); },
      [&] {
        grad_input.poison();
        grad_weight.poison();
        grad_bias.poison();
        workspace.poison();
      },
      [&] {
        const auto got = grad_input.values();
        expect_close(got, host_grad_input, 4, "grad_input");
        std::vector<std::uint8_t> bytes = bytes_of(got);
        if (affine) {
          const auto got_weight = grad_weight.values();
          const double terms = std::sqrt(static_cast<double>(rows));
          expect_close(got_weight, host_grad_weight, 8 * terms, "grad_weight");
          if (centred) {
            expect_close(grad_bias.values(), host_grad_bias, 8 * terms, "grad_bias");
          }
          const auto weight_bytes = bytes_of(got_weight);
          bytes.insert(bytes.end(), weight_bytes.begin(), weight_bytes.end());
        }
        // Deterministic: the same bits each time.
        if (first.empty()) {
          first = bytes;
        }
        EXPECT_EQ(bytes, first);
        workspace.values();
      });
}

template <class T, class Weight>
void check_norms() {
  for (const std::int64_t cols :
       {1, 7, 32, 64, 256, 512, 520, 768, 1000, 1024, 1032, 2048, 4096, 5000, 8192, 16384, 20000, 20001}) {
    const std::int64_t rows = cols > 4096 ? 3 : 70;
    for (const bool affine : {false, true}) {
      check_norm<lomem::Norm::layer, T, Weight>(rows, cols, affine, false);
      check_norm<lomem::Norm::rms, T, Weight>(rows, cols, affine, false);
    }
    check_norm<lomem::Norm::layer, T, Weight>(rows, cols, true, true);
  }
  check_norm<lomem::Norm::layer, T, Weight>(5003, 136, true, false);
}

// Tests of their own, so that they can run side by side.
TEST_F(EveryDevice, NormsOfFloat64) {
  on_every_device(check_norms<double, double>);
}
TEST_F(EveryDevice, NormsOfFloat32) {
  on_every_device(check_norms<float, float>);
}
TEST_F(EveryDevice, NormsOfBFloat16) {
  on_every_device(check_norms<lomem::bfloat16, lomem::bfloat16>);
}
TEST_F(EveryDevice, NormsOfBFloat16WithWeightsOfFloat32) {
  on_every_device(check_norms<lomem::bfloat16, float>);
}
TEST_F(EveryDevice, NormsOfFloat16) {
  on_every_device(check_norms<lomem::float16, lomem::float16>);
}

TEST(CompiledArchs, NameArchitectures) {
  EXPECT_NE(std::string(compiled_archs()).find('.'), std::string::npos) << compiled_archs();
}

}  // namespace
