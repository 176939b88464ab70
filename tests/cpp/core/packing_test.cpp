// Packing against a bit-by-bit oracle: every width, every count around the group sizes, every byte.
#include <gtest/gtest.h>
#include <lomem/core/packing.h>

#include <random>

#include "guarded.h"
#include "oracle.h"

namespace {

std::vector<std::uint8_t> random_codes(std::size_t n, int bits) {
  std::mt19937 generator(static_cast<unsigned>(n * 8 + bits));
  std::vector<std::uint8_t> codes(n);
  for (auto& code : codes) {
    code = static_cast<std::uint8_t>(generator()) & lomem::max_code(bits);
  }
  return codes;
}

class Packing : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Bits, Packing, testing::Range(1, 9), [](const auto& info) {
  return std::to_string(info.param);
});

TEST_P(Packing, MatchesTheLayoutForEveryCount) {
  const int bits = GetParam();
  for (std::size_t n = 0; n <= 130; ++n) {
    const auto codes = random_codes(n, bits);
    Guarded<std::uint8_t> packed(lomem::packed_bytes(n, bits), n % 3);
    lomem::visit_bits(bits, [&](auto width) {
      lomem::pack<decltype(width)::value>(codes.data(), static_cast<std::int64_t>(n), packed.data());
    });
    EXPECT_EQ(packed.values(), oracle::pack(codes, bits)) << n;  // oracle: padding bits are 0
    packed.expect_intact();

    Guarded<std::uint8_t> unpacked(n, n % 3);
    lomem::visit_bits(bits, [&](auto width) {
      lomem::unpack<decltype(width)::value>(packed.data(), static_cast<std::int64_t>(n), unpacked.data());
    });
    EXPECT_EQ(unpacked.values(), codes) << n;
    unpacked.expect_intact();
  }
}

TEST_P(Packing, EveryByteInEveryPlaceOfAGroupSurvives) {
  const int bits = GetParam();
  for (int place = 0; place < bits; ++place) {
    for (int byte = 0; byte < 256; ++byte) {
      std::vector<std::uint8_t> packed(bits, 0x5a);
      packed[place] = static_cast<std::uint8_t>(byte);
      std::uint8_t codes[lomem::group_size];
      std::vector<std::uint8_t> again(bits);
      lomem::visit_bits(bits, [&](auto width) {
        lomem::unpack_group<decltype(width)::value>(packed.data(), lomem::group_size, codes);
        lomem::pack_group<decltype(width)::value>(codes, lomem::group_size, again.data());
      });
      EXPECT_EQ(again, packed);
    }
  }
}

TEST_P(Packing, IgnoresBitsAboveTheCode) {
  const int bits = GetParam();
  const auto codes = random_codes(19, bits);
  auto dirty = codes;
  for (auto& code : dirty) {
    code = static_cast<std::uint8_t>(code | ~lomem::max_code(bits));
  }
  std::vector<std::uint8_t> packed(lomem::packed_bytes(codes.size(), bits));
  lomem::visit_bits(bits, [&](auto width) {
    lomem::pack<decltype(width)::value>(dirty.data(), static_cast<std::int64_t>(dirty.size()), packed.data());
  });
  EXPECT_EQ(packed, oracle::pack(codes, bits));
}

TEST_P(Packing, CountsBytes) {
  const int bits = GetParam();
  for (std::int64_t n = 0; n <= 1000; ++n) {
    const std::int64_t bytes = lomem::packed_bytes(n, bits);
    EXPECT_GE(bytes * 8, n * bits);
    EXPECT_LT((bytes - 1) * 8, n == 0 ? 1 : n * bits);
  }
  const std::int64_t huge = std::int64_t{1} << 40;
  EXPECT_EQ(lomem::packed_bytes(huge + 1, bits), (huge * bits) / 8 + 1);
}

TEST(Packing2, SpecialisationMatchesTheGroups) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto packed = static_cast<std::uint8_t>(byte);
    std::uint8_t codes[4];
    lomem::unpack_group<2>(&packed, 4, codes);
    for (int j = 0; j < 4; ++j) {
      EXPECT_EQ(lomem::unpack2(packed, j), codes[j]);
    }
    EXPECT_EQ(lomem::pack2(codes[0], codes[1], codes[2], codes[3]), packed);
  }
}

constexpr std::uint8_t packed_in_a_constant_expression() {
  const std::uint8_t codes[4] = {1, 2, 3, 0};
  std::uint8_t packed = 0;
  lomem::pack<2>(codes, 4, &packed);
  return packed;
}
static_assert(packed_in_a_constant_expression() == 0b00111001);

}  // namespace
