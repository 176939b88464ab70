// The current device.
#pragma once

namespace lomem::cuda {

/// Its number of multiprocessors; 1 where there is no device, for which launches then fail.
int multiprocessor_count();

}  // namespace lomem::cuda
