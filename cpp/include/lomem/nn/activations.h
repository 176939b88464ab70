// torch::nn modules of the activations that save a few bits per element.
#pragma once

#include <lomem/config.h>
#include <lomem/ops/activations.h>
#include <lomem/ops/linear.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/options/activation.h>
#include <torch/nn/pimpl.h>

#include <ostream>
#include <string>
#include <utility>

namespace lomem::nn {

struct NoOptions {};

/// Module of an activation `Function`, which defines its options and the call. One that draws at random restarts
/// lomem's stream of seeds when it is built, as a randomized linear layer does (ops/linear.h).
template <class Function>
class FewBitImpl : public torch::nn::Cloneable<FewBitImpl<Function>> {
 public:
  using Options = typename Function::Options;

  explicit FewBitImpl(Options options = {}, FewBit few_bit = {})
      : options(std::move(options)), few_bit(std::move(few_bit)) {
    if (this->few_bit.rounding == "stochastic") {
      lomem::detail::begin_random_stream();
    }
  }
  explicit FewBitImpl(FewBit few_bit) : FewBitImpl(Options{}, std::move(few_bit)) {}

  void reset() override {}
  void pretty_print(std::ostream& stream) const override {
    stream << "lomem::nn::" << Function::name << "(bits=" << few_bit.bits
           << (few_bit.rounding == "stochastic" ? ", rounding=stochastic)" : ")");
  }
  torch::Tensor forward(const torch::Tensor& input) {
    return Function::call(input, options, few_bit);
  }

  Options options;
  FewBit few_bit;
};

/// The same for activations with a fixed number of bits.
template <class Function>
class FixedBitsImpl : public torch::nn::Cloneable<FixedBitsImpl<Function>> {
 public:
  using Options = typename Function::Options;

  explicit FixedBitsImpl(Options options = {}) : options(std::move(options)) {}

  void reset() override {}
  void pretty_print(std::ostream& stream) const override {
    stream << "lomem::nn::" << Function::name << "(";
    if constexpr (requires { Function::arguments(options); }) {
      stream << Function::arguments(options);
    }
    stream << ")";
  }
  torch::Tensor forward(const torch::Tensor& input) {
    return Function::call(input, options);
  }

  Options options;
};

namespace detail {

// (Calls are qualified: ATen has functions of the same names, which argument-dependent lookup would find.)

/// Overwrites the input if the options ask for it. (A temporary of its size is created either way.)
template <class Options>
torch::Tensor in_place(const torch::Tensor& input, const torch::Tensor& output, const Options& options) {
  return options.inplace() ? input.copy_(output) : output;
}

struct GELU {
  using Options = torch::nn::GELUOptions;
  static constexpr const char* name = "GELU";
  static torch::Tensor call(const torch::Tensor& x, const Options& options, const FewBit& few_bit) {
    return lomem::gelu(x, options.approximate(), few_bit);
  }
};
struct QuickGELU {
  using Options = NoOptions;
  static constexpr const char* name = "QuickGELU";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::quick_gelu(x, few_bit);
  }
};
struct SiLU {
  using Options = NoOptions;
  static constexpr const char* name = "SiLU";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::silu(x, few_bit);
  }
};
struct Mish {
  using Options = NoOptions;
  static constexpr const char* name = "Mish";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::mish(x, few_bit);
  }
};
struct Sigmoid {
  using Options = NoOptions;
  static constexpr const char* name = "Sigmoid";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::sigmoid(x, few_bit);
  }
};
struct Tanh {
  using Options = NoOptions;
  static constexpr const char* name = "Tanh";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::tanh(x, few_bit);
  }
};
struct Tanhshrink {
  using Options = NoOptions;
  static constexpr const char* name = "Tanhshrink";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::tanhshrink(x, few_bit);
  }
};
struct Softplus {
  using Options = torch::nn::SoftplusOptions;
  static constexpr const char* name = "Softplus";
  static torch::Tensor call(const torch::Tensor& x, const Options& options, const FewBit& few_bit) {
    return lomem::softplus(x, options.beta(), options.threshold(), few_bit);
  }
};
struct Softsign {
  using Options = NoOptions;
  static constexpr const char* name = "Softsign";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::softsign(x, few_bit);
  }
};
struct LogSigmoid {
  using Options = NoOptions;
  static constexpr const char* name = "LogSigmoid";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::logsigmoid(x, few_bit);
  }
};
struct ELU {
  using Options = torch::nn::ELUOptions;
  static constexpr const char* name = "ELU";
  static torch::Tensor call(const torch::Tensor& x, const Options& options, const FewBit& few_bit) {
    return in_place(x, lomem::elu(x, options.alpha(), few_bit), options);
  }
};
struct CELU {
  using Options = torch::nn::CELUOptions;
  static constexpr const char* name = "CELU";
  static torch::Tensor call(const torch::Tensor& x, const Options& options, const FewBit& few_bit) {
    return in_place(x, lomem::celu(x, options.alpha(), few_bit), options);
  }
};
struct SELU {
  using Options = torch::nn::SELUOptions;
  static constexpr const char* name = "SELU";
  static torch::Tensor call(const torch::Tensor& x, const Options& options, const FewBit& few_bit) {
    return in_place(x, lomem::selu(x, few_bit), options);
  }
};
struct Hardswish {
  using Options = NoOptions;
  static constexpr const char* name = "Hardswish";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/, const FewBit& few_bit) {
    return lomem::hardswish(x, few_bit);
  }
};

