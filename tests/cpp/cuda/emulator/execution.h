// Execution of a kernel.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace emulator {

/// What the warps of all launches did. If only some blocks of a launch are executed, only these count.
struct Counts {
  std::uint64_t launches = 0;
  std::uint64_t blocks = 0;
  std::uint64_t threads = 0;
  std::uint64_t executed_blocks = 0;
  std::uint64_t warp_instructions = 0;
  std::uint64_t thread_instructions = 0;
  std::uint64_t divergent = 0;  // warp instructions in which not all living lanes take part
  std::uint64_t branches = 0;
  std::uint64_t loads = 0;  // from global memory, per warp
  std::uint64_t load_bytes = 0;
  std::uint64_t load_sectors = 0;  // of 32 bytes
  std::uint64_t stores = 0;
  std::uint64_t store_bytes = 0;
  std::uint64_t store_sectors = 0;
  std::uint64_t small_bytes = 0;  // of loads and stores in Options::small, which are not among those above
  std::uint64_t small_sectors = 0;
  std::uint64_t shared_accesses = 0;
  std::uint64_t shared_wavefronts = 0;  // as many as accesses if no two lanes conflict
  std::uint64_t local_accesses = 0;
  std::uint64_t special_functions = 0;  // ex2, lg2, approximate rcp
  std::uint64_t float64 = 0;
  std::uint64_t divisions = 0;  // div, rem, exact rcp and sqrt: each a sequence of machine instructions
  std::uint64_t conversions = 0;
  std::uint64_t shuffles = 0;
  std::uint64_t barriers = 0;
};
Counts& operator+=(Counts& sum, const Counts& other);

/// Addresses in [begin, end).
struct Range {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

struct Options {
  bool execute = true;        // false: launches are counted and checked, not executed
  bool host_memory = false;   // memory outside of all allocations may be accessed, without checks
  bool races = true;          // search for races in global memory
  unsigned seed = 1;          // of the order of blocks and warps; 0: ascending
  unsigned some_blocks = 0;   // of larger grids, so many blocks are executed; 0: all
  bool first_blocks = false;  // some_blocks are the first ones, not evenly spread from the first to the last
  Range small;                // small arrays, which are accessed again and again and come from caches: counted apart
  unsigned reports_per_instruction = 3;
};
Options& options();

enum class Status : std::uint8_t { ok, illegal_address, misaligned, assertion, trap, deadlock };

/// Executes a grid of `blocks` blocks of `threads` threads, and adds to `counts`. `parameters` are the kernel's
/// parameters as a block of memory. Stops at the first fault after which a GPU would not go on.
Status run(Kernel& kernel, std::uint64_t blocks, unsigned threads, const std::uint8_t* parameters, Counts& counts);

}  // namespace emulator
