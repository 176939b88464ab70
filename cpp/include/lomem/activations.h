// Activations whose backward pass keeps few bits an element. Their results are torch's, bit for bit, in
// every dtype and layout; they are differentiable and the same ops as torch.ops.lomem in Python.
//
// Every function raises c10::Error that names op, argument, the value it got and the value it wants.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/step_function.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace lomem {

/// How many bits of each element an activation keeps, and which step function says what for.
struct LOMEM_API FewBit {
  /// 1 to 8. The backward pass keeps ceil(bits * numel / 8) bytes.
  int64_t bits = 3;
  /// "primitive" or "derivative"; see step_function.
  std::string criterion = "derivative";
  /// In place of the library's; 2^bits - 1 boundaries at most.
  std::optional<StepFunction> steps = std::nullopt;
};

// `input`: any shape and strides; float64, float32, bfloat16 or float16. Other arguments: those of torch.

/// `approximate`: "none" or "tanh".
LOMEM_API at::Tensor gelu(const at::Tensor& input, std::string_view approximate = "none", const FewBit& few_bit = {});
/// input * sigmoid(1.702 * input).
LOMEM_API at::Tensor quick_gelu(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor silu(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor mish(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor sigmoid(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor tanh(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor tanhshrink(const at::Tensor& input, const FewBit& few_bit = {});
/// `beta`: positive.
LOMEM_API at::Tensor softplus(
    const at::Tensor& input, double beta = 1, double threshold = 20, const FewBit& few_bit = {});
LOMEM_API at::Tensor softsign(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor logsigmoid(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor elu(const at::Tensor& input, double alpha = 1, const FewBit& few_bit = {});
/// `alpha`: positive.
LOMEM_API at::Tensor celu(const at::Tensor& input, double alpha = 1, const FewBit& few_bit = {});
LOMEM_API at::Tensor selu(const at::Tensor& input, const FewBit& few_bit = {});
LOMEM_API at::Tensor hardswish(const at::Tensor& input, const FewBit& few_bit = {});

// Activations of straight pieces: they keep 1 bit an element, and their gradient is torch's, at the kinks too.

LOMEM_API at::Tensor relu(const at::Tensor& input);
LOMEM_API at::Tensor leaky_relu(const at::Tensor& input, double negative_slope = 0.01);
LOMEM_API at::Tensor relu6(const at::Tensor& input);
LOMEM_API at::Tensor threshold(const at::Tensor& input, double threshold, double value);
LOMEM_API at::Tensor hardtanh(const at::Tensor& input, double min_val = -1, double max_val = 1);
LOMEM_API at::Tensor hardsigmoid(const at::Tensor& input);
LOMEM_API at::Tensor hardshrink(const at::Tensor& input, double lambda = 0.5);
LOMEM_API at::Tensor softshrink(const at::Tensor& input, double lambda = 0.5);

/// function(input) with the derivative of `steps`. `function` works element by element; it is called without
/// a gradient.
LOMEM_API at::Tensor step_activation(
    const at::Tensor& input, const std::function<at::Tensor(const at::Tensor&)>& function, const StepFunction& steps);

/// Packed codes of `bits` bits in the row-major order of `input`, 1-D uint8: how many boundaries are below
/// each element. For training code with a backward pass of its own; see step_activation_backward.
LOMEM_API at::Tensor step_codes(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits);

}  // namespace lomem
