// From a body to a kernel.
//
// A body is an object that is passed to the kernel by value, with
//     struct Shared                                            what the threads of a block share
//     int64_t blocks() const                                   0 where there is nothing to do
//     void prepare(int64_t block, int thread, Shared&) const   fills it; then the block synchronises
//     void operator()(int64_t block, int thread, const Shared&) const
// Threads exchange nothing else: executing all blocks and threads one after the other, on the CPU,
// gives the same result.
#pragma once

#include <lomem/config.h>

#include <cstdint>
#include <type_traits>

namespace lomem::cuda {

inline constexpr int threads_per_block = 256;

/// What a body with nothing to share has as Shared.
struct Nothing {};

/// Executes a body on the CPU, for tests.
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

// Without the second number the compiler spills registers to reach an occupancy of its own choice.
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

/// Launches body.blocks() blocks, or nothing where there is no work.
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
