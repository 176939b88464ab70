// Turns a body into a kernel.
//
// A body is an object that is passed to the kernel by value, with
//     struct Shared                                            data shared by the threads of a block
//     int64_t blocks() const                                   0 if there is no work
//     void prepare(int64_t block, int thread, Shared&) const   fills Shared; then the block synchronizes
//     void operator()(int64_t block, int thread, const Shared&) const
// Threads exchange no other data, so executing all blocks and threads one after the other on the CPU gives the same
// result.
#pragma once

#include <lomem/config.h>

#include <cstdint>
#include <type_traits>

namespace lomem::cuda {

inline constexpr int threads_per_block = 256;

/// Shared of a body that shares no data.
struct Nothing {};

/// Executes a body on the CPU. For tests.
template <class Body>
void execute_on_host(const Body& body) {
  const std::int64_t blocks = body.blocks();
  for (std::int64_t block = 0; block < blocks; ++block) {
    typename Body::Shared shared;
    for (int thread = 0; thread < threads_per_block; ++thread) {
      body.prepare(block, thread, shared);
    }
    for (int thread = 0; thread < threads_per_block; ++thread) {
      body(block, thread, shared);
    }
  }
}

#if defined(__CUDACC__)

// Without the second launch bound, the compiler spills registers to reach an occupancy that it chose itself.
template <class Body>
__global__ void __launch_bounds__(threads_per_block, 2) body_kernel(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t block = blockIdx.x;
  body.prepare(block, thread, shared);
  if constexpr (!std::is_same_v<typename Body::Shared, Nothing>) {
    __syncthreads();
  }
  body(block, thread, shared);
}

/// Launches body.blocks() blocks, or nothing if there is no work.
template <class Body>
cudaError_t launch(const Body& body, cudaStream_t stream) {
  const std::int64_t blocks = body.blocks();
  if (blocks == 0) {
    return cudaSuccess;
  }
  body_kernel<<<static_cast<unsigned>(blocks), threads_per_block, 0, stream>>>(body);
  return cudaGetLastError();
}

#endif

}  // namespace lomem::cuda
