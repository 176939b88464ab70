// The choice of the norms' kernels: which are chosen at all, and whether they fit what they are chosen for.
#include <gtest/gtest.h>
#include <lomem/cuda/norm_plan.h>

#include <array>
#include <set>
#include <vector>

namespace {

using lomem::DType;
using namespace lomem::cuda;

constexpr std::array dtypes = {DType::float64, DType::float32, DType::bfloat16, DType::float16};

/// Only pointers are looked at, never what they point to.
template <class Array>
Array array_at(std::uintptr_t address, DType dtype) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  return {reinterpret_cast<decltype(Array{}.data)>(address), dtype};
}

/// The number of columns around which another kernel is chosen, and some between.
std::vector<std::int64_t> columns() {
  std::vector<std::int64_t> result = {1, 2, 3};
  for (std::int64_t power = 4; power <= 32768; power *= 2) {
    for (const std::int64_t cols : {power - 1, power, power + 1, power + 2, power + 4, power + 8, power + power / 4}) {
      result.push_back(cols);
    }
  }
  return result;
}

/// Calls visit(input dtype, output dtype, weight dtype, address) for all dtypes and for addresses that are aligned, or
/// not, for vectors. Address 0 in place of the weight's: there is none.
template <class Visitor>
void for_each_case(const Visitor& visit) {
  for (const DType input : dtypes) {
    for (const DType output : dtypes) {
      for (const DType weight : dtypes) {
        for (const std::uintptr_t misalignment : {0, 8}) {
          visit(input, output, weight, 4096 + misalignment, 8192);
        }
        visit(input, output, weight, 4096, 8192 + lomem::element_size(weight));
      }
      visit(input, output, DType::float32, 4096, 0);
    }
  }
}

/// Whether a kernel with this tiling can process rows as planned.
template <class Tiling>
void expect_fits(const NormPlan& plan, std::int64_t cols) {
  EXPECT_EQ(sizeof(typename Tiling::C), plan.in_double ? sizeof(double) : sizeof(float));
  EXPECT_EQ(Tiling::width, plan.width);
  EXPECT_EQ(cols % Tiling::width, 0);
  EXPECT_EQ(plan.elements, Tiling::in_registers ? Tiling::elements : 0);
  EXPECT_EQ(plan.threads % warp_size, 0);
  EXPECT_GE(plan.threads, warp_size);
  EXPECT_LE(plan.threads, Tiling::max_threads);
  EXPECT_LE(Tiling::max_threads, max_block_threads);
  if (Tiling::in_registers) {
    EXPECT_GE(std::int64_t{plan.threads} * Tiling::elements, cols);
  }
}

template <class Tilings>
void expect_fits(Tilings tilings, const NormPlan& plan, std::int64_t cols) {
  visit_tiling(tilings, plan.tiling, [&](auto tiling) { expect_fits<decltype(tiling)>(plan, cols); });
}

std::set<int> all_of(int size) {
  std::set<int> result;
  for (int tiling = 0; tiling < size; ++tiling) {
    result.insert(tiling);
  }
  return result;
}

TEST(NormPlan, ChoosesEveryForwardKernel) {
  std::set<int> chosen;
  for (const std::int64_t cols : columns()) {
    for_each_case([&](DType input, DType output, DType weight, std::uintptr_t address, std::uintptr_t parameter) {
      lomem::NormForward args;
      args.input = array_at<lomem::Array>(address, input);
      args.output = array_at<lomem::MutableArray>(4096, output);
      args.weight = array_at<lomem::Array>(parameter, weight);
      args.bias = args.weight;
      args.cols = cols;
      const NormPlan plan = plan_forward(args);
      EXPECT_FALSE(plan.parameters);
      expect_fits(RowTilings{}, plan, cols);
      chosen.insert(plan.tiling);
    });
  }
  EXPECT_EQ(chosen, all_of(RowTilings::size));
}

TEST(NormPlan, ChoosesEveryBackwardKernel) {
  std::set<int> rows;
  std::set<int> strips;
  std::set<std::pair<bool, int>> strip_sums;
  for (const std::int64_t cols : columns()) {
    for_each_case([&](DType input, DType output, DType weight, std::uintptr_t address, std::uintptr_t parameter) {
      lomem::NormBackward args;
      args.grad_output = array_at<lomem::Array>(address, output);
      args.output = array_at<lomem::Array>(4096, output);
      args.grad_input = array_at<lomem::MutableArray>(4096, input);
      args.weight = array_at<lomem::Array>(parameter, weight);
      args.bias = args.weight;
      args.cols = cols;
      for (const bool parameters : {false, true}) {
        const NormPlan plan = plan_backward(args, parameters);
        if (plan.parameters) {
          EXPECT_TRUE(parameters);
          expect_fits(StripTilings{}, plan, cols);
          strips.insert(plan.tiling);
        } else {
          expect_fits(RowTilings{}, plan, cols);
          rows.insert(plan.tiling);
          if (parameters) {
            strip_sums.insert({plan.in_double, plan.width});
          }
        }
        EXPECT_GE(plan_strips(plan, 1000, cols, 1), 1);
      }
    });
  }
  EXPECT_EQ(rows, all_of(RowTilings::size));
  EXPECT_EQ(strips, all_of(StripTilings::size));
  // A pass over the strips alone, too, has exactly these kernels: one for each arithmetic type and width.
  const std::set<std::pair<bool, int>> all = {{false, 8}, {false, 4}, {false, 1}, {true, 2}, {true, 1}};
  EXPECT_EQ(strip_sums, all);
}

}  // namespace
