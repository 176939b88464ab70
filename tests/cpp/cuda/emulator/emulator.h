// An emulator of a GPU, for tests: kernels that nvcc compiled to PTX run on the CPU under their own launchers.
//
// A program is linked with this library in place of the CUDA runtime. Its kernels must be compiled to PTX that is not
// compressed:
//
//     nvcc -c -gencode arch=compute_90,code=compute_90 -no-compress -lineinfo kernel.cu
//
// What a body on the host (lomem/cuda/launch.cuh) cannot show is executed: conversions by hardware, packed comparisons,
// vector accesses, shuffles, barriers, shared memory, device assertions, launches. Every access is checked (faults.h).
//
// What is not executed: machine code, that is, ptxas and its register allocation. ex2.approx, lg2.approx and rcp.approx
// are rounded correctly, so erf, exp and tanh may differ from a GPU's in the last bit. There are no atomics, dynamic
// shared memory, grids of more than one dimension, textures or calls, except of __assertfail.
// Loading a module that contains an unknown instruction fails and names its line. Streams run at once, in the order of
// the calls, so work of two streams that nothing orders is not noticed; nor is a host that reads memory of the device.
//
// Some rules are stricter than CUDA's: a shuffle's mask names living lanes only, and what a block writes to global
// memory it does not read again in the same launch.
//
// Environment variables:
//   LOMEM_EMULATOR_ARCH              compute capability of the device: 80 for 8.0. Default: 90. Of several versions
//                                    of a kernel, the newest that the device can run is executed.
//   LOMEM_EMULATOR_MULTIPROCESSORS   of the device. Default: 2
//   LOMEM_EMULATOR_SEED              shuffles the order of blocks and warps; 0: ascending. Default: 1
//   LOMEM_EMULATOR_HOST_MEMORY=1     kernels may access memory that cudaMalloc did not return, without checks
//   LOMEM_EMULATOR_RACES=0           no search for races in global memory, which halves the time of large tests
//   LOMEM_EMULATOR_COVERAGE=FILE     writes, at exit, the instructions of each kernel that were not executed
#pragma once

#include <string>
#include <vector>

#include "execution.h"
#include "faults.h"

namespace emulator {

/// Every kernel of the program, launched or not.
struct KernelCounts {
  std::string name;
  Counts counts;
};
std::vector<KernelCounts> kernels();
void reset_counts();

/// cudaMemset with this byte makes memory unwritten, as it is after cudaMalloc. Default: none.
void set_unwritten_byte(int byte);

/// Sets the number of multiprocessors, overriding the environment.
void set_multiprocessors(int count);

/// Forgets faults, and the error that a fault leaves behind, after which a device would have to be reset.
void recover();

}  // namespace emulator
