// Every kernel table against the scalar core, and for norms against the default table, on what the bytes
// of an input say: kernel, dtype, bits, sizes, misalignment, data. Aborts where a byte differs, or where
// one was written out of bounds. (AddressSanitizer sees what is read out of bounds.)
#include <lomem/core.h>
#include <lomem/core/fast_forward.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <vector>

#include "../core/fused_functions.h"
#include "../core/gates.h"
#include "kernel_table.h"

namespace {

using lomem::compute_t;
using lomem::DType;
using lomem::cpu::KernelTable;
using Bytes = std::vector<std::uint8_t>;

/// The bytes of an input, one after another; when they are used up, pseudo-random ones that they
/// determine.
class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    if (next_ < size_) {
      state_ ^= data_[next_];
      return data_[next_++];
    }
    return static_cast<std::uint8_t>(state_ >> 56);
  }
  /// 0 to most.
  std::size_t number(std::size_t most) {
    const std::size_t low = byte();
    return (low | static_cast<std::size_t>(byte()) << 8) % (most + 1);
  }
  bool flag() {
    return (byte() & 1) != 0;
  }
  DType dtype() {
    return static_cast<DType>(byte() % 4);
  }
  Bytes bytes(std::size_t count) {
    Bytes result(count);
    for (auto& one : result) {
      one = byte();
    }
    return result;
  }
  /// Numbers of usual size, or any bits, among which there is soon a NaN.
  Bytes elements(DType dtype, std::size_t count) {
    const bool usual = flag();
    const double unit = flag() ? 1.0 / 32 : 1.0 / 4096;
    const std::size_t size = lomem::element_size(dtype);
    Bytes result = bytes(count * size);
    for (std::size_t i = 0; usual && i < count; ++i) {
      std::int16_t whole = 0;
      std::memcpy(&whole, &result[i * size], sizeof(whole));
      lomem::visit_dtype(dtype, [&](auto element) {
        const auto value = lomem::from_double<typename decltype(element)::type>(whole * unit / 256);
        std::memcpy(&result[i * size], &value, sizeof(value));
      });
    }
    return result;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t next_ = 0;
  std::uint64_t state_ = 1;
};

[[noreturn]] void fail(const KernelTable& table, const char* what, std::size_t byte, int got, int want) {
  std::fprintf(stderr, "%s: %s: byte %zu is 0x%02x, expected 0x%02x\n", table.capability, what, byte, got, want);
  std::abort();
}

/// Memory that begins `offset` bytes after a multiple of 64.
class Memory {
 public:
  /// To read: it ends with the last byte.
  Memory(const Bytes& bytes, std::size_t offset) : Memory(bytes.size(), offset, 0) {
    if (!bytes.empty()) {
      std::memcpy(data(), bytes.data(), bytes.size());
    }
  }
  /// To write: with sentinels around.
  Memory(std::size_t size, std::size_t offset) : Memory(size, offset, 64) {}

  ~Memory() {
    ::operator delete(all_, alignment);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() {
    return all_ + offset_;
  }

  /// What was written.
  Bytes written(const KernelTable& table) const {
    for (std::size_t i = 0; i < offset_ + size_ + tail_; ++i) {
      if ((i < offset_ || i >= offset_ + size_) && all_[i] != sentinel) {
        fail(table, "out of bounds", i, all_[i], sentinel);
      }
    }
    return Bytes(all_ + offset_, all_ + offset_ + size_);
  }

 private:
  Memory(std::size_t size, std::size_t offset, std::size_t tail)
      : size_(size),
        offset_(offset),
        tail_(tail),
        all_(static_cast<std::uint8_t*>(::operator new(offset + size + tail, alignment))) {
    std::memset(all_, sentinel, offset + size + tail);
  }

  static constexpr std::align_val_t alignment{64};
  static constexpr std::uint8_t sentinel = 0xa5;
  std::size_t size_;
  std::size_t offset_;
  std::size_t tail_;
  std::uint8_t* all_;
};

void expect_same(const KernelTable& table, const char* what, const Bytes& got, const Bytes& want) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (got[i] != want[i]) {
      fail(table, what, i, got[i], want[i]);
    }
  }
}

template <class Body>
void for_each_table(Body&& body) {
  for (const auto* const* table = lomem::cpu::runnable_kernels(); *table != nullptr; ++table) {
    body(**table);
  }
}

