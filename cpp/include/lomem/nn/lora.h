// The torch::nn module of low-rank adapters.
#pragma once

#include <lomem/config.h>
#include <lomem/ops/lora.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>

namespace lomem::nn {

/// Options of LoRALinear.
struct LOMEM_API LoRALinearOptions {
  LoRALinearOptions(int64_t r);  // NOLINT(google-explicit-constructor)

  /// Rank of the adapter.
  TORCH_ARG(int64_t, r);
  /// The adapter is multiplied by alpha / r, or by alpha / sqrt(r) with use_rslora (arXiv:2312.03732).
  TORCH_ARG(double, alpha) = 1;
  /// Probability that an element of the adapter's input is dropped in training.
  TORCH_ARG(double, dropout) = 0;
  TORCH_ARG(bool, use_rslora) = false;
  /// Whether the second layer of the adapter has a bias.
  TORCH_ARG(bool, bias) = false;
};

/// A linear layer whose parameters are frozen, and a trainable adapter beside it: lomem::lora. `lora_a` starts like
/// torch::nn::Linear and `lora_b` at zero, in float32 (float64 for a base in float64). The result has the dtype of the
/// base's. Named "base_layer", "lora_A" and "lora_B", as by peft.
class LOMEM_API LoRALinearImpl : public torch::nn::Cloneable<LoRALinearImpl> {
 public:
  LoRALinearImpl(const torch::nn::Linear& base, LoRALinearOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// The base of the copy is frozen too.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<torch::Device>& device = std::nullopt) const override;
  torch::Tensor forward(const torch::Tensor& input);
  /// What the adapter is multiplied by.
  double scaling() const;

  LoRALinearOptions options;
  torch::nn::Linear base_layer = nullptr;
  /// Its weight has shape (r, in_features).
  torch::nn::Linear lora_a = nullptr;
  /// Its weight has shape (out_features, r).
  torch::nn::Linear lora_b = nullptr;

 private:
  void set_base(const torch::nn::Linear& base);
};
TORCH_MODULE(LoRALinear);

}  // namespace lomem::nn
