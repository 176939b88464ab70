// The bodies of the CUDA kernels of storage in groups, executed on the CPU: see bodies_test.cpp.
#include <gtest/gtest.h>
#include <lomem/cuda/storage.cuh>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../core/elements.h"
#include "../core/guarded.h"

namespace {

using namespace lomem::cuda;
using lomem::bfloat16;
using lomem::RoundingBits;

template <class T>
class StorageBodies : public testing::Test {};
using Elements = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(StorageBodies, Elements);

/// Against the formulas. `misaligned`: which of the three arrays is.
template <int bits, class T>
void check(const std::vector<T>& elements, int group, bool stochastic, int misaligned) {
  const auto n = static_cast<std::int64_t>(elements.size());
  const std::int64_t seed = n * 0x123456789abc - 5;
  const std::uint64_t offset = (std::uint64_t{1} << 33) + 7;
  const RoundingBits random{static_cast<std::uint64_t>(seed), offset};
  std::vector<std::uint8_t> want(static_cast<std::size_t>(lomem::packed_bytes(n, bits)));
  std::vector<bfloat16> want_scales;
  std::vector<T> want_values(elements.size());
  std::vector<T> want_dithered(elements.size());
  for (std::int64_t begin = 0; begin < n; begin += group) {
    const std::int64_t count = std::min<std::int64_t>(group, n - begin);
    std::uint8_t* codes = want.data() + begin * bits / 8;
    want_scales.push_back(
        lomem::encode_group<bits>(elements.data() + begin, begin, count, stochastic ? &random : nullptr, codes));
    lomem::decode_group<bits>(codes, count, want_scales.back(), want_values.data() + begin);
    lomem::decode_group<bits>(codes, count, want_scales.back(), want_dithered.data() + begin, &random, begin);
  }
  Guarded<T> x(n, misaligned == 0 ? 1 : 0);
  x.assign(elements);
  Guarded<std::uint8_t> codes(static_cast<std::int64_t>(want.size()), misaligned == 1 ? 1 : 0);
  Guarded<bfloat16> scales(static_cast<std::int64_t>(want_scales.size()), 1);
  const auto* source = static_cast<const T*>(x.data());
  if (stochastic) {
    execute_on_host(
        GroupEncode<T, bits, StochasticRounding>(
            source, n, group, StochasticRounding{&seed, offset}, codes.data(), scales.data()));
  } else {
    execute_on_host(
        GroupEncode<T, bits, NearestRounding>(source, n, group, NearestRounding{}, codes.data(), scales.data()));
  }
  codes.expect_intact();
  scales.expect_intact();
  const auto got = codes.values();
  const auto got_scales = scales.values();
  ASSERT_TRUE(want.empty() || std::memcmp(got.data(), want.data(), want.size()) == 0) << n << " in groups of " << group;
  ASSERT_TRUE(want.empty() || std::memcmp(got_scales.data(), want_scales.data(), 2 * want_scales.size()) == 0) << n;
  const auto check_values = [&](const auto& rounding, const std::vector<T>& wanted) {
    Guarded<T> y(n, misaligned == 2 ? 1 : 0);
    using Rounding = std::decay_t<decltype(rounding)>;
    execute_on_host(GroupDecode<T, bits, Rounding>(codes.data(), scales.data(), n, group, rounding, y.data()));
    y.expect_intact();
    const auto values = y.values();
    for (std::size_t i = 0; i < elements.size(); ++i) {
      const bool both_nan = std::isnan(lomem::to_compute(values[i])) && std::isnan(lomem::to_compute(wanted[i]));
      ASSERT_TRUE(both_nan || std::memcmp(&values[i], &wanted[i], sizeof(T)) == 0) << i << " of " << n;
    }
  };
  check_values(NearestRounding{}, want_values);
  check_values(StochasticRounding{&seed, offset}, want_dithered);
}

template <class T>
void check_all(const std::vector<T>& elements, int group, int misaligned) {
  for (const bool stochastic : {false, true}) {
    check<8>(elements, group, stochastic, misaligned);
    check<4>(elements, group, stochastic, misaligned);
  }
}

TYPED_TEST(StorageBodies, RoundTrips) {
  using T = TypeParam;
  std::vector<std::int64_t> sizes = {127, 128, 129, 1000, 2047, 2048, 4096, 4096 + 13, 3 * 4096 + 1};
  for (std::int64_t n = 0; n <= 40; ++n) {
    sizes.push_back(n);
  }
  for (const std::int64_t n : sizes) {
    const auto x = random_elements<T>(static_cast<std::size_t>(n), 3, static_cast<unsigned>(n));
    for (int misaligned = -1; misaligned < 3; ++misaligned) {
      check_all(x, 128, misaligned);
    }
  }
}

TYPED_TEST(StorageBodies, EverySizeOfGroups) {
  using T = TypeParam;
  for (int group = lomem::min_scale_group; group <= lomem::max_scale_group; group *= 2) {
    check_all(random_elements<T>(5000, 3, static_cast<unsigned>(group)), group, -1);
  }
}

TYPED_TEST(StorageBodies, SpecialValues) {
  using T = TypeParam;
  for (const double special : {HUGE_VAL, -HUGE_VAL, std::nan(""), 0.0, 1e-41, 65504.0}) {
    auto x = random_elements<T>(3000, special == 0 ? 0 : std::is_same_v<T, lomem::float16> ? 1 : 1e-40, 1);
    for (const std::size_t place : {std::size_t{0}, std::size_t{135}, std::size_t{2040}, std::size_t{2999}}) {
      x[place] = Element<T>::from(special);
    }
    check_all(x, 128, -1);
  }
}

}  // namespace
