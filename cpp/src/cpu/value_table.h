// torch's activations of 16-bit numbers on the CPU, looked up in a table of all 65,536 of them. That takes a fraction
// of the time, and gives the same bits, since the table is filled by torch.
//
// Most of torch's kernels evaluate the elements left over at the end of a thread's range by another formula, whose
// result differs for some numbers. These elements are given to torch itself, in the ranges that at::parallel_for makes
// for it.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "torch_activations.h"

namespace lomem::detail {

/// Smaller inputs are left to torch: a table takes as much time as an input of its size.
inline constexpr int64_t table_size = 65536;

/// What torch returns for all numbers of a 16-bit type, by their bits.
struct ValueTable {
  std::array<uint16_t, table_size> values;
  /// Whether what is left over at the end of a range has the same values. (NaNs may have other bits there.)
  bool everywhere;
};

/// Fills a table.
template <class Function>
std::unique_ptr<const ValueTable> make_value_table(at::ScalarType dtype) {
  const SubnormalsScope as_they_are(Subnormals::kept());
  const auto empty = [&](at::IntArrayRef sizes) { return at::Tensor(at::detail::empty_cpu(sizes, dtype)); };
  const at::Tensor pairs = empty({table_size, 2});
  auto* numbers = static_cast<uint16_t*>(pairs.mutable_data_ptr());
  for (int64_t i = 0; i < table_size; ++i) {
    numbers[2 * i] = numbers[2 * i + 1] = static_cast<uint16_t>(i);
  }
  const at::Tensor apart = pairs.select(1, 0);
  const at::Tensor together = apart.contiguous();
  auto table = std::make_unique<ValueTable>();
  table->everywhere = true;
  // Parts that torch gives to a single thread: others may flush subnormal numbers.
  constexpr int64_t part = at::internal::GRAIN_SIZE / 2;
  for (int64_t begin = 0; begin < table_size; begin += part) {
    const at::Tensor values = Values<Function>::value(together.narrow(0, begin, part));
    std::memcpy(table->values.data() + begin, values.const_data_ptr(), part * sizeof(uint16_t));
    if (!Values<Function>::alike(dtype)) {
      // What has gaps is computed like what is left over.
      const at::Tensor left_over = Values<Function>::value(apart.narrow(0, begin, part));
      const auto* bits = static_cast<const uint16_t*>(left_over.const_data_ptr());
      visit_dtype(to_dtype(dtype), [&](auto element) {
        using T = typename decltype(element)::type;
        if constexpr (sizeof(T) == sizeof(uint16_t)) {
          for (int64_t i = 0; i < part; ++i) {
            const uint16_t value = table->values[begin + i];
            const bool same =
                value == bits[i] || (std::isnan(to_compute(T{value})) && std::isnan(to_compute(T{bits[i]})));
            table->everywhere = table->everywhere && same;
          }
        }
      });
    }
  }
  return table;
}

/// The table for the inputs of a type, made at the first call.
template <class Function>
const ValueTable& value_table(at::ScalarType dtype) {
  // torch's choice of a kernel depends on the type and on a switch.
  static std::array<std::unique_ptr<const ValueTable>, 4> tables;
  static std::array<std::once_flag, 4> made;
  const size_t index =
      2 * static_cast<size_t>(Values<Function>::alike(dtype)) + static_cast<size_t>(dtype == at::kHalf);
  std::call_once(made[index], [&] { tables[index] = make_value_table<Function>(dtype); });
  return *tables[index];
}

/// Whether to look up the values of a tensor. torch's ReLU takes less time than that.
template <class Function>
bool may_look_up([[maybe_unused]] const at::Tensor& input) {
#if defined(LOMEM_X86_KERNELS)
  const bool wide = input.scalar_type() != at::kBFloat16 && input.scalar_type() != at::kHalf;
  return !std::is_same_v<Function, ReLU> && !wide && input.numel() >= table_size &&
         Subnormals::of_this_thread().are_kept();
#else
  return false;
#endif
}

/// y[i] = the value of x[i]. Where x and y are not in the cache, stores of two bytes would wait for each other, and so
/// would loads: a CPU has only few of them under way. Hence blocks, which are fetched ahead, and copied as a whole.
inline void look_up(const ValueTable& table, const uint16_t* x, int64_t n, uint16_t* y) {
  constexpr int64_t block = 128;
  constexpr int64_t ahead = 4 * block;
  const auto values_of = [&](int64_t begin, int64_t count, uint16_t* target) {
    for (int64_t i = 0; i < count; ++i) {
      target[i] = table.values[x[begin + i]];
    }
  };
  const int64_t whole = n / block * block;
  for (int64_t begin = 0; begin < whole; begin += block) {
    for (int64_t i = 0; i < block && begin + ahead + i < n; i += cache_line_elements / 2) {
      __builtin_prefetch(x + begin + ahead + i);
    }
    uint16_t values[block];
    values_of(begin, block, values);
    std::memcpy(y + begin, values, sizeof(values));
  }
  values_of(whole, n - whole, y + whole);
}

/// The values of a contiguous tensor for which may_look_up. It must outlive this.
template <class Function>
class LookedUp {
 public:
  explicit LookedUp(const at::Tensor& input)
      : table_(&value_table<Function>(input.scalar_type())), x_(static_cast<const uint16_t*>(input.const_data_ptr())) {
    if (!table_->everywhere) {
      for (const Range& range : ranges_of_torch(input.numel())) {
        add_left_over(input, range);
      }
    }
  }

