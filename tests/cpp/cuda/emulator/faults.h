// Faults of kernels: what a GPU would not report, or late.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ptx.h"

namespace emulator {

enum class Fault : std::uint8_t {
  out_of_bounds,        // an access outside of all allocations, of the block's shared memory, of parameters
  misaligned,           // an access at an address that is not a multiple of its size
  uninitialized,        // a read of global memory that nothing wrote
  undefined_value,      // a store of a value that comes from memory or a register that nothing wrote
  undefined_address,    // an address computed from such a value
  undefined_predicate,  // a branch or predicate computed from such a value
  global_race,          // two threads of a launch access a byte of global memory, and one writes it
  shared_race,          // the same in shared memory, between two barriers
  barrier_missed,       // threads of a block end without reaching the barrier that others wait at
  barrier_places,       // threads of a block wait at different barriers
  barrier_diverged,     // lanes of a warp reach a barrier apart
  shuffle_missed,       // lanes of the mask do not take part in the shuffle
  shuffle_masks,        // lanes of a shuffle disagree on the mask, or are not in it
  shuffle_source,       // a read from a lane that does not take part
  shuffle_deadlock,     // lanes of the mask wait at different shuffles
  division_by_zero,     // of integers
  assertion,            // a failed assert
  trap,                 // a trap instruction
  count
};
const char* name_of(Fault fault);

/// "file.cu:12".
std::string name_of(const Module& module, Place place);

struct Report {
  Fault fault;
  std::string text;  // the fault, kernel, block, line of the PTX and of the source, what happened
};

void report(
    Fault fault, const Kernel& kernel, const Instruction& instruction, std::uint64_t block, const std::string& what);

/// Number of faults since the last clear_faults.
std::uint64_t fault_count();
/// The first reports of each fault at each instruction: see Options::reports_per_instruction.
const std::vector<Report>& faults();
void clear_faults();

}  // namespace emulator
