// The CUDA library beside whatever torch it was built with: it loads, and every op runs on CUDA,
// by a kernel of its own or by other ops. No GPU needed.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>
#include <lomem/ops.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

using Names = std::vector<std::string>;

const Names kernels_of_their_own = {
    "band_codes",      "ms_layer_norm",        "ms_layer_norm_backward",   "ms_layer_norm_forward",
    "ms_rms_norm",     "ms_rms_norm_backward", "ms_rms_norm_forward",      "pack_bits",
    "regelu2_forward", "resilu2_forward",      "step_activation_backward", "step_codes",
    "unpack_bits"};

const Names made_of_other_ops = {
    "hard_activation",
    "hard_activation_forward",
    "randomized_linear",
    "randomized_linear_forward",
    "randomized_linear_weight_grad",
    "regelu2",
    "resilu2",
    "step_activation",
    "step_activation_forward"};

TEST(Library, HasACudaKernelForEveryOp) {
  Names registered;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("lomem::", 0) == 0) {
      registered.push_back(name.name.substr(7));
    }
  }
  std::sort(registered.begin(), registered.end());
  Names expected = kernels_of_their_own;
  expected.insert(expected.end(), made_of_other_ops.begin(), made_of_other_ops.end());
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(registered, expected);
  const auto has_kernel = [](const std::string& name, c10::DispatchKey key) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("lomem::" + name).c_str(), "").hasKernelForDispatchKey(key);
  };
  for (const std::string& name : kernels_of_their_own) {
    EXPECT_TRUE(has_kernel(name, c10::DispatchKey::CUDA)) << name;
  }
  for (const std::string& name : made_of_other_ops) {
    EXPECT_TRUE(has_kernel(name, c10::DispatchKey::CompositeExplicitAutograd)) << name;
  }
}

TEST(Library, RefusesOtherTensors) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("lomem::resilu2_forward", "")
                      .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, bool)>();
  try {
    op.redispatch(c10::DispatchKeySet(c10::DispatchKey::CUDA), at::ones({4}), /*fast=*/false);
    FAIL() << "a CUDA kernel took a tensor on the CPU";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(), "lomem: a CUDA kernel was called with a tensor on cpu, expected cuda");
  }
}

}  // namespace
