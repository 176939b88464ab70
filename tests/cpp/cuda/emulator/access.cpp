// Loads and stores.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>

#include "block.h"

namespace emulator {

namespace {

constexpr int max_bytes = 16;

std::string hexadecimal(std::uint64_t x) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "0x%llx", static_cast<unsigned long long>(x));
  return text.data();
}

}  // namespace

/// The access of one lane. Masks are of the elements of its vector.
struct Block::Access {
  const Instruction& instruction;
  int lane;
  std::uint32_t thread;  // in the block
  std::uint64_t address;
  int bytes;
  int element;
  bool load;
  std::uint8_t* buffer;  // what is stored, or was loaded
  Mask undefined = 0;    // of a store: elements that nothing defined; of a load: elements that nothing wrote

  /// Whether it lies in a space of this many bytes. (The sum of address and size would wrap around just before 0.)
  bool is_within(std::int64_t size) const {
    return bytes <= size && address <= static_cast<std::uint64_t>(size - bytes);
  }
  bool is_undefined(int byte) const {
    return (undefined >> (byte / element) & 1U) != 0;
  }
  void set_undefined(int byte) {
    undefined |= Mask{1} << (byte / element);
  }
  std::string describe() const {
    return std::string(load ? "load" : "store") + " of " + std::to_string(bytes) + " bytes by thread " +
           std::to_string(thread);
  }
};

void Block::access(Warp& warp, const Instruction& i, Mask mask) {
  const bool load = i.op == Op::ld;
  const int element = size_of(i.type);
  const int bytes = element * i.vector;
  const std::uint64_t* base = read(warp, i.operand[0]);
  if ((undefined(warp, i.operand[0]) & mask) != 0) {
    fault(Fault::undefined_address, i, "the address comes from a register that nothing wrote");
  }
  // The sum has the register's width: the offset may wrap back what a negative distance wrapped around in 32 bits.
  const int width = i.operand[0].constant ? 8 : size_of(kernel_.registers[i.operand[0].index]);
  std::uint64_t addresses[lanes];
  for_lanes(mask, [&](int l) { addresses[l] = truncated(base[l] + static_cast<std::uint64_t>(i.offset), width); });
  if (i.space == Space::global || i.space == Space::generic) {
    count_global(mask, addresses, bytes, load);
  }
  if (i.space == Space::shared) {
    count_shared(mask, addresses, bytes);
  }
  if (i.space == Space::local) {
    ++counts_.local_accesses;
  }

  alignas(max_bytes) std::uint8_t buffers[lanes][max_bytes];
  Mask undefined_lanes[4] = {};
  if (!load) {
    for (int k = 0; k < i.vector; ++k) {
      const std::uint64_t* values = read(warp, i.operand[1 + k]);
      undefined_lanes[k] = undefined(warp, i.operand[1 + k]);
      for_lanes(mask, [&](int l) { std::memcpy(buffers[l] + k * element, &values[l], element); });
    }
  }
  // Parameters are at the same address for all lanes: one reads, the others copy.
  const Mask accessing = i.space == Space::param && i.operand[0].constant ? mask & (~mask + 1) : mask;
  for (Mask rest = accessing; rest != 0; rest &= rest - 1) {
    const int l = std::countr_zero(rest);
    Access one{i, l, static_cast<std::uint32_t>(warp.first_thread + l), addresses[l], bytes, element, load, buffers[l]};
    if (!load) {
      for (int k = 0; k < i.vector; ++k) {
        one.undefined |= (undefined_lanes[k] >> l & 1U) << k;
      }
    }
    if (addresses[l] % static_cast<unsigned>(bytes) != 0) {
      fault(Fault::misaligned, i, one.describe() + " at " + hexadecimal(addresses[l]), Status::misaligned);
      return;
    }
    bool done = false;
    switch (i.space) {
      case Space::param: done = access_parameters(one); break;
      case Space::local: done = access_local(one, warp); break;
      case Space::shared: done = access_shared(one); break;
      default: done = access_global(one);
    }
    if (!done) {
      return;
    }
    if (load) {
      for (int k = 0; k < i.vector; ++k) {
        undefined_lanes[k] |= (one.undefined >> k & 1U) << l;
      }
    }
  }
  if (!load) {
    return;
  }
  for (Mask rest = mask & ~accessing; rest != 0; rest &= rest - 1) {
    std::memcpy(buffers[std::countr_zero(rest)], buffers[std::countr_zero(accessing)], bytes);
  }
  for (int k = 0; k < i.vector; ++k) {
    if (i.result[k].index < 0) {
      continue;
    }
    std::uint64_t* result = write(warp, i, mask, undefined_lanes[k], k);
    const int width = size_of(kernel_.registers[i.result[k].index]);
    for_lanes(mask, [&](int l) {
      std::uint64_t x = 0;
      std::memcpy(&x, buffers[l] + k * element, element);
      // A register wider than what is loaded is filled with the sign.
      result[l] = is_signed(i.type) ? truncated(static_cast<std::uint64_t>(sign_extended(x, element)), width) : x;
    });
  }
}

