// Which kernels run, the public functions that run them, and the small kernels that are the same for all
// instruction sets. No torch.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <string>

#include "fused_functions.h"
#include "guarded.h"
#include "kernel_tables.h"
#include "oracle.h"

namespace {

using lomem::DType;
namespace cpu = lomem::cpu;

TEST(KernelTables, AreListedBestFirst) {
  const std::vector<std::string> order = {"AVX512_BF16", "AVX512", "AVX2", "DEFAULT"};
  std::vector<std::ptrdiff_t> places;
  for (const Table& table : runnable_tables()) {
    places.push_back(std::find(order.begin(), order.end(), table->capability) - order.begin());
  }
  ASSERT_FALSE(places.empty());
  EXPECT_EQ(places.back(), 3);
  EXPECT_TRUE(std::is_sorted(places.begin(), places.end()));
  EXPECT_EQ(std::set(places.begin(), places.end()).size(), places.size());
}

TEST(KernelTables, TheChosenOneIsNamed) {
  EXPECT_STREQ(cpu::capability(), cpu::kernels().capability);
  const auto tables = runnable_tables();
  EXPECT_TRUE(std::any_of(tables.begin(), tables.end(), [](Table table) { return table.kernels == &cpu::kernels(); }));
  EXPECT_EQ(&cpu::kernels(), &cpu::kernels());
}

/// What a function of kernels.h writes is what the chosen table writes.
class PublicFunctions : public testing::Test {
 protected:
  static constexpr std::int64_t n = 333;
  const cpu::KernelTable& table = cpu::kernels();
  const std::vector<float> x = random_elements<float>(n, 4, 1);
};

TEST_F(PublicFunctions, Step) {
  const auto encode = [&](auto kernel) {
    std::vector<std::uint8_t> packed(lomem::packed_bytes(n, 2));
    kernel(DType::float32, x.data(), n, packed.data());
    return packed;
  };
  std::vector<std::vector<std::uint8_t>> codes;
  std::vector<double> first_boundaries;
  FusedFunctions::for_each([&](auto function) {
    using Function = typename decltype(function)::type;
    codes.push_back(encode(cpu::step_encode<Function>));
    EXPECT_EQ(codes.back(), encode((table.*Fused<Function>::kernels).encode)) << Fused<Function>::name;
    first_boundaries.push_back(Function::PublishedSteps::boundary(0));
  });
  EXPECT_NE(codes.front(), codes.back());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    EXPECT_EQ(codes[i] == codes.front(), first_boundaries[i] == first_boundaries.front()) << i;
  }

  const double boundaries[3] = {-1, 0, 2};
  const auto search = [&](auto kernel) {
    return encode([&](DType dtype, const void* from, std::int64_t count, std::uint8_t* packed) {
      kernel(dtype, from, count, boundaries, 2, packed);
    });
  };
  EXPECT_EQ(search(cpu::step_search_encode), search(table.step_search_encode));
  const auto band = [&](auto kernel) {
    return encode([&](DType dtype, const void* from, std::int64_t count, std::uint8_t* packed) {
      kernel(dtype, from, count, -1, 2, packed);
    });
  };
  EXPECT_EQ(band(cpu::band_encode), band(table.band_encode));
  EXPECT_NE(band(cpu::band_encode), search(cpu::step_search_encode));

  const double levels[4] = {0.1, 0.2, 0.3, 0.4};
  std::vector<float> gradient(n);
  std::vector<float> want(n);
  for (const bool stream : {false, true}) {
    cpu::step_decode_multiply(DType::float32, x.data(), codes[0].data(), levels, 2, n, gradient.data(), stream);
    table.step_decode_multiply(DType::float32, x.data(), codes[0].data(), levels, 2, n, want.data(), stream);
    EXPECT_TRUE(same_bytes(gradient, want));
  }
}

TEST_F(PublicFunctions, FastForward) {
  const auto check = [&](auto function, cpu::KernelTable::FastForward kernel) {
    Guarded<float> y(n);
    Guarded<std::uint8_t> packed(lomem::packed_bytes(n, 2));
    EXPECT_EQ(function(DType::float32, x.data(), n, y.data(), packed.data(), false), kernel != nullptr);
    if (kernel != nullptr) {
      std::vector<float> want(n);
      std::vector<std::uint8_t> want_packed(lomem::packed_bytes(n, 2));
      kernel(DType::float32, x.data(), n, want.data(), want_packed.data(), false);
      EXPECT_TRUE(same_bytes(y.values(), want));
      EXPECT_TRUE(same_bytes(packed.values(), want_packed));
    }
    // Not for float64: nothing is written, not even codes.
    const std::vector<double> doubles(n, 1.5);
    Guarded<double> result(n);
    result.assign(doubles);
    Guarded<std::uint8_t> codes(1);
    codes.assign({0x77});
    EXPECT_FALSE(function(DType::float64, doubles.data(), n, result.data(), codes.data(), false));
    EXPECT_EQ(result.values(), doubles);
    EXPECT_EQ(codes.values()[0], 0x77);
  };
  FusedFunctions::for_each([&](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check(cpu::fast_forward<Function>, (table.*Fused<Function>::kernels).fast_forward);
  });
}

TEST_F(PublicFunctions, Packing) {
  const std::vector<std::uint8_t> codes = {1, 2, 9, 0, 3};
  std::vector<std::uint8_t> packed(2);
  EXPECT_EQ(cpu::pack_bits(codes.data(), 5, 2, packed.data()), 1 | 2 | 9 | 3);
  EXPECT_EQ(packed, oracle::pack(codes, 2));
  std::vector<std::uint8_t> unpacked(5);
  cpu::unpack_bits(packed.data(), 5, 2, unpacked.data());
  EXPECT_EQ(unpacked, (std::vector<std::uint8_t>{1, 2, 1, 0, 3}));
}

