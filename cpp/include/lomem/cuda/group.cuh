// Groups of threads that work together: a warp or a block.
//
// A group executes a `Work`, an object that is passed to the kernel by value, with
//     using C                                      type of the sums: float or double
//     struct State                                 what a thread keeps in registers
//     void operator()(int64_t i, Group&) const     processes item i with one group
//     static constexpr bool by_warps, by_blocks    group types it supports
// A group has `threads` and
//     sum<count>(phase)   runs phase(thread, State&) -> Sums in every thread; returns the sum over all threads
//     each(phase)         runs phase(thread, State&) in every thread
// Sums are added in a fixed order: within each warp by halving distances, then over the warps in the same way.
#pragma once

#include <lomem/config.h>

#include <cstdint>
#include <memory>

namespace lomem::cuda {

inline constexpr int warp_size = 32;
inline constexpr int max_block_threads = 512;
inline constexpr int max_block_warps = max_block_threads / warp_size;

/// One or two numbers that a group adds up together.
template <class C, int count>
struct Sums {
  C values[count];

  LOMEM_HOST_DEVICE C& operator[](int i) {
    return values[i];
  }
  LOMEM_HOST_DEVICE const C& operator[](int i) const {
    return values[i];
  }
  LOMEM_HOST_DEVICE Sums operator+(const Sums& other) const {
    Sums result;
    for (int i = 0; i < count; ++i) {
      result[i] = values[i] + other[i];
    }
    return result;
  }
};

/// A group of `threads`, a multiple of 32, executed by one host thread. For tests. (Marked for the device as well
/// because its callers are, although nothing calls it there.)
template <class State>
struct HostGroup {
  static constexpr int max_threads = max_block_threads;

  explicit HostGroup(int threads_) : threads(threads_) {}

  template <int count, class Phase>
  LOMEM_HOST_DEVICE auto sum(const Phase& phase) {
    decltype(phase(0, states[0])) values[max_threads];
    for (int thread = 0; thread < threads; ++thread) {
      values[thread] = phase(thread, states[thread]);
    }
    const int warps = threads / warp_size;
    for (int warp = 0; warp < warps; ++warp) {
      values[warp] = halve<warp_size>(values + warp * warp_size);
    }
    for (int warp = warps; warp < max_block_warps; ++warp) {
      values[warp] = {};
    }
    return warps == 1 ? values[0] : halve<max_block_warps>(values);
  }

  template <class Phase>
  LOMEM_HOST_DEVICE void each(const Phase& phase) {
    for (int thread = 0; thread < threads; ++thread) {
      phase(thread, states[thread]);
    }
  }

  int threads;

 private:
  template <int size, class Values>
  LOMEM_HOST_DEVICE static Values halve(Values* values) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) {
        values[lane] = values[lane] + values[lane + distance];
      }
    }
    return values[0];
  }

  State states[max_threads];
};

/// Executes `count` items of work on the CPU. For tests.
template <class Work>
void execute_groups_on_host(const Work& work, std::int64_t count, int threads) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto group = std::make_unique<HostGroup<typename Work::State>>(threads);
    work(i, *group);
  }
}

#if defined(__CUDACC__)

/// Sum over each `size` lanes of a warp, returned to all of them.
template <int size = warp_size, class C, int count>
__device__ Sums<C, count> warp_sum(Sums<C, count> sums) {
  for (int distance = size / 2; distance > 0; distance /= 2) {
    Sums<C, count> other;
    for (int i = 0; i < count; ++i) {
      other[i] = __shfl_xor_sync(0xffffffffu, sums[i], distance);
    }
    sums = sums + other;
  }
  return sums;
}

/// A warp.
template <class State>
struct WarpGroup {
  static constexpr int threads = warp_size;

  template <int count, class Phase>
  __device__ auto sum(const Phase& phase) {
    return warp_sum(phase(thread(), state));
  }
  template <class Phase>
  __device__ void each(const Phase& phase) {
    phase(thread(), state);
  }

  State state;

 private:
  __device__ static int thread() {
    return static_cast<int>(threadIdx.x) % warp_size;
  }
};

/// A block. At most one per kernel; all threads of the block must call sum().
template <class State, class C>
struct BlockGroup {
  __device__ BlockGroup() : threads(static_cast<int>(blockDim.x)) {}

  template <int count, class Phase>
  __device__ auto sum(const Phase& phase) {
    static_assert(count <= 2);
    // Two buffers are used in turn, so that one barrier per sum is enough: a thread that reads one buffer has passed
    // the barrier of the other.
    __shared__ Sums<C, 2> buffers[2][max_block_warps];
    const int thread = static_cast<int>(threadIdx.x);
    auto sums = warp_sum(phase(thread, state));
    auto& buffer = buffers[turn];
    turn ^= 1;
    if (thread % warp_size == 0) {
      for (int i = 0; i < count; ++i) {
        buffer[thread / warp_size][i] = sums[i];
      }
    }
    __syncthreads();
    // Both halves of a warp add the sums of all warps, so that every thread gets the result.
    const int warp = thread % max_block_warps;
    for (int i = 0; i < count; ++i) {
      sums[i] = warp < threads / warp_size ? buffer[warp][i] : C(0);
    }
    return warp_sum<max_block_warps>(sums);
  }
  template <class Phase>
  __device__ void each(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), state);
  }

  int threads;
  State state;

 private:
  int turn = 0;
};

inline constexpr int warps_per_block = 4;

// (launch.cuh explains the second launch bound.)
template <class Work>
__global__ void __launch_bounds__(warps_per_block* warp_size, 2)
    warps_kernel(const __grid_constant__ Work work, std::int64_t count) {
  const std::int64_t i = std::int64_t{blockIdx.x} * warps_per_block + threadIdx.x / warp_size;
  if (i < count) {  // the same for all threads of a warp
    WarpGroup<typename Work::State> group;
    work(i, group);
  }
}

template <class Work>
__global__ void __launch_bounds__(max_block_threads, 1) blocks_kernel(const __grid_constant__ Work work) {
  BlockGroup<typename Work::State, typename Work::C> group;
  work(static_cast<std::int64_t>(blockIdx.x), group);
}

/// Launches `count` > 0 items of work for groups of `threads`: a warp, or a block of up to max_block_threads. If the
/// work does not support warps, or blocks, no kernel is compiled for them, and launching them is an error.
template <class Work>
cudaError_t launch_groups(const Work& work, std::int64_t count, int threads, cudaStream_t stream) {
  if constexpr (Work::by_warps) {
    if (threads == warp_size) {
      const std::int64_t blocks = (count + warps_per_block - 1) / warps_per_block;
      warps_kernel<<<static_cast<unsigned>(blocks), warps_per_block * warp_size, 0, stream>>>(work, count);
      return cudaGetLastError();
    }
  }
  if constexpr (Work::by_blocks) {
    blocks_kernel<<<static_cast<unsigned>(count), static_cast<unsigned>(threads), 0, stream>>>(work);
    return cudaGetLastError();
  }
  return cudaErrorInvalidConfiguration;
}

#endif

}  // namespace lomem::cuda
