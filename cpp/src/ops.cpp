#include <lomem/ops.h>

#include "dispatch.h"

namespace lomem {

at::Tensor regelu2(const at::Tensor& input, std::string_view approximate, bool fast) {
  return detail::regelu2(input, approximate, fast);
}

at::Tensor resilu2(const at::Tensor& input, bool fast) {
  return detail::resilu2(input, fast);
}

at::Tensor ms_layer_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, std::optional<at::ScalarType> dtype) {
  return detail::ms_layer_norm(input, c10::fromIntArrayRefSlow(normalized_shape), weight, bias, eps, dtype);
}

at::Tensor ms_rms_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    std::optional<double> eps, std::optional<at::ScalarType> dtype) {
  return detail::ms_rms_norm(input, c10::fromIntArrayRefSlow(normalized_shape), weight, eps, dtype);
}

at::Tensor randomized_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const RandomizedLinearArgs& args) {
  return detail::randomized_linear(
      input, weight, bias, args.matmul, args.proj_dim, args.proj_dim_ratio, args.proj_dim_min, args.proj_dim_max,
      args.seed);
}

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  return detail::pack_bits(codes, bits);
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t numel) {
  return detail::unpack_bits(packed, bits, numel);
}

std::tuple<at::Tensor, at::Tensor> regelu2_forward(const at::Tensor& input, std::string_view approximate, bool fast) {
  return detail::regelu2_forward(input, approximate, fast);
}

std::tuple<at::Tensor, at::Tensor> resilu2_forward(const at::Tensor& input, bool fast) {
  return detail::resilu2_forward(input, fast);
}

at::Tensor step_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  return detail::step_activation_backward(grad_output, codes, levels, bits);
}

const int detail::registration = 0;

}  // namespace lomem