bool Block::access_parameters(Access& x) {
  if (!x.is_within(kernel_.parameter_bytes)) {
    fault(
        Fault::out_of_bounds, x.instruction, x.describe() + " at " + std::to_string(x.address) + " of the parameters",
        Status::illegal_address);
    return false;
  }
  std::memcpy(x.buffer, parameters_ + x.address, x.bytes);
  return true;
}

bool Block::access_local(Access& x, Warp& warp) {
  if (!x.is_within(kernel_.local_bytes)) {
    fault(
        Fault::out_of_bounds, x.instruction, x.describe() + " at " + std::to_string(x.address) + " of local memory",
        Status::illegal_address);
    return false;
  }
  const std::size_t begin = x.lane * kernel_.local_bytes + x.address;
  for (int n = 0; n < x.bytes; ++n) {
    if (x.load) {
      x.buffer[n] = warp.local[begin + n];
      if (warp.local_written[begin + n] == 0) {
        x.set_undefined(n);
      }
    } else {
      warp.local[begin + n] = x.buffer[n];
      warp.local_written[begin + n] = x.is_undefined(n) ? 0 : 1;
    }
  }
  return true;
}

bool Block::access_shared(Access& x) {
  if (!x.is_within(kernel_.shared_bytes)) {
    fault(
        Fault::out_of_bounds, x.instruction,
        x.describe() + " at " + std::to_string(x.address) + " of " + std::to_string(kernel_.shared_bytes) +
            " bytes of shared memory",
        Status::illegal_address);
    return false;
  }
  const std::uint32_t me = x.thread + 1;
  std::uint64_t raced = x.bytes;  // the first byte
  for (int n = x.bytes - 1; n >= 0; --n) {
    const std::uint64_t at = x.address + n;
    SharedByte& shadow = shared_shadow_[at];
    const bool other_wrote = shadow.writer_epoch == epoch_ && shadow.writer != me;
    const bool other_read = shadow.reader_epoch == epoch_ && shadow.reader != me;
    if (other_wrote || (!x.load && other_read)) {
      raced = n;
    }
    if (x.load) {
      x.buffer[n] = shared_[at];
      if (!shadow.written) {
        x.set_undefined(n);
      }
      shadow.reader = other_read ? static_cast<std::uint32_t>(several_threads) : me;
      shadow.reader_epoch = epoch_;
    } else {
      shared_[at] = x.buffer[n];
      shadow.writer = me;
      shadow.writer_epoch = epoch_;
      shadow.written = !x.is_undefined(n);
    }
  }
  if (raced < static_cast<std::uint64_t>(x.bytes)) {
    fault(
        Fault::shared_race, x.instruction,
        x.describe() + " at byte " + std::to_string(x.address + raced) + ", which another thread " +
            (x.load ? "wrote" : "accessed") + " since the last barrier");
  }
  return true;
}

bool Block::access_global(Access& x) {
  Allocation* allocation = last_allocation_;
  if (allocation == nullptr || !allocation->contains(x.address)) {
    allocation = find_allocation(x.address);
    if (allocation == nullptr && options().host_memory && x.address >= 4096) {
      auto* memory = reinterpret_cast<void*>(x.address);
      std::memcpy(x.load ? x.buffer : memory, x.load ? memory : x.buffer, x.bytes);
      return true;
    }
    last_allocation_ = allocation;
  }
  if (allocation == nullptr || !allocation->contains(x.address + x.bytes - 1)) {
    fault(
        Fault::out_of_bounds, x.instruction,
        x.describe() + " at " + hexadecimal(x.address) + describe_allocation_before(x.address),
        Status::illegal_address);
    return false;
  }
  const auto offset = static_cast<std::int64_t>(x.address - allocation->begin);
  if (options().races) {
    find_race(x, *allocation, offset);
  }
  auto* memory = reinterpret_cast<void*>(x.address);
  std::uint8_t* written = allocation->written.data() + offset;
  if (x.load) {
    std::memcpy(x.buffer, memory, x.bytes);
    const std::uint8_t* unwritten = std::find(written, written + x.bytes, 0);
    if (unwritten != written + x.bytes) {
      for (int n = 0; n < x.bytes; ++n) {
        if (written[n] == 0) {
          x.set_undefined(n);
        }
      }
      const std::int64_t at = offset + (unwritten - written);
      fault(
          Fault::uninitialized, x.instruction,
          x.describe() + ": nothing wrote byte " + std::to_string(at) + " of " + std::to_string(allocation->size));
    }
  } else {
    std::memcpy(memory, x.buffer, x.bytes);
    std::fill_n(written, x.bytes, 1);
    if (x.undefined != 0) {
      fault(Fault::undefined_value, x.instruction, x.describe() + ": the value comes from what nothing wrote");
    }
  }
  return true;
}

