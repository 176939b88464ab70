// Step kernels and the fast forward, of every instruction set, against the definitions: every 16-bit
// pattern, boundaries and their neighbours, every size, misaligned bases, sentinels, streaming stores.
#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "fused_functions.h"
#include "guarded.h"
#include "kernel_tables.h"
#include "oracle.h"

namespace {

using lomem::compute_t;
using lomem::cpu::KernelTable;

// Codes ----------------------------------------------------------------------------------------------

class StepEncode : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(StepEncode);

template <class Function>
const KernelTable::Fused& kernels_of(const Table& table) {
  return table.kernels->*Fused<Function>::kernels;
}

template <class Function, class T>
std::uint8_t expected_code(T x) {
  using Step = typename Function::PublishedSteps;
  return static_cast<std::uint8_t>(
      oracle::code<T>(lomem::to_compute(x), Step::boundary(0), Step::boundary(1), Step::boundary(2)));
}

/// Special elements, and boundaries with their neighbours.
template <class Function, class T>
std::vector<T> elements_at_boundaries() {
  using Step = typename Function::PublishedSteps;
  auto result = special_elements<T>();
  for (int i = 0; i < 3; ++i) {
    const T boundary = Element<T>::from(Step::boundary(i));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &boundary, sizeof(T));
    for (const int distance : {-2, -1, 0, 1, 2}) {
      result.push_back(from_pattern<T>(bits + static_cast<std::uint64_t>(distance)));
    }
  }
  return result;
}

template <class Function, class T>
void check_encode(const Table& table, const std::vector<T>& x) {
  std::vector<std::uint8_t> codes;
  std::transform(x.begin(), x.end(), std::back_inserter(codes), expected_code<Function, T>);
  const auto want = oracle::pack(codes, Function::PublishedSteps::bits);
  const auto n = static_cast<std::int64_t>(x.size());
  // Inputs as far from alignment as their number makes them; then by one element, from an aligned address.
  const AtPageEnd<T> at_end(x);
  Guarded<T> shifted(x.size(), 1);
  shifted.assign(x);
  for (const T* input : {at_end.data(), static_cast<const T*>(shifted.data())}) {
    Guarded<std::uint8_t> packed(want.size(), x.size() % 5);
    kernels_of<Function>(table).encode(Element<T>::dtype, input, n, packed.data());
    ASSERT_TRUE(same_bytes(packed.values(), want)) << x.size() << " elements of " << sizeof(T) << " bytes";
    packed.expect_intact();
  }
}

template <class Function>
void check_encode_of_every_size(const Table& table) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto at_boundaries = elements_at_boundaries<Function, T>();
    for (const std::size_t n : awkward_sizes()) {
      auto x = random_elements<T>(n, 4, static_cast<unsigned>(n));
      for (std::size_t i = n % 3; i < n; i += 3) {
        x[i] = at_boundaries[(i / 3 + n) % at_boundaries.size()];
      }
      check_encode<Function>(table, x);
    }
  });
}

TEST_P(StepEncode, EverySize) {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check_encode_of_every_size<Function>(GetParam());
  });
}

template <class Function>
void check_boundaries_in_every_place(const Table& table) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto at_boundaries = elements_at_boundaries<Function, T>();
    for (std::size_t first = 0; first < at_boundaries.size(); ++first) {
      std::vector<T> x(64);
      for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = at_boundaries[(first + i) % at_boundaries.size()];
      }
      check_encode<Function>(table, x);
    }
  });
}

TEST_P(StepEncode, BoundariesInEveryPlace) {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check_boundaries_in_every_place<Function>(GetParam());
  });
}

template <class Function>
void check_patterns_in_every_place(const Table& table) {
  for_each_sixteen_bit_type([&](auto element) {
    using T = typename decltype(element)::type;
    std::vector<std::uint8_t> codes;
    for (const T x : all_patterns<T>()) {
      codes.push_back(expected_code<Function>(x));
    }
    for (int first = 0; first < 64; ++first) {
      const auto x = all_patterns<T>(first);
      std::vector<std::uint8_t> want(x.size() / 4);
      for (std::size_t i = 0; i < x.size(); ++i) {
        want[i / 4] |= static_cast<std::uint8_t>(codes[x[i].bits] << (2 * (i % 4)));
      }
      std::vector<std::uint8_t> packed(want.size());
      kernels_of<Function>(table).encode(
          Element<T>::dtype, x.data(), static_cast<std::int64_t>(x.size()), packed.data());
      ASSERT_TRUE(same_bytes(packed, want)) << "first pattern " << first;
    }
  });
}

