// The torch::nn module of the randomized linear layer.
#pragma once

#include <lomem/config.h>
#include <lomem/ops/linear.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <vector>

namespace lomem::nn {

/// Options of RandomizedLinear: those of torch::nn::LinearOptions and RandomizedLinearArgs. Exactly one of `proj_dim`
/// and `proj_dim_ratio` must be given.
struct LOMEM_API RandomizedLinearOptions {
  RandomizedLinearOptions(int64_t in_features, int64_t out_features);

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(std::string, matmul) = "gaussian";
  TORCH_ARG(std::optional<int64_t>, proj_dim) = std::nullopt;
  TORCH_ARG(std::optional<double>, proj_dim_ratio) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, proj_dim_min) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, proj_dim_max) = std::nullopt;
};

/// lomem::randomized_linear as a module, a replacement for torch::nn::Linear with the same parameters. In evaluation
/// mode it is torch's linear layer.
class LOMEM_API RandomizedLinearImpl : public torch::nn::Cloneable<RandomizedLinearImpl> {
 public:
  explicit RandomizedLinearImpl(RandomizedLinearOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  RandomizedLinearOptions options;
  /// Shape (out_features, in_features).
  torch::Tensor weight;
  /// Shape (out_features); undefined if there is no bias.
  torch::Tensor bias;
};
TORCH_MODULE(RandomizedLinear);

}  // namespace lomem::nn
