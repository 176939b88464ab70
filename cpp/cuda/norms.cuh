// The launchers of the norms, instantiated in two files so that they compile in parallel.
#pragma once

#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm_plan.h>

#include "device.h"

namespace lomem::cuda {

template <Norm norm>
cudaError_t norm_forward(const NormForward& args, std::int64_t rows, cudaStream_t stream) {
  return run_norm_forward<norm>(args, rows, DeviceRunner{stream, 0});
}

template <Norm norm>
cudaError_t norm_backward(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, cudaStream_t stream) {
  return run_norm_backward<norm>(args, rows, parameters, DeviceRunner{stream, multiprocessor_count()});
}

}  // namespace lomem::cuda
