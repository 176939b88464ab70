// Every kernel that is compiled can be launched: the test calls every launcher with every kind of argument,
// without executing anything.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <gtest/gtest.h>
#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>

#include <cstdlib>
#include <map>
#include <memory>

#include "../../core/fused_functions.h"
#include "../../core/gates.h"
#include "emulator.h"

namespace {

using lomem::Array;
using lomem::DType;
using lomem::MutableArray;
using lomem::Norm;
using namespace lomem::cuda;

constexpr DType dtypes[] = {DType::float64, DType::float32, DType::bfloat16, DType::float16};

/// An address that no kernel reads.
void* address(std::size_t misalignment) {
  return reinterpret_cast<void*>(0x100000 + misalignment);
}

void launch_activations() {
  const std::vector<double> numbers(256);
  auto* bytes = static_cast<std::uint8_t*>(address(0));
  for (const DType dtype : dtypes) {
    FusedFunctions::for_each([&](auto function) {
      step_forward<typename decltype(function)::type>(dtype, bytes, 100, bytes, bytes, nullptr);
    });
    for (int bits = 1; bits <= 8; ++bits) {
      step_encode(dtype, bytes, 100, numbers.data(), bits, bytes, nullptr);
      step_backward(dtype, bytes, bytes, numbers.data(), bits, 100, bytes, nullptr);
      const auto* seed = reinterpret_cast<const std::int64_t*>(bytes);
      drawn_encode(dtype, lomem::DrawnTable{}, bytes, 100, bits, seed, 0, bytes, nullptr);
      drawn_backward(dtype, bytes, bytes, {0, 1}, bits, 100, seed, 0, bytes, nullptr);
    }
    band_encode(dtype, bytes, 100, 0, 1, bytes, nullptr);
    mask_multiply(dtype, bytes, bytes, 2, 100, bytes, nullptr);
    seed_multiply(dtype, bytes, reinterpret_cast<const std::int64_t*>(bytes), 5, 2, 100, bytes, nullptr);
    for (const int bits : {8, 4}) {
      const lomem::GroupFormat format{bits, 128};
      auto* scales = reinterpret_cast<lomem::bfloat16*>(bytes);
      group_encode(dtype, bytes, 100, format, nullptr, 0, bytes, scales, nullptr);
      group_encode(dtype, bytes, 100, format, reinterpret_cast<const std::int64_t*>(bytes), 0, bytes, scales, nullptr);
      group_decode(dtype, bytes, scales, 100, format, nullptr, 0, bytes, nullptr);
      group_decode(dtype, bytes, scales, 100, format, reinterpret_cast<const std::int64_t*>(bytes), 0, bytes, nullptr);
    }
    for (const lomem::GatedActivation activation : gates) {
      lomem::GatedOperands operands{activation, dtype, 3, 8, bytes, bytes, 8, 8};
      gated_forward(operands, bytes, nullptr);
      gated_backward(operands, bytes, {bytes, bytes, 8, bytes}, nullptr);
    }
  }
  for (int bits = 1; bits <= 8; ++bits) {
    pack_bits(bytes, 100, bits, bytes, nullptr);
    unpack_bits(bytes, 100, bits, bytes, nullptr);
  }
}

template <Norm norm>
void launch_norm(
    std::int64_t rows, std::int64_t cols, DType dtype, DType affine, std::size_t misalignment, bool input, int sums) {
  const Array tensor{address(misalignment * lomem::element_size(dtype)), dtype};
  const MutableArray result{address(misalignment * lomem::element_size(dtype)), dtype};
  const Array parameter{address(0), affine};
  lomem::NormForward forward;
  forward.input = tensor;
  forward.output = result;
  forward.rstd = {address(0), DType::float64};
  forward.weight = parameter;
  forward.cols = cols;
  norm_forward<norm>(forward, rows, nullptr);
  lomem::NormBackward backward;
  backward.grad_output = backward.output = tensor;
  backward.rstd = {address(0), DType::float64};
  backward.weight = parameter;
  backward.cols = cols;
  if (input) {
    backward.grad_input = result;
  }
  NormParameterGradients parameters;
  parameters.workspace = address(0);
  if (sums > 0) {
    parameters.grad_weight = {address(0), affine};
  }
  if (sums > 1 && norm == Norm::layer) {
    parameters.grad_bias = {address(0), affine};
  }
  norm_backward<norm>(backward, rows, parameters, nullptr);
}

void launch_norms() {
  // Around every number of columns at which a plan changes.
  for (std::int64_t size = 1; size <= 1 << 16; size *= 2) {
    for (const std::int64_t cols : {size - 1, size, size + 1, size + 8, size + size / 2}) {
      for (const DType dtype : dtypes) {
        for (const DType affine : {DType::float64, DType::float32, DType::bfloat16}) {
          for (const std::size_t misalignment : {0, 1}) {
            for (int sums = 0; sums < 3; ++sums) {
              for (const bool input : {false, true}) {
                launch_norm<Norm::layer>(7, cols, dtype, affine, misalignment, input, sums);
                launch_norm<Norm::rms>(7, cols, dtype, affine, misalignment, input, sums);
              }
            }
          }
        }
      }
    }
  }
}

std::string demangled(const std::string& name) {
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr), std::free);
  return text != nullptr ? text.get() : name;
}

TEST(EveryKernel, IsReachable) {
  emulator::options().execute = false;
  emulator::reset_counts();
  launch_activations();
  launch_norms();
  emulator::options().execute = true;
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  // Two source files may compile the same kernel; the linker keeps the launcher of one.
  std::map<std::string, std::uint64_t> launches;
  for (const emulator::KernelCounts& kernel : emulator::kernels()) {
    launches[kernel.name] += kernel.counts.launches;
  }
  for (const auto& [name, count] : launches) {
    EXPECT_GT(count, 0U) << "no arguments launch " << demangled(name);
  }
  EXPECT_GT(launches.size(), 100U);
}

}  // namespace
