#include "block.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace emulator {

namespace {

Mask lanes_of(unsigned threads, int first) {
  const int count = std::min(lanes, static_cast<int>(threads) - first);
  return count == lanes ? all_lanes : (Mask{1} << count) - 1;
}

void add_flow(std::vector<Flow>& flows, Flow flow) {
  if (flow.mask == 0) {
    return;
  }
  const auto at =
      std::lower_bound(flows.begin(), flows.end(), flow.at, [](const Flow& f, int place) { return f.at < place; });
  if (at != flows.end() && at->at == flow.at) {
    at->mask |= flow.mask;
  } else {
    flows.insert(at, flow);
  }
}

}  // namespace

Block::Block(
    Kernel& kernel, std::uint64_t launch, std::uint64_t blocks, unsigned threads, const std::uint8_t* parameters,
    Counts& counts)
    : kernel_(kernel), launch_(launch), blocks_(blocks), threads_(threads), parameters_(parameters), counts_(counts) {
  shared_.resize(kernel.shared_bytes);
  shared_shadow_.resize(kernel.shared_bytes);
  warps_.resize((threads + lanes - 1) / lanes);
  for (std::size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    warp.first_thread = static_cast<int>(w) * lanes;
    warp.registers.resize(kernel.registers.size() * lanes);
    warp.undefined.resize(kernel.registers.size());
    warp.local.resize(kernel.local_bytes * lanes);
    warp.local_written.resize(kernel.local_bytes * lanes);
  }
}

// Nothing that a block finds is 0 by chance.
void Block::reset() {
  epoch_ = 1;
  status_ = Status::ok;
  std::fill(shared_.begin(), shared_.end(), 0xcd);
  std::fill(shared_shadow_.begin(), shared_shadow_.end(), SharedByte{});
  for (Warp& warp : warps_) {
    std::fill(warp.undefined.begin(), warp.undefined.end(), all_lanes);
    std::fill(warp.registers.begin(), warp.registers.end(), 0xcdcdcdcdcdcdcdcdU);
    std::fill(warp.local.begin(), warp.local.end(), 0xcd);
    std::fill(warp.local_written.begin(), warp.local_written.end(), 0);
    warp.living = lanes_of(threads_, warp.first_thread);
    warp.waiting = 0;
    warp.at_barrier.clear();
    warp.flows = {{0, warp.living}};
  }
}

Status Block::execute(std::uint64_t block, std::mt19937* random) {
  block_ = block;
  reset();
  std::vector<Warp*> order;
  for (Warp& warp : warps_) {
    order.push_back(&warp);
  }
  do {
    if (random != nullptr) {
      std::shuffle(order.begin(), order.end(), *random);
    }
    for (Warp* warp : order) {
      run_warp(*warp);
      if (status_ != Status::ok) {
        return status_;
      }
    }
  } while (leave_barrier());
  return status_;
}

/// When every warp has ended or waits at a barrier: lets them go on. Returns whether any waited.
bool Block::leave_barrier() {
  std::set<int> places;
  int ended = 0;
  for (const Warp& warp : warps_) {
    ended += std::popcount(lanes_of(threads_, warp.first_thread) & ~warp.waiting);
    for (const Flow& flow : warp.at_barrier) {
      places.insert(flow.at - 1);
    }
  }
  if (places.empty()) {
    return false;
  }
  ++counts_.barriers;
  const Instruction& barrier = kernel_.code[*places.begin()];
  if (ended > 0) {
    fault(
        Fault::barrier_missed, barrier,
        std::to_string(ended) + " threads of the block end without reaching the barrier");
  }
  if (places.size() > 1) {
    fault(
        Fault::barrier_places, barrier, "threads of the block wait at " + std::to_string(places.size()) + " barriers");
  }
  for (Warp& warp : warps_) {
    if (warp.at_barrier.size() > 1) {
      fault(Fault::barrier_diverged, barrier, "lanes of a warp wait at different barriers");
    }
    for (const Flow& flow : warp.at_barrier) {
      add_flow(warp.flows, flow);
    }
    warp.at_barrier.clear();
    warp.waiting = 0;
  }
  ++epoch_;
  return true;
}