template <class T>
std::vector<T> elements_of(const Bytes& bytes) {
  std::vector<T> result(bytes.size() / sizeof(T));
  if (!bytes.empty()) {
    std::memcpy(result.data(), bytes.data(), bytes.size());
  }
  return result;
}

template <class T>
Bytes bytes_of(const std::vector<T>& elements) {
  Bytes result(elements.size() * sizeof(T));
  if (!elements.empty()) {
    std::memcpy(result.data(), elements.data(), result.size());
  }
  return result;
}

constexpr std::size_t most_elements = 600;
constexpr std::size_t most_bytes_off = 9;

template <class Function>
Bytes scalar_codes(DType dtype, const Bytes& x, std::size_t n) {
  using Step = typename Function::PublishedSteps;
  Bytes packed(lomem::packed_bytes(n, Step::bits));
  lomem::visit_dtype(dtype, [&](auto element) {
    const auto elements = elements_of<typename decltype(element)::type>(x);
    lomem::step_encode<Step>(elements.data(), static_cast<std::int64_t>(n), packed.data());
  });
  return packed;
}

template <class Function>
void fuzz_encode(Choices& choices) {
  const DType dtype = choices.dtype();
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off);
  const Bytes x = choices.elements(dtype, n);
  const Bytes want = scalar_codes<Function>(dtype, x, n);
  for_each_table([&](const KernelTable& table) {
    Memory source(x, offset * lomem::element_size(dtype));
    Memory packed(want.size(), offset);
    (table.*Fused<Function>::kernels)
        .encode(dtype, source.data(), static_cast<std::int64_t>(n), static_cast<std::uint8_t*>(packed.data()));
    expect_same(table, "step_encode", packed.written(table), want);
  });
}

/// Boundaries of elements themselves, so that ties are met; sorted, with infinities for what is no number.
std::vector<double> boundaries_of(Choices& choices, int bits) {
  const std::size_t count = (std::size_t{1} << bits) - 1;
  std::vector<double> boundaries;
  const DType dtype = choices.dtype();
  lomem::visit_dtype(dtype, [&](auto element) {
    for (const auto x : elements_of<typename decltype(element)::type>(choices.elements(dtype, count))) {
      const double value = lomem::to_compute(x);
      boundaries.push_back(std::isnan(value) ? std::numeric_limits<double>::infinity() : value);
    }
  });
  std::sort(boundaries.begin(), boundaries.end());
  return boundaries;
}

void fuzz_search(Choices& choices) {
  const DType dtype = choices.dtype();
  const int bits = 1 + choices.byte() % lomem::max_bits;
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off);
  const std::vector<double> boundaries = boundaries_of(choices, bits);
  const Bytes x = choices.elements(dtype, n);
  Bytes want(lomem::packed_bytes(n, bits));
  Bytes want_band(lomem::packed_bytes(n, 1));
  const double low = boundaries.front();
  const double high = boundaries.back();
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    using C = compute_t<T>;
    const auto elements = elements_of<T>(x);
    std::vector<C> rounded;
    for (const double c : boundaries) {
      rounded.push_back(static_cast<C>(c));
    }
    const auto count = static_cast<std::int64_t>(n);
    lomem::visit_bits(bits, [&](auto width) {
      lomem::step_search_encode<decltype(width)::value>(elements.data(), count, rounded.data(), want.data());
    });
    lomem::band_encode(elements.data(), count, static_cast<C>(low), static_cast<C>(high), want_band.data());
  });
  for_each_table([&](const KernelTable& table) {
    Memory source(x, offset * lomem::element_size(dtype));
    Memory packed(want.size(), offset);
    table.step_search_encode(
        dtype, source.data(), static_cast<std::int64_t>(n), boundaries.data(), bits,
        static_cast<std::uint8_t*>(packed.data()));
    expect_same(table, "step_search_encode", packed.written(table), want);
    Memory band(want_band.size(), offset);
    table.band_encode(
        dtype, source.data(), static_cast<std::int64_t>(n), low, high, static_cast<std::uint8_t*>(band.data()));
    expect_same(table, "band_encode", band.written(table), want_band);
  });
}

