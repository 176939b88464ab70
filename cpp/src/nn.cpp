#include <lomem/nn.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <ostream>
#include <utility>

namespace lomem::nn {
namespace {

std::optional<at::Tensor> optional_tensor(const torch::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

ReGELU2Impl::ReGELU2Impl(ReGELU2Options options) : options(std::move(options)) {}

void ReGELU2Impl::reset() {}

void ReGELU2Impl::pretty_print(std::ostream& stream) const {
  stream << "lomem::nn::ReGELU2(approximate=" << options.approximate() << (options.fast() ? ", fast=true)" : ")");
}

torch::Tensor ReGELU2Impl::forward(const torch::Tensor& input) {
  return regelu2(input, options.approximate(), options.fast());
}

ReSiLU2Impl::ReSiLU2Impl(ReSiLU2Options options) : options(options) {}

void ReSiLU2Impl::reset() {}

void ReSiLU2Impl::pretty_print(std::ostream& stream) const {
  stream << "lomem::nn::ReSiLU2(" << (options.fast() ? "fast=true)" : ")");
}

torch::Tensor ReSiLU2Impl::forward(const torch::Tensor& input) {
  return resilu2(input, options.fast());
}

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

RandomizedLinearOptions::RandomizedLinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

RandomizedLinearImpl::RandomizedLinearImpl(RandomizedLinearOptions options) : options(std::move(options)) {
  lomem::detail::begin_random_stream();
  RandomizedLinearImpl::reset();
}

void RandomizedLinearImpl::reset() {
  // As torch::nn::Linear, which draws the same numbers in the same order.
  const torch::nn::Linear linear(
      torch::nn::LinearOptions(options.in_features(), options.out_features()).bias(options.bias()));
  weight = register_parameter("weight", linear->weight.detach());
  bias = register_parameter("bias", options.bias() ? linear->bias.detach() : torch::Tensor(), options.bias());
}

void RandomizedLinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "lomem::nn::RandomizedLinear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias()
         << ", matmul=" << options.matmul();
  const auto print = [&](const char* name, const auto& value) {
    if (value) {
      stream << ", " << name << "=" << *value;
    }
  };
  print("proj_dim", options.proj_dim());
  print("proj_dim_ratio", options.proj_dim_ratio());
  print("proj_dim_min", options.proj_dim_min());
  print("proj_dim_max", options.proj_dim_max());
  stream << ")";
}

torch::Tensor RandomizedLinearImpl::forward(const torch::Tensor& input) {
  if (!is_training()) {
    return torch::linear(input, weight, optional_tensor(bias));
  }
  return randomized_linear(
      input, weight, optional_tensor(bias),
      {.matmul = options.matmul(),
       .proj_dim = options.proj_dim(),
       .proj_dim_ratio = options.proj_dim_ratio(),
       .proj_dim_min = options.proj_dim_min(),
       .proj_dim_max = options.proj_dim_max()});
}

}  // namespace lomem::nn
