// Kernels of dropout of every instruction set against the scalar formula, byte for byte: every size and alignment. The
// Mersenne Twister against the standard library's.
#include <random>

#include "guarded.h"
#include "kernel_tables.h"

namespace {

class DropoutKernels : public KernelTest {};
INSTANTIATE_FOR_EVERY_TABLE(DropoutKernels);

std::vector<std::uint8_t> random_bytes(std::size_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<std::uint8_t> result(n);
  for (std::uint8_t& byte : result) {
    byte = static_cast<std::uint8_t>(generator());
  }
  return result;
}

template <class T>
void check_masked(const Table& table, const std::vector<T>& x, double scale, std::size_t misalignment, bool stream) {
  const std::size_t n = x.size();
  const auto mask = random_bytes((n + 7) / 8, static_cast<unsigned>(n) + 1);
  std::vector<T> want(n);
  for (std::size_t i = 0; i < n; ++i) {
    const bool kept = (mask[i / 8] >> (i % 8) & 1) != 0;
    want[i] = lomem::scaled_if(kept, x[i], static_cast<lomem::compute_t<T>>(scale));
  }
  const AtPageEnd<T> input(x);
  const AtPageEnd<std::uint8_t> bits(mask);
  Guarded<T> product(n, misalignment);
  table->mask_multiply(
      Element<T>::dtype, input.data(), bits.data(), scale, static_cast<std::int64_t>(n), product.data(), stream);
  ASSERT_TRUE(same_bytes(product.values(), want)) << n << " elements of " << sizeof(T) << " bytes";
  product.expect_intact();
  // In place.
  Guarded<T> both(n, misalignment);
  both.assign(x);
  table->mask_multiply(
      Element<T>::dtype, both.data(), bits.data(), scale, static_cast<std::int64_t>(n), both.data(), stream);
  ASSERT_TRUE(same_bytes(both.values(), want)) << n << " elements of " << sizeof(T) << " bytes, in place";
  both.expect_intact();
}

/// Elements of which the first one is number `first` of a tensor.
template <class T>
void check_seeded(
    const Table& table, const std::vector<T>& x, std::uint64_t seed, std::int64_t first, double p,
    std::size_t misalignment, bool stream) {
  const std::size_t n = x.size();
  const std::uint32_t bound = lomem::dropout_bound(p);
  const auto scale = lomem::dropout_scale<T>(p);
  std::vector<T> want(n);
  for (std::size_t i = 0; i < n; ++i) {
    const bool kept = lomem::philox_word(seed, static_cast<std::uint64_t>(first) + i) >= bound;
    want[i] = lomem::scaled_if(kept, x[i], scale);
  }
  const AtPageEnd<T> input(x);
  Guarded<T> product(n, misalignment);
  table->seed_multiply(
      Element<T>::dtype, input.data(), seed, first, bound, scale, static_cast<std::int64_t>(n), product.data(), stream);
  ASSERT_TRUE(same_bytes(product.values(), want)) << n << " elements of " << sizeof(T) << " bytes from " << first;
  product.expect_intact();
}

TEST_P(DropoutKernels, SeedsOfEverySize) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (const std::size_t n : awkward_sizes()) {
      const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
      const std::uint64_t seed = 0x9e3779b97f4a7c15 * n;
      check_seeded(GetParam(), x, seed, 0, 0.1 * static_cast<double>(n % 10), n % 3, n % 2 == 0);
      check_seeded(GetParam(), x, seed, static_cast<std::int64_t>(8 * n), 0.5, n % 3, n % 2 == 0);
      // Numbers of blocks around and beyond 2^32.
      check_seeded(GetParam(), x, ~seed, (std::int64_t{1} << 34) - 64, 0.3, n % 3, n % 2 == 0);
      check_seeded(GetParam(), x, ~seed, std::int64_t{1} << 55, 0.3, n % 3, n % 2 == 0);
    }
  });
}