void fuzz_decode(Choices& choices) {
  const DType dtype = choices.dtype();
  const int bits = 1 + choices.byte() % lomem::max_bits;
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off);
  const bool stream = choices.flag();
  std::vector<double> levels;
  const Bytes some = choices.bytes(std::size_t{1} << bits);
  for (const std::uint8_t level : some) {
    levels.push_back(level == 0 ? 1e-39 : (level - 128) / 64.0);
  }
  const Bytes codes = choices.bytes(lomem::packed_bytes(n, bits));
  const Bytes grad = choices.elements(dtype, n);
  Bytes want;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto elements = elements_of<T>(grad);
    const std::vector<compute_t<T>> rounded(levels.begin(), levels.end());
    std::vector<T> result(n);
    lomem::visit_bits(bits, [&](auto width) {
      lomem::step_decode_multiply<decltype(width)::value>(
          elements.data(), codes.data(), rounded.data(), static_cast<std::int64_t>(n), result.data());
    });
    want = bytes_of(result);
  });
  for_each_table([&](const KernelTable& table) {
    Memory source(grad, offset * lomem::element_size(dtype));
    Memory packed(codes, offset);
    Memory result(want.size(), offset * lomem::element_size(dtype));
    table.step_decode_multiply(
        dtype, source.data(), static_cast<const std::uint8_t*>(packed.data()), levels.data(), bits,
        static_cast<std::int64_t>(n), result.data(), stream);
    expect_same(table, "step_decode_multiply", result.written(table), want);
  });
}

template <class Function>
void fuzz_fast_forward(Choices& choices) {
  const auto dtype = static_cast<DType>(1 + choices.byte() % 3);
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off);
  const bool stream = choices.flag();
  const bool with_codes = choices.flag();
  const Bytes x = choices.elements(dtype, n);
  const Bytes want_codes = scalar_codes<Function>(dtype, x, n);
  Bytes want;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    if constexpr (sizeof(T) < sizeof(double)) {
      auto elements = elements_of<T>(x);
      for (T& one : elements) {
        one = lomem::from_compute<T>(lomem::fast::value<typename Fused<Function>::Fast>(lomem::to_compute(one)));
      }
      want = bytes_of(elements);
    }
  });
  for_each_table([&](const KernelTable& table) {
    const auto kernel = (table.*Fused<Function>::kernels).fast_forward;
    if (kernel == nullptr) {
      return;
    }
    Memory source(x, offset * lomem::element_size(dtype));
    Memory y(want.size(), offset * lomem::element_size(dtype));
    Memory packed(want_codes.size(), offset);
    auto* codes = with_codes ? static_cast<std::uint8_t*>(packed.data()) : nullptr;
    kernel(dtype, source.data(), static_cast<std::int64_t>(n), y.data(), codes, stream);
    expect_same(table, "fast_forward", y.written(table), want);
    if (with_codes) {
      expect_same(table, "codes of fast_forward", packed.written(table), want_codes);
    }
  });
}

void fuzz_packing(Choices& choices) {
  const int bits = 1 + choices.byte() % lomem::max_bits;
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off);
  const Bytes codes = choices.bytes(n);
  std::uint8_t any = 0;
  for (const auto code : codes) {
    any = static_cast<std::uint8_t>(any | code);
  }
  Bytes want(lomem::packed_bytes(n, bits));
  Bytes want_codes(n);
  lomem::visit_bits(bits, [&](auto width) {
    lomem::pack<decltype(width)::value>(codes.data(), static_cast<std::int64_t>(n), want.data());
    lomem::unpack<decltype(width)::value>(want.data(), static_cast<std::int64_t>(n), want_codes.data());
  });
  for_each_table([&](const KernelTable& table) {
    Memory source(codes, offset);
    Memory packed(want.size(), offset);
    const std::uint8_t reported = table.pack_bits(
        static_cast<const std::uint8_t*>(source.data()), static_cast<std::int64_t>(n), bits,
        static_cast<std::uint8_t*>(packed.data()));
    expect_same(table, "pack_bits", packed.written(table), want);
    expect_same(table, "the or of all codes", {reported}, {any});

    Memory packed_source(want, offset);
    Memory unpacked(n, offset);
    table.unpack_bits(
        static_cast<const std::uint8_t*>(packed_source.data()), static_cast<std::int64_t>(n), bits,
        static_cast<std::uint8_t*>(unpacked.data()));
    expect_same(table, "unpack_bits", unpacked.written(table), want_codes);
  });
}

