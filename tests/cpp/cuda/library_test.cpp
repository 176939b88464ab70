// The CUDA library beside whatever torch it was built with: it loads, and every op runs on CUDA,
// by a kernel of its own or by other ops. No GPU needed.
#include <ATen/core/stack.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>
#include <lomem/ops.h>

#include "../op_list.h"

namespace {

using c10::DispatchKey;

TEST(Library, HasACudaKernelForEveryOp) {
  EXPECT_EQ(op_list::registered(), op_list::names());
  for (const op_list::Entry& op : op_list::entries) {
    const c10::OperatorHandle handle = op.handle();
    if (op.has(op_list::kernels) && !op.has(op_list::composite)) {
      EXPECT_TRUE(handle.hasKernelForDispatchKey(DispatchKey::CUDA)) << op.name;
    } else {
      EXPECT_TRUE(
          handle.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
          handle.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd))
          << op.name;
    }
  }
}

TEST(Library, RefusesOtherTensors) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lomem::band_codes", "");
  torch::jit::Stack stack = {at::ones({4}), 0.0, 1.0};
  try {
    op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CUDA), &stack);
    FAIL() << "a CUDA kernel took a tensor on the CPU";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(), "lomem: a CUDA kernel was called with a tensor on cpu, expected cuda");
  }
}

}  // namespace
