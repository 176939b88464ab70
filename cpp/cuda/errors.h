// Messages for failed launches.
#pragma once

#include <lomem/cuda/kernels.h>

#include <string>

namespace lomem::detail {

/// Whether an error means that the library has no code for the GPU.
inline bool is_unsupported_gpu(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion;
}

/// `device` is a name such as "cuda:0"; `major` and `minor` are its compute capability.
inline std::string unsupported_gpu_message(
    const char* op, const std::string& device, int major, int minor, const std::string& compiled_archs) {
  return std::string(op) + ": " + device + " is a GPU of compute capability " + std::to_string(major) + "." +
         std::to_string(minor) + ", expected one of " + compiled_archs +
         ", which this lomem was compiled for (set TORCH_CUDA_ARCH_LIST and build it again)";
}

}  // namespace lomem::detail
