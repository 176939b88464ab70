#include "random_numbers.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numbers>

#include "random_mix.h"

namespace lomem::detail {
namespace {

/// Number of words that a CPU thread generates at a time: they and what is computed from them stay in its cache.
constexpr int64_t cached_words = int64_t{1} << 15;
/// The same for other devices: enough for all their cores, and small compared to what is computed from them.
constexpr int64_t device_words = int64_t{1} << 20;

/// mix(uint64_t) on each element, in place.
void mix_in_place(at::Tensor& words) {
  at::Tensor shifted = at::empty_like(words);
  for (const auto& [shift, multiplier] : mix_steps) {
    // int64 shifts copy the sign bit; the mask clears those bits.
    at::bitwise_right_shift_out(shifted, words, shift);
    shifted.bitwise_and_(static_cast<int64_t>(~uint64_t{0} >> shift));
    words.bitwise_xor_(shifted);
    if (multiplier != 1) {
      words.mul_(static_cast<int64_t>(multiplier));
    }
  }
}

}  // namespace

RandomNumbers::RandomNumbers(const at::Tensor& seed) : options_(seed.options()) {
  if (seed.is_cpu()) {
    const auto number = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
    key_ = mix(number + golden_step);
    step_ = mix(number + 2 * golden_step) | 1;
    return;
  }
  at::Tensor pair = at::arange(1, 3, options_).mul_(static_cast<int64_t>(golden_step)).add_(seed);
  mix_in_place(pair);
  device_key_ = pair.select(0, 0);
  device_step_ = pair.select(0, 1).bitwise_or(1);
}

at::Tensor RandomNumbers::words(int64_t count) {
  const int64_t first = position_;
  position_ += count;
  if (device_key_.defined()) {
    at::Tensor result = at::arange(first, position_, options_).mul_(device_step_).add_(device_key_);
    mix_in_place(result);
    return result;
  }
  at::Tensor result = at::empty({count}, options_);
  auto* const data = result.mutable_data_ptr<int64_t>();
  at::parallel_for(0, count, cached_words, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      data[i] = static_cast<int64_t>(mix(key_ + static_cast<uint64_t>(first + i) * step_));
    }
  });
  return result;
}

at::Tensor RandomNumbers::normal(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t numel = c10::multiply_integers(sizes);
  const int64_t count = (numel + 1) / 2;
  const at::Tensor result = at::empty({count, 2}, options);
  const int64_t block = device_key_.defined() ? device_words : cached_words * at::get_num_threads();
  for (int64_t first = 0; first < count; first += block) {
    const int64_t size = std::min(block, count - first);
    const at::Tensor halves = words(size).view(at::kInt).view({size, 2});
    // The magnitude of the first half, in (0, 2^31]: its small values are as fine-grained as its large ones, which
    // makes the tails accurate. 0 is replaced by half of 1.
    at::Tensor radius = halves.select(1, 0).to(options.dtype()).abs_().clamp_min_(0.5);
    radius.mul_(0x1p-31).log_().mul_(-2).sqrt_();
    const at::Tensor angle = halves.select(1, 1).to(options.dtype()).mul_(std::numbers::pi * 0x1p-31);
    const at::Tensor piece = result.narrow(0, first, size);
    at::Tensor even = piece.select(1, 0);
    at::Tensor odd = piece.select(1, 1);
    at::mul_out(even, radius, angle.cos());
    at::mul_out(odd, radius, angle.sin());
  }
  return result.view(-1).narrow(0, 0, numel).view(sizes);
}

at::Tensor RandomNumbers::signs(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t numel = c10::multiply_integers(sizes);
  const at::Tensor shifts = at::arange(8, options.dtype(at::kByte));
  const at::Tensor bytes = words((numel + 63) / 64).view(at::kByte);
  const at::Tensor bits = bytes.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(1);
  return bits.view(-1).narrow(0, 0, numel).view(sizes).to(options.dtype()).mul_(2).sub_(1);
}

at::Tensor RandomNumbers::uniform(int64_t count) {
  constexpr int64_t mantissa = (int64_t{1} << 53) - 1;
  return words(count).bitwise_right_shift_(11).bitwise_and_(mantissa).to(at::kDouble).mul_(0x1p-53);
}

at::Tensor RandomNumbers::permutation(int64_t count) {
  // Two of n words are equal with a probability of n^2 / 2^65. In that case the first one stays first.
  return words(count).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
}

}  // namespace lomem::detail
