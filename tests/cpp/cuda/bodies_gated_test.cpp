// The bodies of the CUDA kernels of gated units, executed on the CPU: see bodies_test.cpp.
#include <gtest/gtest.h>
#include <lomem/cuda/gated.cuh>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../core/gates.h"
#include "../core/guarded.h"

namespace {

using namespace lomem::cuda;

template <class T>
class GatedBodies : public testing::Test {};
using Elements = testing::Types<double, float, lomem::bfloat16, lomem::float16>;
TYPED_TEST_SUITE(GatedBodies, Elements);

struct Shape {
  std::int64_t rows;
  std::int64_t cols;
};

/// Sizes around units and blocks, of one row and of many.
std::vector<Shape> shapes(std::int64_t block) {
  std::vector<Shape> result = {{0, 0}, {0, 8}, {3, 1}, {5, 7}, {3, 8}, {4, 16}, {7, 40}, {3, 33}, {65, 32}};
  for (std::int64_t n = 1; n <= 40; ++n) {
    result.push_back({1, n});
  }
  for (const std::int64_t n : {block - 1, block, block + 1, 2 * block, 2 * block + 13}) {
    result.push_back({1, n});
  }
  result.push_back({3, block});
  result.push_back({block / 8, 16});
  return result;
}

TYPED_TEST(GatedBodies, GivesResultsAndGradients) {
  using T = TypeParam;
  unsigned seed = 0;
  for (const auto [rows, cols] : shapes(GatedGrid<T>::block_elements)) {
    const std::int64_t n = rows * cols;
    for (const Operands form : all_operands) {
      for (const lomem::GatedActivation activation : gates) {
        // Aligned; then each of the four arrays misaligned.
        const int misaligned = static_cast<int>(seed % 5) - 1;
        SCOPED_TRACE(
            std::to_string(rows) + " x " + std::to_string(cols) + ", form " + std::to_string(static_cast<int>(form)) +
            ", activation " + std::to_string(static_cast<int>(activation)) + ", misaligned " +
            std::to_string(misaligned));
        Guarded<T> both(2 * n, misaligned == 0 ? 1 : 0);
        both.assign(random_elements<T>(2 * n, 3, ++seed));
        Guarded<T> grad(n, misaligned == 1 ? 1 : 0);
        grad.assign(random_elements<T>(n, 1, ++seed));
        Guarded<T> output(n, misaligned == 2 ? 1 : 0);
        Guarded<T> again(n, misaligned == 2 ? 1 : 0);
        Guarded<T> gradients(2 * n, misaligned == 3 ? 1 : 0);
        const lomem::GatedOperands operands = operands_in(form, activation, both.data(), rows, cols);
        const auto run = [](const auto& body) { execute_on_host(body); };
        gated_forward_by(operands, output.data(), run);
        gated_backward_by(operands, grad.data(), gradients_in(form, gradients.data(), rows, cols, again.data()), run);
        both.expect_intact();
        grad.expect_intact();
        output.expect_intact();
        again.expect_intact();
        gradients.expect_intact();
        const auto x = both.values();
        const auto g = grad.values();
        const auto y = output.values();
        const auto y_again = again.values();
        const auto results = gradients.values();
        for (std::int64_t row = 0; row < rows; ++row) {
          for (std::int64_t col = 0; col < cols; ++col) {
            const std::int64_t i = row * cols + col;
            const std::int64_t at_gate = operand_index(form, 0, row, col, rows, cols);
            const std::int64_t at_up = operand_index(form, 1, row, col, rows, cols);
            const double gate = lomem::to_compute(x[at_gate]);
            const double up = lomem::to_compute(x[at_up]);
            const auto [want, tolerance] = expected_result<T>(activation, gate, up);
            ASSERT_NEAR(lomem::to_compute(y[i]), want, tolerance) << gate << " " << up;
            ASSERT_EQ(lomem::to_compute(y[i]), lomem::to_compute(y_again[i]));
            const auto expected = expected_gradient<T>(activation, lomem::to_compute(g[i]), gate, up);
            ASSERT_NEAR(lomem::to_compute(results[at_gate]), expected.of_gate, expected.gate_tolerance) << gate;
            ASSERT_NEAR(lomem::to_compute(results[at_up]), expected.of_up, expected.up_tolerance) << gate;
          }
        }
      }
    }
  }
}

TYPED_TEST(GatedBodies, WritesOnlyWhatIsAskedFor) {
  using T = TypeParam;
  for (const std::int64_t n : {std::int64_t{13}, GatedGrid<T>::block_elements}) {
    Guarded<T> both(2 * n);
    both.assign(random_elements<T>(2 * n, 3, 1));
    const lomem::GatedOperands operands = operands_in(Operands::apart, lomem::GatedActivation::silu, both.data(), 1, n);
    Guarded<T> all(3 * n);
    gated_backward_by(operands, both.data(), {all.data(), all.data() + n, n, all.data() + 2 * n}, [](const auto& body) {
      execute_on_host(body);
    });
    const auto everything = all.values();
    for (int mask = 0; mask < 8; ++mask) {
      Guarded<T> some(3 * n);
      const auto untouched = some.values();
      const auto pointer = [&](int which) { return (mask >> which & 1) != 0 ? some.data() + which * n : nullptr; };
      gated_backward_by(operands, both.data(), {pointer(0), pointer(1), n, pointer(2)}, [](const auto& body) {
        execute_on_host(body);
      });
      some.expect_intact();
      const auto got = some.values();
      for (std::int64_t i = 0; i < 3 * n; ++i) {
        const bool written = (mask >> (i / n) & 1) != 0;
        ASSERT_EQ(std::memcmp(&got[i], written ? &everything[i] : &untouched[i], sizeof(T)), 0) << mask << " " << i;
      }
    }
  }
}

TEST(GatedBody, NotANumberAndInfinity) {
  // As torch's kernels: the derivatives of SiLU and GELU at infinity are infinity times 0.
  const double infinity = std::numeric_limits<double>::infinity();
  for (const lomem::GatedActivation activation : gates) {
    lomem::visit_gated(activation, [&](auto function) {
      using Function = typename decltype(function)::type;
      EXPECT_TRUE(std::isnan(gated_value<Function>(std::numeric_limits<double>::quiet_NaN(), 1.0)));
      using Math = lomem::LibraryMath<float>;
      EXPECT_TRUE(std::isnan(lomem::value_and_slope<Function, Math>(std::numeric_limits<float>::quiet_NaN()).value));
      EXPECT_TRUE(std::isnan(gated_value<Function>(infinity, 0.0)) || Function::value(infinity) == 1);
      for (const double x : {1e4, 1e30, -1e4, -1e30}) {
        EXPECT_TRUE(std::isfinite(lomem::value_and_slope<Function, Math>(static_cast<float>(x)).slope)) << x;
      }
    });
  }
  EXPECT_EQ(lomem::gate_gradient<lomem::ReLU>(infinity, 0.0), 0);
  EXPECT_EQ((gated_value<lomem::ReLU>(-0.0, 1.0)), 0);
}

}  // namespace