TEST_P(StepEncode, SixteenBitPatternsInEveryPlace) {
  FusedFunctions::for_each([](auto function) {
    using Function = typename decltype(function)::type;
    SCOPED_TRACE(Fused<Function>::name);
    check_patterns_in_every_place<Function>(GetParam());
  });
}

// Codes of boundaries known at run time ----------------------------------------------------------------

class SearchEncode : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(SearchEncode);

/// Ascending, denser at 0, some equal, an infinity at the end where there are many.
std::vector<double> some_boundaries(int bits, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 2);
  std::vector<double> result((std::size_t{1} << bits) - 1);
  for (double& boundary : result) {
    boundary = normal(generator);
  }
  if (bits > 2) {
    result[1] = result[2];
    result[0] = std::numeric_limits<double>::infinity();
    result[3] = 0;
    result[4] = -0.0;
    result[5] = 1e-42;
    result[6] = -1e300;
  }
  std::sort(result.begin(), result.end());
  return result;
}

template <class T>
void check_search_encode(const Table& table, const std::vector<T>& x, const std::vector<double>& boundaries, int bits) {
  std::vector<std::uint8_t> codes;
  for (const T element : x) {
    const auto value = lomem::to_compute(element);
    codes.push_back(static_cast<std::uint8_t>(std::count_if(boundaries.begin(), boundaries.end(), [&](double c) {
      return value > static_cast<compute_t<T>>(c);
    })));
  }
  const auto want = oracle::pack(codes, bits);
  const AtPageEnd<T> at_end(x);
  Guarded<std::uint8_t> packed(want.size(), x.size() % 5);
  table->step_search_encode(
      Element<T>::dtype, at_end.data(), static_cast<std::int64_t>(x.size()), boundaries.data(), bits, packed.data());
  ASSERT_TRUE(same_bytes(packed.values(), want)) << bits << " bits, " << x.size() << " elements of " << sizeof(T);
  packed.expect_intact();
}

/// Special elements, and boundaries with their neighbours.
template <class T>
std::vector<T> elements_at(const std::vector<double>& boundaries) {
  auto result = special_elements<T>();
  for (const double c : boundaries) {
    const T boundary = Element<T>::from(c);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &boundary, sizeof(T));
    for (const int distance : {-1, 0, 1}) {
      result.push_back(from_pattern<T>(bits + static_cast<std::uint64_t>(distance)));
    }
  }
  return result;
}

TEST_P(SearchEncode, EverySize) {
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    const auto boundaries = some_boundaries(bits, static_cast<unsigned>(bits));
    for_each_element_type([&](auto element) {
      using T = typename decltype(element)::type;
      const auto at_boundaries = elements_at<T>(boundaries);
      for (const std::size_t n : awkward_sizes()) {
        auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
        for (std::size_t i = n % 3; i < n; i += 3) {
          x[i] = at_boundaries[(i / 3 + n) % at_boundaries.size()];
        }
        check_search_encode(GetParam(), x, boundaries, bits);
      }
      check_search_encode(GetParam(), at_boundaries, boundaries, bits);
    });
  }
}

TEST_P(SearchEncode, SixteenBitPatterns) {
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    for_each_sixteen_bit_type([&](auto element) {
      using T = typename decltype(element)::type;
      check_search_encode(GetParam(), all_patterns<T>(bits), some_boundaries(bits, 7), bits);
    });
  }
}

class BandEncode : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(BandEncode);

template <class T>
void check_band_encode(const Table& table, const std::vector<T>& x, double low, double high) {
  using C = compute_t<T>;
  std::vector<std::uint8_t> codes;
  for (const T element : x) {
    const C value = lomem::to_compute(element);
    codes.push_back(static_cast<C>(low) <= value && value <= static_cast<C>(high) ? 1 : 0);
  }
  const auto want = oracle::pack(codes, 1);
  const AtPageEnd<T> at_end(x);
  Guarded<std::uint8_t> packed(want.size(), x.size() % 5);
  table->band_encode(Element<T>::dtype, at_end.data(), static_cast<std::int64_t>(x.size()), low, high, packed.data());
  ASSERT_TRUE(same_bytes(packed.values(), want)) << x.size() << " elements of " << sizeof(T) << " bytes";
  packed.expect_intact();
}