void Block::fault(Fault fault, const Instruction& i, const std::string& what, Status status) {
  if (status_ == Status::ok) {
    status_ = status;
  }
  report(fault, kernel_, i, block_, what);
}

const std::uint64_t* Block::read(const Warp& warp, const Operand& operand) const {
  const std::vector<std::uint64_t>& values = operand.constant ? kernel_.constants : warp.registers;
  return &values[static_cast<std::size_t>(operand.index) * lanes];
}

Mask Block::undefined(const Warp& warp, const Operand& operand) const {
  return operand.constant ? 0 : warp.undefined[operand.index];
}

std::uint64_t* Block::write(Warp& warp, const Instruction& i, Mask mask, Mask undefined_lanes, int which) {
  const auto index = static_cast<std::size_t>(i.result[which].index);
  warp.undefined[index] = (warp.undefined[index] & ~mask) | (undefined_lanes & mask);
  return &warp.registers[index * lanes];
}

// Control flow: the flow that is furthest behind runs first, and flows join where they meet. -------------------------

void Block::run_warp(Warp& warp) {
  while (!warp.flows.empty()) {
    auto next = std::find_if(warp.flows.begin(), warp.flows.end(), [&](const Flow& f) { return !waits(warp, f); });
    const bool forced = next == warp.flows.end();
    if (forced) {
      next = std::find_if(
          warp.flows.begin(), warp.flows.end(), [&](const Flow& f) { return kernel_.code[f.at].op == Op::bar; });
    }
    if (next == warp.flows.end()) {
      const Instruction& i = kernel_.code[warp.flows[0].at];
      fault(Fault::shuffle_deadlock, i, "lanes of the mask never arrive at the shuffle", Status::deadlock);
      return;
    }
    const Flow flow = *next;
    warp.flows.erase(next);
    run_flow(warp, flow, forced);
    if (status_ != Status::ok) {
      return;
    }
  }
}

/// Whether lanes that a shuffle names, or for a barrier any lanes of the warp, are still elsewhere.
bool Block::waits(const Warp& warp, const Flow& flow) const {
  const Instruction& i = kernel_.code[flow.at];
  if (i.op != Op::shfl && i.op != Op::bar) {
    return false;
  }
  Mask named = i.op == Op::bar ? all_lanes : 0;
  if (i.op == Op::shfl) {
    const std::uint64_t* masks = read(warp, i.operand[3]);
    for_lanes(flow.mask, [&](int l) { named |= static_cast<Mask>(masks[l]); });
  }
  return (named & warp.living & ~warp.waiting & ~flow.mask) != 0;
}

/// Lanes of the flow for which the instruction's predicate holds.
Mask Block::condition(const Warp& warp, const Instruction& i, Mask mask) {
  if (i.predicate < 0) {
    return mask;
  }
  if ((warp.undefined[i.predicate] & mask) != 0) {
    fault(Fault::undefined_predicate, i, "the condition comes from a register that nothing wrote");
  }
  const std::uint64_t* values = &warp.registers[static_cast<std::size_t>(i.predicate) * lanes];
  Mask holds = 0;
  for (int l = 0; l < lanes; ++l) {
    holds |= static_cast<Mask>(values[l] & 1U) << l;
  }
  return mask & (i.predicate_negated ? ~holds : holds);
}

void Block::reach_barrier(Warp& warp, const Instruction& i, Flow flow) {
  for (const Flow& other : warp.at_barrier) {
    if (other.at == flow.at) {
      fault(Fault::barrier_diverged, i, "lanes of a warp reach the barrier apart");
    }
  }
  add_flow(warp.at_barrier, flow);
  warp.waiting |= flow.mask;
}

