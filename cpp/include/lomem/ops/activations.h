// Activations that save a few bits per element for the backward pass. Their results match torch's bit for bit in every
// dtype and layout; they are differentiable and the same ops as torch.ops.lomem in Python.
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>
#include <lomem/ops/step_function.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace lomem {

/// How many bits per element an activation saves, and which step function approximates its derivative.
struct LOMEM_API FewBit {
  /// 1 to 8; ceil(bits * numel / 8) bytes are saved for backward.
  int64_t bits = 3;
  /// "derivative", "primitive" or "paper"; see step_function.
  std::string criterion = "derivative";
  /// Replaces the library's step function; at most 2^bits - 1 boundaries.
  std::optional<StepFunction> steps = std::nullopt;
  /// Allows the approximate values of core/fast_forward.h, which are faster on CPUs, in place of torch's. Only GELU and
  /// SiLU have them; if there is no such kernel, the option has no effect.
  bool fast = false;
  /// "nearest", or "stochastic": the derivative itself is rounded to `bits` bits at random, so that the mean of the
  /// gradient over the draws is the exact one (core/drawn.h). Then `criterion` is "derivative", and there are no
  /// `steps`.
  std::string rounding = "nearest";
  /// Of what is drawn: 0-d int64 on the device of the input, never read on the host but for the CPU. The same seed
  /// gives the same gradient. By default the next one of lomem's stream (ops/linear.h).
  std::optional<at::Tensor> seed = std::nullopt;
};

namespace detail {

LOMEM_API at::Tensor few_bit_activation(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, const FewBit& few_bit);

LOMEM_API at::Tensor few_bit_activation(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, int64_t bits,
    std::string_view criterion, bool fast);

/// GELU or SiLU with its published step function. `op` is used in error messages.
LOMEM_API at::Tensor published_activation(
    const char* op, const at::Tensor& input, std::string_view function, bool fast);

LOMEM_API at::Tensor exact_activation(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters);

/// Name of the function that GELU with `approximate` computes. `op` is used in error messages.
LOMEM_API std::string_view gelu_function(const char* op, std::string_view approximate);

/// A row of the table of activations, for documentation and tests.
struct ActivationFacts {
  std::string name;
  /// Names and defaults, in the op's argument order.
  std::vector<std::pair<std::string, std::optional<double>>> parameters;
  /// Whether the gradient is exact (1 bit per element).
  bool is_exact;
  /// Whether there is a step function for criterion "paper".
  bool is_published;
};

LOMEM_API std::vector<ActivationFacts> activation_facts();

}  // namespace detail

// `input` may have any shape and strides; its dtype is float64, float32, bfloat16 or float16. Other arguments are those
// of torch.

/// `approximate` is "none" or "tanh".
inline at::Tensor gelu(const at::Tensor& input, std::string_view approximate = "none", const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, detail::gelu_function("lomem::gelu", approximate), {}, few_bit);
}

/// input * sigmoid(1.702 * input).
inline at::Tensor quick_gelu(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "quick_gelu", {}, few_bit);
}

inline at::Tensor silu(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "silu", {}, few_bit);
}

inline at::Tensor mish(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "mish", {}, few_bit);
}

inline at::Tensor sigmoid(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "sigmoid", {}, few_bit);
}

inline at::Tensor tanh(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "tanh", {}, few_bit);
}

inline at::Tensor tanhshrink(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "tanhshrink", {}, few_bit);
}

/// `beta` must be positive.
inline at::Tensor softplus(
    const at::Tensor& input, double beta = 1, double threshold = 20, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "softplus", {beta, threshold}, few_bit);
}

inline at::Tensor softsign(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "softsign", {}, few_bit);
}

inline at::Tensor logsigmoid(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "logsigmoid", {}, few_bit);
}

inline at::Tensor elu(const at::Tensor& input, double alpha = 1, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "elu", alpha, few_bit);
}

/// `alpha` must be positive.
inline at::Tensor celu(const at::Tensor& input, double alpha = 1, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "celu", alpha, few_bit);
}

inline at::Tensor selu(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "selu", {}, few_bit);
}

inline at::Tensor hardswish(const at::Tensor& input, const FewBit& few_bit = {}) {
  return detail::few_bit_activation(input, "hardswish", {}, few_bit);
}

// Functions named as in LowMemoryBP: 2 bits per element, with the step functions of arXiv:2406.16282.

/// gelu with criterion "paper".
inline at::Tensor regelu2(const at::Tensor& input, std::string_view approximate = "none", bool fast = false) {
  constexpr const char* op = "lomem::regelu2";
  return detail::published_activation(op, input, detail::gelu_function(op, approximate), fast);
}

/// silu with criterion "paper".
inline at::Tensor resilu2(const at::Tensor& input, bool fast = false) {
  return detail::published_activation("lomem::resilu2", input, "silu", fast);
}

// Activations whose derivative has two values: they save 1 bit per element, and their gradient equals torch's, even at
// the kinks.

inline at::Tensor relu(const at::Tensor& input) {
  return detail::exact_activation(input, "relu", {});
}

inline at::Tensor leaky_relu(const at::Tensor& input, double negative_slope = 0.01) {
  return detail::exact_activation(input, "leaky_relu", negative_slope);
}

inline at::Tensor relu6(const at::Tensor& input) {
  return detail::exact_activation(input, "relu6", {});
}

inline at::Tensor threshold(const at::Tensor& input, double threshold, double value) {
  return detail::exact_activation(input, "threshold", {threshold, value});
}

inline at::Tensor hardtanh(const at::Tensor& input, double min_val = -1, double max_val = 1) {
  return detail::exact_activation(input, "hardtanh", {min_val, max_val});
}

inline at::Tensor hardsigmoid(const at::Tensor& input) {
  return detail::exact_activation(input, "hardsigmoid", {});
}

inline at::Tensor hardshrink(const at::Tensor& input, double lambda = 0.5) {
  return detail::exact_activation(input, "hardshrink", lambda);
}

inline at::Tensor softshrink(const at::Tensor& input, double lambda = 0.5) {
  return detail::exact_activation(input, "softshrink", lambda);
}

/// function(input) with the derivative of `steps`. `function` must be elementwise; it is called with gradients
/// disabled.
LOMEM_API at::Tensor step_activation(
    const at::Tensor& input, const std::function<at::Tensor(const at::Tensor&)>& function, const StepFunction& steps);

// The two halves of the differentiable functions, for training code with its own backward pass.

/// The activation that step_function calls `function`, and the codes of its input: `few_bit.bits` bits per element in
/// the memory order of the output.
LOMEM_API std::tuple<at::Tensor, at::Tensor> step_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, const FewBit& few_bit);

/// The activation, codes that are drawn at random, and the seed that they are drawn with: a copy of `few_bit.seed`, or
/// a new one. `few_bit.rounding` is "stochastic". Codes are in the memory order of the output.
LOMEM_API std::tuple<at::Tensor, at::Tensor, at::Tensor> drawn_activation_forward(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, const FewBit& few_bit);

/// grad_output * levels of such codes, in row-major order of grad_output. `levels` are those of drawn_levels.
LOMEM_API at::Tensor drawn_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, const DrawnLevels<double>& levels,
    int64_t bits);

/// Packed codes of `bits` bits in the row-major order of `input`, 1-D uint8: the number of boundaries below each
/// element.
LOMEM_API at::Tensor step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits);

/// grad_output * levels[codes], with codes in row-major order of grad_output. Works for every activation; `levels` has
/// 2^bits entries.
LOMEM_API at::Tensor step_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits);

}  // namespace lomem
