// The linear layer with an estimated weight gradient. It is differentiable, and the same op as in torch.ops.lomem in
// Python.
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

namespace lomem {

/// How randomized_linear compresses the rows of its input. Exactly one of `proj_dim` and `proj_dim_ratio` must be
/// given.
struct RandomizedLinearArgs {
  /// "gaussian", "rademacher", "dct", "dft", "crs" or "wta-crs".
  std::string_view matmul = "gaussian";
  /// Number of rows saved, at least 1.
  std::optional<int64_t> proj_dim = std::nullopt;
  /// Alternatively, the fraction of rows saved, in (0, 1].
  std::optional<double> proj_dim_ratio = std::nullopt;
  /// Minimum and maximum number of rows saved. (Never more than the input has.)
  std::optional<int64_t> proj_dim_min = std::nullopt;
  std::optional<int64_t> proj_dim_max = std::nullopt;
  /// Seed of all randomness: 0-d int64, on the device of the input. By default the next seed of lomem's own stream, see
  /// manual_seed.
  std::optional<at::Tensor> seed = std::nullopt;
};

/// at::linear(input, weight, bias), bit for bit, with an unbiased estimate of the weight gradient: it is computed from
/// proj_dim random combinations of the rows of `input`, which are saved instead of `input` (arXiv:2201.13195;
/// "wta-crs": arXiv:2305.15265). The gradients of input and bias are exact. No torch generator is advanced.
LOMEM_API at::Tensor randomized_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const RandomizedLinearArgs& args);

/// Restarts lomem's stream of seeds. A seed is determined by where the stream started, how many seeds were drawn since,
/// and the initial seed of torch's default CPU generator. Constructing an nn::RandomizedLinear also starts a stream, at
/// the position of that generator, so that torch::manual_seed followed by the same program gives the same seeds.
LOMEM_API void manual_seed(uint64_t seed);

/// The next seed of the stream, 0-d int64 on the device of `like`, for ops that take one. Not differentiable.
LOMEM_API at::Tensor draw_seed(const at::Tensor& like);

/// Start of the stream and number of seeds drawn since, to resume from there.
LOMEM_API std::pair<uint64_t, uint64_t> random_state();
LOMEM_API void set_random_state(std::pair<uint64_t, uint64_t> state);

namespace detail {
/// Starts the stream of seeds at the position of torch's default CPU generator, which is read but not advanced.
LOMEM_API void begin_random_stream();
}  // namespace detail

}  // namespace lomem