struct ReLU {
  using Options = torch::nn::ReLUOptions;
  static constexpr const char* name = "ReLU";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return in_place(x, lomem::relu(x), options);
  }
};
struct LeakyReLU {
  using Options = torch::nn::LeakyReLUOptions;
  static constexpr const char* name = "LeakyReLU";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return in_place(x, lomem::leaky_relu(x, options.negative_slope()), options);
  }
};
struct ReLU6 {
  using Options = torch::nn::ReLU6Options;
  static constexpr const char* name = "ReLU6";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return in_place(x, lomem::relu6(x), options);
  }
};
struct Threshold {
  using Options = torch::nn::ThresholdOptions;
  static constexpr const char* name = "Threshold";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return in_place(x, lomem::threshold(x, options.threshold(), options.value()), options);
  }
};
struct Hardtanh {
  using Options = torch::nn::HardtanhOptions;
  static constexpr const char* name = "Hardtanh";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return in_place(x, lomem::hardtanh(x, options.min_val(), options.max_val()), options);
  }
};
struct Hardsigmoid {
  using Options = NoOptions;
  static constexpr const char* name = "Hardsigmoid";
  static torch::Tensor call(const torch::Tensor& x, const Options& /*options*/) {
    return lomem::hardsigmoid(x);
  }
};
struct Hardshrink {
  using Options = torch::nn::HardshrinkOptions;
  static constexpr const char* name = "Hardshrink";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return lomem::hardshrink(x, options.lambda());
  }
};
struct Softshrink {
  using Options = torch::nn::SoftshrinkOptions;
  static constexpr const char* name = "Softshrink";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return lomem::softshrink(x, options.lambda());
  }
};

}  // namespace detail

// Replacements for the modules of torch::nn, with the same options:
//   lomem::nn::GELU(torch::nn::GELUOptions().approximate("tanh"), lomem::FewBit{.bits = 4})
TORCH_MODULE_IMPL(GELU, FewBitImpl<detail::GELU>);
TORCH_MODULE_IMPL(QuickGELU, FewBitImpl<detail::QuickGELU>);
TORCH_MODULE_IMPL(SiLU, FewBitImpl<detail::SiLU>);
TORCH_MODULE_IMPL(Mish, FewBitImpl<detail::Mish>);
TORCH_MODULE_IMPL(Sigmoid, FewBitImpl<detail::Sigmoid>);
TORCH_MODULE_IMPL(Tanh, FewBitImpl<detail::Tanh>);
TORCH_MODULE_IMPL(Tanhshrink, FewBitImpl<detail::Tanhshrink>);
TORCH_MODULE_IMPL(Softplus, FewBitImpl<detail::Softplus>);
TORCH_MODULE_IMPL(Softsign, FewBitImpl<detail::Softsign>);
TORCH_MODULE_IMPL(LogSigmoid, FewBitImpl<detail::LogSigmoid>);
TORCH_MODULE_IMPL(ELU, FewBitImpl<detail::ELU>);
TORCH_MODULE_IMPL(CELU, FewBitImpl<detail::CELU>);
TORCH_MODULE_IMPL(SELU, FewBitImpl<detail::SELU>);
TORCH_MODULE_IMPL(Hardswish, FewBitImpl<detail::Hardswish>);
TORCH_MODULE_IMPL(ReLU, FixedBitsImpl<detail::ReLU>);
TORCH_MODULE_IMPL(LeakyReLU, FixedBitsImpl<detail::LeakyReLU>);
TORCH_MODULE_IMPL(ReLU6, FixedBitsImpl<detail::ReLU6>);
TORCH_MODULE_IMPL(Threshold, FixedBitsImpl<detail::Threshold>);
TORCH_MODULE_IMPL(Hardtanh, FixedBitsImpl<detail::Hardtanh>);
TORCH_MODULE_IMPL(Hardsigmoid, FixedBitsImpl<detail::Hardsigmoid>);
TORCH_MODULE_IMPL(Hardshrink, FixedBitsImpl<detail::Hardshrink>);
TORCH_MODULE_IMPL(Softshrink, FixedBitsImpl<detail::Softshrink>);

/// Options of ReGELU2: `approximate` is "none" or "tanh"; see FewBit for `fast`.
struct ReGELU2Options {
  TORCH_ARG(std::string, approximate) = "none";
  TORCH_ARG(bool, fast) = false;
};

/// Options of ReSiLU2: see FewBit for `fast`.
struct ReSiLU2Options {
  TORCH_ARG(bool, fast) = false;
};

namespace detail {

struct ReGELU2 {
  using Options = ReGELU2Options;
  static constexpr const char* name = "ReGELU2";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return lomem::regelu2(x, options.approximate(), options.fast());
  }
  static std::string arguments(const Options& options) {
    return "approximate=" + options.approximate() + (options.fast() ? ", fast=true" : "");
  }
};
struct ReSiLU2 {
  using Options = ReSiLU2Options;
  static constexpr const char* name = "ReSiLU2";
  static torch::Tensor call(const torch::Tensor& x, const Options& options) {
    return lomem::resilu2(x, options.fast());
  }
  static std::string arguments(const Options& options) {
    return options.fast() ? "fast=true" : "";
  }
};

}  // namespace detail

/// lomem::regelu2 as a module, a replacement for torch::nn::GELU.
using ReGELU2Impl = FixedBitsImpl<detail::ReGELU2>;
TORCH_MODULE(ReGELU2);

/// lomem::resilu2 as a module, a replacement for torch::nn::SiLU.
using ReSiLU2Impl = FixedBitsImpl<detail::ReSiLU2>;
TORCH_MODULE(ReSiLU2);

}  // namespace lomem::nn