/// Runs a flow until it ends, waits, splits, or is no longer the one to run.
void Block::run_flow(Warp& warp, Flow flow, bool forced) {
  for (;; ++flow.at, forced = false) {
    const auto runs_before = [&](const Flow& other) {
      return other.at == flow.at || (other.at < flow.at && !waits(warp, other));
    };
    const bool other = !forced && std::any_of(warp.flows.begin(), warp.flows.end(), runs_before);
    if (other || (!forced && !warp.flows.empty() && waits(warp, flow))) {
      add_flow(warp.flows, flow);
      return;
    }
    const Instruction& i = kernel_.code[flow.at];
    ++kernel_.executed[flow.at];
    count(i, flow.mask, warp);
    const Mask mask = condition(warp, i, flow.mask);
    const Mask rest = flow.mask & ~mask;
    switch (i.op) {
      case Op::bra:
        if (rest == 0) {
          flow.at = i.target - 1;
          continue;
        }
        if (mask == 0) {
          continue;
        }
        add_flow(warp.flows, {i.target, mask});
        add_flow(warp.flows, {flow.at + 1, rest});
        return;
      case Op::ret:
        warp.living &= ~mask;
        flow.mask = rest;
        break;
      case Op::bar:
        if (mask != 0) {
          reach_barrier(warp, i, {flow.at + 1, mask});
        }
        flow.mask = rest;
        break;
      case Op::call:
        if (mask != 0) {
          const auto* message = reinterpret_cast<const char*>(warp.argument);
          fault(Fault::assertion, i, message != nullptr ? message : "(without a message)", Status::assertion);
        }
        break;
      case Op::trap:
        if (mask != 0) {
          fault(Fault::trap, i, "a trap instruction was reached", Status::trap);
        }
        break;
      default:
        if (mask != 0) {
          execute(warp, i, mask);
        }
    }
    if (status_ != Status::ok || flow.mask == 0) {
      return;
    }
  }
}

// Instructions --------------------------------------------------------------------------------------------------------

void Block::execute(Warp& warp, const Instruction& i, Mask mask) {
  switch (i.op) {
    case Op::ld:
    case Op::st: access(warp, i, mask); return;
    case Op::shfl: shuffle(warp, i, mask); return;
    case Op::special: read_special(warp, i, mask); return;
    case Op::selp: select(warp, i, mask); return;
    case Op::pack: pack(warp, i, mask); return;
    case Op::unpack: unpack(warp, i, mask); return;
    case Op::argument:
      if (i.offset == 0 && read(warp, i.operand[0])[0] == 0) {
        warp.argument = read(warp, i.operand[1])[std::countr_zero(mask)];
      }
      return;
    default: compute_one(warp, i, mask);
  }
}

void Block::compute_one(Warp& warp, const Instruction& i, Mask mask) {
  Operands operands{};
  Mask undefined_lanes = 0;
  const auto take = [&](int k) -> const std::uint64_t* {
    if (k >= i.operands) {
      return nullptr;
    }
    undefined_lanes |= undefined(warp, i.operand[k]);
    return read(warp, i.operand[k]);
  };
  operands = {take(0), take(1), take(2), take(3)};
  if (i.type == Type::pred && (i.op == Op::bit_and || i.op == Op::bit_or)) {
    // One operand may decide: the compiler computes a condition that C++ would not.
    const std::uint64_t decides = i.op == Op::bit_or ? 1 : 0;
    for_lanes(mask, [&](int l) {
      for (int k = 0; k < 2; ++k) {
        const std::uint64_t* x = k == 0 ? operands.a : operands.b;
        if ((undefined(warp, i.operand[k]) >> l & 1U) == 0 && (x[l] & 1U) == decides) {
          undefined_lanes &= ~(Mask{1} << l);
        }
      }
    });
  }
  const Mask by_zero = compute(i, mask, operands, write(warp, i, mask, undefined_lanes));
  if (by_zero != 0) {
    fault(Fault::division_by_zero, i, std::to_string(std::popcount(by_zero)) + " lanes divide an integer by zero");
  }
}

void Block::read_special(Warp& warp, const Instruction& i, Mask mask) {
  std::uint64_t* result = write(warp, i, mask, 0);
  for_lanes(mask, [&](int l) {
    switch (i.special) {
      case Special::thread: result[l] = static_cast<std::uint64_t>(warp.first_thread + l); break;
      case Special::block_size: result[l] = threads_; break;
      case Special::block: result[l] = block_; break;
      case Special::grid_size: result[l] = blocks_; break;
      case Special::lane: result[l] = static_cast<std::uint64_t>(l); break;
      case Special::warp: result[l] = static_cast<std::uint64_t>(warp.first_thread / lanes); break;
    }
  });
}

