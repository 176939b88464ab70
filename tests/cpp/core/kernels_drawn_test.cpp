// Kernels of codes drawn at random, of every instruction set, against the scalar formulas, byte for byte: every size,
// alignment and number of bits, with and without stored targets.
#include <lomem/core/drawn.h>

#include <random>

#include "drawn_cases.h"
#include "guarded.h"
#include "kernel_tables.h"

namespace {

using lomem::RoundingBits;

class DrawnKernels : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(DrawnKernels);

template <class T>
std::vector<std::uint8_t> codes_by_formula(
    const lomem::DrawnTable& of, const std::vector<T>& x, std::int64_t first, int bits, const RoundingBits& random) {
  const auto n = static_cast<std::int64_t>(x.size());
  std::vector<std::uint8_t> packed(static_cast<std::size_t>(lomem::packed_bytes(n, bits)));
  lomem::visit_bits(bits, [&](auto width) {
    lomem::drawn_encode<decltype(width)::value>(of, x.data(), first, n, random, packed.data());
  });
  return packed;
}

/// `targets` may be null.
template <class T>
void check_codes(
    const Table& table, const lomem::DrawnTable& of, const std::uint32_t* targets, const std::vector<T>& x,
    std::int64_t first, int bits, const RoundingBits& random, std::size_t misalignment) {
  const std::vector<std::uint8_t> want = codes_by_formula(of, x, first, bits, random);
  const AtPageEnd<T> input(x);
  Guarded<std::uint8_t> packed(want.size(), misalignment);
  spoil_stack();
  table->drawn_encode(
      Element<T>::dtype, of, targets, input.data(), first, static_cast<std::int64_t>(x.size()), bits, random,
      packed.data());
  ASSERT_TRUE(same_bytes(packed.values(), want))
      << x.size() << " elements of " << sizeof(T) << " bytes from " << first << ", bits " << bits;
  packed.expect_intact();
  // From an address that is aligned for nothing wider.
  Guarded<T> elsewhere(x.size(), misalignment);
  elsewhere.assign(x);
  Guarded<std::uint8_t> again(want.size(), misalignment + 1);
  table->drawn_encode(
      Element<T>::dtype, of, targets, elsewhere.data(), first, static_cast<std::int64_t>(x.size()), bits, random,
      again.data());
  ASSERT_TRUE(same_bytes(again.values(), want)) << x.size() << " elements, not aligned, bits " << bits;
  again.expect_intact();
}

template <class T>
void check_gradient(
    const Table& table, const std::vector<T>& grad, const std::vector<std::uint8_t>& codes,
    const lomem::DrawnLevels<double>& levels, std::int64_t first, int bits, const RoundingBits& random,
    std::size_t misalignment, bool stream) {
  using C = lomem::compute_t<T>;
  const auto n = static_cast<std::int64_t>(grad.size());
  const lomem::DrawnLevels<C> rounded{static_cast<C>(levels.low), static_cast<C>(levels.step)};
  std::vector<T> want(grad.size());
  lomem::visit_bits(bits, [&](auto width) {
    lomem::drawn_decode_multiply<decltype(width)::value>(
        grad.data(), codes.data(), rounded, first, n, random, want.data());
  });
  const AtPageEnd<T> input(grad);
  const AtPageEnd<std::uint8_t> packed(codes);
  Guarded<T> grad_input(grad.size(), misalignment);
  spoil_stack();
  table->drawn_decode_multiply(
      Element<T>::dtype, input.data(), packed.data(), levels, bits, first, n, random, grad_input.data(), stream);
  const std::vector<T> got = grad_input.values();
  for (std::size_t i = 0; i < want.size(); ++i) {
    // (Of a NaN, only that it is one is the same for all.)
    const bool both_nan = std::isnan(lomem::to_compute(got[i])) && std::isnan(lomem::to_compute(want[i]));
    ASSERT_TRUE(both_nan || std::memcmp(&got[i], &want[i], sizeof(T)) == 0)
        << i << " of " << n << " elements of " << sizeof(T) << " bytes from " << first << ", bits " << bits;
  }
  grad_input.expect_intact();
}

/// Targets as a kernel table stores them.
std::vector<std::uint32_t> stored_targets(
    const Table& table, lomem::DType dtype, const lomem::DrawnTable& of, int bits) {
  Guarded<std::uint32_t> targets(lomem::drawn_target_count, 1);
  table->drawn_targets(dtype, of, bits, targets.data());
  targets.expect_intact();
  return targets.values();
}

/// All sizes around vectors, and around the batches of which random numbers are drawn together.
std::vector<std::size_t> sizes() {
  std::vector<std::size_t> result;
  for (std::size_t n = 0; n <= 136; ++n) {
    result.push_back(n);
  }
  for (const std::size_t n : {255, 256, 257, 511, 513, 1023, 1024, 1025, 2047, 2048, 2049, 2064, 2100, 4097}) {
    result.push_back(n);
  }
  return result;
}

TEST_P(DrawnKernels, CodesOfEverySize) {
  const std::vector<drawn::Case> cases = drawn::cases();
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (int bits = 1; bits <= 8; ++bits) {
      for (const drawn::Case& of : cases) {
        SCOPED_TRACE(of.name);
        std::vector<std::uint32_t> targets;
        if (sizeof(T) == 2) {
          targets = stored_targets(GetParam(), Element<T>::dtype, of.table, bits);
        }
        for (const std::size_t n : sizes()) {
          const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
          const RoundingBits random{0x9e3779b97f4a7c15 * n, n % 3};
          check_codes(GetParam(), of.table, nullptr, x, 0, bits, random, n % 3);
          if (!targets.empty()) {
            check_codes(GetParam(), of.table, targets.data(), x, 0, bits, random, n % 3);
          }
        }
      }
    }
  });
}

