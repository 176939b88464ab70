#include "dispatch.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace lomem::detail {
namespace {

/// Handle of the op `name` whose C++ signature is that of `function`.
template <class Signature>
auto find_op(const char* name, Signature* /*function*/) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

// The handle is looked up once: the dispatcher keeps it valid for the life of the library.
#define LOMEM_CALL_OP(name, ...)                          \
  static const auto op = find_op("lomem::" #name, &name); \
  return op.call(__VA_ARGS__)

at::Tensor regelu2(const at::Tensor& input, std::string_view approximate, bool fast) {
  LOMEM_CALL_OP(regelu2, input, approximate, fast);
}

std::tuple<at::Tensor, at::Tensor> regelu2_forward(const at::Tensor& input, std::string_view approximate, bool fast) {
  LOMEM_CALL_OP(regelu2_forward, input, approximate, fast);
}

at::Tensor resilu2(const at::Tensor& input, bool fast) {
  LOMEM_CALL_OP(resilu2, input, fast);
}

std::tuple<at::Tensor, at::Tensor> resilu2_forward(const at::Tensor& input, bool fast) {
  LOMEM_CALL_OP(resilu2_forward, input, fast);
}

at::Tensor step_activation(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, int64_t bits,
    std::string_view criterion, std::optional<at::ArrayRef<double>> boundaries,
    std::optional<at::ArrayRef<double>> levels) {
  LOMEM_CALL_OP(step_activation, input, function, parameters, bits, criterion, boundaries, levels);
}

std::tuple<at::Tensor, at::Tensor> step_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, int64_t bits,
    std::string_view criterion, std::optional<at::ArrayRef<double>> boundaries,
    std::optional<at::ArrayRef<double>> levels) {
  LOMEM_CALL_OP(step_activation_forward, input, function, parameters, bits, criterion, boundaries, levels);
}

at::Tensor hard_activation(const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters) {
  LOMEM_CALL_OP(hard_activation, input, function, parameters);
}

std::tuple<at::Tensor, at::Tensor> hard_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters) {
  LOMEM_CALL_OP(hard_activation_forward, input, function, parameters);
}

at::Tensor step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  LOMEM_CALL_OP(step_codes, input, boundaries, bits);
}

at::Tensor band_codes(const at::Tensor& input, double low, double high) {
  LOMEM_CALL_OP(band_codes, input, low, high);
}

at::Tensor step_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  LOMEM_CALL_OP(step_activation_backward, grad_output, codes, levels, bits);
}

at::Tensor ms_layer_norm(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype) {
  LOMEM_CALL_OP(ms_layer_norm, input, normalized_shape, weight, bias, eps, dtype);
}

std::tuple<at::Tensor, at::Tensor> ms_layer_norm_forward(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype) {
  LOMEM_CALL_OP(ms_layer_norm_forward, input, normalized_shape, weight, bias, eps, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_layer_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    at::ScalarType input_dtype, std::array<bool, 3> output_mask) {
  LOMEM_CALL_OP(
      ms_layer_norm_backward, grad_output, output, rstd, normalized_shape, weight, bias, input_dtype, output_mask);
}

at::Tensor ms_rms_norm(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype) {
  LOMEM_CALL_OP(ms_rms_norm, input, normalized_shape, weight, eps, dtype);
}

std::tuple<at::Tensor, at::Tensor> ms_rms_norm_forward(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype) {
  LOMEM_CALL_OP(ms_rms_norm_forward, input, normalized_shape, weight, eps, dtype);
}

std::tuple<at::Tensor, at::Tensor> ms_rms_norm_backward(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, at::ScalarType input_dtype,
    std::array<bool, 2> output_mask) {
  LOMEM_CALL_OP(ms_rms_norm_backward, grad_output, output, rstd, normalized_shape, weight, input_dtype, output_mask);
}

at::Tensor randomized_linear(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, std::string_view matmul,
    std::optional<int64_t> proj_dim, std::optional<double> proj_dim_ratio, std::optional<int64_t> proj_dim_min,
    std::optional<int64_t> proj_dim_max, const OptionalTensor& seed) {
  LOMEM_CALL_OP(
      randomized_linear, input, weight, bias, matmul, proj_dim, proj_dim_ratio, proj_dim_min, proj_dim_max, seed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> randomized_linear_forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
    c10::SymInt proj_dim, std::string_view matmul) {
  LOMEM_CALL_OP(randomized_linear_forward, input, weight, bias, seed, std::move(proj_dim), matmul);
}

at::Tensor randomized_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& compressed, const OptionalTensor& indices, const at::Tensor& seed,
    std::string_view matmul) {
  LOMEM_CALL_OP(randomized_linear_weight_grad, grad_output, compressed, indices, seed, matmul);
}

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  LOMEM_CALL_OP(pack_bits, codes, bits);
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, c10::SymInt numel) {
  LOMEM_CALL_OP(unpack_bits, packed, bits, numel);
}

}  // namespace lomem::detail
