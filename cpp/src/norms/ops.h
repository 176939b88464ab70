// Each norm's ops as a type, the parameter of the templates for autograd, autocast and the backends. Only this file
// knows which ops there are and how their signatures differ.
#pragma once

#include <lomem/core/dtype.h>
#include <lomem/core/norm.h>
#include <torch/library.h>

#include "../op.h"

namespace lomem::detail {

/// Arguments of a norm, and of its forward op.
struct NormArguments {
  const at::Tensor& input;
  c10::SymIntArrayRef normalized_shape;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  std::optional<double> eps;
  OptionalDtype dtype;
};

/// Arguments of a norm's backward op. Without a bias, the last element of output_mask is false.
struct NormBackwardArguments {
  const at::Tensor& grad_output;
  const at::Tensor& output;
  const at::Tensor& rstd;
  c10::SymIntArrayRef normalized_shape;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  at::ScalarType input_dtype;
  std::array<bool, 3> output_mask;
};

using NormResults = std::tuple<at::Tensor, at::Tensor>;
using NormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline const OptionalTensor no_tensor = std::nullopt;

// A norm has three ops. `call` and `call_backward` call them; `kernel` and `backward_kernel` have the signatures of the
// ops and pass the arguments to a function.

struct MSLayerNorm {
  static constexpr Norm norm = Norm::layer;
  static constexpr bool has_bias = true;
  static constexpr const auto& op = ops::ms_layer_norm;
  static constexpr const auto& forward_op = ops::ms_layer_norm_forward;
  static constexpr const auto& backward_op = ops::ms_layer_norm_backward;

  /// Calls op or forward_op.
  template <class Op>
  static auto call(const Op& op, const NormArguments& args) {
    return op(args.input, args.normalized_shape, args.weight, args.bias, *args.eps, args.dtype);
  }

  static NormGradients call_backward(const NormBackwardArguments& args) {
    return backward_op(
        args.grad_output, args.output, args.rstd, args.normalized_shape, args.weight, args.bias, args.input_dtype,
        args.output_mask);
  }

  template <auto function>
  static auto kernel(
      const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps, OptionalDtype dtype) {
    return function({input, normalized_shape, weight, bias, eps, dtype});
  }

  template <auto function>
  static NormGradients backward_kernel(
      const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
      c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
      at::ScalarType input_dtype, std::array<bool, 3> output_mask) {
    return function({grad_output, output, rstd, normalized_shape, weight, bias, input_dtype, output_mask});
  }
};

struct MSRMSNorm {
  static constexpr Norm norm = Norm::rms;
  static constexpr bool has_bias = false;
  static constexpr const auto& op = ops::ms_rms_norm;
  static constexpr const auto& forward_op = ops::ms_rms_norm_forward;
  static constexpr const auto& backward_op = ops::ms_rms_norm_backward;

  template <class Op>
  static auto call(const Op& op, const NormArguments& args) {
    return op(args.input, args.normalized_shape, args.weight, args.eps, args.dtype);
  }

  static NormGradients call_backward(const NormBackwardArguments& args) {
    auto [grad_input, grad_weight] = backward_op(
        args.grad_output, args.output, args.rstd, args.normalized_shape, args.weight, args.input_dtype,
        {args.output_mask[0], args.output_mask[1]});
    return {grad_input, grad_weight, at::Tensor()};
  }

  template <auto function>
  static auto kernel(
      const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      std::optional<double> eps, OptionalDtype dtype) {
    return function({input, normalized_shape, weight, no_tensor, eps, dtype});
  }

  template <auto function>
  static std::tuple<at::Tensor, at::Tensor> backward_kernel(
      const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
      c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, at::ScalarType input_dtype,
      std::array<bool, 2> output_mask) {
    auto [grad_input, grad_weight, grad_bias] = function(
        {grad_output,
         output,
         rstd,
         normalized_shape,
         weight,
         no_tensor,
         input_dtype,
         {output_mask[0], output_mask[1], false}});
    return {grad_input, grad_weight};
  }
};

/// Calls visit(Type<Op>{}) for each norm.
template <class Visitor>
void for_each_norm(Visitor&& visit) {
  visit(Type<MSLayerNorm>{});
  visit(Type<MSRMSNorm>{});
}

/// Registers the three ops of each norm. `Kernels` has
///     template <class Op> static at::Tensor value(const NormArguments&);
///     template <class Op> static NormResults forward(const NormArguments&);
///     template <class Op> static NormGradients backward(const NormBackwardArguments&);
template <class Kernels>
void implement_norms(torch::Library& m) {
  for_each_norm([&](auto type) {
    using Op = typename decltype(type)::type;
    m.impl(Op::op.name, &Op::template kernel<&Kernels::template value<Op>>);
    m.impl(Op::forward_op.name, &Op::template kernel<&Kernels::template forward<Op>>);
    m.impl(Op::backward_op.name, &Op::template backward_kernel<&Kernels::template backward<Op>>);
  });
}

}  // namespace lomem::detail
