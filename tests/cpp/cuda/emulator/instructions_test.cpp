// Every instruction that the emulator executes, with results from the PTX manual and IEEE 754: no CUDA toolkit needed.
#include <gtest/gtest.h>
#include <lomem/core/dtype.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "block.h"

namespace emulator {
namespace {

/// Executes one block of the kernel `k` of a module. Its parameters are the addresses of `input` and of as many bytes
/// of output as given, which are returned.
std::vector<std::uint8_t> run_ptx(
    const std::string& ptx, const std::vector<std::uint8_t>& input, std::size_t output_bytes, unsigned threads = 1) {
  Module module;
  parse(ptx, "test", module);
  alignas(16) static std::uint8_t memory[2][4096];
  std::memcpy(memory[0], input.data(), input.size());
  const std::uint64_t parameters[2] = {
      reinterpret_cast<std::uint64_t>(memory[0]), reinterpret_cast<std::uint64_t>(memory[1])};
  add_allocation(parameters[0], static_cast<std::int64_t>(input.size()), true);
  add_allocation(parameters[1], static_cast<std::int64_t>(output_bytes), false);
  clear_faults();
  Counts counts;
  const Status status =
      run(module.kernels.at("k"), 1, threads, reinterpret_cast<const std::uint8_t*>(parameters), counts);
  EXPECT_EQ(status, Status::ok);
  EXPECT_EQ(fault_count(), 0U);
  remove_allocation(parameters[0]);
  remove_allocation(parameters[1]);
  return {memory[1], memory[1] + output_bytes};
}

std::string kernel(const std::string& body) {
  return ".version 8.0\n.target sm_90\n.address_size 64\n"
         ".visible .entry k(.param .u64 input, .param .u64 output)\n{\n"
         ".reg .b64 %in; .reg .b64 %out;\n"
         "ld.param.u64 %in, [input];\nld.param.u64 %out, [output];\n" +
         body + "\nret;\n}\n";
}

/// An instruction with operands and its result as bits. A register of 8 bits is one of 16 in PTX.
struct Row {
  const char* opcode;
  const char* result_type;
  std::vector<const char*> operand_types;
  std::vector<std::uint64_t> operands;
  std::uint64_t result;
};

std::string register_type(const std::string& type) {
  if (type == "pred") {
    return "pred";
  }
  const std::string size = type.find("x2") != std::string::npos ? "32" : type.substr(type.find_first_of("0123456789"));
  return "b" + (size == "8" ? "16" : size);
}

std::string memory_type(const std::string& type) {
  return type.find("x2") != std::string::npos ? "b32" : "b" + type.substr(type.find_first_of("0123456789"));
}

std::string program_of(const Row& row) {
  std::string body;
  std::string names = "%result";
  for (std::size_t k = 0; k < row.operands.size(); ++k) {
    const std::string type = row.operand_types[k];
    const std::string name = "%x" + std::to_string(k);
    const std::string from = "[%in+" + std::to_string(8 * k) + "]";
    body += ".reg ." + register_type(type) + " " + name + ";\n";
    if (type == "pred") {
      body += ".reg .b32 " + name + "b;\nld.global.b32 " + name + "b, " + from + ";\n";
      body += "setp.ne.u32 " + name + ", " + name + "b, 0;\n";
    } else {
      body += "ld.global." + memory_type(type) + " " + name + ", " + from + ";\n";
    }
    names += ", " + name;
  }
  const std::string type = row.result_type;
  body += ".reg ." + register_type(type) + " %result;\n" + row.opcode + " " + names + ";\n";
  if (type == "pred") {
    return kernel(body + ".reg .b32 %bit;\nselp.u32 %bit, 1, 0, %result;\nst.global.b32 [%out], %bit;");
  }
  return kernel(body + "st.global." + memory_type(type) + " [%out], %result;");
}

std::size_t bytes_of(const std::string& type) {
  return type == "pred" ? 4 : static_cast<std::size_t>(std::stoi(memory_type(type).substr(1))) / 8;
}

constexpr std::uint64_t nan = 0x7fffffff;  // of the GPU, in float32
constexpr std::uint64_t inf = 0x7f800000;
constexpr std::uint64_t minus_inf = 0xff800000;
constexpr std::uint64_t one = 0x3f800000;
constexpr std::uint64_t minus_one = 0xbf800000;
constexpr std::uint64_t two = 0x40000000;
constexpr std::uint64_t three = 0x40400000;
constexpr std::uint64_t third = 0x3eaaaaab;
constexpr std::uint64_t tenth = 0x3dcccccd;
constexpr std::uint64_t root_of_two = 0x3fb504f3;
constexpr std::uint64_t minus_zero = 0x80000000;
constexpr std::uint64_t smallest = 0x00000001;  // subnormal, 2^-149

const std::vector<Row>& rows() {
  static const std::vector<Row> table = {
      // float32 and float64: a rounding to nearest each.
      {"add.f32", "f32", {"f32", "f32"}, {tenth, 0x3e4ccccd}, 0x3e99999a},  // 0.1 + 0.2
      {"add.rn.f32", "f32", {"f32", "f32"}, {one, 0x33800000}, one},        // 1 + 2^-24, a tie
      {"add.f32", "f32", {"f32", "f32"}, {inf, minus_inf}, nan},
      {"add.f32", "f32", {"f32", "f32"}, {smallest, smallest}, 0x00000002},  // not flushed
      {"add.f64", "f64", {"f64", "f64"}, {0x3fb999999999999a, 0x3fc999999999999a}, 0x3fd3333333333334},
      {"sub.f32", "f32", {"f32", "f32"}, {one, tenth}, 0x3f666666},
      {"sub.f64", "f64", {"f64", "f64"}, {0x3ff0000000000000, 0x3fb999999999999a}, 0x3feccccccccccccd},
      {"mul.f32", "f32", {"f32", "f32"}, {tenth, tenth}, 0x3c23d70b},
      {"mul.rn.f64", "f64", {"f64", "f64"}, {0x4008000000000000, 0x3fd5555555555555}, 0x3ff0000000000000},
      {"div.rn.f32", "f32", {"f32", "f32"}, {one, three}, third},
      {"div.rn.f32", "f32", {"f32", "f32"}, {minus_one, 0}, minus_inf},
      {"div.rn.f32", "f32", {"f32", "f32"}, {0, 0}, nan},
      {"div.rn.f64", "f64", {"f64", "f64"}, {0x3ff0000000000000, 0x4008000000000000}, 0x3fd5555555555555},
      {"rcp.rn.f32", "f32", {"f32"}, {three}, third},
      {"rcp.approx.f32", "f32", {"f32"}, {0x00400000}, 0x7f000000},  // 2^-127, not flushed
      {"rcp.approx.f32", "f32", {"f32"}, {0x7f000000}, 0x00400000},
      {"min.f32", "f32", {"f32", "f32"}, {one, nan}, one},
      {"max.f64", "f64", {"f64", "f64"}, {0x3ff0000000000000, 0x7ff8000000000000}, 0x3ff0000000000000},
      {"mad.wide.u16", "u32", {"u16", "u16", "u32"}, {0xffff, 0xffff, 2}, 0xfffe0003},
      {"setp.leu.f32", "pred", {"f32", "f32"}, {one, one}, 1},
      {"setp.neu.f32", "pred", {"f32", "f32"}, {one, one}, 0},
      {"setp.num.f32", "pred", {"f32", "f32"}, {one, nan}, 0},
      {"setp.nan.f32", "pred", {"f32", "f32"}, {one, one}, 0},
      {"setp.lt.s16", "pred", {"s16", "s16"}, {0xffff, 0}, 1},
      {"cvt.sat.f32.f32", "f32", {"f32"}, {minus_one}, 0},
      {"cvt.rzi.u64.f32", "u64", {"f32"}, {0x53800000}, 0x10000000000},  // 2^40
      {"cvt.rzi.u64.f32", "u64", {"f32"}, {minus_one}, 0},
      {"cvt.rzi.s64.f32", "s64", {"f32"}, {nan}, 0x8000000000000000},  // NaN of float64, or to 64 bits: the highest bit
      {"cvt.rzi.s32.f64", "s32", {"f64"}, {0x7ff8000000000000}, 0x80000000},
      {"cvt.rzi.u64.f64", "u64", {"f64"}, {0x7ff8000000000000}, 0x8000000000000000},
      {"rcp.rn.f64", "f64", {"f64"}, {0x4008000000000000}, 0x3fd5555555555555},
      {"rcp.approx.ftz.f32", "f32", {"f32"}, {smallest}, inf},
      {"rcp.approx.ftz.f32", "f32", {"f32"}, {0x7e967699}, 0},  // 1 / 1e38 is subnormal
      {"rcp.approx.ftz.f64", "f64", {"f64"}, {0x4008000000000000}, 0x3fd5555500000000},
      {"sqrt.rn.f32", "f32", {"f32"}, {two}, root_of_two},
      {"sqrt.rn.f32", "f32", {"f32"}, {minus_one}, nan},
      {"sqrt.rn.f64", "f64", {"f64"}, {0x4000000000000000}, 0x3ff6a09e667f3bcd},
      {"ex2.approx.ftz.f32", "f32", {"f32"}, {0x3f000000}, root_of_two},
      {"ex2.approx.ftz.f32", "f32", {"f32"}, {0xc30c0000}, 0},  // 2^-140 is subnormal
      {"ex2.approx.f32", "f32", {"f32"}, {0xc30c0000}, 0x00000200},
      {"lg2.approx.f32", "f32", {"f32"}, {0x41000000}, three},  // of 8
      {"lg2.approx.ftz.f32", "f32", {"f32"}, {smallest}, minus_inf},
      {"lg2.approx.f32", "f32", {"f32"}, {smallest}, 0xc3150000},  // -149
      // (1 + 2^-12)^2 - (1 + 2^-11) = 2^-24: 0 if the product were rounded.
      {"fma.rn.f32", "f32", {"f32", "f32", "f32"}, {0x3f800800, 0x3f800800, 0xbf801000}, 0x33800000},
      {"fma.rn.f64",
       "f64",
       {"f64", "f64", "f64"},
       {0x3ff0000000100000, 0x3ff0000000100000, 0xbff0000000200000},
       0x3bf0000000000000},
      {"fma.rm.f32", "f32", {"f32", "f32", "f32"}, {one, one, 0x30800000}, one},  // 1 + 2^-30
      {"fma.rp.f32", "f32", {"f32", "f32", "f32"}, {one, one, 0x30800000}, one + 1},
      {"fma.rz.f32", "f32", {"f32", "f32", "f32"}, {one, one, 0x30800000}, one},
      {"fma.rm.f32", "f32", {"f32", "f32", "f32"}, {minus_one, one, 0xb0800000}, minus_one + 1},
      {"fma.rz.f32", "f32", {"f32", "f32", "f32"}, {minus_one, one, 0xb0800000}, minus_one},
      {"fma.rp.f64",
       "f64",
       {"f64", "f64", "f64"},
       {0x3ff0000000000000, 0x3ff0000000000000, 0x3000000000000000},
       0x3ff0000000000001},
      {"neg.f32", "f32", {"f32"}, {0}, minus_zero},
      {"neg.f64", "f64", {"f64"}, {0x3ff0000000000000}, 0xbff0000000000000},
      {"abs.f32", "f32", {"f32"}, {minus_inf}, inf},
      {"abs.f64", "f64", {"f64"}, {0xbff0000000000000}, 0x3ff0000000000000},
      {"copysign.f32", "f32", {"f32", "f32"}, {minus_zero, two}, 0xc0000000},
      {"copysign.f64", "f64", {"f64", "f64"}, {0, 0xbff0000000000000}, 0x3ff0000000000000},
      {"min.f32", "f32", {"f32", "f32"}, {nan, one}, one},
      {"min.f32", "f32", {"f32", "f32"}, {0, minus_zero}, minus_zero},
      {"max.f32", "f32", {"f32", "f32"}, {minus_zero, 0}, 0},
      {"max.f32", "f32", {"f32", "f32"}, {nan, nan}, nan},
      {"max.f64", "f64", {"f64", "f64"}, {0xbff0000000000000, 0x3ff0000000000000}, 0x3ff0000000000000},
      // Integers wrap around.
      {"add.s32", "s32", {"s32", "s32"}, {0x7fffffff, 1}, 0x80000000},
      {"add.s64", "s64", {"s64", "s64"}, {0xffffffffffffffff, 2}, 1},
      {"add.s16", "s16", {"s16", "s16"}, {0xffff, 1}, 0},
      {"sub.s32", "s32", {"s32", "s32"}, {0, 1}, 0xffffffff},
      {"mul.lo.s32", "s32", {"s32", "s32"}, {0x10001, 0x10001}, 0x20001},
      {"mul.hi.u32", "u32", {"u32", "u32"}, {0x80000000, 4}, 2},
      {"mul.hi.s32", "s32", {"s32", "s32"}, {0xffffffff, 2}, 0xffffffff},
      {"mul.hi.u64", "u64", {"u64", "u64"}, {0x8000000000000000, 6}, 3},
      {"mul.hi.s64", "s64", {"s64", "s64"}, {0xffffffffffffffff, 2}, 0xffffffffffffffff},
      {"mul.wide.u32", "u64", {"u32", "u32"}, {0xffffffff, 2}, 0x1fffffffe},
      {"mul.wide.s32", "s64", {"s32", "s32"}, {0xffffffff, 2}, 0xfffffffffffffffe},
      {"mul.wide.u16", "u32", {"u16", "u16"}, {0xffff, 0xffff}, 0xfffe0001},
      {"mad.lo.s32", "s32", {"s32", "s32", "s32"}, {3, 4, 0xfffffffb}, 7},
      {"mad.wide.u32", "u64", {"u32", "u32", "u64"}, {0xffffffff, 0xffffffff, 1}, 0xfffffffe00000002},
      {"mad.wide.s32", "s64", {"s32", "s32", "s64"}, {0xffffffff, 3, 5}, 2},
      {"div.s32", "s32", {"s32", "s32"}, {0xfffffff9, 2}, 0xfffffffd},  // -7 / 2 = -3
      {"div.s32", "s32", {"s32", "s32"}, {0x80000000, 0xffffffff}, 0x80000000},
      {"div.u32", "u32", {"u32", "u32"}, {0xfffffff9, 2}, 0x7ffffffc},
      {"div.s64", "s64", {"s64", "s64"}, {0xfffffffffffffff9, 2}, 0xfffffffffffffffd},
      {"rem.s32", "s32", {"s32", "s32"}, {0xfffffff9, 2}, 0xffffffff},
      {"rem.u64", "u64", {"u64", "u64"}, {0xffffffffffffffff, 10}, 5},
      {"neg.s32", "s32", {"s32"}, {5}, 0xfffffffb},
      {"neg.s64", "s64", {"s64"}, {0x8000000000000000}, 0x8000000000000000},
      {"abs.s32", "s32", {"s32"}, {0xfffffffb}, 5},
      {"min.s32", "s32", {"s32", "s32"}, {0xffffffff, 1}, 0xffffffff},
      {"min.u32", "u32", {"u32", "u32"}, {0xffffffff, 1}, 1},
      {"max.s64", "s64", {"s64", "s64"}, {0xffffffffffffffff, 1}, 1},
      {"max.u16", "u16", {"u16", "u16"}, {0xffff, 1}, 0xffff},
      // Bits. A shift by more than the width is one by the width.
      {"shl.b32", "b32", {"b32", "u32"}, {3, 31}, 0x80000000},
      {"shl.b32", "b32", {"b32", "u32"}, {3, 32}, 0},
      {"shl.b64", "b64", {"b64", "u32"}, {3, 40}, 0x30000000000},
      {"shl.b16", "b16", {"b16", "u32"}, {0x8001, 1}, 2},
      {"shr.u32", "u32", {"u32", "u32"}, {0x80000000, 31}, 1},
      {"shr.u32", "u32", {"u32", "u32"}, {0x80000000, 64}, 0},
      {"shr.s32", "s32", {"s32", "u32"}, {0x80000000, 40}, 0xffffffff},
      {"shr.s16", "s16", {"s16", "u32"}, {0x8000, 3}, 0xf000},
      {"shr.u64", "u64", {"u64", "u32"}, {0x8000000000000000, 63}, 1},
      {"and.b32", "b32", {"b32", "b32"}, {0xff00ff00, 0x0ff00ff0}, 0x0f000f00},
      {"or.b64", "b64", {"b64", "b64"}, {0xf0, 0x8000000000000000}, 0x80000000000000f0},
      {"xor.b16", "b16", {"b16", "b16"}, {0xffff, 0x00ff}, 0xff00},
      {"not.b32", "b32", {"b32"}, {0x0f0f0f0f}, 0xf0f0f0f0},
      {"not.b16", "b16", {"b16"}, {0x0ff0}, 0xf00f},
      {"not.pred", "pred", {"pred"}, {1}, 0},
      {"and.pred", "pred", {"pred", "pred"}, {1, 0}, 0},
      {"or.pred", "pred", {"pred", "pred"}, {1, 0}, 1},
      {"xor.pred", "pred", {"pred", "pred"}, {1, 1}, 0},
      {"popc.b32", "u32", {"b32"}, {0xf0f0f0f0}, 16},
      {"bfi.b32", "b32", {"b32", "b32", "u32", "u32"}, {0xab, 0xffffffff, 8, 8}, 0xffffabff},
      {"bfi.b32", "b32", {"b32", "b32", "u32", "u32"}, {0xff, 0, 28, 8}, 0xf0000000},
      {"bfi.b64", "b64", {"b64", "b64", "u32", "u32"}, {0xf, 0, 40, 4}, 0xf0000000000},
      {"bfe.u32", "u32", {"u32", "u32", "u32"}, {0x12345678, 8, 8}, 0x56},
      {"bfe.s32", "s32", {"s32", "u32", "u32"}, {0x0000ff00, 8, 8}, 0xffffffff},
      {"bfe.s32", "s32", {"s32", "u32", "u32"}, {0x80000000, 28, 8}, 0xfffffff8},
      {"bfe.u32", "u32", {"u32", "u32", "u32"}, {0xffffffff, 5, 0}, 0},
      {"bfe.u64", "u64", {"u64", "u32", "u32"}, {0x123456789abcdef0, 32, 16}, 0x5678},
      {"prmt.b32", "b32", {"b32", "b32", "b32"}, {0x33221100, 0x77665544, 0x7250}, 0x77225500},
      {"prmt.b32", "b32", {"b32", "b32", "b32"}, {0x00008000, 0, 0x0189}, 0x008000ff},  // 9: the sign of byte 1
      // Comparisons: NaN is neither less, equal nor greater.
      {"setp.eq.f32", "pred", {"f32", "f32"}, {0, minus_zero}, 1},
      {"setp.ne.f32", "pred", {"f32", "f32"}, {nan, one}, 0},
      {"setp.lt.f32", "pred", {"f32", "f32"}, {minus_one, one}, 1},
      {"setp.le.f32", "pred", {"f32", "f32"}, {one, one}, 1},
      {"setp.gt.f32", "pred", {"f32", "f32"}, {one, one}, 0},
      {"setp.ge.f32", "pred", {"f32", "f32"}, {nan, one}, 0},
      {"setp.equ.f32", "pred", {"f32", "f32"}, {nan, one}, 1},
      {"setp.neu.f32", "pred", {"f32", "f32"}, {nan, one}, 1},
      {"setp.ltu.f32", "pred", {"f32", "f32"}, {nan, one}, 1},
      {"setp.leu.f32", "pred", {"f32", "f32"}, {two, one}, 0},
      {"setp.gtu.f32", "pred", {"f32", "f32"}, {one, two}, 0},
      {"setp.geu.f32", "pred", {"f32", "f32"}, {one, nan}, 1},
      {"setp.num.f32", "pred", {"f32", "f32"}, {one, inf}, 1},
      {"setp.nan.f32", "pred", {"f32", "f32"}, {one, nan}, 1},
      {"setp.lt.f64", "pred", {"f64", "f64"}, {0xbff0000000000000, 0}, 1},
      {"setp.lt.s32", "pred", {"s32", "s32"}, {0xffffffff, 0}, 1},
      {"setp.lt.u32", "pred", {"u32", "u32"}, {0xffffffff, 0}, 0},
      {"setp.hi.u32", "pred", {"u32", "u32"}, {0xffffffff, 0}, 1},
      {"setp.lo.u64", "pred", {"u64", "u64"}, {0, 0x8000000000000000}, 1},
      {"setp.hs.u32", "pred", {"u32", "u32"}, {1, 1}, 1},
      {"setp.ls.u32", "pred", {"u32", "u32"}, {2, 1}, 0},
      {"setp.eq.b16", "pred", {"b16", "b16"}, {0xffff, 0xffff}, 1},
      {"setp.ge.s64", "pred", {"s64", "s64"}, {0, 0x8000000000000000}, 1},
      {"set.gt.u32.f16x2", "u32", {"f16x2", "f16x2"}, {0x40003c00, 0x3c003c00}, 0xffff0000},     // 2 > 1, 1 > 1
      {"set.gt.u32.bf16x2", "u32", {"bf16x2", "bf16x2"}, {0x7fc04000, 0x3f803f80}, 0x0000ffff},  // NaN > 1, 2 > 1
      {"set.leu.u32.bf16x2", "u32", {"bf16x2", "bf16x2"}, {0x7fc04000, 0x3f803f80}, 0xffff0000},
      {"selp.b32", "b32", {"b32", "b32", "pred"}, {5, 6, 1}, 5},
      {"selp.f64", "f64", {"f64", "f64", "pred"}, {5, 6, 0}, 6},
      {"mov.b32", "b32", {"b32"}, {0x12345678}, 0x12345678},
      {"cvta.to.global.u64", "u64", {"u64"}, {0x123456789abc}, 0x123456789abc},
      // Conversions. To a float: to nearest, ties to even. To an integer: clamped, NaN to 0.
      {"cvt.rn.f16.f32", "f16", {"f32"}, {third}, 0x3555},
      {"cvt.rn.f16.f32", "f16", {"f32"}, {0x477fefff}, 0x7bff},  // below 65520
      {"cvt.rn.f16.f32", "f16", {"f32"}, {0x477ff000}, 0x7c00},  // 65520
      {"cvt.rn.f16.f32", "f16", {"f32"}, {0x33000000}, 0},       // 2^-25, a tie
      {"cvt.rn.f16.f32", "f16", {"f32"}, {0xb3000001}, 0x8001},
      {"cvt.rn.f16.f32", "f16", {"f32"}, {0xffc00000}, 0x7fff},
      {"cvt.rn.bf16.f32", "bf16", {"f32"}, {0x3f808000}, 0x3f80},  // ties
      {"cvt.rn.bf16.f32", "bf16", {"f32"}, {0x3f818000}, 0x3f82},
      {"cvt.rn.bf16.f32", "bf16", {"f32"}, {0x7f7fffff}, 0x7f80},
      {"cvt.rn.bf16.f32", "bf16", {"f32"}, {0x7f800001}, 0x7fff},
      {"cvt.f32.f16", "f32", {"f16"}, {0x3555}, 0x3eaaa000},
      {"cvt.f32.f16", "f32", {"f16"}, {0x8001}, 0xb3800000},
      {"cvt.f32.f16", "f32", {"f16"}, {0x7c00}, inf},
      {"cvt.f32.bf16", "f32", {"bf16"}, {0x3f82}, 0x3f820000},
      {"cvt.f64.f32", "f64", {"f32"}, {third}, 0x3fd5555560000000},
      {"cvt.rn.f32.f64", "f32", {"f64"}, {0x3fd5555555555555}, third},
      {"cvt.rni.f32.f32", "f32", {"f32"}, {0x40200000}, two},        // 2.5
      {"cvt.rzi.f32.f32", "f32", {"f32"}, {0xbfc00000}, minus_one},  // -1.5
      {"cvt.rmi.f32.f32", "f32", {"f32"}, {0xbfc00000}, 0xc0000000},
      {"cvt.rpi.f32.f32", "f32", {"f32"}, {0x3fc00000}, two},
      {"cvt.rpi.f64.f64", "f64", {"f64"}, {0x3ff8000000000000}, 0x4000000000000000},
      {"cvt.sat.f32.f32", "f32", {"f32"}, {two}, one},
      {"cvt.sat.f32.f32", "f32", {"f32"}, {nan}, 0},
      {"cvt.rzi.s32.f32", "s32", {"f32"}, {0xbfc00000}, 0xffffffff},
      {"cvt.rni.s32.f32", "s32", {"f32"}, {0x3fc00000}, 2},  // 1.5
      {"cvt.rmi.s32.f32", "s32", {"f32"}, {0xbfc00000}, 0xfffffffe},
      {"cvt.rpi.s32.f32", "s32", {"f32"}, {0xbfc00000}, 0xffffffff},
      {"cvt.rzi.s32.f32", "s32", {"f32"}, {0x501502f9}, 0x7fffffff},  // 1e10
      {"cvt.rzi.s32.f32", "s32", {"f32"}, {minus_inf}, 0x80000000},
      {"cvt.rzi.s64.f64", "s64", {"f64"}, {0xc3e0000000000000}, 0x8000000000000000},
      {"cvt.rzi.u32.f32", "u32", {"f32"}, {minus_one}, 0},
      {"cvt.rzi.u32.f32", "u32", {"f32"}, {inf}, 0xffffffff},
      {"cvt.rzi.s32.f32", "s32", {"f32"}, {nan}, 0},
      {"cvt.rn.f32.s32", "f32", {"s32"}, {0xffffffff}, minus_one},
      {"cvt.rn.f32.u32", "f32", {"u32"}, {0xffffffff}, 0x4f800000},
      {"cvt.rn.f64.s64", "f64", {"s64"}, {0x8000000000000000}, 0xc3e0000000000000},
      {"cvt.rn.f64.u64", "f64", {"u64"}, {0x8000000000000000}, 0x43e0000000000000},
      {"cvt.s64.s32", "s64", {"s32"}, {0x80000000}, 0xffffffff80000000},
      {"cvt.u64.u32", "u64", {"u32"}, {0x80000000}, 0x80000000},
      {"cvt.s32.s8", "s32", {"s8"}, {0x80}, 0xffffff80},
      {"cvt.u16.u32", "u16", {"u32"}, {0x12345678}, 0x5678},
      {"cvt.u8.u32", "u8", {"u32"}, {0x12345678}, 0x78}};
  return table;
}

/// Programs of one warp (64 threads: two) that store a word of 32 bits per thread, %result of thread %t. The input is
/// the words 0, 1, 2, ...
struct Program {
  const char* what;
  unsigned threads;
  std::string body;
  std::vector<std::uint32_t> result;
};

template <class F>
std::vector<std::uint32_t> words(unsigned n, F f) {
  std::vector<std::uint32_t> result;
  for (unsigned k = 0; k < n; ++k) {
    result.push_back(f(k));
  }
  return result;
}

const std::vector<Program>& programs() {
  const auto shuffle = [](const char* mode, int distance, const char* limit) {
    return "shfl.sync." + std::string(mode) + ".b32 %result|%p, %t, " + std::to_string(distance) + ", " + limit +
           ", -1;\nselp.u32 %y, 1000, 0, %p;\nadd.u32 %result, %result, %y;";
  };
  static const std::vector<Program> table = {
      {"special registers", 64,
       "mov.u32 %y, %ntid.x; mad.lo.u32 %result, %y, 10, %t; mov.u32 %y, %ctaid.x; add.u32 %result, %result, %y;"
       "mov.u32 %y, %nctaid.x; add.u32 %result, %result, %y; mov.u32 %y, %laneid; sub.u32 %result, %result, %y;"
       "mov.u32 %y, %warpid; mad.lo.u32 %result, %y, 1000, %result;",
       words(64, [](unsigned t) { return 640 + 1 + t / 32 * 32 + t / 32 * 1000; })},
      {"exchange of lanes", 32, shuffle("bfly", 5, "31"), words(32, [](unsigned t) { return (t ^ 5U) + 1000; })},
      {"shuffle upwards", 32, shuffle("up", 3, "0"), words(32, [](unsigned t) { return t >= 3 ? t - 3 + 1000 : t; })},
      {"shuffle downwards", 32, shuffle("down", 3, "31"),
       words(32, [](unsigned t) { return t < 29 ? t + 3 + 1000 : t; })},
      {"shuffle from one lane of each half", 32, shuffle("idx", 2, "0x101f"),
       words(32, [](unsigned t) { return t / 16 * 16 + 2 + 1000; })},
      {"a loop that lanes leave one by one", 32,
       "mov.u32 %result, 0; mov.u32 %y, 0;\n$again:\nsetp.ge.u32 %p, %y, %t;\n@%p bra $done;\n"
       "add.u32 %result, %result, %y; add.u32 %y, %y, 1;\nbra.uni $again;\n$done:\n",
       words(32, [](unsigned t) { return t == 0 ? 0 : t * (t - 1) / 2; })},
      {"a predicated instruction, negated", 32,
       "mov.u32 %result, 7; setp.lt.u32 %p, %t, 4; @!%p add.u32 %result, %t, 100; @%p mov.u32 %result, 3;",
       words(32, [](unsigned t) { return t < 4 ? 3 : t + 100; })},
      {"lanes that end early", 32,
       "mov.u32 %result, 1; st.global.u32 [%to], %result; setp.lt.u32 %p, %t, 9; @%p ret; mov.u32 %result, 2;",
       words(32, [](unsigned t) { return t < 9 ? 1 : 2; })},
      {"pack and unpack", 32,
       ".reg .b16 %h<2>; .reg .b32 %w<2>; .reg .b64 %d; cvt.u16.u32 %h0, %t; mov.b16 %h1, 7; mov.b32 %w0, {%h0, %h1};"
       "mov.b64 %d, {%w0, %t}; mov.b64 {%w1, _}, %d; mov.b32 {_, %h0}, %w1; cvt.u32.u16 %y, %h0; add.u32 %result, %y, "
       "%w1;",
       words(32, [](unsigned t) { return 7 + 0x70000 + t; })},
      {"shared memory and a barrier", 64,
       ".shared .align 4 .b8 words[256]; .reg .b32 %a; mov.u32 %a, words; shl.b32 %y, %t, 2; add.u32 %a, %a, %y;"
       "st.shared.u32 [%a], %t; bar.sync 0; xor.b32 %y, %y, 252; mov.u32 %a, words; add.u32 %a, %a, %y;"
       "ld.shared.u32 %result, [%a];",
       words(64, [](unsigned t) { return 63 - t; })},
      {"local memory", 32,
       ".local .align 8 .b8 array[16]; .reg .b64 %a; mov.u64 %a, array; st.local.u32 [%a+8], %t; st.local.u32 [%a+4], "
       "5;"
       "ld.local.u32 %result, [%a+8]; ld.local.u32 %y, [%a+4]; add.u32 %result, %result, %y;",
       words(32, [](unsigned t) { return t + 5; })},
      {"vectors", 8,
       ".reg .b32 %v<4>; .reg .b64 %a; mul.wide.u32 %a, %t, 16; add.u64 %a, %a, %in;"
       "ld.global.nc.v4.u32 {%v0, %v1, %v2, %v3}, [%a]; mad.lo.u32 %result, %v3, 10, %v1;",
       words(8, [](unsigned t) { return 10 * (4 * t + 3) + 4 * t + 1; })},
      {"a signed byte fills the register", 8, "st.global.u8 [%to], 0x80; ld.global.s8 %result, [%to];",
       words(8, [](unsigned) { return 0xffffff80U; })},
      {"a shuffle upwards in halves", 32, shuffle("up", 3, "0x1000"),
       words(32, [](unsigned t) { return t % 16 >= 3 ? t - 3 + 1000 : t; })},
      {"a shuffle downwards in halves", 32, shuffle("down", 3, "0x101f"),
       words(32, [](unsigned t) { return t % 16 < 13 ? t + 3 + 1000 : t; })},
      {"an exchange that leaves the lower half", 32, shuffle("bfly", 16, "0x100f"),
       words(32, [](unsigned t) { return t < 16 ? t : t - 16 + 1000; })},
      {"tiles of 16 lanes with masks of their own", 32,
       "mov.u32 %y, 0xffff; setp.ge.u32 %p, %t, 16; @%p mov.u32 %y, 0xffff0000;"
       "shfl.sync.bfly.b32 %result, %t, 1, 31, %y;",
       words(32, [](unsigned t) { return t ^ 1U; })},
      {"a branch that is placed behind the barrier", 64,
       "mov.u32 %result, 0; setp.gt.u32 %p, %t, 20; @%p bra $cold;\n$back: bar.sync 0;\n"
       "add.u32 %result, %result, %t; bra.uni $done;\n$cold: mov.u32 %result, 100; bra.uni $back;\n$done:\n",
       words(64, [](unsigned t) { return t > 20 ? 100 + t : t; })},
      {"an undefined condition that another one decides", 32,
       ".reg .pred %u; .reg .pred %q; setp.lt.u32 %q, %t, 0; and.pred %p, %u, %q; selp.u32 %result, 1, 0, %p;"
       "setp.ge.u32 %q, %t, 0; or.pred %p, %q, %u; selp.u32 %y, 10, 0, %p; add.u32 %result, %result, %y;",
       words(32, [](unsigned) { return 10U; })},
      {"an undefined operand that is not selected", 32,
       ".reg .b32 %u; setp.ge.u32 %p, %t, 0; selp.u32 %result, %t, %u, %p;", words(32, [](unsigned t) { return t; })},
      {"a register of an inner scope", 32,
       ".reg .b32 %x; mov.u32 %x, %t; { .reg .b16 %x; mov.u16 %x, 7; } add.u32 %result, %x, 1;",
       words(32, [](unsigned t) { return t + 1; })},
      {"an argument of a call that hides a parameter", 32,
       "{ .param .b32 input; st.param.b32 [input], %t; } .reg .b64 %a; ld.param.u64 %a, [input]; setp.eq.u64 %p, %a, "
       "%in;"
       "selp.u32 %result, %t, 1000, %p;",
       words(32, [](unsigned t) { return t; })},
      {"an address of shared memory that wraps around", 32,
       ".shared .align 4 .b8 words[256]; .reg .b32 %a; mov.u32 %a, words; shl.b32 %y, %t, 2; add.u32 %a, %a, %y;"
       "st.shared.u32 [%a], %t; bar.sync 0; mov.u32 %a, words; sub.s32 %a, %a, 128; ld.shared.u32 %result, [%a+252];",
       words(32, [](unsigned) { return 31U; })},
      {"a signed result that is narrower than its register", 8, "add.u32 %y, %t, 128; cvt.s8.s32 %result, %y;",
       words(8, [](unsigned t) { return 0xffffff80U + t; })},
      {"a constant array",
       4,
       ".reg .b64 %a; mul.wide.u32 %a, %t, 4; mov.u64 %y64, table; add.u64 %a, %a, %y64; ld.global.u32 %result, [%a];",
       {1, 2, 3, 0xffffffff}},
      {"an assertion that holds", 32,
       "setp.lt.u32 %p, %t, 32; @%p bra $fine; { .param .b64 param0; st.param.b64 [param0], %in;\n"
       "call.uni __assertfail, (param0); } trap;\n$fine: mov.u32 %result, %t;",
       words(32, [](unsigned t) { return t; })}};
  return table;
}

std::string text_of(const Program& program) {
  const std::string text = kernel(
      ".reg .b32 %t; .reg .b32 %y; .reg .b32 %result; .reg .pred %p; .reg .b64 %to; .reg .b64 %y64;\n"
      "mov.u32 %t, %tid.x; mul.wide.u32 %to, %t, 4; add.u64 %to, %to, %out;\n" +
      program.body + "\nst.global.u32 [%to], %result;");
  const std::string table = ".global .align 4 .u32 table[4] = {1, 2, 0x3, -1};\n.visible";
  return std::string(text).replace(text.find(".visible"), 8, table);
}

TEST(Emulator, InstructionsReturnTheExpectedBits) {
  for (const Row& row : rows()) {
    SCOPED_TRACE(program_of(row));
    std::vector<std::uint8_t> input(8 * row.operands.size());
    std::memcpy(input.data(), row.operands.data(), input.size());
    const std::vector<std::uint8_t> output = run_ptx(program_of(row), input, bytes_of(row.result_type));
    std::uint64_t result = 0;
    std::memcpy(&result, output.data(), output.size());
    EXPECT_EQ(result, row.result) << row.opcode;
  }
}

TEST(Emulator, ProgramsReturnTheExpectedWords) {
  const auto numbers = words(64, [](unsigned k) { return k; });
  std::vector<std::uint8_t> input(4 * numbers.size());
  std::memcpy(input.data(), numbers.data(), input.size());
  for (const Program& program : programs()) {
    SCOPED_TRACE(program.what);
    for (const unsigned seed : {0U, 1U, 2U}) {  // the order of the warps
      options().seed = seed;
      const auto output = run_ptx(text_of(program), input, 4 * program.result.size(), program.threads);
      std::vector<std::uint32_t> result(program.result.size());
      std::memcpy(result.data(), output.data(), output.size());
      EXPECT_EQ(result, program.result);
    }
  }
}

TEST(Emulator, EveryInstructionHasATest) {
  std::set<Op> tested;
  const auto add = [&](const std::string& ptx) {
    Module module;
    parse(ptx, "test", module);
    for (const Instruction& i : module.kernels.at("k").code) {
      tested.insert(i.op);
    }
  };
  for (const Row& row : rows()) {
    add(program_of(row));
  }
  for (const Program& program : programs()) {
    add(text_of(program));
  }
  for (int op = 0; op < static_cast<int>(Op::count); ++op) {
    EXPECT_EQ(tested.count(static_cast<Op>(op)), 1U) << name_of(static_cast<Op>(op));
  }
}

/// Conversions of 16-bit types, against the library's own.
template <class T, class To, class From>
void check_conversions(To to_bits, From from_bits) {
  for (std::uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    T value;
    value.bits = static_cast<std::uint16_t>(pattern);
    const float want = lomem::to_compute(value);
    const float got = from_bits(value.bits);
    ASSERT_TRUE(
        std::isnan(want) ? std::isnan(got) : std::bit_cast<std::uint32_t>(got) == std::bit_cast<std::uint32_t>(want))
        << pattern;
    // Numbers on both sides of every value, of the ties between them, and of the next pattern.
    for (std::uint32_t k = 0; k < 0x10000; k += 0x1fff) {
      for (const std::uint32_t near : {pattern << 16 | k, (pattern << 16 | 0x8000U) + k / 0x1fff - 1}) {
        const auto x = std::bit_cast<float>(near);
        if (std::isnan(x)) {
          continue;
        }
        ASSERT_EQ(to_bits(x), lomem::from_compute<T>(x).bits) << x;
      }
    }
  }
}

TEST(Emulator, ConvertsSixteenBitTypesAsTheLibraryDoes) {
  check_conversions<lomem::float16>(to_float16, from_float16);
  check_conversions<lomem::bfloat16>(to_bfloat16, from_bfloat16);
}

/// What is not known must not be skipped.
TEST(Emulator, RefusesWhatItDoesNotKnow) {
  for (const char* statement :
       {"mul24.lo.s32 %x, %x, %x;",
        "add.cc.u32 %x, %x, %x;",
        "add.f16 %h, %h, %h;",
        "add.ftz.f32 %x, %x, %x;",
        "add.rz.f32 %x, %x, %x;",
        "add.sat.s32 %x, %x, %x;",
        "div.approx.f32 %x, %x, %x;",
        "div.full.f32 %x, %x, %x;",
        "sqrt.approx.f32 %x, %x;",
        "mad.hi.s32 %x, %x, %x, %x;",
        "fma.f32 %x, %x, %x, %x;",
        "cvt.rz.f16.f32 %h, %x;",
        "cvt.rn.f16.f64 %h, %d;",
        "cvt.rn.f16.s32 %h, %x;",
        "cvt.sat.u8.f32 %h, %x;",
        "cvt.rn.bf16x2.f32 %x, %x, %x;",
        "setp.lt.and.f32 %p, %x, %x, %p;",
        "setp.eq.f16 %p, %h, %h;",
        "set.eq.u32.f32 %x, %x, %x;",
        "bar.sync 1;",
        "bar.arrive 0, 32;",
        "shfl.bfly.b32 %x, %x, 1, 31;",
        "cvta.shared.u64 %d, %d;",
        "call.uni other, (%x);",
        "atom.global.add.u32 %x, [%d], %x;",
        "ld.global.v8.f32 {%x, %x, %x, %x, %x, %x, %x, %x}, [%d];",
        "ld.volatile.global.u32 %x, [%d];",
        "mov.u32 %x, %tid.y;",
        "mov.u32 %x, %unknown;",
        "bra $nowhere;",
        "@%q bra $nowhere;",
        "prmt.b32.f4e %x, %x, %x, %x;",
        "add.s32 %x, %x;",
        "add.s32 5, %x, %x;"}) {
    SCOPED_TRACE(statement);
    Module module;
    const std::string registers = ".reg .b32 %x; .reg .b16 %h; .reg .b64 %d; .reg .pred %p;\n";
    EXPECT_THROW(parse(kernel(registers + statement), "test", module), std::runtime_error);
  }
}

TEST(Emulator, AlignsPointersByTheirOwnSize) {
  Module module;
  parse(
      ".version 9.0\n.target sm_120\n.visible .entry k(.param .u32 n, .param .u64 .ptr .align 1 a)\n{\nret;\n}\n",
      "test", module);
  EXPECT_EQ(module.kernels.at("k").parameters.at(1).offset, 8);
}

TEST(Emulator, NamesTheLineOfWhatItDoesNotKnow) {
  Module module;
  try {
    parse(
        ".version 8.0\n.target sm_90\n// comment\n.visible .entry k()\n{\n\n  frobnicate.u32 %x;\n}\n", "file.ptx",
        module);
    FAIL() << "no exception";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "file.ptx:7: unknown instruction frobnicate.u32");
  }
}

}  // namespace
}  // namespace emulator
