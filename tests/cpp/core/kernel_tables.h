// What the tests of the CPU kernels share: every test runs once for each kernel table that this CPU can
// run, and results are compared byte for byte.
#pragma once

#include <gtest/gtest.h>
#include <lomem/cpu/kernels.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "elements.h"
#include "kernel_table.h"

/// A kernel table as a test parameter, printed as its instruction set.
struct Table {
  const lomem::cpu::KernelTable* kernels = nullptr;

  const lomem::cpu::KernelTable* operator->() const {
    return kernels;
  }
  friend void PrintTo(const Table& table, std::ostream* stream) {
    *stream << table->capability;
  }
};

inline std::vector<Table> runnable_tables() {
  std::vector<Table> result;
  for (const auto* const* table = lomem::cpu::runnable_kernels(); *table != nullptr; ++table) {
    result.push_back({*table});
  }
  return result;
}

/// A suite of tests that run for every table.
class KernelTest : public testing::TestWithParam<Table> {};

// (The first argument of gtest's macro, a prefix of test names, is empty on purpose.)
#define INSTANTIATE_FOR_EVERY_TABLE(Suite)                                                                \
  INSTANTIATE_TEST_SUITE_P(, Suite, testing::ValuesIn(runnable_tables()), [](const auto& table_of_test) { \
    return std::string(table_of_test.param->capability);                                                  \
  })

/// Calls body(Type<T>{}) for every element type.
template <class Body>
void for_each_element_type(Body&& body) {
  body(lomem::Type<double>{});
  body(lomem::Type<float>{});
  body(lomem::Type<lomem::bfloat16>{});
  body(lomem::Type<lomem::float16>{});
}

template <class Body>
void for_each_sixteen_bit_type(Body&& body) {
  body(lomem::Type<lomem::bfloat16>{});
  body(lomem::Type<lomem::float16>{});
}

/// All sizes up to a few vectors of any instruction set, and those around tiles.
inline std::vector<std::size_t> awkward_sizes() {
  std::vector<std::size_t> result;
  for (std::size_t n = 0; n <= 200; ++n) {
    result.push_back(n);
  }
  for (const std::size_t n : {255, 256, 257, 511, 513, 2015, 2016, 2031, 2047, 2048, 2049, 2064, 2080, 2081, 4097}) {
    result.push_back(n);
  }
  return result;
}

/// Fills the stack below the caller with NaN, so that a kernel that reads what it did not write gives NaN.
[[gnu::noinline]] inline void spoil_stack() {
  unsigned char buffer[std::size_t{1} << 19];
  std::memset(buffer, 0xff, sizeof(buffer));
  asm volatile("" : : "r"(buffer) : "memory");
}

/// Whether two results have the same bytes: NaN equals itself, and -0 does not equal 0.
template <class T>
testing::AssertionResult same_bytes(const std::vector<T>& got, const std::vector<T>& want) {
  if (got.size() != want.size()) {
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  }
  if (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0) {
    return testing::AssertionSuccess();
  }
  std::size_t i = 0;
  while (std::memcmp(&got[i], &want[i], sizeof(T)) == 0) {
    ++i;
  }
  std::uint64_t bits[2] = {};
  std::memcpy(&bits[0], &got[i], sizeof(T));
  std::memcpy(&bits[1], &want[i], sizeof(T));
  std::ostringstream message;
  message << "element " << i << " of " << got.size() << " is 0x" << std::hex << bits[0] << ", expected 0x" << bits[1];
  return testing::AssertionFailure() << message.str();
}

template <class T>
T from_pattern(std::uint64_t bits) {
  T result;
  std::memcpy(&result, &bits, sizeof(T));  // little-endian, as the packed layout
  return result;
}

/// All 65,536 values of a 16-bit type, beginning with pattern `first`.
template <class T>
std::vector<T> all_patterns(int first = 0) {
  std::vector<T> result(0x10000);
  for (int i = 0; i < 0x10000; ++i) {
    result[i].bits = static_cast<std::uint16_t>(i + first);
  }
  return result;
}

/// Zeros, the smallest and largest numbers, infinities, quiet and signalling NaN with payloads.
template <class T>
std::vector<T> special_elements() {
  constexpr int width = 8 * sizeof(T);
  constexpr int fraction_bits = width == 64 ? 52 : width == 32 ? 23 : std::is_same_v<T, lomem::bfloat16> ? 7 : 10;
  constexpr std::uint64_t sign = std::uint64_t{1} << (width - 1);
  constexpr std::uint64_t normal = std::uint64_t{1} << fraction_bits;  // the smallest one
  constexpr std::uint64_t infinity = (sign - 1) / normal * normal;
  std::vector<T> result;
  for (const std::uint64_t magnitude :
       {std::uint64_t{0}, std::uint64_t{1}, normal - 1, normal, normal + 1, infinity - 1, infinity, infinity + 1,
        infinity + normal / 2 - 1, infinity + normal / 2, infinity + normal / 2 + 5, sign - 1}) {
    result.push_back(from_pattern<T>(magnitude));
    result.push_back(from_pattern<T>(sign | magnitude));
  }
  return result;
}
