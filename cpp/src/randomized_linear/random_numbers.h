// Random numbers that follow from a seed which is a tensor. On other devices than the CPU they are made by torch's ops,
// and the seed stays there: no device is waited for, and a captured graph makes others with every replay's seed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lomem::detail {

/// Word i, from 1 on, is mix(key + i * step), with the key and the odd step made of the seed. (As Java's
/// SplittableRandom: streams of other seeds go through the words in other steps.) The words are the same on all
/// devices, by any number of threads and in whatever pieces they are made.
class RandomNumbers {
 public:
  /// `seed`: 0-d int64.
  explicit RandomNumbers(const at::Tensor& seed);

  /// The next words, 1-D int64.
  at::Tensor words(int64_t count);
  /// Independent numbers of the standard normal distribution (Box, Muller, 1958), two of a word. `options`: float32 or
  /// float64.
  at::Tensor normal(at::IntArrayRef sizes, const at::TensorOptions& options);
  /// Independent elements -1 and 1, of one bit each.
  at::Tensor signs(at::IntArrayRef sizes, const at::TensorOptions& options);
  /// Of the uniform distribution on [0, 1), 1-D float64.
  at::Tensor uniform(int64_t count);
  /// 0, 1, ..., count - 1 in random order, int64.
  at::Tensor permutation(int64_t count);

 private:
  at::TensorOptions options_;
  int64_t position_ = 1;
  /// On the CPU.
  uint64_t key_ = 0;
  uint64_t step_ = 0;
  /// Elsewhere: 0-d.
  at::Tensor device_key_;
  at::Tensor device_step_;
};

}  // namespace lomem::detail