TEST_F(PublicFunctions, Norms) {
  const auto check = [&](auto forward, auto forward_kernel, auto backward, auto backward_kernel) {
    std::vector<float> results[2][3];
    for (int which = 0; which < 2; ++which) {
      auto& [output, rstd, grad_input] = results[which];
      output.resize(n);
      rstd.resize(3);
      grad_input.resize(n);
      lomem::NormForward args;
      args.input = {x.data()};
      args.output = {output.data()};
      args.rstd = {rstd.data()};
      args.cols = n / 3;
      args.eps = 1e-5;
      (which == 0 ? forward : forward_kernel)(args, 0, 3, false);
      lomem::NormBackward backward_args;
      backward_args.grad_output = {x.data()};
      backward_args.output = {output.data()};
      backward_args.rstd = {rstd.data()};
      backward_args.grad_input = {grad_input.data()};
      backward_args.cols = n / 3;
      (which == 0 ? backward : backward_kernel)(backward_args, 0, 3, nullptr, nullptr, false);
    }
    for (int i = 0; i < 3; ++i) {
      EXPECT_TRUE(same_bytes(results[0][i], results[1][i])) << i;
    }
    return results[0][0];
  };
  using lomem::Norm;
  const auto layer = check(
      cpu::norm_forward<Norm::layer>, table.layer_norm_forward, cpu::norm_backward<Norm::layer>,
      table.layer_norm_backward);
  const auto rms = check(
      cpu::norm_forward<Norm::rms>, table.rms_norm_forward, cpu::norm_backward<Norm::rms>, table.rms_norm_backward);
  EXPECT_NE(layer, rms);
}

class NothingToDo : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(NothingToDo);

/// Empty tensors have no memory.
TEST_P(NothingToDo, TakesNullPointers) {
  for (const DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) {
    FusedFunctions::for_each([&](auto function) {
      const auto& [encode, fast_forward] = GetParam().kernels->*Fused<typename decltype(function)::type>::kernels;
      encode(dtype, nullptr, 0, nullptr);
      if (fast_forward != nullptr && dtype != DType::float64) {
        fast_forward(dtype, nullptr, 0, nullptr, nullptr, true);
      }
    });
    for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
      const std::vector<double> levels(std::size_t{1} << bits);
      GetParam()->step_decode_multiply(dtype, nullptr, nullptr, levels.data(), bits, 0, nullptr, true);
    }
    EXPECT_EQ(cpu::find_below({nullptr, dtype}, 0, 1), -1);
    cpu::store(nullptr, 0, {nullptr, dtype}, 0);
  }
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    EXPECT_EQ(GetParam()->pack_bits(nullptr, 0, bits, nullptr), 0);
    GetParam()->unpack_bits(nullptr, 0, bits, nullptr);
  }
}

TEST(ShouldStream, IsForWhatNoCacheHolds) {
  EXPECT_FALSE(cpu::should_stream(0));
  EXPECT_FALSE(cpu::should_stream(1));
  EXPECT_TRUE(cpu::should_stream(std::size_t{1} << 40));
}

TEST(FindBelow, ReturnsTheFirst) {
  std::vector<float> values(3000, 1);
  values[7] = -0.5F;
  const lomem::Array array{values.data(), DType::float32};
  EXPECT_EQ(cpu::find_below(array, 3000, 0.25), -1);
  EXPECT_EQ(cpu::find_below(array, 3000, 0.5), -1);
  values[2999] = -0.0F;
  EXPECT_EQ(cpu::find_below(array, 3000, 0.25), 2999);
  values[1024] = 0.125F;
  EXPECT_EQ(cpu::find_below(array, 3000, 0.25), 1024);
  EXPECT_EQ(cpu::find_below(array, 3000, 0.75), 7);
  EXPECT_EQ(cpu::find_below(array, 0, 0.25), -1);
}

TEST(FindBelow, EveryDTypeAndNaN) {
  for_each_element_type([](auto element) {
    using T = typename decltype(element)::type;
    // Compared in double: the smallest normal number is not below itself.
    const double smallest = lomem::smallest_normal(Element<T>::dtype);
    const std::vector<T> values = {
        Element<T>::from(std::nan("")), Element<T>::from(-smallest), Element<T>::from(1),
        Element<T>::from(-smallest / 2)};
    const AtPageEnd<T> source(values);
    EXPECT_EQ(cpu::find_below({source.data(), Element<T>::dtype}, 4, smallest), 3);
    EXPECT_EQ(cpu::find_below({source.data(), Element<T>::dtype}, 3, smallest), -1);
  });
}

TEST(Store, RoundsOnce) {
  const std::vector<double> values = {
      0.1, -0.0, 1e300, -1e-300, 65519.999, 65520, 1 + 0x1p-8 + 0x1p-40, 1 + 0x1p-11 + 0x1p-40, 0x1p-25, 0x1.8p-134};
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    std::vector<T> want;
    std::transform(values.begin(), values.end(), std::back_inserter(want), Element<T>::from);
    Guarded<T> all(values.size() + 3);
    all.assign(std::vector<T>(values.size() + 3, Element<T>::from(7)));
    cpu::store(values.data(), static_cast<std::int64_t>(values.size()), {all.data(), Element<T>::dtype}, 2);
    all.expect_intact();
    auto got = all.values();
    EXPECT_EQ(lomem::to_compute(got[1]), 7);
    EXPECT_EQ(lomem::to_compute(got.back()), 7);
    EXPECT_TRUE(same_bytes(std::vector<T>(got.begin() + 2, got.end() - 1), want)) << sizeof(T) << " bytes";
  });
}

}  // namespace