TEST_P(DrawnKernels, GradientsOfEverySize) {
  std::mt19937 generator(4);
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (int bits = 1; bits <= 8; ++bits) {
      for (const std::size_t n : sizes()) {
        const auto grad = random_elements<T>(n, 3, static_cast<unsigned>(n));
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(lomem::packed_bytes(n, bits)));
        for (std::uint8_t& byte : codes) {
          byte = static_cast<std::uint8_t>(generator());
        }
        const RoundingBits random{0x9e3779b97f4a7c15 * n, n % 3};
        const lomem::DrawnLevels<double> levels{-0.1, 1.2 / lomem::max_code(bits)};
        for (const bool stream : {false, true}) {
          for (const std::size_t misalignment : {0, 1, 3}) {
            check_gradient(GetParam(), grad, codes, levels, 0, bits, random, misalignment, stream);
          }
        }
      }
    }
  });
}

/// Ranges of large tensors: numbers of blocks around and beyond 2^32; of streams, too.
TEST_P(DrawnKernels, EveryRange) {
  const lomem::DrawnTable of = drawn::waves().table;
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (const std::int64_t first :
         {std::int64_t{8}, std::int64_t{24}, std::int64_t{1} << 34, (std::int64_t{1} << 35) - 1016,
          (std::int64_t{1} << 35) - 8, (std::int64_t{1} << 35) + 8, std::int64_t{1} << 55}) {
      for (const std::size_t n : {7, 64, 1025, 2100}) {
        const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
        const RoundingBits random{~std::uint64_t{n}, (std::uint64_t{1} << 32) + n};
        for (const int bits : {1, 3, 4, 8}) {
          check_codes(GetParam(), of, nullptr, x, first, bits, random, n % 3);
          const auto codes = codes_by_formula(of, x, first, bits, random);
          check_gradient(GetParam(), x, codes, {0.25, 0.125}, first, bits, random, 0, n % 2 == 0);
        }
      }
    }
  });
}

/// A tensor in pieces, as threads take them: the same codes as of the whole.
TEST_P(DrawnKernels, PiecesOfATensor) {
  const lomem::DrawnTable of = drawn::slow().table;
  const auto x = random_elements<float>(5000, 3, 1);
  const RoundingBits random{11, 12};
  for (int bits = 1; bits <= 8; ++bits) {
    const auto want = codes_by_formula(of, x, 0, bits, random);
    for (const std::size_t size : {8, 40, 1000, 1024, 1032, 4096}) {
      std::vector<std::uint8_t> packed(want.size());
      for (std::size_t begin = 0; begin < x.size(); begin += size) {
        GetParam()->drawn_encode(
            lomem::DType::float32, of, nullptr, x.data() + begin, static_cast<std::int64_t>(begin),
            static_cast<std::int64_t>(std::min(size, x.size() - begin)), bits, random,
            packed.data() + begin / 8 * static_cast<std::size_t>(bits));
      }
      ASSERT_TRUE(same_bytes(packed, want)) << size;
    }
  }
}

