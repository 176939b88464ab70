// What the CUDA ops say of a GPU that they have no code for. No GPU needed.
#include "errors.h"

#include <gtest/gtest.h>

namespace {

TEST(UnsupportedGpu, IsOneSentenceWithBothValues) {
  EXPECT_EQ(
      lomem::detail::unsupported_gpu_message("lomem::pack_bits", "cuda:1", 7, 0, "7.5 8.0 9.0+PTX"),
      "lomem::pack_bits: cuda:1 is a GPU of compute capability 7.0, expected one of 7.5 8.0 9.0+PTX, which this "
      "lomem was compiled for (set TORCH_CUDA_ARCH_LIST and build it again)");
}

TEST(UnsupportedGpu, IsToldFromOtherErrors) {
  EXPECT_TRUE(lomem::detail::is_unsupported_gpu(cudaErrorNoKernelImageForDevice));
  EXPECT_FALSE(lomem::detail::is_unsupported_gpu(cudaErrorIllegalAddress));
  EXPECT_FALSE(lomem::detail::is_unsupported_gpu(cudaSuccess));
}

}  // namespace
