// Kernels of storage in groups of every instruction set against the scalar formulas, byte for byte: every size,
// alignment and size of groups.
#include <lomem/core/storage.h>

#include <random>

#include "guarded.h"
#include "kernel_tables.h"

namespace {

using lomem::bfloat16;
using lomem::GroupFormat;
using lomem::RoundingBits;

class StorageKernels : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(StorageKernels);

template <int bits, class T>
void check(
    const Table& table, const std::vector<T>& x, std::int64_t first, int group, const RoundingBits* random,
    std::size_t misalignment, bool stream) {
  const auto n = static_cast<std::int64_t>(x.size());
  const GroupFormat format{bits, group};
  std::vector<std::uint8_t> want(static_cast<std::size_t>(lomem::packed_bytes(n, bits)));
  std::vector<bfloat16> want_scales;
  std::vector<T> want_values(x.size());
  for (std::int64_t begin = 0; begin < n; begin += group) {
    const std::int64_t count = std::min<std::int64_t>(group, n - begin);
    std::uint8_t* codes = want.data() + begin * bits / 8;
    want_scales.push_back(lomem::encode_group<bits>(x.data() + begin, first + begin, count, random, codes));
    lomem::decode_group<bits>(codes, count, want_scales.back(), want_values.data() + begin, random, first + begin);
  }
  const AtPageEnd<T> input(x);
  Guarded<std::uint8_t> codes(want.size(), misalignment);
  Guarded<bfloat16> scales(want_scales.size(), 0);
  table->group_encode(Element<T>::dtype, input.data(), first, n, format, random, codes.data(), scales.data(), stream);
  ASSERT_TRUE(same_bytes(codes.values(), want)) << n << " elements of " << sizeof(T) << " bytes, groups of " << group;
  ASSERT_TRUE(same_bytes(scales.values(), want_scales)) << n << " elements of " << sizeof(T) << " bytes";
  codes.expect_intact();
  scales.expect_intact();
  const AtPageEnd<std::uint8_t> bytes(want);
  const AtPageEnd<bfloat16> factors(want_scales);
  Guarded<T> values(x.size(), misalignment);
  table->group_decode(Element<T>::dtype, bytes.data(), factors.data(), first, n, format, random, values.data(), stream);
  const auto got = values.values();
  for (std::size_t i = 0; i < x.size(); ++i) {
    // (Of a NaN, only that it is one is the same for all.)
    const bool both_nan = std::isnan(lomem::to_compute(got[i])) && std::isnan(lomem::to_compute(want_values[i]));
    ASSERT_TRUE(both_nan || std::memcmp(&got[i], &want_values[i], sizeof(T)) == 0) << i;
  }
  values.expect_intact();
}

template <class T>
void check_both(
    const Table& table, const std::vector<T>& x, std::int64_t first, int group, const RoundingBits* random,
    std::size_t misalignment, bool stream) {
  check<8>(table, x, first, group, random, misalignment, stream);
  check<4>(table, x, first, group, random, misalignment, stream);
}

TEST_P(StorageKernels, EverySize) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (const std::size_t n : awkward_sizes()) {
      const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
      const RoundingBits random{0x9e3779b97f4a7c15 * n, n % 3};
      for (const int group : {16, 128}) {
        check_both(GetParam(), x, 0, group, nullptr, n % 3, n % 2 == 0);
        check_both(GetParam(), x, 0, group, &random, n % 3, n % 2 == 0);
      }
    }
  });
}

TEST_P(StorageKernels, EverySizeOfGroups) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (int group = lomem::min_scale_group; group <= lomem::max_scale_group; group *= 2) {
      for (const std::size_t n : {std::size_t{31}, std::size_t{1024}, std::size_t{1025}, std::size_t{3333}}) {
        const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
        // Numbers of blocks around and beyond 2^32; of streams, too.
        for (const std::int64_t first : {std::int64_t{0}, (std::int64_t{1} << 35) - 1024, std::int64_t{1} << 55}) {
          const RoundingBits random{~std::uint64_t{n}, (std::uint64_t{1} << 32) + n};
          check_both(GetParam(), x, first, group, &random, 0, true);
        }
        check_both(GetParam(), x, 0, group, nullptr, 0, true);
      }
    }
  });
}

