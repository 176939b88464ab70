// Random numbers determined by a seed that is a tensor. On devices other than the CPU they are computed by torch's ops
// and the seed stays on the device: nothing waits for the device, and a captured graph generates new numbers from the
// seed of each replay.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lomem::detail {

/// Word i, counting from 1, is mix(key + i * step), where the key and the odd step are derived from the seed. (As in
/// Java's SplittableRandom, streams with other seeds traverse the words in other steps.) The words are the same on all
/// devices, for any number of threads and for any split into calls.
class RandomNumbers {
 public:
  /// `seed` is 0-d int64.
  explicit RandomNumbers(const at::Tensor& seed);

  /// The next words, 1-D int64.
  at::Tensor words(int64_t count);
  /// Independent numbers from the standard normal distribution (Box, Muller, 1958), two per word. `options` has dtype
  /// float32 or float64.
  at::Tensor normal(at::IntArrayRef sizes, const at::TensorOptions& options);
  /// Independent elements -1 and 1, one bit each.
  at::Tensor signs(at::IntArrayRef sizes, const at::TensorOptions& options);
  /// Numbers from the uniform distribution on [0, 1), 1-D float64.
  at::Tensor uniform(int64_t count);
  /// 0, 1, ..., count - 1 in random order, int64.
  at::Tensor permutation(int64_t count);

 private:
  at::TensorOptions options_;
  int64_t position_ = 1;
  /// Used on the CPU.
  uint64_t key_ = 0;
  uint64_t step_ = 0;
  /// Used on other devices, 0-d.
  at::Tensor device_key_;
  at::Tensor device_step_;
};

}  // namespace lomem::detail
