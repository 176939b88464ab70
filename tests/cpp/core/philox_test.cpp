// Philox4x32 against its published answers.
#include <gtest/gtest.h>
#include <lomem/core/philox.h>

#include <array>

namespace {

using Words = std::array<std::uint32_t, 4>;

template <int rounds = lomem::philox_rounds>
Words philox(const Words& counter, std::uint32_t key, std::uint32_t other_key) {
  const auto block = lomem::philox<lomem::PhiloxProduct, rounds>(
      lomem::PhiloxBlock<std::uint64_t>{counter[0], counter[1], counter[2], counter[3]}, key, other_key);
  return {
      static_cast<std::uint32_t>(block.first), static_cast<std::uint32_t>(block.second),
      static_cast<std::uint32_t>(block.third), static_cast<std::uint32_t>(block.fourth)};
}

/// kat_vectors of Random123, the authors' library.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox({0, 0, 0, 0}, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t ones = 0xffffffff;
  EXPECT_EQ(philox({ones, ones, ones, ones}, ones, ones), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0),
      (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, KnownAnswersOfSevenRounds) {
  EXPECT_EQ(lomem::philox_rounds_of_rounding, 7);
  EXPECT_EQ(philox<7>({0, 0, 0, 0}, 0, 0), (Words{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}));
  constexpr std::uint32_t ones = 0xffffffff;
  EXPECT_EQ(philox<7>({ones, ones, ones, ones}, ones, ones), (Words{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}));
  EXPECT_EQ(
      philox<7>({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0),
      (Words{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}));
}

TEST(Philox, WordsAreThoseOfBlocks) {
  for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{0x299f31d0a4093822}, ~std::uint64_t{0}}) {
    for (const std::uint64_t index : {std::uint64_t{0}, std::uint64_t{7}, std::uint64_t{0x123456789abcdef}}) {
      const Words want = philox(
          {static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32), 0, 0},
          static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
      for (std::uint64_t j = 0; j < 4; ++j) {
        EXPECT_EQ(lomem::philox_word(seed, 4 * index + j), want[j]);
      }
    }
  }
}

/// Words of 64 bits, of which the upper halves are ignored.
TEST(Philox, IgnoresUpperHalves) {
  constexpr std::uint64_t junk = 0xdeadbeef00000000;
  const auto clean = lomem::philox<lomem::PhiloxProduct>(lomem::PhiloxBlock<std::uint64_t>{1, 2, 3, 4}, 5, 6);
  const auto same = lomem::philox<lomem::PhiloxProduct>(
      lomem::PhiloxBlock<std::uint64_t>{junk | 1, junk | 2, junk | 3, junk | 4}, 5, 6);
  EXPECT_EQ(static_cast<std::uint32_t>(same.first), static_cast<std::uint32_t>(clean.first));
  EXPECT_EQ(static_cast<std::uint32_t>(same.second), static_cast<std::uint32_t>(clean.second));
  EXPECT_EQ(static_cast<std::uint32_t>(same.third), static_cast<std::uint32_t>(clean.third));
  EXPECT_EQ(static_cast<std::uint32_t>(same.fourth), static_cast<std::uint32_t>(clean.fourth));
}

}  // namespace
