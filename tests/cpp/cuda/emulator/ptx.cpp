#include "ptx.h"

namespace emulator {

int size_of(Type type) {
  switch (type) {
    case Type::u16:
    case Type::s16:
    case Type::b16:
    case Type::f16:
    case Type::bf16: return 2;
    case Type::u32:
    case Type::s32:
    case Type::b32:
    case Type::f32:
    case Type::f16x2:
    case Type::bf16x2: return 4;
    case Type::u64:
    case Type::s64:
    case Type::b64:
    case Type::f64: return 8;
    default: return 1;
  }
}

bool is_signed(Type type) {
  return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}

bool is_float(Type type) {
  return type == Type::f16 || type == Type::bf16 || type == Type::f32 || type == Type::f64;
}

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
