// The bodies of the CUDA kernels of dropout, executed on the CPU: see bodies_test.cpp.
#include <gtest/gtest.h>
#include <lomem/cuda/dropout.cuh>

#include <cstring>
#include <vector>

#include "../core/elements.h"
#include "../core/guarded.h"

namespace {

using namespace lomem::cuda;

template <class T>
class DropoutBodies : public testing::Test {};
using Elements = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(DropoutBodies, Elements);

template <class T, class Mask, class IsKept>
void check(std::int64_t n, const Mask& mask, int misaligned, const IsKept& is_kept) {
  const double scale = 1 / 0.7;
  Guarded<T> x(n, misaligned == 0 ? 1 : 0);
  x.assign(random_elements<T>(n, 1, static_cast<unsigned>(n)));
  Guarded<T> product(n, misaligned == 1 ? 1 : 0);
  execute_on_host(MaskedMultiply(static_cast<const T*>(x.data()), mask, scale, n, product.data()));
  product.expect_intact();
  const auto values = x.values();
  const auto got = product.values();
  for (std::int64_t i = 0; i < n; ++i) {
    const T want = lomem::scaled_if(is_kept(i), values[i], static_cast<lomem::compute_t<T>>(scale));
    ASSERT_EQ(std::memcmp(&got[i], &want, sizeof(T)), 0) << i << " of " << n;
  }
}

TYPED_TEST(DropoutBodies, MultiplyByAMask) {
  using Grid = UnitGrid<TypeParam, 1>;
  std::vector<std::int64_t> sizes = {Grid::block_elements - 1, Grid::block_elements, 2 * Grid::block_elements + 13};
  for (std::int64_t n = 0; n <= 40; ++n) {
    sizes.push_back(n);
  }
  for (const std::int64_t n : sizes) {
    std::vector<std::uint8_t> bits((n + 7) / 8);
    for (std::size_t i = 0; i < bits.size(); ++i) {
      bits[i] = static_cast<std::uint8_t>(i * 151 + 7);
    }
    const std::int64_t seed = n * 0x123456789abc - 5;
    const std::uint32_t bound = lomem::dropout_bound(0.3);
    for (int misaligned = -1; misaligned < 2; ++misaligned) {
      check<TypeParam>(
          n, StoredMask{bits.data()}, misaligned, [&](std::int64_t i) { return (bits[i / 8] >> (i % 8) & 1) != 0; });
      check<TypeParam>(n, SeededMask{&seed, bound}, misaligned, [&](std::int64_t i) {
        return lomem::philox_word(static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(i)) >= bound;
      });
    }
  }
}

}  // namespace
