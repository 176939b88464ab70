// Packing kernels of every instruction set against the bit-by-bit oracle: every width, every size,
// sentinels (whole words are stored, of which none may reach beyond the result).
#include <random>

#include "guarded.h"
#include "kernel_tables.h"
#include "oracle.h"

namespace {

class PackingKernels : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(PackingKernels);

std::vector<std::size_t> sizes() {
  std::vector<std::size_t> result;
  for (std::size_t n = 0; n <= 300; ++n) {
    result.push_back(n);
  }
  for (const std::size_t n : {511, 512, 513, 2047, 2048, 2049, 5000}) {
    result.push_back(n);
  }
  return result;
}

/// Random bytes: codes, most of which have bits above `bits`.
std::vector<std::uint8_t> random_bytes(std::size_t n, int bits) {
  std::mt19937 generator(static_cast<unsigned>(n * 8 + bits));
  std::vector<std::uint8_t> result(n);
  for (auto& byte : result) {
    byte = static_cast<std::uint8_t>(generator());
  }
  return result;
}

std::vector<std::uint8_t> fitting(std::vector<std::uint8_t> codes, int bits) {
  for (auto& code : codes) {
    code = static_cast<std::uint8_t>(code & lomem::max_code(bits));
  }
  return codes;
}

std::uint8_t or_of(const std::vector<std::uint8_t>& codes) {
  std::uint8_t result = 0;
  for (const auto code : codes) {
    result = static_cast<std::uint8_t>(result | code);
  }
  return result;
}

void check_pack(const Table& table, const std::vector<std::uint8_t>& codes, int bits, std::size_t misalignment) {
  const auto want = oracle::pack(fitting(codes, bits), bits);
  const AtPageEnd<std::uint8_t> source(codes);
  Guarded<std::uint8_t> packed(want.size(), misalignment);
  const auto n = static_cast<std::int64_t>(codes.size());
  EXPECT_EQ(table->pack_bits(source.data(), n, bits, packed.data()), or_of(codes)) << bits << " bits, " << n;
  ASSERT_TRUE(same_bytes(packed.values(), want)) << bits << " bits, " << n;
  packed.expect_intact();
}

TEST_P(PackingKernels, Pack) {
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    for (const std::size_t n : sizes()) {
      const auto codes = random_bytes(n, bits);
      check_pack(GetParam(), codes, bits, n % 11);
      check_pack(GetParam(), fitting(codes, bits), bits, 0);
    }
  }
}

TEST_P(PackingKernels, Unpack) {
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    for (const std::size_t n : sizes()) {
      const auto codes = fitting(random_bytes(n, bits), bits);
      auto packed = oracle::pack(codes, bits);
      if (n * bits % 8 != 0) {
        packed.back() = static_cast<std::uint8_t>(packed.back() | 0xff << (n * bits % 8));  // padding says nothing
      }
      const AtPageEnd<std::uint8_t> source(packed);
      for (const std::size_t misalignment : {std::size_t{0}, 1 + n % 11}) {
        Guarded<std::uint8_t> unpacked(n, misalignment);
        GetParam()->unpack_bits(source.data(), static_cast<std::int64_t>(n), bits, unpacked.data());
        ASSERT_TRUE(same_bytes(unpacked.values(), codes)) << bits << " bits, " << n;
        unpacked.expect_intact();
      }
    }
  }
}

TEST_P(PackingKernels, EveryCodeInEveryPlace) {
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    for (int code = 0; code <= 0xff; ++code) {
      // A code a group, in another place each time; long enough for the groups that are whole words.
      std::vector<std::uint8_t> codes(256);
      for (std::size_t group = 0; group < codes.size() / 8; ++group) {
        codes[8 * group + group % 8] = static_cast<std::uint8_t>(code);
      }
      check_pack(GetParam(), codes, bits, 0);
      const auto packed = oracle::pack(fitting(codes, bits), bits);
      std::vector<std::uint8_t> unpacked(codes.size());
      GetParam()->unpack_bits(packed.data(), static_cast<std::int64_t>(codes.size()), bits, unpacked.data());
      ASSERT_TRUE(same_bytes(unpacked, fitting(codes, bits))) << bits << " bits, code " << code;
    }
  }
}

TEST_P(PackingKernels, ReportCodesThatDoNotFitWhereverTheyAre) {
  for (const std::size_t n : {1, 5, 8, 63, 64, 130, 300}) {
    for (std::size_t place = 0; place < n; ++place) {
      std::vector<std::uint8_t> codes(n, 1);
      codes[place] = 0x84;
      std::vector<std::uint8_t> packed(lomem::packed_bytes(n, 2));
      EXPECT_EQ(
          GetParam()->pack_bits(codes.data(), static_cast<std::int64_t>(n), 2, packed.data()), n > 1 ? 0x85 : 0x84)
          << place << " of " << n;
    }
  }
}

}  // namespace
