// torch::nn modules.
#pragma once

#include <lomem/config.h>
#include <lomem/nn/activations.h>
#include <lomem/ops.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <string>
#include <vector>

namespace lomem::nn {

/// Options of ReGELU2: `approximate`, "none" or "tanh"; `fast`, see lomem::regelu2.
struct LOMEM_API ReGELU2Options {
  TORCH_ARG(std::string, approximate) = "none";
  TORCH_ARG(bool, fast) = false;
};

/// lomem::regelu2 as a module, in place of torch::nn::GELU.
class LOMEM_API ReGELU2Impl : public torch::nn::Cloneable<ReGELU2Impl> {
 public:
  explicit ReGELU2Impl(ReGELU2Options options = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  ReGELU2Options options;
};
TORCH_MODULE(ReGELU2);

/// Options of ReSiLU2: `fast`, see lomem::regelu2.
struct LOMEM_API ReSiLU2Options {
  TORCH_ARG(bool, fast) = false;
};

/// lomem::resilu2 as a module, in place of torch::nn::SiLU.
class LOMEM_API ReSiLU2Impl : public torch::nn::Cloneable<ReSiLU2Impl> {
 public:
  explicit ReSiLU2Impl(ReSiLU2Options options = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  ReSiLU2Options options;
};
TORCH_MODULE(ReSiLU2);

/// Options of MSLayerNorm: torch::nn::LayerNormOptions with `bias` and `output_dtype`.
/// `elementwise_affine` is off by default, as in LowMemoryBP.
struct LOMEM_API MSLayerNormOptions {
  /* implicit */ MSLayerNormOptions(std::vector<int64_t> normalized_shape);                            // NOLINT
  /* implicit */ MSLayerNormOptions(int64_t size) : MSLayerNormOptions(std::vector<int64_t>{size}) {}  // NOLINT

  TORCH_ARG(std::vector<int64_t>, normalized_shape);
  TORCH_ARG(double, eps) = 1e-5;
  TORCH_ARG(bool, elementwise_affine) = false;
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(std::optional<torch::Dtype>, output_dtype) = std::nullopt;
};

/// lomem::ms_layer_norm as a module, in place of torch::nn::LayerNorm.
class LOMEM_API MSLayerNormImpl : public torch::nn::Cloneable<MSLayerNormImpl> {
 public:
  explicit MSLayerNormImpl(int64_t size);
  explicit MSLayerNormImpl(std::vector<int64_t> normalized_shape);
  explicit MSLayerNormImpl(MSLayerNormOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  MSLayerNormOptions options;
  /// Of shape `normalized_shape`; undefined where there is none.
  torch::Tensor weight;
  torch::Tensor bias;
};
TORCH_MODULE(MSLayerNorm);

/// Options of MSRMSNorm. `elementwise_affine` is off by default, as in LowMemoryBP.
struct LOMEM_API MSRMSNormOptions {
  /* implicit */ MSRMSNormOptions(std::vector<int64_t> normalized_shape);                          // NOLINT
  /* implicit */ MSRMSNormOptions(int64_t size) : MSRMSNormOptions(std::vector<int64_t>{size}) {}  // NOLINT

  TORCH_ARG(std::vector<int64_t>, normalized_shape);
  TORCH_ARG(std::optional<double>, eps) = std::nullopt;
  TORCH_ARG(bool, elementwise_affine) = false;
  TORCH_ARG(std::optional<torch::Dtype>, output_dtype) = std::nullopt;
};

/// lomem::ms_rms_norm as a module.
class LOMEM_API MSRMSNormImpl : public torch::nn::Cloneable<MSRMSNormImpl> {
 public:
  explicit MSRMSNormImpl(int64_t size);
  explicit MSRMSNormImpl(std::vector<int64_t> normalized_shape);
  explicit MSRMSNormImpl(MSRMSNormOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  MSRMSNormOptions options;
  /// Of shape `normalized_shape`; undefined where there is none.
  torch::Tensor weight;
};
TORCH_MODULE(MSRMSNorm);

/// Options of RandomizedLinear: torch::nn::LinearOptions with those of RandomizedLinearArgs. One of `proj_dim` and
/// `proj_dim_ratio` must be given.
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

/// lomem::randomized_linear as a module, in place of torch::nn::Linear, with its parameters. In evaluation mode it is
/// torch's linear layer.
class LOMEM_API RandomizedLinearImpl : public torch::nn::Cloneable<RandomizedLinearImpl> {
 public:
  explicit RandomizedLinearImpl(RandomizedLinearOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  RandomizedLinearOptions options;
  /// Of shape (out_features, in_features).
  torch::Tensor weight;
  /// Of shape (out_features); undefined where there is none.
  torch::Tensor bias;
};
TORCH_MODULE(RandomizedLinear);

}  // namespace lomem::nn
