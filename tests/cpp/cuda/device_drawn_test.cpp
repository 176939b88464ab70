// The CUDA kernels of codes drawn at random on a device: see device_test.cpp.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/drawn.cuh>

#include "../core/drawn_cases.h"
#include "../core/elements.h"
#include "device.h"

namespace {

using namespace lomem::cuda;

class DrawnOnEveryDevice : public EveryDevice {};

template <class T>
void check_drawn(const lomem::DrawnTable& table, int bits, const std::vector<T>& values, int misaligned) {
  const auto n = static_cast<std::int64_t>(values.size());
  const std::int64_t seed = 0x123456789abcdef;
  constexpr std::uint64_t offset = 0x987654321;
  const lomem::DrawnLevels<double> levels{-0.1, 1.2 / lomem::max_code(bits)};
  std::vector<std::uint8_t> want(lomem::packed_bytes(n, bits));
  std::vector<T> want_gradient(n);
  const auto grad = random_elements<T>(n, 2, static_cast<unsigned>(n));
  const auto on_host = [](const auto& body) {
    execute_on_host(body);
    return cudaSuccess;
  };
  drawn_encode_by(Element<T>::dtype, table, values.data(), n, bits, {&seed, offset}, want.data(), on_host);
  drawn_backward_by(
      Element<T>::dtype, grad.data(), want.data(), levels, bits, n, {&seed, offset}, want_gradient.data(), on_host);
  DeviceBuffer<T> x(n, misaligned == 0 ? 1 : 0);
  x.assign(values);
  DeviceBuffer<T> grad_output(n, misaligned == 0 ? 1 : 0);
  grad_output.assign(grad);
  DeviceBuffer<std::int64_t> device_seed(1);
  device_seed.assign({seed});
  DeviceBuffer<std::uint8_t> codes(want.size(), misaligned == 1 ? 1 : 0);
  DeviceBuffer<T> grad_input(n, misaligned == 2 ? 1 : 0);
  on_all_streams(
      [&](cudaStream_t stream) {
        const cudaError_t error =
            drawn_encode(Element<T>::dtype, table, x.data(), n, bits, device_seed.data(), offset, codes.data(), stream);
        return error != cudaSuccess ? error
                                    : drawn_backward(
                                          Element<T>::dtype, grad_output.data(), codes.data(), levels, bits, n,
                                          device_seed.data(), offset, grad_input.data(), stream);
      },
      [&] {
        codes.poison();
        grad_input.poison();
      },
      [&] {
        EXPECT_EQ(codes.values(), want) << n << ", bits " << bits;
        EXPECT_EQ(bytes_of(grad_input.values()), bytes_of(want_gradient)) << n << ", bits " << bits;
      });
}

template <class T>
void check_drawn_places(const drawn::Case& of) {
  std::vector<T> x;
  for (const double place : drawn::places(of)) {
    x.push_back(Element<T>::from(place));
  }
  check_drawn(of.table, 8, x, -1);
  check_drawn(of.table, 2, x, 0);
}

TEST_F(DrawnOnEveryDevice, EverySize) {
  on_every_device([] {
    const std::vector<drawn::Case> cases = drawn::cases();
    std::size_t number = 0;
    for (const std::int64_t n : sizes()) {
      for (int bits = 1; bits <= 8; ++bits) {
        const drawn::Case& of = cases[(number + number / cases.size()) % cases.size()];
        SCOPED_TRACE(of.name);
        const int misaligned = static_cast<int>(number++ % 5 % 4) - 1;
        const auto seed = static_cast<unsigned>(n);
        check_drawn(of.table, bits, random_elements<double>(n, 3, seed), misaligned);
        check_drawn(of.table, bits, random_elements<float>(n, 3, seed), misaligned);
        check_drawn(of.table, bits, random_elements<lomem::bfloat16>(n, 3, seed), misaligned);
        check_drawn(of.table, bits, random_elements<lomem::float16>(n, 3, seed), misaligned);
      }
    }
  });
}

TEST_F(DrawnOnEveryDevice, SpecialValues) {
  on_every_device([] {
    for (const drawn::Case& of : drawn::cases()) {
      SCOPED_TRACE(of.name);
      check_drawn_places<double>(of);
      check_drawn_places<float>(of);
      check_drawn_places<lomem::bfloat16>(of);
      check_drawn_places<lomem::float16>(of);
    }
  });
}

}  // namespace
