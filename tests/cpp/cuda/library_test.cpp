// The CUDA library beside whatever torch it was built with: it loads, and every op has a CUDA
// kernel. No GPU needed.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>
#include <lomem/ops.h>

namespace {

const std::vector<std::string>& ops() {
  static const std::vector<std::string> names = {"regelu2_forward",
                                                 "resilu2_forward",
                                                 "step_activation_backward",
                                                 "ms_layer_norm",
                                                 "ms_layer_norm_forward",
                                                 "ms_rms_norm",
                                                 "ms_rms_norm_forward",
                                                 "ms_layer_norm_backward",
                                                 "ms_rms_norm_backward",
                                                 "pack_bits",
                                                 "unpack_bits"};
  return names;
}

TEST(Library, HasACudaKernelForEveryOp) {
  std::size_t lomem_ops = 0;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    lomem_ops += name.name.rfind("lomem::", 0) == 0 ? 1 : 0;
  }
  // The public activations without gradient are torch's own ops, on every device.
  EXPECT_EQ(lomem_ops, ops().size() + 2);
  for (const std::string& name : ops()) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("lomem::" + name).c_str(), "");
    EXPECT_TRUE(op.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) << name;
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
