// The library's ops as C++ functions with symbolic sizes: each is one call of the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace lomem::detail {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

at::Tensor regelu2(const at::Tensor& input, std::string_view approximate, bool fast);
std::tuple<at::Tensor, at::Tensor> regelu2_forward(const at::Tensor& input, std::string_view approximate, bool fast);
at::Tensor resilu2(const at::Tensor& input, bool fast);
std::tuple<at::Tensor, at::Tensor> resilu2_forward(const at::Tensor& input, bool fast);
at::Tensor step_activation(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, int64_t bits,
    std::string_view criterion, std::optional<at::ArrayRef<double>> boundaries,
    std::optional<at::ArrayRef<double>> levels);
std::tuple<at::Tensor, at::Tensor> step_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, int64_t bits,
    std::string_view criterion, std::optional<at::ArrayRef<double>> boundaries,
    std::optional<at::ArrayRef<double>> levels);
at::Tensor hard_activation(const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters);
std::tuple<at::Tensor, at::Tensor> hard_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters);
at::Tensor step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits);
at::Tensor band_codes(const at::Tensor& input, double low, double high);
at::Tensor step_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits);

at::Tensor ms_layer_norm(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype);
std::tuple<at::Tensor, at::Tensor> ms_layer_norm_forward(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype);
std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_layer_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    at::ScalarType input_dtype, std::array<bool, 3> output_mask);

at::Tensor ms_rms_norm(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype);
std::tuple<at::Tensor, at::Tensor> ms_rms_norm_forward(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype);
std::tuple<at::Tensor, at::Tensor> ms_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, at::ScalarType input_dtype,
    std::array<bool, 2> output_mask);

/// How many rows the weight gradient of randomized_linear is estimated from: `dim`, or `ratio` of all; then at least
/// `min` and at most `max`.
struct ProjectionSize {
  std::optional<int64_t> dim;
  std::optional<double> ratio;
  std::optional<int64_t> min;
  std::optional<int64_t> max;
};

at::Tensor randomized_linear(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, std::string_view matmul,
    std::optional<int64_t> proj_dim, std::optional<double> proj_dim_ratio, std::optional<int64_t> proj_dim_min,
    std::optional<int64_t> proj_dim_max, const OptionalTensor& seed);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> randomized_linear_forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
    c10::SymInt proj_dim, std::string_view matmul);
at::Tensor randomized_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& compressed, const OptionalTensor& indices, const at::Tensor& seed,
    std::string_view matmul);

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits);
at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, c10::SymInt numel);

}  // namespace lomem::detail
