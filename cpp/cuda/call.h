// How the ops call CUDA kernels. They use only torch's device-independent interface, and the CUDA runtime is linked
// statically: this library needs no symbol of torch's CUDA libraries, so it builds against, and loads with, every build
// of torch.
#ifndef LOMEM_CUDA_CALL_H  // not #pragma once: tests/cpp/cuda/on_host.cpp substitutes its own header
#define LOMEM_CUDA_CALL_H

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <lomem/cuda/kernels.h>

#include "errors.h"

namespace lomem::detail {

/// Makes a tensor's device current, for allocations and launches.
class CudaScope {
 public:
  explicit CudaScope(const at::Tensor& tensor) : guard_(check(tensor.device())) {
    // The guard informs torch's copy of the CUDA runtime; this call informs the copy in this library. A failure
    // surfaces at the launch.
    cudaSetDevice(tensor.device().index());
  }

 private:
  static c10::Device check(c10::Device device) {
    TORCH_CHECK(device.is_cuda(), "lomem: a CUDA kernel was called with a tensor on ", device, ", expected cuda");
    return device;
  }
  c10::DeviceGuard guard_;
};

/// torch's current stream on the device of a tensor.
inline cudaStream_t current_stream(const at::Tensor& tensor) {
  const c10::impl::VirtualGuardImpl implementation(tensor.device().type());
  return static_cast<cudaStream_t>(implementation.getStream(tensor.device()).native_handle());
}

/// Raises if a launch failed.
inline void check_launch(const char* op, const at::Tensor& tensor, cudaError_t error) {
  if (error == cudaSuccess) {
    return;
  }
  if (is_unsupported_gpu(error)) {
    const int index = tensor.device().index();
    int major = 0;
    int minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    TORCH_CHECK(false, unsupported_gpu_message(op, tensor.device().str(), major, minor, cuda::compiled_archs()));
  }
  TORCH_CHECK(false, op, ": CUDA error on ", tensor.device(), ": ", cudaGetErrorString(error));
}

}  // namespace lomem::detail

#endif
