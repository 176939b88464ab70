// The torch::nn module of dropout.
#pragma once

#include <lomem/config.h>
#include <lomem/ops/dropout.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <ostream>
#include <string>
#include <utility>

namespace lomem::nn {

/// Options of Dropout: the probability of an element to be dropped, in [0, 1), and what is saved: "mask"
/// or "seed".
struct DropoutOptions {
  DropoutOptions(double p = 0.5) : p_(p) {}  // NOLINT

  TORCH_ARG(double, p);
  TORCH_ARG(std::string, saves) = "mask";
};

/// lomem::dropout as a module, a replacement for torch::nn::Dropout; never in place.
class DropoutImpl : public torch::nn::Cloneable<DropoutImpl> {
 public:
  explicit DropoutImpl(DropoutOptions options = {}) : options(std::move(options)) {}

  void reset() override {}
  void pretty_print(std::ostream& stream) const override {
    stream << "lomem::nn::Dropout(p=" << options.p() << ", saves=" << options.saves() << ")";
  }
  torch::Tensor forward(const torch::Tensor& input) {
    return dropout(input, options.p(), is_training(), options.saves());
  }

  DropoutOptions options;
};
TORCH_MODULE(Dropout);

}  // namespace lomem::nn