TEST_P(BandEncode, EverySizeAndPattern) {
  const double infinity = std::numeric_limits<double>::infinity();
  const double bands[][2] = {{-infinity, 0}, {0, infinity}, {-0.3, 0.7}, {1e-45, 6}, {-infinity, infinity}, {2, 1}};
  for (const auto& [low, high] : bands) {
    for_each_element_type([&, low = low, high = high](auto element) {
      using T = typename decltype(element)::type;
      for (const std::size_t n : awkward_sizes()) {
        check_band_encode(GetParam(), random_elements<T>(n, 1, static_cast<unsigned>(n)), low, high);
      }
      check_band_encode(GetParam(), elements_at<T>({low, high}), low, high);
    });
    for_each_sixteen_bit_type([&, low = low, high = high](auto element) {
      using T = typename decltype(element)::type;
      check_band_encode(GetParam(), all_patterns<T>(), low, high);
    });
  }
}

// Gradients ------------------------------------------------------------------------------------------

class StepDecodeMultiply : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(StepDecodeMultiply);

std::vector<double> some_levels(int bits) {
  std::vector<double> levels(std::size_t{1} << bits);
  for (std::size_t i = 0; i < levels.size(); ++i) {
    levels[i] = std::sin(static_cast<double>(i) + 0.1);
  }
  return levels;
}

/// Among levels of usual size, those that make zeros, subnormal numbers and infinities.
std::vector<double> extreme_levels(int bits) {
  auto levels = some_levels(bits);
  const double extremes[] = {0,    1e-38, -1e-30, 3e38, std::numeric_limits<double>::infinity(),
                             -0.0, 1e-6,  -70000, 1e-45};
  for (std::size_t i = 1; i < levels.size(); i += 2) {
    levels[i] = extremes[i / 2 % std::size(extremes)];
  }
  return levels;
}

template <class T>
std::vector<T> expected_gradients(
    const std::vector<T>& grad, const std::vector<std::uint8_t>& codes, const std::vector<double>& levels) {
  std::vector<T> result(grad.size());
  for (std::size_t i = 0; i < grad.size(); ++i) {
    const auto level = static_cast<compute_t<T>>(levels[codes[i]]);
    // With one bit, 0 is 0 whatever the gradient is.
    result[i] = levels.size() == 2 && level == 0 ? T{} : lomem::step_gradient<8>(grad[i], level);
  }
  return result;
}

TEST_P(StepDecodeMultiply, EverySize) {
  std::mt19937 generator(1);
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    const auto levels = some_levels(bits);
    for_each_element_type([&](auto element) {
      using T = typename decltype(element)::type;
      const auto specials = special_elements<T>();
      for (const std::size_t n : awkward_sizes()) {
        auto grad = random_elements<T>(n, 1, static_cast<unsigned>(n + 1));
        for (std::size_t i = n % 7; i < n; i += 7) {
          grad[i] = specials[(i / 7 + n) % specials.size()];
        }
        std::vector<std::uint8_t> codes(n);
        for (auto& code : codes) {
          code = static_cast<std::uint8_t>(generator() & lomem::max_code(bits));
        }
        const auto want = expected_gradients(grad, codes, levels);
        const AtPageEnd<T> source(grad);
        // Whole registers of codes are loaded: none may reach beyond them.
        const AtPageEnd<std::uint8_t> packed(oracle::pack(codes, bits));
        for (const bool stream : {false, true}) {
          for (const std::size_t misalignment : {std::size_t{0}, 1 + n % 5}) {
            Guarded<T> result(n, misalignment);
            GetParam()->step_decode_multiply(
                Element<T>::dtype, source.data(), packed.data(), levels.data(), bits, static_cast<std::int64_t>(n),
                result.data(), stream);
            ASSERT_TRUE(same_bytes(result.values(), want))
                << bits << " bits, " << n << " elements of " << sizeof(T) << " bytes, stream " << stream;
            result.expect_intact();
          }
        }
      }
    });
  }
}