/// Fills the stack below the caller with NaN, so that a kernel that reads what it did not write gives NaN.
[[gnu::noinline]] void spoil_stack() {
  unsigned char buffer[std::size_t{1} << 18];
  std::memset(buffer, 0xff, sizeof(buffer));
  asm volatile("" : : "r"(buffer) : "memory");
}

/// The bytes of elements, with one NaN for all: which of several NaN a sum keeps depends on the order of
/// operands, which is the compiler's.
Bytes with_one_nan(DType dtype, const Bytes& bytes) {
  Bytes result;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    auto elements = elements_of<T>(bytes);
    for (T& one : elements) {
      const auto value = lomem::to_compute(one);
      one = value != value ? lomem::from_double<T>(NAN) : one;
    }
    result = bytes_of(elements);
  });
  return result;
}

/// Forward, then backward from its results; the default table's results are what the others must give.
void fuzz_norm(
    Choices& choices, KernelTable::NormForwardRows KernelTable::* forward,
    KernelTable::NormBackwardRows KernelTable::* backward) {
  const DType input_dtype = choices.dtype();
  const DType output_dtype = choices.flag() ? input_dtype : choices.dtype();
  const DType weight_dtype = choices.flag() ? output_dtype : choices.dtype();
  const DType rstd_dtype = input_dtype == DType::float64 ? DType::float64 : DType::float32;
  const std::size_t rows = choices.number(5);
  const std::size_t cols = choices.byte() % 16 == 0 ? 4000 + choices.number(200) : choices.number(100);
  const std::size_t split = choices.number(rows);
  const std::size_t offset = choices.number(most_bytes_off);
  const bool stream = choices.flag();
  const bool has_weight = choices.flag();
  const bool has_bias = choices.flag();
  const bool wants_weight = choices.flag();
  const bool wants_bias = choices.flag();
  const bool wants_input = choices.byte() % 8 != 0;
  const double eps = choices.flag() ? 1e-5 : 0;
  const Bytes x = choices.elements(input_dtype, rows * cols);
  const Bytes grad = choices.elements(output_dtype, rows * cols);
  const Bytes gamma = choices.elements(weight_dtype, cols);
  const Bytes beta = choices.elements(weight_dtype, cols);
  const Bytes sums = bytes_of(std::vector<double>(cols, 0.25));
  const auto off = [&](DType dtype) { return offset * lomem::element_size(dtype); };

  struct Results {
    Bytes output, rstd, grad_input, grad_weight, grad_bias;
  };
  const auto run = [&](const KernelTable& table) {
    Memory x_memory(x, off(input_dtype));
    Memory grad_memory(grad, off(output_dtype));
    Memory weight(gamma, off(weight_dtype));
    Memory bias(beta, off(weight_dtype));
    Memory output(grad.size(), off(output_dtype));
    Memory rstd(rows * lomem::element_size(rstd_dtype), off(rstd_dtype));
    Memory grad_input(x.size(), off(input_dtype));
    Memory grad_weight(sums.size(), 0);
    Memory grad_bias(sums.size(), 0);
    for (Memory* parameter : {&grad_weight, &grad_bias}) {
      if (!sums.empty()) {
        std::memcpy(parameter->data(), sums.data(), sums.size());
      }
    }
    lomem::NormForward args;
    args.input = {x_memory.data(), input_dtype};
    args.weight = has_weight ? lomem::Array{weight.data(), weight_dtype} : lomem::Array{};
    args.bias = has_bias ? lomem::Array{bias.data(), weight_dtype} : lomem::Array{};
    args.output = {output.data(), output_dtype};
    args.rstd = {rstd.data(), rstd_dtype};
    args.cols = static_cast<std::int64_t>(cols);
    args.eps = eps;
    lomem::NormBackward back;
    back.grad_output = {grad_memory.data(), output_dtype};
    back.output = {output.data(), output_dtype};
    back.rstd = {rstd.data(), rstd_dtype};
    back.weight = args.weight;
    back.bias = args.bias;
    back.grad_input = wants_input ? lomem::MutableArray{grad_input.data(), input_dtype} : lomem::MutableArray{};
    back.cols = args.cols;
    for (const bool second : {false, true}) {
      const auto begin = static_cast<std::int64_t>(second ? split : 0);
      const auto end = static_cast<std::int64_t>(second ? rows : split);
      spoil_stack();
      (table.*forward)(args, begin, end, stream);
      spoil_stack();
      (table.*backward)(
          back, begin, end, wants_weight ? static_cast<double*>(grad_weight.data()) : nullptr,
          wants_bias ? static_cast<double*>(grad_bias.data()) : nullptr, stream);
    }
    return Results{
        with_one_nan(output_dtype, output.written(table)), with_one_nan(rstd_dtype, rstd.written(table)),
        with_one_nan(input_dtype, grad_input.written(table)), with_one_nan(DType::float64, grad_weight.written(table)),
        with_one_nan(DType::float64, grad_bias.written(table))};
  };
  const Results want = run(lomem::cpu::default_kernels);
  for_each_table([&](const KernelTable& table) {
    const Results got = run(table);
    expect_same(table, "output of a norm", got.output, want.output);
    expect_same(table, "rstd of a norm", got.rstd, want.rstd);
    expect_same(table, "grad_input of a norm", got.grad_input, want.grad_input);
    expect_same(table, "grad_weight of a norm", got.grad_weight, want.grad_weight);
    expect_same(table, "grad_bias of a norm", got.grad_bias, want.grad_bias);
  });
}

