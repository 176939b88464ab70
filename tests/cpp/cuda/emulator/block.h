// Execution of the blocks of a launch, a warp at a time.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "execution.h"
#include "faults.h"
#include "memory.h"
#include "numbers.h"

namespace emulator {

/// Lanes of a warp that are at the same instruction.
struct Flow {
  int at;
  Mask mask;
};

struct Warp {
  int first_thread = 0;
  std::vector<std::uint64_t> registers;  // 32 lanes each
  std::vector<Mask> undefined;           // lanes whose value is undefined: never written, or computed from such a value
  std::vector<Flow> flows;               // ascending; not those at a barrier
  std::vector<Flow> at_barrier;          // with the instruction after the barrier
  Mask living = 0;
  Mask waiting = 0;
  std::vector<std::uint8_t> local;
  std::vector<std::uint8_t> local_written;
  std::uint64_t argument = 0;  // the first one of a call
};

/// Threads are numbered from 1, and 0 means none. A new epoch starts at every barrier.
struct SharedByte {
  std::uint32_t writer = 0;
  std::uint32_t writer_epoch = 0;
  std::uint32_t reader = 0;
  std::uint32_t reader_epoch = 0;
  bool written = false;
};

class Block {
 public:
  Block(
      Kernel& kernel, std::uint64_t launch, std::uint64_t blocks, unsigned threads, const std::uint8_t* parameters,
      Counts& counts);

  /// Executes a block of the grid. `random`, if there is one, shuffles the order of its warps.
  Status execute(std::uint64_t block, std::mt19937* random);

 private:
  struct Access;

  void reset();
  bool leave_barrier();
  void run_warp(Warp& warp);
  void run_flow(Warp& warp, Flow flow, bool forced);
  bool waits(const Warp& warp, const Flow& flow) const;
  void reach_barrier(Warp& warp, const Instruction& i, Flow flow);
  Mask condition(const Warp& warp, const Instruction& i, Mask mask);

  void execute(Warp& warp, const Instruction& i, Mask mask);
  void compute_one(Warp& warp, const Instruction& i, Mask mask);
  void read_special(Warp& warp, const Instruction& i, Mask mask);
  void select(Warp& warp, const Instruction& i, Mask mask);
  void pack(Warp& warp, const Instruction& i, Mask mask);
  void unpack(Warp& warp, const Instruction& i, Mask mask);
  void shuffle(Warp& warp, const Instruction& i, Mask mask);
  void access(Warp& warp, const Instruction& i, Mask mask);
  bool access_parameters(Access& access);
  bool access_local(Access& access, Warp& warp);
  bool access_shared(Access& access);
  bool access_global(Access& access);
  void find_race(Access& access, Allocation& allocation, std::int64_t offset);

  void count(const Instruction& i, Mask mask, const Warp& warp);
  void count_global(Mask mask, const std::uint64_t* addresses, int bytes, bool load);
  void count_shared(Mask mask, const std::uint64_t* addresses, int bytes);

  const std::uint64_t* read(const Warp& warp, const Operand& operand) const;
  Mask undefined(const Warp& warp, const Operand& operand) const;
  /// The register of a result. Its lanes in `mask` are undefined where `undefined_lanes` says so.
  std::uint64_t* write(Warp& warp, const Instruction& i, Mask mask, Mask undefined_lanes, int which = 0);
  void fault(Fault fault, const Instruction& i, const std::string& what, Status status = Status::ok);

  Kernel& kernel_;
  const std::uint64_t launch_;
  const std::uint64_t blocks_;
  const unsigned threads_;
  const std::uint8_t* parameters_;
  Counts& counts_;
  std::vector<Warp> warps_;
  std::vector<std::uint8_t> shared_;
  std::vector<SharedByte> shared_shadow_;
  std::uint64_t block_ = 0;
  std::uint32_t epoch_ = 1;
  Status status_ = Status::ok;
  Allocation* last_allocation_ = nullptr;
};

}  // namespace emulator