TEST_P(StepDecodeMultiply, SixteenBitPatterns) {
  for (int bits = lomem::min_bits; bits <= lomem::max_bits; ++bits) {
    const auto levels = extreme_levels(bits);
    for_each_sixteen_bit_type([&](auto element) {
      using T = typename decltype(element)::type;
      // Each pattern meets four levels, in four places of a vector.
      for (int turn = 0; turn < 4; ++turn) {
        const auto grad = all_patterns<T>(13 * turn);
        std::vector<std::uint8_t> codes(grad.size());
        for (std::size_t i = 0; i < codes.size(); ++i) {
          codes[i] = static_cast<std::uint8_t>((grad[i].bits * 37 + turn) & lomem::max_code(bits));
        }
        const auto want = expected_gradients(grad, codes, levels);
        const auto packed = oracle::pack(codes, bits);
        Guarded<T> result(grad.size());
        for (const bool stream : {false, true}) {
          GetParam()->step_decode_multiply(
              Element<T>::dtype, grad.data(), packed.data(), levels.data(), bits,
              static_cast<std::int64_t>(grad.size()), result.data(), stream);
          ASSERT_TRUE(same_bytes(result.values(), want)) << bits << " bits, stream " << stream;
        }
      }
    });
  }
}

TEST_P(StepDecodeMultiply, FloatsOfEveryBinade) {
  const auto levels = extreme_levels(2);
  std::vector<float> grad;
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 0x8f1b) {
    grad.push_back(from_pattern<float>(bits));
  }
  std::vector<std::uint8_t> codes(grad.size());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>(i % 4);
  }
  const auto packed = oracle::pack(codes, 2);
  std::vector<float> result(grad.size());
  GetParam()->step_decode_multiply(
      lomem::DType::float32, grad.data(), packed.data(), levels.data(), 2, static_cast<std::int64_t>(grad.size()),
      result.data(), false);
  EXPECT_TRUE(same_bytes(result, expected_gradients(grad, codes, levels)));
}

TEST_P(StepDecodeMultiply, LevelsThatAreNaN) {
  const std::vector<double> levels = {std::nan("1"), 1, -std::nan("2"), 0.5};
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const auto grad = random_elements<T>(100, 1, 1);  // of two NaN, either's bits may be the product's
    std::vector<std::uint8_t> codes(grad.size());
    for (std::size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<std::uint8_t>(i % 4);
    }
    const auto packed = oracle::pack(codes, 2);
    std::vector<T> result(grad.size());
    GetParam()->step_decode_multiply(
        Element<T>::dtype, grad.data(), packed.data(), levels.data(), 2, static_cast<std::int64_t>(grad.size()),
        result.data(), false);
    EXPECT_TRUE(same_bytes(result, expected_gradients(grad, codes, levels)));
  });
}

// Fast forward ---------------------------------------------------------------------------------------

class FastForward : public KernelTest {
 protected:
  /// Runs body(Type<Function>{}) for each function, where the table has kernels for them.
  template <class Body>
  static void for_each_function(Body&& body) {
    FusedFunctions::for_each([&](auto function) {
      using Function = typename decltype(function)::type;
      SCOPED_TRACE(Fused<Function>::name);
      if (GetParam().kernels == &lomem::cpu::default_kernels) {
        // No fused multiply-add: the callers take the strict way.
        EXPECT_EQ(kernels_of<Function>(GetParam()).fast_forward, nullptr);
      } else {
        body(function);
      }
    });
  }
};
INSTANTIATE_FOR_EVERY_TABLE(FastForward);

template <class Function, class T>
T expected_value(T x) {
  return lomem::from_compute<T>(lomem::fast::value<typename Fused<Function>::Fast>(lomem::to_compute(x)));
}

template <class Function, class T>
void check_fast_forward(const Table& table, const std::vector<T>& x) {
  const auto fast_forward = kernels_of<Function>(table).fast_forward;
  std::vector<T> want;
  std::transform(x.begin(), x.end(), std::back_inserter(want), expected_value<Function, T>);
  std::vector<std::uint8_t> codes;
  std::transform(x.begin(), x.end(), std::back_inserter(codes), expected_code<Function, T>);
  const auto want_packed = oracle::pack(codes, Function::PublishedSteps::bits);
  const AtPageEnd<T> source(x);
  const auto n = static_cast<std::int64_t>(x.size());
  for (const bool stream : {false, true}) {
    for (const std::size_t misalignment : {std::size_t{0}, 1 + x.size() % 5}) {
      SCOPED_TRACE(
          testing::Message() << n << " elements of " << sizeof(T) << " bytes, stream " << stream << ", misaligned by "
                             << misalignment);
      Guarded<T> y(x.size(), misalignment);
      Guarded<std::uint8_t> packed(want_packed.size(), misalignment);
      fast_forward(Element<T>::dtype, source.data(), n, y.data(), packed.data(), stream);
      ASSERT_TRUE(same_bytes(y.values(), want));
      ASSERT_TRUE(same_bytes(packed.values(), want_packed));
      y.expect_intact();
      packed.expect_intact();

      Guarded<T> without_codes(x.size(), misalignment);
      fast_forward(Element<T>::dtype, source.data(), n, without_codes.data(), nullptr, stream);
      ASSERT_TRUE(same_bytes(without_codes.values(), want));
      without_codes.expect_intact();
    }
  }
}