/// selp: the operand that is not chosen may be undefined.
void Block::select(Warp& warp, const Instruction& i, Mask mask) {
  const std::uint64_t* a = read(warp, i.operand[0]);
  const std::uint64_t* b = read(warp, i.operand[1]);
  const std::uint64_t* chosen = read(warp, i.operand[2]);
  const Mask undefined_a = undefined(warp, i.operand[0]);
  const Mask undefined_b = undefined(warp, i.operand[1]);
  Mask undefined_lanes = undefined(warp, i.operand[2]);
  for_lanes(
      mask, [&](int l) { undefined_lanes |= ((chosen[l] & 1U) != 0 ? undefined_a : undefined_b) & Mask{1} << l; });
  std::uint64_t* result = write(warp, i, mask, undefined_lanes);
  for_lanes(mask, [&](int l) { result[l] = (chosen[l] & 1U) != 0 ? a[l] : b[l]; });
}

void Block::pack(Warp& warp, const Instruction& i, Mask mask) {
  const int part = size_of(i.type) / i.operands;
  std::uint64_t packed[lanes] = {};
  Mask undefined_lanes = 0;
  for (int k = 0; k < i.operands; ++k) {
    const std::uint64_t* values = read(warp, i.operand[k]);
    undefined_lanes |= undefined(warp, i.operand[k]);
    for_lanes(mask, [&](int l) { packed[l] |= truncated(values[l], part) << (8 * part * k); });
  }
  std::uint64_t* result = write(warp, i, mask, undefined_lanes);
  for_lanes(mask, [&](int l) { result[l] = packed[l]; });
}

void Block::unpack(Warp& warp, const Instruction& i, Mask mask) {
  const int part = size_of(i.type) / i.results;
  std::uint64_t packed[lanes];
  std::memcpy(packed, read(warp, i.operand[0]), sizeof(packed));
  const Mask undefined_lanes = undefined(warp, i.operand[0]);
  for (int k = 0; k < i.results; ++k) {
    if (i.result[k].index < 0) {
      continue;
    }
    std::uint64_t* result = write(warp, i, mask, undefined_lanes, k);
    for_lanes(mask, [&](int l) { result[l] = truncated(packed[l] >> (8 * part * k), part); });
  }
}

void Block::shuffle(Warp& warp, const Instruction& i, Mask mask) {
  std::uint64_t values[lanes];
  std::memcpy(values, read(warp, i.operand[0]), sizeof(values));
  const std::uint64_t* distances = read(warp, i.operand[1]);
  const std::uint64_t* limits = read(warp, i.operand[2]);
  const std::uint64_t* masks = read(warp, i.operand[3]);
  const Mask undefined_values = undefined(warp, i.operand[0]);
  Mask named = 0;
  for_lanes(mask, [&](int l) { named |= static_cast<Mask>(masks[l]); });
  const Mask missing = named & ~mask;
  if (missing != 0) {
    fault(Fault::shuffle_missed, i, std::to_string(std::popcount(missing)) + " lanes of the mask do not take part");
  }
  std::uint64_t received[lanes] = {};
  Mask valid = 0;
  const Mask undefined_operands =
      undefined(warp, i.operand[1]) | undefined(warp, i.operand[2]) | undefined(warp, i.operand[3]);
  Mask undefined_lanes = undefined_operands;
  for_lanes(mask, [&](int l) {
    const auto mine = static_cast<Mask>(masks[l]);
    for_lanes(mine & mask, [&](int other) {
      if (static_cast<Mask>(masks[other]) != mine) {
        fault(Fault::shuffle_masks, i, "lanes give different masks");
      }
    });
    if ((mine >> l & 1U) == 0) {
      fault(Fault::shuffle_masks, i, "a lane is not in its own mask");
    }
    // As in the PTX manual: lanes are in segments, and a source outside of the lane's own is replaced by the lane.
    const int distance = static_cast<int>(distances[l] & 31U);
    const int clamp = static_cast<int>(limits[l] & 31U);
    const int segment = static_cast<int>(limits[l] >> 8 & 31U);
    const int first = l & segment;
    const int last = first | (clamp & ~segment);
    int source = 0;
    bool inside = false;
    switch (i.shuffle) {
      case Shuffle::up: source = l - distance, inside = source >= last; break;
      case Shuffle::down: source = l + distance, inside = source <= last; break;
      case Shuffle::bfly: source = l ^ distance, inside = source <= last; break;
      case Shuffle::idx: source = first | (distance & ~segment), inside = source <= last; break;
    }
    if (!inside) {
      source = l;
    }
    if ((mask & mine & Mask{1} << source) == 0) {
      fault(Fault::shuffle_source, i, "reads from a lane that does not take part");
    }
    undefined_lanes |= (undefined_values >> source & 1U) << l;
    received[l] = values[source];
    valid |= static_cast<Mask>(inside) << l;
  });
  std::uint64_t* result = write(warp, i, mask, undefined_lanes);
  for_lanes(mask, [&](int l) { result[l] = received[l]; });
  if (i.results > 1) {
    std::uint64_t* predicate = write(warp, i, mask, undefined_operands, 1);
    for_lanes(mask, [&](int l) { predicate[l] = valid >> l & 1U; });
  }
}