/// Products with a mask in memory, and with that of a seed.
void fuzz_dropout(Choices& choices) {
  const DType dtype = choices.dtype();
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off) * lomem::element_size(dtype);
  const bool stream = choices.flag();
  const bool seeded = choices.flag();
  const double scale = 1 + choices.byte() / 64.0;
  const auto first = static_cast<std::int64_t>(8 * choices.number(60000));
  std::uint64_t seed = 0;
  std::memcpy(&seed, choices.bytes(sizeof(seed)).data(), sizeof(seed));
  const std::uint32_t bound = choices.byte() * 0x1010101u;
  const Bytes x = choices.elements(dtype, n);
  Bytes mask = choices.bytes(lomem::packed_bytes(n, 1));
  for (std::size_t i = 0; seeded && i < mask.size(); ++i) {
    mask[i] = lomem::mask_of_seed(seed, static_cast<std::uint64_t>(first) / 8 + i, bound);
  }
  Bytes want;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    auto elements = elements_of<T>(x);
    for (std::size_t i = 0; i < n; ++i) {
      elements[i] = lomem::scaled_if((mask[i / 8] >> (i % 8) & 1) != 0, elements[i], static_cast<compute_t<T>>(scale));
    }
    want = with_one_nan(dtype, bytes_of(elements));
  });
  for_each_table([&](const KernelTable& table) {
    Memory source(x, offset);
    Memory bits(mask, 0);
    Memory result(x.size(), offset);
    if (seeded) {
      table.seed_multiply(
          dtype, source.data(), seed, first, bound, scale, static_cast<std::int64_t>(n), result.data(), stream);
    } else {
      table.mask_multiply(
          dtype, source.data(), static_cast<const std::uint8_t*>(bits.data()), scale, static_cast<std::int64_t>(n),
          result.data(), stream);
    }
    expect_same(table, "product with a mask", with_one_nan(dtype, result.written(table)), want);
  });
}

