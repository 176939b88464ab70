// Seeds of the randomized linear layers. lomem has its own stream of seeds, so that no other random numbers change.
#pragma once

#include <ATen/core/Tensor.h>

namespace lomem::detail {

/// The next seed of the process, 0-d int64 on `device`. It is derived from the initial seed of torch's default CPU
/// generator (which is read, not advanced), the stream started by begin_random_stream or manual_seed, and the number of
/// seeds drawn from it. Nothing waits for the device. While a graph is captured, a counter on the device is added, and
/// the graph advances it, so that every replay draws a new seed.
at::Tensor draw_seed(const char* op, at::Device device);

/// Creates the counter of a device in use, unless it exists: in ordinary memory and before any capture, because a
/// capture would allocate it and reset it to 0 at every replay. Also works while torch's modes trace with fake tensors.
void prepare_seeds(at::Device device);

}  // namespace lomem::detail
