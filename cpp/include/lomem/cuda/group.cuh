// Groups of threads that work on a row together: see norm.cuh for what they run.
//
// A group has `threads` and
//     sum<count>(phase)   runs phase(thread, State&) -> Sums in every thread; returns the sum of all
//     each(phase)         runs phase(thread, State&) in every thread
// Sums are made in a fixed order: within each warp by halving distances, then over the warps in
// the same way.
#pragma once

#include <lomem/config.h>

#include <cstdint>

namespace lomem::cuda {

inline constexpr int warp_size = 32;

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

/// A group of `threads`, a multiple of 32 up to 1024, that one host thread executes. For tests.
template <class State, int max_threads = 1024>
struct HostGroup {
  explicit HostGroup(int threads_) : threads(threads_) {}

  template <int count, class Phase>
  auto sum(const Phase& phase) {
    decltype(phase(0, states[0])) values[max_threads];
    for (int thread = 0; thread < threads; ++thread) {
      values[thread] = phase(thread, states[thread]);
    }
    const int warps = threads / warp_size;
    for (int warp = 0; warp < warps; ++warp) {
      values[warp] = halve(values + warp * warp_size);
    }
    for (int warp = warps; warp < warp_size; ++warp) {
      values[warp] = {};
    }
    return warps == 1 ? values[0] : halve(values);
  }

  template <class Phase>
  void each(const Phase& phase) {
    for (int thread = 0; thread < threads; ++thread) {
      phase(thread, states[thread]);
    }
  }

  int threads;

 private:
  template <class Values>
  static Values halve(Values* values) {
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) {
        values[lane] = values[lane] + values[lane + distance];
      }
    }
    return values[0];
  }

  State states[max_threads];
};

#if defined(__CUDACC__)

/// The sum over a warp, in all its threads.
template <class C, int count>
__device__ Sums<C, count> warp_sum(Sums<C, count> sums) {
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
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

/// A block. One in a kernel; all its threads must call sum().
template <class State, class C>
struct BlockGroup {
  __device__ BlockGroup() : threads(static_cast<int>(blockDim.x)) {}

  template <int count, class Phase>
  __device__ auto sum(const Phase& phase) {
    static_assert(count <= 2);
    // Two buffers in turn, so that one barrier a sum is enough: who reads the one has passed the
    // barrier of the other.
    __shared__ Sums<C, 2> buffers[2][warp_size];
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
    const int lane = thread % warp_size;
    for (int i = 0; i < count; ++i) {
      sums[i] = lane < threads / warp_size ? buffer[lane][i] : C(0);
    }
    return warp_sum(sums);
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

#endif

}  // namespace lomem::cuda