  /// Writes those of the elements [begin, begin + count) to y.
  void operator()(int64_t begin, int64_t count, uint16_t* y) const {
    look_up(*table_, x_ + begin, count, y);
    for (const LeftOver& part : left_over_) {
      const int64_t first = std::max(begin, part.range.begin);
      const int64_t last = std::min(begin + count, part.range.end);
      if (first < last) {
        const auto* values = static_cast<const uint16_t*>(part.values.const_data_ptr());
        std::memcpy(y + (first - begin), values + (first - part.range.begin), (last - first) * sizeof(uint16_t));
      }
    }
  }

 private:
  struct Range {
    int64_t begin;
    int64_t end;
  };
  struct LeftOver {
    Range range;
    at::Tensor values;
  };

  /// The ranges of elements that torch's threads take in a contiguous tensor.
  static std::vector<Range> ranges_of_torch(int64_t n) {
    std::vector<Range> ranges;
    std::mutex mutex;
    at::parallel_for(0, n, Values<Function>::grain(n), [&](int64_t begin, int64_t end) {
      const std::lock_guard lock(mutex);
      ranges.push_back({begin, end});
    });
    return ranges;
  }

  void add_left_over(const at::Tensor& input, const Range& range) {
    // A multiple of what torch's loops take at once, with vectors of any length.
    const int64_t begin = range.end - (range.end - range.begin) % cache_line_elements;
    if (begin < range.end) {
      const at::Tensor part = view_of(const_cast<uint16_t*>(x_) + begin, range.end - begin, input);
      left_over_.push_back({{begin, range.end}, Values<Function>::value(part)});
    }
  }

  const ValueTable* table_;
  const uint16_t* x_;
  std::vector<LeftOver> left_over_;
};

/// Calls body(begin, count) for tiles that cover [0, n) and of which none is short: the last one takes the remainder.
template <class Body>
void for_tiles(int64_t n, int64_t tile_size, int64_t tiles_per_thread, const Body& body) {
  const int64_t tiles = std::max<int64_t>(1, n / tile_size);
  at::parallel_for(0, tiles, tiles_per_thread, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * tile_size;
      body(begin, tile + 1 == tiles ? n - begin : tile_size);
    }
  });
}

/// Whether torch's values of a contiguous tensor can be computed tile by tile (values_in_tiles).
template <class Function>
bool goes_in_tiles(const at::Tensor& input) {
  return input.is_contiguous() &&
         (may_look_up<Function>(input) || may_tile(input.numel(), Values<Function>::tiling(input.scalar_type())));
}

/// Writes torch's values of a tensor that goes in tiles to `output`, which is contiguous, and calls visit(begin, count)
/// after each tile, while it is in the cache. Tiles begin at multiples of cache_line_elements.
template <class Function, class Visit>
void values_in_tiles(const at::Tensor& input, at::Tensor& output, const Visit& visit) {
  const int64_t n = input.numel();
  const int64_t size = input.element_size();
  const auto* x = static_cast<const char*>(input.const_data_ptr());
  auto* y = static_cast<char*>(output.mutable_data_ptr());
  if (may_look_up<Function>(input)) {
    constexpr int64_t tile = elements_per_thread / 2;  // input and output stay in the first-level cache
    const LookedUp<Function> values(input);
    for_tiles(n, tile, 2, [&](int64_t begin, int64_t count) {
      values(begin, count, reinterpret_cast<uint16_t*>(y) + begin);
      visit(begin, count);
    });
    return;
  }
  for_tiles(n, tile_elements(n, Values<Function>::tiling(input.scalar_type())), 1, [&](int64_t begin, int64_t count) {
    // (from_blob takes no pointer to const, but the data is not written to.)
    const at::Tensor source = view_of(const_cast<char*>(x + begin * size), count, input);
    at::Tensor target = view_of(y + begin * size, count, input);
    Values<Function>::value_out(target, source);
    visit(begin, count);
  });
}

/// torch's values of any tensor.
template <class Function>
at::Tensor torch_values(const at::Tensor& input) {
  if (!input.is_contiguous() || !may_look_up<Function>(input)) {
    return Values<Function>::value(input);
  }
  at::Tensor output(at::detail::empty_cpu(input.sizes(), input.scalar_type()));
  values_in_tiles<Function>(input, output, [](int64_t, int64_t) {});
  return output;
}

}  // namespace lomem::detail