TEST_P(StorageKernels, EveryMagnitude) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const RoundingBits random{5, 6};
    for (int exponent = -150; exponent <= 128; exponent += 3) {
      const auto x = random_elements<T>(300, std::ldexp(1.0, exponent), static_cast<unsigned>(exponent + 200));
      check_both(GetParam(), x, 0, 128, nullptr, 0, false);
      check_both(GetParam(), x, 0, 128, &random, 0, false);
    }
  });
}

TEST_P(StorageKernels, EverySixteenBitPattern) {
  for_each_sixteen_bit_type([&](auto element) {
    using T = typename decltype(element)::type;
    const RoundingBits random{7, 8};
    check_both(GetParam(), all_patterns<T>(), 0, 128, nullptr, 0, false);
    check_both(GetParam(), all_patterns<T>(), 0, 16, &random, 0, false);
  });
}

TEST_P(StorageKernels, NotANumberAndInfinity) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const RoundingBits random{9, 10};
    for (const double special : {HUGE_VAL, -HUGE_VAL, std::nan(""), 0.0}) {
      for (const std::size_t place : {std::size_t{0}, std::size_t{130}, std::size_t{255}, std::size_t{299}}) {
        auto x = random_elements<T>(300, special == 0 ? 0 : 3, 1);
        x[place] = Element<T>::from(special);
        check_both(GetParam(), x, 0, 128, nullptr, 0, false);
        check_both(GetParam(), x, 0, 128, &random, 0, false);
      }
    }
  });
}

/// Elements whose scaled numbers are next to the largest code, and random bits of all values.
TEST_P(StorageKernels, TheLargestCodes) {
  std::vector<float> x;
  for (int i = 0; i < 400; ++i) {
    const float largest = 1.0f + static_cast<float>(i) * 0x1.5p-9f;
    for (int j = 0; j < 128; ++j) {
      x.push_back(j % 2 == 0 ? -largest : largest);
    }
  }
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    const RoundingBits random{seed, 0};
    check_both(GetParam(), x, 0, 128, &random, 0, false);
  }
}

/// Codes and scales that group_encode does not make.
TEST_P(StorageKernels, AnyBytes) {
  std::mt19937 generator(3);
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (int round = 0; round < 40; ++round) {
      std::vector<std::uint8_t> codes(1024);
      for (auto& byte : codes) {
        byte = static_cast<std::uint8_t>(generator());
      }
      std::vector<bfloat16> scales(16);
      for (auto& scale : scales) {
        scale.bits = static_cast<std::uint16_t>(generator());
      }
      const RoundingBits random{static_cast<std::uint64_t>(round), 3};
      for (const RoundingBits* source : {static_cast<const RoundingBits*>(nullptr), &random}) {
        std::vector<T> want(1024);
        std::vector<T> got(1024);
        for (int g = 0; g < 8; ++g) {
          lomem::decode_group<8>(
              codes.data() + 128 * g, 128, scales[g], want.data() + 128 * g, source, std::int64_t{128} * g);
        }
        GetParam()->group_decode(
            Element<T>::dtype, codes.data(), scales.data(), 0, 1024, GroupFormat{8, 128}, source, got.data(), false);
        for (std::size_t i = 0; i < 1024; ++i) {
          const bool both_nan = std::isnan(lomem::to_compute(got[i])) && std::isnan(lomem::to_compute(want[i]));
          ASSERT_TRUE(both_nan || std::memcmp(&got[i], &want[i], sizeof(T)) == 0) << i;
        }
      }
    }
  });
}

}  // namespace
