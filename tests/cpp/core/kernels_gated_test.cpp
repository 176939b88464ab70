// Kernels of gated units of every instruction set against the scalar formulas, byte for byte: every size, alignment and
// choice of results.
#include <limits>

#include "gates.h"
#include "guarded.h"
#include "kernel_tables.h"

namespace {

class GatedKernels : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(GatedKernels);

template <class T>
void check(
    const Table& table, lomem::GatedActivation activation, const std::vector<T>& grad, const std::vector<T>& gate,
    const std::vector<T>& up, std::size_t misalignment, int mask, bool stream) {
  const std::size_t n = grad.size();
  const auto want = gradients_by_formulas(activation, grad, gate, up);
  const AtPageEnd<T> g(grad);
  const AtPageEnd<T> x(gate);
  const AtPageEnd<T> factor(up);
  Guarded<T> of_gate(n, misalignment);
  Guarded<T> of_up(n, misalignment);
  const auto untouched = of_gate.values();
  table->gated_backward(
      activation, Element<T>::dtype, g.data(), x.data(), factor.data(), static_cast<std::int64_t>(n),
      (mask & 1) != 0 ? of_gate.data() : nullptr, (mask & 2) != 0 ? of_up.data() : nullptr, stream);
  const auto describe = [&] { return std::to_string(static_cast<int>(activation)) + ", " + std::to_string(n); };
  ASSERT_TRUE(same_bytes(of_gate.values(), (mask & 1) != 0 ? want.of_gate : untouched)) << describe();
  ASSERT_TRUE(same_bytes(of_up.values(), (mask & 2) != 0 ? want.of_up : untouched)) << describe();
  of_gate.expect_intact();
  of_up.expect_intact();
}

template <class T>
void check_every_size(const Table& table) {
  for (const lomem::GatedActivation activation : gates) {
    for (std::size_t n = 0; n <= 140; ++n) {
      const auto seed = static_cast<unsigned>(n);
      check(
          table, activation, random_elements<T>(n, 1, seed), random_elements<T>(n, 4, seed + 1),
          random_elements<T>(n, 1, seed + 2), n % 3,
          3 - static_cast<int>(n % 7 == 1) - 2 * static_cast<int>(n % 7 == 2), n % 2 == 0);
    }
  }
}

TEST_P(GatedKernels, EverySize) {
  check_every_size<double>(GetParam());
  check_every_size<float>(GetParam());
  check_every_size<lomem::bfloat16>(GetParam());
  check_every_size<lomem::float16>(GetParam());
}

/// Every 16-bit pattern of the gate; NaN and infinities too.
template <class T>
void check_every_gate(const Table& table) {
  std::vector<T> every(0x10000);
  for (std::size_t i = 0; i < every.size(); ++i) {
    every[i].bits = static_cast<std::uint16_t>(i);
  }
  for (const lomem::GatedActivation activation : gates) {
    std::vector<T> finite;
    for (const T x : every) {
      if (std::isfinite(lomem::to_compute(x))) {
        finite.push_back(x);
      }
    }
    const auto ones = std::vector<T>(finite.size(), Element<T>::from(1.0));
    check(table, activation, random_elements<T>(finite.size(), 1, 5), finite, ones, 0, 3, false);
  }
}

TEST_P(GatedKernels, EverySixteenBitPattern) {
  check_every_gate<lomem::bfloat16>(GetParam());
  check_every_gate<lomem::float16>(GetParam());
}

TEST_P(GatedKernels, NotANumberAndInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> gate = {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 1e30f, -1e30f};
  const std::vector<float> ones(gate.size(), 1.0f);
  for (const lomem::GatedActivation activation : gates) {
    const auto want = gradients_by_formulas(activation, ones, gate, ones);
    GateGradients<float> got{std::vector<float>(gate.size()), std::vector<float>(gate.size())};
    GetParam()->gated_backward(
        activation, lomem::DType::float32, ones.data(), gate.data(), ones.data(),
        static_cast<std::int64_t>(gate.size()), got.of_gate.data(), got.of_up.data(), false);
    for (std::size_t i = 0; i < gate.size(); ++i) {
      // (Not the bits of a NaN.)
      EXPECT_TRUE(got.of_gate[i] == want.of_gate[i] || (std::isnan(got.of_gate[i]) && std::isnan(want.of_gate[i])));
      EXPECT_TRUE(got.of_up[i] == want.of_up[i] || (std::isnan(got.of_up[i]) && std::isnan(want.of_up[i])));
    }
  }
}

}  // namespace