TEST_P(DrawnKernels, TargetsOfEverySixteenBitPattern) {
  for_each_sixteen_bit_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto patterns = all_patterns<T>();
    for (const drawn::Case& of : drawn::cases()) {
      SCOPED_TRACE(of.name);
      for (int bits = 1; bits <= 8; ++bits) {
        std::vector<std::uint32_t> want;
        for (const T x : patterns) {
          want.push_back(lomem::drawn_target(lomem::drawn_value(of.table, lomem::to_compute(x)), bits));
        }
        ASSERT_TRUE(same_bytes(stored_targets(GetParam(), Element<T>::dtype, of.table, bits), want)) << bits;
      }
    }
  });
}

TEST_P(DrawnKernels, CodesOfEverySixteenBitPattern) {
  for_each_sixteen_bit_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto patterns = all_patterns<T>();
    for (const drawn::Case& of : drawn::cases()) {
      SCOPED_TRACE(of.name);
      for (int bits = 1; bits <= 8; ++bits) {
        const auto targets = stored_targets(GetParam(), Element<T>::dtype, of.table, bits);
        check_codes(GetParam(), of.table, nullptr, patterns, 16, bits, {7, 8}, 0);
        check_codes(GetParam(), of.table, targets.data(), patterns, 16, bits, {7, 8}, 0);
      }
    }
  });
}

TEST_P(DrawnKernels, GradientsOfEverySixteenBitPattern) {
  for_each_sixteen_bit_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto patterns = all_patterns<T>();
    const std::vector<std::uint8_t> codes(patterns.size(), 0x93);
    for (const int bits : {2, 8}) {
      check_gradient(GetParam(), patterns, codes, {-0.1, 1.2 / lomem::max_code(bits)}, 0, bits, {7, 8}, 0, false);
    }
  });
}

/// Zeros, infinities, NaN, the smallest and largest numbers, and those at which a table changes.
TEST_P(DrawnKernels, SpecialValues) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (const drawn::Case& of : drawn::cases()) {
      SCOPED_TRACE(of.name);
      std::vector<T> x = special_elements<T>();
      for (const double place : drawn::places(of)) {
        x.push_back(Element<T>::from(place));
      }
      for (int bits = 1; bits <= 8; ++bits) {
        // Elements in every lane.
        for (int turn = 0; turn < 16; ++turn) {
          x.insert(x.begin(), Element<T>::from(turn));
          check_codes(GetParam(), of.table, nullptr, x, 0, bits, {9, 10}, 0);
        }
        const auto codes = codes_by_formula(of.table, x, 0, bits, {9, 10});
        check_gradient(GetParam(), x, codes, {-0.5, 2.0 / lomem::max_code(bits)}, 0, bits, {9, 10}, 0, false);
      }
    }
  });
}

/// A table whose s is the same everywhere: sums of t and random bits of all values, the largest among them.
TEST_P(DrawnKernels, TheLargestCodes) {
  lomem::DrawnTable of{};
  const std::vector<float> x(100000);
  for (const float s : {1.0f, 1 - 0x1p-24f, 0.0f, 0x1p-24f, 0.5f + 0x1p-24f}) {
    of.sides[0].beyond = s;
    for (int bits = 1; bits <= 8; ++bits) {
      check_codes(GetParam(), of, nullptr, x, 0, bits, {3, 0}, 0);
    }
  }
}

TEST_P(DrawnKernels, AnyLevels) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto grad = random_elements<T>(300, 1, 5);
    const std::vector<std::uint8_t> codes(300, 0xe7);
    // Levels that float32 cannot tell apart, infinite and subnormal ones, and a single one.
    for (const auto& levels :
         {lomem::DrawnLevels<double>{1 + 0x1p-40, 0x1p-45}, {0, HUGE_VAL}, {1e-310, 1e-310}, {0.5, 0}, {0, 0}}) {
      for (int bits = 1; bits <= 8; ++bits) {
        check_gradient(GetParam(), grad, codes, levels, 0, bits, {1, 2}, 0, false);
      }
    }
  });
}

}  // namespace