/// Codes and scales in groups, and values of any codes and scales.
template <int bits>
void fuzz_storage(Choices& choices) {
  const DType dtype = choices.dtype();
  const std::size_t count = choices.number(most_elements);
  const auto n = static_cast<std::int64_t>(count);
  const std::size_t offset = choices.number(most_bytes_off) * lomem::element_size(dtype);
  const bool stream = choices.flag();
  const bool stochastic = choices.flag();
  const int group = lomem::min_scale_group << choices.byte() % 7;
  const std::int64_t first = std::int64_t{group} * static_cast<std::int64_t>(choices.number(60000));
  lomem::RoundingBits random{};
  std::memcpy(&random, choices.bytes(sizeof(random)).data(), sizeof(random));
  const lomem::RoundingBits* source = stochastic ? &random : nullptr;
  const Bytes x = choices.elements(dtype, count);
  const auto groups = static_cast<std::size_t>(lomem::scale_count(n, group));
  Bytes want_codes(static_cast<std::size_t>(lomem::packed_bytes(n, bits)));
  std::vector<lomem::bfloat16> want_scales(groups);
  const Bytes codes = choices.bytes(want_codes.size());
  const Bytes scales = choices.bytes(groups * sizeof(lomem::bfloat16));
  const auto factors = elements_of<lomem::bfloat16>(scales);
  Bytes want;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto elements = elements_of<T>(x);
    std::vector<T> values(count);
    for (std::int64_t begin = 0, g = 0; begin < n; begin += group, ++g) {
      const std::int64_t size = std::min<std::int64_t>(group, n - begin);
      want_scales[g] = lomem::encode_group<bits>(
          elements.data() + begin, first + begin, size, source, want_codes.data() + begin * bits / 8);
      lomem::decode_group<bits>(
          codes.data() + begin * bits / 8, size, factors[g], values.data() + begin, source, first + begin);
    }
    want = with_one_nan(dtype, bytes_of(values));
  });
  for_each_table([&](const KernelTable& table) {
    Memory elements(x, offset);
    Memory encoded(want_codes.size(), offset);
    Memory encoded_scales(scales.size(), 0);
    const lomem::GroupFormat format{bits, group};
    table.group_encode(
        dtype, elements.data(), first, n, format, source, static_cast<std::uint8_t*>(encoded.data()),
        static_cast<lomem::bfloat16*>(encoded_scales.data()), stream);
    expect_same(table, "codes in groups", encoded.written(table), want_codes);
    expect_same(table, "scales of groups", encoded_scales.written(table), bytes_of(want_scales));
    Memory given(codes, offset);
    Memory given_scales(scales, 0);
    Memory values(x.size(), offset);
    table.group_decode(
        dtype, static_cast<const std::uint8_t*>(given.data()), static_cast<const lomem::bfloat16*>(given_scales.data()),
        first, n, format, source, values.data(), stream);
    expect_same(table, "values of groups", with_one_nan(dtype, values.written(table)), want);
  });
}

/// Codes drawn at random from any table of numbers, and gradients of any codes.
void fuzz_drawn(Choices& choices) {
  const DType dtype = choices.dtype();
  const int bits = 1 + choices.byte() % lomem::max_bits;
  const std::size_t count = choices.number(most_elements);
  const auto n = static_cast<std::int64_t>(count);
  const std::size_t offset = choices.number(most_bytes_off);
  const bool stream = choices.flag();
  const bool stores = choices.flag() && lomem::element_size(dtype) == 2;
  const std::int64_t first = 8 * static_cast<std::int64_t>(choices.number(60000));
  lomem::RoundingBits random{};
  std::memcpy(&random, choices.bytes(sizeof(random)).data(), sizeof(random));
  // Bounds and densities belong together, beyond is in [0, 1]; the coefficients are any.
  lomem::DrawnTable drawn{};
  drawn.origin = static_cast<float>(choices.byte()) / 64 - 2;
  drawn.rational = choices.flag();
  for (auto& side : drawn.sides) {
    const auto bound = static_cast<float>(choices.byte()) / 32;
    side.bound = drawn.rational && bound > 0 ? 1 : bound;
    side.density = side.bound > 0 ? lomem::DrawnTable::side_pieces / side.bound : 0;
    side.beyond = static_cast<float>(choices.byte()) / 255;
  }
  for (auto& row : drawn.coefficients) {
    for (float& coefficient : row) {
      coefficient = static_cast<float>(choices.byte()) / 128 - 1;
    }
  }
  const Bytes x = choices.elements(dtype, count);
  const Bytes grad = choices.elements(dtype, count);
  const Bytes codes = choices.bytes(lomem::packed_bytes(count, bits));
  const lomem::DrawnLevels<double> levels{choices.byte() / 256.0 - 0.5, choices.byte() / 256.0};
  Bytes want_codes(codes.size());
  Bytes want;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto elements = elements_of<T>(x);
    const auto gradients = elements_of<T>(grad);
    const lomem::DrawnLevels<compute_t<T>> rounded{
        static_cast<compute_t<T>>(levels.low), static_cast<compute_t<T>>(levels.step)};
    std::vector<T> result(count);
    lomem::visit_bits(bits, [&](auto width) {
      constexpr int b = decltype(width)::value;
      lomem::drawn_encode<b>(drawn, elements.data(), first, n, random, want_codes.data());
      lomem::drawn_decode_multiply<b>(gradients.data(), codes.data(), rounded, first, n, random, result.data());
    });
    want = with_one_nan(dtype, bytes_of(result));
  });
  for_each_table([&](const KernelTable& table) {
    std::vector<std::uint32_t> targets;
    if (stores) {
      targets.resize(lomem::drawn_target_count);
      table.drawn_targets(dtype, drawn, bits, targets.data());
    }
    Memory source(x, offset * lomem::element_size(dtype));
    Memory packed(want_codes.size(), offset);
    table.drawn_encode(
        dtype, drawn, stores ? targets.data() : nullptr, source.data(), first, n, bits, random,
        static_cast<std::uint8_t*>(packed.data()));
    expect_same(table, "drawn codes", packed.written(table), want_codes);
    Memory gradients(grad, offset * lomem::element_size(dtype));
    Memory given(codes, offset);
    Memory result(grad.size(), offset * lomem::element_size(dtype));
    table.drawn_decode_multiply(
        dtype, gradients.data(), static_cast<const std::uint8_t*>(given.data()), levels, bits, first, n, random,
        result.data(), stream);
    expect_same(table, "gradients of drawn codes", with_one_nan(dtype, result.written(table)), want);
  });
}

