#include "faults.h"

#include <array>
#include <cstdio>
#include <map>
#include <tuple>

#include "execution.h"

namespace emulator {

namespace {

struct Reports {
  std::uint64_t count = 0;
  std::vector<Report> kept;
  std::map<std::tuple<Fault, const Kernel*, int>, unsigned> per_instruction;
};

Reports& reports() {
  static auto& instance = *new Reports;
  return instance;
}

}  // namespace

std::string name_of(const Module& module, Place place) {
  const auto file = static_cast<std::size_t>(place.file);
  return (file < module.files.size() ? module.files[file] : "?") + ":" + std::to_string(place.line);
}

const char* name_of(Fault fault) {
  static const std::array<const char*, static_cast<std::size_t>(Fault::count)> names = {
      "out of bounds",
      "misaligned",
      "uninitialized",
      "undefined value",
      "undefined address",
      "undefined predicate",
      "race in global memory",
      "race in shared memory",
      "missed barrier",
      "different barriers",
      "diverged barrier",
      "missed shuffle",
      "shuffle masks",
      "shuffle source",
      "shuffle deadlock",
      "division by zero",
      "assertion",
      "trap"};
  return names.at(static_cast<std::size_t>(fault));
}

void report(Fault fault, const Kernel& kernel, const Instruction& i, std::uint64_t block, const std::string& what) {
  ++reports().count;
  if (++reports().per_instruction[{fault, &kernel, i.line}] > options().reports_per_instruction) {
    return;
  }
  std::string where = kernel.module->name + ":" + std::to_string(i.line);
  if (i.source.line > 0) {
    where += " (" + name_of(*kernel.module, i.source);
    if (i.source.file != i.caller.file || i.source.line != i.caller.line) {
      where += ", called at " + name_of(*kernel.module, i.caller);
    }
    where += ")";
  }
  std::string text = std::string(name_of(fault)) + ": " + kernel.name + ", block " + std::to_string(block) + ", " +
                     where + ": " + what;
  std::fprintf(stderr, "emulator: %s\n", text.c_str());
  reports().kept.push_back({fault, std::move(text)});
}

std::uint64_t fault_count() {
  return reports().count;
}

const std::vector<Report>& faults() {
  return reports().kept;
}

void clear_faults() {
  reports() = {};
}

}  // namespace emulator