TEST_P(FastForward, EverySize) {
  for_each_function([](auto function) {
    using Function = typename decltype(function)::type;
    for_each_element_type([](auto element) {
      using T = typename decltype(element)::type;
      if constexpr (sizeof(T) <= sizeof(float)) {
        const auto at_boundaries = elements_at_boundaries<Function, T>();
        for (const std::size_t n : awkward_sizes()) {
          auto x = random_elements<T>(n, 4, static_cast<unsigned>(n));
          for (std::size_t i = n % 5; i < n; i += 5) {
            x[i] = at_boundaries[(i / 5 + n) % at_boundaries.size()];
          }
          check_fast_forward<Function>(GetParam(), x);
        }
      }
    });
  });
}

TEST_P(FastForward, SixteenBitPatternsInEveryPlace) {
  for_each_function([](auto function) {
    using Function = typename decltype(function)::type;
    for_each_sixteen_bit_type([](auto element) {
      using T = typename decltype(element)::type;
      std::vector<T> values;
      for (const T x : all_patterns<T>()) {
        values.push_back(expected_value<Function>(x));
      }
      for (int first = 0; first < 32; ++first) {
        const auto x = all_patterns<T>(first);
        std::vector<T> want(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) {
          want[i] = values[x[i].bits];
        }
        Guarded<T> y(x.size());
        std::vector<std::uint8_t> packed(x.size() / 4);
        const auto n = static_cast<std::int64_t>(x.size());
        kernels_of<Function>(GetParam())
            .fast_forward(Element<T>::dtype, x.data(), n, y.data(), packed.data(), first % 2 != 0);
        ASSERT_TRUE(same_bytes(y.values(), want)) << "first pattern " << first;
        std::vector<std::uint8_t> codes(packed.size());
        kernels_of<Function>(GetParam()).encode(Element<T>::dtype, x.data(), n, codes.data());
        ASSERT_TRUE(same_bytes(packed, codes)) << "first pattern " << first;
      }
    });
  });
}

TEST_P(FastForward, FloatsOfEveryBinade) {
  for_each_function([](auto function) {
    using Function = typename decltype(function)::type;
    std::vector<float> x;
    for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 0x8f1b) {
      x.push_back(from_pattern<float>(bits));
    }
    // Where one row of the table ends and the next begins, in quarters of whatever is a row.
    for (int quarter = -200; quarter <= 200; ++quarter) {
      const auto edge = static_cast<float>(quarter) / 16;
      for (const float towards : {-100.0F, 100.0F}) {
        x.push_back(edge);
        x.push_back(std::nextafter(edge, towards));
      }
    }
    check_fast_forward<Function>(GetParam(), x);
  });
}

TEST_P(FastForward, Specials) {
  for_each_function([](auto function) {
    using Function = typename decltype(function)::type;
    const float infinity = std::numeric_limits<float>::infinity();
    const std::array<float, 7> x = {std::nanf("5"), -std::nanf("6"), infinity, -infinity, 0.0F, -0.0F, 100.0F};
    std::array<float, 7> y = {};
    kernels_of<Function>(GetParam()).fast_forward(lomem::DType::float32, x.data(), 7, y.data(), nullptr, false);
    EXPECT_TRUE(std::isnan(y[0]));
    EXPECT_TRUE(std::isnan(y[1]));
    EXPECT_EQ(y[2], infinity);
    EXPECT_EQ(y[3], 0);
    EXPECT_EQ(y[4], 0);
    EXPECT_FALSE(std::signbit(y[4]));
    EXPECT_EQ(y[5], 0);
    EXPECT_TRUE(std::signbit(y[5]));
    EXPECT_EQ(y[6], 100);
  });
}

TEST_P(FastForward, IsThereForAllFunctionsOrNone) {
  int there = 0;
  FusedFunctions::for_each([&](auto function) {
    there += kernels_of<typename decltype(function)::type>(GetParam()).fast_forward != nullptr ? 1 : 0;
  });
  EXPECT_EQ(there, std::string(GetParam()->capability) == "DEFAULT" ? 0 : FusedFunctions::size);
}

}  // namespace
