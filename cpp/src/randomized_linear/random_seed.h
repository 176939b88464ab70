// Seeds of the randomized linear layers: a stream of lomem's own, so that nobody else's random numbers change.
#pragma once

#include <ATen/core/Tensor.h>

namespace lomem::detail {

/// The next seed of the process, 0-d int64 on `device`: made of the initial seed of torch's default CPU generator
/// (which is read, not advanced), of the stream that begin_random_stream or manual_seed began, and of the number of
/// seeds drawn from it. Nothing waits for the device. While a graph is captured, a counter on the device is added and
/// advanced by the graph, so that every replay draws anew.
at::Tensor draw_seed(const char* op, at::Device device);

/// Makes the counter of a device in use, unless there is one: in ordinary memory and before any capture, which would
/// make it, and set it to 0, again and again. Also while torch's modes trace with fake tensors.
void prepare_seeds(at::Device device);

}  // namespace lomem::detail
