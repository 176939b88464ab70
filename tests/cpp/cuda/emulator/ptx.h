// PTX, the assembly that nvcc makes of CUDA kernels, parsed into instructions.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulator {

enum class Type : std::uint8_t {
  none,
  pred,
  u8,
  s8,
  b8,
  u16,
  s16,
  b16,
  u32,
  s32,
  b32,
  u64,
  s64,
  b64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2
};

constexpr int size_of(Type type) {
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

constexpr bool is_signed(Type type) {
  return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}

constexpr bool is_float(Type type) {
  return type == Type::f16 || type == Type::bf16 || type == Type::f32 || type == Type::f64;
}

/// Instructions; `mul.wide` and the like have names of their own. `pack` and `unpack` are `mov` of a vector of
/// registers into one, and back; `special` is `mov` of a special register; `argument` is `st.param`, an argument of a
/// call.
enum class Op : std::uint8_t {
  mov,
  pack,
  unpack,
  special,
  cvta,
  add,
  sub,
  mul_lo,
  mul_wide,
  mul_hi,
  mad_lo,
  mad_wide,
  div,
  rem,
  shl,
  shr,
  bit_and,
  bit_or,
  bit_xor,
  bit_not,
  neg,
  abs,
  min,
  max,
  popc,
  bfi,
  bfe,
  prmt,
  setp,
  set,
  selp,
  cvt,
  fma,
  rcp,
  sqrt,
  ex2,
  lg2,
  copysign,
  ld,
  st,
  shfl,
  bar,
  bra,
  ret,
  trap,
  argument,
  call,
  count
};
const char* name_of(Op op);

enum class Comparison : std::uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
enum class Space : std::uint8_t { generic, global, shared, local, param };
/// rni and the like round to an integral value.
enum class Rounding : std::uint8_t { none, rn, rz, rm, rp, rni, rzi, rmi, rpi };
enum class Shuffle : std::uint8_t { up, down, bfly, idx };
enum class Special : std::uint8_t { thread, block_size, block, grid_size, lane, warp };

/// A register of the kernel, or one of its constants. index < 0: `_`, no operand.
struct Operand {
  bool constant = false;
  int index = -1;
};

/// A place in the source: a number of Module::files, a line.
struct Place {
  int file = 0;
  int line = 0;
};

struct Instruction {
  Op op{};
  Type type = Type::none;          // of the result, or of what is stored
  Type operand_type = Type::none;  // for cvt, setp and set
  Comparison comparison{};
  Space space{};
  Rounding rounding{};
  Shuffle shuffle{};
  Special special{};
  bool ftz = false;  // subnormal numbers are read and written as 0
  bool saturated = false;
  bool approximate = false;
  bool read_only = false;           // of a load: .nc, of memory that nothing writes during the launch
  std::uint8_t register_bytes = 0;  // of the result of cvt, which a sign fills
  std::uint8_t vector = 1;          // number of elements that a load or store transfers
  std::uint8_t results = 0;
  std::uint8_t operands = 0;
  int predicate = -1;  // a register: only lanes in which it is true (or, if negated, false) take part
  bool predicate_negated = false;
  std::array<Operand, 4> result{};
  std::array<Operand, 5> operand{};
  std::int64_t offset = 0;  // of an address; of an argument of a call
  int target = -1;          // of a branch
  int line = 0;             // in the PTX
  Place source;             // from `.loc`
  Place caller;             // the line of the kernel into which its function was inlined
};

struct Parameter {
  std::int64_t offset;
  std::int64_t size;
};

struct Kernel {
  std::string name;
  const struct Module* module = nullptr;
  std::vector<Type> registers;
  std::vector<std::uint64_t> constants;  // each repeated for all lanes
  std::vector<Instruction> code;
  std::vector<Parameter> parameters;
  std::int64_t parameter_bytes = 0;
  std::int64_t shared_bytes = 0;
  std::int64_t local_bytes = 0;  // per thread
  unsigned max_threads = 1024;
  std::vector<std::uint64_t> executed;  // how often a warp executed each instruction
};

struct Module {
  std::string name;
  int arch = 0;  // 90 for sm_90
  std::map<std::string, Kernel> kernels;
  std::vector<std::string> files;                // source files by number
  std::map<std::string, std::uint64_t> globals;  // addresses of the module's variables
};

/// Parses the text of a module. Throws std::runtime_error, with the line, for anything that is not known: no
/// instruction or modifier is skipped. Kernels point to the module, which must not be moved afterwards.
void parse(const std::string& text, const std::string& name, Module& module);

constexpr int lanes = 32;

}  // namespace emulator