void Block::find_race(Access& x, Allocation& allocation, std::int64_t offset) {
  if (allocation.writer.empty()) {
    allocation.writer.resize(allocation.size);
    allocation.reader.resize(allocation.size);
  }
  const std::uint64_t thread = block_ * threads_ + x.thread;
  const std::uint64_t me = launch_ << 32 | ((thread + 1) & 0xffffffffU);
  std::int64_t raced = -1;
  bool stale = false;
  for (int n = x.bytes - 1; n >= 0; --n) {
    std::uint64_t& writer = allocation.writer[offset + n];
    std::uint64_t& reader = allocation.reader[offset + n];
    const bool other_wrote = writer >> 32 == launch_ && writer != me;
    const bool other_read = reader >> 32 == launch_ && reader != me;
    if (other_wrote || (!x.load && other_read)) {
      raced = offset + n;
    }
    if (x.load) {
      stale |= x.instruction.read_only && writer >> 32 == launch_;
      reader = other_read ? launch_ << 32 | several_threads : me;
    } else {
      writer = me;
    }
  }
  if (stale && raced < 0) {
    fault(
        Fault::global_race, x.instruction,
        x.describe() + " through the read-only cache (.nc) of memory that this launch wrote");
  }
  if (raced >= 0) {
    fault(
        Fault::global_race, x.instruction,
        x.describe() + " at byte " + std::to_string(raced) + ", which another thread of the grid " +
            (x.load ? "wrote" : "accessed"));
  }
}

void Block::count_global(Mask mask, const std::uint64_t* addresses, int bytes, bool load) {
  std::uint64_t sectors[lanes];
  std::uint64_t* end = sectors;
  for_lanes(mask, [&](int l) {
    const std::uint64_t sector = addresses[l] / 32;
    if (end == sectors || end[-1] != sector) {
      *end++ = sector;
    }
  });
  std::sort(sectors, end);
  const auto distinct = static_cast<std::uint64_t>(std::unique(sectors, end) - sectors);
  const auto requested = static_cast<std::uint64_t>(std::popcount(mask) * bytes);
  const Range& small = options().small;
  if (mask != 0 && sectors[0] * 32 >= small.begin && sectors[0] * 32 < small.end) {
    counts_.small_bytes += requested;
    counts_.small_sectors += distinct;
    return;
  }
  ++(load ? counts_.loads : counts_.stores);
  (load ? counts_.load_bytes : counts_.store_bytes) += requested;
  (load ? counts_.load_sectors : counts_.store_sectors) += distinct;
}

/// An access takes as many wavefronts as the largest number of different words in a bank. Lanes that access 8 bytes are
/// served by half warps, 16 bytes by quarters.
void Block::count_shared(Mask mask, const std::uint64_t* addresses, int bytes) {
  ++counts_.shared_accesses;
  constexpr int banks = 32;
  const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < lanes; first += group) {
    std::array<std::array<std::uint64_t, lanes>, banks> words;  // the different ones of each bank
    std::array<int, banks> count{};
    for (int l = first; l < first + group; ++l) {
      for (int byte = 0; byte < bytes && (mask >> l & 1U) != 0; byte += 4) {
        const std::uint64_t word = (addresses[l] + byte) / 4;
        auto& of_bank = words[word % banks];
        int& n = count[word % banks];
        if (std::find(of_bank.begin(), of_bank.begin() + n, word) == of_bank.begin() + n) {
          of_bank[n++] = word;
        }
      }
    }
    counts_.shared_wavefronts += static_cast<std::uint64_t>(*std::max_element(count.begin(), count.end()));
  }
}

}  // namespace emulator
