#include "memory.h"

#include <algorithm>
#include <map>
#include <memory>

namespace emulator {

namespace {

std::map<std::uint64_t, std::unique_ptr<Allocation>>& allocations() {
  static auto& instance = *new std::map<std::uint64_t, std::unique_ptr<Allocation>>;
  return instance;
}

}  // namespace

void add_allocation(std::uint64_t address, std::int64_t size, bool written) {
  auto allocation = std::make_unique<Allocation>();
  allocation->begin = address;
  allocation->size = size;
  allocation->written.assign(size, written ? 1 : 0);
  allocations()[address] = std::move(allocation);
}

bool remove_allocation(std::uint64_t address) {
  return allocations().erase(address) == 1;
}

Allocation* find_allocation(std::uint64_t address) {
  const auto after = allocations().upper_bound(address);
  if (after == allocations().begin()) {
    return nullptr;
  }
  Allocation* allocation = std::prev(after)->second.get();
  return allocation->contains(address) ? allocation : nullptr;
}

std::string describe_allocation_before(std::uint64_t address) {
  const auto after = allocations().upper_bound(address);
  if (after == allocations().begin()) {
    return ", before all allocations";
  }
  const Allocation& allocation = *std::prev(after)->second;
  const auto offset = static_cast<std::int64_t>(address - allocation.begin);
  const std::string size = std::to_string(allocation.size) + " bytes";
  if (offset < allocation.size) {
    return ", across the end of an allocation of " + size;
  }
  return ", " + std::to_string(offset - allocation.size) + " bytes past the end of an allocation of " + size;
}

void mark_written(std::uint64_t address, std::int64_t size, bool written) {
  Allocation* allocation = size > 0 ? find_allocation(address) : nullptr;
  if (allocation == nullptr) {
    return;
  }
  const auto begin = static_cast<std::int64_t>(address - allocation->begin);
  std::fill_n(allocation->written.begin() + begin, std::min(size, allocation->size - begin), written ? 1 : 0);
}

void copy_written(std::uint64_t to, std::uint64_t from, std::int64_t size) {
  Allocation* target = size > 0 ? find_allocation(to) : nullptr;
  const Allocation* source = size > 0 ? find_allocation(from) : nullptr;
  if (target == nullptr || source == nullptr) {
    mark_written(to, size, true);
    return;
  }
  const std::vector<std::uint8_t> written(
      source->written.begin() + static_cast<std::ptrdiff_t>(from - source->begin),
      source->written.begin() + static_cast<std::ptrdiff_t>(from - source->begin) + size);
  std::copy(written.begin(), written.end(), target->written.begin() + static_cast<std::ptrdiff_t>(to - target->begin));
}

std::uint64_t allocate_variable(const std::vector<std::uint8_t>& bytes) {
  auto* memory = static_cast<std::uint8_t*>(::operator new(bytes.size() + 16, std::align_val_t{256}));
  std::copy(bytes.begin(), bytes.end(), memory);
  const auto address = reinterpret_cast<std::uint64_t>(memory);
  add_allocation(address, static_cast<std::int64_t>(bytes.size()), true);
  return address;
}

}  // namespace emulator