/// The state of the standard library's generator, which has drawn `used` numbers of the current words.
lomem::MersenneState state_of(const std::mt19937& generator) {
  std::stringstream text;
  text << generator;
  lomem::MersenneState state;
  for (std::uint32_t& word : state.words) {
    text >> word;
  }
  text >> state.next;
  return state;
}

TEST_P(DropoutKernels, MasksOfTheMersenneTwister) {
  for (const std::size_t n : awkward_sizes()) {
    for (const int before : {0, 1, 311, 622, 623, 624, 1001}) {
      for (const double p : {0.0, 0x1p-60, 0.1, 0.5, 0.9, 1 - 0x1p-53, 1.0}) {
        std::mt19937 generator(static_cast<unsigned>(n));
        generator.discard(static_cast<unsigned>(before));
        lomem::MersenneState state = state_of(generator);
        std::vector<std::uint8_t> want((n + 7) / 8);
        for (std::size_t i = 0; i < n; ++i) {
          const std::uint64_t high = generator();
          const std::uint64_t low = generator();
          const double u = static_cast<double>((high << 32 | low) % (std::uint64_t{1} << 53)) * 0x1p-53;
          want[i / 8] |= static_cast<std::uint8_t>((u < p ? 1 : 0) << (i % 8));
        }
        Guarded<std::uint8_t> mask(want.size(), n % 3);
        GetParam()->bernoulli_mask(state, lomem::bernoulli_bound(p), static_cast<std::int64_t>(n), mask.data());
        ASSERT_TRUE(same_bytes(mask.values(), want)) << n << " elements after " << before << ", p = " << p;
        mask.expect_intact();
        // Both go on alike.
        const lomem::MersenneState after = state_of(generator);
        ASSERT_EQ(state.next, after.next);
        ASSERT_EQ(std::memcmp(state.words, after.words, sizeof(state.words)), 0);
      }
    }
  }
}

TEST_P(DropoutKernels, EverySize) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    for (const std::size_t n : awkward_sizes()) {
      const auto x = random_elements<T>(n, 3, static_cast<unsigned>(n));
      check_masked(GetParam(), x, 1 / (1 - 0.1 * static_cast<double>(n % 10)), n % 3, n % 2 == 0);
    }
  });
}

TEST_P(DropoutKernels, EverySixteenBitPattern) {
  for_each_sixteen_bit_type([&](auto element) {
    using T = typename decltype(element)::type;
    // (Of a NaN, only that it is one is the same for all.)
    std::vector<T> numbers;
    for (const T x : all_patterns<T>()) {
      if (std::isfinite(lomem::to_compute(x))) {
        numbers.push_back(x);
      }
    }
    check_masked(GetParam(), numbers, 1.109375, 0, false);
  });
}

TEST_P(DropoutKernels, NotANumberAndInfinity) {
  for_each_element_type([&](auto element) {
    using T = typename decltype(element)::type;
    const double infinity = std::numeric_limits<double>::infinity();
    const T values[] = {Element<T>::from(infinity), Element<T>::from(-infinity), Element<T>::from(std::nan(""))};
    std::vector<T> x;
    for (int i = 0; i < 120; ++i) {
      x.push_back(values[i % 3]);
    }
    for (const std::uint8_t mask : {0x00, 0xff}) {
      const std::vector<std::uint8_t> bits(x.size() / 8, mask);
      std::vector<T> product(x.size());
      GetParam()->mask_multiply(
          Element<T>::dtype, x.data(), bits.data(), 2.0, static_cast<std::int64_t>(x.size()), product.data(), false);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const auto got = lomem::to_compute(product[i]);
        if (mask == 0 || i % 3 == 2) {
          ASSERT_TRUE(std::isnan(got)) << i;
        } else {
          ASSERT_EQ(got, lomem::to_compute(x[i])) << i;
        }
      }
    }
  });
}

}  // namespace
