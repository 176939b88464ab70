// The C++ function and module of the randomized linear layer.
#include <lomem/nn/linear.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <ostream>
#include <utility>

#include "../op.h"
#include "random_seed.h"

namespace lomem {

at::Tensor draw_seed(const at::Tensor& like) {
  return detail::draw_seed("lomem::draw_seed", like.device());
}

at::Tensor randomized_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const RandomizedLinearArgs& args) {
  return detail::ops::randomized_linear(
      input, weight, bias, args.matmul, args.proj_dim, args.proj_dim_ratio, args.proj_dim_min, args.proj_dim_max,
      args.seed);
}

}  // namespace lomem

namespace lomem::nn {
namespace {

std::optional<at::Tensor> optional_tensor(const torch::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

RandomizedLinearOptions::RandomizedLinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

RandomizedLinearImpl::RandomizedLinearImpl(RandomizedLinearOptions options) : options(std::move(options)) {
  lomem::detail::begin_random_stream();
  RandomizedLinearImpl::reset();
}

void RandomizedLinearImpl::reset() {
  // Like torch::nn::Linear, which draws the same numbers in the same order.
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
