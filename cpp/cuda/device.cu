// Queries of the device and the build, used by the launchers.
#include <lomem/cuda/kernels.h>

#include "device.h"

namespace lomem::cuda {

const char* compiled_archs() {
  return LOMEM_CUDA_ARCHS;
}

int multiprocessor_count() {
  int device = 0;
  int count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

}  // namespace lomem::cuda
