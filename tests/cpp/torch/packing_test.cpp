// Packing of codes, from C++.
#include <gtest/gtest.h>
#include <lomem/ops/packing.h>

#include "helpers.h"

namespace {

TEST(Packing, RoundTrips) {
  for (int64_t bits = 1; bits <= 8; ++bits) {
    const auto codes = torch::randint(0, int64_t{1} << bits, {3, 41}, torch::kByte);
    const auto packed = lomem::pack_bits(codes, bits);
    EXPECT_EQ(packed.numel(), (bits * codes.numel() + 7) / 8);
    EXPECT_TRUE(torch::equal(lomem::unpack_bits(packed, bits, codes.numel()), codes.flatten()));
  }
}

TEST(Packing, HasShapesOnTheMetaDevice) {
  const auto packed = torch::empty({3}, torch::TensorOptions(torch::kMeta).dtype(torch::kByte));
  EXPECT_EQ(lomem::unpack_bits(packed, 3, 8).numel(), 8);
}

TEST(Packing, ErrorsNameOpArgumentAndBothValues) {
  EXPECT_EQ(
      error_of([&] { lomem::pack_bits(torch::zeros({3}, torch::kByte), 9); }),
      "lomem::pack_bits: bits is 9, expected 1 to 8");
}

}  // namespace
