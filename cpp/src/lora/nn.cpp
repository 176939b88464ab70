// The module of low-rank adapters.
#include <lomem/nn/lora.h>
#include <torch/nn/init.h>
#include <torch/types.h>

#include <cmath>
#include <ostream>

namespace lomem::nn {
namespace {

void freeze(torch::nn::Linear& layer) {
  for (torch::Tensor& parameter : layer->parameters()) {
    parameter.set_requires_grad(false);
  }
}

}  // namespace

LoRALinearOptions::LoRALinearOptions(int64_t r) : r_(r) {}

LoRALinearImpl::LoRALinearImpl(const torch::nn::Linear& base, LoRALinearOptions options) : options(options) {
  TORCH_CHECK_VALUE(options.r() >= 1, "lomem::nn::LoRALinear: r is ", options.r(), ", expected at least 1");
  set_base(base);
  // The op checks the other options here rather than in the first forward pass.
  const torch::Tensor none = torch::empty({1, 1}, torch::kMeta);
  lora(none, none, none, scaling(), std::nullopt, options.dropout());
}

void LoRALinearImpl::set_base(const torch::nn::Linear& base) {
  base_layer = register_module("base_layer", base);
  freeze(base_layer);
  lora_a = register_module(
      "lora_A", torch::nn::Linear(torch::nn::LinearOptions(base->options.in_features(), options.r()).bias(false)));
  lora_b = register_module(
      "lora_B",
      torch::nn::Linear(torch::nn::LinearOptions(options.r(), base->options.out_features()).bias(options.bias())));
  for (torch::Tensor& parameter : lora_b->parameters()) {
    torch::nn::init::zeros_(parameter);
  }
  const torch::ScalarType dtype = c10::promoteTypes(base->weight.scalar_type(), torch::kFloat);
  for (torch::nn::Linear layer : {lora_a, lora_b}) {
    layer->to(base->weight.device(), dtype);
  }
}

void LoRALinearImpl::reset() {
  // With a base of its own: clone fills it.
  set_base(torch::nn::Linear(base_layer->options));
}

std::shared_ptr<torch::nn::Module> LoRALinearImpl::clone(const std::optional<torch::Device>& device) const {
  std::shared_ptr<torch::nn::Module> copy = torch::nn::Cloneable<LoRALinearImpl>::clone(device);
  freeze(std::static_pointer_cast<LoRALinearImpl>(copy)->base_layer);
  return copy;
}

double LoRALinearImpl::scaling() const {
  const auto r = static_cast<double>(options.r());
  return options.alpha() / (options.use_rslora() ? std::sqrt(r) : r);
}

void LoRALinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "lomem::nn::LoRALinear(in_features=" << base_layer->options.in_features()
         << ", out_features=" << base_layer->options.out_features() << ", r=" << options.r()
         << ", alpha=" << options.alpha() << ", dropout=" << options.dropout()
         << ", use_rslora=" << options.use_rslora() << ", bias=" << options.bias() << ")";
}

torch::Tensor LoRALinearImpl::forward(const torch::Tensor& input) {
  const torch::Tensor result = base_layer->forward(input);
  const std::optional<torch::Tensor> bias = options.bias() ? std::optional<torch::Tensor>(lora_b->bias) : std::nullopt;
  const double p = is_training() ? options.dropout() : 0;
  return (result + lora(input, lora_a->weight, lora_b->weight, scaling(), bias, p)).to(result.scalar_type());
}

}  // namespace lomem::nn
