// The torch::nn module of the gated units.
#pragma once

#include <lomem/config.h>
#include <lomem/ops/gated.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <ostream>
#include <string>
#include <utility>

namespace lomem::nn {

/// Options of GatedUnit. `activation` is "silu", "gelu", "gelu_tanh", "relu" or "sigmoid"; `layout`, where the operands
/// are in one tensor that holds both, is "gate_up", "up_gate" or "interleaved".
struct GatedUnitOptions {
  GatedUnitOptions(std::string activation = "silu") : activation_(std::move(activation)) {}  // NOLINT

  TORCH_ARG(std::string, activation);
  TORCH_ARG(std::string, layout) = "gate_up";
};

/// lomem::gated as a module: SwiGLU, GeGLU, ReGLU or GLU, by its activation.
class GatedUnitImpl : public torch::nn::Cloneable<GatedUnitImpl> {
 public:
  explicit GatedUnitImpl(GatedUnitOptions options = {}) : options(std::move(options)) {}

  void reset() override {}
  void pretty_print(std::ostream& stream) const override {
    stream << "lomem::nn::GatedUnit(activation=" << options.activation() << ", layout=" << options.layout() << ")";
  }
  /// Without `up`, `gate` holds both operands.
  torch::Tensor forward(const torch::Tensor& gate, const std::optional<torch::Tensor>& up = std::nullopt) {
    return gated(gate, up, options.activation(), options.layout());
  }

  GatedUnitOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<torch::Tensor>())})
};
TORCH_MODULE(GatedUnit);

}  // namespace lomem::nn