/// Gradients of a gated unit, which are the scalar formulas'.
void fuzz_gated(Choices& choices) {
  const DType dtype = choices.dtype();
  const lomem::GatedActivation activation = gates[choices.byte() % std::size(gates)];
  const std::size_t n = choices.number(most_elements);
  const std::size_t offset = choices.number(most_bytes_off) * lomem::element_size(dtype);
  const bool stream = choices.flag();
  const bool wants_gate = choices.flag();
  const bool wants_up = choices.flag();
  const Bytes grad = choices.elements(dtype, n);
  const Bytes gate = choices.elements(dtype, n);
  const Bytes up = choices.elements(dtype, n);
  Bytes want_gate;
  Bytes want_up;
  lomem::visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto want =
        gradients_by_formulas<T>(activation, elements_of<T>(grad), elements_of<T>(gate), elements_of<T>(up));
    want_gate = with_one_nan(dtype, bytes_of(want.of_gate));
    want_up = with_one_nan(dtype, bytes_of(want.of_up));
  });
  for_each_table([&](const KernelTable& table) {
    Memory grad_memory(grad, offset);
    Memory gate_memory(gate, offset);
    Memory up_memory(up, offset);
    Memory grad_gate(grad.size(), offset);
    Memory grad_up(grad.size(), offset);
    table.gated_backward(
        activation, dtype, grad_memory.data(), gate_memory.data(), up_memory.data(), static_cast<std::int64_t>(n),
        wants_gate ? grad_gate.data() : nullptr, wants_up ? grad_up.data() : nullptr, stream);
    const Bytes of_gate = with_one_nan(dtype, grad_gate.written(table));
    const Bytes of_up = with_one_nan(dtype, grad_up.written(table));
    if (wants_gate) {
      expect_same(table, "gradient of a gate", of_gate, want_gate);
    }
    if (wants_up) {
      expect_same(table, "gradient of what is gated", of_up, want_up);
    }
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices(data, size);
  std::vector<void (*)(Choices&)> targets = {
      &fuzz_decode,
      &fuzz_drawn,
      &fuzz_dropout,
      &fuzz_gated,
      &fuzz_packing,
      &fuzz_search,
      &fuzz_storage<8>,
      &fuzz_storage<4>,
      [](Choices& rest) { fuzz_norm(rest, &KernelTable::layer_norm_forward, &KernelTable::layer_norm_backward); },
      [](Choices& rest) { fuzz_norm(rest, &KernelTable::rms_norm_forward, &KernelTable::rms_norm_backward); },
  };
  FusedFunctions::for_each([&](auto function) {
    using Function = typename decltype(function)::type;
    targets.push_back(&fuzz_encode<Function>);
    targets.push_back(&fuzz_fast_forward<Function>);
  });
  targets[choices.byte() % targets.size()](choices);
  return 0;
}
