#include "ptx.h"

namespace emulator {

const char* name_of(Op op) {
  static const std::array<const char*, static_cast<std::size_t>(Op::count)> names = {
      "mov",    "pack",     "unpack", "special", "cvta", "add",      "sub", "mul.lo",   "mul.wide", "mul.hi",
      "mad.lo", "mad.wide", "div",    "rem",     "shl",  "shr",      "and", "or",       "xor",      "not",
      "neg",    "abs",      "min",    "max",     "popc", "bfi",      "bfe", "prmt",     "setp",     "set",
      "selp",   "cvt",      "fma",    "rcp",     "sqrt", "ex2",      "lg2", "copysign", "ld",       "st",
      "shfl",   "bar",      "bra",    "ret",     "trap", "argument", "call"};
  return names.at(static_cast<std::size_t>(op));
}

}  // namespace emulator
