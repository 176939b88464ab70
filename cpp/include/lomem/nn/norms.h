// torch::nn modules of the norms.
#pragma once

#include <lomem/config.h>
#include <lomem/ops/norms.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <vector>

namespace lomem::nn {

/// Options of MSLayerNorm: those of torch::nn::LayerNormOptions, plus `bias` and `output_dtype`. `elementwise_affine`
/// is off by default, as in LowMemoryBP.
struct LOMEM_API MSLayerNormOptions {
  /* implicit */ MSLayerNormOptions(std::vector<int64_t> normalized_shape);                            // NOLINT
  /* implicit */ MSLayerNormOptions(int64_t size) : MSLayerNormOptions(std::vector<int64_t>{size}) {}  // NOLINT

  TORCH_ARG(std::vector<int64_t>, normalized_shape);
  TORCH_ARG(double, eps) = 1e-5;
  TORCH_ARG(bool, elementwise_affine) = false;
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(std::optional<torch::Dtype>, output_dtype) = std::nullopt;
};

/// lomem::ms_layer_norm as a module, a replacement for torch::nn::LayerNorm.
class LOMEM_API MSLayerNormImpl : public torch::nn::Cloneable<MSLayerNormImpl> {
 public:
  explicit MSLayerNormImpl(int64_t size);
  explicit MSLayerNormImpl(std::vector<int64_t> normalized_shape);
  explicit MSLayerNormImpl(MSLayerNormOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& input);

  MSLayerNormOptions options;
  /// Shape `normalized_shape`; undefined if there is none.
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
  /// Shape `normalized_shape`; undefined if there is none.
  torch::Tensor weight;
};
TORCH_MODULE(MSRMSNorm);

}  // namespace lomem::nn
