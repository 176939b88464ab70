// Shapes of the norms' results, with symbolic sizes.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"

namespace lomem::detail {
namespace {

std::tuple<at::Tensor, at::Tensor> norm_forward_meta(
    const char* op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, std::optional<double> eps, OptionalDtype dtype) {
  const NormSizes sizes = check_norm_forward(op, input, normalized_shape, weight, bias, eps, dtype);
  return {
      at::empty_symint(input.sym_sizes(), input.options().dtype(dtype.value_or(input.scalar_type()))),
      at::empty_symint(sizes.rstd, input.options().dtype(rstd_dtype(input.scalar_type())))};
}

at::Tensor empty_like_if(bool wanted, const OptionalTensor& parameter) {
  return wanted && has_tensor(parameter) ? at::empty_symint(parameter->sym_sizes(), parameter->options())
                                         : at::Tensor();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_meta(
    const char* op, const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    at::ScalarType input_dtype, std::array<bool, 3> output_mask) {
  check_norm_backward(op, grad_output, output, rstd, normalized_shape, weight, bias, input_dtype);
  at::Tensor grad_input;
  if (output_mask[0]) {
    grad_input = at::empty_symint(output.sym_sizes(), output.options().dtype(input_dtype));
  }
  return {grad_input, empty_like_if(output_mask[1], weight), empty_like_if(output_mask[2], bias)};
}

at::Tensor ms_layer_norm_meta(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype) {
  return std::get<0>(norm_forward_meta("lomem::ms_layer_norm", input, normalized_shape, weight, bias, eps, dtype));
}

std::tuple<at::Tensor, at::Tensor> ms_layer_norm_forward_meta(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, OptionalDtype dtype) {
  return norm_forward_meta("lomem::ms_layer_norm_forward", input, normalized_shape, weight, bias, eps, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_layer_norm_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    at::ScalarType input_dtype, std::array<bool, 3> output_mask) {
  return norm_backward_meta(
      "lomem::ms_layer_norm_backward", grad_output, output, rstd, normalized_shape, weight, bias, input_dtype,
      output_mask);
}

at::Tensor ms_rms_norm_meta(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype) {
  return std::get<0>(
      norm_forward_meta("lomem::ms_rms_norm", input, normalized_shape, weight, std::nullopt, eps, dtype));
}

std::tuple<at::Tensor, at::Tensor> ms_rms_norm_forward_meta(
    const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    std::optional<double> eps, OptionalDtype dtype) {
  return norm_forward_meta("lomem::ms_rms_norm_forward", input, normalized_shape, weight, std::nullopt, eps, dtype);
}

std::tuple<at::Tensor, at::Tensor> ms_rms_norm_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, at::ScalarType input_dtype,
    std::array<bool, 2> output_mask) {
  auto [grad_input, grad_weight, grad_bias] = norm_backward_meta(
      "lomem::ms_rms_norm_backward", grad_output, output, rstd, normalized_shape, weight, std::nullopt, input_dtype,
      {output_mask[0], output_mask[1], false});
  return {grad_input, grad_weight};
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("ms_layer_norm", &ms_layer_norm_meta);
  m.impl("ms_layer_norm_forward", &ms_layer_norm_forward_meta);
  m.impl("ms_layer_norm_backward", &ms_layer_norm_backward_meta);
  m.impl("ms_rms_norm", &ms_rms_norm_meta);
  m.impl("ms_rms_norm_forward", &ms_rms_norm_forward_meta);
  m.impl("ms_rms_norm_backward", &ms_rms_norm_backward_meta);
}

}  // namespace
}  // namespace lomem::detail
