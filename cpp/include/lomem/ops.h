// The ops as functions on tensors. Differentiable, dispatched (every backend, autocast, tracing),
// and the same ops as torch.ops.lomem in Python.
//
// Every function raises c10::Error that names op, argument, the value it got and the value it wants.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace lomem {

/// GELU, bit for bit at::gelu(input, approximate), whose derivative is a step function: the
/// backward pass keeps 2 bits an element (arXiv:2406.16282, ReGELU2).
///
/// `input`: any shape and strides; float64, float32, bfloat16 or float16. `approximate`: "none" or
/// "tanh". `fast`: allows the values of core/fast_forward.h, which a CPU computes faster, in place of
/// at::gelu's; where there is no such kernel, nothing changes.
LOMEM_API at::Tensor regelu2(const at::Tensor& input, std::string_view approximate = "none", bool fast = false);

/// SiLU, bit for bit at::silu(input), whose derivative is a step function: the backward pass keeps
/// 2 bits an element (arXiv:2406.16282, ReSiLU2). `fast`: as of regelu2.
LOMEM_API at::Tensor resilu2(const at::Tensor& input, bool fast = false);

/// Layer normalisation over the last dimensions, whose backward pass keeps its output, which the
/// next linear layer keeps anyway, and one float a row (arXiv:2406.16282, MS-LayerNorm).
///
/// `weight`, `bias`: of shape `normalized_shape`, of any floating-point dtype; with a gradient,
/// no element of `weight` may be 0. `dtype`: of the output; by default the autocast dtype where
/// autocast is on, else the input's.
LOMEM_API at::Tensor ms_layer_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
    std::optional<at::ScalarType> dtype = std::nullopt);

/// RMS normalisation over the last dimensions; keeps what ms_layer_norm keeps (arXiv:2406.16282,
/// MS-RMSNorm). `eps`: by default machine epsilon of float32 (float64 for a float64 input).
LOMEM_API at::Tensor ms_rms_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight = std::nullopt,
    std::optional<double> eps = std::nullopt, std::optional<at::ScalarType> dtype = std::nullopt);

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

/// 1-D uint8 tensor of ceil(bits * numel / 8) bytes from a uint8 tensor of codes below 2^bits, in
/// the layout of core/packing.h. bits = 1..8.
LOMEM_API at::Tensor pack_bits(const at::Tensor& codes, int64_t bits);

/// 1-D uint8 tensor of `numel` codes, the inverse of pack_bits.
LOMEM_API at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t numel);

/// The halves of which the differentiable ops are made, for training code with a backward pass of
/// its own. `codes` are 2 bits an element in the memory order of the output.
LOMEM_API std::tuple<at::Tensor, at::Tensor> regelu2_forward(
    const at::Tensor& input, std::string_view approximate = "none", bool fast = false);
LOMEM_API std::tuple<at::Tensor, at::Tensor> resilu2_forward(const at::Tensor& input, bool fast = false);

/// grad_output * levels[codes], with codes in row-major order of grad_output. Serves every step
/// activation; `levels` has 2^bits entries.
LOMEM_API at::Tensor step_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits);

namespace detail {
/// Begins the stream of seeds at the position of torch's default CPU generator, which is read and not advanced.
LOMEM_API void begin_random_stream();

/// Referenced by every translation unit that includes this header, so that a linker that drops
/// libraries without referenced symbols keeps this one and with it the ops' registration.
LOMEM_API extern const int registration;
[[maybe_unused]] [[gnu::used]] static const int* const keep_registration = &registration;
}  // namespace detail

}  // namespace lomem
