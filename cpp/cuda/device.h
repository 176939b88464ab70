// The current device.
#pragma once

namespace lomem::cuda {

/// Number of multiprocessors of the current device, or 1 if there is no device, in which case launches fail.
int multiprocessor_count();

}  // namespace lomem::cuda