void Block::count(const Instruction& i, Mask mask, const Warp& warp) {
  ++counts_.warp_instructions;
  counts_.thread_instructions += static_cast<std::uint64_t>(std::popcount(mask));
  if (mask != warp.living) {
    ++counts_.divergent;
  }
  if (i.type == Type::f64 || i.operand_type == Type::f64) {
    ++counts_.float64;
  }
  switch (i.op) {
    case Op::bra: ++counts_.branches; break;
    case Op::div:
    case Op::rem:
    case Op::sqrt: ++counts_.divisions; break;
    case Op::rcp: ++(i.approximate ? counts_.special_functions : counts_.divisions); break;
    case Op::ex2:
    case Op::lg2: ++counts_.special_functions; break;
    case Op::cvt: ++counts_.conversions; break;
    case Op::shfl: ++counts_.shuffles; break;
    default: break;
  }
}

// Launches ------------------------------------------------------------------------------------------------------------

Options& options() {
  static Options instance;
  return instance;
}

Counts& operator+=(Counts& sum, const Counts& other) {
  static_assert(sizeof(Counts) % sizeof(std::uint64_t) == 0);
  auto* to = reinterpret_cast<std::uint64_t*>(&sum);
  const auto* from = reinterpret_cast<const std::uint64_t*>(&other);
  for (std::size_t k = 0; k < sizeof(Counts) / sizeof(std::uint64_t); ++k) {
    to[k] += from[k];
  }
  return sum;
}

Status run(Kernel& kernel, std::uint64_t blocks, unsigned threads, const std::uint8_t* parameters, Counts& counts) {
  static std::uint64_t launch = 0;
  ++launch;
  ++counts.launches;
  counts.blocks += blocks;
  counts.threads += blocks * threads;
  if (!options().execute) {
    return Status::ok;
  }
  const std::uint64_t some =
      options().some_blocks != 0 ? std::min<std::uint64_t>(options().some_blocks, blocks) : blocks;
  std::vector<std::uint64_t> order;
  for (std::uint64_t k = 0; k < some; ++k) {
    const bool one_by_one = some == blocks || options().first_blocks;
    order.push_back(one_by_one ? k : k * (blocks - 1) / std::max<std::uint64_t>(some - 1, 1));
  }
  std::mt19937 random(options().seed);
  std::mt19937* source = options().seed != 0 ? &random : nullptr;
  if (source != nullptr) {
    std::shuffle(order.begin(), order.end(), *source);
  }
  Block executor(kernel, launch, blocks, threads, parameters, counts);
  for (const std::uint64_t block : order) {
    ++counts.executed_blocks;
    const Status status = executor.execute(block, source);
    if (status != Status::ok) {
      return status;
    }
  }
  return Status::ok;
}

}  // namespace emulator
