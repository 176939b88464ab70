// The linear layer whose weight gradient is estimated. Differentiable, and the same op as in torch.ops.lomem in Python.
//
// Every function raises c10::Error that names op, argument, the value it got and the value it wants.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

namespace lomem {

/// How randomized_linear compresses the rows of its input. One of `proj_dim` and `proj_dim_ratio` must be given.
struct RandomizedLinearArgs {
  /// "gaussian", "rademacher", "dct", "dft", "crs" or "wta-crs".
  std::string_view matmul = "gaussian";
  /// How many rows are kept, at least 1.
  std::optional<int64_t> proj_dim = std::nullopt;
  /// Or the share of all rows, in (0, 1].
  std::optional<double> proj_dim_ratio = std::nullopt;
  /// Then at least and at most so many. (And never more than there are.)
  std::optional<int64_t> proj_dim_min = std::nullopt;
  std::optional<int64_t> proj_dim_max = std::nullopt;
  /// What is random follows from it: 0-d int64, on the device of the input. By default the next seed of lomem's own
  /// stream, see manual_seed.
  std::optional<at::Tensor> seed = std::nullopt;
};

/// at::linear(input, weight, bias), bit for bit, whose weight gradient is an unbiased estimate from proj_dim random
/// combinations of the rows of `input`, in place of which they are kept (arXiv:2201.13195; "wta-crs":
/// arXiv:2305.15265). The gradients of input and bias are exact. No generator of torch is advanced.
LOMEM_API at::Tensor randomized_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const RandomizedLinearArgs& args);

/// Begins lomem's stream of seeds anew. A seed follows from where the stream began, from how many were drawn since, and
/// from the initial seed of torch's default CPU generator. A stream also begins where an nn::RandomizedLinear is built:
/// at the position of that generator, so that torch::manual_seed and the same program give the same seeds.
LOMEM_API void manual_seed(uint64_t seed);

/// Where the stream began and how many seeds were drawn since, to go on from there.
LOMEM_API std::pair<uint64_t, uint64_t> random_state();
LOMEM_API void set_random_state(std::pair<uint64_t, uint64_t> state);

namespace detail {
/// Begins the stream of seeds at the position of torch's default CPU generator, which is read and not advanced.
LOMEM_API void begin_random_stream();
}  // namespace detail

}  // namespace lomem
