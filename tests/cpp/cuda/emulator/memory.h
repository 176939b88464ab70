// Global memory with shadows: what was written, and by which threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

/// A range of memory. The shadows tell, for every byte, whether it was written, and which thread of which launch wrote
/// or read it last.
struct Allocation {
  std::uint64_t begin = 0;
  std::int64_t size = 0;
  std::vector<std::uint8_t> written;
  // launch << 32 | thread + 1. Several readers: see several_threads.
  std::vector<std::uint64_t> writer;
  std::vector<std::uint64_t> reader;

  bool contains(std::uint64_t address) const {
    return address >= begin && address < begin + static_cast<std::uint64_t>(size);
  }
};

constexpr std::uint64_t several_threads = 0xffffffffU;

void add_allocation(std::uint64_t address, std::int64_t size, bool written);
/// Returns whether there is one at the address.
bool remove_allocation(std::uint64_t address);
/// The allocation that contains an address, or nullptr.
Allocation* find_allocation(std::uint64_t address);
/// Where an address lies that is in no allocation: ", 4 bytes past the end of an allocation of 256 bytes".
std::string describe_allocation_before(std::uint64_t address);
/// After a copy: memory copied from the device is as written as its source, memory from the host is written.
void copy_written(std::uint64_t to, std::uint64_t from, std::int64_t size);
void mark_written(std::uint64_t address, std::int64_t size, bool written);

/// Memory for a variable of a module, never freed. Returns its address.
std::uint64_t allocate_variable(const std::vector<std::uint8_t>& bytes);

}  // namespace emulator
