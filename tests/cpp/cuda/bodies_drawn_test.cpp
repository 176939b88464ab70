// The bodies of the CUDA kernels of codes drawn at random, executed on the CPU: see bodies_test.cpp.
#include <gtest/gtest.h>
#include <lomem/cuda/drawn.cuh>

#include <cmath>
#include <cstring>
#include <vector>

#include "../core/drawn_cases.h"
#include "../core/elements.h"
#include "../core/guarded.h"

namespace {

using namespace lomem::cuda;
using lomem::RoundingBits;

template <class T>
class DrawnBodies : public testing::Test {};
using Elements = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(DrawnBodies, Elements);

/// Against the formulas. `misaligned`: which of the arrays is, input, codes or gradients; none if it is negative.
template <int bits, class T>
void check(const lomem::DrawnTable& table, const std::vector<T>& elements, int misaligned) {
  using C = lomem::compute_t<T>;
  const auto n = static_cast<std::int64_t>(elements.size());
  const std::int64_t seed = n * 0x123456789abc - 5;
  const std::uint64_t offset = (std::uint64_t{1} << 33) + 7;
  const RoundingBits random{static_cast<std::uint64_t>(seed), offset};
  const DeviceRounding rounding{&seed, offset};
  const lomem::DrawnLevels<double> levels{-0.1, 1.2 / lomem::max_code(bits)};
  std::vector<std::uint8_t> want(static_cast<std::size_t>(lomem::packed_bytes(n, bits)));
  std::vector<T> want_gradient(elements.size());
  lomem::drawn_encode<bits>(table, elements.data(), 0, n, random, want.data());
  lomem::drawn_decode_multiply<bits>(
      elements.data(), want.data(), {static_cast<C>(levels.low), static_cast<C>(levels.step)}, 0, n, random,
      want_gradient.data());

  Guarded<T> x(elements.size(), misaligned == 0 ? 1 : 0);
  x.assign(elements);
  Guarded<std::uint8_t> codes(want.size(), misaligned == 1 ? 1 : 0);
  const auto* source = static_cast<const T*>(x.data());
  execute_on_host(DrawnEncode<T, bits>(table, source, n, rounding, codes.data()));
  codes.expect_intact();
  ASSERT_EQ(codes.values(), want) << n << ", bits " << bits;

  Guarded<T> gradient(elements.size(), misaligned == 2 ? 1 : 0);
  execute_on_host(DrawnBackward<T, bits>(source, codes.data(), levels, n, rounding, gradient.data()));
  gradient.expect_intact();
  const auto got = gradient.values();
  for (std::size_t i = 0; i < elements.size(); ++i) {
    const bool both_nan = std::isnan(lomem::to_compute(got[i])) && std::isnan(lomem::to_compute(want_gradient[i]));
    ASSERT_TRUE(both_nan || std::memcmp(&got[i], &want_gradient[i], sizeof(T)) == 0) << i << " of " << n;
  }
}

template <class T>
void check_all(const lomem::DrawnTable& table, const std::vector<T>& elements, int misaligned) {
  for (int bits = 1; bits <= 8; ++bits) {
    SCOPED_TRACE(bits);
    lomem::visit_bits(bits, [&](auto width) { check<decltype(width)::value>(table, elements, misaligned); });
  }
}

TYPED_TEST(DrawnBodies, EverySize) {
  using T = TypeParam;
  // A block has 2048 elements.
  std::vector<std::size_t> sizes = {127, 128, 129, 1000, 2047, 2048, 2049, 2056, 3 * 2048 + 13};
  for (std::size_t n = 0; n <= 40; ++n) {
    sizes.push_back(n);
  }
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    for (const std::size_t n : sizes) {
      const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
      for (int misaligned = -1; misaligned < 3; ++misaligned) {
        check_all(of.table, x, misaligned);
      }
    }
  }
}

TYPED_TEST(DrawnBodies, SpecialValues) {
  using T = TypeParam;
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    std::vector<T> x;
    for (const double place : drawn::places(of)) {
      x.push_back(Element<T>::from(place));
    }
    check_all(of.table, x, -1);
    check_all(of.table, x, 0);
  }
}

template <class T>
void check_patterns() {
  std::vector<T> x(0x10000);
  for (int i = 0; i < 0x10000; ++i) {
    x[i].bits = static_cast<std::uint16_t>(i);
  }
  for (const drawn::Case& of : drawn::cases()) {
    SCOPED_TRACE(of.name);
    check<4>(of.table, x, -1);
  }
}

TEST(DrawnBodiesOfPatterns, EverySixteenBitPattern) {
  check_patterns<lomem::bfloat16>();
  check_patterns<lomem::float16>();
}

}  // namespace
