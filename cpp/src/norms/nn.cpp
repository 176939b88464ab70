// The C++ functions and modules of the norms.
#include <lomem/nn/norms.h>
#include <torch/types.h>

#include <ostream>
#include <utility>

#include "../op.h"

namespace lomem {

at::Tensor ms_layer_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps, std::optional<at::ScalarType> dtype) {
  return detail::ops::ms_layer_norm(input, c10::fromIntArrayRefSlow(normalized_shape), weight, bias, eps, dtype);
}

at::Tensor ms_rms_norm(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    std::optional<double> eps, std::optional<at::ScalarType> dtype) {
  return detail::ops::ms_rms_norm(input, c10::fromIntArrayRefSlow(normalized_shape), weight, eps, dtype);
}

}  // namespace lomem

namespace lomem::nn {
namespace {

std::optional<at::Tensor> optional_tensor(const torch::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

MSLayerNormOptions::MSLayerNormOptions(std::vector<int64_t> normalized_shape)
    : normalized_shape_(std::move(normalized_shape)) {}

MSLayerNormImpl::MSLayerNormImpl(int64_t size) : MSLayerNormImpl(MSLayerNormOptions(size)) {}

MSLayerNormImpl::MSLayerNormImpl(std::vector<int64_t> normalized_shape)
    : MSLayerNormImpl(MSLayerNormOptions(std::move(normalized_shape))) {}

MSLayerNormImpl::MSLayerNormImpl(MSLayerNormOptions options) : options(std::move(options)) {
  MSLayerNormImpl::reset();
}

void MSLayerNormImpl::reset() {
  const bool affine = options.elementwise_affine();
  weight = register_parameter("weight", affine ? torch::ones(options.normalized_shape()) : torch::Tensor(), affine);
  const bool has_bias = affine && options.bias();
  bias = register_parameter("bias", has_bias ? torch::zeros(options.normalized_shape()) : torch::Tensor(), has_bias);
}

void MSLayerNormImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "lomem::nn::MSLayerNorm(" << torch::IntArrayRef(options.normalized_shape())
         << ", eps=" << options.eps() << ", elementwise_affine=" << options.elementwise_affine() << ")";
}

torch::Tensor MSLayerNormImpl::forward(const torch::Tensor& input) {
  return ms_layer_norm(
      input, options.normalized_shape(), optional_tensor(weight), optional_tensor(bias), options.eps(),
      options.output_dtype());
}

MSRMSNormOptions::MSRMSNormOptions(std::vector<int64_t> normalized_shape)
    : normalized_shape_(std::move(normalized_shape)) {}

MSRMSNormImpl::MSRMSNormImpl(int64_t size) : MSRMSNormImpl(MSRMSNormOptions(size)) {}

MSRMSNormImpl::MSRMSNormImpl(std::vector<int64_t> normalized_shape)
    : MSRMSNormImpl(MSRMSNormOptions(std::move(normalized_shape))) {}

MSRMSNormImpl::MSRMSNormImpl(MSRMSNormOptions options) : options(std::move(options)) {
  MSRMSNormImpl::reset();
}

void MSRMSNormImpl::reset() {
  const bool affine = options.elementwise_affine();
  weight = register_parameter("weight", affine ? torch::ones(options.normalized_shape()) : torch::Tensor(), affine);
}

void MSRMSNormImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "lomem::nn::MSRMSNorm(" << torch::IntArrayRef(options.normalized_shape()) << ", eps=";
  if (options.eps()) {
    stream << *options.eps();
  } else {
    stream << "machine epsilon";
  }
  stream << ", elementwise_affine=" << options.elementwise_affine() << ")";
}

torch::Tensor MSRMSNormImpl::forward(const torch::Tensor& input) {
  return ms_rms_norm(input, options.normalized_shape(), optional_tensor(weight), options.eps(), options.output_dtype());
}

}  // namespace lomem::nn
